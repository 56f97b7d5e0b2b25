"""Laws of the entropy: it is the mean of -log p over all texts; the longest text is the longest drawn."""

import math

import pytest
from toy_grammar import toy, toy_counts  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.storybook import storybook
from trainer.storybook.entropy import entropy, max_tokens


def test_entropy_and_max_tokens_are_those_of_all_texts():
    log_probabilities = [toy().log_probability(text) for text in toy_counts()]
    assert entropy(toy()) == pytest.approx(-math.fsum(math.exp(p) * p for p in log_probabilities), rel=1e-12)
    assert max_tokens(toy()) == max(len(text.split()) for text in toy_counts())


def test_entropy_of_the_storybook_is_the_mean_of_its_stories():
    nats = [-storybook.log_probability(text) for text in storybook.stories(0, 4000)]
    mean = math.fsum(nats) / len(nats)
    standard_error = math.sqrt(math.fsum((n - mean) ** 2 for n in nats)) / len(nats)
    assert abs(mean - entropy(storybook.built_in_grammar())) < 4 * standard_error
