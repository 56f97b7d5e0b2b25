"""Compares runs: what differs, whether losses can be compared, and what they are after the same tokens or time."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.config.settings import Config
from trainer.monitoring import tags
from trainer.monitoring.run_log import Dot
from trainer.reports.history import History
from trainer.reports.report_page import spread

# The most rows in the table of losses after the same tokens.
MAX_ROWS = 8


class Comparison(NamedTuple):
    """Runs side by side.

    Attributes:
        histories: the runs.
        by_bits: whether the losses are in bits per byte: nats per token cannot be compared between tokenizers.
        notes: what a reader has to know before comparing.
        is_fair: whether the scores are about the same text, so that the lowest one is the best.
        is_uncertain: whether they may be about the same text, but that cannot be found out any more.
    """

    histories: Sequence[History]
    by_bits: bool
    notes: list[str]
    is_fair: bool
    is_uncertain: bool = False

    @property
    def by_bytes(self) -> bool:
        """Whether runs are compared after the same bytes of text: tokenizers make tokens of different sizes."""
        return self.by_bits and all(history.bytes_per_token is not None for history in self.histories)

    @property
    def amount(self) -> str:
        """What the runs are compared after the same amount of."""
        return "bytes of text" if self.by_bytes else "tokens"

    def seen(self, history: History, step: int) -> float:
        """Returns how many tokens, or bytes of text, a run has trained on after a step."""
        tokens = history.tokens_at(step)
        return tokens * (history.bytes_per_token or 1.0) if self.by_bytes else tokens

    @property
    def unit(self) -> str:
        """The unit of the losses."""
        return "bits per byte" if self.by_bits else "nats per token"

    def validation(self, history: History) -> list[Dot]:
        """Returns the curve of a run's validation loss."""
        return history.bits_per_byte() if self.by_bits else history.curve(tags.LOSS, "validation")

    def training(self, history: History) -> list[Dot]:
        """Returns the curve of a run's training loss."""
        return history.bits_per_byte("train") if self.by_bits else history.curve(tags.LOSS)

    def final(self, history: History) -> float | None:
        """Returns the score on the whole validation text; None if the run is not over, or if it is not a number."""
        if history.result is None:
            return None
        score = history.result.bits_per_byte if self.by_bits else history.result.loss
        return score if math.isfinite(score) else None

    def best(self, history: History) -> Dot | None:
        """Returns the lowest score that is a number; None if there is none."""
        dots = [dot for dot in self.validation(history) if math.isfinite(dot.value)]
        return min(dots, key=lambda dot: (dot.value, dot.step), default=None)

    def winner(self) -> tuple[int, float] | None:
        """Returns the number of the run with the lowest final score, and how far the next one is above it; None if the
        scores cannot be compared, a run is not over, a score is not a number, or two are equal.
        """
        finals = [self.final(history) for history in self.histories]
        known = [each for each in finals if each is not None]
        if not self.is_fair or len(known) < len(finals):
            return None
        lowest, second = sorted(known)[:2]
        return (finals.index(lowest), second - lowest) if lowest < second else None

    def at_equal_amounts(self) -> list[tuple[float, list[float]]]:
        """Returns numbers of tokens, or bytes, and the validation loss of each run after that many; see `_at_equal`."""
        return _at_equal(
            [
                [(self.seen(history, dot.step), dot.value) for dot in self.validation(history)]
                for history in self.histories
            ]
        )

    def at_equal_time(self) -> list[tuple[float, list[float]]]:
        """Returns seconds of training, and the validation loss of each run after that long; see `_at_equal`."""
        return _at_equal([[(dot.secs, dot.value) for dot in self.validation(history)] for history in self.histories])


def compare(histories: Sequence[History]) -> Comparison:
    """Returns a comparison of runs."""
    notes = []
    by_bits = len({history.run.facts["tokenizer_fingerprint"] for history in histories}) > 1
    if by_bits:
        notes.append(
            "The runs have different tokenizers, so their nats per token cannot be compared. Losses are in bits per "
            "byte of the text."
        )
    if by_bits and len({tag for h in histories for tag in h.validation.curves if tag.startswith("loss/bits_per_")}) > 1:
        notes.append(
            "One of the tokenizers loses some of the text, or lines mode cuts it: its bits per byte are about less "
            "text, and look better than they are."
        )
    if by_bits and any(history.bytes_per_token is None for history in histories):
        notes.append(
            "The prepared data of a run are gone, so losses are shown after the same number of tokens, though "
            "tokenizers make tokens of different sizes."
        )
    on_one_text = "Score the models on one text: trainer evaluate RUN --data FILE"
    differing = sorted({key for history in histories[1:] for key in _validation_differs(histories[0], history)})
    if differing:
        notes.append(
            f"The validation texts differ ({', '.join(differing)}), so the lowest loss is not the best model. "
            f"{on_one_text}"
        )
    are_same = [_has_same_validation(histories[0], history) for history in histories[1:]]
    if not differing and False in are_same:
        notes.append(
            "The validation texts differ, though no setting of them does: a file was replaced under its path. So the "
            f"lowest loss is not the best model. {on_one_text}"
        )
    elif not differing and None in are_same:
        notes.append(
            "The prepared data of the runs differ, and those of one are gone, so nothing shows whether the validation "
            f"texts are the same. {on_one_text}"
        )
    parts = {_scored_examples(history.config) for history in histories}
    if len(parts) > 1:
        notes.append(
            "The runs score other parts of the validation text while they train (evaluation.num_batches); only the "
            "final scores are of the whole text."
        )
    if any(history.num_tokens is None and history.config.data.mode == "lines" for history in histories):
        notes.append("The prepared data of a run are gone, so its tokens are counted with padding.")
    is_fair = not differing and all(are_same)
    return Comparison(histories, by_bits, notes, is_fair, is_uncertain=not differing and False not in are_same)


def differing_settings(histories: Sequence[History]) -> list[tuple[str, list[Any]]]:
    """Returns the settings that are not the same in all runs, with the value of each; None if a run has no such one."""
    flat = [_flat(history.config) for history in histories]
    keys = list(dict.fromkeys(itertools.chain.from_iterable(flat)))
    rows = [(key, [each.get(key) for each in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json", exclude={"run_folder"})
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def _scored_examples(config: Config) -> int | None:
    """Returns how many examples a score during training is about; None: all."""
    num_batches = config.evaluation.num_batches
    return None if num_batches is None else num_batches * config.train.global_batch_size


def _validation_differs(one: History, other: History) -> list[str]:
    """Returns the settings by which two runs are scored on different texts."""
    if one.run.facts["data_fingerprint"] == other.run.facts["data_fingerprint"]:
        keys: tuple[str, ...] = ()
    elif one.config.data.validation is not None and other.config.data.validation is not None:
        keys = ("data.validation", "data.documents", "data.text_field")
    else:
        # The validation text is held out of the training text.
        keys = ("data.train", "data.validation", "data.documents", "data.text_field", "data.held_out_fraction")
        keys += ("data.min_bytes", "data.storybook_stories", "data.storybook_seed")
    # In lines mode texts are cut at the length.
    if one.result is not None and other.result is not None and one.result.cut_share != other.result.cut_share:
        keys += ("data.mode", "train.sequence_length")
    mine, others = _flat(one.config), _flat(other.config)
    return [key for key in keys if mine.get(key) != others.get(key)]


def _has_same_validation(one: History, other: History) -> bool | None:
    """Returns whether two runs are scored on the same text, by what was prepared from it; None if that is not known."""
    if one.run.facts["data_fingerprint"] == other.run.facts["data_fingerprint"]:
        return True
    if one.validation_splits is None or other.validation_splits is None:
        sizes = [_scored_bytes(history) for history in (one, other)]
        # Without the data, the number of the bytes that were scored has to do; it is a quotient of floats.
        return None if None in sizes else math.isclose(*sizes, rel_tol=1e-6)  # type: ignore[arg-type]
    mine, others = one.validation_splits, other.validation_splits
    if one.run.facts["tokenizer_fingerprint"] == other.run.facts["tokenizer_fingerprint"]:
        return [_hashes(split) for split in mine] == [_hashes(split) for split in others]
    # Tokens cannot be compared; documents and bytes are counted in the text itself.
    names = ("num_documents", "num_bytes")
    return [[split[name] for name in names] for split in mine] == [[split[name] for name in names] for split in others]


def _hashes(split: dict[str, Any]) -> list[str]:
    return [shard["tokens_sha256"] for shard in split["shards"]]


def _scored_bytes(history: History) -> float | None:
    """Returns the bytes of the text that the final score is about: they are the same with every tokenizer."""
    result = history.result
    if result is None or result.cut_share or not result.bits_per_byte:
        return None  # What lines mode cuts differs by tokenizer.
    num_bytes = result.loss * result.num_tokens / math.log(2) / result.bits_per_byte
    return num_bytes if math.isfinite(num_bytes) else None


def _at_equal(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, list[float]]]:
    """Returns places on the x axis of several curves, and the value of each curve there.

    The places are points of the first curve between the first and the last point of every other one. The value of
    another curve there is that of the straight line between its two points around the place.
    """
    if not all(curves):
        return []
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    places = [x for x, _ in curves[0] if low <= x <= high] or ([high] if low <= high else [])
    if places and places[-1] < high * 0.99:
        places.append(high)
    kept = [places[i] for i in spread(range(len(places)), MAX_ROWS)]
    return [(x, [_value_at(curve, x) for curve in curves]) for x in kept]


def _value_at(curve: Sequence[tuple[float, float]], x: float) -> float:
    for (a, before), (b, after) in itertools.pairwise(curve):
        if a <= x <= b:
            return before + (after - before) * ((x - a) / (b - a) if b > a else 1.0)
    return curve[0][1]
