"""Which devices a run uses. The only module that names a tf.distribute class."""

import tensorflow as tf

from trainer.config import Config, DistributionConfig, UserError
from trainer.data.batches import Share
from trainer.training.hosts import find_hosts

# In smaller batches adding up the gradients costs more than two halves at once gain: measured on two cores, 12 x 64
# tokens are a fifth slower in halves, 32 x 118 a sixth faster.
HALVED_FROM_TOKENS = 2048


def make_strategy(config: DistributionConfig) -> tf.distribute.Strategy:
    """Returns the strategy to build the model under and to run the step with.

    Call it before TensorFlow computes anything: the CPU can only be split, and hosts only be joined, before that.

    Raises:
        UserError: the devices asked for are not there.
    """
    if find_hosts(config).are_several:
        return tf.distribute.MultiWorkerMirroredStrategy()
    return _gpus(config.num_gpus) if _wants_gpus(config) else _cpu(config.logical_devices)


def count_replicas(config: DistributionConfig) -> int:
    """Returns how many replicas `make_strategy` will make, on all hosts, before it does."""
    hosts = find_hosts(config)
    if hosts.are_several:
        return len(hosts.workers) * max(1, _num_gpus())
    return (config.num_gpus or _num_gpus()) if _wants_gpus(config) else config.logical_devices


def rows_per_replica(config: Config, num_replicas: int) -> int:
    """Returns how many examples of a batch each replica gets.

    Raises:
        UserError: that is not a whole number, or not one of micro-batches.
    """
    train = config.train
    rows, rest = divmod(train.global_batch_size, num_replicas)
    if rest or rows % (train.micro_batch_size or 1):
        micro = f" x train.micro_batch_size={train.micro_batch_size}" if train.micro_batch_size else ""
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of {num_replicas} replicas{micro}; "
            "change one of them."
        )
    return rows


def share_of(context: tf.distribute.InputContext) -> Share:
    """Returns the part of each batch that this host's pipeline makes."""
    per_host = context.num_replicas_in_sync // context.num_input_pipelines
    return Share(context.input_pipeline_id * per_host, per_host, context.num_replicas_in_sync)


def device_kind(strategy: tf.distribute.Strategy) -> str:
    """Returns "CPU", "GPU" or "TPU"."""
    return str(tf.DeviceSpec.from_string(strategy.extended.worker_devices[0]).device_type)


def micro_batches(asked: int | None, rows: int, sequence: int, strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """Returns how many rows of its batch a replica works through at a time, and how many such parts at once.

    Args:
        asked: train.micro_batch_size.
        rows: of a replica's batch.
        sequence: tokens in a row.
        strategy: whose devices count.

    On a CPU two halves run side by side: the cores that one's sums and softmaxes leave idle do the other's matrix
    products. Anywhere else one part at a time fills the device, and a second would only need memory.
    """
    if device_kind(strategy) != "CPU":
        return asked or rows, 1
    halves = rows % 2 == 0 and rows * sequence >= HALVED_FROM_TOKENS
    return asked or (rows // 2 if halves else rows), 2


def _wants_gpus(config: DistributionConfig) -> bool:
    wants_cpu = config.kind == "cpu" or config.logical_devices > 1
    return config.kind == "gpu" or config.num_gpus is not None or (_num_gpus() > 0 and not wants_cpu)


def _num_gpus() -> int:
    return len(tf.config.list_physical_devices("GPU"))


def _gpus(asked: int | None) -> tf.distribute.Strategy:
    there = _num_gpus()
    if not there:
        raise UserError(
            "A GPU is asked for (distribution.kind or distribution.num_gpus), but TensorFlow sees none; install the "
            "extra gpt-trainer[cuda] and a driver, or set distribution.kind='cpu'."
        )
    if asked is not None and asked > there:
        raise UserError(
            f"distribution.num_gpus={asked}, but TensorFlow sees {there}; lower it, or leave it out for all."
        )
    used = asked or there
    if used == 1:
        return tf.distribute.OneDeviceStrategy("/gpu:0")
    return tf.distribute.MirroredStrategy([f"/gpu:{i}" for i in range(used)])


def _cpu(logical_devices: int) -> tf.distribute.Strategy:
    if logical_devices == 1:
        return tf.distribute.OneDeviceStrategy("/cpu:0")
    (cpu,) = tf.config.list_physical_devices("CPU")
    parts = [tf.config.LogicalDeviceConfiguration()] * logical_devices
    try:
        if tf.config.get_logical_device_configuration(cpu) != parts:
            tf.config.set_logical_device_configuration(cpu, parts)
    except RuntimeError:
        raise UserError(
            f"distribution.logical_devices={logical_devices}: this process has used TensorFlow already, and the CPU "
            "can only be split before. Start a new process."
        ) from None
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(logical_devices)])
