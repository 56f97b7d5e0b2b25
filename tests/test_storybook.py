"""Laws of the storybook: its stories and their probabilities are the same everywhere, and keep form."""

import functools
import hashlib
import itertools
import json
import re
import struct
from collections import Counter

import pytest

from trainer.storybook import storybook
from trainer.storybook.entropy import entropy, max_tokens
from trainer.storybook.grammar import read_rules
from trainer.storybook.storybook import CLOSING, GRAMMAR_FILE


@functools.cache
def some_stories(num_stories=1000):
    return list(storybook.stories(0, num_stories))


def words_of(symbol):
    rules = read_rules(GRAMMAR_FILE.read_text("utf-8"), GRAMMAR_FILE)
    return {one.template for one in rules[symbol].alternatives}


def test_stories_are_the_same_on_every_machine():
    digest = hashlib.sha256("\n".join(some_stories()).encode()).hexdigest()
    # A changed grammar changes this, and with it every number measured on stories: add a line to CHANGELOG.md.
    assert digest == "066ca9d19ae257feaabf770252ab4ed4f26e5824559fbdf67a9ec0d71983d979"


def test_probabilities_and_entropy_are_the_same_to_the_last_bit():
    log_probabilities = [storybook.log_probability(text) for text in some_stories()]
    digest = hashlib.sha256(struct.pack(f"<{len(log_probabilities)}d", *log_probabilities)).hexdigest()
    assert digest == "b6b209f62c7844c91f3426025ad89b9a10e90012d9958b1f90e1a06302df4e89"
    assert entropy(storybook.built_in_grammar()).hex() == "0x1.9b3450acd19a6p+5"
    assert max_tokens(storybook.built_in_grammar()) == 118


def test_the_recipe_is_the_same_whatever_the_head_of_the_grammar_explains():
    # It names prepared folders: if it changes, every prepared storybook is prepared again.
    digest = hashlib.sha256(json.dumps(storybook.recipe(7, 100)).encode()).hexdigest()
    assert digest == "4393143f200547afa82975d025a082ef5ceb9cb1c4ca984098803952ec18ba8f"


def test_no_story_is_longer_than_the_longest():
    longest = max_tokens(storybook.built_in_grammar())
    assert longest <= 120
    lengths = [len(text.split()) for text in some_stories(5000)]
    assert 50 <= min(lengths) <= max(lengths) <= longest
    assert 75 <= sum(lengths) / len(lengths) <= 95


def test_lower_casing_and_splitting_leave_a_story_as_it_is():
    for text in some_stories():
        assert text == text.lower() == " ".join(re.findall(r"\w+|[^\w\s]", text))
        assert set(text) <= set('abcdefghijklmnopqrstuvwxyz .,!?"')
        assert text.count('"') % 2 == 0


def test_the_closing_is_at_the_end_and_nowhere_else():
    for text in some_stories():
        assert text.endswith(f" {CLOSING}")
        assert text.count(CLOSING) == 1


def test_another_name_later_is_not_a_story():
    names = words_of("girl") | words_of("boy")
    for text in some_stories()[:200]:
        words = text.split()
        last = max(position for position, word in enumerate(words) if word in names)
        other = min(names - {words[last]})
        with pytest.raises(ValueError, match=f"token {last} is '{other}'"):
            storybook.log_probability(" ".join([*words[:last], other, *words[last + 1 :]]))


def test_the_hero_comes_back_and_pronouns_agree():
    girls, boys = words_of("girl"), words_of("boy")
    women = words_of("friend_girl") | {"grandmother", "mother", "aunt", "teacher"}
    men = words_of("friend_boy") | {"grandfather", "father", "uncle", "neighbor"}
    for text in some_stories():
        told = re.sub(r'" [^"]* "', "", text).split()  # Speech may be about others.
        hero = next(word for word in told if word in girls | boys)
        assert Counter(text.split())[hero] >= 2, text
        mine, others = ({"she", "her"}, {"he", "him", "his"})[:: 1 if hero in girls else -1]
        pronouns = [word for word in told if word in mine | others]
        assert not pronouns or pronouns[0] in mine, text
        if others & set(pronouns):
            assert (men if hero in girls else women) & set(told), text


def test_articles_fit_the_word_after_them():
    for text in some_stories(5000):
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text), text


def test_words_and_sentences_are_many_and_no_word_is_rare():
    texts = some_stories(5000)
    num_stories_with = Counter(itertools.chain.from_iterable(set(text.split()) for text in texts))
    assert 400 <= len(num_stories_with) <= 900
    assert min(num_stories_with.values()) >= 4
    sentences = {sentence for text in texts for sentence in re.findall(r"[^.!?]+[.!?]", text)}
    assert len(sentences) >= 3000
