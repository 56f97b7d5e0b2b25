"""Laws of the activations, beside their formulas in float64, in every way of computing."""

import math

import numpy as np
import pytest
import tensorflow as tf

from trainer.model.ops.cpu import CpuOps
from trainer.model.ops.plain import PLAIN, Ops
from trainer.model.ops.xla import XlaOps

X = np.random.default_rng(0).normal(0, 2, (5, 6))
UPSTREAM = {"relu": X[::-1], "gelu": X[::-1], "gelu_tanh": X[::-1], "swiglu": X[::-1, :3]}


def gelu_and_slope(x):
    below = 0.5 + 0.5 * np.vectorize(math.erf)(x / math.sqrt(2))
    return x * below, below + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def gelu_tanh_and_slope(x):
    root = math.sqrt(2 / math.pi)
    tanh = np.tanh(root * (x + 0.044715 * x**3))
    return x * (1 + tanh) / 2, (1 + tanh) / 2 + x * (1 - tanh**2) * root * (1 + 3 * 0.044715 * x**2) / 2


def expected(activation, x, upstream):
    """Returns activation(x), and the gradient of its product with upstream."""
    if activation == "relu":
        return np.maximum(x, 0), upstream * (x > 0)
    if activation == "gelu":
        y, slope = gelu_and_slope(x)
        return y, upstream * slope
    if activation == "gelu_tanh":
        y, slope = gelu_tanh_and_slope(x)
        return y, upstream * slope
    gate, linear = np.split(x, 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    of_gate = upstream * linear * sigmoid * (1 + gate * (1 - sigmoid))
    return gate * sigmoid * linear, np.concatenate([of_gate, upstream * gate * sigmoid], axis=1)


def with_gradient(activation, x, upstream):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = activation(x)
    return y, tape.gradient(y, x, upstream)


@pytest.mark.parametrize("ops", [Ops(), CpuOps(), XlaOps()], ids=["plain", "cpu", "xla"])
@pytest.mark.parametrize("activation", UPSTREAM)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("rows", [5, None])
def test_activations_and_their_gradients_are_the_formulas(activation, dtype, tolerance, rows, ops):
    x, upstream = tf.constant(X, dtype), tf.constant(UPSTREAM[activation], dtype)
    shapes = [tf.TensorSpec([rows, *t.shape[1:]], dtype) for t in (x, upstream)]
    activate = ops.activation(activation)
    run = tf.function(lambda x, upstream: with_gradient(activate, x, upstream), input_signature=shapes)
    for value, reference in zip(run(x, upstream), expected(activation, X, UPSTREAM[activation]), strict=True):
        assert value.dtype == dtype
        np.testing.assert_allclose(tf.cast(value, tf.float64), reference, rtol=tolerance, atol=tolerance)


def test_gelu_far_from_zero_is_nothing_or_all_to_the_last_bits_of_what_went_in():
    x = tf.constant([-1e4, -20.0, 20.0, 1e4])
    y, slope = with_gradient(PLAIN.activation("gelu"), x, tf.ones([4]))
    np.testing.assert_allclose(y / x, [0, 0, 1, 1], atol=1.2e-7)
    np.testing.assert_allclose(slope, [0, 0, 1, 1], atol=1.2e-7)
