"""Causal self-attention, over a whole sequence and over a key-value cache. Functions of tensors, without weights."""

from collections.abc import Callable

import tensorflow as tf

from trainer.execution import BLOCKS_FROM_QUERIES, QUERY_BLOCK, query_blocks
from trainer.model.precision import accumulation_dtype

# Keys and values of the positions so far, each [batch, key_heads, capacity, head_dim], with zeros after them.
Cache = tuple[tf.Tensor, tf.Tensor]

# Multiplies like tf.matmul, with its argument transpose_b.
Product = Callable[..., tf.Tensor]

# Added to a score before the softmax if the query may not see the key. Finite, so that no row can turn into NaN.
MASKED = -1e9


def causal_attention(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    starts: tf.Tensor | None = None,
    query_block: int = QUERY_BLOCK,
    recompute: bool = False,
) -> tf.Tensor:
    """Attends from each position to itself and to the positions before it, within its document if there are starts.

    Args:
        query: float [batch, heads, sequence, head_dim].
        key: float [batch, key_heads, sequence, head_dim]; heads is a multiple of key_heads, and the first key head
            serves the first heads / key_heads heads.
        value: float [batch, key_heads, sequence, head_dim].
        starts: int32 [batch, sequence], the position where each position's document starts; None: one document.
        query_block: queries at a time, see `query_blocks`.
        recompute: whether the gradient computes the probabilities of blocks again instead of keeping sequence / 2
            numbers for each query: a sixth more products, for less memory and fewer reads of it. Sequences shorter than
            BLOCKS_FROM_QUERIES are not attended to in blocks.

    Returns:
        float [batch, heads, sequence, head_dim].

    Source: Vaswani et al. 2017, equation 1; for fewer key_heads than heads, Ainslie et al. 2023, section 2.2.
    """
    sequence = query.shape[2]
    if sequence is None or sequence < BLOCKS_FROM_QUERIES:
        end = sequence or tf.shape(query)[2]
        return _attend(query, key, value, _allowed(tf.range(end), end, starts))
    return _in_blocks(query, key, value, starts, query_blocks(sequence, query_block), recompute)


def _allowed(queries: tf.Tensor, end: int | tf.Tensor, starts: tf.Tensor | None) -> tf.Tensor:
    """Returns which of the keys [0, end) each of the last queries before end may see: bool [query, key], or
    [batch, 1, query, key] if there are starts.
    """
    keys = tf.range(end)
    allowed = keys[tf.newaxis, :] <= queries[:, tf.newaxis]
    if starts is not None:
        # A document has no gaps: a key that is neither after the query nor before the start of its document is in it.
        # Compared as floats, which hold any position: TensorFlow copies int32 from a GPU to the host to compare it.
        starts = tf.cast(starts[:, end - tf.size(queries) : end], tf.float32)[:, tf.newaxis, :, tf.newaxis]
        allowed &= tf.cast(keys, tf.float32) >= starts
    return allowed


def _in_blocks(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    starts: tf.Tensor | None,
    blocks: list[tuple[int, int]],
    recompute: bool,
) -> tf.Tensor:
    """Attends from a block of queries at a time to the keys up to the block's end: the scores of later keys, which the
    mask throws away, are neither computed nor kept. The gradient, by hand, reads the probabilities as the forward pass
    kept them, or computes them again from the logarithm of the sum of each row's exponentials.

    Source of the gradient: Dao et al. 2022, appendix B.
    """
    scale = tf.constant(query.shape[-1] ** -0.5, query.dtype)
    wide = accumulation_dtype(query.dtype)

    @tf.custom_gradient
    def attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> tuple[tf.Tensor, object]:
        def scores(scaled: tf.Tensor, first: int, end: int) -> tf.Tensor:
            # XLA would fold a mask of constants, and keep it in the program once for every layer.
            queries = tf.range(first, end) + (unforeseen_zero(query, tf.int32) if recompute else 0)
            product = _product(scaled[:, :, first:end], key[:, :, :end], transpose_b=True)
            return _masked(tf.cast(product, wide) if recompute else product, _allowed(queries, end, starts))

        scaled = query * scale
        kept, outs = [], []
        for first, end in blocks:
            scored = scores(scaled, first, end)
            if recompute:
                kept.append(tf.reduce_logsumexp(scored, axis=-1, keepdims=True))
                p = tf.cast(tf.exp(scored - kept[-1]), query.dtype)
            else:
                p = tf.nn.softmax(scored)
                kept.append(p)
            outs.append(_product(p, value[:, :, :end]))
        out = tf.concat(outs, axis=2)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            # The softmax subtracts from the gradient by each probability the row's mean, weighted by probability.
            mean = tf.reduce_sum(tf.cast(upstream, wide) * tf.cast(out, wide), axis=-1, keepdims=True)
            # Without the added zero XLA finds that the forward pass has computed the same scores, and keeps those.
            again = query * scale + unforeseen_zero(upstream, query.dtype) if recompute else scaled
            d_query, d_key, d_value = [], [], []
            for of_block, (first, end) in zip(kept, blocks, strict=True):
                p = tf.cast(tf.exp(scores(again, first, end) - of_block), query.dtype) if recompute else of_block
                rows = upstream[:, :, first:end]
                d_p = _product(rows, value[:, :, :end], transpose_b=True)
                d_scores = p * tf.cast(tf.cast(d_p, wide) - mean[:, :, first:end], p.dtype)
                d_query.append(_product(d_scores, key[:, :, :end]))
                d_key.append(_sum_of_products(d_scores, again[:, :, first:end], key.shape[1]))
                d_value.append(_sum_of_products(p, rows, key.shape[1]))
            return tf.concat(d_query, axis=2) * scale, _sum_from_start(d_key), _sum_from_start(d_value)

        return out, gradient

    return attend(query, key, value)


def unforeseen_zero(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns 0, or NaN if the first number of x is NaN and dtype has NaN. A compiler cannot know it before x."""
    first = tf.reshape(x, [-1])[0]
    if dtype.is_integer:
        return tf.minimum(tf.cast(tf.math.is_nan(first), dtype), 0)
    return tf.where(tf.equal(first, first), tf.zeros([], dtype), tf.constant(float("nan"), dtype))


def _sum_from_start(parts: list[tf.Tensor]) -> tf.Tensor:
    """Adds tensors that all begin at the same place of axis 2, each longer than the one before."""
    total = parts[-1]
    for part in reversed(parts[:-1]):
        length = part.shape[2]
        total = tf.concat([total[:, :, :length] + part, total[:, :, length:]], axis=2)
    return total


def cached_attention(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, allowed: tf.Tensor, product: Product | None = None
) -> tf.Tensor:
    """Attends from new positions to everything a cache holds up to each of them.

    Args:
        query: float [batch, heads, new, head_dim].
        key: float [batch, key_heads, capacity, head_dim], filled up to the last of the new positions.
        value: float [batch, key_heads, capacity, head_dim], filled in the same way.
        allowed: bool [new, capacity], whether a query may see a key; see `filled_up_to`.
        product: multiplies queries by transposed keys; None: as `tf.matmul` does.

    Returns:
        float [batch, heads, new, head_dim].
    """
    return _attend(query, key, value, allowed, product or tf.matmul)


def attention_beside_cache(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, keys: tf.Tensor, values: tf.Tensor, index: tf.Tensor
) -> tf.Tensor:
    """Attends from one new position to itself and to everything before it, without writing to the cache.

    Args:
        query: float [batch, heads, 1, head_dim], for the position index.
        key: float [batch, key_heads, 1, head_dim].
        value: float [batch, key_heads, 1, head_dim].
        keys: float [batch, key_heads, capacity, head_dim], filled before index.
        values: float [batch, key_heads, capacity, head_dim], filled in the same way.
        index: int32 scalar.

    Returns:
        float [batch, heads, 1, head_dim].
    """
    query *= tf.constant(query.shape[-1] ** -0.5, query.dtype)
    before = _masked(_product(query, keys, transpose_b=True), tf.range(keys.shape[2]) < index)
    probabilities = tf.nn.softmax(tf.concat([before, _product(query, key, transpose_b=True)], axis=-1))
    return _product(probabilities[..., :-1], values) + _product(probabilities[..., -1:], value)


def filled_up_to(positions: tf.Tensor, capacity: int) -> tf.Tensor:
    """Returns which places of a cache queries at these positions may see: bool [new, capacity]."""
    return tf.range(capacity)[tf.newaxis, :] <= positions[:, tf.newaxis]


def _attend(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, allowed: tf.Tensor, product: Product = tf.matmul
) -> tf.Tensor:
    # To scale the queries costs head_dim / sequence of what it costs to scale the scores.
    query *= tf.constant(query.shape[-1] ** -0.5, query.dtype)
    scores = _product(query, key, transpose_b=True, product=product)
    return _product(tf.nn.softmax(_masked(scores, allowed)), value)


def _masked(scores: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
    masked = tf.constant(max(MASKED, float(scores.dtype.min)), scores.dtype)  # float16 ends at -65504.
    return scores + tf.where(allowed, tf.zeros([], scores.dtype), masked)


def _product(x: tf.Tensor, y: tf.Tensor, transpose_b: bool = False, product: Product = tf.matmul) -> tf.Tensor:
    """Multiplies each head of x [batch, heads, rows, ...] by the head of y [batch, key_heads, ...] that serves it."""
    return _with_heads(product(_with_heads(x, y.shape[1]), y, transpose_b=transpose_b), x.shape[1])


def _sum_of_products(x: tf.Tensor, y: tf.Tensor, key_heads: int) -> tf.Tensor:
    """Multiplies the transpose of x [batch, heads, rows, m] by y [batch, heads, rows, n], and adds up the products of
    all heads that one key head serves: [batch, key_heads, m, n].
    """
    return tf.matmul(_with_heads(x, key_heads), _with_heads(y, key_heads), transpose_a=True)


def _with_heads(x: tf.Tensor, heads: int) -> tf.Tensor:
    """Reshapes [batch, any, rows, ...] to another number of heads. So one matrix product has the rows of all heads that
    a key head serves, and no key is ever repeated.
    """
    if x.shape[1] == heads:
        return x
    return tf.reshape(x, tf.concat([tf.shape(x)[:1], [heads, -1], tf.shape(x)[3:]], axis=0))


def rotate(x: tf.Tensor, positions: tf.Tensor, theta: float) -> tf.Tensor:
    """Turns the numbers of each head, taken in pairs, by angles that grow with the position. So the product of a query
    and a key depends on the distance between their positions, and not on the positions.

    Args:
        x: float [batch, heads, sequence, head_dim], queries or keys; head_dim is even.
        positions: int32 [sequence] or [batch, sequence].
        theta: base of the angles: from one position to the next, pair i of n turns by theta ** (-i / n).

    Returns:
        A tensor like x, turned in the accumulation dtype.

    Source: Su et al. 2021, equation 34, except that a number's partner is half a head away instead of beside it. That
    is the same model with its weights in another order, and it leaves the halves whole.
    """
    wide, pairs = accumulation_dtype(x.dtype), x.shape[-1] // 2
    steps = tf.constant([theta ** (-i / pairs) for i in range(pairs)], wide)
    angles = tf.cast(positions, wide)[..., tf.newaxis, :, tf.newaxis] * steps  # [(batch,) 1, sequence, pairs]
    cos, sin = tf.cos(angles), tf.sin(angles)
    first, second = tf.split(tf.cast(x, wide), 2, axis=-1)
    return tf.cast(tf.concat([first * cos - second * sin, second * cos + first * sin], axis=-1), x.dtype)
