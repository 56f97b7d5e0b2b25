"""Reads the weights that init.from names, for the first checkpoint of a new run: step 0, without an optimizer.

The run's own folder then has all that it needs: it can be killed and resumed at any time without the model that it came
from, and several workers read it there.
"""

import json
from collections.abc import Iterator

import numpy as np

from trainer.config.file import differing_settings, split_step
from trainer.config.settings import Config, SavedTokenizerConfig
from trainer.errors import UserError, quoted
from trainer.exchange.huggingface import TOKENIZER, digest_of_weights, read_weights
from trainer.exchange.source import kind_of_source
from trainer.model.build import GPT_MODEL
from trainer.model.size import parameter_shapes
from trainer.runs.array_file import Arrays, StoredArray
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.parentage import Beginning, parents_by_run
from trainer.runs.run_checkpoints import averaged, lasting, read_checkpoint
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import RunFolder, run_and_step
from trainer.system.storage import locate
from trainer.system.terminal import Say
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.tokenizers.tokenizer_files import train_tokenizer

POSITIONS = "gpt/position_embedding/embeddings"
_FOREIGN = "init.from={source!r} has the weights of trainer's GPT, and build_model builds another model; leave out one."


def read_beginning(config: Config, is_foreign: bool, say: Say) -> Beginning | None:
    """Returns what a new run begins with; None if init.from is not set.

    Args:
        config: the new run's configuration.
        is_foreign: whether the model is one that a function of the user builds, and not the GPT of the config.
        say: prints a line for each difference that is not an error.

    Raises:
        UserError: init.from cannot be read, or its weights or its tokenizer are not those of the config.
    """
    source = config.init.source
    if source is None:
        return None
    kind = kind_of_source(source)
    # With init.from no tokenizer is learned from a text, see `make_config`.
    tokenizer = train_tokenizer(config.tokenizer, ())
    if kind == "run":
        return _from_run(source, config, is_foreign, tokenizer, say)
    if kind == "huggingface":
        return _from_huggingface(source, config, is_foreign, tokenizer, say)
    return _from_kerashub(source, config, is_foreign, tokenizer, say)


def _from_run(source: str, config: Config, is_foreign: bool, tokenizer: Tokenizer, say: Say) -> Beginning:
    folder, step = run_and_step(source)
    parent = RunFolder(folder)
    check_tokenizer(source, tokenizer, load_tokenizer_of(parent))
    if is_foreign == (parent.facts["model"] == GPT_MODEL):
        if is_foreign:
            raise UserError(_FOREIGN.format(source=source))
        raise UserError(
            f"init.from={source!r} has the weights of a model that {parent.facts['model']} built; give that function "
            "as build_model, from Python, or leave out init.from."
        )

    def read_weights_of(checkpoint: Checkpoint) -> tuple[Checkpoint, Arrays]:
        return checkpoint, lasting(averaged(checkpoint), checkpoint)

    checkpoint, weights = read_checkpoint(parent, read_weights_of, say, step)
    changed = differing_settings(config, parent.config)
    if not is_foreign:
        weights = fitted(weights, config, tokenizer.vocabulary_size, source, say, hint=advice(config, parent.config))
        report_other_meaning(config, parent.config, say)
    say(f"The run begins with the weights of {parent.path}, step {checkpoint.step}.")
    return Beginning(0, {"weights": weights}, parents_by_run(parent, checkpoint, "init", changed))


def _from_huggingface(source: str, config: Config, is_foreign: bool, tokenizer: Tokenizer, say: Say) -> Beginning:
    if is_foreign:
        raise UserError(_FOREIGN.format(source=source))
    if (locate(source) / TOKENIZER).is_file():
        check_tokenizer(source, tokenizer, train_tokenizer(SavedTokenizerConfig(kind="saved", path=source), ()))
    weights = read_weights(source, config, tokenizer.vocabulary_size, say)
    say(f"The run begins with the weights of {source}.")
    entry = {"kind": "init", "from": source, "weights_sha256": digest_of_weights(source), "changed": []}
    return Beginning(0, {"weights": fitted(weights, config, tokenizer.vocabulary_size, source, say)}, [entry])


def _from_kerashub(source: str, config: Config, is_foreign: bool, tokenizer: Tokenizer, say: Say) -> Beginning:
    # Here and not at the top: it loads KerasHub.
    from trainer.exchange import kerashub_preset

    if is_foreign:
        raise UserError(_FOREIGN.format(source=source))
    weights = kerashub_preset.read_weights(source, config, tokenizer.vocabulary_size)
    say(f"The run begins with the weights of {source}.")
    entry = {"kind": "init", "from": source, "weights_sha256": kerashub_preset.digest_of_weights(source), "changed": []}
    return Beginning(0, {"weights": fitted(weights, config, tokenizer.vocabulary_size, source, say)}, [entry])


def check_tokenizer(source: str, tokenizer: Tokenizer, of_source: Tokenizer) -> None:
    """Raises UserError if a new run's tokenizer is not the one that the weights were trained with."""
    if tokenizer.fingerprint != of_source.fingerprint:
        raise UserError(
            f"init.from={source!r} was trained with another tokenizer ({of_source.kind}, "
            f"{of_source.vocabulary_size:,} tokens) than tokenizer.* describes ({tokenizer.kind}, "
            f"{tokenizer.vocabulary_size:,} tokens), so its weights mean other tokens. Add: tokenizer.kind=saved "
            f"tokenizer.path={split_step(source)[0]}"
        )


def fitted(
    weights: Arrays, config: Config, vocabulary_size: int, source: str, say: Say, hint: str = ""
) -> dict[str, np.ndarray | StoredArray]:
    """Returns weights in the order, shapes and dtype of a config's GPT.

    Positions beyond train.sequence_length are left out, with a line. What already fits is not read.

    Args:
        weights: arrays by the names of `parameter_shapes`.
        config: the config of the GPT.
        vocabulary_size: the number of tokens.
        source: the value of init.from, for messages.
        say: prints a line.
        hint: what to change, for messages.

    Raises:
        UserError: a weight is missing, is not of this GPT, or has another shape; the message names the first one.
    """
    dtype = np.float64 if config.train.precision == "float64" else np.float32
    shapes = dict(parameter_shapes(config.model, vocabulary_size, config.train.sequence_length))
    found: dict[str, np.ndarray | StoredArray] = {}
    for name, wanted in shapes.items():
        array = weights.get(name)
        if array is not None and name == POSITIONS and array.shape[:1] > wanted[:1] and array.shape[1:] == wanted[1:]:
            say(f"init.from={source!r} has {array.shape[0]} positions: the first {wanted[0]} are used.")
            array = np.asarray(array)[: wanted[0]]
        if array is None or array.shape != wanted:
            there = "does not have it" if array is None else f"has it as {list(array.shape)}"
            raise UserError(
                f"init.from={source!r} does not fit this config, which needs {name} as {list(wanted)}: it {there}. "
                f"{hint or 'Change model.* and train.sequence_length to its sizes.'}"
            )
        found[name] = array if array.dtype == dtype else np.asarray(array).astype(dtype)
    for name in sorted(weights.keys() - shapes.keys()):
        raise UserError(
            f"init.from={source!r} does not fit this config: it has {name} as {list(weights[name].shape)}, which "
            f"the config's model does not have. {hint or 'Change model.* to its sizes.'}"
        )
    return found


def _differences(config: Config, parent: Config) -> Iterator[tuple[str, object, object]]:
    before = parent.model.model_dump(mode="json")
    for name, value in config.model.model_dump(mode="json").items():
        if value != before[name]:
            yield f"model.{name}", value, before[name]


def advice(config: Config, parent: Config) -> str:
    """Returns the overrides by which a config gets the sizes of its parent's model, as a sentence; "" if none."""
    overrides = [
        quoted(f"{key}={'none' if was is None else was if isinstance(was, str) else json.dumps(was)}")
        for key, _, was in _differences(config, parent)
        if key != "model.dropout"
    ]
    if config.model.positions == "learned" and config.train.sequence_length > parent.train.sequence_length:
        overrides.append(f"train.sequence_length={parent.train.sequence_length}")
    return f"Add: {' '.join(overrides)}" if overrides else ""


def report_other_meaning(config: Config, parent: Config, say: Say) -> None:
    """Prints a line if weights of the same shapes are used by another formula: the model is not the parent's."""
    others = [
        f"{key}={value} (the parent's: {was})"
        for key, value, was in _differences(config, parent)
        if key not in ("model.dropout", "model.num_key_value_heads", "model.use_bias")
        and not (key == "model.head_dim" and config.model.head_width() == parent.model.head_width())
    ]
    if others:
        say(f"warning: the weights fit, but the model computes something else with {'; '.join(others)}.")
