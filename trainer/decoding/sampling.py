"""How the next token is picked from logits. Functions of tensors, without a model.

Logits are float32 [rows, vocabulary], with -inf for tokens that may not be picked. A seed is int64 [2]. With the same
seed a row draws the same token, whatever rows come after it.
"""

import tensorflow as tf


def most_likely(logits: tf.Tensor) -> tf.Tensor:
    """Returns the likeliest token of each row, int32 [rows]; among equally likely tokens the first."""
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def draw_top_k(logits: tf.Tensor, k: int, temperature: float, seed: tf.Tensor) -> tf.Tensor:
    """Draws from the k likeliest tokens of each row: int32 [rows].

    Source: Fan et al. 2018, section 5.4.
    """
    probabilities, tokens = _likeliest(logits, min(k, logits.shape[-1]), temperature)
    cumulative = tf.cumsum(probabilities, axis=-1)
    return _draw(tokens, cumulative, cumulative[:, -1:], seed)


def draw_top_p(logits: tf.Tensor, p: float, temperature: float, seed: tf.Tensor) -> tf.Tensor:
    """Draws from the fewest tokens of each row that have at least probability p together: int32 [rows].

    Source: Holtzman et al. 2019, section 3.1.
    """
    probabilities, tokens = _likeliest(logits, logits.shape[-1], temperature)
    cumulative = tf.cumsum(probabilities, axis=-1)
    is_drawn = cumulative - probabilities < p  # The likelier tokens do not reach p without this token.
    return _draw(tokens, cumulative, tf.reduce_max(tf.where(is_drawn, cumulative, 0.0), axis=-1, keepdims=True), seed)


def best_beams(logits: tf.Tensor, scores: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Picks the likeliest of all continuations of a text's beams by one token, one for each beam.

    Args:
        logits: float32 [texts * beams, vocabulary], the beams of a text one after the other.
        scores: float32 [texts, beams], the logarithm of each beam's probability.

    Returns:
        (origins int32 [texts * beams], the row that each new beam continues; tokens int32 [texts * beams], its new
        token; scores float32 [texts, beams]).
    """
    num_beams, vocabulary_size = scores.shape[1], logits.shape[1]
    each = tf.reshape(tf.nn.log_softmax(logits), [-1, num_beams, vocabulary_size]) + scores[:, :, tf.newaxis]
    scores, places = tf.math.top_k(tf.reshape(each, [-1, num_beams * vocabulary_size]), num_beams)
    first_rows = tf.range(tf.shape(scores)[0])[:, tf.newaxis] * num_beams
    origins, tokens = first_rows + places // vocabulary_size, places % vocabulary_size
    return tf.reshape(origins, [-1]), tf.reshape(tokens, [-1]), scores


def _likeliest(logits: tf.Tensor, k: int, temperature: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns (probabilities, tokens), both [rows, k], the likeliest token first."""
    logits, tokens = tf.math.top_k(logits, k)
    # The largest is subtracted before the division, which with a small temperature would overflow.
    return tf.nn.softmax((logits - logits[:, :1]) / temperature), tokens


def _draw(tokens: tf.Tensor, cumulative: tf.Tensor, total: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws one of tokens [rows, k]; their cumulative probabilities [rows, k] count up to total [rows, 1]."""
    at = total * tf.random.stateless_uniform(tf.shape(total), seed)
    place = tf.reduce_sum(tf.cast(cumulative <= at, tf.int32), axis=-1)
    # If probabilities are NaN, no comparison is true, so the place is 0, which exists.
    return tf.gather(tokens, place, batch_dims=1)
