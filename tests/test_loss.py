"""Laws of the chunked loss."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.model.loss import next_token_loss, next_token_loss_from_logits, next_token_loss_without_gradient
from trainer.model.ops.plain import Ops

# A chunk of four rows.
OPS = Ops(logit_rows=4)


def example(rows: int, dtype=np.float64, vocabulary=11, hidden_dim=7):
    random = np.random.default_rng(rows)
    hidden = random.normal(size=(1, rows, hidden_dim)).astype(dtype)
    kernel = random.normal(size=(vocabulary, hidden_dim)).astype(dtype)
    bias = random.normal(size=vocabulary).astype(dtype)
    targets = random.integers(0, vocabulary, (1, rows)).astype(np.int32)
    weights = (random.random((1, rows)) < 0.7).astype(np.float32)
    return [tf.constant(x) for x in (hidden, kernel, bias)], tf.constant(targets), tf.constant(weights)


def gradients(loss, operands, scale=1.0):
    with tf.GradientTape() as tape:
        tape.watch(operands)
        value, count = loss(*operands)
        scaled = value * scale
    return value, count, tape.gradient(scaled, operands)


# Around the chunk of 4 rows: less than one, exactly one, one row more, several.
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 12, 13])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunked_loss_equals_plain_loss_in_value_and_every_gradient(rows, with_bias):
    (hidden, kernel, bias), targets, weights = example(rows)

    def chunked(hidden, kernel, bias=None):
        return next_token_loss(hidden, kernel, bias, targets, weights, ops=OPS)

    def plain(hidden, kernel, bias=None):
        logits = tf.einsum("bth,vh->btv", hidden, kernel)
        return next_token_loss_from_logits(logits if bias is None else logits + bias, targets, weights)

    operands = [hidden, kernel, bias] if with_bias else [hidden, kernel]
    value, count, grads = gradients(chunked, operands, scale=0.3)
    plain_value, plain_count, plain_grads = gradients(plain, operands, scale=0.3)
    assert count == plain_count == np.sum(weights)
    np.testing.assert_allclose(value, plain_value, rtol=1e-12)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        assert grad.dtype == tf.float64
        np.testing.assert_allclose(grad, plain_grad, rtol=0, atol=1e-12)


def test_loss_without_gradient_is_the_same_number():
    (hidden, kernel, bias), targets, weights = example(13, np.float32)
    with_gradient = next_token_loss(hidden, kernel, bias, targets, weights, ops=OPS)
    without = next_token_loss_without_gradient(hidden, kernel, bias, targets, weights, ops=OPS)
    np.testing.assert_array_equal(with_gradient, without)


def test_a_target_of_vanishing_probability_costs_its_distance_and_not_infinity():
    hidden = tf.constant([[[1000.0]]])
    kernel = tf.constant([[1.0], [-1.0]])
    loss, _ = next_token_loss(hidden, kernel, None, tf.constant([[1]]), tf.ones([1, 1]))
    assert loss == 2000.0


def test_bfloat16_hidden_states_sum_their_loss_and_weight_gradients_in_float32():
    (hidden, kernel, bias), targets, weights = example(12, np.float32)
    narrow = tf.cast(hidden, tf.bfloat16)

    def loss(hidden, kernel, bias):
        return next_token_loss(hidden, kernel, bias, targets, weights, ops=OPS)

    value, count, grads = gradients(loss, [narrow, kernel, bias])
    assert (value.dtype, count.dtype) == (tf.float32, tf.float32)
    assert [grad.dtype for grad in grads] == [tf.bfloat16, tf.float32, tf.float32]
    reference, _, _ = gradients(loss, [hidden, kernel, bias])
    np.testing.assert_allclose(value, reference, rtol=2e-2)  # bfloat16 keeps 8 bits


def test_rows_of_weight_zero_leave_no_trace():
    (hidden, kernel, bias), targets, weights = example(8)
    other = tf.where(weights[..., tf.newaxis] > 0, hidden, 100.0 * tf.ones_like(hidden))
    results = [
        gradients(lambda h, k, b: next_token_loss(h, k, b, targets, weights, ops=OPS), [h, kernel, bias])
        for h in (hidden, other)
    ]
    for one, two in zip(tf.nest.flatten(results[0]), tf.nest.flatten(results[1]), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("rows", [3, 13])
@pytest.mark.parametrize("with_bias", [True, False])
def test_z_loss_adds_its_gradient_and_leaves_the_loss(rows, with_bias):
    (hidden, kernel, bias), targets, weights = example(rows)
    z_loss, loss_scale = 0.7, tf.constant(8.0)

    def logits_of(hidden, kernel, bias=None):
        logits = tf.einsum("bth,vh->btv", hidden, kernel)
        return logits if bias is None else logits + bias

    def chunked(hidden, kernel, bias=None):
        return next_token_loss(hidden, kernel, bias, targets, weights, loss_scale, ops=OPS, z_loss=z_loss)

    def of_logits(*operands):
        return next_token_loss_from_logits(logits_of(*operands), targets, weights, loss_scale, z_loss)

    def plain(*operands):
        logits = logits_of(*operands)
        log_sum_exp = tf.math.log(tf.reduce_sum(tf.exp(logits), axis=-1))
        losses = log_sum_exp - tf.gather(logits, targets, batch_dims=2)
        wide = tf.cast(weights, tf.float64)
        return tf.reduce_sum(losses * wide), 8.0 * tf.reduce_sum((losses + z_loss * log_sum_exp**2) * wide)

    operands = [hidden, kernel, bias] if with_bias else [hidden, kernel]
    with tf.GradientTape() as tape:
        tape.watch(operands)
        expected_value, objective = plain(*operands)
    expected = tape.gradient(objective, operands)
    for loss in (chunked, of_logits):
        value, count, grads = gradients(loss, operands)
        assert count == np.sum(weights)
        np.testing.assert_allclose(value, expected_value, rtol=1e-12)
        for grad, reference in zip(grads, expected, strict=True):
            np.testing.assert_allclose(grad, reference, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(
        next_token_loss(*operands, *(() if with_bias else (None,)), targets, weights, ops=OPS)[0],
        chunked(*operands)[0],
    )


def test_z_loss_of_a_target_of_vanishing_probability_is_finite():
    hidden = tf.constant([[[1000.0]]])
    kernel = tf.constant([[1.0], [-1.0]])
    value, _, (d_hidden, d_kernel) = gradients(
        lambda h, k: next_token_loss(h, k, None, tf.constant([[1]]), tf.ones([1, 1]), z_loss=0.01), [hidden, kernel]
    )
    assert value == 2000.0
    # log(sum(exp)) is 1000: to the gradient 1 of the first logit, 2 * 0.01 * 1000 comes.
    np.testing.assert_allclose(d_kernel, [[21_000.0], [-1000.0]], rtol=1e-6)
    np.testing.assert_allclose(d_hidden, [[[22.0]]], rtol=1e-6)
