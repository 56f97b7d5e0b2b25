"""The entropy and the longest text of a grammar, computed exactly, without drawing a text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainer.storybook.engine import Bindings, Grammar, fixed_words, keep
from trainer.storybook.grammar import Expand, Part, Recall, Rule
from trainer.storybook.linker import all_parts, candidates

# (variable, attribute, whether a selector reads it).
_Read = tuple[str, str, bool]


def entropy(grammar: Grammar) -> float:
    """Returns the mean of -log_probability over all texts in nats per text."""

    def expectation(rule: Rule, nats: list[float]) -> float:
        return math.fsum(math.exp(log_p) * (n - log_p) for log_p, n in zip(rule.log_probabilities, nats, strict=True))

    return _Sum(grammar, lambda words: 0.0, expectation).over((grammar.start,), {})


def max_tokens(grammar: Grammar) -> int:
    """Returns the number of tokens of the longest text."""
    return int(_Sum(grammar, len, lambda rule, lengths: max(lengths)).over((grammar.start,), {}))


@dataclass
class _Sum:
    """Adds up a number over the texts of a grammar.

    Attributes:
        grammar: the grammar.
        of_words: returns what fixed words add.
        of_choice: returns what a choice adds, from its rule and the numbers of the rule's alternatives.
        memo: the numbers of the parts that were added up, by what they see of the variables.
    """

    grammar: Grammar
    of_words: Callable[[tuple[str, ...]], float]
    of_choice: Callable[[Rule, list[float]], float]
    memo: dict[tuple, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._keeps: dict[str, bool] = {}
        self._reads: dict[str, frozenset[_Read]] = {}
        for symbol, rule in self.grammar.rules.items():  # A symbol comes after the symbols that it contains.
            choices = [part for part in all_parts(rule) if isinstance(part, Expand)]
            inside = set().union(*(candidates(part, self.grammar.rules) for part in choices))
            self._keeps[symbol] = any(part.variable for part in choices) or any(self._keeps[each] for each in inside)
            self._reads[symbol] = self._reads_of(all_parts(rule))

    def over(self, parts: tuple[Part, ...], bindings: Bindings) -> float:
        """Returns the number of some parts, given what the variables keep before them."""
        fixed = 0.0
        while parts and not isinstance(parts[0], Expand):
            fixed += self.of_words(fixed_words(parts[0], bindings))
            parts = parts[1:]
        if not parts:
            return fixed
        key = (parts, self._visible(parts, bindings))
        if key not in self.memo:
            part, rest = parts[0], parts[1:]
            assert isinstance(part, Expand)
            rule = self.grammar.rule(part, bindings)
            # What follows a choice that is kept may depend on it, so each alternative is added up with what follows.
            together, apart = (rest, ()) if part.variable or self._keeps[rule.symbol] else ((), rest)
            numbers = [self.over(one.parts + together, keep(one, part, bindings)) for one in rule.alternatives]
            self.memo[key] = self.of_choice(rule, numbers) + self.over(apart, bindings)
        return fixed + self.memo[key]

    def _visible(self, parts: tuple[Part, ...], bindings: Bindings) -> tuple:
        """Returns what the number of some parts depends on: with all that the variables keep, the memo would hold a
        number for each combination of their values.
        """
        visible = []
        for variable, attribute, is_selector in sorted(self._reads_of(parts)):
            if variable in bindings:  # The parts themselves keep the others.
                # A value may lack an attribute that only symbols read which its own selector does not choose.
                words = bindings[variable].attributes.get(attribute, ())
                visible.append(words if is_selector else len(words))
        return tuple(visible)

    def _reads_of(self, parts: Sequence[Part]) -> frozenset[_Read]:
        reads: set[_Read] = set()
        for part in parts:
            recall = part.selector if isinstance(part, Expand) else part
            if isinstance(recall, Recall):
                reads.add((recall.variable, recall.attribute, isinstance(part, Expand)))
            if isinstance(part, Expand):
                reads = reads.union(*(self._reads[symbol] for symbol in candidates(part, self.grammar.rules)))
        return frozenset(reads)
