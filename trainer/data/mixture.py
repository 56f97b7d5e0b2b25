"""How many examples each source of a mixture has, in every part of a run. Numbers only; order.py lays the examples out.

A run is cut into phases, in which the weights are the same, and each phase into turns of MIXTURE_EXAMPLES places, of
which the last may be shorter. In each turn a source has exactly its share, so that the number of its examples before
any turn follows from the number of the turn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainer.config.schedule import examples_before
from trainer.config.settings import MIXTURE_EXAMPLES, DataConfig, TrainConfig


class Phase(NamedTuple):
    """A part of a run in which the weights are the same.

    Attributes:
        begin: the place of its first example.
        weights: the weight of each source.
    """

    begin: int
    weights: tuple[float, ...]


def phases_of(data: DataConfig, train: TrainConfig, data_offset: int = 0) -> list[Phase]:
    """Returns the phases of a run with data.weights, from place 0 on.

    Args:
        data: the settings.
        train: the batch size and its warm-up.
        data_offset: the place of the first example of step 0, as in `training_batches`.
    """
    assert data.weights is not None
    changes = [(examples_before(train, step) + data_offset, each) for step, each in data.weights_from_step.items()]
    # A fork that begins its text anew has the places from 0 on for the steps from its first one on.
    past = [weights for begin, weights in changes if begin <= 0]
    first = Phase(0, past[-1] if past else data.weights)
    return [first, *(Phase(begin, weights) for begin, weights in changes if begin > 0)]


def are_same_before(place: int, ours: Sequence[Phase], theirs: Sequence[Phase]) -> bool:
    """Whether two runs have the same phases before a place."""
    before = [[phase for phase in phases if phase.begin < place] for phases in (ours, theirs)]
    return before[0] == before[1]


def end_of_turn(place: int, phases: Sequence[Phase]) -> int:
    """Returns the place after the turn that the example before this place belongs to."""
    begin = max((phase.begin for phase in phases if phase.begin < place), default=place)
    end = begin + -(-(place - begin) // MIXTURE_EXAMPLES) * MIXTURE_EXAMPLES
    return min([end, *(phase.begin for phase in phases if phase.begin >= place)])


def mean_weights(phases: Sequence[Phase], num_examples: int) -> list[float]:
    """Returns the part of a run's examples that come from each source."""
    ends = [*(phase.begin for phase in phases[1:]), num_examples]
    parts = [np.array(phase.weights) / sum(phase.weights) for phase in phases]
    sizes = [end - phase.begin for phase, end in zip(phases, ends, strict=True)]
    return [float(part) for part in np.average(parts, axis=0, weights=sizes)]


def shares_of(weights: Sequence[float], num_examples: int = MIXTURE_EXAMPLES) -> list[int]:
    """Returns how many of some examples each source has: its weight's part, rounded down; the sources that lose most by
    rounding get the examples that are left over.
    """
    exact = np.array(weights) / sum(weights) * num_examples
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: num_examples - shares.sum()]] += 1
    return [int(share) for share in shares]


class Turns(NamedTuple):
    """The turns of all phases: a row for the full turns of each phase, and a row for its last turn if that is shorter.

    Attributes:
        begins: the place of the first example of the first of these turns, int64 [rows].
        sizes: the examples in each of these turns, int64 [rows].
        numbers: the number of turns before the first of these, int64 [rows].
        shares: the examples of each source in each of these turns, int64 [rows, sources].
        before: the examples of each source before the first of these turns, int64 [rows, sources].
    """

    begins: np.ndarray
    sizes: np.ndarray
    numbers: np.ndarray
    shares: np.ndarray
    before: np.ndarray


def turns_of(phases: Sequence[Phase]) -> Turns:
    """Returns the turns of phases, in order."""
    rows = []
    number, before = 0, np.zeros(len(phases[0].weights), np.int64)
    for i, (begin, weights) in enumerate(phases):
        shares = shares_of(weights)
        rows.append((begin, MIXTURE_EXAMPLES, number, shares, before))
        if i + 1 == len(phases):
            break
        end = phases[i + 1].begin
        num_full, rest = divmod(end - begin, MIXTURE_EXAMPLES)
        number, before = number + num_full, before + num_full * np.array(shares)
        if rest:
            last = shares_of(shares, rest)
            rows.append((end - rest, rest, number, last, before))
            number, before = number + 1, before + np.array(last)
    return Turns(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))
