"""The documents in files of text, on a disk or in an object store.

Reads plain text and JSON Lines, and both packed with gzip or zstd. Only a part of a document is in memory at a time if
the document is longer than LONG_CHARS.
"""

import codecs
import dataclasses
import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Literal, cast

from trainer.config.refusals import is_utf8
from trainer.errors import UserError
from trainer.system.storage import Location
from trainer.text.arrow import unpacked_zstd
from trainer.text.formats import (
    SAMPLE_BYTES,
    START_BYTES,
    Packer,
    fault_of_bytes,
    fault_of_first_line,
    fault_of_packed_name,
    fault_of_start,
    fault_of_zstd,
    packer_of_name,
    packer_of_start,
)

Kind = Literal["line", "paragraph", "file"]  # "auto" is one of the first two, by has_paragraphs.
# The text of a document; or the parts of a long document, one after the other.
Document = str | Iterator[str]
# A part of a document, and whether the document ends with it.
Fragment = tuple[str, bool]

LONG_CHARS = 1 << 22
# Text in paragraphs has at least one blank line for this many lines; a list with a few sections has fewer.
LINES_PER_PARAGRAPH = 20
_READ_BYTES = 1 << 20


@dataclasses.dataclass
class Progress:
    """The progress of a reading.

    Attributes:
        done: the bytes that were read; if a file is packed, its packed bytes.
        total: the bytes of all files.
    """

    done: int = 0
    total: int = 0


def read_documents(path: Location, kind: Kind, progress: Progress | None = None) -> Iterator[Document]:
    r"""Yields the documents of a text file in UTF-8, plain or packed, in order.

    A line ends only at \n or \r\n: U+2028 and a lone \r are characters of the text. The end is not part of the line,
    and a \r\n inside a paragraph or a file becomes \n. A byte-order mark at the start of a file is dropped, and so are
    documents of white space only. Bytes that are not UTF-8 become lone surrogates.

    Args:
        path: the file.
        kind: what one document is.
        progress: counts the bytes that are read.

    Raises:
        UserError: the file cannot be read.
    """
    chunks = _read_text(path, progress)
    if kind == "file":
        return _documents(itertools.chain(((chunk, False) for chunk in chunks), [("", True)]))
    return _documents(_lines(chunks) if kind == "line" else _paragraphs(_lines(chunks)))


def has_paragraphs(path: Location) -> bool:
    """Whether blank lines divide a text file into paragraphs: whether its first megabyte has at least one gap between
    two lines of text for every LINES_PER_PARAGRAPH lines of text.

    Raises:
        UserError: the file cannot be read.
    """
    lines = [bool(line.strip()) for line in next(_read_text(path, None)).split("\n")]
    lines = lines[: 1 + max((i for i, has_text in enumerate(lines) if has_text), default=0)]
    num_gaps = sum(before and not after for before, after in itertools.pairwise(lines))
    return num_gaps * LINES_PER_PARAGRAPH >= sum(lines) and num_gaps > 0


def read_records(path: Location, field: str, progress: Progress | None = None) -> Iterator[str | ValueError]:
    """Yields a field of each line of a JSON Lines file that is not blank.

    A line without the field gives a ValueError that explains what is wrong, or a UnicodeError if the line is not UTF-8.
    It is yielded and not raised, because the next line may be right.

    Raises:
        UserError: the file cannot be read, or is JSON over several lines or in an array.
    """
    for number, line in enumerate(_joined(_lines(_read_text(path, progress))), start=1):
        # Files that were joined may have a byte-order mark in the middle, too.
        line = line.removeprefix("\ufeff")
        if number == 1 and (fault := fault_of_first_line(path, line, _packer(path))) is not None:
            raise UserError(fault)
        if line and not line.isspace():
            yield _field_of(line, field, number)


# float: Python refuses to read an int of thousands of digits.
_JSON = json.JSONDecoder(parse_int=float)


def _field_of(line: str, field: str, number: int) -> str | ValueError:
    try:
        record = _JSON.decode(line)
    except (ValueError, RecursionError) as error:
        if not is_utf8(line):
            return UnicodeError(f"line {number} is not UTF-8")
        return ValueError(f"line {number} is not JSON: {error}")
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        missing = f"line {number} has no text in data.text_field={field!r}"
        if not isinstance(record, dict):
            return ValueError(f"{missing}; it is a {type(record).__name__}")
        texts = [name for name, value in record.items() if field not in record and isinstance(value, str)]
        likely = max(texts, key=lambda name: len(record[name]), default=None)  # An identifier is shorter than a text.
        other = "" if likely is None else f"; if it is in another one, name that, such as data.text_field={likely!r}"
        return ValueError(f"{missing}; it has {sorted(record)[:5]}{other}")
    if not is_utf8(text):
        if not is_utf8(line):
            return UnicodeError(f"line {number} is not UTF-8")
        return ValueError(
            f"line {number} has half of a character in data.text_field={field!r}: one of \\ud800 to \\udfff without "
            "the other half"
        )
    if "\0" in text:
        return ValueError(f"line {number} has a NUL character in data.text_field={field!r}")
    return text


def parts_of(document: Document) -> Iterable[str]:
    """Returns the parts of a document; a document that is not long is a single part."""
    return (document,) if isinstance(document, str) else document


def count_characters(path: Location) -> int:
    """Returns the number of characters of a text file that is one document."""
    return sum(len(chunk) for chunk in _read_text(path, None))


def first_fault(path: Location) -> str | None:
    """Returns the first fault of a text file, its place and what to do, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, before = 0, b""
    for chunk in _read_bytes(path, None):
        num_pending = len(decoder.getstate()[0])
        nul = chunk.find(b"\0")
        place = nul if nul >= 0 else None
        what = "NUL byte"
        try:
            decoder.decode(chunk[:place], final=not chunk)
        except UnicodeDecodeError as error:
            place, what = error.start - num_pending, "not UTF-8"
        if place is not None:
            advice = fault_of_bytes(path, _around(before + chunk, len(before) + place), not chunk, _packer(path))
            return f"{path}: {what} at byte offset {offset + place}; {advice}"
        offset += len(chunk)
        before = chunk
    return None


def _around(content: bytes, place: int) -> bytes:
    """Returns the bytes around a place, from the start of a line if there is one before it."""
    start = max(place - SAMPLE_BYTES // 2, 0)
    if start:
        start = content.find(b"\n", start, place) + 1 or start
    return content[start : place + SAMPLE_BYTES // 2]


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
    """Yields a file's bytes, unpacked if they are packed, whatever the name, and an empty chunk at the end.

    Raises:
        UserError: the file cannot be read, or its first bytes show that it is not text.
    """
    packer = None
    try:
        with _open(path) as packed:
            packer, of_name = _packer(path), packer_of_name(path)
            if of_name is not None and packer is None and (start := packed.read(START_BYTES)):
                raise UserError(fault_of_start(path, start, packer) or fault_of_packed_name(path, of_name, start))
            file = _unpacked(packed, packer)
            before, is_start = 0, True
            while chunk := file.read(_READ_BYTES):
                if is_start and (fault := fault_of_start(path, chunk[:START_BYTES], packer)) is not None:
                    raise UserError(fault)
                is_start = False
                if progress is not None:
                    # The place in the packed file, which files in a store have as well.
                    progress.done, before = progress.done + packed.tell() - before, packed.tell()
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: a broken or cut-off gzip file ({error}); fetch it again.") from None
    except OSError as error:
        if packer == "zstd" and error.errno is None:  # Raised by the unpacker, and not by the file system.
            raise UserError(fault_of_zstd(path, str(error))) from None
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    yield b""


def _packer(path: Location) -> Packer | None:
    """Returns the program that a file is packed with, by its first bytes."""
    with _open(path) as file:
        return packer_of_start(file.read(4))


def _unpacked(packed: BinaryIO, packer: Packer | None) -> BinaryIO:
    """Returns a file whose `read` returns the unpacked bytes."""
    if packer == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=packed))
    return packed if packer is None else unpacked_zstd(packed)


def _open(path: Location) -> BinaryIO:
    return path.open("rb")


# From characters to documents.


def _lines(chunks: Iterable[str]) -> Iterator[Fragment]:
    for chunk in chunks:
        # Not splitlines(), which splits at U+2028, \x0b, \x85 and others, too.
        *lines, rest = chunk.split("\n")
        for line in lines:
            yield line, True
        if rest:
            yield rest, False
    yield "", True


def _paragraphs(lines: Iterable[Fragment]) -> Iterator[Fragment]:
    is_open = is_middle = False  # Whether in a paragraph, and in a line of it.
    blank = ""  # The start of a line that has only white space so far.
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
    """Puts documents together, and leaves out documents of white space only."""
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
            for _ in rest:  # Skips the parts that were not read.
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
