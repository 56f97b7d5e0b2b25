"""Laws of the ways of computing: each equals the plain one, which tests/test_gpt.py compares with the papers' formulas.

Below, each thing that they do differently has a test.
"""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import trainer
from trainer.config.settings import ModelConfig
from trainer.execution import QUERY_BLOCK, RECOMPUTED_QUERY_BLOCK
from trainer.hardware.processor import Processor
from trainer.model.dropout import DropoutDraw
from trainer.model.gpt import GPT
from trainer.model.loss import next_token_loss
from trainer.model.normalization import row_means
from trainer.model.ops import cpu, decoding_ops
from trainer.model.ops.cpu import CpuDecodingOps, CpuOps, in_one_pass, means_by_product
from trainer.model.ops.plain import Ops
from trainer.model.ops.xla import XlaOps
from trainer.training.step import forward_backward

KINDS = {"plain": Ops, "cpu": CpuOps, "xla": XlaOps}
EVERY_WAY = pytest.mark.parametrize("ops", [kind() for kind in KINDS.values()], ids=KINDS)
VOCABULARY, BOS = 20, 2

WIDTHS = {"num_layers": 1, "num_heads": 4, "hidden_dim": 16, "intermediate_dim": 12}
GROUPED = {"num_key_value_heads": 2}
SHAPES = {
    "tutorial": ModelConfig(**WIDTHS),
    "gpt2": ModelConfig(
        **WIDTHS | {"num_layers": 2}, pre_norm=True, activation="gelu", dropout=0.2, document_mask=True
    ),
    "llama": ModelConfig(
        **WIDTHS, **GROUPED, pre_norm=True, norm="rms", positions="rope", activation="swiglu", use_bias=False
    ),
    "tied": ModelConfig(
        **WIDTHS,
        **GROUPED,
        tied_embeddings=True,
        positions="rope",
        norm="rms",
        qk_norm=True,
        activation="gelu",
        document_mask=True,
    ),
    "parts": ModelConfig(
        **WIDTHS | {"num_heads": 3, "head_dim": 6},
        activation="gelu_tanh",
        norm_epsilon=0.1,
        use_bias=("query_key_value", "norm"),
    ),
    "wide": ModelConfig(
        **WIDTHS, pre_norm=True, tied_embeddings=True, activation="swiglu", dropout=0.1, vocabulary_multiple=16
    ),
}


def ways(dtype=None):
    """Yields every way of computing with every recompute, and what to call it."""
    for name, kind in KINDS.items():
        for recompute in ("nothing", "attention", "blocks"):
            block = QUERY_BLOCK if recompute == "nothing" else RECOMPUTED_QUERY_BLOCK
            yield f"{name}, recompute {recompute}", kind(recompute, block, 8, dtype)


def make_model(config, sequence, dtype="float64"):
    """A GPT with random weights, biases and scales too: zeros and ones would hide mistakes."""
    model = GPT(config, VOCABULARY, sequence, dtype=dtype, bos_id=BOS)
    random = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(variable.numpy() + random.normal(0, 0.3, variable.shape))
    return model


def loss_and_gradients(model, sequence, ops, jit_compile=None):
    """Returns the training loss of random text, and its gradient by every weight."""
    random = np.random.default_rng(sequence)
    tokens = random.integers(0, VOCABULARY, (2, sequence + 1)).astype(np.int32)
    batch = (tf.constant(tokens[:, :-1]), tf.constant(tokens[:, 1:]))
    target_weights = tf.constant(random.integers(0, 2, (2, sequence)), tf.float32)
    draw = DropoutDraw(*(tf.constant(number, tf.int64) for number in (1, 2, 3)))
    weights = [tf.convert_to_tensor(variable.value) for variable in model.trainable_variables]
    scale = tf.constant(2.0)

    def run(*weights):
        found = forward_backward(model, weights, [], (*batch, target_weights), draw, scale, 0.1, ops)
        return found.loss_sum, *found.by_weight

    return tf.function(run, autograph=False, jit_compile=jit_compile)(*weights)


def difference(ours, theirs):
    """Returns how far apart two lists of tensors are, all numbers together, relative to the second."""
    wide = [[tf.cast(tensor, tf.float64) for tensor in tensors] for tensors in (ours, theirs)]
    apart = tf.linalg.global_norm([one - other for one, other in zip(*wide, strict=True)])
    return float(apart / tf.linalg.global_norm(wide[1]))


# Each kind and each recompute, and what devices take: for the fast tests. The slow ones try all.
SOME_WAYS = ("plain, recompute blocks", "cpu, recompute nothing", "xla, recompute nothing", "xla, recompute attention")


@functools.cache
def plain_one(shape, sequence, dtype="float64"):
    """The model of a shape, and the loss and gradients of the plain way. Their test is tests/test_gpt.py."""
    model = make_model(SHAPES[shape], sequence, dtype)
    return model, loss_and_gradients(model, sequence, dict(ways())["plain, recompute nothing"])


def assert_ways_are_the_plain_one(shape, sequence, tolerance, names, dtype="float64"):
    model, (loss, *gradients) = plain_one(shape, sequence, dtype)
    for name in names:
        other_loss, *other_gradients = loss_and_gradients(model, sequence, dict(ways())[name])
        assert difference([other_loss], [loss]) <= tolerance, name
        assert difference(other_gradients, gradients) <= tolerance, name


@pytest.mark.parametrize("shape", SHAPES)
def test_some_ways_give_the_loss_and_gradients_of_the_plain_one(shape):
    assert_ways_are_the_plain_one(shape, 12, 1e-13, SOME_WAYS)  # float64: a bug is larger by far.


# 300 tokens are two query blocks and a part of one; a block and a part of one while gradients compute again. Except for
# attention a longer text is nothing new, and two shapes have all that it knows: a document mask with dropout, and
# grouped heads. The other ways with 12 tokens are the test above.
LONG_TEXTS = [(300, "gpt2"), (300, "llama")]


@pytest.mark.slow
@pytest.mark.parametrize(("sequence", "shape"), [*((12, shape) for shape in SHAPES), *LONG_TEXTS])
def test_every_way_gives_the_loss_and_gradients_of_the_plain_one(shape, sequence):
    _, *others = dict(ways())
    names = [name for name in others if sequence > 12 or name not in SOME_WAYS]
    assert len(names) == 8 - (sequence == 12) * len(SOME_WAYS)
    assert_ways_are_the_plain_one(shape, sequence, 1e-13, names)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("mixed_bfloat16", 5e-2)])
def test_ways_differ_from_the_plain_one_by_rounding_only(dtype, tolerance):
    assert_ways_are_the_plain_one("llama", 12, tolerance, SOME_WAYS, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("sequence", "shape"), [(12, "gpt2"), (12, "llama"), (12, "tied"), *LONG_TEXTS])
def test_compiled_by_xla_the_loss_and_gradients_are_those_of_the_plain_way(shape, sequence):
    model, expected = plain_one(shape, sequence)
    for name, ops in ways():
        if isinstance(ops, XlaOps):
            assert difference(loss_and_gradients(model, sequence, ops, jit_compile=True), expected) <= 1e-13, name


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text_in_every_way(shape):
    config = SHAPES[shape]
    model, plain = make_model(config, 8), GPT(config, VOCABULARY, 8, dtype="float64", bos_id=BOS)
    plain.set_weights(model.get_weights())
    tokens = np.random.default_rng(1).integers(BOS + 1, VOCABULARY, (2, 7)).astype(np.int32)
    whole = plain(tokens)
    every_way = [*ways(), ("decoding on a CPU", decoding_ops("float64", Processor("CPU")))]
    # A single text has a way of its own there: blocks compiled by XLA.
    for (name, ops), num_texts in itertools.product(every_way, (2, 1)):
        cache = model.empty_cache(num_texts, ops)
        for first, end in ((0, 3), (3, 4), (4, 7)):
            some, cache = model.decode(tokens[:num_texts, first:end], cache, tf.constant(first), ops)
            np.testing.assert_allclose(some, whole[:num_texts, first:end], atol=1e-12, err_msg=name)


@in_one_pass
def twice_and_one(x, y):
    return 2 * x + y


def operations(rows):
    """Returns the operations of a traced function: the type of each, and whether XLA compiles it whole."""
    spec = tf.TensorSpec([rows, 3])
    graph = tf.function(lambda x, y: twice_and_one(x, y)).get_concrete_function(spec, spec).graph
    return [
        (op.type, any(name == "_XlaMustCompile" and value.b for name, value in op.node_def.attr.items()))
        for op in graph.get_operations()
    ]


def test_a_function_is_compiled_if_its_shapes_are_known():
    assert ("PartitionedCall", True) in operations(4)
    assert ("AddV2", False) in operations(None)


@pytest.fixture
def on_a_host_without_compiler(monkeypatch):
    monkeypatch.setattr(cpu.metadata, "version", {"tensorflow-tpu": "2.20.0"}.__getitem__)
    cpu._can_compile.cache_clear()
    yield
    cpu._can_compile.cache_clear()


@pytest.mark.usefixtures("on_a_host_without_compiler")
def test_nothing_is_compiled_by_the_tensorflow_for_tpus():
    assert ("AddV2", False) in operations(4)


def test_values_are_the_same_in_every_way_of_calling():
    x, y = tf.constant([[1.0, 2.0, 3.0]]), tf.constant([[0.5, 0.0, -1.0]])
    for call in (twice_and_one, tf.function(twice_and_one), tf.function(twice_and_one, jit_compile=True)):
        assert call(x, y).numpy().tolist() == [[2.5, 4.0, 5.0]]


@EVERY_WAY
def test_numbers_are_subtracted_at_their_places_and_nowhere_else(ops):
    places, updates = tf.constant([[0, 2], [1, 0]]), tf.constant([1.0, 5.0])
    run = tf.function(lambda x: (ops.subtract_at(2 * x, places, updates), 2 * x))
    changed, before = run(tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert changed.numpy().tolist() == [[2, 4, 5], [3, 10, 12]]
    assert before.numpy().tolist() == [[2, 4, 6], [8, 10, 12]]


@pytest.mark.parametrize("means", [row_means, means_by_product])
def test_means_are_of_rows(means):
    assert means(tf.constant([[1.0, 2.0, 6.0], [4.0, 5.0, 6.0]])).numpy().tolist() == [[3.0], [5.0]]


def test_a_cpu_takes_the_means_of_a_normalization_by_products():
    # By reduce_mean too the numbers would be the same, and the step slower.
    spec = tf.TensorSpec([4, 3])
    norm = tf.function(lambda x: CpuOps().norm(x, "layer", 1e-5, tf.ones([3])), input_signature=[spec], autograph=False)
    (compiled,) = norm.get_concrete_function().graph.as_graph_def().library.function
    assert sum(node.op == "MatMul" for node in compiled.node_def) == 2
    assert not any(node.op == "Mean" for node in compiled.node_def)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_losses_are_the_same_in_every_way_even_if_probabilities_vanish(scale, kind):
    random = np.random.default_rng(0)
    hidden, table = (tf.constant(scale * random.normal(size=shape), tf.float32) for shape in ((2, 3, 4), (7, 4)))
    bias, targets = tf.constant(random.normal(size=7), tf.float32), tf.constant([[1, 2, 0], [3, 6, 6]])
    ops = KINDS[kind](logit_rows=4)

    @tf.function(autograph=False)
    def run():
        with tf.GradientTape() as tape:
            tape.watch([hidden, table, bias])
            loss_sum, _ = next_token_loss(hidden, table, bias, targets, tf.ones([2, 3]), ops=ops)
        return loss_sum, *tape.gradient(loss_sum, [hidden, table, bias])

    with tf.GradientTape() as tape:
        wide = [tf.cast(x, tf.float64) for x in (hidden, table, bias)]
        tape.watch(wide)
        logits = tf.matmul(wide[0], wide[1], transpose_b=True) + wide[2]
        expected = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))
    for ours, exact in zip(run(), [expected, *tape.gradient(expected, wide)], strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5 * scale)


@EVERY_WAY
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_new_rows_are_written_from_an_index_on_and_nothing_else_changes(ops, dtype):
    expected = np.random.default_rng(0).normal(size=(2, 3, 7, 4))
    expected[0, 0, 5, 0] = np.nan
    expected[:, :, 6] = 0
    expected = tf.cast(expected, dtype)
    kept, new = tf.concat([expected[:, :, :4], tf.zeros([2, 3, 3, 4], dtype)], axis=2), expected[:, :, 4:6]
    before = kept.numpy().copy()
    shapes = ([None, 3, 7, 4], [None, 3, None, 4])
    specs = [*(tf.TensorSpec(shape, dtype) for shape in shapes), tf.TensorSpec([], tf.int32)]

    def write(kept, new, index):
        return ops.write(kept, new, ops.places(kept, index + tf.range(tf.shape(new)[2])))

    found = tf.function(write, specs, autograph=False)(kept, new, tf.constant(4))
    assert found.dtype == dtype
    np.testing.assert_array_equal(tf.cast(found, tf.float64), tf.cast(expected, tf.float64))
    # It is still read here, and so was not overwritten.
    np.testing.assert_array_equal(kept, before)


@EVERY_WAY
def test_a_bias_is_added_and_its_gradient_is_the_sum_over_all_rows(ops):
    rng = np.random.default_rng(0)
    x, upstream, bias = (tf.constant(rng.normal(size=size)) for size in ((6, 5), (6, 5), 5))
    with tf.GradientTape() as tape:
        tape.watch([x, bias])
        y = ops.add_bias(x, bias)
    d_x, d_bias = tape.gradient(y, [x, bias], upstream)
    np.testing.assert_array_equal(y, x + bias)
    np.testing.assert_array_equal(d_x, upstream)
    np.testing.assert_allclose(d_bias, upstream.numpy().sum(0), rtol=1e-14)


@pytest.mark.parametrize("recompute", ["nothing", "attention", "blocks"])
def test_in_a_wider_compute_dtype_only_the_embeddings_are_rounded(recompute):
    tokens = tf.constant(np.random.default_rng(0).integers(0, 11, (2, 8)), tf.int32)
    config = ModelConfig(num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=8, activation="gelu", pre_norm=True)
    narrow = GPT(config, 11, 8, dtype="mixed_bfloat16")
    wide = GPT(config, 11, 8)
    for variable, weight in zip(wide.variables, narrow.get_weights(), strict=True):
        is_embedding = "embedding" in variable.path and "unembedding" not in variable.path
        variable.assign(tf.cast(tf.cast(weight, tf.bfloat16), tf.float32) if is_embedding else weight)
    ops = CpuOps(recompute, compute_dtype="float32")
    found, expected = (model.hidden_states(tokens, ops=ops) for model in (narrow, wide))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_step_in_bfloat16_computes_in_the_dtype_of_its_execution_and_comes_near_float32(compute_dtype):
    inputs = tf.constant(np.random.default_rng(0).integers(0, 11, (2, 8)), tf.int32)
    batch = (inputs, tf.roll(inputs, -1, axis=1), tf.ones([2, 8]))
    results, dtypes = {}, {}
    for policy, dtype in (("float32", "float32"), ("mixed_bfloat16", compute_dtype)):
        model = GPT(ModelConfig(num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8), 11, 8, dtype=policy)
        weights = [tf.convert_to_tensor(variable.value) for variable in model.trainable_variables]
        run = tf.function(
            functools.partial(forward_backward, model, weights, [], batch, None, ops=CpuOps(compute_dtype=dtype)),
            autograph=False,
        )
        results[policy] = run()
        graph = run.get_concrete_function().graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        dtypes[policy] = {tf.as_dtype(node.attr["T"].type) for node in nodes if node.op in ("MatMul", "BatchMatMulV2")}
        # Nothing is rounded between products either.
        assert {tf.as_dtype(node.attr["T"].type) for node in nodes if node.op == "Relu"} == {tf.as_dtype(dtype)}
    # Losses and means are summed in float32, by products too.
    assert dtypes["float32"] == {tf.float32}
    assert dtypes["mixed_bfloat16"] == {tf.float32, tf.as_dtype(compute_dtype)}
    exact, narrow = results["float32"], results["mixed_bfloat16"]
    np.testing.assert_allclose(narrow.loss_sum, exact.loss_sum, rtol=1e-2)
    assert {gradient.dtype for gradient in narrow.by_weight} == {tf.float32}
    # Something was rounded, and not much.
    assert 1e-4 < difference(narrow.by_weight, exact.by_weight) < 3e-2


def test_texts_are_decoded_in_the_dtype_that_is_fast_on_the_device():
    slow, fast, gpu = Processor("CPU", multiplies_bfloat16=False), Processor("CPU"), Processor("GPU")
    assert decoding_ops("mixed_bfloat16", slow) == CpuDecodingOps(compute_dtype="float32")
    assert decoding_ops("mixed_bfloat16", fast) == CpuDecodingOps(compute_dtype="bfloat16")
    assert decoding_ops("mixed_float16", gpu) == Ops(compute_dtype="float16")
    assert decoding_ops("float64", slow) == CpuDecodingOps(compute_dtype="float64")


def test_no_flag_of_the_surroundings_changes_what_a_model_computes():
    package = Path(trainer.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert len(sources) > 50
    assert not [str(path) for path, text in sources.items() if "ContextVar" in text]
