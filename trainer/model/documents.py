"""Where the documents of packed text begin."""

import tensorflow as tf


def document_starts(tokens: tf.Tensor, bos_id: int) -> tf.Tensor:
    """Returns the position where each token's document starts: at its [BOS], or at 0 if the [BOS] is not there.

    Args:
        tokens: int32 [batch, sequence], documents one after the other.
        bos_id: token before each document.

    Returns:
        int32 [batch, sequence].
    """
    documents = tf.cumsum(tf.cast(tokens == bos_id, tf.int32), axis=1)  # Numbers of documents, in rising order.
    return tf.searchsorted(documents, documents, side="left")
