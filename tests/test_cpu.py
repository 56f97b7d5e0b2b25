"""Laws of what is done otherwise where TensorFlow runs a step on a CPU."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

from trainer.config import ModelConfig
from trainer.model import cpu
from trainer.model.cpu import (
    add_bias,
    fast_dtype,
    in_one_pass,
    mean_of_rows,
    operations_on_cpu,
    operations_one_by_one,
    subtract_at,
    write_at,
)
from trainer.model.gpt import GPT
from trainer.model.loss import next_token_loss
from trainer.training.step import forward_backward


@in_one_pass
def twice_and_one(x, y):
    return 2 * x + y


def operations(rows):
    """Returns those of a traced function: of each its type, and whether XLA compiles it whole."""
    spec = tf.TensorSpec([rows, 3])
    graph = tf.function(lambda x, y: twice_and_one(x, y)).get_concrete_function(spec, spec).graph
    return [
        (op.type, any(name == "_XlaMustCompile" and value.b for name, value in op.node_def.attr.items()))
        for op in graph.get_operations()
    ]


def test_a_function_is_compiled_on_a_cpu_where_its_shapes_are_known():
    with operations_on_cpu():
        assert ("PartitionedCall", True) in operations(4)
        assert ("AddV2", False) in operations(None)
    assert ("AddV2", False) in operations(4)


@pytest.fixture
def on_a_host_without_compiler(monkeypatch):
    monkeypatch.setattr(cpu.metadata, "version", {"tensorflow-tpu": "2.20.0"}.__getitem__)
    cpu._can_compile.cache_clear()
    yield
    cpu._can_compile.cache_clear()


@pytest.mark.usefixtures("on_a_host_without_compiler")
def test_nothing_is_compiled_where_tensorflow_is_the_one_for_tpus():
    with operations_on_cpu():
        assert ("AddV2", False) in operations(4)


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_values_are_the_same_in_every_way_of_calling(is_on_cpu):
    x, y = tf.constant([[1.0, 2.0, 3.0]]), tf.constant([[0.5, 0.0, -1.0]])
    for call in (twice_and_one, tf.function(twice_and_one), tf.function(twice_and_one, jit_compile=True)):
        with operations_on_cpu(is_on_cpu):
            assert call(x, y).numpy().tolist() == [[2.5, 4.0, 5.0]]


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_numbers_are_subtracted_at_their_places_and_nowhere_else(is_on_cpu):
    with operations_on_cpu(is_on_cpu):
        run = tf.function(lambda x: (subtract_at(2 * x, tf.constant([[0, 2], [1, 0]]), tf.constant([1.0, 5.0])), 2 * x))
        changed, before = run(tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert changed.numpy().tolist() == [[2, 4, 5], [3, 10, 12]]
    assert before.numpy().tolist() == [[2, 4, 6], [8, 10, 12]]


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_means_are_of_rows(is_on_cpu):
    with operations_on_cpu(is_on_cpu):
        assert mean_of_rows(tf.constant([[1.0, 2.0, 6.0], [4.0, 5.0, 6.0]])).numpy().tolist() == [[3.0], [5.0]]


@pytest.mark.parametrize("is_on_cpu", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_losses_are_the_same_whatever_runs_them_also_where_probabilities_vanish(scale, is_on_cpu):
    random = np.random.default_rng(0)
    hidden, table = (tf.constant(scale * random.normal(size=shape), tf.float32) for shape in ((2, 3, 4), (7, 4)))
    bias, targets = tf.constant(random.normal(size=7), tf.float32), tf.constant([[1, 2, 0], [3, 6, 6]])

    @tf.function(autograph=False)
    def run():
        with tf.GradientTape() as tape:
            tape.watch([hidden, table, bias])
            loss_sum, _ = next_token_loss(hidden, table, bias, targets, tf.ones([2, 3]), chunk_rows=4)
        return loss_sum, *tape.gradient(loss_sum, [hidden, table, bias])

    with tf.GradientTape() as tape:
        wide = [tf.cast(x, tf.float64) for x in (hidden, table, bias)]
        tape.watch(wide)
        logits = tf.matmul(wide[0], wide[1], transpose_b=True) + wide[2]
        expected = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))
    with operations_on_cpu(is_on_cpu):
        for ours, exact in zip(run(), [expected, *tape.gradient(expected, wide)], strict=True):
            np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5 * scale)


@pytest.fixture(params=[True, False])
def multiplies(request, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: request.param)
    return request.param


def test_a_model_computes_in_a_wider_dtype_where_the_cpu_is_slow_in_its_own(multiplies):
    dtypes = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
    with operations_on_cpu():
        assert [fast_dtype(dtype) for dtype in dtypes] == [
            tf.float32,
            tf.bfloat16 if multiplies else tf.float32,
            tf.float32,
            tf.float64,
        ]
    assert [fast_dtype(dtype) for dtype in dtypes] == [*dtypes]


@pytest.mark.parametrize("traced", [contextlib.nullcontext, operations_one_by_one], ids=["compiled", "one by one"])
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_new_rows_are_written_from_an_index_on_and_nothing_else_changes(traced, dtype):
    expected = np.random.default_rng(0).normal(size=(2, 3, 7, 4))
    expected[0, 0, 5, 0] = np.nan
    expected[:, :, 6] = 0
    expected = tf.cast(expected, dtype)
    kept, new = tf.concat([expected[:, :, :4], tf.zeros([2, 3, 3, 4], dtype)], axis=2), expected[:, :, 4:6]
    before = kept.numpy().copy()
    shapes = ([None, 3, 7, 4], [None, 3, None, 4])
    specs = [*(tf.TensorSpec(shape, dtype) for shape in shapes), tf.TensorSpec([], tf.int32)]
    with traced():
        found = tf.function(write_at, specs, autograph=False)(kept, new, tf.constant(4))
    assert found.dtype == dtype
    np.testing.assert_array_equal(tf.cast(found, tf.float64), tf.cast(expected, tf.float64))
    # It is still read here, and so was not overwritten.
    np.testing.assert_array_equal(kept, before)


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_a_bias_is_added_and_its_gradient_is_the_sum_over_all_rows(is_on_cpu):
    rng = np.random.default_rng(0)
    x, upstream, bias = (tf.constant(rng.normal(size=size)) for size in ((2, 3, 5), (2, 3, 5), 5))
    with operations_on_cpu(is_on_cpu), tf.GradientTape() as tape:
        tape.watch([x, bias])
        y = add_bias(x, bias)
    d_x, d_bias = tape.gradient(y, [x, bias], upstream)
    np.testing.assert_array_equal(y, x + bias)
    np.testing.assert_array_equal(d_x, upstream)
    np.testing.assert_allclose(d_bias, upstream.numpy().sum((0, 1)), rtol=1e-14)


@pytest.mark.parametrize("recompute", ["nothing", "attention", "blocks"])
def test_where_bfloat16_is_slow_nothing_but_the_embeddings_is_rounded(recompute, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    tokens = tf.constant(np.random.default_rng(0).integers(0, 11, (2, 8)), tf.int32)
    config = ModelConfig(num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=8, activation="gelu", pre_norm=True)
    narrow = GPT(config, 11, 8, dtype="mixed_bfloat16")
    wide = GPT(config, 11, 8)
    for variable, weight in zip(wide.variables, narrow.get_weights(), strict=True):
        is_embedding = "embedding" in variable.path and "unembedding" not in variable.path
        variable.assign(tf.cast(tf.cast(weight, tf.bfloat16), tf.float32) if is_embedding else weight)
    with operations_on_cpu():
        found, expected = (model.hidden_states(tokens, recompute=recompute) for model in (narrow, wide))
    np.testing.assert_array_equal(found, expected)


def test_a_step_in_bfloat16_computes_in_what_is_fast_and_comes_near_float32(multiplies):
    inputs = tf.constant(np.random.default_rng(0).integers(0, 11, (2, 8)), tf.int32)
    batch = (inputs, tf.roll(inputs, -1, axis=1), tf.ones([2, 8]))
    results, dtypes = {}, {}
    for policy in ("float32", "mixed_bfloat16"):
        model = GPT(ModelConfig(num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8), 11, 8, dtype=policy)
        weights = [tf.convert_to_tensor(variable.value) for variable in model.trainable_variables]
        run = tf.function(lambda: forward_backward(model, weights, [], batch, draw=None), autograph=False)  # noqa: B023
        with operations_on_cpu():
            results[policy] = run()
            graph = run.get_concrete_function().graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        dtypes[policy] = {tf.as_dtype(node.attr["T"].type) for node in nodes if node.op in ("MatMul", "BatchMatMulV2")}
        # Nor is anything rounded between products.
        assert {tf.as_dtype(node.attr["T"].type) for node in nodes if node.op == "Relu"} == {
            tf.bfloat16 if multiplies and policy == "mixed_bfloat16" else tf.float32
        }
    # Losses and means are summed in float32, by products too.
    assert dtypes["float32"] == {tf.float32}
    assert dtypes["mixed_bfloat16"] == {tf.float32} | ({tf.bfloat16} if multiplies else set())
    exact, narrow = results["float32"], results["mixed_bfloat16"]
    np.testing.assert_allclose(narrow.loss_sum, exact.loss_sum, rtol=1e-2)
    assert {gradient.dtype for gradient in narrow.weights} == {tf.float32}
    difference = tf.linalg.global_norm([a - b for a, b in zip(narrow.weights, exact.weights, strict=True)])
    # Something was rounded, and not much.
    assert 1e-4 < difference / tf.linalg.global_norm(exact.weights) < 3e-2
