"""Preparing: makes a config's text into token shards, once, in bounded memory and on all cores.

A folder gets its name when all of it is on the disk. Until then it is a hidden folder beside that place, which an error
removes. The next preparation takes up the hidden folder of one that was killed, or that Ctrl-C stopped after it had
saved its progress.
"""

import dataclasses
import datetime
import glob
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.config.settings import BpeFileConfig, Config, SavedTokenizerConfig, WordPieceFileConfig
from trainer.data.coverage import notes_on_examples
from trainer.data.encoding import Findings, Writers, encode_documents, report
from trainer.data.partial_folder import PROGRESS, empty, written_whole
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
from trainer.errors import UserError
from trainer.system.manifest import unsealed, write_sealed
from trainer.system.progress import Bar, shown
from trainer.system.storage import Url, copy_folder, locate, place_on_disk
from trainer.system.terminal import Say
from trainer.system.whole import copy_whole_folder
from trainer.text.files import Document
from trainer.text.source import Source
from trainer.text.sources import Mixture, find_inputs, open_source
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.tokenizers.tokenizer_files import load_tokenizer, read_tokenizer_file, train_tokenizer

_PROGRESS_SECS = 5.0
# How often a progress bar learns how far a preparation is.
_NOTE_SECS = 0.1
# How often a preparation saves how far it is.
_SAVE_SECS = 20.0

# Writes what `encode_documents` writes, given the tokenizer and the folder that it is saved in.
Encode = Callable[[Source | Mixture, Tokenizer, Path, Writers, Say], Findings]


def prepare(
    config: Config, say: Say = print, shard_tokens: int = SHARD_TOKENS, encode: Encode | None = None
) -> PreparedData:
    """Makes a config's text ready for training, unless it is ready already.

    Args:
        config: the settings.
        say: prints a line on the progress every few seconds, and one for each setting that wastes text or time.
        shard_tokens: a shard with this many tokens gets no further document.
        encode: encodes the text; by default this process does.

    Raises:
        UserError: the text or tokenizer.path cannot be used, the folder cannot be written or is damaged, a split holds
            no token, or lines mode leaves out more than half of the tokens.
    """
    prepared = _prepare(config, say, shard_tokens, encode)
    for note in notes_on_examples(prepared, config):
        say(note)
    return prepared


def _prepare(config: Config, say: Say, shard_tokens: int, encode: Encode | None) -> PreparedData:
    # First, so that a misspelt path is reported before all the text is read.
    tokenizer_file = read_tokenizer_file(config.tokenizer)
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
    """Raises UserError if the files that a config names are missing, or can be seen to be of no use."""
    read_tokenizer_file(config.tokenizer)
    open_source(config.data)
    check_sets(config)


def check_sets(config: Config) -> None:
    """Raises UserError if the files of evaluation.sets are missing."""
    for name, sources in config.evaluation.sets.items():
        find_inputs(sources, f"evaluation.sets.{name}")


def text_fingerprint(config: Config) -> str:
    """Returns the `PreparedData.source_fingerprint` that preparing a config's text would give now.

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
        UserError: the store's copy is damaged or cannot be read, or this host's copy cannot be written.
    """
    folder = place_on_disk(stored)
    if not folder.exists():
        with written_whole(folder, say) as partial:
            empty(partial)
            copy_folder(stored, partial)
            try:
                load_prepared(partial)
            except UserError as error:
                raise UserError(str(error).replace(str(partial), str(stored))) from None
    prepared = load_prepared(folder)
    if read_manifest(stored)["fingerprint"] != prepared.fingerprint:
        raise UserError(f"{folder} is not a copy of {stored} any more; delete it, and it will be copied again.")
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
    for path in set(source.train_inputs) & set(source.validation_inputs):
        say(f"warning: {path} is in data.train and in data.validation")
    if others := sorted(folder.parent.glob(f"{glob.escape(config.prepared_name())}-*")):
        of_file = isinstance(config.tokenizer, WordPieceFileConfig | BpeFileConfig | SavedTokenizerConfig)
        what = "the text or the file of tokenizer.path" if of_file else "the text"
        say(f"{what} is not the one of {others[-1]}; preparing it anew (that folder stays)")
    if config.data.documents == "auto":
        for each in source.sources if isinstance(source, Mixture) else (source,):
            if line := each.documents_found():
                say(line)
    start = time.monotonic()
    with written_whole(folder, say) as partial:
        entries, lines = _write(config, source, partial, say, shard_tokens, encode)
        write_manifest(partial, {**entries, "source_fingerprint": fingerprint, "sources": source.names()})
    prepared = load_prepared(folder, check_hashes=False)
    say(f"{folder}: prepared in {time.monotonic() - start:.0f} s; {_describe(prepared)}")
    for line in lines:
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
    """Writes tokenizer and shards into a folder, or goes on where another process was stopped in it.

    Returns:
        (entries, lines): their entries in the manifest, and lines to print.
    """
    taken_up = _take_up(folder, source, shard_tokens) if encode is None else None
    if taken_up is None:
        empty(folder)
        with shown(say, "reading for the vocabulary") as bar:
            documents = _with_progress(bar, source, source.documents(), say)
            tokenizer = train_tokenizer(
                config.tokenizer, (document for split, document in documents if split.startswith("train"))
            )
        tokenizer.save(folder / "tokenizer")
        writers = {split: SplitWriter(folder, split, tokenizer, shard_tokens) for split in source.names()}
    else:
        tokenizer, writers = taken_up
        say("going on where another preparation was stopped")
    if encode is None:
        findings = _encode(config, source, tokenizer, folder, writers, say, shard_tokens)
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
    (folder / PROGRESS).unlink(missing_ok=True)
    comes_back, unknown = report(tokenizer, findings)
    if taken_up is not None:
        unknown = [f"in what was left to encode, {line}" for line in unknown]
    return entries, [comes_back, *unknown]


def _encode(
    config: Config,
    source: Source | Mixture,
    tokenizer: Tokenizer,
    folder: Path,
    writers: Writers,
    say: Say,
    shard_tokens: int,
) -> Findings:
    """Encodes the text in this process, and saves its progress now and then, from which `_take_up` goes on."""
    findings, saved = Findings(), time.monotonic()
    started, num_before = saved, sum(writer.num_tokens for writer in writers.values())
    with shown(say, "encoding") as bar:
        documents = _with_progress(bar, source, source.documents(say), say)
        for _ in encode_documents(config.data, documents, tokenizer, writers, findings):
            now, num_tokens = time.monotonic(), sum(writer.num_tokens for writer in writers.values())
            bar.states = [f"{(num_tokens - num_before) / max(now - started, 1e-9):,.0f} tokens/s"]
            if now - saved >= _SAVE_SECS:
                progress = {split: writer.progress() for split, writer in writers.items()}
                write_sealed(folder / PROGRESS, {"shard_tokens": shard_tokens, "splits": progress})
                saved = time.monotonic()
    return findings


def _take_up(folder: Path, source: Source | Mixture, shard_tokens: int) -> tuple[Tokenizer, Writers] | None:
    """Returns the tokenizer and the writers of a preparation that was stopped in a folder, at the place that it saved
    last; None if it saved none, or its files are damaged.
    """
    try:
        progress = unsealed((folder / PROGRESS).read_bytes(), folder / PROGRESS)
        tokenizer = load_tokenizer(folder / "tokenizer")
        writers = {split: SplitWriter(folder, split, tokenizer, shard_tokens) for split in source.names()}
        if progress["shard_tokens"] != shard_tokens:
            return None
        for split, writer in writers.items():
            writer.go_on(progress["splits"][split])
    except Exception:  # Whatever the damage is, the text can be encoded from the start.
        return None
    return tokenizer, writers


def _with_progress(
    bar: Bar, source: Source | Mixture, documents: Iterator[tuple[str, Document]], say: Say
) -> Iterator[tuple[str, Document]]:
    """Yields the documents, and shows how much is read and how long the rest will take: in the bar, or every few
    seconds as a line.
    """
    start = said = noted = time.monotonic()
    for number, (split, document) in enumerate(documents):
        now = time.monotonic()
        if bar.is_shown and now - noted >= _NOTE_SECS:
            _note(bar, source, number)
            noted = now
        elif not bar.is_shown and now - said >= _PROGRESS_SECS:
            say(f"{bar.what}: {number} documents{_pace(source, now - start)}")
            said = now
        yield split, document


def _note(bar: Bar, source: Source | Mixture, num_documents: int) -> None:
    """Shows in a bar how many bytes are read; or documents, if their size is not known."""
    bar.in_bytes = source.progress.total > 0
    if bar.in_bytes:
        bar.note(source.progress.done, source.progress.total)
    else:
        stories = source.data.storybook_stories if isinstance(source, Source) and source.data.is_storybook() else None
        bar.note(num_documents, stories)


def _pace(source: Source | Mixture, secs: float) -> str:
    done, total = source.progress.done, source.progress.total
    if not done:
        return f", {secs:.0f} s"  # Stories and data sets are not files, so their size is not known.
    left = datetime.timedelta(seconds=round(secs / done * (total - done)))
    return f", {done / 1e6:.1f} of {total / 1e6:.1f} MB, {done / 1e6 / max(secs, 1e-9):.1f} MB a second, {left} left"
