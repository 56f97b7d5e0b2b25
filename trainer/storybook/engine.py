"""Draws texts from a grammar, and reads a text back into the choices that it was made of.

Every choice must show in the text. Then a text has one derivation, and its probability is the product of the choices.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from trainer.storybook.grammar import Alternative, Expand, RandomSource, Recall, Rule, Words, read_rules
from trainer.storybook.linker import candidates, link, selected, spelling

# The choices in the order of the text: (symbol, index of its alternative).
Derivation = tuple[tuple[str, int], ...]
# The alternative that each variable keeps.
Bindings = dict[str, Alternative]


class NotDerived(ValueError):
    """A text is not a text of the grammar.

    Attributes:
        position: the first token at which no text continues; the number of tokens if the text stops too early.
    """

    def __init__(self, words: Sequence[str], position: int):
        self.position = position
        stands = f"token {position} is {words[position]!r}" if position < len(words) else f"it stops at {position}"
        super().__init__(f"not a text of the grammar: {stands}, after {' '.join(words[:position])!r}.")


class Grammar:
    """A probabilistic grammar whose texts have an exact probability. A text is its tokens, joined by single spaces;
    printing.py prints it as a book does.

    Args:
        text: the grammar, in the notation that the head of grammar.txt explains.
        file: the name of its file, for errors.
        start: the symbol that every text is derived from.

    Attributes:
        start: the part that every text is derived from.
        rules: the rule of each symbol, after the rules of the symbols that it contains.
        spelling: how the grammar writes each word, by the word in lower case.

    Raises:
        UserError: as `read_rules`, `link` and `spelling`.
    """

    def __init__(self, text: str, file: object = "grammar", start: str = "story"):
        self.start = Expand(start)
        self.rules = link(read_rules(text, file), start)
        self.spelling = spelling(self.rules)
        self._first_words = _first_words(self.rules)

    def sample(self, random_source: RandomSource) -> str:
        """Draws a text."""
        return self._write(lambda rule: rule.draw(random_source))[0]

    def sample_derivation(self, random_source: RandomSource) -> Derivation:
        """Draws the derivation of the text that `sample` would draw from the same source."""
        return self._write(lambda rule: rule.draw(random_source))[1]

    def render(self, derivation: Derivation) -> str:
        """Returns the text of a derivation."""
        choices = iter(derivation)
        return self._write(lambda rule: next(choices)[1])[0]

    def parse(self, text: str) -> Derivation:
        """Returns the one derivation of a text.

        Raises:
            NotDerived: as `derivations`.
            ValueError: the text has more than one derivation.
        """
        found = list(itertools.islice(self.derivations(text), 2))
        if len(found) > 1:
            raise ValueError(f"the text {text!r} is ambiguous, derived as {found[0]} and as {found[1]}.")
        return found[0]

    def log_probability(self, text: str) -> float:
        """Returns the exact log-probability of a text in nats.

        Raises:
            NotDerived: as `derivations`.
            ValueError: as `parse`.
        """
        return math.fsum(self.rules[symbol].log_probabilities[index] for symbol, index in self.parse(text))

    def derivations(self, text: str) -> Iterator[Derivation]:
        """Yields every derivation of a text: only one if the grammar is unambiguous.

        Raises:
            NotDerived: there is none, naming the first token at which no text continues. Raised by the iterator.
        """
        words = tuple(text.split(" "))
        found, furthest = 0, 0
        # A state has read up to a position. What it has left, and what it chose, are linked lists that states share.
        agenda: list[tuple] = [(0, ((self.start,), 0, None), {}, None)]
        while agenda:
            position, left, bindings, choices = agenda.pop()
            position, part, left = _read_fixed_words(words, position, left, bindings)
            furthest = max(furthest, position)
            if part is not None:
                rule = self.rule(part, bindings)
                for index in self._starting_with(rule.symbol, words[position] if position < len(words) else None):
                    one = rule.alternatives[index]
                    state = (one.parts, 0, left), keep(one, part, bindings), (choices, (rule.symbol, index))
                    agenda.append((position, *state))
            elif left is None and position == len(words):
                found += 1
                yield _unlink(choices)
        if not found:
            raise NotDerived(words, furthest)

    def rule(self, part: Expand, bindings: Bindings) -> Rule:
        """Returns the rule that a part stands for, given what the variables keep."""
        if part.selector is None:
            return self.rules[part.symbol]
        return self.rules[selected(part, bindings[part.selector.variable])]

    def _write(self, choose: Callable[[Rule], int]) -> tuple[str, Derivation]:
        words: list[str] = []
        derivation: list[tuple[str, int]] = []
        bindings: Bindings = {}

        def write(rule: Rule) -> Alternative:
            index = choose(rule)
            derivation.append((rule.symbol, index))
            for part in rule.alternatives[index].parts:
                if isinstance(part, Expand):
                    chosen = write(self.rule(part, bindings))
                    if part.variable:
                        bindings[part.variable] = chosen
                else:
                    words.extend(fixed_words(part, bindings))
            return rule.alternatives[index]

        write(self.rule(self.start, bindings))
        return " ".join(words), tuple(derivation)

    def _starting_with(self, symbol: str, word: str | None) -> list[int]:
        index = self._first_words[symbol]
        if word is None or None not in index:
            return index.get(word, [])
        return sorted({*index.get(word, []), *index[None]})


def keep(one: Alternative, part: Expand, bindings: Bindings) -> Bindings:
    """Returns what the variables keep after a part for which an alternative was chosen."""
    return {**bindings, part.variable: one} if part.variable else bindings


def fixed_words(part: Words | Recall, bindings: Bindings) -> tuple[str, ...]:
    """Returns the words of a part that is not a choice."""
    return part.words if isinstance(part, Words) else bindings[part.variable].attributes[part.attribute]


def _first_words(rules: dict[str, Rule]) -> dict[str, dict[str | None, list[int]]]:
    """Returns, for each symbol, the indices of the alternatives that can start with a word, which spares the parser the
    others; with None for alternatives that start with a variable, which can be any word.
    """
    first_words: dict[str, dict[str | None, list[int]]] = {}
    for symbol, rule in rules.items():
        index: dict[str | None, list[int]] = {}
        for number, one in enumerate(rule.alternatives):
            part = one.parts[0]
            first: set[str | None] = {part.words[0]} if isinstance(part, Words) else {None}
            if isinstance(part, Expand):
                first = set().union(*(first_words[candidate] for candidate in candidates(part, rules)))
            for word in first:
                index.setdefault(word, []).append(number)
        first_words[symbol] = index
    return first_words


def _read_fixed_words(
    words: tuple[str, ...], position: int, left: tuple | None, bindings: Bindings
) -> tuple[int, Expand | None, tuple | None]:
    """Reads up to the next choice, the end or a word that does not fit.

    Returns:
        (position, the choice, what is left); what is left is None only at the end.
    """
    while left is not None:
        parts, index, rest = left
        if index == len(parts):
            left = rest
            continue
        if isinstance(parts[index], Expand):
            return position, parts[index], (parts, index + 1, rest)
        for word in fixed_words(parts[index], bindings):
            if position == len(words) or words[position] != word:
                return position, None, left
            position += 1
        left = (parts, index + 1, rest)
    return position, None, None


def _unlink(choices: tuple | None) -> Derivation:
    derivation = []
    while choices is not None:
        choices, choice = choices
        derivation.append(choice)
    return tuple(reversed(derivation))
