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
        all_to_all: if each of num_pieces replicas has its rows of every matrix, and not whole matrices: gives the i-th
            of these part i of each tensor [num_pieces, ...], and returns what each gave to this one, in tensors of the
            same shapes.
        num_pieces: the replicas that have all matrices together, if they have rows.
    """

    num_replicas: int
    number: tf.Tensor | int
    sum: Callable[[list[tf.Tensor]], list[tf.Tensor]]
    all_to_all: Callable[[list[tf.Tensor]], list[tf.Tensor]] | None = None
    num_pieces: int = 1


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


def map_pieces_in_shares(
    function: Callable[[tf.Tensor], tf.Tensor],
    stacks: Sequence[tf.Tensor],
    num_rows: Sequence[int],
    replicas: Replicas,
) -> list[tf.Tensor]:
    """Applies a function to stacks of matrices of which each replica has some rows. Each replica gets its share of
    every stack whole, of ceil(L / N) of L matrices, computes it, and gives everyone their rows of the results.

    Args:
        function: maps float [matrices, rows, columns] to a tensor of the same shape, each matrix by itself.
        stacks: this replica's rows of every matrix, each stack float [L, rows of a piece, columns]. The pieces of all
            replicas one below the other are the matrix, with rows of zeros after it.
        num_rows: for each stack, the rows of its whole matrices.
        replicas: who has the pieces and shares the work.

    Returns:
        This replica's rows of function(stack) of each stack, with zeros where stacks have rows beyond the matrix.
    """
    count = replicas.num_pieces
    assert replicas.all_to_all is not None
    shares = []
    for stack in stacks:
        size = -(-stack.shape[0] // count)
        padded = tf.pad(stack, [[0, count * size - stack.shape[0]], [0, 0], [0, 0]])
        shares.append(tf.reshape(padded, [count, size, *stack.shape[1:]]))
    results = []
    for pieces, rows in zip(replicas.all_to_all(shares), num_rows, strict=True):
        _, size, piece_rows, columns = pieces.shape  # [replica that has the rows, matrix, rows, columns]
        matrices = tf.reshape(tf.transpose(pieces, [1, 0, 2, 3]), [size, count * piece_rows, columns])
        done = tf.pad(function(matrices[:, :rows]), [[0, 0], [0, count * piece_rows - rows], [0, 0]])
        results.append(tf.transpose(tf.reshape(done, [size, count, piece_rows, columns]), [1, 0, 2, 3]))
    return [
        tf.reshape(part, [-1, *stack.shape[1:]])[: stack.shape[0]]
        for part, stack in zip(replicas.all_to_all(results), stacks, strict=True)
    ]
