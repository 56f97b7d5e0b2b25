"""Train GPT language models on your own text with TensorFlow.

    import trainer

    config = trainer.load_config("quickstart", ["run_folder=runs/python", "train.total_steps=200"])
    result = trainer.train(config)
    print(trainer.generate(result.run_folder, "Once upon a time"))

- Settings: `load_config`, `make_config`, `Config`.
- Runs: `train`, `resume`, `fork`; a `Callback` follows a run, and stops it by `StopTraining`.
- Trained models: `load`, `generate`, `score`, `export`; the class `GPT`, which Keras has to know to load a .keras file.
- Batches for Keras: `batches`, `validation_batches`.
- `UserError` is what all of them raise if a setting, a file or an argument is wrong.

TensorFlow is imported by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import UserError
from trainer.system.fork import check_not_forked
from trainer.system.progress import shown
from trainer.system.terminal import lasting_output, quiet_import, warn
from trainer.version import __version__

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from trainer.config.file import load_config, make_config
    from trainer.config.settings import Config
    from trainer.decoding.writing import Text
    from trainer.exchange.export import Exported
    from trainer.loaded import LoadedModel
    from trainer.model.gpt import GPT
    from trainer.monitoring.callbacks import Callback, StopTraining
    from trainer.runs.results import Evaluation
    from trainer.training.loop import TrainingResult

__all__ = [
    "GPT",
    "Callback",
    "Config",
    "StopTraining",
    "UserError",
    "__version__",
    "batches",
    "export",
    "fork",
    "generate",
    "load",
    "load_config",
    "make_config",
    "resume",
    "score",
    "train",
    "validation_batches",
]


def __getattr__(name: str) -> Any:
    # This package is imported before the command watches for signals, so it must load fast: pydantic comes later.
    if name in ("Config", "load_config", "make_config"):
        from trainer.config import file

        return getattr(file, name)
    if name in ("Callback", "StopTraining"):
        from trainer.monitoring import callbacks

        return getattr(callbacks, name)
    if name == "GPT":  # Keras loads a .keras file once it knows this class.
        with quiet_import():
            from trainer.model.gpt import GPT

        return GPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # For completion and help(). Not the two large classes: help() would load TensorFlow and print a thousand lines.
    return [name for name in __all__ if name not in ("Config", "GPT")]


def train(
    config: Config,
    build_model: Callable[[Config, int], keras.Model] | None = None,
    say: Callable[[str], None] = print,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Prepares the text unless it is prepared already, and trains a model on it.

    Args:
        config: the settings, from `load_config` or `make_config`.
        build_model: a function that is called in the strategy's scope with the config and the vocabulary size, and
            returns a Keras model from int32 [batch, sequence] to logits [batch, sequence, vocabulary]. By default the
            model is the GPT that config describes.
        say: a function that prints a line.
        callbacks: objects of `trainer.Callback`, which the run calls as it reports something, and which may stop it.

    Returns:
        The run's folder, the trained model (None if distribution.shard split the weights: `load` reads it), its
        evaluation, its samples, and its curves as `history`.

    Raises:
        UserError: a setting, the text or the run folder is wrong.
    """
    check_not_forked()
    with quiet_import():
        from trainer.training import launch

    with lasting_output():
        return launch.start(config, build_model, say, callbacks=callbacks)


def resume(
    run_folder: str,
    build_model: Callable[[Config, int], keras.Model] | None = None,
    say: Callable[[str], None] = print,
    overrides: Sequence[str] = (),
    step: int | Literal["best"] | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Resumes a run from its newest checkpoint, or from another one.

    Args:
        run_folder: the folder of the run, or of one of its checkpoints: RUN/checkpoints/step_000001000.
        build_model: the function that was given to `train`.
        say: a function that prints a line.
        overrides: `section.key=value` strings for settings that leave the weights as they are, such as
            `distribution.logical_devices=4`, and for a length that the schedule allows, `train.total_steps=3000`.
        step: the step of the checkpoint to resume from, or "best" for the one with the lowest validation loss.
        callbacks: objects of `trainer.Callback`; see `train`.

    Returns:
        The run's folder, the trained model (None if distribution.shard split the weights: `load` reads it), its
        evaluation, its samples, and its curves as `history`.

    Raises:
        UserError: the run does not exist, its data is gone, or an override would make it another run.
    """
    check_not_forked()
    with quiet_import():
        from trainer.training import launch

    with lasting_output():
        return launch.resume(run_folder, build_model, say, overrides, step, callbacks)


def fork(
    run_folder: str,
    overrides: Sequence[str],
    build_model: Callable[[Config, int], keras.Model] | None = None,
    say: Callable[[str], None] = print,
    step: int | Literal["best"] | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Trains a new run that goes on from a checkpoint of another one, by another plan.

    The fork has the weights, the optimizer, the steps and the tokenizer of its parent.

    Args:
        run_folder: the folder of the parent, or of one of its checkpoints, or RUN@1000.
        overrides: `section.key=value` strings: run_folder, the folder of the fork, and the settings that are not to be
            the parent's, such as `train.total_steps=3000`.
        build_model: the function that was given to `train`.
        say: a function that prints a line.
        step: the step of the parent's checkpoint, or "best" for the one with the lowest validation loss.
        callbacks: objects of `trainer.Callback`; see `train`.

    Returns:
        The fork's folder, the trained model, its evaluation, its samples, and its curves as `history`.

    Raises:
        UserError: the parent does not exist, or a setting cannot change in a fork.
    """
    check_not_forked()
    with quiet_import():
        from trainer.training import launch

    with lasting_output():
        return launch.fork(run_folder, overrides, build_model, say, step, callbacks)


def batches(config: Config, first_step: int = 0, say: Callable[[str], None] = print) -> tf.data.Dataset:
    """Returns the training batches of a config in the order of `train`, in the form that Keras fit accepts.

    Args:
        config: the settings, from `load_config` or `make_config`. The text is prepared unless it is prepared already.
        first_step: the step to begin at.
        say: a function that prints a line.

    Returns:
        A data set of (inputs int32, targets int32, weights float32), each [global_batch_size, sequence_length]: the
        batches of all steps of the config, so that `fit` needs no `epochs`. The weights are 0 where a document or, in
        train.batch_warmup, a batch has ended.
    """
    check_not_forked()
    with quiet_import():
        from trainer.data.batches import total_steps, training_batches
        from trainer.data.prepare import prepare

    prepared = prepare(config, say)
    return training_batches(prepared, config, first_step, total_steps(prepared, config))


def validation_batches(config: Config, say: Callable[[str], None] = print) -> tf.data.Dataset:
    """Returns the whole validation text of a config, each example once, in the form that Keras evaluate accepts.

    The mean loss of the tokens, by the weights, is the loss of `score`: in Keras that is a weighted metric, as in
    `weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(from_logits=True)]`. Keras' own `loss` is another
    mean, in which padding counts.

    Args:
        config: the settings, from `load_config` or `make_config`. The text is prepared unless it is prepared already.
        say: a function that prints a line.

    Returns:
        A finite data set of (inputs int32, targets int32, weights float32), each [global_batch_size, sequence_length].
        A weight is 0 if its target is padding; the last batch is filled with examples of weight 0.

    Raises:
        UserError: a setting or the text is wrong.
    """
    check_not_forked()
    with quiet_import():
        from trainer.data.batches import whole_validation
        from trainer.data.prepare import prepare

    return whole_validation(prepare(config, say), config)


def load(
    run_folder: str,
    step: int | Literal["best"] | None = None,
    build_model: Callable[[Config, int], keras.Model] | None = None,
    overrides: Sequence[str] = (),
) -> LoadedModel:
    """Loads the newest checkpoint of a run, or another one, as an object: `run = trainer.load("runs/quickstart")`.

    `run.model` is the Keras model, `run.tokenizer` encodes and decodes, `run.generate` writes, `run.score` scores
    texts, and `run.history` has the curves.

    Args:
        run_folder: the folder of the run, or of one of its checkpoints: RUN/checkpoints/step_000001000; or a model in
            another form: a folder of Hugging Face, or a .keras file that trainer exported.
        step: the step of the checkpoint to load, or "best" for the one with the lowest validation loss.
        build_model: the function that was given to `train`.
        overrides: `distribution.key=value` strings that name devices. The first of them holds the model, or, with
            `distribution.shard=weights`, all of them together, each its pieces: then `run.model` is refused. Without
            overrides one device that TensorFlow chooses holds the model.

    Returns:
        The model with all that belongs to it.

    Raises:
        UserError: the run does not exist, has no checkpoint, or is damaged; or the devices cannot be used.
    """
    check_not_forked()
    from trainer.exchange.open import read_config_on_devices

    # Before TensorFlow is loaded: a mistake is reported at once.
    config = read_config_on_devices(run_folder, overrides, build_model, step)
    with quiet_import():
        from trainer.loaded import LoadedModel
        from trainer.training.on_devices import open_to_write, open_whole
    if not overrides:
        return LoadedModel(open_whole(run_folder, build_model, step, warn))
    return LoadedModel(open_to_write(run_folder, config, True, build_model, step, warn))


def generate(
    run_folder: str,
    prompts: str | Sequence[str] = "",
    sampler: str = "top-p",
    num_tokens: int | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    k: int | None = None,
    p: float | None = None,
    num_beams: int | None = None,
    temperature: float | None = None,
    build_model: Callable[[Config, int], keras.Model] | None = None,
    step: int | Literal["best"] | None = None,
    *,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    length_penalty: float | None = None,
    stop_tokens: Sequence[int] | None = None,
    num_samples: int | None = None,
    sliding_window: bool | None = None,
    batch_size: int | None = None,
    overrides: Sequence[str] = (),
) -> list[Text]:
    """Continues prompts with the newest checkpoint of a run, or with another one.

    The defaults of num_tokens, stop, k, p, num_beams and temperature are the run's own `samples` settings. An option
    that the sampler does not read is an error.

    Args:
        run_folder: the folder of the run, or of one of its checkpoints: RUN/checkpoints/step_000001000.
        prompts: one text or several.
        sampler: "greedy", "beam", "random", "top-k", "top-p" or "min-p". "random" draws from all tokens, or from those
            that k, p and min_p leave, in this order.
        num_tokens: the most tokens to write.
        seed: decides what is drawn, by default 0; the same seed draws the same text in any batch.
        stop: a text that ends a continuation, or several.
        k: draws from this many likeliest tokens.
        p: draws from the fewest tokens that have this probability together.
        num_beams: the number of beams of beam search.
        temperature: divides the logits before a draw.
        build_model: the function that was given to `train`.
        step: the step of the checkpoint to use, or "best" for the one with the lowest validation loss.
        min_p: draws from tokens with at least this share of the likeliest token's probability.
        repetition_penalty: more than 1 makes tokens less likely that the prompt or the continuation holds.
        length_penalty: more than 0 makes beam search prefer longer texts.
        stop_tokens: tokens that end a text as [BOS] does; the text does not hold them.
        num_samples: the number of texts for each prompt; with beam search its best texts.
        sliding_window: whether a text goes on when the context is full, with its last half as the new context.
        batch_size: the most texts that are written at a time; each beam counts as one.
        overrides: `distribution.key=value` strings for other devices; see `load`. A run that has
            distribution.shard="weights" needs none to be written with on its devices, which hold the model together.

    Returns:
        The prompts with their continuations, as texts that know more: `prompt`, `continuation`, `num_tokens`, `finish`
        ("end", "stop" or "length"), `sample` and `score`.

    Raises:
        UserError: the run does not exist or has no checkpoint, or a prompt or setting cannot be used.
    """
    check_not_forked()
    from trainer.decoding.request import Request
    from trainer.exchange.open import read_config_on_devices

    options = {
        "num_tokens": num_tokens,
        "seed": seed,
        "stop": stop,
        "k": k,
        "p": p,
        "min_p": min_p,
        "num_beams": num_beams,
        "temperature": temperature,
        "repetition_penalty": repetition_penalty,
        "length_penalty": length_penalty,
        "stop_tokens": stop_tokens,
        "num_samples": num_samples,
        "sliding_window": sliding_window,
        "batch_size": batch_size,
    }
    # Before TensorFlow and the model are loaded: a mistake is reported at once.
    config = read_config_on_devices(run_folder, overrides, build_model, step)
    Request.from_options(config.samples, sampler, **options)
    with quiet_import():
        from trainer.loaded import LoadedModel
        from trainer.training.on_devices import open_to_write
    model = open_to_write(run_folder, config, bool(overrides), build_model, step, warn)
    return LoadedModel(model).generate(prompts, sampler, **options)


def score(
    run_folder: str,
    build_model: Callable[[Config, int], keras.Model] | None = None,
    step: int | Literal["best"] | None = None,
    say: Callable[[str], None] = print,
    overrides: Sequence[str] = (),
) -> Evaluation:
    """Scores the newest checkpoint of a run, or another one, on the whole validation text.

    Args:
        run_folder: the folder of the run, or of one of its checkpoints: RUN/checkpoints/step_000001000.
        build_model: the function that was given to `train`.
        step: the step of the checkpoint to use, or "best" for the one with the lowest validation loss.
        say: a function that prints a line; the line names the checkpoint.
        overrides: `section.key=value` strings for other devices, or for `data.prepared_folder`.

    Returns:
        The loss and what follows from it.

    Raises:
        UserError: the run does not exist or has no checkpoint, or its data is gone.
    """
    check_not_forked()
    from trainer.runs.run_folder import RunFolder, run_and_step

    run_folder, step = run_and_step(run_folder, step)
    run = RunFolder(run_folder, overrides)
    run.check_model(build_model)
    with quiet_import():
        from trainer.distributed.strategy import make_strategy
        from trainer.runs.run_data import find_prepared
        from trainer.training.evaluation import Evaluator
        from trainer.training.on_devices import open_on_devices
    strategy = make_strategy(run.config.distribution, ignore_workers=True)
    prepared = find_prepared(run)
    model = open_on_devices(run_folder, strategy, run.config, build_model, step, say)
    with shown(say, "evaluating") as bar:
        evaluation = Evaluator(model.opened.model, strategy, prepared, run.config, held=model.held)(note=bar.note)
    say(f"step {model.opened.step}: {evaluation}")
    return evaluation


def export(
    run_folder: str,
    to: str,
    output: str | None = None,
    step: int | Literal["best"] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    say: Callable[[str], None] = print,
) -> Exported:
    """Writes the newest checkpoint of a run, or another one, in the format of other programs.

    Args:
        run_folder: the folder of the run, or of one of its checkpoints: RUN/checkpoints/step_000001000.
        to: "huggingface", "savedmodel", "keras" or "kerashub"; see docs/exchange.md.
        output: the file or folder to write, which must not exist; by default beside the run's folder.
        step: the step of the checkpoint to write, or "best" for the one with the lowest validation loss.
        dtype: "float32" or, with "huggingface", "bfloat16".
        say: a function that prints a line.

    Returns:
        The path of what was written, and Python code that loads it.

    Raises:
        UserError: the run does not exist or has no checkpoint, its model does not fit the format, or output exists or
            cannot be written.
    """
    check_not_forked()
    from trainer.exchange.export import export as export_run

    return export_run(run_folder, to, output, step, dtype, say)
