"""Encoding documents on all cores, in bounded memory, and what there is to report about the tokens."""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from trainer.config.settings import DataConfig
from trainer.data.shard_writer import SplitWriter
from trainer.storybook import storybook
from trainer.system.machine import num_cores
from trainer.text.files import Document
from trainer.text.held_out import peek
from trainer.tokenizers.cutting import cut_document
from trainer.tokenizers.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 20
# How many validation documents, and how much of each, are decoded again for the report.
_SAMPLE_DOCUMENTS, _SAMPLE_CHARS = 200, 10_000
# Unicode's categories of characters that show nothing, which WordPiece drops.
_UNSEEN = ("Cc", "Cf")

# The writer of each split.
Writers = dict[str, SplitWriter]


@dataclasses.dataclass
class Findings:
    """What is to be reported about text that was encoded.

    Attributes:
        sample: the starts of the first validation documents.
        near_unknown: how often each character occurs in the pieces of text that have unknown tokens.
    """

    sample: list[str] = dataclasses.field(default_factory=list)
    near_unknown: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Findings") -> None:
        """Adds the findings of the text that follows."""
        self.sample = (self.sample + other.sample)[:_SAMPLE_DOCUMENTS]
        self.near_unknown.update(other.near_unknown)


def encode_documents(
    data: DataConfig,
    documents: Iterator[tuple[str, Document]],
    tokenizer: Tokenizer,
    writers: Writers,
    findings: Findings,
) -> Iterator[None]:
    """Encodes documents on all cores and writes their tokens.

    Args:
        data: the settings.
        documents: (split, document) of the whole text.
        tokenizer: the tokenizer.
        writers: the writer of each split. The pieces that a writer has written already are left out.
        findings: gets what is to be reported.

    Yields:
        None, whenever more tokens are written.
    """
    # The splits of a mixture have other names, and keep no nats.
    if data.is_storybook() and data.validation is None and "validation" in writers:
        documents = _with_nats(documents, writers["validation"].nats)
    for batch, tokens, lengths in _encoded(tokenizer, _with_sample(documents, findings.sample), writers):
        writers[batch.split].write(tokens, lengths, batch.is_start, batch.num_bytes)
        unknown = np.flatnonzero(tokens == tokenizer.unknown_id)
        for i in np.unique(np.searchsorted(np.cumsum(lengths), unknown, side="right")):
            findings.near_unknown.update(batch.pieces[i])
        yield


def report(tokenizer: Tokenizer, findings: Findings) -> tuple[str, list[str]]:
    """Returns a line on the documents that come back from their tokens, and lines on characters without a token."""
    return _what_comes_back(tokenizer, findings.sample), list(_what_is_unknown(tokenizer, findings.near_unknown))


def _what_comes_back(tokenizer: Tokenizer, sample: list[str]) -> str:
    pairs = list(zip(map(tokenizer.decode, tokenizer.encode_batch(sample)), sample, strict=True))
    share = np.mean([back == document for back, document in pairs])
    line = f"{share:.1%} of {len(sample)} validation documents come back exactly from their tokens"
    if share == 1:
        return line
    if not tokenizer.is_lossy:
        return f"{line}; the others hold characters that the vocabulary has no token for"
    alike = np.mean([_without_case_and_spaces(back) == _without_case_and_spaces(document) for back, document in pairs])
    return (
        f"{line}, and {alike:.1%} except for case, spaces and forms of characters: tokenizer.kind={tokenizer.kind!r} "
        "does not keep those (tokenizer.lowercase=false keeps case, \"tokenizer={kind='bpe'}\" everything)"
    )


def _without_case_and_spaces(text: str) -> str:
    """Returns what WordPiece keeps of a text: the folded characters, without spaces and control characters."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(letter for letter in folded if not letter.isspace() and unicodedata.category(letter) not in _UNSEEN)


def _what_is_unknown(tokenizer: Tokenizer, near_unknown: collections.Counter[str]) -> Iterator[str]:
    # Sorted by count, then by character: the order in which they were found depends on the threads.
    # Doubled, because WordPiece has one token for a letter at the start of a word and another inside.
    counts = sorted(near_unknown.items(), key=lambda count: (-count[1], count[0]))
    tokens = tokenizer.encode_batch([2 * character for character, _ in counts])
    unknown = [count for count, pair in zip(counts, tokens, strict=True) if tokenizer.unknown_id in pair]
    if unknown:
        listed = ", ".join(f"{character!r} {number}" for character, number in unknown[:10])
        yield f"{len(unknown)} characters have no token; how often the commonest occur: {listed}"


@dataclasses.dataclass
class _Batch:
    """Pieces of text of one split, to be encoded together.

    Attributes:
        split: the split.
        pieces: the pieces.
        is_start: whether each piece starts a document, or continues the piece before.
        num_bytes: the bytes of all pieces.
    """

    split: str
    pieces: list[str] = dataclasses.field(default_factory=list)
    is_start: list[bool] = dataclasses.field(default_factory=list)
    num_bytes: int = 0


def _batches(
    documents: Iterator[tuple[str, Document]], breaks: re.Pattern[str], num_written: dict[str, int]
) -> Iterator[_Batch]:
    """Puts the pieces of documents into batches, except the first num_written pieces of each split."""
    open_batches: dict[str, _Batch] = {}
    for split, document in documents:
        is_start = True
        for piece in cut_document(document, breaks):
            if num_written[split]:
                num_written[split] -= 1
                is_start = False
                continue
            batch = open_batches.get(split) or open_batches.setdefault(split, _Batch(split))
            batch.pieces.append(piece)
            batch.is_start.append(is_start)
            is_start = False
            batch.num_bytes += len(piece) if piece.isascii() else len(piece.encode())
            if batch.num_bytes >= _BATCH_BYTES:
                yield open_batches.pop(split)
    yield from open_batches.values()


def _encoded(
    tokenizer: Tokenizer, documents: Iterator[tuple[str, Document]], writers: Writers
) -> Iterator[tuple[_Batch, np.ndarray, np.ndarray]]:
    """Encodes batches on all cores, and yields each with its tokens and the lengths of its pieces, in order."""
    num_written = {split: writer.num_pieces for split, writer in writers.items()}
    num_threads = num_cores()
    waiting: collections.deque[Any] = collections.deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for batch in _batches(documents, tokenizer.breaks, num_written):
            waiting.append((batch, pool.submit(tokenizer.encode_pieces, batch.pieces)))
            if len(waiting) > num_threads:
                done, future = waiting.popleft()
                yield done, *future.result()
        for done, future in waiting:
            yield done, *future.result()


def _with_nats(documents: Iterator[tuple[str, Document]], nats: list[float]) -> Iterator[tuple[str, Document]]:
    for split, story in documents:
        assert isinstance(story, str)
        if split == "validation":
            nats.append(-storybook.log_probability(story))
        yield split, story


def _with_sample(documents: Iterator[tuple[str, Document]], sample: list[str]) -> Iterator[tuple[str, Document]]:
    for split, document in documents:
        if split.startswith("validation") and len(sample) < _SAMPLE_DOCUMENTS:
            start, document = peek(document)
            sample.append(start[:_SAMPLE_CHARS])
        yield split, document
