"""The texts that prepare.py prepares for its part `scale`: texts of growing size, and unusual ones."""

import argparse
import functools
import itertools
import math
import os
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.storybook.storybook import story

# A longer text repeats the stories, with other numbers.
STORYBOOK_BYTES = 50e6
# Each word becomes one token, so that a text of these words has as many tokens as words.
WORDS = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]


class Counts(NamedTuple):
    """The size of some documents, as written, or as found in prepared data.

    Attributes:
        num_documents: the number of documents that are not blank.
        num_tokens: the number of tokens, or of words, each of which becomes at least one token.
        num_bytes: the number of bytes of the documents.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int

    def plus(self, other: "Counts") -> "Counts":
        """Returns the sums of both."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Case(NamedTuple):
    """A text to prepare.

    Attributes:
        name: what kind of text it is.
        write: writes its files into a folder, and returns what they hold.
        is_exact: whether it consists of WORDS only; then it gets a file to validate on.
        settings: overrides beside the usual ones.
        message: a text that `prepare` has to print.
    """

    name: str
    write: Callable[[Path], Counts]
    is_exact: bool = True
    settings: tuple[str, ...] = ()
    message: str = ""


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yields the texts of growing size, and then the unusual ones."""
    smaller = (factor * 10**power for power in range(1, 7) for factor in (1, 3))
    for num_mb in [*itertools.takewhile(lambda size: size < options.max_mb, smaller), options.max_mb]:
        write = functools.partial(write_numbered, num_bytes=num_mb * 1e6)
        yield Case(f"{num_mb:g} MB of stories", write, is_exact=False)
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(100)]
    yield Case(
        f"{options.documents:,} tiny documents",
        lambda folder: write_documents(folder, itertools.islice(itertools.cycle(WORDS), options.documents)),
    )
    yield Case(f"{options.long_mb:g} MB in one line", lambda folder: write_long(folder, options.long_mb * 1e6))
    yield Case("no newline at the end", lambda folder: write_unended(folder, lines))
    yield Case(
        "blank lines between",
        lambda folder: write_documents(folder, (part for line in lines for part in (line, "", " \t", "\u3000\u00a0 "))),
    )
    yield Case(
        "a file with invalid UTF-8",
        lambda folder: write_broken(folder, lines),
        settings=("data.max_broken_fraction=0.01",),
        message="1 broken records",
    )


def write_documents(folder: Path, documents: Iterable[str], name: str = "text.txt") -> Counts:
    """Writes documents, one a line, and counts those that are not blank."""
    num_documents = num_words = num_bytes = 0
    with (folder / name).open("wb") as file:
        for document in documents:
            line = document.encode()
            file.write(line + b"\n")
            if document and not document.isspace():
                num_documents += 1
                num_words += document.count(" ") + 1
                num_bytes += len(line)
    return Counts(num_documents, num_words, num_bytes)


def write_numbered(folder: Path, num_bytes: float) -> Counts:
    """Writes this many bytes of stories, each with another number; a long text repeats the stories."""

    def documents() -> Iterator[str]:
        stories: list[str] = []
        num_written = 0
        for number in itertools.count():
            if len(stories) == number and num_written < STORYBOOK_BYTES:
                stories.append(story(0, number))
            document = f"{number} {stories[number % len(stories)]}"
            num_written += len(document.encode()) + 1
            yield document
            if num_written >= num_bytes:
                return

    return write_documents(folder, documents())


def write_long(folder: Path, num_bytes: float) -> Counts:
    """Writes at least this many bytes in one line."""
    words = " ".join([*WORDS, ""])
    num_repeats = math.ceil(num_bytes / len(words))
    with (folder / "text.txt").open("wb") as file:
        file.writelines(itertools.repeat(words.encode(), num_repeats))
        file.write(b"\n")
    return Counts(1, num_repeats * len(WORDS), num_repeats * len(words))


def write_unended(folder: Path, lines: Sequence[str]) -> Counts:
    """Writes lines, the last of which has no newline."""
    counts = write_documents(folder, lines)
    path = folder / "text.txt"
    os.truncate(path, path.stat().st_size - 1)
    return counts


def write_broken(folder: Path, lines: Sequence[str]) -> Counts:
    """Writes lines into 20 files; one of them also has a line that is not UTF-8."""
    counts = Counts(0, 0, 0)
    for i in range(20):
        counts = counts.plus(write_documents(folder, lines, f"{i}.txt"))
    path = folder / "7.txt"
    path.write_bytes("café\n".encode("latin-1") + path.read_bytes())
    return counts
