"""Laws of the choice of devices."""

import pytest
import tensorflow as tf

from trainer.config import DistributionConfig, UserError
from trainer.training.distribution import make_strategy, micro_batches

NUM_GPUS = len(tf.config.list_physical_devices("GPU"))
HAS_GPU = NUM_GPUS > 0


@pytest.mark.parametrize("kind", ["auto", "cpu"])
def test_one_device_is_chosen_and_holds_the_variables(kind):
    strategy = make_strategy(DistributionConfig(kind=kind))
    with strategy.scope():
        variable = tf.Variable(1.0)
    assert strategy.num_replicas_in_sync == 1
    expected = "GPU:0" if HAS_GPU and kind == "auto" else "CPU:0"
    assert variable.device.endswith(expected)


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match=r"A GPU is asked for .* but TensorFlow sees none"):
        make_strategy(DistributionConfig(kind="gpu"))
    with pytest.raises(UserError, match=r"A GPU is asked for .* but TensorFlow sees none"):
        make_strategy(DistributionConfig(num_gpus=2))


def test_a_cpu_takes_a_large_batch_in_two_halves_at_once_unless_told_otherwise():
    strategy = make_strategy(DistributionConfig(kind="cpu"))
    assert micro_batches(None, 32, 118, strategy) == (16, 2)
    assert micro_batches(None, 12, 64, strategy) == (12, 2)
    assert micro_batches(None, 33, 118, strategy) == (33, 2)
    assert micro_batches(8, 32, 118, strategy) == (8, 2)


def test_a_host_can_be_told_to_go_alone(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}')
    for kind in ("auto", "multi_worker"):
        assert make_strategy(DistributionConfig(kind=kind), alone=True).num_replicas_in_sync == max(1, NUM_GPUS)
