"""Preparing: a config's text made into token shards, once, in bounded memory and on all cores.

A folder gets its name when all of it is on disk; until then it is hidden beside, and goes away with any error.
"""

import collections
import contextlib
import dataclasses
import datetime
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import BpeFileConfig, Config, DataConfig, WordPieceFileConfig
from trainer.data.coverage import notes_on_examples
from trainer.data.cutting import cut_document
from trainer.data.files import Document
from trainer.data.shard_writer import SplitWriter
from trainer.data.shards import (
    MANIFEST,
    SHARD_TOKENS,
    PreparedData,
    load_prepared,
    read_manifest,
    token_dtype,
    write_manifest,
)
from trainer.data.text import Mixture, Source, open_source, peek
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_files import load_tokenizer, read_tokenizer_file, train_tokenizer
from trainer.errors import UserError
from trainer.storybook import storybook
from trainer.system.machine import num_cores
from trainer.system.manifest import unsealed, write_sealed
from trainer.system.storage import Url, copy_folder, locate, place_on_disk, reason_and_remedy
from trainer.system.whole import copy_whole_folder, make_folder, rename_unless_there, sync, sync_tree

_BATCH_BYTES = 1 << 20
_PROGRESS_SECS = 5.0
# How many validation documents, and how much of each, are decoded again to see what comes back.
_SAMPLE_DOCUMENTS, _SAMPLE_CHARS = 200, 10_000
# Unicode's categories of characters that show nothing, which WordPiece drops.
_UNSEEN = ("Cc", "Cf")
# Where a preparation saves how far it is, and how often.
_PROGRESS = "progress.json"
_SAVE_SECS = 20.0
# The file in a hidden folder that is locked by the process that writes there, and the folders this process has locked.
_LOCK = "lock"
_locked_here: set[Path] = set()
_guard = threading.Lock()

Say = Callable[[str], None]
Writers = dict[str, SplitWriter]


@dataclasses.dataclass
class Findings:
    """What there is to say about text that was encoded.

    Attributes:
        sample: the starts of the first validation documents.
        near_unknown: how often each character occurs in the pieces of text that have unknown tokens.
    """

    sample: list[str] = dataclasses.field(default_factory=list)
    near_unknown: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Findings") -> None:
        """Adds those of the text that follows."""
        self.sample = (self.sample + other.sample)[:_SAMPLE_DOCUMENTS]
        self.near_unknown.update(other.near_unknown)


# Writes what `encode_documents` writes, given the tokenizer and the folder that it is saved in.
Encode = Callable[[Source | Mixture, Tokenizer, Path, Writers, Say], Findings]


def prepare(
    config: Config, say: Say = print, shard_tokens: int = SHARD_TOKENS, encode: Encode | None = None
) -> PreparedData:
    """Makes a config's text ready for training, or finds that it is.

    Args:
        config: the settings.
        say: gets a line now and then on how far it is, and one for each setting that wastes text or time.
        shard_tokens: a shard with this many tokens gets no further document.
        encode: encodes the text in place of this process.

    Raises:
        UserError: the text or tokenizer.path cannot be used, the folder cannot be written or is damaged, a split holds
            no token, or lines mode leaves out more than half of the tokens.
    """
    prepared = _prepare(config, say, shard_tokens, encode)
    for note in notes_on_examples(prepared, config):
        say(note)
    return prepared


def _prepare(config: Config, say: Say, shard_tokens: int, encode: Encode | None) -> PreparedData:
    tokenizer_file = read_tokenizer_file(config.tokenizer)  # First: a misspelt path should not wait for all the text.
    source = open_source(config.data)
    fingerprint = _fingerprint(source, tokenizer_file, say)
    name = f"{config.prepared_name()}-{fingerprint[:10]}"
    home = locate(config.data.prepared_folder)
    if isinstance(home, Path):
        return _prepare_on_disk(home / name, config, source, fingerprint, say, shard_tokens, encode)
    stored = home / name
    if not (stored / MANIFEST).is_file():
        copy = place_on_disk(stored)
        _prepare_on_disk(copy, config, source, fingerprint, say, shard_tokens, encode)
        say(f"{stored}: copying it there")
        copy_whole_folder(copy, stored, MANIFEST)
    prepared = fetch(stored, say)
    say(f"{stored}: prepared, and on this host's disk as {prepared.folder}; {_describe(prepared)}")
    return prepared


def check_sources(config: Config) -> None:
    """Raises UserError where the files that a config names cannot be used, as far as a look at them tells."""
    read_tokenizer_file(config.tokenizer)
    open_source(config.data)


def text_fingerprint(config: Config) -> str:
    """Returns what `PreparedData.source_fingerprint` would be if a config's text were prepared now.

    Raises:
        UserError: the text or tokenizer.path cannot be used.
    """
    return _fingerprint(open_source(config.data), read_tokenizer_file(config.tokenizer), lambda line: None)


def _fingerprint(source: Source | Mixture, tokenizer_file: bytes | None, say: Say) -> str:
    fingerprint = source.fingerprint(say)
    if tokenizer_file is None:
        return fingerprint
    return hashlib.sha256(fingerprint.encode() + tokenizer_file).hexdigest()


def fetch(stored: Url, say: Say = print) -> PreparedData:
    """Returns prepared data of an object store, copied to this host's disk if it is not there yet.

    Raises:
        UserError: the store's copy is damaged or cannot be read, or this host's cannot be written.
    """
    folder = place_on_disk(stored)
    if not folder.exists():
        with _written_whole(folder, say) as partial:
            _empty(partial)
            copy_folder(stored, partial)
            try:
                load_prepared(partial)
            except UserError as error:
                raise UserError(str(error).replace(str(partial), str(stored))) from None
    prepared = load_prepared(folder)
    if read_manifest(stored)["fingerprint"] != prepared.fingerprint:
        raise UserError(f"{folder} is no copy of {stored} any more; delete it, and it will be copied again.")
    return dataclasses.replace(prepared, stored_in=str(stored))


def _prepare_on_disk(
    folder: Path,
    config: Config,
    source: Source | Mixture,
    fingerprint: str,
    say: Say,
    shard_tokens: int,
    encode: Encode | None,
) -> PreparedData:
    if folder.exists():
        prepared = load_prepared(folder)
        say(f"{folder}: already prepared; {_describe(prepared)}")
        return prepared
    for path in set(source.train_files) & set(source.validation_files):
        say(f"warning: {path} is in data.train and in data.validation")
    if others := sorted(folder.parent.glob(f"{glob.escape(config.prepared_name())}-*")):
        of_file = isinstance(config.tokenizer, WordPieceFileConfig | BpeFileConfig)
        what = "the text or the file of tokenizer.path" if of_file else "the text"
        say(f"{what} is not the one of {others[-1]}; preparing it anew (that folder stays)")
    if config.data.documents == "auto":
        for each in source.sources if isinstance(source, Mixture) else (source,):
            if line := each.documents_found():
                say(line)
    start = time.monotonic()
    with _written_whole(folder, say) as partial:
        entries, report = _write(config, source, partial, say, shard_tokens, encode)
        write_manifest(partial, {**entries, "source_fingerprint": fingerprint, "sources": source.names()})
    prepared = load_prepared(folder, check_hashes=False)
    say(f"{folder}: prepared in {time.monotonic() - start:.0f} s; {_describe(prepared)}")
    for line in report:
        say(line)
    return prepared


def _describe(prepared: PreparedData) -> str:
    train, validation = prepared.split("train"), prepared.split("validation")
    num_tokens = train.num_tokens + validation.num_tokens
    return (
        f"{train.num_documents} documents to train on and {validation.num_documents} to validate on, {num_tokens} "
        f"tokens of {(train.num_bytes + validation.num_bytes) / max(num_tokens, 1):.2f} bytes, "
        f"{(train.num_unknown + validation.num_unknown) / max(num_tokens, 1):.2%} of them [UNK], "
        f"{prepared.tokenizer_kind} vocabulary of {prepared.vocabulary_size}"
    )


def _write(
    config: Config, source: Source | Mixture, folder: Path, say: Say, shard_tokens: int, encode: Encode | None
) -> tuple[dict[str, Any], list[str]]:
    """Writes tokenizer and shards into a folder, or goes on where another process was stopped in it; returns what the
    manifest is to say about them, and lines to say.
    """
    taken_up = _take_up(folder, source, shard_tokens) if encode is None else None
    if taken_up is None:
        _empty(folder)
        documents = _with_progress("reading for the vocabulary", source, source.documents(), say)
        tokenizer = train_tokenizer(
            config.tokenizer, (document for split, document in documents if split.startswith("train"))
        )
        tokenizer.save(folder / "tokenizer")
        writers = {split: SplitWriter(folder, split, tokenizer, shard_tokens) for split in source.names()}
    else:
        tokenizer, writers = taken_up
        say("going on with what a preparation that was stopped had written")
    if encode is None:
        documents = _with_progress("encoding", source, source.documents(say), say)
        findings, saved = Findings(), time.monotonic()
        for _ in encode_documents(config.data, documents, tokenizer, writers, findings):
            if time.monotonic() - saved >= _SAVE_SECS:
                progress = {split: writer.progress() for split, writer in writers.items()}
                write_sealed(folder / _PROGRESS, {"shard_tokens": shard_tokens, "splits": progress})
                saved = time.monotonic()
    else:
        findings = encode(source, tokenizer, folder, writers, say)
    entries = {
        "dtype": token_dtype(tokenizer.vocabulary_size),
        "vocabulary_size": tokenizer.vocabulary_size,
        "pad_id": tokenizer.pad_id,
        "unknown_id": tokenizer.unknown_id,
        "bos_id": tokenizer.bos_id,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "splits": {split: dataclasses.asdict(writer.close()) for split, writer in writers.items()},
    }
    (folder / _PROGRESS).unlink(missing_ok=True)
    unknown_now = _what_is_unknown(tokenizer, findings.near_unknown)
    if taken_up is not None:
        unknown_now = (f"in what was left to encode, {line}" for line in unknown_now)
    return entries, [_what_comes_back(tokenizer, findings.sample), *unknown_now]


def encode_documents(
    data: DataConfig,
    documents: Iterator[tuple[str, Document]],
    tokenizer: Tokenizer,
    writers: Writers,
    findings: Findings,
) -> Iterator[None]:
    """Encodes documents on all cores and writes their tokens, but for those of each split that are written already;
    yields whenever some more are.
    """
    # A mixture, whose splits have other names, keeps no nats.
    if data.is_storybook() and data.validation is None and "validation" in writers:
        documents = _with_nats(documents, writers["validation"].nats)
    for batch, tokens, lengths in _encoded(tokenizer, _with_sample(documents, findings.sample), writers):
        writers[batch.split].write(tokens, lengths, batch.is_start, batch.num_bytes)
        unknown = np.flatnonzero(tokens == tokenizer.unknown_id)
        for i in np.unique(np.searchsorted(np.cumsum(lengths), unknown, side="right")):
            findings.near_unknown.update(batch.pieces[i])
        yield


def _take_up(folder: Path, source: Source | Mixture, shard_tokens: int) -> tuple[Tokenizer, Writers] | None:
    """Returns the tokenizer and the writers of a preparation that was stopped in a folder, as of the last time that it
    saved where it was; None where it did not, or what it wrote is not whole.
    """
    try:
        progress = unsealed((folder / _PROGRESS).read_bytes(), folder / _PROGRESS)
        tokenizer = load_tokenizer(folder / "tokenizer")
        writers = {split: SplitWriter(folder, split, tokenizer, shard_tokens) for split in source.names()}
        if progress["shard_tokens"] != shard_tokens:
            return None
        for split, writer in writers.items():
            writer.go_on(progress["splits"][split])
    except Exception:  # Whatever is wrong with what was left there, the text is there to begin anew.
        return None
    return tokenizer, writers


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


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
    """Returns a text as the tokens of WordPiece tell texts apart: folded, without spaces and control characters."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(letter for letter in folded if not letter.isspace() and unicodedata.category(letter) not in _UNSEEN)


def _what_is_unknown(tokenizer: Tokenizer, near_unknown: collections.Counter[str]) -> Iterator[str]:
    # Doubled, because WordPiece has one token for a letter at the start of a word and another inside.
    # Of characters that are as common it is their order that decides, and not which was found first.
    counts = sorted(near_unknown.items(), key=lambda count: (-count[1], count[0]))
    tokens = tokenizer.encode_batch([2 * character for character, _ in counts])
    unknown = [count for count, pair in zip(counts, tokens, strict=True) if tokenizer.unknown_id in pair]
    if unknown:
        listed = ", ".join(f"{character!r} {number}" for character, number in unknown[:10])
        yield f"{len(unknown)} characters have no token; how often the commonest occur: {listed}"


@dataclasses.dataclass
class _Batch:
    """Pieces of text of one split, to be encoded together; a piece starts a document or continues the one before."""

    split: str
    pieces: list[str] = dataclasses.field(default_factory=list)
    is_start: list[bool] = dataclasses.field(default_factory=list)
    num_bytes: int = 0


def _batches(
    documents: Iterator[tuple[str, Document]], breaks: re.Pattern[str], num_written: dict[str, int]
) -> Iterator[_Batch]:
    """Puts the pieces of documents into batches, but for those of each split that are written already."""
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
    """Encodes batches on all cores, and yields each with its tokens and its pieces' lengths, in order."""
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


def _with_progress(
    what: str, source: Source | Mixture, documents: Iterator[tuple[str, Document]], say: Say
) -> Iterator[tuple[str, Document]]:
    """Passes documents on, and says every few seconds how many there were and how long the rest will take."""
    start = said = time.monotonic()
    for number, (split, document) in enumerate(documents):
        now = time.monotonic()
        if now - said >= _PROGRESS_SECS:
            say(f"{what}: {number} documents{_pace(source, now - start)}")
            said = now
        yield split, document


def _pace(source: Source | Mixture, secs: float) -> str:
    done, total = source.progress.done, source.progress.total
    if not done:
        return f", {secs:.0f} s"  # Stories and data sets are not files that could be measured.
    left = datetime.timedelta(seconds=round(secs / done * (total - done)))
    return f", {done / 1e6:.1f} of {total / 1e6:.1f} MB, {done / 1e6 / max(secs, 1e-9):.1f} MB a second, {left} left"


@contextlib.contextmanager
def _written_whole(folder: Path, say: Say) -> Iterator[Path]:
    """Gives a hidden folder to write into, which becomes `folder` at the end, or goes away if anything fails: an empty
    one, or one that a process left which was killed. Ctrl-C leaves it, too, if there is something to go on with.
    """
    partial: Path | None = None
    try:
        make_folder(folder.parent)
        with contextlib.ExitStack() as stack:
            partial = _lock_partial(folder, stack, say)
            yield partial
            # To close a file gives up this process's locks of it.
            sync_tree(partial, except_for=partial / _LOCK)
            if rename_unless_there(partial, folder):
                (folder / _LOCK).unlink(missing_ok=True)
            sync(folder.parent)
    except KeyboardInterrupt:
        if partial is not None and (partial / _PROGRESS).exists():
            partial = None
        raise
    except OSError as error:
        is_renamed = partial is not None and not partial.exists() and folder.exists()
        undone = f"{folder} is whole, but a loss of power could still undo it"
        left = undone if is_renamed else "nothing half-written is left"
        raise UserError(
            f"data.prepared_folder={str(folder.parent)!r}: cannot be written: {reason_and_remedy(error)}, or name "
            f"another folder; {left}."
        ) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _lock_partial(folder: Path, stack: contextlib.ExitStack, say: Say) -> Path:
    """Returns a hidden folder that only this process works in as long as the stack lives.

    It takes up a folder that a stopped process left, if that process was this user's and its lock is free.
    """
    left = [path for path in sorted(folder.parent.glob(f".partial-{glob.escape(folder.name)}-*")) if _is_own(path)]
    taken: Path | None = None
    for path in left:
        try:
            if taken is None and _lock(path, stack):
                taken = path
            elif taken is not None:
                with contextlib.ExitStack() as briefly:
                    if _lock(path, briefly):
                        shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            say(f"warning: {path} stays, as it cannot be locked: {error.strerror}; if nobody prepares, delete it")
    if taken is None:
        taken = folder.parent / f".partial-{folder.name}-{secrets.token_hex(4)}"
        taken.mkdir()
        # Without a lock nobody else takes this folder either, because nobody else can lock it.
        with contextlib.suppress(OSError):
            _lock(taken, stack)
    return taken


def _is_own(path: Path) -> bool:
    """Whether a path is a folder, no link to one, and this user's: somebody else could have put it there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _lock(partial: Path, stack: contextlib.ExitStack) -> bool:
    """Locks a partial folder for as long as the stack lives; returns False if another process holds or removed it.

    The lock is a POSIX lock of a file in the folder. NFS passes such locks on to other hosts, unlike a flock of the
    folder, and the kernel frees them when their process ends. Within a process they do not exclude each other.

    Raises:
        OSError: this file system has no such locks.
    """
    with _guard:
        if partial in _locked_here:
            return False
        _locked_here.add(partial)
    with contextlib.ExitStack() as until_locked:
        until_locked.callback(_locked_here.discard, partial)
        try:
            handle = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            until_locked.callback(os.close, handle)
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have just renamed or removed the folder.
            is_there = os.path.samestat(os.lstat(partial / _LOCK), os.fstat(handle))
        except (BlockingIOError, PermissionError, FileNotFoundError):
            return False
        if is_there:
            stack.push(until_locked.pop_all())
        return is_there
