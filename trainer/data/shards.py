"""Prepared data on disk: token shards and a manifest, and what reads them.

A shard is two flat little-endian files. tokens: `[BOS] document [BOS] document ... [BOS]`, a [BOS] before each document
and one at the end. offsets: int64, the place of each document's [BOS], then of the last [BOS]. No document crosses
shards. The manifest lists these files and the tokenizer's with their hashes, and what they were made from; its last
entry is the hash of the others.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.system.manifest import DamagedError, unsealed, unverified, write_sealed
from trainer.system.storage import Location
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.tokenizers.tokenizer_files import load_tokenizer

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
SHARD_TOKENS = 1 << 27


@dataclasses.dataclass(frozen=True)
class Shard:
    """A stretch of a split.

    Attributes:
        tokens_file: the name of the file of tokens.
        offsets_file: the name of the file of offsets.
        num_documents: the number of documents.
        num_tokens: the tokens of all documents, without [BOS].
        tokens_sha256: the SHA-256 of the file of tokens.
        offsets_sha256: the SHA-256 of the file of offsets.
    """

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
        num_documents: the number of documents.
        num_tokens: the tokens of all documents, without [BOS].
        num_bytes: the UTF-8 bytes of all documents.
        num_unknown: how many of the tokens are [UNK].
        max_tokens: the tokens of the longest document.
        source_nats: -log of the text's exact probability; None if the source does not give it.
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
        folder: the folder of the files.
        dtype: the dtype of the tokens files: "uint16" or "uint32".
        vocabulary_size: the tokens in the vocabulary, the special ones included.
        pad_id: the token of padding.
        unknown_id: the token of what the vocabulary cannot spell; -1 if it can spell everything.
        bos_id: the token before each document.
        tokenizer_kind: the kind, as in tokenizer.kind.
        tokenizer_fingerprint: what identifies the tokenizer.
        source_fingerprint: what identifies the text, and the file of tokenizer.path.
        sources: the files of each split, for people to read.
        splits: "train" and "validation"; with several weighted sources "train-0", "validation-0", "train-1" and so on.
        tokenizer_files: the SHA-256 of the files in tokenizer/, by name.
        fingerprint: what identifies every token and what it was made from and with, wherever the files lie.
        stored_in: the URL of the folder if `folder` is this host's copy of one in a store, or None.
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
        """Returns the split "train" or "validation"; of several sources, their splits joined, one after the other."""
        parts = self.parts(name)
        return parts[0] if len(parts) == 1 else functools.reduce(_joined, parts)

    def parts(self, name: str) -> list[Split]:
        """Returns the splits "train" or "validation" of each source, in the order of the sources."""
        return [split for key, split in self.splits.items() if key.partition("-")[0] == name]

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that the text was prepared with.

        Raises:
            UserError: it is damaged, or another tokenizer.
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
    # The first token of a shard is never a target, and the last window may be partly empty.
    return [-(-(shard.stream_length() - 1) // config.train.sequence_length) for shard in split.shards]


def token_dtype(vocabulary_size: int) -> str:
    """Returns the type of the numbers in a tokens file."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Writes manifest.json, once the tokenizer is in the folder.

    Args:
        folder: the folder.
        entries: the attributes of PreparedData without folder, tokenizer_files and fingerprint, which are added.
    """
    files = sorted((folder / "tokenizer").iterdir())
    hashes = {"tokenizer_files": {path.name: _sha256(path) for path in files}}
    content = {"format_version": FORMAT_VERSION, **entries, **hashes}
    write_sealed(folder / MANIFEST, {**content, "fingerprint": _fingerprint(content)})


def read_manifest(folder: Location) -> dict[str, Any]:
    """Returns the entries of manifest.json.

    Raises:
        UserError: it is missing, or a bit of it has changed.
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
        check_hashes: whether to read all files and compare their SHA-256 as well as their size.

    Raises:
        UserError: the manifest or a file is missing or damaged.
    """
    prepared = prepared_in(Path(folder))
    for fault in faults_of_files(prepared, check_hashes):
        raise _damaged(prepared.folder, fault)
    return prepared


def prepared_in(folder: Path) -> PreparedData:
    """Reads a prepared folder's manifest, and no other file.

    Raises:
        UserError: it is missing or damaged.
    """
    entries = read_manifest(folder)
    entries["splits"] = {name: split_of(split) for name, split in entries["splits"].items()}
    return PreparedData(folder=folder, **{key: entries[key] for key in entries.keys() - {"format_version", "sha256"}})


def split_of(entries: dict[str, Any]) -> Split:
    """Returns a Split from its entries, as JSON holds them."""
    return Split(**{**entries, "shards": tuple(Shard(**shard) for shard in entries["shards"])})


def faults_of_files(prepared: PreparedData, check_hashes: bool = True) -> Iterator[str]:
    """Yields a line for each file that differs from the manifest, which begins with the file's name.

    Args:
        prepared: the data, as the manifest describes it.
        check_hashes: whether to read all files and compare their SHA-256 as well as their size.
    """
    width = np.dtype(prepared.dtype).itemsize
    for split in prepared.splits.values():
        for shard in split.shards:
            for name, num_bytes, sha256 in (
                (shard.tokens_file, shard.stream_length() * width, shard.tokens_sha256),
                (shard.offsets_file, (shard.num_documents + 1) * 8, shard.offsets_sha256),
            ):
                yield from faults_of_file(prepared.folder, name, num_bytes, sha256 if check_hashes else None)
    for name, sha256 in prepared.tokenizer_files.items():
        yield from faults_of_file(prepared.folder, f"tokenizer/{name}", None, sha256 if check_hashes else None)


def faults_of_file(folder: Path, name: str, num_bytes: int | None, sha256: str | None) -> Iterator[str]:
    """Yields a line if a file is missing, or has another size or SHA-256; None is not compared."""
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
    """Returns a hash of all that decides the tokens, without the text's place and the form of the tokenizer's files."""
    left_out = ("format_version", "sources", "tokenizer_files")
    kept = {key: value for key, value in entries.items() if key not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damaged(folder: Location, what: str) -> UserError:
    return UserError(f"{folder}: {what}; delete the folder and prepare again.")
