"""Prepared data on disk: token shards and a manifest, their writer and their reader.

A shard is two flat little-endian files. tokens: `[BOS] document [BOS] document ... [BOS]`, a [BOS] before each document
and one at the end. offsets: int64, where each document's [BOS] stands, then the last [BOS]. No document crosses shards.
The manifest lists the files with their hashes, the tokenizer's too, and what they were made from and with; its last
entry is the hash of the others.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import Config
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_files import load_tokenizer
from trainer.errors import UserError
from trainer.system.manifest import DamagedError, unsealed, unverified, write_sealed
from trainer.system.storage import Location
from trainer.system.whole import sync

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
SHARD_TOKENS = 1 << 27
# So many are read at a time of what is appended to a shard.
_PART_TOKENS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Shard:
    """A stretch of a split; num_tokens does not count [BOS]."""

    tokens_file: str
    offsets_file: str
    num_documents: int
    num_tokens: int
    tokens_sha256: str
    offsets_sha256: str

    def stream_length(self) -> int:
        """Returns the number of tokens in the file, each [BOS] included."""
        return self.num_tokens + self.num_documents + 1


@dataclasses.dataclass(frozen=True)
class Split:
    """The training or the validation text.

    Attributes:
        num_documents: how many documents.
        num_tokens: tokens of all documents, without [BOS].
        num_bytes: UTF-8 bytes of all documents.
        num_unknown: how many of the tokens are [UNK].
        max_tokens: tokens of the longest document.
        source_nats: -log of the text's exact probability, where the source knows it.
        shards: the files, in order.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_unknown: int
    max_tokens: int
    source_nats: float | None
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared folder.

    Attributes:
        folder: where the files are.
        dtype: of the tokens files: "uint16" or "uint32".
        vocabulary_size: tokens in the vocabulary, the special ones included.
        pad_id: token of padding.
        unknown_id: token of what the vocabulary cannot spell; -1 where it can spell everything.
        bos_id: token before each document.
        tokenizer_kind: as in tokenizer.kind.
        tokenizer_fingerprint: identifies the tokenizer.
        source_fingerprint: identifies the text, and the file of tokenizer.path.
        sources: the files of each split, for people to read.
        splits: "train" and "validation"; of sources that are mixed, "train-0", "validation-0", "train-1" and so on.
        tokenizer_files: SHA-256 of the files in tokenizer/, by name.
        fingerprint: identifies every token, with what and from what it was made, wherever that lies.
        stored_in: URL of the folder that `folder` is this host's copy of, or None.
    """

    folder: Path
    dtype: str
    vocabulary_size: int
    pad_id: int
    unknown_id: int
    bos_id: int
    tokenizer_kind: str
    tokenizer_fingerprint: str
    source_fingerprint: str
    sources: dict[str, list[str]]
    splits: dict[str, Split]
    tokenizer_files: dict[str, str]
    fingerprint: str
    stored_in: str | None = None

    def split(self, name: str) -> Split:
        """Returns the split "train" or "validation"; of sources that are mixed, all of theirs, one after the other."""
        parts = self.parts(name)
        return parts[0] if len(parts) == 1 else functools.reduce(_joined, parts)

    def parts(self, name: str) -> list[Split]:
        """Returns the splits "train" or "validation" of each source that is mixed; where none are, of the only one."""
        return [split for key, split in self.splits.items() if key.partition("-")[0] == name]

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer the text was prepared with.

        Raises:
            UserError: it is damaged or another one.
        """
        tokenizer = load_tokenizer(self.folder / "tokenizer")
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise _damaged(self.folder, "tokenizer/ is not the tokenizer the text was prepared with")
        return tokenizer


def _joined(one: Split, other: Split) -> Split:
    return Split(
        num_documents=one.num_documents + other.num_documents,
        num_tokens=one.num_tokens + other.num_tokens,
        num_bytes=one.num_bytes + other.num_bytes,
        num_unknown=one.num_unknown + other.num_unknown,
        max_tokens=max(one.max_tokens, other.max_tokens),
        source_nats=None,
        shards=one.shards + other.shards,
    )


def num_examples(split: Split, config: Config) -> int:
    """Returns how many examples an epoch of a split has: documents in lines mode, windows in packed mode."""
    return sum(examples_per_shard(split, config))


def examples_per_shard(split: Split, config: Config) -> list[int]:
    """Returns how many of an epoch's examples are in each shard."""
    if config.data.mode == "lines":
        return [shard.num_documents for shard in split.shards]
    # The first token of a shard is never a target and the last window may be part empty.
    return [-(-(shard.stream_length() - 1) // config.train.sequence_length) for shard in split.shards]


def token_dtype(vocabulary_size: int) -> str:
    """Returns the type of the numbers in a tokens file."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Writes manifest.json, once the tokenizer is in the folder.

    Args:
        folder: the folder.
        entries: the attributes of PreparedData but folder, tokenizer_files and fingerprint, which are added.
    """
    files = sorted((folder / "tokenizer").iterdir())
    hashes = {"tokenizer_files": {path.name: _sha256(path) for path in files}}
    content = {"format_version": FORMAT_VERSION, **entries, **hashes}
    write_sealed(folder / MANIFEST, {**content, "fingerprint": _fingerprint(content)})


def read_manifest(folder: Location) -> dict[str, Any]:
    """Returns the entries of manifest.json.

    Raises:
        UserError: it is missing, or one bit of it is not what was written.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
        if unverified(content, MANIFEST).get("format_version") != FORMAT_VERSION:
            raise _damaged(folder, f"{MANIFEST} is not of version {FORMAT_VERSION} of the format")
        return unsealed(content, MANIFEST, to_the_byte=True)
    except FileNotFoundError:
        raise _damaged(folder, f"{MANIFEST} is missing") from None
    except OSError as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read: {error}") from None
    except DamagedError as error:
        raise _damaged(folder, str(error).removesuffix(".")) from None


def load_prepared(folder: str | Path, check_hashes: bool = True) -> PreparedData:
    """Reads a prepared folder's manifest, and checks the files it lists.

    Args:
        folder: the folder.
        check_hashes: whether to read all files and compare their SHA-256, beyond their size.

    Raises:
        UserError: the manifest or a file is missing or damaged.
    """
    prepared = prepared_in(Path(folder))
    for fault in faults_of_files(prepared, check_hashes):
        raise _damaged(prepared.folder, fault)
    return prepared


def prepared_in(folder: Path) -> PreparedData:
    """Reads a prepared folder's manifest, and looks at no other file.

    Raises:
        UserError: it is missing or damaged.
    """
    entries = read_manifest(folder)
    entries["splits"] = {name: split_of(split) for name, split in entries["splits"].items()}
    return PreparedData(folder=folder, **{key: entries[key] for key in entries.keys() - {"format_version", "sha256"}})


def split_of(entries: dict[str, Any]) -> Split:
    """Returns the Split whose entries these are, read from JSON."""
    return Split(**{**entries, "shards": tuple(Shard(**shard) for shard in entries["shards"])})


def faults_of_files(prepared: PreparedData, check_hashes: bool = True) -> Iterator[str]:
    """Yields what is wrong with each file that is not what the manifest says, beginning with its name.

    Args:
        prepared: what the manifest says.
        check_hashes: whether to read all files and compare their SHA-256, beyond their size.
    """
    width = np.dtype(prepared.dtype).itemsize
    for split in prepared.splits.values():
        for shard in split.shards:
            for name, num_bytes, sha256 in (
                (shard.tokens_file, shard.stream_length() * width, shard.tokens_sha256),
                (shard.offsets_file, (shard.num_documents + 1) * 8, shard.offsets_sha256),
            ):
                yield from _faults(prepared.folder, name, num_bytes, sha256 if check_hashes else None)
    for name, sha256 in prepared.tokenizer_files.items():
        yield from _faults(prepared.folder, f"tokenizer/{name}", None, sha256 if check_hashes else None)


def _faults(folder: Path, name: str, num_bytes: int | None, sha256: str | None) -> Iterator[str]:
    path = folder / name
    try:
        if not path.is_file():
            yield f"{name} is missing"
        elif num_bytes is not None and path.stat().st_size != num_bytes:
            yield f"{name} has {path.stat().st_size} bytes instead of {num_bytes}"
        elif sha256 is not None and _sha256(path) != sha256:
            yield f"{name} was changed: its SHA-256 does not match"
    except OSError as error:
        yield f"{name} cannot be read: {error.strerror or error}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(entries: dict[str, Any]) -> str:
    """Hashes what decides the tokens: not where the text lies, and not how the same tokenizer is written down."""
    left_out = ("format_version", "sources", "tokenizer_files")
    kept = {key: value for key, value in entries.items() if key not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damaged(folder: Location, what: str) -> UserError:
    return UserError(f"{folder}: {what}; delete the folder and prepare again.")


class SplitWriter:
    """Writes a split's shards one after the other, and counts."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int):
        self._stem, self._shard_tokens = folder / split, shard_tokens
        self._dtype = np.dtype(token_dtype(tokenizer.vocabulary_size)).newbyteorder("<")
        self._bos_id, self._unknown_id = tokenizer.bos_id, tokenizer.unknown_id
        self._shards: list[Shard] = []
        self._num_bytes = self._num_unknown = self._max_tokens = 0
        self.num_pieces = 0
        self.nats: list[float] = []
        self._open_shard()

    def write(self, tokens: np.ndarray, lengths: np.ndarray, is_start: list[bool], num_bytes: int) -> None:
        """Appends pieces of documents.

        Args:
            tokens: int32 [tokens], of all pieces.
            lengths: int64 [pieces], how many of them each piece has.
            is_start: for each piece whether it starts a document, rather than going on with the one before.
            num_bytes: of the text of all pieces.
        """
        self.num_pieces += len(lengths)
        self._num_bytes += num_bytes
        self._num_unknown += int(np.count_nonzero(tokens == self._unknown_id))
        first_tokens = (np.cumsum(lengths) - lengths)[is_start]
        stream = np.insert(tokens, first_tokens, self._bos_id)
        self._write_stream(stream, first_tokens + np.arange(len(first_tokens)))

    def write_part(self, folder: Path, split: Split) -> None:
        """Appends what another writer, of the same tokenizer, wrote into a folder.

        Raises:
            UserError: a file there is not what was written.
        """
        self._num_bytes += split.num_bytes
        self._num_unknown += split.num_unknown
        self.nats += [] if split.source_nats is None else [split.source_nats]
        for shard in split.shards:
            for name, sha256 in ((shard.tokens_file, shard.tokens_sha256), (shard.offsets_file, shard.offsets_sha256)):
                if fault := next(_faults(folder, name, None, sha256), None):
                    raise UserError(f"{folder}: {fault}; prepare again.")
            offsets = np.memmap(folder / shard.offsets_file, "<i8", "r")
            tokens = np.memmap(folder / shard.tokens_file, self._dtype, "r")
            end = len(tokens) - 1  # The last [BOS] is written by who closes the shard.
            for start in range(0, end, _PART_TOKENS):
                stream = np.array(tokens[start : min(start + _PART_TOKENS, end)])
                first, last = np.searchsorted(offsets, [start, start + len(stream)])
                self._write_stream(stream, np.array(offsets[first:last]) - start)

    def _write_stream(self, stream: np.ndarray, starts: np.ndarray) -> None:
        """Appends tokens, [BOS] at the start of each document included, and cuts shards."""
        while len(beyond := np.flatnonzero(self._tokens.length + starts >= self._shard_tokens)):
            cut_at = starts[beyond[0]]
            self._append(stream[:cut_at], starts[: beyond[0]])
            self._close_shard()
            self._open_shard()
            stream, starts = stream[cut_at:], starts[beyond[0] :] - cut_at
        self._append(stream, starts)

    def progress(self) -> dict[str, Any]:
        """Returns, once all that was written is on the disk, what `go_on` needs to know."""
        counts = {name: getattr(self, name) for name in self._COUNTS}
        files = [self._tokens.progress(), self._offsets.progress()]
        return {"shards": [dataclasses.asdict(shard) for shard in self._shards], "files": files, **counts}

    def go_on(self, progress: dict[str, Any]) -> None:
        """Takes up what another writer of the same split had written by the time of its `progress`.

        Raises:
            ValueError: a file is not what it was.
        """
        self._shards = [Shard(**shard) for shard in progress["shards"]]
        for shard in self._shards:
            for name, sha256 in ((shard.tokens_file, shard.tokens_sha256), (shard.offsets_file, shard.offsets_sha256)):
                if fault := next(_faults(self._stem.parent, name, None, sha256), None):
                    raise ValueError(fault)
        self._open_shard()  # Which may have grown since; those after it are written over.
        for file, (length, sha256) in zip((self._tokens, self._offsets), progress["files"], strict=True):
            file.go_on(length, sha256)
        for name in self._COUNTS:
            setattr(self, name, progress[name])

    _COUNTS = ("num_pieces", "_num_bytes", "_num_unknown", "_max_tokens", "_last_start")

    def close(self) -> Split:
        """Ends the last shard and returns what was written."""
        self._close_shard()
        return Split(
            num_documents=sum(shard.num_documents for shard in self._shards),
            num_tokens=sum(shard.num_tokens for shard in self._shards),
            num_bytes=self._num_bytes,
            num_unknown=self._num_unknown,
            max_tokens=self._max_tokens,
            source_nats=math.fsum(self.nats) if self.nats else None,
            shards=tuple(self._shards),
        )

    def _open_shard(self) -> None:
        name = f"{self._stem}-{len(self._shards):05}"
        self._tokens = _HashedFile(Path(f"{name}.tokens"), self._dtype)
        self._offsets = _HashedFile(Path(f"{name}.offsets"), np.dtype("<i8"))
        self._last_start = 0

    def _append(self, stream: np.ndarray, starts: np.ndarray) -> None:
        offsets = self._tokens.length + starts
        lengths = np.diff(offsets, prepend=self._last_start) - 1  # Of the document that ends at each of them.
        self._max_tokens = max(self._max_tokens, int(lengths.max(initial=0)))
        self._last_start = int(offsets[-1]) if len(offsets) else self._last_start
        self._tokens.write(stream)
        self._offsets.write(offsets)

    def _close_shard(self) -> None:
        self._append(np.array([self._bos_id]), np.array([0]))
        num_documents = self._offsets.length - 1
        self._shards.append(
            Shard(
                tokens_file=self._tokens.path.name,
                offsets_file=self._offsets.path.name,
                num_documents=num_documents,
                num_tokens=self._tokens.length - num_documents - 1,
                tokens_sha256=self._tokens.sha256.hexdigest(),
                offsets_sha256=self._offsets.sha256.hexdigest(),
            )
        )


class _HashedFile:
    """A file of numbers, hashed while it is written."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.length, self.sha256 = path, 0, hashlib.sha256()
        self._dtype = dtype

    def progress(self) -> tuple[int, str]:
        if self.length:
            sync(self.path)
        return self.length, self.sha256.hexdigest()

    def go_on(self, length: int, sha256: str) -> None:
        """Takes up a file that had this length and SHA-256, and may have grown since."""
        if length:
            os.truncate(self.path, length * self._dtype.itemsize)
            with self.path.open("rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256")
        if self.sha256.hexdigest() != sha256:
            raise ValueError(f"{self.path.name} was changed")
        self.length = length

    def write(self, numbers: np.ndarray) -> None:
        if not self.length:
            self.path.unlink(missing_ok=True)  # What a writer that was stopped may have left.
        data = numbers.astype(self._dtype).tobytes()
        # Opened each time, so that no error on the way leaves a file open.
        with self.path.open("ab") as file:
            file.write(data)
        self.sha256.update(data)
        self.length += len(numbers)
