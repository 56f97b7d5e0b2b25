"""Laws of the loss scale by itself; tests/test_step.py has its laws within a step."""

import tensorflow as tf

from trainer.training.loss_scale import LossScale


def test_the_loss_scale_doubles_after_a_while_without_overflow():
    scale = LossScale(num_targets=1000)
    assert scale.value.numpy() == 2.0**5  # as 2**15 would be for the mean
    scale.good_steps.assign(LossScale.STEPS_TO_DOUBLE - 2)
    scale.adapt(tf.constant(True))
    assert scale.value.numpy() == 2.0**5
    scale.adapt(tf.constant(True))
    assert scale.value.numpy() == 2.0**6
    assert scale.good_steps.numpy() == 0
