"""Train GPT language models on your own text with TensorFlow.

    import trainer

    config = trainer.load_config("quickstart", ["run_folder=runs/python", "train.total_steps=200"])
    result = trainer.train(config)
    print(trainer.generate(result.run_folder, "once upon a time"))

TensorFlow is imported by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import UserError
from trainer.system.fork import check_not_forked
from trainer.system.terminal import lasting_output, quiet_import, warn
from trainer.version import __version__

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from trainer.config.file import load_config, make_config
    from trainer.config.settings import Config
    from trainer.exchange.export import Exported
    from trainer.model.gpt import GPT
    from trainer.runs.results import Evaluation
    from trainer.training.loop import TrainingResult

__all__ = [
    "GPT",
    "Config",
    "UserError",
    "__version__",
    "batches",
    "export",
    "generate",
    "load_config",
    "make_config",
    "resume",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    # This package is imported before the command watches for signals, so it must load fast: pydantic comes later.
    if name in ("Config", "load_config", "make_config"):
        from trainer.config import file

        return getattr(file, name)
    if name == "GPT":  # Keras loads a .keras file once it knows this class.
        with quiet_import():
            from trainer.model.gpt import GPT

        return GPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def train(
    config: Config,
    build_model: Callable[[Config, int], keras.Model] | None = None,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Prepares the text unless it is prepared already, and trains a model on it.

    Args:
        config: the settings, from `load_config` or `make_config`.
        build_model: a function that is called in the strategy's scope with the config and the vocabulary size, and
            returns a Keras model from int32 [batch, sequence] to logits [batch, sequence, vocabulary]. By default the
            model is the GPT that config describes.
        say: a function that prints a line.

    Returns:
        The run's folder, the trained model, its evaluation and its samples.

    Raises:
        UserError: a setting, the text or the run folder is wrong.
    """
    check_not_forked()
    with quiet_import():
        from trainer.training import launch

    with lasting_output():
        return launch.start(config, build_model, say)


def resume(
    run_folder: str,
    build_model: Callable[[Config, int], keras.Model] | None = None,
    say: Callable[[str], None] = print,
    overrides: Sequence[str] = (),
    step: int | Literal["best"] | None = None,
) -> TrainingResult:
    """Resumes a run from its newest checkpoint, or from another one.

    Args:
        run_folder: the folder of the run, or of one of its checkpoints: RUN/checkpoints/step_000001000.
        build_model: the function that was given to `train`.
        say: a function that prints a line.
        overrides: `section.key=value` strings for settings that do not change the model, such as
            `distribution.logical_devices=4`.
        step: the step of the checkpoint to resume from, or "best" for the one with the lowest validation loss.

    Returns:
        The run's folder, the trained model, its evaluation and its samples.

    Raises:
        UserError: the run does not exist, its data is gone, or an override would make it another run.
    """
    check_not_forked()
    with quiet_import():
        from trainer.training import launch

    with lasting_output():
        return launch.resume(run_folder, build_model, say, overrides, step)


def batches(config: Config, first_step: int = 0, say: Callable[[str], None] = print) -> tf.data.Dataset:
    """Returns the training batches of a config in the order of `train`, in the form that Keras fit accepts.

    Args:
        config: the settings, from `load_config` or `make_config`. The text is prepared unless it is prepared already.
        first_step: the step to begin at.
        say: a function that prints a line.

    Returns:
        A data set of (inputs int32, targets int32, weights float32), each [global_batch_size, sequence_length].
    """
    check_not_forked()
    with quiet_import():
        from trainer.data.batches import total_steps, training_batches
        from trainer.data.prepare import prepare

    prepared = prepare(config, say)
    return training_batches(prepared, config, first_step, total_steps(prepared, config))


def generate(
    run_folder: str,
    prompts: str | Sequence[str] = "",
    sampler: str = "top-p",
    num_tokens: int | None = None,
    seed: int | None = None,
    stop: str | None = None,
    k: int | None = None,
    p: float | None = None,
    num_beams: int | None = None,
    temperature: float | None = None,
    build_model: Callable[[Config, int], keras.Model] | None = None,
    step: int | Literal["best"] | None = None,
) -> list[str]:
    """Continues prompts with the newest checkpoint of a run, or with another one.

    The defaults of num_tokens, stop, k, p, num_beams and temperature are the run's own `samples` settings.

    Args:
        run_folder: the folder of the run, or of one of its checkpoints: RUN/checkpoints/step_000001000.
        prompts: one text or several.
        sampler: "greedy", "beam", "top-k" or "top-p".
        num_tokens: the most tokens to write.
        seed: the seed of top-k and top-p, by default 0.
        stop: a text that ends a continuation.
        k: the number of tokens that top-k draws from.
        p: the probability of the tokens that top-p draws from.
        num_beams: the number of beams of beam search.
        temperature: divides the logits of top-k and top-p.
        build_model: the function that was given to `train`.
        step: the step of the checkpoint to use, or "best" for the one with the lowest validation loss.

    Returns:
        The prompts with their continuations.

    Raises:
        UserError: the run does not exist or has no checkpoint, or a prompt or setting cannot be used.
    """
    check_not_forked()
    from trainer.decoding.decoder import Decoder
    from trainer.exchange.open import open_model, read_config

    # Before TensorFlow and the model are loaded: a mistake is reported at once.
    samples = read_config(run_folder, build_model, step).samples
    decoder = Decoder.from_options(sampler, samples, k=k, p=p, num_beams=num_beams, temperature=temperature, seed=seed)
    with quiet_import():
        from trainer.decoding.generate import Generator
    opened = open_model(run_folder, build_model, step, warn)
    sequence_length = opened.config.train.sequence_length
    generator = Generator(opened.model, opened.tokenizer, sequence_length)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    num_tokens = samples.num_tokens if num_tokens is None else num_tokens
    stop = samples.stop if stop is None else stop
    for remark in generator.remarks(texts, num_tokens, stop):
        warn(f"warning: {remark}")
    num_tokens = sequence_length if num_tokens is None else num_tokens
    return generator.generate(texts, decoder, num_tokens, seed or 0, stop)


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
    from trainer.exchange.open import open_model
    from trainer.runs.run_folder import RunFolder, run_and_step

    run_folder, step = run_and_step(run_folder, step)
    run = RunFolder(run_folder, overrides)
    run.check_model(build_model)
    with quiet_import():
        from trainer.distributed.strategy import make_strategy
        from trainer.runs.run_data import find_prepared
        from trainer.training.evaluation import Evaluator
    strategy = make_strategy(run.config.distribution, ignore_workers=True)
    prepared = find_prepared(run)
    with strategy.scope():
        opened = open_model(run_folder, build_model, step, say)
    evaluation = Evaluator(opened.model, strategy, prepared, run.config)()
    say(f"step {opened.step}: {evaluation}")
    return evaluation


def export(
    run_folder: str,
    to: str,
    output: str | None = None,
    step: int | Literal["best"] | None = None,
    say: Callable[[str], None] = print,
) -> Exported:
    """Writes the newest checkpoint of a run, or another one, in the format of other programs.

    Args:
        run_folder: the folder of the run, or of one of its checkpoints: RUN/checkpoints/step_000001000.
        to: "keras" for a .keras file.
        output: the file or folder to write, which must not exist; by default beside the run's folder.
        step: the step of the checkpoint to write, or "best" for the one with the lowest validation loss.
        say: a function that prints a line.

    Returns:
        The path of what was written, and Python code that loads it.

    Raises:
        UserError: the run does not exist or has no checkpoint, its model does not fit the format, or output exists or
            cannot be written.
    """
    check_not_forked()
    from trainer.exchange.export import export as export_run

    return export_run(run_folder, to, output, step, say)
