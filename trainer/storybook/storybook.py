"""The storybook: the stories of grammar.txt, and the exact probability of each."""

import functools
import random
from collections.abc import Iterator
from pathlib import Path

from trainer.storybook.engine import Grammar

GRAMMAR_FILE = Path(__file__).with_name("grammar.txt")
CLOSING = "the end ."


@functools.cache
def built_in_grammar() -> Grammar:
    """Returns the grammar of grammar.txt, read when it is first needed.

    Raises:
        UserError: as `Grammar`.
    """
    return Grammar(GRAMMAR_FILE.read_text("utf-8"), GRAMMAR_FILE)


def story(seed: int, index: int) -> str:
    """Returns a story, a function of its arguments only: one line, lower-case, one space between tokens."""
    return built_in_grammar().sample(random.Random(f"{seed}/{index}"))


def stories(seed: int, num_stories: int) -> Iterator[str]:
    """Yields the stories from story(seed, 0) on."""
    return (story(seed, index) for index in range(num_stories))


def log_probability(text: str) -> float:
    """Returns the exact log-probability of a story in nats.

    Raises:
        ValueError: the text is not a story of the storybook; names the first token at which no story continues.
    """
    return built_in_grammar().log_probability(text)


def verdict(text: str) -> str:
    """Returns a remark on a text: it is a whole story of the storybook's grammar, or it leaves the grammar here."""
    try:
        log_probability(text)
    except ValueError as error:
        return f"leaves the storybook's grammar: {str(error).split(': ', 1)[1].split(', after', 1)[0]}"
    return "a story of the storybook's grammar"


def recipe(seed: int, num_stories: int) -> list[str | int]:
    """Returns what identifies num_stories stories of a seed: the grammar, a story in case the way of drawing one
    changes, and the arguments. The head of the grammar's file only explains the notation, so it does not count.
    """
    text = GRAMMAR_FILE.read_text("utf-8")
    return [text[text.index("\n\n") + 1 :], story(seed, 0), seed, num_stories]
