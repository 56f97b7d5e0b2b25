"""The variables of an optimizer's state, and of what else every replica counts alike."""

import keras
import tensorflow as tf


def counter(name: str) -> tf.Variable:
    """Returns a new int64 variable, 0 at first, that every replica counts up alike."""
    # Every replica computes the same value, so there is nothing to aggregate.
    return tf.Variable(0, dtype=tf.int64, trainable=False, aggregation=tf.VariableAggregation.NONE, name=name)


def slot(variable: keras.Variable) -> tf.Variable:
    """Returns a new variable of a weight's shape and dtype, 0 at first, that every replica updates alike."""
    # As above.
    return tf.Variable(
        tf.zeros(variable.shape, variable.dtype), trainable=False, aggregation=tf.VariableAggregation.NONE
    )
