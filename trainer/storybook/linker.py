"""What the rules of a grammar mean together: symbols are defined and used, variables are kept before they are read.

Also writes the symbols that variables keep as lists of all their texts, so that the value of a variable is one choice.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter

from trainer.errors import UserError
from trainer.storybook.grammar import ITSELF, Alternative, Attributes, Expand, Part, Recall, Rule, Words

# The values that each variable may have, for the variables that have one in every text.
_Possible = dict[str, frozenset[Alternative]]


def link(rules: Mapping[str, Rule], start: str) -> dict[str, Rule]:
    """Checks rules, and writes out the symbols that variables keep.

    Args:
        rules: the rule of each symbol.
        start: the symbol that every text is derived from.

    Returns:
        The rules, each after the rules of the symbols that it contains.

    Raises:
        UserError: a symbol is undefined, unused or contains itself; a variable is read before every text keeps it, or
            kept twice; a value lacks an attribute that is read; or a kept symbol may read a variable or be two equal
            texts. The message names the file and the line.
    """
    linked = _sorted_bottom_up(rules, start)
    used = _write_out_kept_symbols(linked)
    met: dict[tuple, _Possible] = {}
    _follow(linked, Expand(start), {}, met)
    used |= {symbol for symbol, _ in met}
    for symbol, rule in rules.items():
        if symbol not in used:
            raise UserError(f"{rule.place}: nothing uses symbol {symbol!r}; use or remove it.")
    return linked


def candidates(part: Expand, symbols: Iterable[str]) -> set[str]:
    """Returns the symbols that a part may stand for, whatever the variables are."""
    if part.selector is None:
        return {part.symbol}
    return {symbol for symbol in symbols if symbol.startswith(f"{part.symbol}/")}


def selected(part: Expand, value: Alternative) -> str:
    """Returns the symbol that a part stands for if the variable of its selector is a value."""
    assert part.selector is not None
    return f"{part.symbol}/{'_'.join(value.attributes[part.selector.attribute])}"


def spelling(rules: Mapping[str, Rule]) -> dict[str, str]:
    """Returns how each word is written, by the word in lower case.

    Raises:
        UserError: a word is written in two ways. A printed text begins its sentences with capitals, so nobody could
            tell which of the two it holds. The message names the file and the line.
    """
    written: dict[str, str] = {}
    for rule in rules.values():
        for one in rule.alternatives:
            fixed = [part.words for part in one.parts if isinstance(part, Words)]
            for word in itertools.chain(*fixed, *one.attributes.values()):
                known = written.setdefault(word.lower(), word)
                if known != word:
                    raise UserError(f"{one.place}: {word!r} is also written {known!r}; write it in one way everywhere.")
    return written


def all_parts(rule: Rule) -> list[Part]:
    """Returns the parts of all alternatives of a rule."""
    return [part for one in rule.alternatives for part in one.parts]


def _sorted_bottom_up(rules: Mapping[str, Rule], start: str) -> dict[str, Rule]:
    """Returns the rules, each after the rules of the symbols that it contains."""
    if start not in rules:
        raise UserError(f"symbol {start!r}, which every text is derived from, is undefined; define it.")
    graph: dict[str, set[str]] = {symbol: set() for symbol in rules}
    for symbol, rule in rules.items():
        for one in rule.alternatives:
            for part in one.parts:
                if isinstance(part, Expand):
                    graph[symbol] |= candidates(part, rules)
            for missing in sorted(graph[symbol] - set(rules)):
                raise UserError(f"{one.place}: symbol {missing!r} is undefined; define it or correct the name.")
    try:
        return {symbol: rules[symbol] for symbol in TopologicalSorter(graph).static_order()}
    except CycleError as error:
        cycle = error.args[1]
        raise UserError(
            f"{rules[cycle[0]].place}: a symbol may not contain itself: {' in '.join(cycle)}; break the circle."
        ) from None


def _write_out_kept_symbols(rules: dict[str, Rule]) -> set[str]:
    """Replaces the rules of kept symbols by all the texts that they can become; returns the symbols within them."""
    parts = [part for rule in rules.values() for part in all_parts(rule)]
    kept = set().union(*(candidates(part, rules) for part in parts if isinstance(part, Expand) and part.variable))
    used: set[str] = set()
    for symbol, rule in rules.items():  # Bottom-up: a kept symbol in a kept symbol is written out before.
        if symbol in kept:
            values = list(_values(rules, rule, used))
            scale = math.lcm(*(probability.denominator for probability, _, _, _ in values))
            alternatives = [
                Alternative(place, " ".join(words), int(p * scale), (Words(words),), {**attributes, ITSELF: words})
                for p, place, words, attributes in values
            ]
            rules[symbol] = Rule(symbol, rule.place, alternatives)
    return used


def _values(
    rules: Mapping[str, Rule], rule: Rule, used: set[str]
) -> Iterator[tuple[Fraction, str, tuple[str, ...], Attributes]]:
    """Yields (probability, place, words, attributes) of each text that a rule can become."""
    for one in rule.alternatives:
        values: list[tuple[Fraction, tuple[str, ...], Attributes]]
        values = [(Fraction(one.weight, rule.cumulative[-1]), (), {})]
        for part in one.parts:
            if isinstance(part, Words):
                values = [(p, words + part.words, of) for p, words, of in values]
                continue
            if isinstance(part, Recall) or part.selector or part.variable:
                raise UserError(
                    f"{one.place}: symbol {rule.symbol!r} is kept in a variable, so {one.template!r} may read or keep "
                    "none; write words and <symbol> only."
                )
            used.add(part.symbol)
            more = list(_values(rules, rules[part.symbol], used))
            values = [(p * q, words + w, {**a, **b}) for p, words, a in values for q, _, w, b in more]
        yield from ((p, one.place, words, {**inner, **one.attributes}) for p, words, inner in values)


def _follow(rules: Mapping[str, Rule], part: Expand, possible: _Possible, met: dict[tuple, _Possible]) -> _Possible:
    """Meets variables and symbols in the order in which a text is written, and checks each.

    Args:
        rules: all rules.
        part: the next part of the text.
        possible: the values that variables may have before the part.
        met: the symbols met, each with the values before and after it; the part's are added.

    Returns:
        The values that variables may have after the part.
    """
    ways = _ways(rules, part, possible)
    ends = []
    for symbol, narrowed in ways.items():
        key = (symbol, frozenset(narrowed.items()))
        if key not in met:
            met[key] = _common([_follow_parts(rules, one, narrowed, met) for one in rules[symbol].alternatives])
        ends.append(met[key])
    after = _common(ends)
    if part.variable:
        after[part.variable] = frozenset(one for symbol in ways for one in rules[symbol].alternatives)
    return after


def _follow_parts(
    rules: Mapping[str, Rule], one: Alternative, possible: _Possible, met: dict[tuple, _Possible]
) -> _Possible:
    for part in one.parts:
        recall = part.selector if isinstance(part, Expand) else part
        if isinstance(recall, Recall):
            _check_recall(recall, possible, one)
        if isinstance(part, Expand):
            if part.variable in possible:
                raise UserError(f"{one.place}: variable ${part.variable} is kept again; rename one of the two.")
            possible = _follow(rules, part, possible, met)
    return possible


def _ways(rules: Mapping[str, Rule], part: Expand, possible: _Possible) -> dict[str, _Possible]:
    """Returns the symbols that a part may stand for, each with the values that variables may have if it does."""
    if part.selector is None:
        return {part.symbol: possible}
    variable = part.selector.variable
    values: dict[str, set[Alternative]] = {}
    for value in possible[variable]:
        values.setdefault(selected(part, value), set()).add(value)
    for symbol in sorted(set(values) - set(rules)):
        place = min(value.place for value in values[symbol])
        raise UserError(f"{place}: symbol {symbol!r}, which ${variable} can select, is undefined; define it.")
    return {symbol: {**possible, variable: frozenset(values[symbol])} for symbol in values}


def _common(ways: Sequence[_Possible]) -> _Possible:
    """Returns the variables that have a value after each of several ways, with all the values that they may have."""
    variables = set(ways[0]).intersection(*ways[1:])
    return {variable: frozenset().union(*(way[variable] for way in ways)) for variable in variables}


def _check_recall(recall: Recall, possible: _Possible, reader: Alternative) -> None:
    if recall.variable not in possible:
        raise UserError(
            f"{reader.place}: {reader.template!r} reads the variable ${recall.variable}, which not every text has kept "
            "by then; keep it before."
        )
    lacking = [value for value in possible[recall.variable] if recall.attribute not in value.attributes]
    for value in sorted(lacking, key=lambda value: value.place):
        raise UserError(
            f"{value.place}: {value.template!r} has no attribute {recall.attribute!r}, which {reader.template!r} "
            f"({reader.place}) reads; add it."
        )
