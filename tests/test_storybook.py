"""Laws of the storybook: what its grammar says is what is written, read back and counted."""

import functools
import itertools
import math
import random
from collections import Counter

import pytest

from trainer.storybook import storybook
from trainer.storybook.storybook import Grammar, read_rules

# Every kind of notation: weights, kept values, attributes, selection, and lengths that depend on earlier choices.
TOY = """
# children and caps
story
    2 * <hero:child> lost $hero.his cap <place:place> . <found/$place.kind>
    <cap> <ending>
child
    <girl>
    2 * tom | he=he, his=his
girl | he=she, his=her
    mia
    3 * little anna
place
    by the lake | kind=water
    3 * in the park | kind=green, name=park
    at home | kind=green, name=very old house
cap
    a cap for <owner:girl> .
    a cap for <owner:girl> , said <friend:girl> .
ending
    the cap of $owner was $owner.his <size> treasure .
size
    big
    small
found/water
    $hero fished it out .
    2 * $hero.he got wet , poor $hero .
found/green
    it lay in the $place.name !
"""


@functools.cache
def toy():
    return Grammar(read_rules(TOY))


@functools.cache
def toy_counts():
    source = random.Random(0)
    return Counter(toy().sample(source) for _ in range(20_000))


@functools.cache
def some_stories(num_stories=1000):
    return list(storybook.stories(0, num_stories))


def test_probabilities_of_all_texts_sum_to_one():
    # A sum of 1 also says that sampling has met every text.
    assert math.fsum(math.exp(toy().log_probability(text)) for text in toy_counts()) == pytest.approx(1, abs=1e-12)


def test_texts_are_drawn_as_often_as_their_probability_says():
    num_texts = toy_counts().total()
    for text, count in toy_counts().items():
        probability = math.exp(toy().log_probability(text))
        assert abs(count / num_texts - probability) < 4.5 * math.sqrt(probability * (1 - probability) / num_texts), text


def test_entropy_and_max_tokens_are_those_of_all_texts():
    log_probabilities = [toy().log_probability(text) for text in toy_counts()]
    assert toy().entropy() == pytest.approx(-math.fsum(math.exp(p) * p for p in log_probabilities), rel=1e-12)
    assert toy().max_tokens() == max(len(text.split()) for text in toy_counts())


def test_entropy_of_the_storybook_is_the_mean_of_its_stories():
    nats = [-storybook.log_probability(text) for text in some_stories(4000)]
    mean = math.fsum(nats) / len(nats)
    standard_error = math.sqrt(math.fsum((n - mean) ** 2 for n in nats)) / len(nats)
    assert abs(mean - storybook.STORYBOOK.entropy()) < 4 * standard_error


@pytest.mark.parametrize("seed", range(2))
def test_parser_recovers_the_one_derivation_that_was_drawn(seed):
    grammar = storybook.STORYBOOK
    for index in range(500):
        text = storybook.story(seed, index)
        drawn = grammar.sample_derivation(random.Random(f"{seed}/{index}"))
        assert list(grammar.derivations(text)) == [drawn]
        assert grammar.parse(text) == drawn
        assert grammar.render(drawn) == text


def test_a_story_depends_on_its_seed_and_index_alone():
    assert storybook.story(0, 7) == list(storybook.stories(0, 8))[7]
    assert list(storybook.stories(0, 0)) == []
    assert len({storybook.story(seed, index) for seed, index in itertools.product(range(10), range(10))}) == 100


def test_a_changed_word_is_no_story_and_is_named():
    source = random.Random(1)
    for text in some_stories()[:200]:
        words = text.split()
        position = source.randrange(len(words))
        words[position] = "zebra"
        with pytest.raises(ValueError, match=rf"^not a text of the grammar: token {position} is 'zebra', after '"):
            storybook.log_probability(" ".join(words))


def test_a_story_that_stops_early_or_goes_on_is_no_story():
    text = storybook.story(0, 0)
    num_tokens = len(text.split())
    with pytest.raises(ValueError, match=f"it stops at {num_tokens - 1}, after "):
        storybook.log_probability(text.removesuffix(" ."))
    with pytest.raises(ValueError, match=f"token {num_tokens} is 'the', after "):
        storybook.log_probability(f"{text} the")
    with pytest.raises(ValueError, match="token 0 is '', after ''"):
        storybook.log_probability("")
    with pytest.raises(ValueError, match=f"token {num_tokens} is '', after "):
        storybook.log_probability(f"{text} ")


def test_two_derivations_of_a_text_are_seen_and_refused():
    grammar = Grammar({"story": ["<one> <two>"], "one": ["x", "x y"], "two": ["y z", "z"]})
    assert len(list(grammar.derivations("x y z"))) == 2
    with pytest.raises(ValueError, match="the text 'x y z' is ambiguous"):
        grammar.log_probability("x y z")
    assert grammar.log_probability("x z") == pytest.approx(math.log(1 / 4))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"story": ["once <upon>"]}, "symbol 'upon', used in 'story', is undefined"),
        ({"tale": ["once"]}, "symbol 'story', used in 'start', is undefined"),
        ({"story": ["once"], "time": ["now"]}, r"nothing uses \['time'\]"),
        ({"story": ["<x:a>"], "a": ["by | kind=b"], "a/b": ["now"]}, r"nothing uses \['a/b'\]"),
        ({"story": ["$hero ran"]}, r"variable \$hero is not surely kept where '\$hero ran' of 'story' reads it"),
        ({"story": ["<a> $x"], "a": ["<x:b>", "no"], "b": ["yes"]}, r"variable \$x is not surely kept"),
        ({"story": ["<see/$x.kind> <x:a>"], "a": ["by | kind=b"], "see/b": ["now"]}, r"\$x is not surely kept"),
        ({"story": ["<x:a> <x:a>"], "a": ["one", "two"]}, r"variable \$x is kept again, as 'a'"),
        ({"story": ["<x:a> $x.his"], "a": ["mia | his=her", "tom"]}, "'tom' has no attribute 'his', which"),
        ({"story": ["<x:a> <see/$x.kind>"], "a": ["by | kind=b"]}, "symbol 'see/b', which .x can select, is undefined"),
        ({"story": ["once", "3 * once"]}, "symbol 'story' has the alternative 'once' twice"),
        (
            {"story": ["<x:a>"], "a": ["red <b>", "red cap"], "b": ["cap"]},
            "symbol 'a' has the alternative 'red cap' tw",
        ),
        (
            {"story": ["<x:a>"], "a": ["red <y:b>"], "b": ["cap"]},
            "symbol 'a' is kept in a variable, so 'red <y:b>' may",
        ),
        ({"story": ["a <b>"], "b": ["<c>"], "c": ["no <b>"]}, "a symbol may not contain itself: "),
        ({"story": [""]}, "symbol 'story' has an empty alternative"),
        ({"story": []}, "symbol 'story' has no alternatives"),
        ({"story": ["Once"]}, "cannot read 'Once' in symbol 'story'"),
        ({"story": ["once  upon"]}, "cannot read '' in symbol 'story'"),
        ({"story": ["don't"]}, "cannot read \"don't\" in symbol 'story'"),
        ({"story": ["<a/b/c>"]}, "cannot read '<a/b/c>' in symbol 'story'"),
        ({"story": ["once | kind"]}, "cannot read the attribute 'kind' in symbol 'story'"),
        ({"story 1": ["once"]}, "cannot read the symbol 'story 1'"),
        ({"story": ["once"], "story | kind=b": ["now"]}, "symbol 'story' is defined twice"),
    ],
)
def test_a_malformed_grammar_is_refused_by_name(rules, message):
    with pytest.raises(ValueError, match=message):
        Grammar(rules)


def test_a_malformed_grammar_text_is_refused_by_name():
    with pytest.raises(ValueError, match="the alternative 'once' has no symbol above it"):
        read_rules("    once")
    with pytest.raises(ValueError, match="symbol 'story' is defined twice"):
        read_rules("story\n    once\nstory\n    now")


def test_only_the_storybook_is_made_on_demand():
    assert storybook.STORYBOOK is storybook.STORYBOOK
    with pytest.raises(AttributeError, match="has no attribute 'STORYBOOKS'"):
        _ = storybook.STORYBOOKS
