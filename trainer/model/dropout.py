"""Dropout whose masks are a function of the seed, the step, the layer and the example: no generator has a state."""

from typing import NamedTuple

import tensorflow as tf


class DropoutDraw(NamedTuple):
    """What a dropout mask depends on, beside the layer.

    Attributes:
        seed: int64 scalar, the run's seed.
        step: int64 scalar, the number of the step.
        first_example: int64 scalar, the place of the batch's first example in the global batch. So an example is masked
            alike however the global batch is spread over replicas and micro-batches.
    """

    seed: tf.Tensor
    step: tf.Tensor
    first_example: tf.Tensor


def dropout(x: tf.Tensor, rate: float, layer: int | tf.Tensor, draw: DropoutDraw | None) -> tf.Tensor:
    """Sets a share of the numbers to 0 and scales the others up by 1 / (1 - rate).

    Args:
        x: float [batch, ...]. Only the batch size may be unknown.
        rate: share to set to 0.
        layer: number of the dropout layer in the model: int, or an int32 scalar.
        draw: what the mask depends on; None leaves x as it is.

    Returns:
        A tensor like x. The mask's bits come from Philox 4x32 with the seed as its key and (example, layer and step) as
        its counter (Salmon et al. 2011). They are compared as integers: random floats would differ under XLA.
    """
    if draw is None or rate == 0.0:
        return x
    row_size = x.shape[1:].num_elements()
    # The counter advances once for four words of 32 bits.
    blocks_per_row = -(-row_size // 4)
    key = tf.reshape(tf.cast(draw.seed, tf.uint64), [1])
    low = tf.cast(draw.first_example, tf.uint64) * tf.constant(blocks_per_row, tf.uint64)
    of_layer = tf.constant(layer, tf.uint64) if isinstance(layer, int) else tf.cast(layer, tf.uint64)
    high = tf.cast(draw.step, tf.uint64) * tf.constant(2**16, tf.uint64) + of_layer
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[tf.shape(x)[0], 4 * blocks_per_row], key=key, counter=tf.stack([low, high]), alg=1, dtype=tf.uint32
    )
    keep = tf.reshape(bits[:, :row_size], tf.shape(x)) >= tf.constant(round(rate * 2**32), tf.uint32)
    return tf.where(keep, x * tf.constant(1 / (1 - rate), x.dtype), tf.zeros([], x.dtype))
