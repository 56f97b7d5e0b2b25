"""The variables of an optimizer's state, and of what else every replica counts alike or has for itself."""

from collections.abc import Sequence

import keras
import tensorflow as tf


class Piece:
    """A replica's rows of a weight: an optimizer trains it in place of the weight.

    Args:
        name: the weight's own name, such as "kernel".
        shape: the shape of the piece; a piece of a vector has one axis, any other has two.
        dtype: the weight's dtype.
        whole_shape: the shape of the weight.

    Attributes:
        value: a variable of that shape, which every replica has for itself.
    """

    def __init__(self, name: str, shape: Sequence[int], dtype: str, whole_shape: Sequence[int]) -> None:
        self.name, self.shape, self.dtype, self.whole_shape = name, tuple(shape), dtype, tuple(whole_shape)
        self.value = per_replica(shape, dtype, name)


def counter(name: str) -> tf.Variable:
    """Returns a new int64 variable, 0 at first, that every replica counts up alike."""
    # Every replica computes the same value, so there is nothing to aggregate.
    return tf.Variable(0, dtype=tf.int64, trainable=False, aggregation=tf.VariableAggregation.NONE, name=name)


def slot(variable: keras.Variable | Piece) -> tf.Variable:
    """Returns a new variable of the shape and dtype of what is trained, 0 at first. Every replica updates the slot of a
    weight alike, and has the slot of a piece for itself.
    """
    if isinstance(variable, Piece):
        return per_replica(variable.shape, variable.dtype)
    # As above.
    return tf.Variable(
        tf.zeros(variable.shape, variable.dtype), trainable=False, aggregation=tf.VariableAggregation.NONE
    )


def per_replica(shape: Sequence[int], dtype: str | tf.DType, name: str | None = None) -> tf.Variable:
    """Returns a new variable, 0 at first, that holds another value on each replica. Reading it as one value
    outside of a replica is an error if there are several replicas, as on each it is only a part.
    """
    return tf.Variable(
        tf.zeros(shape, dtype),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.NONE,
        name=name,
    )
