"""The learning rate as a function of the step."""

import math

import tensorflow as tf

from trainer.config.settings import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: tf.Tensor, total_steps: int) -> tf.Tensor:
    """Returns the learning rate of a step, a float64 scalar.

    It rises linearly during the warm-up: step warmup_steps - 1 is the first with the full rate. Then it follows the
    schedule down to final_learning_rate, which is the rate of step total_steps - 1.

    Args:
        config: the rate's peak, end, warm-up and shape.
        step: integer scalar; the first step is 0.
        total_steps: the number of steps of the whole run.
    """
    step = tf.cast(step, tf.float64)
    peak, final = config.learning_rate, config.final_learning_rate
    warmup = tf.minimum((step + 1) / max(1, config.warmup_steps), 1.0)
    first = max(0, config.warmup_steps - 1)
    progress = tf.clip_by_value((step - first) / max(1, total_steps - 1 - first), 0.0, 1.0)
    if config.schedule == "constant":
        return warmup * peak
    if config.schedule == "linear":
        share = 1 - progress
    else:
        # Loshchilov and Hutter 2017, equation 5, without restarts.
        share = (1 + tf.cos(math.pi * progress)) / 2
    return warmup * (final + (peak - final) * share)
