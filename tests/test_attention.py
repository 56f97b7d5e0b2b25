"""Laws of attention."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from trainer.execution import BLOCKS_FROM_QUERIES, QUERY_BLOCK, RECOMPUTED_QUERY_BLOCK
from trainer.model.attention import cached_attention, causal_attention, filled_up_to, rotate

# Where the document of each of six positions starts, in two rows.
STARTS = np.array([[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 4, 4]], np.int32)


def projections(sequence=6, heads=3, key_heads=3):
    random = np.random.default_rng(0)
    return [tf.constant(random.normal(size=(2, count, sequence, 5))) for count in (heads, key_heads, key_heads)]


def attention_by_loops(query, key, value, starts=None):
    query, key, value = (np.array(x) for x in (query, key, value))
    out = np.zeros_like(query)
    for b, h, i in np.ndindex(query.shape[:3]):
        k = h * key.shape[1] // query.shape[1]
        seen = range(0 if starts is None else starts[b, i], i + 1)
        scores = np.array([query[b, h, i] @ key[b, k, j] / np.sqrt(query.shape[-1]) for j in seen])
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        out[b, h, i] = sum(p * value[b, k, j] for p, j in zip(probabilities, seen, strict=True))
    return out


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("sequence", [1, 2, 6])
def test_causal_attention_equals_the_formula(sequence, key_heads):
    operands = projections(sequence, 4, key_heads)
    np.testing.assert_allclose(causal_attention(*operands), attention_by_loops(*operands), atol=1e-12)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_attention_inside_documents_equals_the_formula(jit_compile):
    operands = projections()
    attend = tf.function(causal_attention, autograph=False, jit_compile=jit_compile)
    np.testing.assert_allclose(attend(*operands, STARTS), attention_by_loops(*operands, STARTS), atol=1e-12)


def attention_by_autodiff(query, key, value, starts=None):
    positions = np.arange(query.shape[2])
    allowed = positions <= positions[:, np.newaxis]
    if starts is not None:
        allowed = allowed & (positions >= starts[:, np.newaxis, :, np.newaxis])
    key, value = (tf.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
    scores = tf.matmul(query, key, transpose_b=True) / query.shape[-1] ** 0.5
    return tf.matmul(tf.nn.softmax(tf.where(allowed, scores, tf.cast(-1e9, scores.dtype))), value)


def in_blocks(recompute):
    """Returns causal_attention as an execution has it do."""
    query_block = RECOMPUTED_QUERY_BLOCK if recompute else QUERY_BLOCK
    return functools.partial(causal_attention, query_block=query_block, recompute=recompute)


# To compile takes long: one length that is attended to as a whole, and one in blocks.
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("sequence", "key_heads", "jit_compile"),
    [
        *((BLOCKS_FROM_QUERIES + more, 3, False) for more in (-1, 0, 1, 3 * QUERY_BLOCK + 7)),
        (BLOCKS_FROM_QUERIES + 1, 1, False),
        (BLOCKS_FROM_QUERIES - 1, 3, True),
        pytest.param(BLOCKS_FROM_QUERIES + 1, 3, True, marks=pytest.mark.slow),
    ],
)
def test_attention_in_blocks_and_its_gradients_are_those_of_the_whole(sequence, key_heads, recompute, jit_compile):
    operands = projections(sequence, key_heads=key_heads)
    upstream = tf.constant(np.random.default_rng(1).normal(size=operands[0].shape))
    is_start = np.random.default_rng(2).random((2, sequence)) < 0.02
    starts = np.maximum.accumulate(np.where(is_start, np.arange(sequence), 0), axis=1).astype(np.int32)
    for of_documents in (None, starts):
        results = []
        ours = tf.function(in_blocks(recompute), autograph=False, jit_compile=jit_compile)
        for attend in (ours, attention_by_autodiff):
            with tf.GradientTape() as tape:
                tape.watch(operands)
                out = attend(*operands, of_documents)
            results.append([out, *tape.gradient(out, operands, upstream)])
        for ours, theirs in zip(*results, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(
    ("recompute", "block", "share"), [(False, QUERY_BLOCK, 0.5625), (True, RECOMPUTED_QUERY_BLOCK, 0.625)]
)
def test_attention_in_blocks_computes_little_of_what_the_mask_throws_away(recompute, block, share):
    sequence = 1024

    @tf.function(autograph=False)
    def gradients(query, key, value):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            out = in_blocks(recompute)(query, key, value)
        return tape.gradient(out, [query, key, value])

    spec = tf.TensorSpec([2, 3, sequence, 64], tf.float32)
    graph = gradients.get_concrete_function(spec, spec, spec).graph
    products = [op for op in graph.get_operations() if op.type == "BatchMatMulV2"]
    areas = [max(int(np.prod(x.shape[2:])) for x in (*op.inputs, *op.outputs)) for op in products]
    # Two products forward and four backward, each of all queries with all keys; the scores once more to recompute.
    assert sum(areas) == share * (7 if recompute else 6) * sequence**2
    assert max(areas) == block * sequence


def test_what_is_recomputed_is_not_kept():
    sequence = 4 * RECOMPUTED_QUERY_BLOCK

    def kept(recompute):
        @tf.function(autograph=False)
        def attend(query, key, value):
            with tf.GradientTape() as tape:
                tape.watch(query)
                out = in_blocks(recompute)(query, key, value)
            return tape.gradient(out, query)

        spec = tf.TensorSpec([2, 3, sequence, 64], tf.float32)
        graph = attend.get_concrete_function(spec, spec, spec).graph
        exponentials = [op for op in graph.get_operations() if op.type in ("Softmax", "Exp")]
        return len(exponentials)

    # A softmax for each block, or two exponentials: logarithmic sums are made of a third.
    assert kept(recompute=False) == sequence // QUERY_BLOCK
    assert kept(recompute=True) == 3 * 4


@pytest.mark.parametrize("sequence", [QUERY_BLOCK, 3 * QUERY_BLOCK])
def test_keys_that_serve_several_heads_are_never_repeated(sequence):
    @tf.function(autograph=False)
    def gradients(query, key, value):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            out = causal_attention(query, key, value)
        return tape.gradient(out, [query, key, value])

    specs = [tf.TensorSpec([2, heads, sequence, 64], tf.float32) for heads in (6, 2, 2)]
    operations = gradients.get_concrete_function(*specs).graph.get_operations()
    products = [op for op in operations if op.type == "BatchMatMulV2"]
    assert len(products) >= 6
    assert {x.shape[1] for op in products for x in (*op.inputs, *op.outputs)} == {2}
    assert not {"Tile", "BroadcastTo", "GatherV2", "Repeat"} & {op.type for op in operations}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_other_documents_do_not_change_one_bit(dtype):
    query, key, value = (tf.cast(x, dtype) for x in projections())
    # The first document of the first row, which ends before its other two.
    other = tf.cast(np.arange(6)[:, np.newaxis] < 2, dtype)
    before = causal_attention(query, key, value, STARTS)[0, :, 2:]
    after = causal_attention(query, key + 9 * other, value - 9 * other, STARTS)[0, :, 2:]
    np.testing.assert_array_equal(before, after)


def test_no_position_sees_the_future():
    query, key, value = projections()
    future = tf.concat([tf.zeros([2, 3, 4, 5], tf.float64), tf.ones([2, 3, 2, 5], tf.float64)], axis=2)
    before = causal_attention(query, key, value)[:, :, :4]
    after = causal_attention(query, key + 9 * future, value - 9 * future)[:, :, :4]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("key_heads", [1, 3])
@pytest.mark.parametrize("index, new", [(0, 1), (0, 6), (2, 3), (5, 1)])
def test_cached_attention_equals_the_rows_of_the_whole(index, new, key_heads):
    query, key, value = projections(key_heads=key_heads)
    # What the cache holds behind the last position is left from before and must not matter.
    rubbish = tf.fill([2, key_heads, 2, 5], tf.constant(7.0, tf.float64))
    used = index + new
    key_cache = tf.concat([key[:, :, :used], rubbish], axis=2)
    value_cache = tf.concat([value[:, :, :used], rubbish], axis=2)
    whole = causal_attention(query, key, value)[:, :, index:used]
    allowed = filled_up_to(tf.range(index, used), used + 2)
    part = cached_attention(query[:, :, index:used], key_cache, value_cache, allowed)
    np.testing.assert_allclose(part, whole, atol=1e-12)


def rotated_as_complex_numbers(x, positions, theta):
    """Each pair as one complex number, which is multiplied by one of length 1."""
    pairs = x.shape[-1] // 2
    turns = np.exp(1j * np.asarray(positions)[..., np.newaxis] * theta ** (-np.arange(pairs) / pairs))
    z = (x[..., :pairs] + 1j * x[..., pairs:]) * (turns if turns.ndim == 2 else turns[:, np.newaxis])
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("width", [2, 8])
def test_rotation_and_its_gradient_are_those_of_complex_numbers(width, jit_compile):
    random = np.random.default_rng(0)
    x, upstream = (tf.constant(random.normal(size=(2, 3, 6, width))) for _ in range(2))
    turn = tf.function(rotate, autograph=False, jit_compile=jit_compile)
    for positions in (np.arange(100, 106), np.arange(6) - STARTS):
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = turn(x, tf.constant(positions, tf.int32), 500.0)
        np.testing.assert_allclose(out, rotated_as_complex_numbers(x.numpy(), positions, 500.0), atol=1e-12)
        # Back by the same angles.
        expected = rotated_as_complex_numbers(upstream.numpy(), -positions, 500.0)
        np.testing.assert_allclose(tape.gradient(out, x, upstream), expected, atol=1e-12)


def test_products_of_rotated_queries_and_keys_depend_only_on_distance():
    query, key, _ = (x[..., :4] for x in projections())
    near, far = (
        tf.matmul(rotate(query, first + tf.range(6), 10_000.0), rotate(key, first + tf.range(6), 10_000.0), False, True)
        for first in (0, 1000)
    )
    np.testing.assert_allclose(near, far, atol=1e-12)
    assert not np.allclose(near, tf.matmul(query, key, transpose_b=True), atol=1e-2)


def test_rotation_of_narrow_numbers_is_rounded_once():
    x = tf.cast(projections()[0][..., :4], tf.bfloat16)
    wide = rotate(tf.cast(x, tf.float32), tf.range(6), 10_000.0)
    np.testing.assert_array_equal(rotate(x, tf.range(6), 10_000.0), tf.cast(wide, tf.bfloat16))
