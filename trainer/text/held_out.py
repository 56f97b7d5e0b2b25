"""Decides which part of a text is held out for validation: some documents, or the end of each file."""

import hashlib
import itertools
from collections.abc import Iterator

from trainer.system.storage import Location
from trainer.text.files import LONG_CHARS, Document, count_characters


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split, by its first LONG_CHARS characters, so that equal documents
    are in the same split.
    """
    digest = hashlib.blake2b(text[:LONG_CHARS].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def split_file(document: Document, file: Location, fraction: float) -> Iterator[tuple[str, Document]]:
    """Yields (split, document) of a file that is one document: its start to train on, and its end to validate on.

    Source: nanoGPT's data scripts, which cut at the same character.

    Args:
        document: the document.
        file: its file, which is read once more if the document is long.
        fraction: the part to hold out.
    """
    if isinstance(document, str):
        num_train = int(len(document) * (1 - fraction))
        for split, text in (("train", document[:num_train]), ("validation", document[num_train:])):
            if text and not text.isspace():
                yield split, text
        return
    rest = [""]
    yield "train", _first_characters(document, int(count_characters(file) * (1 - fraction)), rest)
    yield "validation", itertools.chain(rest, document)


def peek(document: Document) -> tuple[str, Document]:
    """Returns the first part of a document, and the whole document."""
    if isinstance(document, str):
        return document, document
    first = next(document)
    return first, itertools.chain((first,), document)


def _first_characters(parts: Iterator[str], num_chars: int, rest: list[str]) -> Iterator[str]:
    """Yields num_chars characters, and puts into rest[0] what follows them in the last part that was read."""
    for part in parts:
        if len(part) > num_chars:
            rest[0] = part[num_chars:]
            yield part[:num_chars]
            return
        num_chars -= len(part)
        yield part
