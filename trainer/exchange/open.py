"""Opens a model by its folder: a run, one of its checkpoints, or a model in Hugging Face's form.

Whatever scores or writes with a model gets it from here, so that a further kind of folder is a change of this module.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.config.file import make_config
from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.exchange.huggingface import config_of, end_tokens, is_huggingface, read_weights, remarks_on_bos
from trainer.exchange.keras_file import KerasFile, is_keras_file
from trainer.exchange.kerashub import is_preset
from trainer.model.build import BuildModel, build_gpt
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import CheckpointStep, RunFolder, run_and_step
from trainer.system.storage import Location, locate
from trainer.system.terminal import quiet_import
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.tokenizers.tokenizer_files import train_tokenizer

if TYPE_CHECKING:
    import keras

    from trainer.runs.run_checkpoints import MakeHolders


class OpenedModel(NamedTuple):
    """A model with what belongs to it.

    Attributes:
        model: the model, with its weights.
        tokenizer: the tokenizer of its tokens.
        config: the settings that it was made with, and the defaults for what it writes, `config.samples`.
        step: the steps that it was trained for; 0 if they are not known.
        folder: the folder or file that it was read from: for a run, the folder of the run.
        end_tokens: the tokens that end a text, as [BOS] does.
    """

    model: "keras.Model"
    tokenizer: Tokenizer
    config: Config
    step: int
    folder: Location
    end_tokens: tuple[int, ...] = ()


def read_config(path: str, build_model: BuildModel | None = None, step: str | CheckpointStep | None = None) -> Config:
    """Returns the settings of the model in a folder. Loads no TensorFlow: a mistake is reported at once.

    Args:
        path: see `open_model`.
        build_model: see `open_model`.
        step: see `open_model`.

    Raises:
        UserError: the folder holds no model, or another kind of model than build_model builds.
    """
    if _is_huggingface(path):
        _check_is_plain(path, build_model, step)
        return config_of(path)
    if is_keras_file(path):
        _check_is_plain(path, build_model, step)
        return KerasFile(path).config
    run_folder, _ = run_and_step(path, step)
    run = RunFolder(run_folder)
    run.check_model(build_model)
    return run.config


def read_config_on_devices(
    path: str,
    overrides: Sequence[str],
    build_model: BuildModel | None = None,
    step: str | CheckpointStep | None = None,
) -> Config:
    """Returns the settings of the model in a folder, on the devices that overrides name. Loads no TensorFlow.

    Args:
        path: see `open_model`.
        overrides: `distribution.key=value` strings.
        build_model: see `open_model`.
        step: see `open_model`.

    Raises:
        UserError: as `read_config`, or an override is wrong, or of another section.
    """
    for override in overrides:
        if not override.startswith("distribution."):
            raise UserError(f"{override}: generate and load change only the devices, distribution.*; leave it out.")
    return make_config(read_config(path, build_model, step).model_dump(mode="json"), overrides)


def open_model(
    path: str,
    build_model: BuildModel | None = None,
    step: str | CheckpointStep | None = None,
    say: Callable[[str], None] = print,
    make_holders: "MakeHolders | None" = None,
) -> OpenedModel:
    """Builds the model of a folder, and reads its weights. Call it in the scope of a strategy to place them on devices.

    Args:
        path: the folder of a run, or of one of its checkpoints: RUN/checkpoints/step_000001000; a folder with a
            config.json of Hugging Face; or a .keras file that trainer exported.
        build_model: the function that was given to `trainer.train`.
        step: the step of the checkpoint, or "best" for the one with the lowest validation loss; None: the newest.
        say: prints a line.
        make_holders: makes what gets the weights in place of the model's variables; see `built`.

    Raises:
        UserError: the folder holds no model, the model is of another kind than build_model builds, or the checkpoint
            does not exist or is damaged.
    """
    with quiet_import():
        from trainer.runs.checkpoint import assign
        from trainer.runs.run_checkpoints import built, load_model

    if _is_huggingface(path):
        _check_is_plain(path, build_model, step)
        config = config_of(path)
        tokenizer = train_tokenizer(config.tokenizer, ())  # It is read from the folder.
        build = functools.partial(build_gpt, config, tokenizer.vocabulary_size, tokenizer.bos_id)
        model, holders = built(build, make_holders)
        assign(holders, read_weights(path, config, tokenizer.vocabulary_size, say), path)
        for remark in remarks_on_bos(path, tokenizer):
            say(remark)
        ends = end_tokens(path, tokenizer.vocabulary_size)
        return OpenedModel(model, tokenizer, config, step=0, folder=locate(path), end_tokens=ends)
    if is_keras_file(path):
        _check_is_plain(path, build_model, step)
        file = KerasFile(path)
        tokenizer = file.tokenizer()
        build = functools.partial(build_gpt, file.config, tokenizer.vocabulary_size, tokenizer.bos_id)
        model, holders = built(build, make_holders)
        if make_holders is None:
            file.load_weights(model)
        else:
            assign(holders, _variables_on_host(file, build), path)
        return OpenedModel(model, tokenizer, file.config, file.step, file.path)
    run_folder, at = run_and_step(path, step)
    run = RunFolder(run_folder)
    model, checkpoint = load_model(run, build_model, say, at, make_holders)
    return OpenedModel(model, load_tokenizer_of(run), run.config, checkpoint.step, run.path)


def _variables_on_host(file: KerasFile, build: "Callable[[], keras.Model]") -> Mapping[str, Any]:
    """Returns the variables of a model with the weights in a .keras file, by their paths. They are in the host's
    memory, on no other device, and NumPy copies each when it is used.
    """
    import tensorflow as tf

    with tf.device("/cpu:0"):
        model = build()
        file.load_weights(model)
    return {variable.path: variable for variable in model.variables}


def _is_huggingface(path: str) -> bool:
    """Whether a path is a folder in Hugging Face's form. Raises UserError if it is a preset of KerasHub."""
    if is_preset(path):
        raise UserError(f"{path} is a preset of KerasHub, which only init.from reads; begin a run with it.")
    return is_huggingface(path)


def _check_is_plain(path: str, build_model: BuildModel | None, step: str | CheckpointStep | None) -> None:
    """Raises UserError if something is given that only a run has."""
    for name, value in (("build_model", build_model), ("step", step)):
        if value is not None:
            raise UserError(f"{path} is a model and not a run, so it has no {name}; leave out {name}={value}.")
