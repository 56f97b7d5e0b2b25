"""Laws of the engine: texts are drawn as often as their probability states, and read back to the choices made."""

import itertools
import math
import random

import pytest
from toy_grammar import toy, toy_counts  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.storybook import storybook
from trainer.storybook.engine import Grammar, NotDerived
from trainer.storybook.printing import printed


def test_probabilities_of_all_texts_sum_to_one():
    # A sum of 1 also shows that sampling has met every text.
    assert math.fsum(math.exp(toy().log_probability(text)) for text in toy_counts()) == pytest.approx(1, abs=1e-12)


def test_texts_are_drawn_as_often_as_their_probability_states():
    num_texts = toy_counts().total()
    for text, count in toy_counts().items():
        probability = math.exp(toy().log_probability(text))
        assert abs(count / num_texts - probability) < 4.5 * math.sqrt(probability * (1 - probability) / num_texts), text


@pytest.mark.parametrize("seed", range(2))
def test_parser_recovers_the_one_derivation_that_was_drawn(seed):
    grammar = storybook.built_in_grammar()
    for index in range(500):
        text = grammar.sample(random.Random(f"{seed}/{index}"))
        drawn = grammar.sample_derivation(random.Random(f"{seed}/{index}"))
        assert printed(text.split(" ")) == storybook.story(seed, index)
        assert list(grammar.derivations(text)) == [drawn]
        assert grammar.parse(text) == drawn
        assert grammar.render(drawn) == text


def test_a_story_depends_on_its_seed_and_index_only():
    assert storybook.story(0, 7) == list(storybook.stories(0, 8))[7]
    assert list(storybook.stories(0, 0)) == []
    assert len({storybook.story(seed, index) for seed, index in itertools.product(range(10), range(10))}) == 100


def test_a_changed_token_is_not_a_text_and_is_named():
    source = random.Random(1)
    for index in range(200):
        words = storybook.built_in_grammar().sample(random.Random(index)).split(" ")
        position = source.randrange(len(words))
        words[position] = "zebra"
        with pytest.raises(
            NotDerived, match=rf"^not a text of the grammar: token {position} is 'zebra', after '"
        ) as error:
            storybook.built_in_grammar().log_probability(" ".join(words))
        assert error.value.position == position


def test_a_text_that_stops_early_or_goes_on_is_not_a_text():
    text = toy().sample(random.Random(0))
    num_tokens = len(text.split())
    for changed, stands in (
        (text.rpartition(" ")[0], f"it stops at {num_tokens - 1}, after "),
        (f"{text} the", f"token {num_tokens} is 'the', after "),
        ("", "token 0 is '', after ''"),
        (f"{text} ", f"token {num_tokens} is '', after "),
    ):
        with pytest.raises(NotDerived, match=stands):
            toy().log_probability(changed)


def test_two_derivations_of_a_text_are_found_and_refused():
    grammar = Grammar("story\n    <one> <two>\none\n    x\n    x y\ntwo\n    y z\n    z")
    assert len(list(grammar.derivations("x y z"))) == 2
    with pytest.raises(ValueError, match="the text 'x y z' is ambiguous"):
        grammar.log_probability("x y z")
    assert grammar.log_probability("x z") == pytest.approx(math.log(1 / 4))
