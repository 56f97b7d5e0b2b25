"""The notation of a grammar: from its text to rules, with a check of each line.

The head of grammar.txt explains the notation. What lines mean together is checked by linker.py.
"""

import functools
import itertools
import math
import re
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trainer.errors import UserError

# Only what splitting at white space and punctuation leaves whole: one token each. Names begin with a capital.
_LETTERS = "(?:[A-Z][a-z]*|[a-z]+)"
_WORD = re.compile(rf'{_LETTERS}|[.,!?"]')
_SYMBOL = r"[a-z_]+(?:/[a-z_]+)?"
_HEAD = re.compile(rf"({_SYMBOL})(?: \| (.+))?")
_ALTERNATIVE = re.compile(r"(?:([1-9][0-9]*) \* )?(.*?)(?: \| (.+))?")
_ATTRIBUTE = re.compile(rf"([a-z_]+)=({_LETTERS}(?: {_LETTERS})*)")
_RECALL = re.compile(r"\$([a-z_]+)(?:\.([a-z_]+))?")
_EXPAND = re.compile(rf"<(?:([a-z_]+):)?(?:({_SYMBOL})|([a-z_]+)/\$([a-z_]+)\.([a-z_]+))>")

ITSELF = ""  # The attribute that holds a kept alternative's own words.

Attributes = dict[str, tuple[str, ...]]


class RandomSource(Protocol):
    """A source of random numbers: the one method of random.Random that is the same in every version of Python."""

    def random(self) -> float:
        """Returns a float in [0, 1)."""
        ...


# Parts and alternatives are compared by identity: they are keys of memos, and equal words in two places differ.
@dataclass(frozen=True, eq=False)
class Words:
    """Words that stand in the text as they are."""

    words: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Recall:
    """The words of an attribute of what a variable keeps: $variable or $variable.attribute."""

    variable: str
    attribute: str


@dataclass(frozen=True, eq=False)
class Expand:
    """A choice: <symbol>, <variable:symbol> or <symbol/$selector>.

    Attributes:
        symbol: the symbol whose alternatives there are; with a selector, the start of its name.
        selector: the attribute whose words complete the symbol's name.
        variable: the variable that keeps the chosen alternative.
    """

    symbol: str
    selector: Recall | None = None
    variable: str | None = None


Part = Words | Recall | Expand


@dataclass(frozen=True, eq=False)
class Alternative:
    """One of the texts that a symbol may become.

    Attributes:
        place: the file and the number of the line.
        template: the line without weight and attributes.
        weight: how likely it is, relative to the symbol's other alternatives.
        parts: what the template is made of.
        attributes: the attributes of its line, and of its symbol's.
    """

    place: str
    template: str
    weight: int
    parts: tuple[Part, ...]
    attributes: Attributes


class Rule:
    """A symbol and its alternatives, with the figures that a choice among them needs.

    Attributes:
        symbol: the symbol.
        place: the file and the number of the symbol's line.
        alternatives: the alternatives.
        cumulative: the sum of the weights up to each alternative.
        log_probabilities: the log-probability of each alternative.

    Raises:
        UserError: an alternative is there twice.
    """

    def __init__(self, symbol: str, place: str, alternatives: Sequence[Alternative]):
        self.symbol, self.place, self.alternatives = symbol, place, tuple(alternatives)
        seen: set[str] = set()
        for one in alternatives:
            if one.template in seen:
                raise UserError(
                    f"{one.place}: symbol {symbol!r} has the alternative {one.template!r} twice; give one more weight."
                )
            seen.add(one.template)
        # Integers: sums of fractions could round differently elsewhere, and a seed would not mean the same stories.
        self.cumulative = list(itertools.accumulate(one.weight for one in alternatives))

    @functools.cached_property
    def log_probabilities(self) -> list[float]:
        """The log-probability of each alternative."""
        return [math.log(one.weight / self.cumulative[-1]) for one in self.alternatives]

    def draw(self, random_source: RandomSource) -> int:
        """Returns the index of an alternative, drawn by weight."""
        return bisect(self.cumulative, random_source.random() * self.cumulative[-1])


def read_rules(text: str, file: object) -> dict[str, Rule]:
    """Reads a grammar's text.

    Args:
        text: the text.
        file: the name of its file, for errors.

    Returns:
        The rule of each symbol, in the order of the text.

    Raises:
        UserError: a line cannot be read, an alternative has no symbol above it, or a symbol or an alternative is there
            twice; the message names the file, the line and what is allowed.
    """
    heads: dict[str, tuple[str, Attributes, list[Alternative]]] = {}
    symbol = None
    for number, line in enumerate(text.splitlines(), start=1):
        content, place = line.strip(), f"{file}:{number}"
        if not content or content.startswith("#"):
            continue
        if content == line.rstrip():
            symbol, shared = _read_head(content, place)
            if symbol in heads:
                raise UserError(f"{place}: symbol {symbol!r} is defined twice; put its alternatives together.")
            heads[symbol] = place, shared, []
        elif symbol is None:
            raise UserError(f"{place}: the alternative {content!r} has no symbol above it; write one.")
        else:
            _, shared, alternatives = heads[symbol]
            alternatives.append(_read_alternative(content, symbol, shared, place))
    for symbol, (place, _, alternatives) in heads.items():
        if not alternatives:
            raise UserError(f"{place}: symbol {symbol!r} has no alternatives; give it one, indented, below it.")
    return {symbol: Rule(symbol, place, alternatives) for symbol, (place, _, alternatives) in heads.items()}


def _read_head(line: str, place: str) -> tuple[str, Attributes]:
    match = _HEAD.fullmatch(line)
    if not match:
        raise UserError(
            f"{place}: cannot read the symbol {line!r}; write letters and _, at most one /, then ` | name=words`."
        )
    return match[1], _read_attributes(match[2], place)


def _read_alternative(line: str, symbol: str, shared: Attributes, place: str) -> Alternative:
    match = _ALTERNATIVE.fullmatch(line)
    if not match or not match[2] or match[2].startswith("|"):
        raise UserError(f"{place}: symbol {symbol!r} has an empty alternative, which no text shows; write words.")
    weight, template, own = match.groups()
    parts: list[Part] = []
    words: list[str] = []
    for token in [*template.split(" "), None]:
        if token is not None and _WORD.fullmatch(token):
            words.append(token)
            continue
        if words:
            parts.append(Words(tuple(words)))
            words = []
        if token is not None:
            parts.append(_read_part(token, place))
    return Alternative(place, template, int(weight or 1), tuple(parts), {**shared, **_read_attributes(own, place)})


def _read_part(token: str, place: str) -> Recall | Expand:
    if match := _RECALL.fullmatch(token):
        return Recall(match[1], match[2] or ITSELF)
    if match := _EXPAND.fullmatch(token):
        variable, whole, prefix, selecting_variable, attribute = match.groups()
        return Expand(whole or prefix, Recall(selecting_variable, attribute) if prefix else None, variable)
    raise UserError(
        f'{place}: cannot read {token!r}; write a word in lower case or a name, one of . , ! ? ", <symbol>, '
        "<variable:symbol>, <symbol/$variable.attribute>, $variable or $variable.attribute, one space between."
    )


def _read_attributes(text: str | None, place: str) -> Attributes:
    attributes: Attributes = {}
    for item in text.split(", ") if text else []:
        match = _ATTRIBUTE.fullmatch(item)
        if not match:
            raise UserError(f"{place}: cannot read the attribute {item!r}; write name=words, and `, ` between two.")
        attributes[match[1]] = tuple(match[2].split(" "))
    return attributes
