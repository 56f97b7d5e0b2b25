"""Which devices a run uses. The only module that names a tf.distribute class."""

import tensorflow as tf

from trainer.config import DistributionConfig, UserError

# In smaller batches adding up the gradients costs more than two halves at once gain: measured on two cores, 12 x 64
# tokens are a fifth slower in halves, 32 x 118 a sixth faster.
HALVED_FROM_TOKENS = 2048


def make_strategy(config: DistributionConfig) -> tf.distribute.Strategy:
    """Returns the strategy to build the model under and to run the step with.

    Raises:
        UserError: the device asked for is not there.
    """
    gpus = tf.config.list_logical_devices("GPU")
    if config.kind == "gpu" and not gpus:
        raise UserError(
            "distribution.kind='gpu', but TensorFlow sees no GPU; install the extra gpt-trainer[cuda] and a driver, or "
            "set distribution.kind='cpu'."
        )
    use_gpu = bool(gpus) and config.kind != "cpu"
    return tf.distribute.OneDeviceStrategy("/gpu:0" if use_gpu else "/cpu:0")


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
    if any("CPU" not in device.upper() for device in strategy.extended.worker_devices):
        return asked or rows, 1
    halves = rows % 2 == 0 and rows * sequence >= HALVED_FROM_TOKENS
    return asked or (rows // 2 if halves else rows), 2
