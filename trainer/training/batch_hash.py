"""A hash of each batch that travels with the gradients. Equal chains show that two runs saw the same batches."""

import numpy as np
import tensorflow as tf

_BITS = 32
# The bytes of a word. Over up to 2**16 replicas a sum of bytes is exact in float32, which counts to 2**24.
_SHIFTS = np.arange(0, _BITS, 8, dtype=np.uint32)


def batch_hash(
    batch: tuple[tf.Tensor, tf.Tensor, tf.Tensor], first_example: tf.Tensor, num_examples: tf.Tensor | None = None
) -> tf.Tensor:
    """Returns the hash of a replica's share. The sum over replicas depends on every number of every example and on the
    example's place in the global batch, and not on how examples are spread over replicas.

    The hash is two sums of 32 bits, because accelerators have no integers of 64 bits. Any change of one number in an
    example changes both: multiplication by an odd factor and each step of the mixing are one to one, and a sum in which
    one term differs is a different sum. Two batches that differ in more numbers have equal hashes once in 2**64.

    Args:
        batch: inputs int32, targets int32 and weights float32, each [batch, sequence].
        first_example: int64 scalar, the place of the share's first example in the global batch.
        num_examples: int64 scalar; only this many examples, from the first on, count. None: all.

    Returns:
        int32 [2], to be added modulo 2**32; `hash_to_floats` lets it travel with the gradients.

    Source: Appleby's MurmurHash3 (fmix32), for the mixing.
    """
    inputs, targets, weights = batch
    places = tf.cast(first_example, tf.int32) + tf.range(targets.shape[0])
    parts = (inputs, targets, tf.bitcast(weights, tf.int32))
    # RandomState draws the same numbers in every release of NumPy. The powers of one factor would not do: modulo 2**32
    # some long sequences collide for all of them.
    factors = np.random.RandomState(0).randint(0, 2**32, (2, 1 + len(parts), targets.shape[1]), dtype=np.uint32) | 1
    words = []
    for place_factors, *part_factors in factors.view(np.int32):
        sums = [tf.reduce_sum(part * each, axis=1) for part, each in zip(parts, part_factors, strict=True)]
        of_examples = _mixed(tf.reduce_sum([places * place_factors[0], *sums], axis=0))
        if num_examples is not None:
            of_examples = tf.where(tf.range(targets.shape[0]) < tf.cast(num_examples, tf.int32), of_examples, 0)
        words.append(tf.reduce_sum(of_examples))
    return tf.stack(words)


def _mixed(x: tf.Tensor) -> tf.Tensor:
    """Spreads the bits of int32 [n], one to one. Without it the sum would not depend on the order of the examples."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = _shifted_in(x, shift) * tf.constant(np.uint32(factor).view(np.int32))
    return _shifted_in(x, 16)


def _shifted_in(x: tf.Tensor, shift: int) -> tf.Tensor:
    shifted = tf.bitwise.right_shift(tf.bitcast(x, tf.uint32), tf.constant(shift, tf.uint32))
    return tf.bitwise.bitwise_xor(x, tf.bitcast(shifted, tf.int32))


def hash_to_floats(words: tf.Tensor) -> tf.Tensor:
    """Splits int32 [2] into bytes, float32 [8]: one operation sums everything that a step reduces, in one dtype."""
    words = tf.bitcast(words, tf.uint32)[:, tf.newaxis]
    parts = tf.bitwise.bitwise_and(tf.bitwise.right_shift(words, _SHIFTS), tf.constant(255, tf.uint32))
    return tf.reshape(tf.cast(tf.bitcast(parts, tf.int32), tf.float32), [-1])


def hash_from_floats(sums: tf.Tensor) -> tf.Tensor:
    """Joins what `hash_to_floats` made, summed over replicas, to one int64 scalar."""
    parts = tf.reshape(tf.cast(sums, tf.int64), [2, -1])
    words = tf.reduce_sum(parts * (1 << _SHIFTS.astype(np.int64)), axis=1) % 2**_BITS
    # An OR and not a sum: grappler joins a sum with the one of the chain to an AddN of three, in a buffer of its own.
    return tf.bitwise.bitwise_or(words[0] * 2**_BITS, words[1])
