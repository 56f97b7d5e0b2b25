"""How the next token is picked from logits. Functions of tensors, without a model.

Logits are float32 [rows, vocabulary], with -inf for tokens that may not be picked.
"""

import tensorflow as tf


def most_likely(logits: tf.Tensor) -> tf.Tensor:
    """Returns the likeliest token of each row, int32 [rows]; among equally likely tokens the first."""
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def draw(
    logits: tf.Tensor,
    at: tf.Tensor,
    temperature: float | tf.Tensor = 1.0,
    k: int | tf.Tensor | None = None,
    p: float | tf.Tensor | None = None,
    min_p: float | tf.Tensor | None = None,
) -> tf.Tensor:
    """Draws a token of each row: int32 [rows]. What is left out of k, p and min_p leaves out no token.
    They and the temperature are numbers, or scalar tensors.

    Args:
        logits: float32 [rows, vocabulary].
        at: float32 [rows], uniform in [0, 1): the place of each row's token among the cumulative probabilities.
        temperature: divides the logits, before anything else.
        k: draws from the k likeliest tokens. Source: Fan et al. 2018, section 5.4.
        p: draws from the fewest of these tokens that have at least probability p together. Source: Holtzman et al.
            2019, section 3.1.
        min_p: draws from the tokens that have at least min_p of the likeliest token's probability. Source: Nguyen et
            al. 2024, section 3.
    """
    size = logits.shape[-1]
    logits, tokens = tf.math.top_k(logits, size if k is None else tf.minimum(k, size))
    # The largest is subtracted before the division, which with a small temperature would overflow.
    probabilities = tf.nn.softmax((logits - logits[:, :1]) / temperature)
    cumulative = tf.cumsum(probabilities, axis=-1)
    total = cumulative[:, -1:]
    # The likeliest token is the first, so each condition holds for the first tokens of a row.
    if p is not None:
        total = _up_to(cumulative, cumulative - probabilities < p)  # The likelier tokens do not reach p without this.
    if min_p is not None:
        total = tf.minimum(total, _up_to(cumulative, probabilities >= min_p * probabilities[:, :1]))
    place = tf.reduce_sum(tf.cast(cumulative <= total * at[:, tf.newaxis], tf.int32), axis=-1)
    # If probabilities are NaN, no comparison is true, so the place is 0, which exists.
    return tf.gather(tokens, place, batch_dims=1)


def _up_to(cumulative: tf.Tensor, is_drawn: tf.Tensor) -> tf.Tensor:
    return tf.reduce_max(tf.where(is_drawn, cumulative, 0.0), axis=-1, keepdims=True)


def uniform(seed: tf.Tensor, samples: tf.Tensor) -> tf.Tensor:
    """Returns a number in [0, 1) for each row: float32 [rows]. It depends on the seed and on the row's sample only, not
    on the other rows, because a shorter draw of the generator is the beginning of a longer one.

    Args:
        seed: int64 [2].
        samples: int32 [rows], at least 0: which of the texts of the same prompt a row is.
    """
    return tf.gather(tf.random.stateless_uniform([tf.reduce_max(samples) + 1], seed), samples)


def penalize_repetition(logits: tf.Tensor, seen: tf.Tensor, penalty: float) -> tf.Tensor:
    """Returns the logits with a penalty on tokens that were seen: positive logits are divided by it, negative ones are
    multiplied.

    Args:
        logits: float32 [rows, vocabulary].
        seen: int32 [rows, any], tokens, in any order, as often as they come; the size of the vocabulary stands for
            none.
        penalty: more than 1 makes seen tokens less likely.

    Source: Keskar et al. 2019, section 4.1; for negative logits the code of transformers.
    """
    rows, vocabulary_size = tf.shape(logits)[0], logits.shape[-1]
    places = tf.stack([tf.broadcast_to(tf.range(rows)[:, tf.newaxis], tf.shape(seen)), seen], axis=-1)
    count = tf.scatter_nd(places, tf.ones_like(seen), [rows, vocabulary_size + 1])[:, :vocabulary_size]
    penalized = tf.where(logits < 0, logits * penalty, logits / penalty)
    return tf.where(count > 0, penalized, logits)


def best_beams(
    logits: tf.Tensor, scores: tf.Tensor, lengths: tf.Tensor | None = None, length_penalty: float = 0.0
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Picks the best of all continuations of a text's beams by one token, one for each beam, the best first.

    Args:
        logits: float32 [texts * beams, vocabulary], the beams of a text one after the other.
        scores: float32 [texts, beams], the logarithm of each beam's probability.
        lengths: int32 [texts * beams], the number of tokens that each beam will have chosen; read only if there is a
            length_penalty.
        length_penalty: the best beam is the one with the largest score / length ** length_penalty: more than 0 prefers
            longer texts, 0 the likeliest text. Source: Wu et al. 2016, section 7, the first of their two forms, which
            transformers has as well.

    Returns:
        (origins int32 [texts * beams], the row that each new beam continues; tokens int32 [texts * beams], its new
        token; scores float32 [texts, beams], not divided).
    """
    num_beams, vocabulary_size = scores.shape[1], logits.shape[1]
    each = tf.reshape(tf.nn.log_softmax(logits), [-1, num_beams, vocabulary_size]) + scores[:, :, tf.newaxis]
    each = tf.reshape(each, [-1, num_beams * vocabulary_size])
    if length_penalty:
        assert lengths is not None
        divisors = tf.cast(tf.maximum(lengths, 1), tf.float32) ** length_penalty
        divided = tf.reshape(each, [-1, num_beams, vocabulary_size]) / tf.reshape(divisors, [-1, num_beams, 1])
        _, places = tf.math.top_k(tf.reshape(divided, [-1, num_beams * vocabulary_size]), num_beams)
        scores = tf.gather(each, places, batch_dims=1)
    else:
        scores, places = tf.math.top_k(each, num_beams)
    first_rows = tf.range(tf.shape(scores)[0])[:, tf.newaxis] * num_beams
    origins, tokens = first_rows + places // vocabulary_size, places % vocabulary_size
    return tf.reshape(origins, [-1]), tf.reshape(tokens, [-1]), scores
