"""From the sources a config names to documents: finding files, reading, filtering and holding out.

Streams, in memory bounded by the largest document. Knows nothing of tokens, and imports no TensorFlow.
"""

import codecs
import dataclasses
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from trainer.config import DataConfig, UserError

Kind = Literal["line", "paragraph", "file"]

_READ_BYTES = 1 << 20
_SIMPLEBOOKS_URL = "https://dldata-public.s3.us-east-2.amazonaws.com/simplebooks.zip"


def find_files(sources: Iterable[str], setting: str) -> list[Path]:
    """Expands file names and globs to files, in the order given, a glob's matches sorted, each file once.

    Args:
        sources: names of files, or globs, where ** matches any depth and ~ is the home folder.
        setting: the setting they come from, for the error.

    Raises:
        UserError: a source matches no file, or is a directory.
    """
    files: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            raise UserError(
                f"{setting}={source!r} is a directory; name its files, for example {str(path / '*.txt')!r}."
            )
        # A name that exists is taken literally: book[1].txt is no glob.
        names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (no root)
        matches = [Path(name) for name in names if not Path(name).is_dir()]
        if not matches:
            raise UserError(f"{setting}={source!r}: {_nothing_there(source)}")
        files.update(dict.fromkeys(matches))
    return list(files)


def _nothing_there(source: str) -> str:
    if "simplebooks" in source.lower():
        return (
            "no such file. Get SimpleBooks with\n"
            f"  python -c 'import keras; keras.utils.get_file(origin=\"{_SIMPLEBOOKS_URL}\", extract=True)'\n"
            "or train on your own text: data.train=PATH data.validation=PATH"
        )
    if glob.has_magic(source):
        return f"no file matches, seen from {Path.cwd()}; check the pattern."
    return f"no such file, seen from {Path.cwd()}; check the path, or use a glob."


def read_documents(paths: Iterable[Path], documents: Kind) -> Iterator[str]:
    r"""Yields the documents of UTF-8 files, plain or .gz, in order.

    A line ends at \n or \r\n and nowhere else: not at U+2028 and its like, and a lone \r is a character of the text.
    The end is no part of the line, and a \r\n inside a paragraph or a file becomes \n. A byte-order mark at the start
    of a file is dropped, and so are documents of nothing but whitespace.

    Args:
        paths: the files.
        documents: what one document is.

    Raises:
        UserError: a file cannot be read, is not UTF-8, or contains a NUL byte.
    """
    for path in paths:
        pieces = _read_text(path)
        if documents == "file":
            found: Iterable[str] = ["".join(pieces)]
        else:
            found = _lines(pieces) if documents == "line" else _paragraphs(_lines(pieces))
        for document in found:
            if document and not document.isspace():
                yield document


def _read_text(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, is_start, held_back = 0, True, ""
    for chunk in _read_bytes(path):
        num_pending = len(decoder.getstate()[0])
        if b"\0" in chunk:
            raise UserError(
                f"{path}: NUL byte at byte offset {offset + chunk.index(0)}; is it text? UTF-16 can be converted with: "
                f"iconv -f UTF-16 -t UTF-8 {path} > {path}.utf8"
            )
        try:
            text = held_back + decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 at byte offset {offset - num_pending + error.start}; convert it, for example with: "
                f"iconv -f LATIN1 -t UTF-8 {path} > {path}.utf8 (naming the encoding it is in)."
            ) from None
        offset += len(chunk)
        if is_start and text:
            text, is_start = text.removeprefix("\ufeff"), False
        # The \n of a \r\n may be the first byte of the next chunk.
        held_back = "\r" if chunk and text.endswith("\r") else ""
        yield text.removesuffix(held_back).replace("\r\n", "\n")


def _read_bytes(path: Path) -> Iterator[bytes]:
    """Yields a file's bytes, unpacked, and an empty chunk at the end."""
    try:
        with _open(path) as file:
            while chunk := file.read(_READ_BYTES):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: a broken or cut-off gzip file ({error}); fetch it again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    yield b""


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    line: list[str] = []  # Parts and not a growing str: one line may be 50 MB.
    for piece in pieces:
        # Not splitlines(), which also splits at U+2028, \x0b, \x85 and others.
        first, *others = piece.split("\n")
        line.append(first)
        for other in others:
            yield "".join(line)
            line = [other]
    yield "".join(line)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line and not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    yield "\n".join(paragraph)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a property of its text, so copies of it go the same way."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


@dataclasses.dataclass(frozen=True)
class Source:
    """The text a config names, found and ready to be read as often as needed.

    Attributes:
        data: the settings.
        train_files: files of data.train; none for the storybook.
        validation_files: files of data.validation; none where part of the training text is held out.
    """

    data: DataConfig
    train_files: tuple[Path, ...]
    validation_files: tuple[Path, ...]

    def names(self) -> dict[str, list[str]]:
        """Returns the files of each split, for people to read."""
        return {
            "train": [str(path) for path in self.train_files],
            "validation": [str(path) for path in self.validation_files],
        }

    def fingerprint(self) -> str:
        """Returns a SHA-256 of the files' contents in order, whatever their names, or of the storybook's recipe."""
        digest = hashlib.sha256()
        if self.data.is_storybook():
            from trainer.data import storybook, storybook_grammar

            seed, num_stories = self.data.storybook_seed, self.data.storybook_stories
            # The grammar, and one story in case the way of drawing from it changes.
            recipe = [storybook_grammar.GRAMMAR_TEXT, *storybook.stories(seed, 1), seed, num_stories]
            digest.update(json.dumps(recipe).encode())
        for files in (self.train_files, self.validation_files):
            digest.update(len(files).to_bytes(8, "little"))
            for path in files:
                digest.update(_file_digest(path))
        return digest.hexdigest()

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields (split, document), split being "train" or "validation", in the order of the sources.

        Raises:
            UserError: as in read_documents; or, at the end, a split is left without a document.
        """
        tally = {"train": _Tally(), "validation": _Tally()}
        for setting, document in self._unsplit():
            num_bytes = len(document.encode())
            tally[setting].num_seen += 1
            tally[setting].longest_bytes = max(tally[setting].longest_bytes, num_bytes)
            if num_bytes <= self.data.min_bytes:
                continue
            tally[setting].num_used += 1
            for split, text in [(setting, document)] if self.validation_files else self._split(document):
                tally[split].num_yielded += 1
                yield split, text
        self._check_not_empty(tally)

    def _unsplit(self) -> Iterator[tuple[str, str]]:
        if self.data.is_storybook():
            from trainer.data import storybook

            for story in storybook.stories(self.data.storybook_seed, self.data.storybook_stories):
                yield "train", story
        for split, files in (("train", self.train_files), ("validation", self.validation_files)):
            for document in read_documents(files, self.data.documents):
                yield split, document

    def _split(self, document: str) -> Iterator[tuple[str, str]]:
        fraction = self.data.held_out_fraction
        if self.data.documents != "file" or self.data.is_storybook():
            yield "validation" if is_held_out(document, fraction) else "train", document
            return
        # The cut of nanoGPT's data scripts, to the character.
        num_train = int(len(document) * (1 - fraction))
        for split, text in (("train", document[:num_train]), ("validation", document[num_train:])):
            if text and not text.isspace():
                yield split, text

    def _check_not_empty(self, tally: "dict[str, _Tally]") -> None:
        for setting in ("train", "validation") if self.validation_files else ("train",):
            if not tally[setting].num_used:
                raise UserError(self._why_empty(setting, tally[setting]))
        for split in ("train", "validation"):
            if not tally[split].num_yielded:
                goal, size = ("training", "smaller") if split == "train" else ("validation", "larger")
                raise UserError(
                    f"data.held_out_fraction={self.data.held_out_fraction} of {tally['train'].num_used} "
                    f"{self._plural()} leaves nothing for {goal}; give data.validation, a {size} fraction, or "
                    "data.documents='file', which holds out the end of each file."
                )

    def _why_empty(self, setting: str, tally: "_Tally") -> str:
        where = f"data.{setting}={list(getattr(self.data, setting))}"
        if not tally.num_seen:
            return f"{where}: no text in it but whitespace; give files with text."
        return (
            f"{where}: 0 of {tally.num_seen} {self._plural()} are longer than data.min_bytes={self.data.min_bytes}; "
            f"the longest has {tally.longest_bytes}. Lower data.min_bytes."
        )

    def _plural(self) -> str:
        return "stories" if self.data.is_storybook() else f"{self.data.documents}s"


@dataclasses.dataclass
class _Tally:
    num_seen: int = 0
    num_used: int = 0
    num_yielded: int = 0
    longest_bytes: int = 0


def open_source(data: DataConfig) -> Source:
    """Finds the files a config names.

    Raises:
        UserError: as in find_files.
    """
    train = () if data.is_storybook() else tuple(find_files(data.train, "data.train"))
    validation = () if data.validation is None else tuple(find_files(data.validation, "data.validation"))
    return Source(data, train, validation)


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
