"""What can be known about a TPU on a machine that has none."""

import platform
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.tpu.topology import Topology
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata

from trainer.config.file import make_config
from trainer.config.settings import DistributionConfig
from trainer.distributed import strategy as distribution
from trainer.distributed.strategy import device_kind, make_strategy
from trainer.distributed.tpu_install import check_tpu_install
from trainer.errors import UserError
from trainer.model.gpt import GPT
from trainer.training.step import TrainingStep

ROOT = Path(__file__).parent.parent

NUM_CORES = 4


class FakeResolver(tf.distribute.cluster_resolver.ClusterResolver):
    """Tells of a slice of four cores on one host: enough to build a program for, not to run it."""

    task_type, task_id, environment, tpu_hardware_feature = "worker", 0, "", None

    def get_tpu_system_metadata(self):
        devices = [
            SimpleNamespace(name=f"/job:worker/replica:0/task:0/device:TPU:{i}", device_type="TPU")
            for i in range(NUM_CORES)
        ]
        coordinates = np.array([[[x, y, 0, 0] for x in range(2) for y in range(2)]], np.int32)
        topology = Topology(mesh_shape=[2, 2, 1, 1], device_coordinates=coordinates)
        return TPUSystemMetadata(NUM_CORES, 1, NUM_CORES, topology, devices)

    def cluster_spec(self):
        return tf.train.ClusterSpec({"worker": ["localhost:1"]})

    def master(self, *_, **__):
        return ""

    def num_accelerators(self, *_, **__):
        return {"TPU": NUM_CORES}


@pytest.mark.tpu
def test_the_step_is_built_for_every_core_of_a_slice():
    settings = {
        "run_folder": "unused",
        "model": {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 16, "dropout": 0.1},
        "train": {
            "precision": "mixed_bfloat16",
            "total_steps": 10,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "sequence_length": 8,
        },
        "optimizer": {"clip_norm": 1.0, "weight_decay": 0.1},
    }
    config = make_config(settings)
    with tf.Graph().as_default() as graph:
        strategy = tf.distribute.TPUStrategy(FakeResolver())
        assert device_kind(strategy) == "TPU"
        with strategy.scope():
            model = GPT(config.model, 32, 8, dtype=config.train.precision)
        step = TrainingStep(config, 10, model, strategy)
        batch = tuple(tf.compat.v1.placeholder(dtype, [4, 8]) for dtype in (tf.int32, tf.int32, tf.float32))
        # As in a function that is not converted, which the loop is.
        take_step_on_replica = tf.autograph.experimental.do_not_convert(step.take_step_on_replica)
        strategy.run(take_step_on_replica, (batch, tf.constant(False)))
    replicated = [node for node in graph.get_operations() if "_tpu_replicate" in node.node_def.attr]
    types = {node.type for node in replicated}
    assert {"CrossReplicaSum", "ResourceApplyAdam"} <= types | {
        node.op for function in graph.as_graph_def().library.function for node in function.node_def
    }
    # Nothing that a TPU has no kernel for: it would be moved to the host, or refused.
    assert not types & {"AsString", "PrintV2", "PyFunc", "EagerPyFunc", "RandomIndexShuffle", "ImmutableConst", "Where"}
    sums = [node for node in replicated if node.type == "CrossReplicaSum"]
    # The gradients, and the loss, the count, the hash and the votes.
    assert len(sums) == len(model.trainable_variables) + 4
    assert {node.inputs[0].dtype for node in sums} == {tf.float32}
    assert all(output.shape.is_fully_defined() for node in replicated for output in node.outputs)


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="tensorflow-tpu is for others"
)
def test_step_and_decoding_are_lowered_by_the_tpu_s_own_tensorflow():
    environment = ROOT / ".venv-tpu"
    install = subprocess.run(
        [str(ROOT / "scripts" / "launch" / "install_tpu")], capture_output=True, text=True, check=False
    )
    if "The package index cannot be reached" in install.stderr:
        pytest.skip("no package index to take tensorflow-tpu from")
    assert install.returncode == 0, install.stderr[-3000:]
    command = [str(environment / "bin" / "python"), str(ROOT / "tests" / "tpu_lowering.py")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    # The tutorial's model, and a model with all newer settings.
    assert process.stdout.splitlines() == 2 * ["step has static shapes True", "decode has static shapes True"]


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        ({}, "tensorflow-tpu is not installed"),
        ({"tensorflow": "2.21.0"}, "tensorflow-tpu is not installed"),
        (
            {"tensorflow-tpu": "2.20.0", "tensorflow": "2.20.0", "libtpu": "0.0.17"},
            "plain tensorflow is installed over",
        ),
        ({"tensorflow-tpu": "2.20.0", "libtpu": "0.0.52"}, "libtpu is 0.0.52, and tensorflow-tpu loads only 0.0.17"),
    ],
)
def test_an_install_that_cannot_reach_a_tpu_is_refused_with_the_remedy(versions, problem):
    with pytest.raises(UserError) as error:
        check_tpu_install(versions.get)
    assert problem in str(error.value)
    assert "Run scripts/launch/install_tpu" in str(error.value)
    check_tpu_install({"tensorflow-tpu": "2.20.0", "libtpu": "0.0.17"}.get)


@pytest.mark.skipif(bool(tf.config.list_physical_devices("TPU")), reason="this machine has a TPU")
def test_a_tpu_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="tensorflow-tpu is not installed"):
        make_strategy(DistributionConfig(kind="tpu"))


def test_a_tpu_that_does_not_answer_is_an_error_in_time_and_holds_up_no_exit(monkeypatch):
    is_over = threading.Event()
    monkeypatch.setattr(distribution, "TPU_TIMEOUT_SECS", 0.1)
    monkeypatch.setattr(distribution, "check_tpu_install", lambda: None)
    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", lambda *_, **__: is_over.wait())
    with pytest.raises(UserError) as error:
        make_strategy(DistributionConfig(kind="tpu", tpu_name="x"))
    assert "distribution.tpu_name='x': no TPU could be reached (no answer within 0 s)" in str(error.value)
    # What still waits is a daemon, which no exit waits for.
    (waiting,) = (thread for thread in threading.enumerate() if thread.name == "tpu")
    assert waiting.daemon
    is_over.set()
    waiting.join()
