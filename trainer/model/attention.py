"""Causal self-attention, over a whole sequence and over a key-value cache. Functions of tensors, without weights."""

import tensorflow as tf

# Added to a score before the softmax where a query may not look. Finite, so that no row can turn into NaN.
MASKED = -1e9


def causal_attention(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, starts: tf.Tensor | None = None) -> tf.Tensor:
    """Attends from each position to itself and the positions before it, or those of them in its document.

    Args:
        query: float [batch, heads, sequence, head_dim].
        key: float [batch, heads, sequence, head_dim].
        value: float [batch, heads, sequence, head_dim].
        starts: int32 [batch, sequence], the position where each one's document starts; None where all is one document.

    Returns:
        float [batch, heads, sequence, head_dim].

    Source: Vaswani et al. 2017, equation 1.
    """
    sequence = tf.shape(query)[2] if query.shape[2] is None else query.shape[2]
    allowed = tf.linalg.band_part(tf.ones([sequence, sequence], tf.bool), -1, 0)
    if starts is not None:
        # A document has no gaps: what is neither after a query nor before its document's start is of its document.
        # Compared as floats, which hold any position: TensorFlow's GPU kernel takes int32 to the host for it.
        starts = tf.cast(starts, tf.float32)[:, tf.newaxis, :, tf.newaxis]
        allowed &= tf.cast(tf.range(sequence), tf.float32) >= starts  # [batch, 1, query, key]
    return _attend(query, key, value, allowed)


def cached_attention(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Attends from new positions to everything a cache holds up to each of them.

    Args:
        query: float [batch, heads, new, head_dim], of the positions from index on.
        key: float [batch, heads, capacity, head_dim], filled up to and with the new positions.
        value: float [batch, heads, capacity, head_dim], likewise.
        index: int32 scalar, position of the first query.

    Returns:
        float [batch, heads, new, head_dim].
    """
    positions = index + tf.range(tf.shape(query)[2])
    allowed = tf.range(key.shape[2])[tf.newaxis, :] <= positions[:, tf.newaxis]
    return _attend(query, key, value, allowed)


def _attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
    # Scaling the queries costs head_dim / sequence of what scaling the scores would.
    query *= tf.constant(query.shape[-1] ** -0.5, query.dtype)
    scores = tf.matmul(query, key, transpose_b=True)  # [batch, heads, query, key]
    masked = tf.constant(max(MASKED, float(scores.dtype.min)), scores.dtype)  # float16 ends at -65504.
    mask = tf.where(allowed, tf.zeros([], scores.dtype), masked)
    return tf.matmul(tf.nn.softmax(scores + mask), value)
