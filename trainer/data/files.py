"""Files of text, on a disk or in an object store, and the documents in them.

Plain text, JSON Lines, and either of them packed with gzip. Streams: of a document longer than LONG_CHARS no more than
a part is in memory at a time.
"""

import codecs
import collections
import dataclasses
import fnmatch
import glob
import gzip
import hashlib
import itertools
import json
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from trainer.config_file import is_utf8
from trainer.data.formats import (
    GZIP_MARK,
    SAMPLE_BYTES,
    START_BYTES,
    fault_of_bytes,
    fault_of_first_line,
    fault_of_gzip_name,
    fault_of_name,
    fault_of_start,
    is_gzip_name,
)
from trainer.errors import UserError, quoted
from trainer.system.storage import Location, Url, locate

Item = TypeVar("Item")
Kind = Literal["line", "paragraph", "file"]  # "auto" is one of the first two, by has_paragraphs.
# The text, or of a long one its parts, one after the other.
Document = str | Iterator[str]
# A part of a document, and whether that ends with it.
Fragment = tuple[str, bool]

LONG_CHARS = 1 << 22
# A text of paragraphs has a blank line for this many lines or more often; a list with a few sections has not.
LINES_PER_PARAGRAPH = 20
_READ_BYTES = 1 << 20
SIMPLEBOOKS_URL = "https://dldata-public.s3.us-east-2.amazonaws.com/simplebooks.zip"
_TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclasses.dataclass
class Progress:
    """How much of the files has been read: bytes, packed ones as they are."""

    done: int = 0
    total: int = 0


def find_files(sources: Iterable[str], setting: str) -> list[Location]:
    """Expands file names and globs to files, in the order given, a glob's matches sorted, each file once, even if
    several names or links lead to it.

    Args:
        sources: names of files, or globs, where ** matches any depth and ~ is the home folder; or URLs, or globs of
            them, such as gs://bucket/*.jsonl.gz.
        setting: the setting they come from, for the error.

    Raises:
        UserError: a source matches no file, is a directory, a pipe or a device, or is a table by its name; or a folder
            cannot be listed.
    """
    files: list[Location] = []
    for source in sources:
        path = locate(source)
        try:
            if path.is_dir():
                raise UserError(f"{setting}={source!r} is a directory; {_files_to_name(path, setting)}")
            matches = path.glob() if isinstance(path, Url) else _matches(path)
            if not matches:
                raise UserError(f"{setting}={source!r}: {_nothing_there(source, setting)}")
            for match in matches:
                if (fault := _fault_of_file(match)) is not None:
                    raise UserError(f"{setting}={source!r}: {fault}")
                files.append(match)
        except OSError as error:
            where = error.filename or path
            raise UserError(f"{setting}={source!r}: {where} cannot be read: {error.strerror or error}.") from None
    return each_once(files)


def each_once(files: Iterable[Item]) -> list[Item]:
    """Returns files without those that were there before under another name, as links have it."""
    found: dict[object, Item] = {}
    for file in files:
        found.setdefault(os.path.realpath(file) if isinstance(file, Path) else file, file)
    return list(found.values())


def _matches(path: Path) -> list[Path]:
    # A name that exists is taken literally: book[1].txt is no glob, and of book[1]/*.txt only the end is one.
    folder, patterns = path, list[str]()
    while not _is_there(folder) and folder != folder.parent:
        folder, patterns = folder.parent, [folder.name, *patterns]
    return sorted(match for match in _expand(folder, patterns) if not match.is_dir()) if patterns else [path]


def _expand(folder: Path, patterns: list[str]) -> Iterator[Path]:
    """Yields what a glob in a folder matches; as the module glob does, but a folder that cannot be listed is an error,
    and links that lead back to a folder above end there."""
    if not patterns:
        yield folder
        return
    first, *rest = patterns
    if first == "**":
        for each in _folders_in(folder):
            yield from _expand(each, rest or ["*"])
    elif not glob.has_magic(first):
        if _is_there(folder / first):
            yield from _expand(folder / first, rest)
    elif folder.is_dir():
        for name in fnmatch.filter([path.name for path in folder.iterdir()], first):
            if not name.startswith(".") or first.startswith("."):
                yield from _expand(folder / name, rest)


def _is_there(path: Path) -> bool:
    """Whether there is such a file or link; an OSError if nobody may know."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _folders_in(top: Path) -> Iterator[Path]:
    """Yields a folder and all below it, hidden ones left out and each one once, whatever links there are."""
    seen: set[str] = set()
    for folder, names, _ in os.walk(top, onerror=_raise, followlinks=True):
        names[:] = [] if os.path.realpath(folder) in seen else sorted(name for name in names if name[0] != ".")
        if os.path.realpath(folder) not in seen:
            seen.add(os.path.realpath(folder))
            yield Path(folder)


def _raise(error: OSError) -> None:
    raise error


def _fault_of_file(path: Location) -> str | None:
    if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):
        return f"{path} is a pipe, a device or a socket; text is read several times, so name a file that holds it."
    return fault_of_name(path)


def _files_to_name(folder: Location, setting: str) -> str:
    """Returns what to write for the files in a folder."""
    ends, pattern = [""], "*.txt"
    if isinstance(folder, Path):
        for below in _folders_in(folder):
            files = [path for path in sorted(below.iterdir()) if path.is_file() and path.name[0] != "."]
            ends = ["".join(path.suffixes[-2 if is_gzip_name(path) else -1 :]) for path in files]
            if ends:
                end = collections.Counter(ends).most_common(1)[0][0]
                pattern = f"{'' if below == folder else '**/'}*{end}"
                break
        else:
            return "name files; there are none in it."
    return f"name its files, for example {quoted(f'{setting}={folder / pattern}')}."


def _nothing_there(source: str, setting: str) -> str:
    if "simplebooks" in source.lower():
        # cache_dir, and a folder that is there: Keras looks at KERAS_HOME, and else would take one below /tmp.
        get = f'import keras; keras.utils.get_file(origin="{SIMPLEBOOKS_URL}", extract=True, cache_dir="~/.keras")'
        return (
            "no such file. Get SimpleBooks with\n"
            f"  mkdir -p ~/.keras && {quoted(sys.executable)} -c '{get}'\n"
            "or train on your own text: data.train=PATH data.validation=PATH"
        )
    if "," in source:
        several = quoted(f"{setting}=[{source.strip('[]')}]")
        return f"no such file, seen from {Path.cwd()}. Several files are named so: {several}"
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


def read_documents(path: Location, kind: Kind, progress: Progress | None = None) -> Iterator[Document]:
    r"""Yields the documents of a text file in UTF-8, plain or packed with gzip, in order.

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


def has_paragraphs(path: Location) -> bool:
    """Whether blank lines divide a text file into paragraphs, by its first megabyte: at least one between two lines of
    text for every LINES_PER_PARAGRAPH of these.

    Raises:
        UserError: the file cannot be read.
    """
    lines = [bool(line.strip()) for line in next(_read_text(path, None)).split("\n")]
    lines = lines[: 1 + max((i for i, has_text in enumerate(lines) if has_text), default=0)]
    num_gaps = sum(before and not after for before, after in itertools.pairwise(lines))
    return num_gaps * LINES_PER_PARAGRAPH >= sum(lines) and num_gaps > 0


def read_records(path: Location, field: str, progress: Progress | None = None) -> Iterator[str | ValueError]:
    """Yields a field of each line of a JSON Lines file that is not blank; for a line without it what is wrong there, as
    an error that is yielded and not raised, because the next line may be right: a UnicodeError if it is not UTF-8.

    Raises:
        UserError: the file cannot be read, or is JSON over several lines or in an array.
    """
    for number, line in enumerate(_joined(_lines(_read_text(path, progress))), start=1):
        # Files with a mark that were joined have one in the middle, too.
        line = line.removeprefix("\ufeff")
        if number == 1 and (fault := fault_of_first_line(path, line, _is_gzip(path))) is not None:
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
            f"line {number} has half of a character in data.text_field={field!r}: one of \\ud800 to \\udfff alone"
        )
    if "\0" in text:
        return ValueError(f"line {number} has a NUL character in data.text_field={field!r}")
    return text


def parts_of(document: Document) -> Iterable[str]:
    """Returns the parts of a document: of one that is not long, a single one."""
    return (document,) if isinstance(document, str) else document


def count_characters(path: Location) -> int:
    """Returns the length of a text file as `read_documents` gives it whole."""
    return sum(len(chunk) for chunk in _read_text(path, None))


def first_fault(path: Location) -> str | None:
    """Returns what is wrong with a text file, where it first is and what to do, or None."""
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
            advice = fault_of_bytes(path, _around(before + chunk, len(before) + place), not chunk, _is_gzip(path))
            return f"{path}: {what} at byte offset {offset + place}; {advice}"
        offset += len(chunk)
        before = chunk
    return None


def _around(content: bytes, place: int) -> bytes:
    """Returns bytes on both sides of a place, from the start of a line on if there is one."""
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
    """Yields a file's bytes, unpacked if it is packed with gzip, whatever its name, and an empty chunk at the end.

    Raises:
        UserError: the file cannot be read, or is not text by its first bytes.
    """
    try:
        with _open(path) as packed:
            is_packed = _is_gzip(path)
            if is_gzip_name(path) and not is_packed and (start := packed.read(START_BYTES)):
                raise UserError(fault_of_start(path, start, is_packed) or fault_of_gzip_name(path, start))
            file = gzip.GzipFile(fileobj=packed) if is_packed else packed
            before, is_start = 0, True
            while chunk := file.read(_READ_BYTES):
                if is_start and (fault := fault_of_start(path, chunk[:START_BYTES], is_packed)) is not None:
                    raise UserError(fault)
                is_start = False
                if progress is not None:
                    # In a store, too, this is a number the client knows.
                    progress.done, before = progress.done + packed.tell() - before, packed.tell()
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: a broken or cut-off gzip file ({error}); fetch it again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    yield b""


def _is_gzip(path: Location) -> bool:
    with _open(path) as file:
        return file.read(len(GZIP_MARK)) == GZIP_MARK


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
