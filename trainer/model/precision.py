"""Which dtypes a model sums in."""

import tensorflow as tf


def accumulation_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype to sum losses and gradients in: float64 for float64, otherwise float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32
