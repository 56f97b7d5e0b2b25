"""Laws of how a token is picked from logits."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.decoding.sampling import best_beams, draw_top_k, draw_top_p, most_likely

ROWS = 20_000
SEED = tf.constant([5, 7], tf.int64)
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


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("draw", "drawn"),
    [
        (lambda logits, temperature: draw_top_k(logits, 3, temperature, SEED), [2, 4, 5]),
        (lambda logits, temperature: draw_top_k(logits, 100, temperature, SEED), [0, 2, 3, 4, 5]),
        (lambda logits, temperature: draw_top_p(logits, 1.0, temperature, SEED), [0, 2, 3, 4, 5]),
    ],
    ids=["top 3", "top 100", "all"],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(draw, drawn, temperature):
    expected = np.zeros_like(PROBABILITIES)
    expected[drawn] = PROBABILITIES[drawn] ** (1 / temperature)
    check_frequencies(draw(logits_of(PROBABILITIES), temperature), expected / expected.sum())


@pytest.mark.parametrize(("p", "drawn"), [(1e-6, [2]), (0.39, [2]), (0.41, [2, 4]), (0.69, [2, 4]), (0.71, [2, 4, 5])])
def test_top_p_draws_the_fewest_tokens_that_reach_p_as_often_as_they_are_likely(p, drawn):
    expected = np.zeros_like(PROBABILITIES)
    expected[drawn] = PROBABILITIES[drawn]
    check_frequencies(draw_top_p(logits_of(PROBABILITIES), p, 1.0, SEED), expected / expected.sum())


@pytest.mark.parametrize("draw", [draw_top_k, draw_top_p])
def test_a_row_draws_the_same_whatever_rows_come_after_it(draw):
    logits = tf.random.stateless_normal([50, 30], seed=[0, 0])
    most = 30 if draw is draw_top_k else 1.0
    tokens = draw(logits, most, 1.0, SEED).numpy()
    for rows in (1, 3, 4, 49):
        np.testing.assert_array_equal(draw(logits[:rows], most, 1.0, SEED), tokens[:rows])
    assert (draw(logits, most, 1.0, SEED + 1).numpy() != tokens).any()


def test_the_smallest_temperature_leaves_the_likeliest():
    logits = tf.constant([[3.0, 1e4, -np.inf, 9e3], [0.5, -2.0, 0.4, 0.0]])
    for tokens in (draw_top_k(logits, 4, 1e-30, SEED), draw_top_p(logits, 1.0, 1e-30, SEED), most_likely(logits)):
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
