"""Which devices a run uses. The only module that names a tf.distribute class."""

import tensorflow as tf

from trainer.config import DistributionConfig, UserError


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
