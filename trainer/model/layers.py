"""The layers that hold weights beside Keras's own."""

from typing import Any

import keras
import tensorflow as tf

from trainer.config.settings import ModelConfig
from trainer.model.initial import Initializers
from trainer.model.ops.plain import PLAIN, Ops
from trainer.model.precision import accumulation_dtype


class Norm(keras.layers.LayerNormalization):
    """Keras's layer normalization over the last axis, in the accumulation dtype.

    Args:
        kind: "layer", or "rms" for the root mean square instead of mean and variance.
        settings: arguments of Keras's layer, such as epsilon.
    """

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.kind = kind

    def call(self, x: tf.Tensor, ops: Ops = PLAIN) -> tf.Tensor:
        """Normalizes float [..., width]."""
        dtype = accumulation_dtype(x.dtype)
        scales = (tf.cast(scale, dtype) for scale in (self.gamma, self.beta) if scale is not None)
        return ops.norm(x, self.kind, self.epsilon, *scales)


def make_norm(config: ModelConfig, name: str, dtype: str, scales: keras.Initializer | str = "ones") -> Norm:
    """Returns a normalization of a model's hidden states, whose gamma begins as scales."""
    settings = {"epsilon": config.norm_epsilon, "center": "norm" in config.biases(), "gamma_initializer": scales}
    return Norm(config.norm, **settings, dtype=dtype, name=name, autocast=False)


def make_head_norm(config: ModelConfig, name: str, dtype: str) -> Norm:
    """Returns a normalization of the queries or keys of each head, with one gamma for all heads.

    Source: Henry et al. 2020 for the idea; the Qwen3 Technical Report (2025) for this form of it.
    """
    settings = {"epsilon": config.norm_epsilon, "center": False}
    return Norm("rms", **settings, dtype=dtype, name=name, autocast=False)


class Unembedding(keras.layers.Layer):
    """The weights of the output projection: kernel [num_logits, hidden_dim] and, if it has one, bias [num_logits].

    It holds them and does not apply them: the loss computes the logits a chunk of rows at a time.

    Args:
        num_logits: rows of the kernel.
        config: the model's shape.
        initial: makes the initializer of the kernel.
        dtype: a Keras dtype policy.
    """

    def __init__(self, num_logits: int, config: ModelConfig, initial: Initializers, dtype: str) -> None:
        super().__init__(name="unembedding", dtype=dtype)
        self.num_logits = num_logits
        self.use_bias = "unembedding" in config.biases()
        self.initializer = initial.unembedding(num_logits)
        self.bias = None

    def build(self, input_shape: tuple) -> None:
        """Creates the variables for hidden states of shape [..., hidden_dim]."""
        self.kernel = self.add_weight((self.num_logits, input_shape[-1]), self.initializer, name="kernel")
        if self.use_bias:
            self.bias = self.add_weight((self.num_logits,), "zeros", name="bias")

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """Returns the shape of the logits, which `summary` prints."""
        return (*input_shape[:-1], self.num_logits)
