"""Laws of AdamW: Keras is the reference."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config.settings import OptimizerConfig
from trainer.optimizers.adamw import AdamW

STEPS = 20


def variables(dtype="float64"):
    weights = [
        keras.Variable(np.linspace(-1, 1, 6).reshape(2, 3), dtype=dtype, name="kernel"),
        keras.Variable(np.linspace(-1, 1, 3), dtype=dtype, name="bias"),
    ]
    return {weight.name: weight for weight in weights}


def gradient_steps():
    random = np.random.default_rng(0)
    return [[random.normal(size=(2, 3)), random.normal(size=3)] for _ in range(STEPS)]


def trained_by_keras(optimizer):
    weights = list(variables().values())
    for gradients in gradient_steps():
        optimizer.apply([tf.constant(g) for g in gradients], weights)
    return weights


@pytest.mark.parametrize("jit_compile", [False, True])
def test_equals_keras_adamw(jit_compile):
    keras_optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, beta_1=0.8, beta_2=0.95, epsilon=1e-5)
    keras_optimizer.exclude_from_weight_decay(var_names=["bias"])
    ours = variables()
    optimizer = AdamW(OptimizerConfig(weight_decay=0.1, beta_1=0.8, beta_2=0.95, epsilon=1e-5), ours)
    apply = tf.function(optimizer.apply, jit_compile=jit_compile, autograph=False)
    for gradients in gradient_steps():
        apply([tf.constant(g) for g in gradients], tf.constant(0.01, tf.float64))
    for mine, theirs in zip(ours.values(), trained_by_keras(keras_optimizer), strict=True):
        # Keras keeps the powers of beta in float32.
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-5)


def test_default_settings_are_the_tutorials_adam():
    ours = variables()
    config = OptimizerConfig()
    optimizer = AdamW(config, ours)
    for gradients in gradient_steps():
        optimizer.apply([tf.constant(g) for g in gradients], tf.constant(config.learning_rate, tf.float64))
    for mine, theirs in zip(ours.values(), trained_by_keras(keras.optimizers.get("adam")), strict=True):
        # As above; if a weight ends near 0, its whole way counts.
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-5 * STEPS * config.learning_rate)


def test_decay_shrinks_matrices_and_not_vectors():
    ours = variables()
    optimizer = AdamW(OptimizerConfig(weight_decay=0.5), ours)
    zeros = [tf.zeros([2, 3], tf.float64), tf.zeros([3], tf.float64)]
    optimizer.apply(zeros, tf.constant(0.1, tf.float64))
    np.testing.assert_allclose(ours["kernel"].numpy(), variables()["kernel"].numpy() * 0.95, rtol=1e-12)
    np.testing.assert_array_equal(ours["bias"].numpy(), variables()["bias"].numpy())


def test_decay_spares_biases_and_normalizations_of_several_axes():
    tokens = np.zeros((1, 4), np.int32)
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(7, 6)(inputs)
    x = keras.layers.MultiHeadAttention(2, 3)(x, x)
    x = keras.layers.EinsumDense("btd,dhe->bthe", (None, 2, 5), bias_axes="he")(x)
    x = keras.layers.LayerNormalization(axis=(-2, -1))(x)
    x = keras.layers.RMSNormalization(axis=(-2, -1))(x)
    x = keras.layers.GRU(3, return_sequences=True)(keras.layers.Reshape((4, 10))(x))
    model = keras.Model(inputs, keras.layers.Dense(7)(x))
    model(tokens)
    of_several_axes = [variable for variable in model.trainable_variables if len(variable.shape) > 1]
    names = {variable.name for variable in of_several_axes}
    assert names == {"embeddings", "kernel", "recurrent_kernel", "bias", "gamma", "beta", "scale"}
    left_alone = [
        variable for variable in model.trainable_variables if variable.name in ("bias", "gamma", "beta", "scale")
    ]
    before = {id(variable): variable.numpy() for variable in model.trainable_variables}
    for variable in left_alone:
        variable.assign(variable.numpy() + 1)  # Zeros would hide a decay.
        before[id(variable)] = variable.numpy()
    weights = {variable.path: variable for variable in model.trainable_variables}
    optimizer = AdamW(OptimizerConfig(weight_decay=0.5), weights)
    optimizer.apply([tf.zeros(variable.shape) for variable in weights.values()], tf.constant(0.1))
    for variable in weights.values():
        factor = 1 if any(variable is one for one in left_alone) else 0.95
        np.testing.assert_allclose(variable.numpy(), factor * before[id(variable)], rtol=1e-6, err_msg=variable.path)


def test_state_is_named_after_the_weights():
    optimizer = AdamW(OptimizerConfig(), variables())
    assert set(optimizer.state()) == {
        "num_updates",
        "kernel/first_moment",
        "kernel/second_moment",
        "bias/first_moment",
        "bias/second_moment",
    }
