"""Laws of Muon: a plain reference in NumPy, Keras Muon, and the same work whoever shares it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.config.settings import DistributionConfig, ModelConfig, OptimizerConfig
from trainer.errors import UserError
from trainer.execution import resolve
from trainer.hardware.processor import Processor
from trainer.model.gpt import GPT
from trainer.model.language_model import adapt
from trainer.model.pieces import cut_all
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.cost import optimizer_flops
from trainer.optimizers.muon import Muon
from trainer.optimizers.newton_schulz import orthogonalize
from trainer.optimizers.optimizer import make_optimizer
from trainer.optimizers.replicas import ALONE, Replicas
from trainer.optimizers.variables import Piece

STEPS = 20
CONFIG = OptimizerConfig(
    kind="muon", momentum=0.9, weight_decay=0.1, beta_1=0.8, beta_2=0.95, epsilon=1e-5, learning_rate=0.02
)
# A wide one, a tall one, one of three parts of two shapes; of some shapes there are several.
SHAPES = {"wide/kernel": (4, 6), "tall/kernel": (6, 4), "parts/kernel": (4, 8), "bias": (6,), "table": (9, 4)}
PARTS = {"wide/kernel": (6,), "tall/kernel": (4,), "parts/kernel": (4, 2, 2)}


def variables(dtype="float64"):
    random = np.random.default_rng(1)
    return {
        name: keras.Variable(random.normal(size=shape), dtype=dtype, name=name.rpartition("/")[2])
        for name, shape in SHAPES.items()
    }


def gradient_steps(num_steps=STEPS):
    random = np.random.default_rng(0)
    return [[random.normal(size=shape) for shape in SHAPES.values()] for _ in range(num_steps)]


def train(optimizer, steps, rate=0.02, replicas=ALONE):
    for gradients in steps:
        updates = optimizer.updates([tf.constant(each) for each in gradients], replicas)
        optimizer.apply(updates, tf.constant(rate, tf.float64))


@pytest.fixture
def floatx64():
    """Keras Muon multiplies by a number of the default dtype, and refuses variables of another one."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def polynomial(s):
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def orthogonalized(matrix):
    """The definition: the polynomial of the singular values, with the singular vectors of the matrix."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ np.diag(polynomial(values / (np.linalg.norm(matrix) + 1e-7))) @ right


def test_equals_a_plain_reference_with_each_part_by_itself():
    ours, momenta = variables(), {name: np.zeros(SHAPES[name]) for name in PARTS}
    expected = {name: each.numpy() for name, each in ours.items()}
    train(Muon(CONFIG, ours, PARTS, "float64", "float64"), gradient_steps())
    for gradients in gradient_steps():
        for name, gradient in zip(SHAPES, gradients, strict=True):
            if name in PARTS:
                momenta[name] = 0.9 * momenta[name] + gradient
                ahead = np.split(gradient + 0.9 * momenta[name], np.cumsum(PARTS[name])[:-1], axis=1)
                update = np.concatenate([0.2 * np.sqrt(max(each.shape)) * orthogonalized(each) for each in ahead], 1)
                expected[name] = expected[name] * (1 - 0.02 * 0.1) - 0.02 * update
    for name in PARTS:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_equals_keras_muon_where_all_matrices_are_whole(floatx64):
    theirs, ours = variables(), variables()
    whole = {name: SHAPES[name][1:] for name in PARTS}
    optimizer = keras.optimizers.Muon(
        0.02,
        momentum=0.9,
        weight_decay=0.1,
        adam_weight_decay=0.1,
        adam_beta_1=0.8,
        adam_beta_2=0.95,
        epsilon=1e-5,
        exclude_layers=["table"],
    )
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    for gradients in gradient_steps():
        optimizer.apply([tf.constant(each) for each in gradients], list(theirs.values()))
    train(Muon(CONFIG, ours, whole, "float64", "float64"), gradient_steps())
    for name in SHAPES:
        difference = np.linalg.norm(ours[name].numpy() - theirs[name].numpy()) / np.linalg.norm(theirs[name].numpy())
        assert difference <= 1e-6, (name, difference)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 0.1)])
def test_singular_values_come_within_the_bounds_of_the_polynomial(dtype, tolerance):
    random = np.random.default_rng(2)
    # From a thousandth to a thousand times the size, and one without a rank.
    stack = np.stack([random.normal(size=(12, 20)) * size for size in (1e-3, 1.0, 1e3, 0.0)])
    found = tf.cast(orthogonalize(tf.cast(tf.constant(stack), dtype)), tf.float64).numpy()
    begun = np.linalg.svd(stack[:3], compute_uv=False) / np.linalg.norm(stack[:3], axis=(1, 2))[:, np.newaxis]
    values = np.linalg.svd(found, compute_uv=False)
    np.testing.assert_array_equal(values[3], 0.0)
    assert begun.min() > 0.002
    assert values[:3].min() >= 0.6818 - tolerance and values[:3].max() <= 1.2024 + tolerance
    if dtype == "float64":
        np.testing.assert_allclose(np.sort(values[:3]), np.sort(polynomial(begun)), rtol=1e-3)


def shares(optimizer, gradients, count):
    """What each replica of several gives the others, and the updates that they get of it."""
    given = [[] for _ in range(count)]

    def keep(index):
        return lambda summands: given[index].extend(summands) or summands

    for index in range(count):
        optimizer.updates(gradients, Replicas(count, tf.constant(index), keep(index)))
    sums = [tf.add_n(each) for each in zip(*given, strict=True)]
    return given, optimizer.updates(gradients, Replicas(count, tf.constant(0), lambda _: sums))


@pytest.mark.parametrize(("count", "stacks"), [(2, True), (3, False), (5, True)])
def test_replicas_that_share_the_work_get_the_updates_of_one(count, stacks):
    optimizer = Muon(CONFIG, variables(), PARTS, "float64", "float64", stacks)
    (gradients,) = [[tf.constant(each) for each in step] for step in gradient_steps(1)]
    given, shared = shares(optimizer, gradients, count)
    for found, expected in zip(shared, optimizer.updates(gradients, ALONE), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    for buffers in zip(*given, strict=True):
        assert (sum(np.any(each, axis=(2, 3)).astype(int) for each in buffers) <= 1).all(), "computed twice"


def test_an_exchange_in_bfloat16_gives_the_updates_of_one_in_float32_because_each_sum_has_one_term():
    (gradients,) = [[tf.constant(each, tf.float32) for each in step] for step in gradient_steps(1)]
    found = [
        shares(Muon(CONFIG, variables("float32"), PARTS, "bfloat16", dtype), gradients, 3)
        for dtype in ("bfloat16", "float32")
    ]
    assert [{each.dtype for each in given[0]} for given, _ in found] == [{tf.bfloat16}, {tf.float32}]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one.dtype == other.dtype == tf.float32
        np.testing.assert_array_equal(one, other)


def products(function, *arguments):
    """The multiplications and additions of the products of matrices in a traced function."""
    graph = tf.function(function, autograph=False).get_concrete_function(*arguments).graph
    total = 0
    for node in graph.get_operations():
        if node.type.startswith("BatchMatMul") or node.type == "MatMul":
            inner = node.inputs[0].shape[-2 if node.get_attr("adj_x") else -1]
            total += 2 * node.outputs[0].shape.num_elements() * inner
    return total


def test_the_work_of_a_replica_falls_with_their_number():
    model = GPT(ModelConfig(num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=32), 11, 8)
    weights = {variable.path: variable for variable in model.trainable_variables}
    optimizer = Muon(CONFIG, weights, adapt(model).matrices(8), "float32", "float32")
    gradients = [tf.zeros(variable.shape) for variable in weights.values()]

    def work(count):
        def updates(index):
            return optimizer.updates(gradients, Replicas(count, index, lambda summands: summands))

        return products(updates, tf.TensorSpec([], tf.int32))

    # 8 matrices of 16 x 16, and 4 of 16 x 32: five times two products with the matrix, and one of its square.
    square, oblong = 5 * 2 * (2 * 16**3 + 16**3), 5 * 2 * (2 * 16 * 16 * 32 + 16**3)
    alone = 8 * square + 4 * oblong
    assert [work(count) for count in (1, 2, 4)] == [alone, alone / 2, alone / 4]
    assert work(3) == 3 * square + 2 * oblong
    # The plan counts the same.
    config = tiny_config(model=model.config.model_dump(), optimizer={"kind": "muon"})
    assert [optimizer_flops(config, count) for count in (1, 2, 3)] == [alone, alone / 2, 3 * square + 2 * oblong]

    # In pieces, 2 matrices of 16 x 32 and 2 of 32 x 16 are shared separately.
    cuts = cut_all({name: weight.shape for name, weight in weights.items()}, 4)
    pieces = {name: Piece(name, cut.piece_shape, "float32", cut.shape) for name, cut in cuts.items()}
    split = Muon(CONFIG, pieces, adapt(model).matrices(8), "float32", "float32")
    own = [tf.zeros(piece.shape) for piece in pieces.values()]
    of_four = Replicas(4, 0, lambda summands: summands, lambda tensors: tensors, num_pieces=4)
    assert products(lambda: split.updates(own, of_four)) == 2 * square + 2 * oblong
    in_pieces = config.model_copy(update={"distribution": DistributionConfig(shard="optimizer")})
    assert optimizer_flops(in_pieces, 4) == 2 * square + 2 * oblong


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_key_value_heads": 1, "num_heads": 3, "head_dim": 4, "activation": "swiglu", "tied_embeddings": True}],
)
def test_muon_has_the_kernels_of_the_blocks_each_with_its_parts(settings):
    model = GPT(ModelConfig(num_layers=2, hidden_dim=12, intermediate_dim=10, **settings), 12, 8)
    named, matrices = adapt(model).named_variables(), adapt(model).matrices(8)
    assert set(matrices) == {name for name in named if "/block_" in name and name.endswith("/kernel")}
    for name, widths in matrices.items():
        assert sum(widths) == named[name].shape[1]
    assert len(matrices["gpt/block_1/query_key_value/kernel"]) == 3
    assert matrices["gpt/block_1/query_key_value/kernel"][0] == (12 if settings else 4 * 3)
    assert len(matrices["gpt/block_0/intermediate/kernel"]) == (2 if settings else 1)


def foreign(hidden_dim):
    layers = [keras.layers.Embedding(7, hidden_dim), keras.layers.GRU(5, return_sequences=True), keras.layers.Dense(7)]
    return keras.Sequential([keras.Input([4], dtype="int32"), *layers])


def trainable(model):
    return {name: each for name, each in adapt(model).named_variables().items() if each.trainable}


def test_muon_leaves_embeddings_and_output_of_another_model_to_adamw():
    config = tiny_config(optimizer={"kind": "muon"})
    execution = resolve(config, Processor("CPU", multiplies_bfloat16=False), 1)
    model = foreign(6)
    optimizer = make_optimizer(config.optimizer, trainable(model), model, 4, execution)
    assert isinstance(optimizer, Muon) and optimizer.dtype == execution.weight_dtype
    assert set(optimizer.state()) == {
        "num_updates",
        "0001/kernel/momentum",
        "0002/recurrent_kernel/momentum",
        *(
            f"{name}/{m}_moment"
            for name in ("0000/embeddings", "0003/bias", "0005/kernel", "0006/bias")
            for m in ("first", "second")
        ),
    }
    without = keras.Sequential([keras.Input([4], dtype="int32"), keras.layers.Embedding(7, 7)])
    with pytest.raises(UserError, match=r"optimizer.kind='muon' trains kernels with two axes, .* choose 'adamw'"):
        make_optimizer(config.optimizer, trainable(without), without, 4, execution)
    adamw = tiny_config().optimizer
    assert isinstance(make_optimizer(adamw, trainable(without), without, 4, execution), AdamW)


@pytest.mark.parametrize(
    ("precision", "processor", "dtype"),
    [
        ("mixed_bfloat16", Processor("TPU"), "bfloat16"),
        ("mixed_bfloat16", Processor("CPU", multiplies_bfloat16=True), "bfloat16"),
        ("mixed_bfloat16", Processor("CPU", multiplies_bfloat16=False), "float32"),
        ("mixed_float16", Processor("GPU"), "float32"),
        ("float32", Processor("GPU"), "float32"),
        ("float64", Processor("CPU"), "float64"),
    ],
)
def test_matrices_are_orthogonalized_in_bfloat16_where_it_is_fast_and_asked_for(precision, processor, dtype):
    execution = resolve(tiny_config(train={"precision": precision}), processor, 1)
    assert execution.orthogonalization_dtype == dtype
    # NCCL and the CPUs' collectives add up the weights' dtype.
    assert execution.direction_dtype == (dtype if processor.kind == "TPU" else execution.weight_dtype)


@pytest.mark.parametrize(("kind", "product"), [("CPU", "MatMul"), ("TPU", "BatchMatMulV2")])
def test_a_cpu_multiplies_matrices_one_by_one_and_other_devices_a_stack_of_those_of_one_shape(kind, product):
    config = tiny_config(optimizer={"kind": "muon"})
    model = GPT(config.model, 11, config.train.sequence_length)
    weights = {variable.path: variable for variable in model.trainable_variables}
    execution = resolve(config, Processor(kind), 1)
    optimizer = make_optimizer(config.optimizer, weights, model, config.train.sequence_length, execution)
    gradients = [tf.zeros(variable.shape) for variable in weights.values()]
    traced = tf.function(lambda: optimizer.updates(gradients, ALONE), autograph=False).get_concrete_function()
    assert {node.type for node in traced.graph.get_operations() if "MatMul" in node.type} == {product}
