"""The loss scale that lets small gradients survive float16."""

import math

import tensorflow as tf

from trainer.optimizers.variables import counter


class LossScale(tf.Module):
    """The factor that keeps float16 gradients from vanishing: halved when they overflow, doubled after a while without
    an overflow.

    Args:
        num_targets: tokens of a global batch, whose losses are summed.

    Attributes:
        value: float32 scalar, the factor.
        good_steps: int64 scalar, steps without an overflow since the factor last changed.
        smallest: the factor at which halving ends. Gradients that overflow even there do not come from a model that can
            learn.

    Source: Micikevicius et al. 2018, section 3.2.
    """

    STEPS_TO_DOUBLE = 2000
    NUM_HALVINGS = 24

    def __init__(self, num_targets: int) -> None:
        super().__init__(name="loss_scale")
        # 2**15 is the usual start for a mean loss. The gradients of a sum are larger by the number of its terms.
        first = 2.0 ** (15 - round(math.log2(num_targets)))
        self.smallest = first / 2**self.NUM_HALVINGS
        none = tf.VariableAggregation.NONE
        self.value = tf.Variable(first, dtype=tf.float32, trainable=False, aggregation=none, name="loss_scale")
        self.good_steps = counter("good_steps")

    def state(self) -> dict[str, tf.Variable]:
        """Returns its variables by name."""
        return {"loss_scale": self.value, "good_steps": self.good_steps}

    def adapt(self, is_finite: tf.Tensor) -> tf.Tensor:
        """Adapts the scale after a step; returns whether the scale has become smaller, a bool scalar.

        Args:
            is_finite: bool scalar, whether the step's summed gradients are finite; the same on every replica.
        """
        good = tf.where(is_finite, self.good_steps + 1, tf.zeros([], tf.int64))
        doubles = good >= self.STEPS_TO_DOUBLE
        grown = tf.where(doubles, self.value * 2, self.value)
        before = tf.identity(self.value)
        new = tf.where(is_finite, grown, tf.maximum(before / 2, self.smallest))
        self.value.assign(new)
        self.good_steps.assign(tf.where(doubles, tf.zeros([], tf.int64), good))
        return new < before
