"""Writing a split's shards: appending tokens, cutting, hashing, and going on after a stop."""

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.shards import Shard, Split, faults_of_file, token_dtype
from trainer.errors import UserError
from trainer.system.whole import sync
from trainer.tokenizers.tokenizer import Tokenizer

# What is appended to a shard is read this many tokens at a time.
_PART_TOKENS = 1 << 22


class SplitWriter:
    """Writes a split's shards one after the other, and counts.

    Args:
        folder: the folder to write into.
        split: the split's name.
        tokenizer: the tokenizer of the tokens.
        shard_tokens: a shard with this many tokens gets no further document.

    Attributes:
        num_pieces: the number of pieces of text that were written.
        nats: -log of the exact probabilities of the documents, which the caller adds; may stay empty.
    """

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
            tokens: the tokens of all pieces, int32 [tokens].
            lengths: how many tokens each piece has, int64 [pieces].
            is_start: whether each piece starts a document, or goes on with the document of the piece before.
            num_bytes: the bytes of the text of all pieces.
        """
        self.num_pieces += len(lengths)
        self._num_bytes += num_bytes
        self._num_unknown += int(np.count_nonzero(tokens == self._unknown_id))
        first_tokens = (np.cumsum(lengths) - lengths)[is_start]
        stream = np.insert(tokens, first_tokens, self._bos_id)
        self._write_stream(stream, first_tokens + np.arange(len(first_tokens)))

    def write_part(self, folder: Path, split: Split) -> None:
        """Appends the split that another writer, with the same tokenizer, wrote into a folder.

        Raises:
            UserError: a file there has changed.
        """
        self._num_bytes += split.num_bytes
        self._num_unknown += split.num_unknown
        self.nats += [] if split.source_nats is None else [split.source_nats]
        for shard in split.shards:
            for name, sha256 in ((shard.tokens_file, shard.tokens_sha256), (shard.offsets_file, shard.offsets_sha256)):
                if fault := next(faults_of_file(folder, name, None, sha256), None):
                    raise UserError(f"{folder}: {fault}; prepare again.")
            offsets = np.memmap(folder / shard.offsets_file, "<i8", "r")
            tokens = np.memmap(folder / shard.tokens_file, self._dtype, "r")
            end = len(tokens) - 1  # Closing the shard writes the last [BOS].
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

    @property
    def num_tokens(self) -> int:
        """The tokens that were written, with the [BOS] of each document in the open shard."""
        return sum(shard.num_tokens for shard in self._shards) + self._tokens.length

    def progress(self) -> dict[str, Any]:
        """Brings all that was written to the disk, and returns what `go_on` needs."""
        counts = {name: getattr(self, name) for name in self._COUNTS}
        files = [self._tokens.progress(), self._offsets.progress()]
        return {"shards": [dataclasses.asdict(shard) for shard in self._shards], "files": files, **counts}

    def go_on(self, progress: dict[str, Any]) -> None:
        """Takes up what another writer of the same split had written at the time of its `progress`.

        Raises:
            ValueError: a file has changed.
        """
        self._shards = [Shard(**shard) for shard in progress["shards"]]
        for shard in self._shards:
            for name, sha256 in ((shard.tokens_file, shard.tokens_sha256), (shard.offsets_file, shard.offsets_sha256)):
                if fault := next(faults_of_file(self._stem.parent, name, None, sha256), None):
                    raise ValueError(fault)
        self._open_shard()  # The shard may have grown since; later shards are written over.
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
        lengths = np.diff(offsets, prepend=self._last_start) - 1  # The documents that end at the offsets.
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
        """Takes up a file that had this length and SHA-256, and cuts off what was written since."""
        if length:
            os.truncate(self.path, length * self._dtype.itemsize)
            with self.path.open("rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256")
        if self.sha256.hexdigest() != sha256:
            raise ValueError(f"{self.path.name} was changed")
        self.length = length

    def write(self, numbers: np.ndarray) -> None:
        if not self.length:
            self.path.unlink(missing_ok=True)  # A writer that was stopped may have left it.
        data = numbers.astype(self._dtype).tobytes()
        # Opened for each write, so that an error in between leaves no file open.
        with self.path.open("ab") as file:
            file.write(data)
        self.sha256.update(data)
        self.length += len(numbers)
