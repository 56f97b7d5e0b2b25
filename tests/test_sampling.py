"""Laws of how a token is picked from logits."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.decoding.sampling import best_beams, draw, most_likely, penalize_repetition, uniform

ROWS = 100_000
AT = uniform(tf.constant([5, 7], tf.int64), tf.range(ROWS))
# Not in order, and one is impossible.
PROBABILITIES = np.array([0.08, 0.0, 0.4, 0.02, 0.3, 0.2])


def logits_of(probabilities, rows=ROWS):
    with np.errstate(divide="ignore"):
        return tf.constant(np.tile(np.log(probabilities), (rows, 1)), tf.float32)


def check_frequencies(tokens, expected):
    """Checks counts of tokens by a chi-square test: no more than once in 100,000 would chance fail it."""
    counts = np.bincount(tokens, minlength=len(expected))
    is_possible = expected > 0
    assert counts[~is_possible].sum() == 0
    wanted = expected[is_possible] * len(tokens)
    chi_square = np.sum((counts[is_possible] - wanted) ** 2 / wanted)
    # The quantiles of 1 to 5 degrees of freedom.
    assert chi_square <= [0, 19.5, 23.0, 25.9, 28.5, 30.9][is_possible.sum() - 1]


def drawn_from(tokens, temperature=1.0, probabilities=PROBABILITIES):
    """Returns the probabilities of some tokens at a temperature, and 0 for the others."""
    expected = np.zeros_like(probabilities)
    expected[tokens] = probabilities[tokens] ** (1 / temperature)
    return expected / expected.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("cuts", "drawn"),
    [
        ({}, [0, 2, 3, 4, 5]),
        ({"k": 3}, [2, 4, 5]),
        ({"k": 100}, [0, 2, 3, 4, 5]),
        ({"p": 1.0}, [0, 2, 3, 4, 5]),
        ({"min_p": 1e-3}, [0, 2, 3, 4, 5]),
    ],
    ids=["random", "top 3", "top 100", "top-p of all", "min-p of all"],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(cuts, drawn, temperature):
    check_frequencies(draw(logits_of(PROBABILITIES), AT, temperature, **cuts), drawn_from(drawn, temperature))


@pytest.mark.parametrize(("p", "drawn"), [(1e-6, [2]), (0.39, [2]), (0.41, [2, 4]), (0.69, [2, 4]), (0.71, [2, 4, 5])])
def test_top_p_draws_the_fewest_tokens_that_reach_p_as_often_as_they_are_likely(p, drawn):
    check_frequencies(draw(logits_of(PROBABILITIES), AT, p=p), drawn_from(drawn))


@pytest.mark.parametrize(
    ("min_p", "temperature", "drawn"),
    [
        (1.0, 1.0, [2]),
        (0.76, 1.0, [2]),
        (0.74, 1.0, [2, 4]),
        (0.51, 1.0, [2, 4]),
        (0.49, 1.0, [2, 4, 5]),
        (0.19, 1.0, [0, 2, 4, 5]),
        # At temperature 2 the shares are their square roots: 0.2 of the likeliest is 0.45.
        (0.46, 2.0, [2, 4, 5]),
        (0.44, 2.0, [0, 2, 4, 5]),
    ],
)
def test_min_p_draws_tokens_with_that_share_of_the_likeliest_one_s_probability(min_p, temperature, drawn):
    tokens = draw(logits_of(PROBABILITIES), AT, temperature, min_p=min_p)
    check_frequencies(tokens, drawn_from(drawn, temperature))


@pytest.mark.parametrize(
    ("cuts", "drawn"),
    [
        # 0.4, 0.3 and 0.2 are 4/9, 3/9 and 2/9 of what k=3 leaves, and p counts these.
        ({"k": 3, "p": 0.77}, [2, 4]),
        ({"k": 3, "p": 0.79}, [2, 4, 5]),
        ({"p": 0.77}, [2, 4, 5]),
        ({"p": 0.77, "min_p": 0.74}, [2, 4]),
        ({"k": 1, "p": 1.0, "min_p": 0.01}, [2]),
        ({"k": 4, "p": 0.99, "min_p": 0.4}, [2, 4, 5]),
    ],
)
def test_cuts_combine_k_first_then_p_then_min_p(cuts, drawn):
    check_frequencies(draw(logits_of(PROBABILITIES), AT, **cuts), drawn_from(drawn))


def test_a_repeated_token_is_drawn_less_often_whatever_the_sign_of_its_logit():
    logits = np.array([2.0, -1.0, 0.0, 0.5, -np.inf, 1.0])
    expected = np.exp([2.0 / 1.5, -1.0 * 1.5, 0.0, 0.5, -np.inf, 1.0])
    seen = tf.tile([[0, 6, 1, 0, 4]], [ROWS, 1])  # 6: none.
    penalized = penalize_repetition(tf.constant(np.tile(logits, (ROWS, 1)), tf.float32), seen, 1.5)
    check_frequencies(draw(penalized, AT), expected / expected.sum())
    none = tf.fill([1, 3], 6)
    np.testing.assert_array_equal(penalize_repetition(tf.constant([logits], tf.float32), none, 9.0)[0], logits)


def test_a_row_draws_by_its_sample_alone():
    seed = tf.constant([5, 7], tf.int64)
    numbers = uniform(seed, tf.range(50)).numpy()
    for samples in ([0], [3, 1, 3], [49, 0], list(range(20))):
        np.testing.assert_array_equal(uniform(seed, tf.constant(samples)), numbers[samples])
    assert len(set(numbers)) == 50 and (uniform(seed + 1, tf.range(50)).numpy() != numbers).all()
    logits = tf.random.stateless_normal([50, 30], seed=[0, 0])
    tokens = draw(logits, numbers, p=0.9).numpy()
    np.testing.assert_array_equal(draw(logits[20:30], numbers[20:30], p=0.9), tokens[20:30])


def test_the_smallest_temperature_leaves_the_likeliest():
    logits = tf.constant([[3.0, 1e4, -np.inf, 9e3], [0.5, -2.0, 0.4, 0.0]])
    at = tf.constant([0.999, 0.999])
    for tokens in (draw(logits, at, 1e-30, k=4), draw(logits, at, 1e-30), most_likely(logits)):
        np.testing.assert_array_equal(tokens, [1, 0])


def test_beams_continue_with_the_likeliest_of_all_continuations():
    rng = np.random.default_rng(0)
    num_texts, num_beams, vocabulary_size = 3, 4, 7
    logits = rng.normal(size=(num_texts * num_beams, vocabulary_size))
    scores = rng.normal(size=(num_texts, num_beams))
    scores[1, 1:] = -np.inf  # Beams that are none yet.
    each = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) + scores.reshape(-1, 1)
    origins, tokens, best = best_beams(tf.constant(logits, tf.float32), tf.constant(scores, tf.float32))
    for text in range(num_texts):
        rows = range(text * num_beams, (text + 1) * num_beams)
        ways = sorted(
            ((each[row, token], row, token) for row in rows for token in range(vocabulary_size)), reverse=True
        )
        picked = zip(best[text].numpy(), origins.numpy()[rows], tokens.numpy()[rows], strict=True)
        for (score, *way), (found, *place) in zip(ways, picked, strict=False):
            assert place == way
            assert found == pytest.approx(score, rel=1e-5)
