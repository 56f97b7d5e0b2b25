"""Which example is at a place of a run: permutations, and mixtures of several sources.

Everything is a function of the place and the seed, in TensorFlow operations: no state, and no list of the order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.config.settings import MIXTURE_EXAMPLES
from trainer.data.mixture import Phase, Turns, turns_of


class Window(NamedTuple):
    """The bounds of a shuffle of data larger than memory.

    Attributes:
        block_examples: this many examples that follow each other in the data are a block.
        num_blocks: the examples of this many blocks are shuffled together.
    """

    block_examples: int
    num_blocks: int


def shuffled(index: tf.Tensor, epoch: tf.Tensor, count: int, seed: int, window: Window | None = None) -> tf.Tensor:
    """Maps positions in an epoch to examples, one to one. Takes and returns int64 [n], each in [0, count).

    Args:
        index: the positions.
        epoch: the epoch of each position, int64 [n].
        count: examples in an epoch.
        seed: the order's seed.
        window: None if any example may come anywhere. Otherwise the blocks are read in a shuffled order, a few at a
            time, so that data larger than memory is not read at random places. Blocks begin elsewhere each epoch.
    """
    if window is None or count <= window.block_examples * window.num_blocks:
        return permuted(index, epoch, count, seed)
    # The examples are a ring, cut into blocks at another place each epoch. The last blocks, too few for a window, are
    # shuffled among themselves, and so are the last examples, too few for a block.
    num_blocks = count // window.block_examples
    in_blocks, per_window = num_blocks * window.block_examples, window.block_examples * window.num_blocks
    whole = num_blocks // window.num_blocks * per_window
    number = index // per_window
    start = number * per_window
    size = tf.where(index < whole, per_window, tf.where(index < in_blocks, in_blocks - whole, count - in_blocks))
    size = tf.cast(size, tf.int64)
    start = tf.where(index < in_blocks, start, in_blocks)
    # Another seed than the blocks' own; % 2**63 because the largest seed has no successor in int64.
    place = start + _permuted_below(index - start, epoch, size, (seed + 1) % 2**63, number)
    block = _permuted_once(tf.minimum(place // window.block_examples, num_blocks - 1), epoch, num_blocks, seed)
    example = tf.where(place < in_blocks, block * window.block_examples + place % window.block_examples, place)
    shift = _permuted_once(tf.zeros_like(epoch), epoch, count, seed)
    return (example + shift) % count


def _permuted_once(index: tf.Tensor, epoch: tf.Tensor, count: int, seed: int) -> tf.Tensor:
    """Returns what `permuted` returns, computed once for each (epoch, index): with a small count, one permutation takes
    up to 1 ms.
    """
    each, which = tf.unique(epoch * count + index)
    return tf.gather(permuted(each % count, each // count, count, seed), which)


def mixed(n: tf.Tensor, counts: Sequence[int], phases: Sequence[Phase], seed: int) -> tf.Tensor:
    """Maps positions in a run to examples of several sources, which are numbered one source after the other.

    In each turn each source has exactly its share, at places that differ each time. Each source is shuffled separately,
    and all its examples come before any of them comes again.

    Args:
        n: int64 [n], positions in the run.
        counts: the number of examples of each source.
        phases: the weights of the sources.
        seed: the order's seed.
    """
    turns = Turns(*(tf.constant(each, tf.int64) for each in turns_of(phases)))
    row = tf.searchsorted(turns.begins, n, side="right", out_type=tf.int64) - 1
    place = n - tf.gather(turns.begins, row)
    turn = place // MIXTURE_EXAMPLES  # Of this row.
    number = tf.gather(turns.numbers, row) + turn
    size = tf.gather(turns.sizes, row)
    place = _permuted_below(place % MIXTURE_EXAMPLES, number, size, seed, tf.zeros_like(n))
    begins = tf.gather(tf.cumsum(turns.shares, axis=1, exclusive=True), row)  # [n, sources]
    source = tf.reduce_sum(tf.cast(begins <= place[:, tf.newaxis], tf.int64), axis=1) - 1
    of_source = tf.stack([row, source], axis=1)
    k = tf.gather_nd(turns.before, of_source) + turn * tf.gather_nd(turns.shares, of_source)
    k += place - tf.gather(begins, source, batch_dims=1)
    firsts, sizes = (tf.constant(each, tf.int64) for each in (np.cumsum([0, *counts])[:-1], counts))
    size = tf.gather(sizes, source)
    return tf.gather(firsts, source) + _permuted_below(k % size, k // size, size, seed, source + 1)


def permuted(index: tf.Tensor, epoch: tf.Tensor, count: int, seed: int) -> tf.Tensor:
    """Maps positions in an epoch to examples, one to one, at random. Takes and returns int64 [n], each in [0, count).

    Source: a cipher over the index (Simon, Beaulieu et al. 2013), repeated until the result is below count: the example
    at a position is found without the others.
    """
    return _permuted_below(index, epoch, tf.constant(count, tf.int64), seed, tf.zeros_like(epoch))


def _permuted_below(index: tf.Tensor, epoch: tf.Tensor, count: tf.Tensor, seed: int, number: tf.Tensor) -> tf.Tensor:
    """Permutes index, int64 [n], below count, int64 [] or [n]; in another way for each epoch and number, int64 [n]."""
    # The cipher uses only the lower bits of its three keys, half as many as an index has: 8 if there are few examples.
    # So seed, epoch and number are hashed first, with the constants of SplitMix64 (Steele et al. 2014), and each key
    # gets a third of the hash.
    factors = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    x = sum(
        tf.cast(part, tf.uint64) * tf.constant(factor, tf.uint64)
        for part, factor in zip((seed, epoch, number), factors, strict=True)
    )
    for shift, factor in ((30, factors[1]), (27, factors[2])):
        x = tf.bitwise.bitwise_xor(x, _shifted(x, shift)) * tf.constant(factor, tf.uint64)
    keys = tf.stack([tf.bitcast(_shifted(x, shift), tf.int64) for shift in (0, 21, 42)], axis=1)
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=keys, max_index=count - 1, rounds=8)


def _shifted(x: tf.Tensor, num_bits: int) -> tf.Tensor:
    return tf.bitwise.right_shift(x, tf.constant(num_bits, tf.uint64))
