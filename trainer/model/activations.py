"""Activations of the feed-forward layer, with gradients that keep nothing but what went in."""

import functools
import math
from collections.abc import Callable

import tensorflow as tf

from trainer.model.cpu import in_one_pass
from trainer.model.precision import accumulation_dtype

Activation = Callable[[tf.Tensor], tf.Tensor]


def _computed_again(activation: Activation) -> Activation:
    forward = in_one_pass(activation)

    @in_one_pass
    def backward(x: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = activation(x)
        return tape.gradient(y, x, upstream)

    @functools.wraps(activation)
    def apply(x: tf.Tensor) -> tf.Tensor:
        return tf.custom_gradient(lambda x: (forward(x), functools.partial(backward, x)))(x)

    return apply


@_computed_again
def gelu(x: tf.Tensor) -> tf.Tensor:
    """Multiplies each number by the share of a normal distribution below it, in the accumulation dtype.

    Source: Hendrycks and Gimpel 2016, section 2.
    """
    wide = tf.cast(x, accumulation_dtype(x.dtype))
    return tf.cast(wide * (0.5 + 0.5 * tf.math.erf(wide * math.sqrt(0.5))), x.dtype)


@_computed_again
def swiglu(x: tf.Tensor) -> tf.Tensor:
    """Multiplies the second half of [rows, 2 * width] by silu of the first. Source: Shazeer 2020, equation 5."""
    gate, x = tf.split(x, 2, axis=-1)
    return tf.nn.silu(gate) * x
