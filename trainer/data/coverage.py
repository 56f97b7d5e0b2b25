"""What an epoch of examples shows of a split: how many tokens are targets, what is cut off, and how much is padding.

Reads offsets, and tokens only if documents are cut.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.config.schedule import examples_before
from trainer.config.settings import Config
from trainer.data.mixture import mean_weights, phases_of
from trainer.data.shards import PreparedData, Shard, Split, num_examples
from trainer.errors import UserError

# A larger share of the tokens left out by lines mode is an error; the tutorial's recipe leaves out 40% of its books.
MOST_LEFT_OUT = 0.5
# A larger share of padding is warned of.
MOST_PADDING = 0.5
_OFFSETS_PER_READ = 1 << 20
_TOKENS_PER_READ = 1 << 22


class Lengths(NamedTuple):
    """The lengths of the documents of a split.

    Attributes:
        values: the different lengths in tokens, ascending, int64 [n].
        counts: the number of documents of each length, int64 [n].
    """

    values: np.ndarray
    counts: np.ndarray

    def percentile(self, percent: int) -> int:
        """Returns the smallest length that is not exceeded by at least this percentage of the documents."""
        at_most = np.cumsum(self.counts)
        return int(self.values[np.searchsorted(100 * at_most, percent * at_most[-1])])

    def cut_at(self, sequence_length: int) -> tuple[int, int]:
        """Returns how many documents are longer than sequence_length, and how many of their tokens are beyond it."""
        # min(): sequence_length may be too large for int64.
        beyond = np.maximum(self.values - min(sequence_length, int(self.values[-1])), 0)
        return int(self.counts[beyond > 0].sum()), int(beyond @ self.counts)

    def bins(self) -> Iterator[tuple[int, int, int]]:
        """Yields (shortest, longest, number of documents) for bins whose limits are powers of two, from the first bin
        that holds documents to the last.
        """
        exponents = np.frexp(self.values)[1]  # 0 for 0, and e for lengths from 2^(e - 1) on, below 2^e.
        for exponent in range(exponents.min(), exponents.max() + 1):
            yield 2**exponent // 2, 2**exponent - 1, int(self.counts[exponents == exponent].sum())


def lengths_of(split: Split, folder: Path) -> Lengths:
    """Counts the documents of a split by their length.

    Takes little memory: documents with N tokens in all have fewer than sqrt(2 N) different lengths.
    """
    values = counts = np.zeros(0, np.int64)
    for shard in split.shards:
        offsets = np.memmap(folder / shard.offsets_file, "<i8", "r")
        for start in range(0, shard.num_documents, _OFFSETS_PER_READ):
            read = np.asarray(offsets[start : start + _OFFSETS_PER_READ + 1], np.int64)
            found, numbers = np.unique(np.diff(read) - 1, return_counts=True)
            values, places = np.unique(np.concatenate([values, found]), return_inverse=True)
            counts, before = np.zeros(len(values), np.int64), counts
            np.add.at(counts, places, np.concatenate([before, numbers]))
    return Lengths(values, counts)


class Coverage(NamedTuple):
    """What an epoch of examples shows of a split.

    Attributes:
        num_examples: the examples in the epoch.
        num_positions: the places for targets in these examples, padding included.
        num_targets: the number of places that hold a target: a token, or a document's end.
        num_tokens: the tokens of the split's documents.
        num_documents: the documents of the split.
        num_cut_documents: the documents that are longer than an example, in lines mode.
        num_left_out_tokens: the tokens of these documents that no example shows.
    """

    num_examples: int
    num_positions: int
    num_targets: int
    num_tokens: int
    num_documents: int
    num_cut_documents: int
    num_left_out_tokens: int

    @property
    def left_out_share(self) -> float:
        """Share of the tokens that no example shows."""
        return self.num_left_out_tokens / max(self.num_tokens, 1)

    @property
    def padding_share(self) -> float:
        """Share of the places that hold padding."""
        return 1 - self.num_targets / max(self.num_positions, 1)


def coverage_of(split: Split, folder: Path, config: Config) -> Coverage:
    """Returns what an epoch shows of a split.

    Args:
        split: the split.
        folder: the folder of the prepared data.
        config: the settings: data.mode, data.predict_end and train.sequence_length count.
    """
    width, count = config.train.sequence_length, num_examples(split, config)
    num_cut = num_left_out = 0
    num_targets = split.num_tokens + split.num_documents
    if config.data.mode == "lines":
        lengths = lengths_of(split, folder)
        num_cut, num_left_out = lengths.cut_at(width)
        num_ends = int(lengths.counts[lengths.values < width].sum()) if config.data.predict_end else 0
        num_targets = split.num_tokens - num_left_out + num_ends
    return Coverage(
        num_examples=count,
        num_positions=count * width,
        num_targets=num_targets,
        num_tokens=split.num_tokens,
        num_documents=split.num_documents,
        num_cut_documents=num_cut,
        num_left_out_tokens=num_left_out,
    )


def notes_on_examples(prepared: PreparedData, config: Config) -> list[str]:
    """Returns lines on what an epoch of training examples cuts off, on how much of it is padding, and on validation
    stories that are cut, so that their excess is not known; each line names the setting that changes this.

    Raises:
        UserError: a split holds no token, or lines mode leaves out more than half of a source's tokens.
    """
    _check_tokens(prepared, config)
    notes = []
    for i, split in enumerate(prepared.parts("train")):
        source = f"data.train[{i}]: " if config.data.weights is not None else ""
        coverage = coverage_of(split, prepared.folder, config)
        if coverage.num_left_out_tokens:
            note = f"{source}{_what_is_cut(coverage, config)}"
            if coverage.left_out_share > MOST_LEFT_OUT:
                raise UserError(
                    f"{note}. That is too much to leave out: set {_packed(config)}, or raise train.sequence_length "
                    f"(the longest document has {split.max_tokens:,} tokens)."
                )
            notes.append(f"warning: {note}.")
        if coverage.padding_share > MOST_PADDING:
            notes.append(f"warning: {source}{_what_is_padding(coverage, config)}.")
    return notes + _notes_on_excess(prepared.split("validation"), config)


def _notes_on_excess(split: Split, config: Config) -> list[str]:
    """Returns a line if a validation text of known entropy will have no excess, because documents are cut."""
    needed = split.max_tokens + (1 if config.data.predict_end else 0)
    length = config.train.sequence_length
    if split.source_nats is None or config.data.mode != "lines" or needed <= length:
        return []
    end = " and its end" if config.data.predict_end else ""
    return [
        "warning: validation losses will not be compared with the text's own entropy, which is that of whole "
        f"documents: the longest one has {split.max_tokens:,} tokens{end}, and train.sequence_length={length} cuts it; "
        f"set train.sequence_length={needed}."
    ]


def _what_is_cut(coverage: Coverage, config: Config) -> str:
    return (
        f"lines mode leaves out {_percent(coverage.left_out_share)} of the tokens, the ends of "
        f"{_percent(coverage.num_cut_documents / coverage.num_documents)} of the documents, at "
        f"train.sequence_length={config.train.sequence_length}; {_packed(config)} uses all of them"
    )


def _what_is_padding(coverage: Coverage, config: Config) -> str:
    length, share = config.train.sequence_length, _percent(coverage.padding_share)
    if config.data.mode == "lines":
        return (
            f"{share} of each batch is padding, as documents have {coverage.num_tokens / coverage.num_documents:.0f} "
            f"tokens on average and train.sequence_length={length}; {_packed(config)} has no padding, a smaller "
            "train.sequence_length has less"
        )
    return (
        f"{share} of an epoch is padding, as the text to train on has {coverage.num_targets:,} tokens and "
        f"train.sequence_length={length}; lower it, or give more text"
    )


def _packed(config: Config) -> str:
    """Returns the settings that pack the data, for a config in lines mode."""
    return "data.mode='packed'" if config.data.predict_end else "data.mode='packed' with data.predict_end=true"


def _check_tokens(prepared: PreparedData, config: Config) -> None:
    """Raises UserError if a split has no token."""
    for name, split in prepared.splits.items():
        if split.num_tokens:
            continue
        kind, _, number = name.partition("-")
        sources = getattr(config.data, kind) or config.data.train
        where = f"data.{kind}={[sources[int(number)]] if number else list(sources)}"
        if kind == "validation" and config.data.validation is None:
            where = f"data.held_out_fraction={config.data.held_out_fraction} of {where.replace(kind, 'train', 1)}"
        documents = (
            "its only document has" if split.num_documents == 1 else f"its {split.num_documents:,} documents have"
        )
        raise UserError(
            f"{where}: {documents} no token, because tokenizer.kind={prepared.tokenizer_kind!r} keeps neither spaces "
            "nor control characters; give other text, or set \"tokenizer={kind='bpe'}\", which keeps everything."
        )


def _percent(share: float) -> str:
    return "less than 0.1%" if share < 0.001 else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


class TextBytes:
    """How many bytes of the original text tokens stand for.

    A token of a tokenizer that keeps everything stands for the bytes that it decodes to. [BOS] stands for none: the end
    of a document costs nats, but is not a byte of the text. If the tokenizer loses text, or the tokens hold [UNK], the
    decoded bytes are scaled, so that the whole split has as many bytes as its original text.

    Args:
        prepared: the data.

    Attributes:
        of_token: the bytes that each token decodes to, int32 [vocabulary_size].
    """

    def __init__(self, prepared: PreparedData) -> None:
        self._prepared = prepared
        tokenizer = prepared.tokenizer()
        self.of_token = tokenizer.decoded_bytes()
        self.of_token[[tokenizer.pad_id, tokenizer.bos_id]] = 0
        self._is_lossy = tokenizer.is_lossy

    def is_lossy(self, split: Split) -> bool:
        """Whether a split's text differs from its decoded tokens: the tokenizer loses text, or a token is [UNK]."""
        return self._is_lossy or split.num_unknown > 0

    def scale(self, split: Split) -> float:
        """Returns the bytes of a split's original text per byte that its tokens decode to."""
        if not self.is_lossy(split):
            return 1.0
        decoded = 0
        for shard in split.shards:
            tokens = self._tokens(shard)
            for start in range(0, len(tokens), _TOKENS_PER_READ):
                decoded += int(self.of_token[tokens[start : start + _TOKENS_PER_READ]].sum(dtype=np.int64))
        return split.num_bytes / max(decoded, 1)

    def of_epoch(self, split: Split, config: Config) -> float:
        """Returns the bytes that the targets of an epoch stand for: what lines mode cuts off does not count."""
        width = config.train.sequence_length
        if config.data.mode == "packed" or split.max_tokens <= width:
            return float(split.num_bytes)
        decoded = 0
        for shard in split.shards:
            tokens = self._tokens(shard)
            offsets = np.memmap(self._prepared.folder / shard.offsets_file, "<i8", "r")
            for first, last in _runs_of_documents(offsets):
                begin, end = int(offsets[first]), int(offsets[last])
                of_run = self.of_token[tokens[begin:end]]
                starts = np.asarray(offsets[first:last]) - begin
                # Each token's place in its document, 0 for [BOS].
                places = np.arange(end - begin) - np.repeat(starts, np.diff(starts, append=end - begin))
                decoded += int(of_run[places <= width].sum(dtype=np.int64))
        return decoded * self.scale(split)

    def of_target(self, config: Config) -> float:
        """Returns the bytes of training text per target, on average over the examples that a run draws."""
        parts = self._prepared.parts("train")
        num_bytes = num_targets = 0.0
        weights = [1.0]
        if config.data.weights is not None:
            total_steps = config.train.total_steps
            assert total_steps is not None  # A mixture has no epochs.
            weights = mean_weights(phases_of(config.data, config.train), examples_before(config.train, total_steps))
        for part, weight in zip(parts, weights, strict=True):
            coverage = coverage_of(part, self._prepared.folder, config)
            num_bytes += weight * self.of_epoch(part, config) / coverage.num_examples
            num_targets += weight * coverage.num_targets / coverage.num_examples
        return num_bytes / num_targets

    def _tokens(self, shard: Shard) -> np.ndarray:
        dtype = np.dtype(self._prepared.dtype).newbyteorder("<")
        return np.memmap(self._prepared.folder / shard.tokens_file, dtype, "r")


def _runs_of_documents(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields ranges (first, last) of documents, last excluded, with about _TOKENS_PER_READ tokens each."""
    first, num_documents = 0, len(offsets) - 1
    while first < num_documents:
        last = int(np.searchsorted(offsets, offsets[first] + _TOKENS_PER_READ))
        last = min(max(last, first + 1), num_documents)
        yield first, last
        first = last
