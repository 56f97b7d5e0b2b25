"""Causal self-attention, over a whole sequence and over a key-value cache. Functions of tensors, without weights."""

import tensorflow as tf

from trainer.model.precision import accumulation_dtype

# Queries at a time, in sequences of at least two such blocks: shorter ones are faster whole, and fewer queries leave
# matrix units idle.
BLOCK = 128
# The same where probabilities are computed again, as on accelerators: each block reads all keys before it.
RECOMPUTED_BLOCK = 2 * BLOCK

# Keys and values of the positions before, each [batch, key_heads, capacity, head_dim], and zeros after them.
Cache = tuple[tf.Tensor, tf.Tensor]

# Added to a score before the softmax where a query may not look. Finite, so that no row can turn into NaN.
MASKED = -1e9


def causal_attention(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, starts: tf.Tensor | None = None, recompute: bool = False
) -> tf.Tensor:
    """Attends from each position to itself and the positions before it, or those of them in its document.

    Args:
        query: float [batch, heads, sequence, head_dim].
        key: float [batch, key_heads, sequence, head_dim]; heads is a multiple of key_heads, and the first key head
            serves the first so many heads.
        value: float [batch, key_heads, sequence, head_dim].
        starts: int32 [batch, sequence], the position where each one's document starts; None where all is one document.
        recompute: whether the gradient computes the probabilities again, rather than to keep sequence / 2 numbers for
            each query: a sixth more products, for less memory and fewer reads of it.

    Returns:
        float [batch, heads, sequence, head_dim].

    Source: Vaswani et al. 2017, equation 1; of fewer key_heads than heads, Ainslie et al. 2023, section 2.2.
    """
    sequence = query.shape[2]
    if sequence is None or sequence < 2 * BLOCK:
        end = sequence or tf.shape(query)[2]
        return _attend(query, key, value, _allowed(tf.range(end), end, starts))
    return _in_blocks(query, key, value, starts, recompute)


def _allowed(queries: tf.Tensor, end: int | tf.Tensor, starts: tf.Tensor | None) -> tf.Tensor:
    """Returns which of the keys [0, end) each of the last queries before end may see: bool [query, key], or
    [batch, 1, query, key] where documents have starts.
    """
    keys = tf.range(end)
    allowed = keys[tf.newaxis, :] <= queries[:, tf.newaxis]
    if starts is not None:
        # A document has no gaps: what is neither after a query nor before its document's start is of its document.
        # Compared as floats, which hold any position: TensorFlow's GPU kernel takes int32 to the host for it.
        starts = tf.cast(starts[:, end - tf.size(queries) : end], tf.float32)[:, tf.newaxis, :, tf.newaxis]
        allowed &= tf.cast(keys, tf.float32) >= starts
    return allowed


def _in_blocks(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, starts: tf.Tensor | None, recompute: bool
) -> tf.Tensor:
    """Attends a block of queries at a time, to the keys up to its end: what the mask throws away beyond the block is
    neither computed nor kept. The gradient is made by hand, of softmax(scores) as it was kept, or of its logarithmic
    sums.

    Source: of the gradient, Dao et al. 2022, appendix B.
    """
    sequence, scale = query.shape[2], tf.constant(query.shape[-1] ** -0.5, query.dtype)
    block = RECOMPUTED_BLOCK if recompute else BLOCK
    blocks = [(first, min(first + block, sequence)) for first in range(0, sequence, block)]
    wide = accumulation_dtype(query.dtype)

    @tf.custom_gradient
    def attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> tuple[tf.Tensor, object]:
        def scores(scaled: tf.Tensor, first: int, end: int) -> tf.Tensor:
            # Masks that compilers can foresee would lie in the program, for every layer.
            queries = tf.range(first, end) + (unforeseen_zero(query, tf.int32) if recompute else 0)
            product = _product(scaled[:, :, first:end], key[:, :, :end], transpose_b=True)
            return _masked(tf.cast(product, wide) if recompute else product, _allowed(queries, end, starts))

        scaled = query * scale
        kept, outs = [], []
        for first, end in blocks:
            of_block = scores(scaled, first, end)
            if recompute:
                kept.append(tf.reduce_logsumexp(of_block, axis=-1, keepdims=True))
                p = tf.cast(tf.exp(of_block - kept[-1]), query.dtype)
            else:
                p = tf.nn.softmax(of_block)
                kept.append(p)
            outs.append(_product(p, value[:, :, :end]))
        out = tf.concat(outs, axis=2)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            # What the softmax takes off each score's gradient: the mean of its row's by the probabilities.
            mean = tf.reduce_sum(tf.cast(upstream, wide) * tf.cast(out, wide), axis=-1, keepdims=True)
            # Else a compiler finds that the scores were there before, and keeps them.
            again = query * scale + unforeseen_zero(upstream, query.dtype) if recompute else scaled
            of_query, of_key, of_value = [], [], []
            for p, (first, end) in zip(kept, blocks, strict=True):
                if recompute:
                    p = tf.cast(tf.exp(scores(again, first, end) - p), query.dtype)
                rows = upstream[:, :, first:end]
                of_p = _product(rows, value[:, :, :end], transpose_b=True)
                of_scores = p * tf.cast(tf.cast(of_p, wide) - mean[:, :, first:end], p.dtype)
                of_query.append(_product(of_scores, key[:, :, :end]))
                of_key.append(_sum_of_products(of_scores, again[:, :, first:end], key.shape[1]))
                of_value.append(_sum_of_products(p, rows, key.shape[1]))
            return tf.concat(of_query, axis=2) * scale, _sum_from_start(of_key), _sum_from_start(of_value)

        return out, gradient

    return attend(query, key, value)


def unforeseen_zero(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns 0, or NaN where dtype has it and the first number of x is one: not known before x is."""
    first = tf.reshape(x, [-1])[0]
    if dtype.is_integer:
        return tf.minimum(tf.cast(tf.math.is_nan(first), dtype), 0)
    return tf.where(tf.equal(first, first), tf.zeros([], dtype), tf.constant(float("nan"), dtype))


def _sum_from_start(parts: list[tf.Tensor]) -> tf.Tensor:
    """Adds tensors that are each longer than the one before along axis 2, and begin at the same place."""
    total = parts[-1]
    for part in reversed(parts[:-1]):
        length = part.shape[2]
        total = tf.concat([total[:, :, :length] + part, total[:, :, length:]], axis=2)
    return total


def cached_attention(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Attends from new positions to everything a cache holds up to each of them.

    Args:
        query: float [batch, heads, new, head_dim], of the positions from index on.
        key: float [batch, key_heads, capacity, head_dim], filled up to and with the new positions.
        value: float [batch, key_heads, capacity, head_dim], likewise.
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
    return _product(tf.nn.softmax(_masked(_product(query, key, transpose_b=True), allowed)), value)


def _masked(scores: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
    masked = tf.constant(max(MASKED, float(scores.dtype.min)), scores.dtype)  # float16 ends at -65504.
    return scores + tf.where(allowed, tf.zeros([], scores.dtype), masked)


def _product(x: tf.Tensor, y: tf.Tensor, transpose_b: bool = False) -> tf.Tensor:
    """Multiplies each head of x [batch, heads, rows, ...] by that of y [batch, key_heads, ...] which serves it."""
    return _with_heads(tf.matmul(_with_heads(x, y.shape[1]), y, transpose_b=transpose_b), x.shape[1])


def _sum_of_products(x: tf.Tensor, y: tf.Tensor, key_heads: int) -> tf.Tensor:
    """Multiplies x [batch, heads, rows, m], transposed, by y [batch, heads, rows, n], and adds up the products of the
    heads that one key head serves: [batch, key_heads, m, n].
    """
    return tf.matmul(_with_heads(x, key_heads), _with_heads(y, key_heads), transpose_a=True)


def _with_heads(x: tf.Tensor, heads: int) -> tf.Tensor:
    """Takes the rows of several heads of [batch, any, rows, ...] for those of one, or one's for several's: so a matrix
    product has the rows of all heads that a key serves, and no key is ever repeated.
    """
    if x.shape[1] == heads:
        return x
    return tf.reshape(x, tf.concat([tf.shape(x)[:1], [heads, -1], tf.shape(x)[3:]], axis=0))


def rotate(x: tf.Tensor, positions: tf.Tensor, theta: float) -> tf.Tensor:
    """Turns the numbers of each head, taken in pairs, by angles that grow with the position: so the product of a query
    and a key depends on how far apart they are, and not on where.

    Args:
        x: float [batch, heads, sequence, head_dim], queries or keys; head_dim is even.
        positions: int32 [sequence] or [batch, sequence].
        theta: from a position to the next, pair i of n turns by theta ** (-i / n).

    Returns:
        A tensor like x, turned in the accumulation dtype.

    Source: Su et al. 2021, equation 34; but a number's partner is half a head away and not beside it, which is the same
    for weights in another order, and leaves the halves whole.
    """
    wide, pairs = accumulation_dtype(x.dtype), x.shape[-1] // 2
    steps = tf.constant([theta ** (-i / pairs) for i in range(pairs)], wide)
    angles = tf.cast(positions, wide)[..., tf.newaxis, :, tf.newaxis] * steps  # [(batch,) 1, sequence, pairs]
    cos, sin = tf.cos(angles), tf.sin(angles)
    first, second = tf.split(tf.cast(x, wide), 2, axis=-1)
    return tf.cast(tf.concat([first * cos - second * sin, second * cos + first * sin], axis=-1), x.dtype)
