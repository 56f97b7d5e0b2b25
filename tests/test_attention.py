"""Laws of attention."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.model.attention import cached_attention, causal_attention


def projections(sequence=6):
    random = np.random.default_rng(0)
    return [tf.constant(random.normal(size=(2, 3, sequence, 5))) for _ in range(3)]


def attention_by_loops(query, key, value):
    query, key, value = (np.array(x) for x in (query, key, value))
    out = np.zeros_like(query)
    for b, h, i in np.ndindex(query.shape[:3]):
        scores = np.array([query[b, h, i] @ key[b, h, j] / np.sqrt(query.shape[-1]) for j in range(i + 1)])
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        out[b, h, i] = sum(p * value[b, h, j] for j, p in enumerate(probabilities))
    return out


@pytest.mark.parametrize("sequence", [1, 2, 6])
def test_causal_attention_equals_the_formula(sequence):
    operands = projections(sequence)
    np.testing.assert_allclose(causal_attention(*operands), attention_by_loops(*operands), atol=1e-12)


def test_no_position_sees_the_future():
    query, key, value = projections()
    future = tf.concat([tf.zeros([2, 3, 4, 5], tf.float64), tf.ones([2, 3, 2, 5], tf.float64)], axis=2)
    before = causal_attention(query, key, value)[:, :, :4]
    after = causal_attention(query, key + 9 * future, value - 9 * future)[:, :, :4]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("index, new", [(0, 1), (0, 6), (2, 3), (5, 1)])
def test_cached_attention_equals_the_rows_of_the_whole(index, new):
    query, key, value = projections()
    # What the cache holds behind the last position is left from before and must not matter.
    rubbish = tf.fill([2, 3, 2, 5], tf.constant(7.0, tf.float64))
    used = index + new
    key_cache = tf.concat([key[:, :, :used], rubbish], axis=2)
    value_cache = tf.concat([value[:, :, :used], rubbish], axis=2)
    whole = causal_attention(query, key, value)[:, :, index:used]
    part = cached_attention(query[:, :, index:used], key_cache, value_cache, tf.constant(index))
    np.testing.assert_allclose(part, whole, atol=1e-12)
