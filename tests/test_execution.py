"""Laws of what a config means on a device."""

import pytest

from trainer.config_file import make_config
from trainer.execution import Execution, query_blocks, resolve
from trainer.hardware.processor import Processor

FAST_CPU, SLOW_CPU = Processor("CPU", True), Processor("CPU", False)
GPU, TPU = Processor("GPU"), Processor("TPU")


def execution_of(device: Processor = SLOW_CPU, num_replicas: int = 1, use="training", **train) -> Execution:
    train = {"precision": "float32", "total_steps": 1, "global_batch_size": 32, "sequence_length": 118} | train
    return resolve(make_config({"run_folder": "unused", "train": train}), device, num_replicas, use=use)


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
