"""Laws of the normalizations, beside Keras and the formula."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.model.cpu import operations_on_cpu
from trainer.model.layers import Norm
from trainer.model.normalization import NORM_EPSILON


def with_gradients(layer, x, upstream, is_traced):
    """Returns layer(x) and the gradients of its product with upstream, by x and by the layer's weights."""

    def run(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return [y, *tape.gradient(y, [x, *(variable.value for variable in layer.trainable_variables)], upstream)]

    with operations_on_cpu():
        return (tf.function(run) if is_traced else run)(x, upstream)


@pytest.mark.parametrize("is_traced", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_normalization_equals_keras_in_value_and_every_gradient(center, is_traced):
    random = np.random.default_rng(0)
    x, upstream = (tf.constant(random.normal(2, 3, (2, 5, 7))) for _ in range(2))
    results = []
    for layer in (
        Norm("layer", center=center, dtype="float64"),
        keras.layers.LayerNormalization(epsilon=NORM_EPSILON, center=center, dtype="float64"),
    ):
        layer.build(x.shape)
        for variable in layer.variables:
            variable.assign(np.linspace(-1, 2, 7))
        results.append(with_gradients(layer, x, upstream, is_traced))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


class PlainRms(Norm):
    """By the formula."""

    def call(self, x):
        unit = x / tf.sqrt(tf.reduce_mean(x**2, axis=-1, keepdims=True) + NORM_EPSILON)
        return unit * self.gamma + (0 if self.beta is None else self.beta)


@pytest.mark.parametrize("is_traced", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_rms_normalization_equals_the_formula_in_value_and_every_gradient(center, is_traced):
    random = np.random.default_rng(0)
    # So small that epsilon counts, and so large that it does not.
    x = tf.constant(random.normal(2, 3, (2, 5, 7)) * np.array([1e-3, 1.0])[:, np.newaxis, np.newaxis])
    upstream = tf.constant(random.normal(2, 3, (2, 5, 7)))
    results = []
    for kind in (Norm, PlainRms):
        layer = kind("rms", center=center, dtype="float64")
        layer.build(x.shape)
        for variable in layer.variables:
            variable.assign(np.linspace(-1, 2, 7))
        results.append(with_gradients(layer, x, upstream, is_traced))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_narrow_numbers_are_normalized_by_wide_statistics():
    x = tf.cast(np.random.default_rng(0).normal(2, 3, (5, 64)), tf.bfloat16)
    for kind in ("layer", "rms"):
        narrow, wide = (Norm(kind, dtype=dtype) for dtype in ("bfloat16", "float32"))
        np.testing.assert_array_equal(narrow(x), tf.cast(wide(tf.cast(x, tf.float32)), tf.bfloat16))
