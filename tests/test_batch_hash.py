"""Laws of the hash of a batch."""

import itertools

import numpy as np
import tensorflow as tf

from trainer.training.batch_hash import batch_hash, hash_from_floats, hash_to_floats


def random_batch():
    """Random tokens, some of them padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 17, (4, 6)).astype(np.int32)
    weights = (random.random((4, 6)) < 0.8).astype(np.float32)
    return tokens, np.roll(tokens, -1, axis=1), weights


def hash_of(inputs, targets, weights, first_example=0):
    words = batch_hash((inputs, targets, weights), tf.constant(first_example, tf.int64))
    return int(hash_from_floats(hash_to_floats(words)))


def test_the_hash_of_a_batch_changes_with_every_single_number():
    batch = random_batch()
    unchanged = hash_of(*batch)
    hashes = {unchanged}
    num_changes = 0
    for part, values in enumerate(((1, 2, 3, 4, 2**20), (1, 2, 3, 4, 2**20), (1.0, 2.0, -1.0))):
        for row, place, value in itertools.product(range(4), range(6), values):
            changed = [each.copy() for each in batch]
            changed[part][row, place] += value
            hashes.add(hash_of(*changed))
            num_changes += 1
    # Not even the same 48 bits, high or low: 2**-48 of chance for each pair.
    assert (
        len(hashes) == len({each >> 16 for each in hashes}) == len({each % 2**48 for each in hashes}) == 1 + num_changes
    )


def test_the_hash_of_a_batch_depends_on_the_places_of_examples_and_not_on_how_they_are_spread():
    batch = random_batch()
    for order in ([1, 0, 2, 3], [0, 1, 3, 2], [3, 2, 1, 0]):
        assert hash_of(*(tf.gather(part, order) for part in batch)) != hash_of(*batch)
    twice = [tf.gather(part, [0, 0, 2, 3]) for part in batch], [tf.gather(part, [1, 1, 2, 3]) for part in batch]
    assert hash_of(*twice[0]) != hash_of(*twice[1])
    for size in (1, 2):
        floats = [
            hash_to_floats(batch_hash([part[i : i + size] for part in batch], tf.constant(i, tf.int64)))
            for i in range(0, 4, size)
        ]
        assert int(hash_from_floats(sum(floats))) == hash_of(*batch)
    compiled = tf.function(lambda *batch: hash_to_floats(batch_hash(batch, tf.constant(0, tf.int64))), jit_compile=True)
    assert int(hash_from_floats(compiled(*batch))) == hash_of(*batch)


def test_the_hash_of_a_batch_is_summed_exactly_over_many_replicas():
    word = tf.constant([-1, -2], tf.int32)
    num_replicas = 2**16
    sums = tf.reduce_sum(tf.tile(hash_to_floats(word)[tf.newaxis], [num_replicas, 1]), axis=0)
    expected = [each * num_replicas % 2**32 for each in (2**32 - 1, 2**32 - 2)]
    assert int(hash_from_floats(sums)) % 2**64 == (expected[0] << 32) + expected[1]
