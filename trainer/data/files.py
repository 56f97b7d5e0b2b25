"""Files of text, on a disk or in an object store, and the documents in them.

Plain text, JSON Lines, and either of them packed with gzip. Streams: of a document longer than LONG_CHARS no more than
a part is in memory at a time.
"""

import codecs
import dataclasses
import glob
import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from trainer.config import UserError
from trainer.storage import Location, Url, locate

Kind = Literal["line", "paragraph", "file"]
# The text, or of a long one its parts, one after the other.
Document = str | Iterator[str]
# A part of a document, and whether that ends with it.
Fragment = tuple[str, bool]

LONG_CHARS = 1 << 22
_READ_BYTES = 1 << 20
_SIMPLEBOOKS_URL = "https://dldata-public.s3.us-east-2.amazonaws.com/simplebooks.zip"
_TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclasses.dataclass
class Progress:
    """How much of the files has been read: bytes, packed ones as they are."""

    done: int = 0
    total: int = 0


def find_files(sources: Iterable[str], setting: str) -> list[Location]:
    """Expands file names and globs to files, in the order given, a glob's matches sorted, each file once.

    Args:
        sources: names of files, or globs, where ** matches any depth and ~ is the home folder; or URLs, or globs of
            them, such as gs://bucket/*.jsonl.gz.
        setting: the setting they come from, for the error.

    Raises:
        UserError: a source matches no file, or is a directory.
    """
    files: dict[Location, None] = {}
    for source in sources:
        location = locate(source)
        path = location if isinstance(location, Url) else location.expanduser()
        if path.is_dir():
            raise UserError(
                f"{setting}={source!r} is a directory; name its files, for example {str(path / '*.txt')!r}."
            )
        matches = path.glob() if isinstance(path, Url) else _matches(path)
        if not matches:
            raise UserError(f"{setting}={source!r}: {_nothing_there(source, setting)}")
        files.update(dict.fromkeys(matches))
    return list(files)


def _matches(path: Path) -> list[Path]:
    # A name that exists is taken literally: book[1].txt is no glob.
    names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (no root)
    return [Path(name) for name in names if not Path(name).is_dir()]


def _nothing_there(source: str, setting: str) -> str:
    if "simplebooks" in source.lower():
        return (
            "no such file. Get SimpleBooks with\n"
            f"  python -c 'import keras; keras.utils.get_file(origin=\"{_SIMPLEBOOKS_URL}\", extract=True)'\n"
            "or train on your own text: data.train=PATH data.validation=PATH"
        )
    if Path(source).name == "tinyshakespeare.txt":
        return (
            f"no such file, seen from {Path.cwd()}. Get tiny Shakespeare with\n"
            f"  curl -fLo tinyshakespeare.txt {_TINY_SHAKESPEARE_URL}\n"
            "or train on your own text: data.train=PATH"
        )
    what = "no file matches" if glob.has_magic(source) else "no such file"
    # Without it part of data.train is held out.
    without = ", or leave it out with data.validation=none" if setting == "data.validation" else ""
    return (
        f"{what}, seen from {Path.cwd()}. Check the path, or give your own text: {setting}=PATH, a file or a glob in "
        f"quotes, such as '{setting}=texts/*.txt'{without}."
    )


def is_json_lines(path: Location) -> bool:
    """Whether a file holds a JSON object per line, by its name."""
    return path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def read_documents(path: Location, kind: Kind, progress: Progress | None = None) -> Iterator[Document]:
    r"""Yields the documents of a text file in UTF-8, plain or .gz, in order.

    A line ends at \n or \r\n and nowhere else: not at U+2028 and its like, and a lone \r is a character of the text.
    The end is no part of the line, and a \r\n inside a paragraph or a file becomes \n. A byte-order mark at the start
    of a file is dropped, and so are documents of nothing but whitespace. What is not UTF-8 comes as lone surrogates.

    Args:
        path: the file.
        kind: what one document is.
        progress: counts the bytes that were read.

    Raises:
        UserError: the file cannot be read.
    """
    chunks = _read_text(path, progress)
    if kind == "file":
        return _documents(itertools.chain(((chunk, False) for chunk in chunks), [("", True)]))
    return _documents(_lines(chunks) if kind == "line" else _paragraphs(_lines(chunks)))


def read_records(path: Location, field: str, progress: Progress | None = None) -> Iterator[str | ValueError]:
    """Yields a field of each line of a JSON Lines file that is not blank; for a line without it what is wrong there, as
    an error that is yielded and not raised, because the next line may be right.

    Raises:
        UserError: the file cannot be read.
    """
    for number, line in enumerate(_joined(_lines(_read_text(path, progress))), start=1):
        if line and not line.isspace():
            yield _field_of(line, field, number)


def _field_of(line: str, field: str, number: int) -> str | ValueError:
    try:
        record = json.loads(line)
    except ValueError as error:
        return ValueError(f"line {number} is not JSON: {error}")
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = sorted(record)[:5] if isinstance(record, dict) else f"a {type(record).__name__}"
        return ValueError(f"line {number} has no text in data.text_field={field!r}; it has {has}")
    return text


def parts_of(document: Document) -> Iterable[str]:
    """Returns the parts of a document: of one that is not long, a single one."""
    return (document,) if isinstance(document, str) else document


def count_characters(path: Location) -> int:
    """Returns the length of a text file as `read_documents` gives it whole."""
    return sum(len(chunk) for chunk in _read_text(path, None))


def first_fault(path: Location) -> str | None:
    """Returns what is wrong with a text file and where it first is, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for chunk in _read_bytes(path, None):
        num_pending = len(decoder.getstate()[0])
        nul = chunk.find(b"\0")
        try:
            decoder.decode(chunk[: nul if nul >= 0 else None], final=not chunk)
        except UnicodeDecodeError as error:
            return (
                f"{path}: not UTF-8 at byte offset {offset - num_pending + error.start}; convert it, for example with: "
                f"iconv -f LATIN1 -t UTF-8 {path} > {path}.utf8 (naming the encoding it is in)."
            )
        if nul >= 0:
            return (
                f"{path}: NUL byte at byte offset {offset + nul}; is it text? UTF-16 can be converted with: "
                f"iconv -f UTF-16 -t UTF-8 {path} > {path}.utf8"
            )
        offset += len(chunk)
    return None


def digest(path: Location) -> bytes:
    """Returns the SHA-256 of a file."""
    sha256 = hashlib.sha256()
    try:
        with _open(path) as file:
            while chunk := file.read(_READ_BYTES):
                sha256.update(chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    return sha256.digest()


# From bytes to characters.


def _read_text(path: Location, progress: Progress | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    is_start, held_back = True, ""
    for chunk in _read_bytes(path, progress):
        text = held_back + decoder.decode(chunk, final=not chunk)
        if is_start and text:
            text, is_start = text.removeprefix("\ufeff"), False
        # The \n of a \r\n may be the first byte of the next chunk.
        held_back = "\r" if chunk and text.endswith("\r") else ""
        yield text.removesuffix(held_back).replace("\r\n", "\n")


def _read_bytes(path: Location, progress: Progress | None) -> Iterator[bytes]:
    """Yields a file's bytes, unpacked, and an empty chunk at the end."""
    try:
        with _open(path) as packed:
            file = gzip.GzipFile(fileobj=packed) if path.name.endswith(".gz") else packed
            before = 0
            while chunk := file.read(_READ_BYTES):
                if progress is not None:
                    # In a store, too, this is a number the client knows.
                    progress.done, before = progress.done + packed.tell() - before, packed.tell()
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: a broken or cut-off gzip file ({error}); fetch it again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    yield b""


def _open(path: Location) -> BinaryIO:
    return path.open("rb")


# From characters to documents.


def _lines(chunks: Iterable[str]) -> Iterator[Fragment]:
    for chunk in chunks:
        # Not splitlines(), which also splits at U+2028, \x0b, \x85 and others.
        *lines, rest = chunk.split("\n")
        for line in lines:
            yield line, True
        if rest:
            yield rest, False
    yield "", True


def _paragraphs(lines: Iterable[Fragment]) -> Iterator[Fragment]:
    is_open = is_middle = False  # In a paragraph; in a line of it.
    blank = ""  # The start of a line that has nothing but whitespace so far.
    for text, is_end in lines:
        text = blank + text if blank else text
        blank = ""
        if not is_middle and (not text or text.isspace()):
            if not is_end:
                blank = text
            elif is_open:
                yield "", True
                is_open = False
            continue
        yield ("\n" + text if is_open and not is_middle else text), False
        is_open, is_middle = True, not is_end
    yield "", True


def _documents(fragments: Iterable[Fragment]) -> Iterator[Document]:
    """Puts documents together, and leaves out those of nothing but whitespace."""
    fragments = iter(fragments)
    parts: list[str] = []
    num_chars = 0
    for text, is_end in fragments:
        parts.append(text)
        num_chars += len(text)
        if is_end:
            document = text if len(parts) == 1 else "".join(parts)
            if document and not document.isspace():
                yield document
        elif num_chars <= LONG_CHARS or (start := "".join(parts)).isspace():
            continue
        else:
            rest = _up_to_its_end(fragments)
            yield itertools.chain((start,), rest)
            for _ in rest:  # Whatever was not read of it.
                pass
        parts, num_chars = [], 0


def _up_to_its_end(fragments: Iterator[Fragment]) -> Iterator[str]:
    for text, is_end in fragments:
        yield text
        if is_end:
            return


def _joined(fragments: Iterable[Fragment]) -> Iterator[str]:
    parts: list[str] = []
    for text, is_end in fragments:
        parts.append(text)
        if is_end:
            yield text if len(parts) == 1 else "".join(parts)
            parts = []
