"""Shares an optimizer's work among replicas: each does a part of it, and all get all results."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf


class Replicas(NamedTuple):
    """The replicas that take a step together, as one of them sees them.

    Attributes:
        num_replicas: how many there are.
        number: which one this is, from 0 on: int32 scalar, a tensor if one program serves all replicas.
        sum: adds up tensors of one dtype over all replicas, in one operation.
    """

    num_replicas: int
    number: tf.Tensor | int
    sum: Callable[[list[tf.Tensor]], list[tf.Tensor]]


ALONE = Replicas(1, 0, lambda summands: summands)


def map_in_shares(
    function: Callable[[tf.Tensor], tf.Tensor], stacks: Sequence[tf.Tensor], replicas: Replicas
) -> list[tf.Tensor]:
    """Applies a function to stacks of matrices. Each replica computes its share of every stack, of ceil(L / N) of
    L matrices; then one sum over replicas, in which all but one term of each number is 0, gives all results to all.

    Args:
        function: maps float [matrices, rows, columns] to a tensor of the same shape, each matrix by itself.
        stacks: each float [L, rows, columns], equal on all replicas.
        replicas: who shares the work.

    Returns:
        function(stack) of each stack, equal on all replicas.
    """
    if replicas.num_replicas == 1:
        return [function(stack) for stack in stacks]
    is_own = tf.reshape(tf.equal(tf.range(replicas.num_replicas), replicas.number), [-1, 1, 1, 1])
    spread = []
    for stack in stacks:
        num_matrices, *shape = stack.shape
        size = -(-num_matrices // replicas.num_replicas)
        # Matrices of zeros fill the last shares. All replicas wait for the largest share, so they cost no time.
        padded = tf.pad(stack, [[0, replicas.num_replicas * size - num_matrices], [0, 0], [0, 0]])
        own = function(tf.gather(tf.reshape(padded, [replicas.num_replicas, size, *shape]), replicas.number))
        spread.append(tf.where(is_own, own, tf.zeros([], own.dtype)))  # [num_replicas, size, rows, columns]
    return [
        tf.reshape(total, [-1, *stack.shape[1:]])[: stack.shape[0]]
        for total, stack in zip(replicas.sum(spread), stacks, strict=True)
    ]
