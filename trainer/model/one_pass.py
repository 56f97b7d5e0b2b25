"""Lets XLA compile parts of a step that TensorFlow otherwise runs an operation at a time, as it does on a CPU."""

import functools
from collections.abc import Callable
from importlib import metadata

import tensorflow as tf


def in_one_pass(function: Callable) -> Callable:
    """Makes a function of tensors read and write memory once on a CPU too, where TensorFlow would at each operation.

    For functions without variables, whose operations XLA can fuse: products of matrices are faster without it. In what
    XLA compiles as a whole, as for accelerators, it changes nothing; nor outside of a tf.function.
    """
    compiled = tf.function(function, autograph=False, jit_compile=True)

    @functools.wraps(function)
    def call(*args: tf.Tensor) -> object:
        # A shape that is not known yet, or the next call's, would be compiled for every one that comes.
        is_static = tf.inside_function() and all(arg.shape.is_fully_defined() for arg in args)
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
