"""Laws of the normalizations, beside Keras and the formula, in every way of computing."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.model.layers import Norm
from trainer.model.ops.cpu import CpuOps
from trainer.model.ops.plain import Ops
from trainer.model.ops.xla import XlaOps

EPSILON = 1e-3
WAYS = pytest.mark.parametrize("ops", [Ops(), CpuOps(), XlaOps()], ids=["plain", "cpu", "xla"])


def with_gradients(normalize, weights, x, upstream, is_traced):
    """Returns normalize(x) and the gradients of its product with upstream, by x and by the weights."""

    def run(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = normalize(x)
        return [y, *tape.gradient(y, [x, *(variable.value for variable in weights)], upstream)]

    return (tf.function(run) if is_traced else run)(x, upstream)


@WAYS
@pytest.mark.parametrize("is_traced", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_normalization_equals_keras_in_value_and_every_gradient(center, is_traced, ops):
    random = np.random.default_rng(0)
    x, upstream = (tf.constant(random.normal(2, 3, (2, 5, 7))) for _ in range(2))
    ours = Norm("layer", epsilon=EPSILON, center=center, dtype="float64")
    theirs = keras.layers.LayerNormalization(epsilon=EPSILON, center=center, dtype="float64")
    results = []
    for layer, normalize in ((ours, functools.partial(ours.__call__, ops=ops)), (theirs, theirs)):
        layer.build(x.shape)
        for variable in layer.variables:
            variable.assign(np.linspace(-1, 2, 7))
        results.append(with_gradients(normalize, layer.trainable_variables, x, upstream, is_traced))
    for value, expected in zip(*results, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-12)


@WAYS
@pytest.mark.parametrize("is_traced", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_rms_normalization_equals_the_formula_in_value_and_every_gradient(center, is_traced, ops):
    random = np.random.default_rng(0)
    # So small that epsilon counts, and so large that it does not.
    x = tf.constant(random.normal(2, 3, (2, 5, 7)) * np.array([1e-3, 1.0])[:, np.newaxis, np.newaxis])
    upstream = tf.constant(random.normal(2, 3, (2, 5, 7)))
    layer = Norm("rms", epsilon=EPSILON, center=center, dtype="float64")
    layer.build(x.shape)
    for variable in layer.variables:
        variable.assign(np.linspace(-1, 2, 7))

    def formula(x):
        unit = x / tf.sqrt(tf.reduce_mean(x**2, axis=-1, keepdims=True) + EPSILON)
        return unit * layer.gamma + (0 if layer.beta is None else layer.beta)

    results = [
        with_gradients(normalize, layer.trainable_variables, x, upstream, is_traced)
        for normalize in (functools.partial(layer.__call__, ops=ops), formula)
    ]
    for value, expected in zip(*results, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)


@WAYS
def test_narrow_numbers_are_normalized_by_wide_statistics(ops):
    x = tf.cast(np.random.default_rng(0).normal(2, 3, (5, 64)), tf.bfloat16)
    for kind in ("layer", "rms"):
        narrow, wide = (Norm(kind, epsilon=EPSILON, dtype=dtype) for dtype in ("bfloat16", "float32"))
        np.testing.assert_array_equal(narrow(x, ops=ops), tf.cast(wide(tf.cast(x, tf.float32), ops=ops), tf.bfloat16))
