"""The storybook: the stories of grammar.txt as they are printed, and the exact probability of each."""

import functools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.storybook.engine import Grammar, NotDerived
from trainer.storybook.printing import PIECE, forms, printed, tokens_of

GRAMMAR_FILE = Path(__file__).with_name("grammar.txt")
CLOSING = "The end."
_CONTEXT_WORDS = 4  # How many words a verdict shows before the place where a text leaves the grammar.


@functools.cache
def built_in_grammar() -> Grammar:
    """Returns the grammar of grammar.txt, read when it is first needed.

    Raises:
        UserError: as `Grammar`.
    """
    return Grammar(GRAMMAR_FILE.read_text("utf-8"), GRAMMAR_FILE)


def story(seed: int, index: int) -> str:
    """Returns a story, a function of its arguments only: one line, printed as in a book."""
    return printed(built_in_grammar().sample(random.Random(f"{seed}/{index}")).split(" "))


def stories(seed: int, num_stories: int) -> Iterator[str]:
    """Yields the stories from story(seed, 0) on."""
    return (story(seed, index) for index in range(num_stories))


def log_probability(text: str) -> float:
    """Returns the exact log-probability of a story in nats.

    Raises:
        ValueError: the text is not a story of the storybook; names the first word at which no story continues.
    """
    nats, remark = _read(text, lambda tokens: (printed(tokens),))
    if remark:
        raise ValueError(f"not a story: the text {remark}.")
    return nats


def verdict(text: str) -> str:
    """Returns a remark on a text: it is a whole story of the storybook's grammar, or the start of one, or here is the
    first word at which no story continues. A text as WordPiece decodes it, which loses spaces and may lose capitals, is
    a story by its words.
    """
    # Release 0.1.0 printed stories as the last of these forms; `report` judges the samples of its runs, too.
    _, remark = _read(text, lambda tokens: (*forms(tokens), " ".join(tokens).lower()))
    return remark or "a story of the storybook's grammar"


def _read(text: str, forms_of: Callable[[list[str]], tuple[str, ...]]) -> tuple[float, str]:
    """Returns the log-probability of a story, and what there is to say if a text is none.

    Args:
        text: the text.
        forms_of: returns the texts that are allowed to stand for some tokens.
    """
    grammar = built_in_grammar()
    tokens = tokens_of(text, grammar.spelling)
    nats = -math.inf
    try:
        nats = grammar.log_probability(" ".join(tokens))
    except NotDerived as error:
        tokens = tokens[: error.position]
    allowed = forms_of(tokens)
    if nats > -math.inf and text in allowed:
        return nats, ""
    num_read = max(map(functools.partial(_num_common, text), allowed))
    # The first word or mark that is not read to its end, or else the white space that the text ends with.
    found = next((each for each in PIECE.finditer(text) if each.end() > num_read), None)
    place, word = (found.start(), found[0]) if found else (num_read, text[num_read:])
    before = " ".join(text[:place].split()[-_CONTEXT_WORDS:])
    begins = "begins as a story of the storybook's grammar, and stops"
    if not word:
        return -math.inf, f"{begins} after {before!r}"
    where = f"after {before!r}" if before else "its first word"
    if _is_cut_in_its_last_word(text, forms_of):
        return -math.inf, f"{begins} within a word, at {word!r}, {where}"
    return -math.inf, f"leaves the storybook's grammar at {word!r}, {where}"


def _is_cut_in_its_last_word(text: str, forms_of: Callable[[list[str]], tuple[str, ...]]) -> bool:
    """Returns whether a text whose last word is in no story is the start of one if this word gets more letters: what
    writes a sample may stop between two tokens of a word. For the arguments see `_read`.
    """
    grammar = built_in_grammar()
    tokens = tokens_of(text, grammar.spelling)
    last = "".join(tokens[-1:]).lower()
    for folded, word in grammar.spelling.items():
        if not last or not folded.startswith(last):
            continue
        longer = [*tokens[:-1], word]
        try:
            grammar.log_probability(" ".join(longer))
        except NotDerived as error:
            if error.position < len(longer):
                continue
        if any(form.startswith(text) for form in forms_of(longer)):
            return True
    return False


def _num_common(text: str, other: str) -> int:
    """Returns how many characters two texts begin with together."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, another) in pairs if one != another), min(len(text), len(other)))


def recipe(seed: int, num_stories: int) -> list[str | int]:
    """Returns what identifies num_stories stories of a seed: the grammar, a story in case the way of drawing one
    changes, and the arguments. The head of the grammar's file only explains the notation, so it does not count.
    """
    text = GRAMMAR_FILE.read_text("utf-8")
    return [text[text.index("\n\n") + 1 :], story(seed, 0), seed, num_stories]
