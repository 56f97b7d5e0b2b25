"""Activations of the feed-forward layer. Their gradients keep only what went in."""

import functools
import math
from collections.abc import Callable

import tensorflow as tf

from trainer.model.precision import accumulation_dtype

Activation = Callable[[tf.Tensor], tf.Tensor]


def gelu(x: tf.Tensor) -> tf.Tensor:
    """Multiplies each number by the share of a normal distribution below it, in the accumulation dtype.

    Source: Hendrycks and Gimpel 2016, section 2.
    """
    wide = tf.cast(x, accumulation_dtype(x.dtype))
    return tf.cast(wide * (0.5 + 0.5 * tf.math.erf(wide * math.sqrt(0.5))), x.dtype)


def gelu_tanh(x: tf.Tensor) -> tf.Tensor:
    """Approximates `gelu` by a hyperbolic tangent, in the accumulation dtype.

    Source: Hendrycks and Gimpel 2016, section 2. The share (1 + tanh z) / 2 is written as sigmoid(2 z), which keeps its
    digits far below zero.
    """
    wide = tf.cast(x, accumulation_dtype(x.dtype))
    z = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return tf.cast(wide * tf.sigmoid(2 * z), x.dtype)


def swiglu(x: tf.Tensor) -> tf.Tensor:
    """Multiplies the second half of [rows, 2 * width] by silu of the first half.

    Source: Shazeer 2020, equation 5.
    """
    gate, x = tf.split(x, 2, axis=-1)
    return tf.nn.silu(gate) * x


def computed_again(
    activation: Activation, wrap: Callable[[Callable], Callable] = lambda function: function
) -> Activation:
    """Returns an activation whose gradient keeps only x, and computes the activation again.

    Args:
        activation: what to compute.
        wrap: applied to the forward and to the backward function.
    """
    forward = wrap(activation)

    def gradient(x: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = activation(x)
        return tape.gradient(y, x, upstream)

    backward = wrap(gradient)

    @functools.wraps(activation)
    def apply(x: tf.Tensor) -> tf.Tensor:
        return tf.custom_gradient(lambda x: (forward(x), functools.partial(backward, x)))(x)

    return apply


# What each model.activation is, with operations that run one by one or that XLA compiles with all the rest.
ACTIVATIONS: dict[str, Activation] = {
    "relu": tf.nn.relu,
    "gelu": computed_again(gelu),
    "gelu_tanh": computed_again(gelu_tanh),
    "swiglu": computed_again(swiglu),
}
