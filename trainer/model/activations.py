"""Activations of the feed-forward layer, with gradients that keep nothing but what went in."""

import functools
import math
from collections.abc import Callable
from importlib import metadata

import tensorflow as tf

from trainer.model.loss import accumulation_dtype

Activation = Callable[[tf.Tensor], tf.Tensor]


def _compiled(function: Callable) -> Callable:
    compiled = tf.function(function, autograph=False, jit_compile=True)

    @functools.wraps(function)
    def call(*args: tf.Tensor) -> tf.Tensor:
        # A shape that is not known would be compiled for every one that comes.
        is_static = all(arg.shape.is_fully_defined() for arg in args)
        return compiled(*args) if is_static and _compiles_for_cpu() else function(*args)

    return call


@functools.cache
def _compiles_for_cpu() -> bool:
    """Whether XLA can, and the CPU is what computes: tensorflow-tpu has no compiler for its host."""
    try:
        metadata.version("tensorflow-tpu")
    except metadata.PackageNotFoundError:
        return not tf.config.get_visible_devices("GPU")
    return False


def in_one_pass(activation: Activation) -> Activation:
    """Makes an activation, and its gradient, each read and write memory once on a CPU too: there XLA compiles these
    two, of a step that TensorFlow runs an operation at a time.
    """
    forward = _compiled(activation)

    @_compiled
    def backward(x: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = activation(x)
        return tape.gradient(y, x, upstream)

    @functools.wraps(activation)
    def apply(x: tf.Tensor) -> tf.Tensor:
        return tf.custom_gradient(lambda x: (forward(x), functools.partial(backward, x)))(x)

    return apply


@in_one_pass
def gelu(x: tf.Tensor) -> tf.Tensor:
    """Multiplies each number by the share of a normal distribution below it, in the accumulation dtype.

    Source: Hendrycks and Gimpel 2016, section 2.
    """
    wide = tf.cast(x, accumulation_dtype(x.dtype))
    return tf.cast(wide * (0.5 + 0.5 * tf.math.erf(wide * math.sqrt(0.5))), x.dtype)


@in_one_pass
def swiglu(x: tf.Tensor) -> tf.Tensor:
    """Multiplies the second half of [rows, 2 * width] by silu of the first. Source: Shazeer 2020, equation 5."""
    gate, x = tf.split(x, 2, axis=-1)
    return tf.nn.silu(gate) * x
