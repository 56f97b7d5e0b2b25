"""Laws of what a config means on a device, and that the plan counts what the step does."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import tensorflow as tf

from trainer.config.file import make_config
from trainer.config.settings import Config
from trainer.distributed.strategy import make_strategy, processor_of
from trainer.errors import UserError
from trainer.execution import DTYPE_BYTES, Execution, query_blocks, resolve
from trainer.hardware.devices import Target, cpu, parse_target
from trainer.hardware.processor import Processor
from trainer.model.gpt import GPT
from trainer.model.size import count_parameters
from trainer.planning import estimate
from trainer.planning.estimate import estimate_memory, kept_bytes
from trainer.system.process import call_in_new_process
from trainer.training.step import TrainingStep

FAST_CPU, SLOW_CPU = Processor("CPU", True), Processor("CPU", False)
GPU, TPU = Processor("GPU"), Processor("TPU")
UNKNOWN_GPU = Processor("GPU", compiles=False)


def execution_of(device: Processor = SLOW_CPU, num_replicas: int = 1, use="training", **train) -> Execution:
    train = {"precision": "float32", "total_steps": 1, "global_batch_size": 32, "sequence_length": 118} | train
    return resolve(make_config({"run_folder": "unused", "train": train}), device, num_replicas, use=use)


def test_an_unknown_kind_of_device_is_refused():
    with pytest.raises(ValueError, match=r"device\.kind='NPU' .*use one of CPU, GPU, TPU"):
        execution_of(Processor("NPU"))


@pytest.mark.parametrize(
    ("train", "size"),
    [
        ({}, 16),
        ({"global_batch_size": 12, "sequence_length": 64}, 12),
        ({"global_batch_size": 33}, 33),
        ({"micro_batch_size": 8}, 8),
        ({"micro_batch_size": "auto"}, 16),
    ],
)
def test_a_cpu_takes_a_large_share_in_two_halves_at_once_unless_told_otherwise(train, size):
    found = execution_of(**train)
    assert (found.micro_batch_size, found.at_once) == (size, 2)
    of_evaluation = execution_of(use="evaluation", **train)
    assert of_evaluation.micro_batch_size == execution_of(**train | {"micro_batch_size": None}).micro_batch_size
    of_gpu = execution_of(GPU, **train)
    expected = size if train.get("micro_batch_size") == size else of_gpu.examples
    assert (of_gpu.micro_batch_size, of_gpu.at_once) == (expected, 1)


@pytest.mark.parametrize(
    ("device", "xla", "training", "evaluation", "decoding"),
    [
        (SLOW_CPU, "auto", ("cpu", False), "cpu", "cpu"),
        (SLOW_CPU, "on", ("xla", True), "cpu", "cpu"),
        (GPU, "auto", ("xla", True), "plain", "plain"),
        (GPU, "off", ("plain", False), "plain", "plain"),
        (UNKNOWN_GPU, "auto", ("plain", False), "plain", "plain"),
        (UNKNOWN_GPU, "off", ("plain", False), "plain", "plain"),
        (TPU, "auto", ("xla", False), "xla", "plain"),
        (TPU, "off", ("xla", False), "xla", "plain"),
    ],
)
def test_the_way_of_computing_follows_from_the_device_and_from_who_compiles(
    device, xla, training, evaluation, decoding
):
    found = execution_of(device, xla=xla)
    assert (found.ops, found.is_compiled) == training
    for use, ops in (("evaluation", evaluation), ("decoding", decoding)):
        found = execution_of(device, use=use, xla=xla)
        assert (found.ops, found.is_compiled, found.recompute) == (ops, False, "nothing")


def test_xla_is_refused_on_a_gpu_that_the_build_of_tensorflow_does_not_know():
    with pytest.raises(UserError, match=r"train\.xla='on': this build of TensorFlow does not know this GPU.*xla=off"):
        execution_of(UNKNOWN_GPU, xla="on")
    for use in ("evaluation", "decoding"):  # They are never compiled there.
        assert execution_of(UNKNOWN_GPU, use=use, xla="on") == execution_of(GPU, use=use, xla="on")


def test_a_cpu_computes_in_a_wider_dtype_if_it_is_slow_in_16_bits_and_xla_does_not_compile():
    for precision, on_slow, on_fast, narrow in (
        ("mixed_bfloat16", "float32", "bfloat16", "bfloat16"),
        ("mixed_float16", "float32", "float32", "float16"),
        ("float32", "float32", "float32", "float32"),
        ("float64", "float64", "float64", "float64"),
    ):
        assert execution_of(SLOW_CPU, precision=precision).compute_dtype == on_slow
        assert execution_of(FAST_CPU, precision=precision).compute_dtype == on_fast
        assert execution_of(SLOW_CPU, precision=precision, xla="on").compute_dtype == narrow
        assert execution_of(SLOW_CPU, precision=precision, xla="on", use="evaluation").compute_dtype == on_slow
        for device in (GPU, TPU):
            assert execution_of(device, precision=precision).compute_dtype == narrow


@pytest.mark.parametrize("device", [SLOW_CPU, GPU, TPU])
def test_split_weights_are_gathered_by_one_micro_batch_at_a_time(device):
    settings = {"precision": "float32", "total_steps": 1, "global_batch_size": 64, "sequence_length": 118}

    def execution(num_replicas, use="training", **train):
        distribution = {"shard": "weights"}
        config = make_config({"run_folder": "unused", "train": settings | train, "distribution": distribution})
        return resolve(config, device, num_replicas, use=use)

    for use in ("training", "evaluation"):
        found = execution(2, use)
        assert (found.micro_batch_size, found.at_once, found.examples) == (32, 1, 32)
        assert found.is_compiled == (device is GPU and use == "training")
    # Each replica's gradients are sums over replicas in the dtype of the weights.
    assert execution(2, micro_batch_size=4).sum_dtype == "float32"


def test_a_cpu_sums_more_than_two_gradients_in_float64():
    for batch, sequence, dtype in ((33, 128, "float32"), (32, 128, "float32"), (64, 8, "float32")):
        assert execution_of(global_batch_size=batch, sequence_length=sequence).sum_dtype == dtype
    assert execution_of(num_replicas=4).sum_dtype == "float64"
    assert execution_of(micro_batch_size=8).sum_dtype == "float64"
    assert execution_of(TPU, micro_batch_size=8).sum_dtype == "float32"
    assert execution_of(TPU, micro_batch_size=8, precision="float64").sum_dtype == "float64"


def test_only_a_recomputed_attention_in_blocks_keeps_no_probabilities():
    assert execution_of().recompute == "nothing" and execution_of(TPU).recompute == "attention"
    assert execution_of(TPU, sequence_length=255).keeps_probabilities
    assert not execution_of(TPU, sequence_length=256).keeps_probabilities
    assert execution_of(TPU, sequence_length=256, recompute="nothing").keeps_probabilities
    assert not execution_of(sequence_length=256, recompute="blocks").keeps_probabilities


def test_blocks_of_queries_cover_a_sequence_once_and_a_short_one_is_one_block():
    assert query_blocks(255, 128) == [(0, 255)]
    assert query_blocks(256, 128) == [(0, 128), (128, 256)]
    assert query_blocks(300, 256) == [(0, 256), (256, 300)]


VOCABULARY = 13


def random_config(pick: random.Random, num_replicas: int) -> Config:
    """Returns a tiny config that num_replicas replicas can share, with any settings that an execution depends on."""
    micro, num_micro_batches = pick.randint(1, 6), pick.randint(1, 4)
    train: dict[str, Any] = {
        "precision": pick.choice(["float32", "mixed_bfloat16", "mixed_float16", "float64"]),
        "total_steps": 1,
        "global_batch_size": micro * num_micro_batches * num_replicas,
        "sequence_length": pick.choice([2, 16, 127, 128, 255, 256, 257, 300, 512]),
        "micro_batch_size": pick.choice([None, None, "auto", micro]),
        "recompute": pick.choice(["auto", "nothing", "attention", "blocks"]),
        "xla": pick.choice(["auto", "on", "off"]),
    }
    model = {
        "num_layers": pick.choice([1, 2]),
        "num_heads": pick.choice([1, 2]),
        "hidden_dim": 4,
        "intermediate_dim": pick.choice([4, 12]),
        "pre_norm": pick.choice([True, False]),
    }
    return make_config({"run_folder": "r", "model": model, "train": train, "distribution": {"kind": "cpu"}})


def random_target(pick: random.Random) -> Target:
    number = pick.choice([1, 4, 8])
    return pick.choice(
        [cpu(number), cpu(number), parse_target(f"gpu:A100-80GBx{number}"), parse_target(f"tpu:v5e-{number}")]
    )


# A batch that replicas cannot halve, and batches around the size from which a CPU halves them.
EDGES = [{"global_batch_size": 33, "sequence_length": 128}]
EDGES += [{"global_batch_size": batch, "sequence_length": sequence} for batch, sequence in ((16, 128), (16, 127))]
EDGES += [{"global_batch_size": 5, "sequence_length": 16}, {"global_batch_size": 2, "sequence_length": 256}]


def law_cases(num_random: int, seed: int = 0) -> Iterator[tuple[Config, Target]]:
    """Yields configs with the devices that they are planned for: the edges, then a sample."""
    for train in EDGES:
        yield make_config({"run_folder": "r", "train": {"precision": "float32", "total_steps": 1} | train}), cpu()
    pick = random.Random(seed)
    for _ in range(num_random):
        target = random_target(pick)
        yield random_config(pick, target.num_devices), target


def counted(config: Config, target: Target, execution: Execution) -> dict[str, float]:
    """Returns the bytes that depend on an execution, at the worst instant of a step that computes so."""
    num_weights, weight_bytes = count_parameters(config, VOCABULARY), DTYPE_BYTES[execution.weight_dtype]
    is_summed = execution.micro_batch_size < execution.examples or execution.sum_dtype != execution.weight_dtype
    sums = num_weights * DTYPE_BYTES[execution.sum_dtype] * is_summed
    examples = min(execution.examples, execution.at_once * execution.micro_batch_size)
    under_way = execution._replace(examples=examples, micro_batch_size=examples, at_once=1)
    num_rows = min(execution.logit_rows, examples * config.train.sequence_length)
    after_loss = {
        "gradients": sums + VOCABULARY * config.model.hidden_dim * weight_bytes,
        "activations": kept_bytes(config, under_way, copies_operands=target.processor().kind != "TPU"),
        "logits": num_rows * VOCABULARY * (weight_bytes + DTYPE_BYTES[execution.compute_dtype]),
    }
    at_end = {"gradients": sums + num_weights * weight_bytes, "activations": 0.0, "logits": 0.0}
    return max(after_loss, at_end, key=lambda parts: sum(parts.values()))


def planned(config: Config, target: Target) -> dict[str, float]:
    parts = estimate_memory(config, VOCABULARY, target)
    return {name: parts[name] for name in ("gradients", "activations", "logits")}


class Held(NamedTuple):
    """What a traced step computes and keeps, read from its graph.

    Attributes:
        micro_batch_size: examples of the products of attention.
        at_once: iterations of the loop over micro-batches that may run at the same time.
        sum_dtype: the dtype of what the replica contributes to the sum over replicas.
        is_looped: whether that comes from a loop over micro-batches.
        compute_dtype: the dtype of the products of attention.
        probabilities: the shapes [queries, keys] of the softmaxes of attention, which the backward pass reads.
        recomputed: the shapes of the probabilities that the backward pass makes again, from their logarithmic sums.
        num_activations: how often each block's activation is computed.
        logit_rows: tokens that the loss takes at a time.
        is_compiled: whether XLA must compile the function that holds the products.
        subtracts_in_place: whether the loss uses the operation that only a CPU has.
        leaves_layout_open: whether attention's projections are einsums, whose layout XLA chooses.
    """

    micro_batch_size: int
    at_once: int
    sum_dtype: str
    is_looped: bool
    compute_dtype: str
    probabilities: set[tuple[int, ...]]
    recomputed: set[tuple[int, ...]]
    num_activations: int
    logit_rows: int
    is_compiled: bool
    subtracts_in_place: bool
    leaves_layout_open: bool


def held_by(step: TrainingStep) -> Held:
    """Traces what a replica computes in a step, and reads it."""
    shape = [step.execution.examples, step.config.train.sequence_length]

    @tf.function(autograph=False)
    def gradients(*batch: tf.Tensor) -> list[tf.Tensor]:
        return step._sums_on_replica(batch, tf.constant(0, tf.int64), None).by_weight

    specs = [tf.TensorSpec(shape, dtype) for dtype in (tf.int32, tf.int32, tf.float32)]
    graph = gradients.get_concrete_function(*specs).graph
    definition = graph.as_graph_def(add_shapes=True)
    functions = {function.signature.name: function.node_def for function in definition.library.function}
    nodes = [*definition.node, *(node for function in functions.values() for node in function)]

    def shapes_of(kind: str, rank: int) -> list[tuple[int, ...]]:
        shapes = [
            [dim.size for dim in node.attr["_output_shapes"].list.shape[0].dim] for node in nodes if node.op == kind
        ]
        return [tuple(shape) for shape in shapes if len(shape) == rank]

    def is_xla(name: str) -> bool:
        calls = [node for node in nodes if node.attr["f"].func.name == name and node.attr["_XlaMustCompile"].b]
        return bool(calls)

    products = [node for node in nodes if node.op == "BatchMatMulV2"]
    sources = set()
    for tensor in graph.outputs[2:6]:  # Weights of a block: the output projection's gradient has a loop of its own.
        source = tensor.op
        while source.type == "Identity":
            source = source.inputs[0].op
        sources.add(source)
    loops = [op for op in sources if op.type in ("While", "StatelessWhile")]
    assert len(loops) in (0, len(sources))
    (micro_batch_size,) = {shape[0] for shape in shapes_of("BatchMatMulV2", 4)}
    (compute_dtype,) = {tf.as_dtype(node.attr["T"].type).name for node in products}
    (sum_dtype,) = {tensor.dtype.name for tensor in graph.outputs}
    (logit_rows,) = {rows for rows, width in shapes_of("Softmax", 2) if width == VOCABULARY}
    return Held(
        micro_batch_size=micro_batch_size,
        at_once=loops[0].get_attr("parallel_iterations") if loops else 1,
        sum_dtype=sum_dtype,
        is_looped=bool(loops),
        compute_dtype=compute_dtype,
        probabilities={shape[2:] for shape in shapes_of("Softmax", 4)},
        recomputed={shape[2:] for shape in shapes_of("Exp", 4)},
        num_activations=sum(node.op == "Relu" for node in nodes) // step.config.model.num_layers,
        logit_rows=logit_rows,
        is_compiled=any(is_xla(name) for name, held in functions.items() if any(n.op == "BatchMatMulV2" for n in held)),
        subtracts_in_place=any(node.op == "ScatterNdNonAliasingAdd" for node in nodes),
        leaves_layout_open=any(node.op == "Einsum" for node in nodes),
    )


def check_held(config: Config, execution: Execution, held: Held) -> None:
    """Compares what a traced step holds with an execution."""
    assert held.micro_batch_size == execution.micro_batch_size
    assert held.is_looped == (execution.micro_batch_size < execution.examples)
    assert held.at_once == (execution.at_once if held.is_looped else 1)
    assert (held.sum_dtype, held.compute_dtype) == (execution.sum_dtype, execution.compute_dtype)
    assert held.is_compiled == execution.is_compiled
    assert held.subtracts_in_place == (execution.ops == "cpu")
    assert held.leaves_layout_open == (execution.ops == "xla")
    assert held.num_activations == {"nothing": 1, "attention": 2, "blocks": 3}[execution.recompute]
    sequence = config.train.sequence_length
    blocks = {(end - first, end) for first, end in query_blocks(sequence, execution.query_block)}
    assert held.probabilities == (blocks if execution.keeps_probabilities else set())
    assert held.recomputed == (set() if execution.keeps_probabilities else blocks)
    assert held.logit_rows == min(execution.logit_rows, execution.micro_batch_size * sequence)


def test_the_plan_counts_the_bytes_of_the_execution_that_the_step_uses():
    for config, target in law_cases(500):
        execution = resolve(config, target.processor(), target.num_devices)
        assert planned(config, target) == counted(config, target, execution), (config.train, str(target))


def step_of(config: Config, target: Target) -> TrainingStep:
    """Returns a real step for a target's devices; like `lower_step`, on the CPU with an accelerator's execution."""
    strategy = make_strategy(config.distribution)
    is_here = target.processor() == processor_of(strategy) and target.num_devices == 1
    execution = None if is_here else resolve(config, target.processor(), target.num_devices)
    with strategy.scope():
        model = GPT(config.model, VOCABULARY, config.train.sequence_length, dtype=config.train.precision)
    return TrainingStep(config, 1, model, strategy, execution)


def small_steps() -> Iterator[tuple[Config, Target]]:
    for config, target in law_cases(24, seed=10):
        tiny = config.model.model_copy(update={"num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4})
        yield config.model_copy(update={"model": tiny}), target


def as_held(execution: Execution, held: Held) -> Execution:
    """Returns an execution with what a traced step holds in place of what was resolved."""
    return execution._replace(
        micro_batch_size=held.micro_batch_size,
        at_once=held.at_once,
        sum_dtype=held.sum_dtype,
        compute_dtype=held.compute_dtype,
        keeps_probabilities=bool(held.probabilities),
        logit_rows=held.logit_rows,
    )


# The first eight random cases have every way of computing, recompute, dtype and device, and lengths around 256.
NUM_FAST_STEPS = len(EDGES) + 8


@pytest.mark.parametrize(
    ("config", "target"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if number >= NUM_FAST_STEPS else [])
        for number, case in enumerate(small_steps())
    ],
)
def test_a_step_holds_what_the_plan_counts(config: Config, target: Target):
    execution = resolve(config, target.processor(), target.num_devices)
    held = held_by(step_of(config, target))
    check_held(config, execution, held)
    assert planned(config, target) == counted(config, target, as_held(execution, held))


def held_on_replicas(configs: list[Config]) -> list[tuple[Held, set[str]]]:
    """Returns what a real step of each config holds on every replica, and the dtypes that replicas sum in."""
    strategy = make_strategy(configs[0].distribution)
    found = []
    for config in configs:
        with strategy.scope():
            model = GPT(config.model, VOCABULARY, config.train.sequence_length, dtype=config.train.precision)
        step = TrainingStep(config, 1, model, strategy)
        shape = [step.execution.examples, config.train.sequence_length]
        batch = tuple(tf.zeros(shape, dtype) for dtype in (tf.int32, tf.int32, tf.float32))

        @tf.function(autograph=False)
        def take() -> Any:
            return strategy.run(step.take_step_on_replica, (batch, tf.constant(False)))  # noqa: B023

        definition = take.get_concrete_function().graph.as_graph_def()
        nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
        reduced = {tf.as_dtype(node.attr["T"].type).name for node in nodes if node.op == "CollectiveReduceV2"}
        found.append((held_by(step), reduced))
    return found


@pytest.mark.slow
def test_replicas_hold_and_sum_what_the_plan_counts():
    pick = random.Random(2)
    four = [random_config(pick, 4) for _ in range(4)]
    configs = [
        config.model_copy(
            update={
                "distribution": config.distribution.model_copy(update={"logical_devices": 4}),
                "model": config.model.model_copy(update={"num_layers": 1}),
            }
        )
        for config in four
    ]
    for config, (held, reduced) in zip(configs, call_in_new_process(held_on_replicas, configs), strict=True):
        execution = resolve(config, cpu(4).processor(), 4)
        check_held(config, execution, held)
        assert reduced == {execution.sum_dtype}
        assert planned(config, cpu(4)) == counted(config, cpu(4), as_held(execution, held))


@pytest.mark.parametrize(
    "change",
    [
        {"sum_dtype": "float64"},
        {"compute_dtype": "float16"},
        {"micro_batch_size": 1},
        {"keeps_probabilities": False},
        {"logit_rows": 1},
    ],
)
def test_a_plan_that_counts_another_execution_than_the_step_uses_is_found(change: dict[str, Any], monkeypatch):
    config = make_config(
        {
            "run_folder": "r",
            "model": {"num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4},
            "train": {"precision": "float32", "total_steps": 1, "global_batch_size": 33, "sequence_length": 128},
        }
    )
    execution = resolve(config, cpu().processor(), 1)
    held = held_by(step_of(config, cpu()))
    assert planned(config, cpu()) == counted(config, cpu(), as_held(execution, held))
    monkeypatch.setattr(estimate, "resolve", lambda *_: execution._replace(**change))
    assert planned(config, cpu()) != counted(config, cpu(), as_held(execution, held))
