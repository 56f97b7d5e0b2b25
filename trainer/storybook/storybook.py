"""The storybook: children's stories from a probabilistic grammar, with the exact probability of each.

Responsible for the grammar's notation, for drawing a story, for parsing one back and for the entropy of them all. The
words and sentences are in storybook_grammar.py; files, tokenizers and shards are not known here.

A grammar is a list of symbols, each with its alternatives below it:

    story
        <hero:girl> lost $hero.his cap <place:place> . <found/$place.kind>
    girl | he=she, his=her
        mia
        3 * anna
    place
        by the lake | kind=water
        in the park | kind=green
    found/water
        $hero fished it out .
    found/green
        $hero.he saw it in the grass .

`3 *` is a weight, 1 where there is none. Attributes follow `|`, after an alternative or after a symbol for all of its
alternatives. `<girl>` would write one of the girls; `<hero:girl>` also keeps her as the variable hero, so that `$hero`
writes her again and `$hero.his` writes an attribute of hers. `<found/$place.kind>` stands for the symbol that the
attribute completes. A symbol that is kept in a variable holds plain words and symbols only.

Every choice must show in the text. Then a text has one derivation, and its probability is the product of the choices.
"""

import functools
import itertools
import math
import random
import re
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from typing import Protocol

from trainer.storybook.grammar import GRAMMAR_TEXT

CLOSING = "the end ."

# The choices in the order of the text: (symbol, index of its alternative).
Derivation = tuple[tuple[str, int], ...]

# Only what stays one token, and the same, under lower-casing and splitting at white space and punctuation.
_WORD = re.compile(r'[a-z]+|[.,!?"]')
_SYMBOL = r"[a-z_]+(?:/[a-z_]+)?"
_HEAD = re.compile(rf"({_SYMBOL})(?: \| (.+))?")
_ALTERNATIVE = re.compile(r"(?:([1-9][0-9]*) \* )?(.*?)(?: \| (.+))?")
_ATTRIBUTE = re.compile(r"([a-z_]+)=([a-z]+(?: [a-z]+)*)")
_RECALL = re.compile(r"\$([a-z_]+)(?:\.([a-z_]+))?")
_EXPAND = re.compile(rf"<(?:([a-z_]+):)?(?:({_SYMBOL})|([a-z_]+)/\$([a-z_]+)\.([a-z_]+))>")

_ITSELF = ""  # the attribute that holds a kept alternative's own words


class RandomSource(Protocol):
    """What stories are drawn from: of random.Random, the one method that is the same in every version of Python."""

    def random(self) -> float:
        """Returns a float in [0, 1)."""
        ...


# Compared by identity: they are keys of memos, and equal words in two places are two things.
@dataclass(frozen=True, eq=False)
class _Words:
    words: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Recall:
    variable: str
    attribute: str


@dataclass(frozen=True, eq=False)
class _Expand:
    symbol: str
    selector: _Recall | None  # whose words complete the symbol's name
    variable: str | None  # which keeps the chosen alternative


_Part = _Words | _Recall | _Expand
_Attributes = dict[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class _Alternative:
    template: str
    weight: int
    parts: tuple[_Part, ...]
    attributes: _Attributes


_Bindings = dict[str, _Alternative]
# From each variable that surely has a value to the values it may have.
_Possible = dict[str, frozenset[_Alternative]]


class _Rule:
    """A symbol and its alternatives, with what choosing among them needs."""

    def __init__(self, symbol: str, alternatives: Sequence[_Alternative]):
        self.symbol = symbol
        self.alternatives = tuple(alternatives)
        templates = [one.template for one in alternatives]
        for template in templates:
            if templates.count(template) > 1:
                raise ValueError(f"symbol {symbol!r} has the alternative {template!r} twice; give one more weight.")
        # Integers: sums of fractions could round differently elsewhere, and a seed would not mean the same stories.
        self.cumulative = list(itertools.accumulate(one.weight for one in alternatives))
        self.log_probabilities = [math.log(one.weight / self.cumulative[-1]) for one in alternatives]

    def draw(self, random_source: RandomSource) -> int:
        return bisect(self.cumulative, random_source.random() * self.cumulative[-1])


@dataclass(frozen=True)
class _Quantity:
    """A number that adds up over a text: what fixed words add, and what a choice makes of its alternatives' numbers."""

    of_words: Callable[[tuple[str, ...]], float]
    of_choice: Callable[[_Rule, list[float]], float]
    memo: dict = field(default_factory=dict)


class Grammar:
    """A probabilistic grammar whose texts have an exact probability.

    Args:
        rules: from each symbol, with the attributes of all its alternatives where it has some, to the alternatives.
        start: the symbol that every text is derived from.

    Raises:
        ValueError: naming what cannot be read, is undefined, unused, empty or there twice, contains itself, is read
            before it is surely kept, is kept twice, lacks an attribute or may not be kept.
    """

    def __init__(self, rules: Mapping[str, Sequence[str]], start: str = "story"):
        self._start = _Expand(start, None, None)
        self._rules: dict[str, _Rule] = {}
        for head, alternatives in rules.items():
            rule = _read_rule(head, alternatives)
            if rule.symbol in self._rules:
                raise ValueError(f"symbol {rule.symbol!r} is defined twice; put its alternatives together.")
            self._rules[rule.symbol] = rule
        bottom_up = self._sort_bottom_up()
        used = self._list_kept_values(bottom_up) | self._follow_every_way()
        if unused := sorted(set(self._rules) - used):
            raise ValueError(f"nothing uses {unused}; use or remove them.")
        self._index_first_words(bottom_up)
        self._note_variables(bottom_up)

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
            ValueError: the text has no derivation (as `derivations`), or more than one.
        """
        found = list(itertools.islice(self.derivations(text), 2))
        if len(found) > 1:
            raise ValueError(f"the text {text!r} is ambiguous, derived as {found[0]} and as {found[1]}.")
        return found[0]

    def log_probability(self, text: str) -> float:
        """Returns the exact log-probability of a text in nats.

        Raises:
            ValueError: as `parse`.
        """
        return math.fsum(self._rules[symbol].log_probabilities[index] for symbol, index in self.parse(text))

    def entropy(self) -> float:
        """Returns the mean of -log_probability over all texts in nats per text, computed from the grammar."""

        def expectation(rule: _Rule, nats: list[float]) -> float:
            return math.fsum(
                math.exp(log_p) * (n - log_p) for log_p, n in zip(rule.log_probabilities, nats, strict=True)
            )

        return self._add_up((self._start,), {}, _Quantity(lambda words: 0.0, expectation))

    def max_tokens(self) -> int:
        """Returns the number of tokens of the longest text."""
        return int(self._add_up((self._start,), {}, _Quantity(len, lambda rule, lengths: max(lengths))))

    def derivations(self, text: str) -> Iterator[Derivation]:
        """Yields every derivation of a text: just one, where the grammar is unambiguous.

        Raises:
            ValueError: there is none, naming the first token at which no text continues. Raised by the iterator.
        """
        words = tuple(text.split(" "))
        found, furthest = 0, 0
        # A state has read up to a position. What it has left, and what it chose, are linked lists that states share.
        agenda: list[tuple] = [(0, ((self._start,), 0, None), {}, None)]
        while agenda:
            position, left, bindings, choices = agenda.pop()
            position, part, left = _read_fixed_words(words, position, left, bindings)
            furthest = max(furthest, position)
            if part is not None:
                rule = self._rule(part, bindings)
                for index in self._starting_with(rule.symbol, words[position] if position < len(words) else None):
                    one = rule.alternatives[index]
                    state = (one.parts, 0, left), _keep(one, part, bindings), (choices, (rule.symbol, index))
                    agenda.append((position, *state))
            elif left is None and position == len(words):
                found += 1
                yield _unlink(choices)
        if not found:
            stands = f"token {furthest} is {words[furthest]!r}" if furthest < len(words) else f"it stops at {furthest}"
            raise ValueError(f"not a text of the grammar: {stands}, after {' '.join(words[:furthest])!r}.")

    def _sort_bottom_up(self) -> list[str]:
        """Returns the symbols, each after those that its alternatives contain."""
        graph = {symbol: self._contained(rule) for symbol, rule in self._rules.items()}
        for where, contained in [("start", {self._start.symbol}), *graph.items()]:
            for symbol in sorted(contained - set(self._rules)):
                raise ValueError(f"symbol {symbol!r}, used in {where!r}, is undefined; define it or correct the name.")
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise ValueError(f"a symbol may not contain itself: {' in '.join(error.args[1])}.") from None

    def _contained(self, rule: _Rule) -> set[str]:
        parts = [part for one in rule.alternatives for part in one.parts]
        return set().union(*(self._candidates(part) for part in parts if isinstance(part, _Expand)))

    def _candidates(self, part: _Expand) -> set[str]:
        """Returns the symbols that a part may stand for, whatever the variables are."""
        if part.selector is None:
            return {part.symbol}
        return {symbol for symbol in self._rules if symbol.startswith(f"{part.symbol}/")}

    def _list_kept_values(self, bottom_up: list[str]) -> set[str]:
        """Rewrites kept symbols as all the texts they can become, so that a value is one choice; returns those used."""
        parts = [part for rule in self._rules.values() for one in rule.alternatives for part in one.parts]
        kept = [part for part in parts if isinstance(part, _Expand) and part.variable]
        used: set[str] = set()
        for symbol in filter(set().union(*map(self._candidates, kept)).__contains__, bottom_up):
            values = list(self._values(self._rules[symbol], used))
            scale = math.lcm(*(probability.denominator for probability, _, _ in values))
            self._rules[symbol] = _Rule(symbol, [_value(int(p * scale), words, of) for p, words, of in values])
        return used

    def _values(self, rule: _Rule, used: set[str]) -> Iterator[tuple[Fraction, tuple[str, ...], _Attributes]]:
        """Yields (probability, words, attributes) of each text that a rule can become."""
        for one in rule.alternatives:
            values: list[tuple[Fraction, tuple[str, ...], _Attributes]]
            values = [(Fraction(one.weight, rule.cumulative[-1]), (), {})]
            for part in one.parts:
                if isinstance(part, _Recall) or (isinstance(part, _Expand) and (part.selector or part.variable)):
                    raise ValueError(
                        f"symbol {rule.symbol!r} is kept in a variable, so {one.template!r} may read none."
                    )
                if isinstance(part, _Words):
                    values = [(p, words + part.words, of) for p, words, of in values]
                    continue
                used.add(part.symbol)
                more = list(self._values(self._rules[part.symbol], used))
                values = [(p * q, words + w, {**a, **b}) for p, words, a in values for q, w, b in more]
            yield from ((p, words, {**inner, **one.attributes}) for p, words, inner in values)

    def _follow_every_way(self) -> set[str]:
        """Meets variables and symbols as a text being written would, checking each; returns the symbols met."""
        memo: dict[tuple, _Possible] = {}
        self._follow(self._start, {}, memo)
        return {symbol for symbol, _ in memo}

    def _follow(self, part: _Expand, possible: _Possible, memo: dict[tuple, _Possible]) -> _Possible:
        """Returns what variables may be after a part, given what they may be before it."""
        ways = self._ways(part, possible)
        ends = []
        for symbol, narrowed in ways.items():
            key = (symbol, frozenset(narrowed.items()))
            if key not in memo:
                rule = self._rules[symbol]
                memo[key] = _common([self._follow_parts(symbol, one, narrowed, memo) for one in rule.alternatives])
            ends.append(memo[key])
        after = _common(ends)
        if part.variable:
            if part.variable in possible:
                raise ValueError(f"variable ${part.variable} is kept again, as {part.symbol!r}; rename one of the two.")
            after[part.variable] = frozenset(one for symbol in ways for one in self._rules[symbol].alternatives)
        return after

    def _follow_parts(self, symbol: str, one: _Alternative, possible: _Possible, memo: dict) -> _Possible:
        for part in one.parts:
            recall = part.selector if isinstance(part, _Expand) else part
            if isinstance(recall, _Recall):
                _check_recall(recall, possible, f"{one.template!r} of {symbol!r}")
            if isinstance(part, _Expand):
                possible = self._follow(part, possible, memo)
        return possible

    def _ways(self, part: _Expand, possible: _Possible) -> dict[str, _Possible]:
        """Returns the symbols that a part may stand for, each with what variables may be when it does."""
        if part.selector is None:
            return {part.symbol: possible}
        variable = part.selector.variable
        values: dict[str, set[_Alternative]] = {}
        for value in possible[variable]:
            values.setdefault(_selected(part, value), set()).add(value)
        for symbol in sorted(set(values) - set(self._rules)):
            raise ValueError(f"symbol {symbol!r}, which ${variable} can select, is undefined; define it.")
        return {symbol: {**possible, variable: frozenset(values[symbol])} for symbol in values}

    def _index_first_words(self, bottom_up: list[str]) -> None:
        """Notes which alternatives can start with a word, to spare the parser the others."""
        self._first_words: dict[str, dict[str | None, list[int]]] = {}  # None: any word, where a variable is first
        for symbol in bottom_up:
            index: dict[str | None, list[int]] = {}
            for number, one in enumerate(self._rules[symbol].alternatives):
                part = one.parts[0]
                first: set[str | None] = {part.words[0]} if isinstance(part, _Words) else {None}
                if isinstance(part, _Expand):
                    first = set().union(*(self._first_words[candidate] for candidate in self._candidates(part)))
                for word in first:
                    index.setdefault(word, []).append(number)
            self._first_words[symbol] = index

    def _starting_with(self, symbol: str, word: str | None) -> list[int]:
        index = self._first_words[symbol]
        if word is None or None not in index:
            return index.get(word, [])
        return sorted({*index.get(word, []), *index[None]})

    def _note_variables(self, bottom_up: list[str]) -> None:
        """Notes of each symbol whether it keeps a variable, and what it reads: (variable, attribute, is a selector)."""
        self._keeps: dict[str, bool] = {}
        self._reads: dict[str, frozenset[tuple[str, str, bool]]] = {}
        for symbol in bottom_up:
            parts = [part for one in self._rules[symbol].alternatives for part in one.parts]
            inside = self._contained(self._rules[symbol])
            kept_here = any(isinstance(part, _Expand) and part.variable for part in parts)
            self._keeps[symbol] = kept_here or any(self._keeps[within] for within in inside)
            self._reads[symbol] = self._reads_of(parts)

    def _reads_of(self, parts: Sequence[_Part]) -> frozenset[tuple[str, str, bool]]:
        reads: set[tuple[str, str, bool]] = set()
        for part in parts:
            recall = part.selector if isinstance(part, _Expand) else part
            if isinstance(recall, _Recall):
                reads.add((recall.variable, recall.attribute, isinstance(part, _Expand)))
            if isinstance(part, _Expand):
                reads = reads.union(*(self._reads[symbol] for symbol in self._candidates(part)))
        return frozenset(reads)

    def _rule(self, part: _Expand, bindings: _Bindings) -> _Rule:
        if part.selector is None:
            return self._rules[part.symbol]
        return self._rules[_selected(part, bindings[part.selector.variable])]

    def _write(self, choose: Callable[[_Rule], int]) -> tuple[str, Derivation]:
        words: list[str] = []
        derivation: list[tuple[str, int]] = []
        bindings: _Bindings = {}

        def write(rule: _Rule) -> _Alternative:
            index = choose(rule)
            derivation.append((rule.symbol, index))
            for part in rule.alternatives[index].parts:
                if isinstance(part, _Expand):
                    chosen = write(self._rule(part, bindings))
                    if part.variable:
                        bindings[part.variable] = chosen
                else:
                    words.extend(_fixed_words(part, bindings))
            return rule.alternatives[index]

        write(self._rule(self._start, bindings))
        return " ".join(words), tuple(derivation)

    def _add_up(self, parts: tuple[_Part, ...], bindings: _Bindings, quantity: _Quantity) -> float:
        fixed = 0.0
        while parts and not isinstance(parts[0], _Expand):
            fixed += quantity.of_words(_fixed_words(parts[0], bindings))
            parts = parts[1:]
        if not parts:
            return fixed
        key = (parts, self._visible(parts, bindings))
        if key not in quantity.memo:
            part, rest = parts[0], parts[1:]
            assert isinstance(part, _Expand)
            rule = self._rule(part, bindings)
            # Where the choice is kept, what follows may depend on it, so each alternative is added up with the rest.
            together, apart = (rest, ()) if part.variable or self._keeps[rule.symbol] else ((), rest)
            numbers = [
                self._add_up(one.parts + together, _keep(one, part, bindings), quantity) for one in rule.alternatives
            ]
            quantity.memo[key] = quantity.of_choice(rule, numbers) + self._add_up(apart, bindings, quantity)
        return fixed + quantity.memo[key]

    def _visible(self, parts: tuple[_Part, ...], bindings: _Bindings) -> tuple:
        """Returns what a sum over parts sees of the variables; by all of them the memo would hold their product."""
        visible = []
        for variable, attribute, is_selector in sorted(self._reads_of(parts)):
            if variable in bindings:  # else it is kept within these parts
                # Only the symbol that a selector does not choose may read an attribute that the value lacks.
                words = bindings[variable].attributes.get(attribute, ())
                visible.append(words if is_selector else len(words))
        return tuple(visible)


def _keep(one: _Alternative, part: _Expand, bindings: _Bindings) -> _Bindings:
    return {**bindings, part.variable: one} if part.variable else bindings


def _fixed_words(part: _Words | _Recall, bindings: _Bindings) -> tuple[str, ...]:
    return part.words if isinstance(part, _Words) else bindings[part.variable].attributes[part.attribute]


def _selected(part: _Expand, value: _Alternative) -> str:
    assert part.selector is not None
    return f"{part.symbol}/{'_'.join(value.attributes[part.selector.attribute])}"


def _common(ways: list[_Possible]) -> _Possible:
    """Returns the variables that have a value after each of several ways, with all the values they may have."""
    variables = set(ways[0]).intersection(*ways[1:])
    return {variable: frozenset().union(*(way[variable] for way in ways)) for variable in variables}


def _check_recall(recall: _Recall, possible: _Possible, where: str) -> None:
    if recall.variable not in possible:
        raise ValueError(f"variable ${recall.variable} is not surely kept where {where} reads it; keep it before.")
    for value in possible[recall.variable]:
        if recall.attribute not in value.attributes:
            raise ValueError(f"{value.template!r} has no attribute {recall.attribute!r}, which {where} reads; add it.")


def _read_fixed_words(
    words: tuple[str, ...], position: int, left: tuple | None, bindings: _Bindings
) -> tuple[int, _Expand | None, tuple | None]:
    """Reads up to the next choice, the end or a word that does not fit; returns the position, the choice, what is left.

    What is left is None only at the end.
    """
    while left is not None:
        parts, index, rest = left
        if index == len(parts):
            left = rest
            continue
        if isinstance(parts[index], _Expand):
            return position, parts[index], (parts, index + 1, rest)
        for word in _fixed_words(parts[index], bindings):
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


def _value(weight: int, words: tuple[str, ...], attributes: _Attributes) -> _Alternative:
    return _Alternative(" ".join(words), weight, (_Words(words),), {**attributes, _ITSELF: words})


def _read_rule(head: str, alternatives: Sequence[str]) -> _Rule:
    match = _HEAD.fullmatch(head)
    if not match:
        raise ValueError(f"cannot read the symbol {head!r}; write letters and _, at most one /, then ` | name=words`.")
    symbol, shared = match.groups()
    if not alternatives:
        raise ValueError(f"symbol {symbol!r} has no alternatives; give it one.")
    attributes = _read_attributes(shared, symbol)
    return _Rule(symbol, [_read_alternative(line, symbol, attributes) for line in alternatives])


def _read_alternative(line: str, symbol: str, shared: _Attributes) -> _Alternative:
    match = _ALTERNATIVE.fullmatch(line)
    if not match or not match[2]:
        raise ValueError(f"symbol {symbol!r} has an empty alternative, which a text would not show; write words.")
    weight, template, own = match.groups()
    parts: list[_Part] = []
    words: list[str] = []
    for token in [*template.split(" "), None]:
        if token is not None and _WORD.fullmatch(token):
            words.append(token)
            continue
        if words:
            parts.append(_Words(tuple(words)))
            words = []
        if token is not None:
            parts.append(_read_part(token, symbol))
    return _Alternative(template, int(weight or 1), tuple(parts), {**shared, **_read_attributes(own, symbol)})


def _read_part(token: str, symbol: str) -> _Recall | _Expand:
    if match := _RECALL.fullmatch(token):
        return _Recall(match[1], match[2] or _ITSELF)
    if match := _EXPAND.fullmatch(token):
        variable, whole, prefix, selecting_variable, attribute = match.groups()
        return _Expand(whole or prefix, _Recall(selecting_variable, attribute) if prefix else None, variable)
    raise ValueError(
        f'cannot read {token!r} in symbol {symbol!r}; write a lower-case word, one of . , ! ? ", <symbol>, '
        "<variable:symbol>, <symbol/$variable.attribute>, $variable or $variable.attribute, one space between."
    )


def _read_attributes(text: str | None, symbol: str) -> _Attributes:
    attributes: _Attributes = {}
    for item in text.split(", ") if text else []:
        match = _ATTRIBUTE.fullmatch(item)
        if not match:
            raise ValueError(f"cannot read the attribute {item!r} in symbol {symbol!r}; write name=words.")
        attributes[match[1]] = tuple(match[2].split(" "))
    return attributes


def read_rules(text: str) -> dict[str, list[str]]:
    """Reads a grammar's text: a symbol at the start of a line, its alternatives indented below, # before a comment.

    Raises:
        ValueError: an alternative has no symbol above it, or a symbol is there twice.
    """
    rules: dict[str, list[str]] = {}
    head = None
    for line in text.splitlines():
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        if content == line.rstrip():
            if content in rules:
                raise ValueError(f"symbol {content!r} is defined twice; put its alternatives together.")
            head = content
            rules[head] = []
        elif head is None:
            raise ValueError(f"the alternative {content!r} has no symbol above it; write one.")
        else:
            rules[head].append(content)
    return rules


@functools.cache
def _storybook() -> Grammar:
    return Grammar(read_rules(GRAMMAR_TEXT))


def __getattr__(name: str) -> Grammar:
    # Built when first asked for: every command imports this module, and few of them write stories.
    if name == "STORYBOOK":
        return _storybook()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def story(seed: int, index: int) -> str:
    """Returns a story, a function of its arguments alone: one line, lower-case, one space between tokens."""
    return _storybook().sample(random.Random(f"{seed}/{index}"))


def stories(seed: int, num_stories: int) -> Iterator[str]:
    """Yields the stories from story(seed, 0) on."""
    return (story(seed, index) for index in range(num_stories))


def log_probability(text: str) -> float:
    """Returns the exact log-probability of a story in nats.

    Raises:
        ValueError: the text is no story of the storybook; names the first token at which no story continues.
    """
    return _storybook().log_probability(text)
