"""Laws of what replicas exchange: NumPy is the reference, in tests/exchange_pieces.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from trainer.distributed.collectives import TensorFlowCollectives, XlaCollectives
from trainer.optimizers.variables import per_replica

SCRIPT = Path(__file__).parent / "exchange_pieces.py"


def start(distribution, **environment):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(distribution)],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def places_of(processes):
    """What the replicas of each process learned about their places."""
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, said, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [[int(each) for each in output.split("places ")[1].split()] for output in said]


def test_a_program_of_xla_exchanges_no_integers():
    with tf.Graph().as_default(), pytest.raises(ValueError, match="exchange floating-point numbers, not int32"):
        XlaCollectives(2, 2).gather([tf.zeros([4], tf.int32)])


def test_on_gpus_bfloat16_travels_as_float16_because_nccl_does_not_take_it_from_tensorflow():
    # As on a GPU, without the exchange by which the replicas learn their places.
    collectives = TensorFlowCollectives.__new__(TensorFlowCollectives)
    collectives.num_pieces, collectives._is_gpu, collectives._key_of_all, collectives._num_calls = 2, True, 1, {}
    collectives._token = per_replica([], tf.float32)

    @tf.function(autograph=False)
    def exchange(tensor):
        return collectives.gather([tensor]), collectives.all_to_all([tensor])

    narrow = tf.TensorSpec([2, 3], tf.bfloat16)
    graph = exchange.get_concrete_function(narrow).graph
    travels = [each.get_attr("T") for each in graph.get_operations() if each.type.startswith("Collective")]
    assert travels == [tf.float16, tf.float16]
    assert [each.dtype for each in tf.nest.flatten(graph.structured_outputs)] == [tf.bfloat16, tf.bfloat16]


@pytest.mark.slow
# All-to-all, in one process; from 12 replicas on a sum or a gather, and a slice.
@pytest.mark.parametrize("num_replicas", [3, 12])
def test_replicas_of_a_process_exchange_pieces(num_replicas):
    assert places_of([start({"kind": "cpu", "logical_devices": num_replicas})]) == [list(range(num_replicas))]


@pytest.mark.slow
def test_of_eleven_workers_each_finds_its_own_piece(free_addresses):
    workers = free_addresses(11)
    of_workers = places_of(
        [
            start(
                {"kind": "multi_worker"},
                TF_CONFIG=json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}}),
            )
            for i in range(11)
        ]
    )
    # TensorFlow orders workers by the text of their names: 0, 1, 10, 2, ...
    assert of_workers == [[0], [1], [3], [4], [5], [6], [7], [8], [9], [10], [2]]
