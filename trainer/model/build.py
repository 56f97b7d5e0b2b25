"""Builds the model of a run: the GPT that its config describes, or a Keras model that the user's function builds."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.config.settings import Config
from trainer.errors import UserError

if TYPE_CHECKING:
    import keras

GPT_MODEL = "gpt"

BuildModel = Callable[[Config, int], "keras.Model"]


def model_name(build_model: BuildModel | None) -> str:
    """Returns the name of a run's model: GPT_MODEL, or the module and the name of the function that builds it."""
    if build_model is None:
        return GPT_MODEL
    if isinstance(build_model, functools.partial):
        return model_name(build_model.func)
    named = build_model if hasattr(build_model, "__qualname__") else type(build_model)
    return f"{named.__module__}.{named.__qualname__}"


def make_model(build_model: BuildModel | None, config: Config, vocabulary_size: int, bos_id: int) -> "keras.Model":
    """Builds the model of a run with initial weights.

    Args:
        build_model: builds a Keras model from the config and the vocabulary size; None: the GPT that config describes.
        config: the run's configuration.
        vocabulary_size: the number of tokens.
        bos_id: the token that begins a document.

    Raises:
        UserError: build_model does not return a Keras model, or its model does not return a logit for each token.
    """
    if build_model is None:
        return build_gpt(config, vocabulary_size, bos_id)
    import keras

    model = build_model(config, vocabulary_size)
    if not isinstance(model, keras.Model):
        raise UserError(f"build_model returned {model!r}; return a Keras model.")
    length = config.train.sequence_length
    # A symbolic call, which computes nothing: Sequential without an Input, and a subclass of Model, make their weights
    # when they are first called.
    logits = model(keras.Input([length], dtype="int32"))
    shape = getattr(logits, "shape", None)
    if shape is None or tuple(shape) != (None, length, vocabulary_size):
        raise UserError(
            f"build_model's model turns tokens [batch, {length}] into {logits if shape is None else list(shape)}; it "
            f"must return logits [batch, sequence, vocabulary], here [None, {length}, {vocabulary_size}]."
        )
    return model


def build_gpt(config: Config, vocabulary_size: int, bos_id: int) -> "keras.Model":
    """Builds the GPT of a config with initial weights."""
    from trainer.model.gpt import GPT

    train = config.train
    return GPT(config.model, vocabulary_size, train.sequence_length, train.seed, train.precision, bos_id)
