"""Preparing with Apache Beam: files are encoded wherever a runner has workers, and joined here.

A worker writes a part: one file's tokens, as shards, and beside them what else there is to know of it. This process
reads the text for the vocabulary before, and after it joins the parts in the order of the files, through the writers
that it would have used without Beam: so the bytes are the same.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import pickle
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.data.encoding import Findings, Writers, encode_documents
from trainer.data.prepare import Say, prepare
from trainer.data.shard_writer import SplitWriter
from trainer.data.shards import SHARD_TOKENS, PreparedData, split_of
from trainer.data.text import File, Mixture, Source, Tally
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_files import load_tokenizer
from trainer.errors import UserError
from trainer.system.machine import num_cores
from trainer.system.storage import Location, Url, copy_folder, locate, on_disk, remove_folder
from trainer.system.whole import write_whole
from trainer.version import __version__

# DirectRunner would rather be Prism, a program that it gets from the network and that has one Python process, unless
# the pipeline asks for what that cannot do.
_ALL_CORES = (
    "--runner=DirectRunner",
    "--allow_unsafe_triggers",
    "--direct_running_mode=multi_processing",
    f"--direct_num_workers={num_cores()}",
    "--default_sdk_harness_log_level=ERROR",
)
_PROGRESS_SECS = 10.0  # Each is a listing, which a store may charge for.


def prepare_with_beam(
    config: Config, options: Sequence[str], say: Say = print, shard_tokens: int = SHARD_TOKENS
) -> PreparedData:
    """Does what `prepare` does, on the workers of an Apache Beam runner.

    Args:
        config: the settings. Files and data.prepared_folder have to be where all workers see them.
        options: Apache Beam's, as on its command lines; without --runner, all cores of this machine are used.
        say: gets a line now and then on how far it is.
        shard_tokens: a shard with this many tokens gets no further document.

    Raises:
        UserError: as in `prepare`; or Apache Beam is not installed, refuses an option or finds no workers; or those do
            not see data.prepared_folder, or have another trainer.
    """
    pipeline = _pipeline(options)
    return prepare(config, say, shard_tokens, functools.partial(_encode, pipeline, config.data.prepared_folder))


def _pipeline(options: Sequence[str]) -> Any:
    logging.disable(logging.WARNING)  # Of a package that one of its runners would need.
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
    except ImportError:
        raise UserError('--runner beam needs Apache Beam: pip install "gpt-trainer[beam]"') from None
    finally:
        logging.disable(logging.NOTSET)
    has_runner = PipelineOptions(list(options)).view_as(StandardOptions).runner is not None
    try:
        return apache_beam.Pipeline(options=PipelineOptions([*(() if has_runner else _ALL_CORES), *options]))
    except (ValueError, ImportError) as error:
        raise UserError(f"Apache Beam refuses {' '.join(options)}: {error}") from None


def _encode(
    pipeline: Any,
    prepared_folder: str,
    source: Source | Mixture,
    tokenizer: Tokenizer,
    folder: Path,
    writers: Writers,
    say: Say,
) -> Findings:
    import apache_beam

    home = locate(prepared_folder)
    parts = (folder.absolute() if isinstance(home, Path) else home / folder.name) / "parts"
    remove_folder(parts)  # What a killed process may have left.
    sources = source.sources if isinstance(source, Mixture) else (source,)
    units = [unit for each in sources for unit in each.files_apart()]
    try:
        copy_folder(folder / "tokenizer", parts / "tokenizer")
        # As bytes, of which Beam will not make anything else.
        pickled = pipeline | apache_beam.Create([(i, pickle.dumps(_absolute(unit))) for i, unit in enumerate(units)])
        # Without the shuffle all would stay with the worker that creates them.
        shuffled = pickled | apache_beam.Reshuffle()
        _ = shuffled | "write parts" >> apache_beam.Map(functools.partial(_write_part, parts, __version__))
        with _watched(parts, len(units), say):
            _run(pipeline)
        for number, stem in sorted(_stems(parts, ".error").items()):
            raise UserError(_as_named_here((parts / f"{stem}.error").read_text("utf-8"), units[number]))
        return _join(sources, parts, prepared_folder, writers, say)
    finally:
        remove_folder(parts)


def _absolute(unit: Source) -> Source:
    """Returns a source whose files do not depend on a worker's working directory."""

    def moved(files: tuple[File, ...]) -> tuple[File, ...]:
        return tuple(file.absolute() if isinstance(file, Path) else file for file in files)

    return dataclasses.replace(unit, train_files=moved(unit.train_files), validation_files=moved(unit.validation_files))


def _as_named_here(text: str, unit: Source) -> str:
    """Returns what a worker says of a unit, with the files called what the config calls them."""
    for file in (*unit.train_files, *unit.validation_files):
        text = text.replace(str(file.absolute()), str(file)) if isinstance(file, Path) else text
    return text


def _run(pipeline: Any) -> None:
    try:
        running = pipeline.run()
        try:
            running.wait_until_finish()
        except KeyboardInterrupt:
            with contextlib.suppress(NotImplementedError):  # A cluster would go on.
                running.cancel()
            raise
    except Exception as error:  # Of all kinds: each runner has its own.
        raise UserError(f"Apache Beam could not run the pipeline: {error}") from error


@contextlib.contextmanager
def _watched(parts: Location, num_parts: int, say: Say) -> Iterator[None]:
    """Says every few seconds how many parts there are; and ends the pipeline once a worker process of this machine was
    killed, as for want of memory, for which Beam would wait for ever.

    Raises:
        UserError: one was killed.
    """
    start, is_over, is_given_up = time.monotonic(), threading.Event(), threading.Event()
    killed: list[object] = []
    hook = threading.excepthook

    def note(failed: threading.ExceptHookArgs) -> None:
        if failed.thread is not None and failed.thread.name == "run_worker":  # Beam's, which waits for the process.
            killed.append(failed.exc_value)
        hook(failed)

    def watch() -> None:
        while not is_over.wait(_PROGRESS_SECS):
            if killed:
                is_given_up.set()
                os.kill(os.getpid(), signal.SIGINT)  # What the main thread waits in ends by nothing less.
                return
            with contextlib.suppress(OSError, UserError):
                say(f"encoding: {len(_stems(parts))} of {num_parts} parts, {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    threading.excepthook = note

    def give_up(*_: object) -> None:
        if is_given_up.is_set():
            raise KeyboardInterrupt

    # As shells start what runs in the background: then it hears nobody but the watch.
    is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    is_deaf &= threading.current_thread() is threading.main_thread()
    if is_deaf:
        signal.signal(signal.SIGINT, give_up)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not is_given_up.is_set():
            raise
        raise UserError(
            f"Apache Beam: {killed[0]}. If that was for want of memory, have fewer: -- --direct_num_workers=1"
        ) from None
    finally:
        is_over.set()
        thread.join()
        threading.excepthook = hook
        if is_deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


# What a worker does.


def _write_part(parts: Location, version: str, numbered: tuple[int, bytes]) -> None:
    """Writes the part of a unit. As a runner may have that done twice, even at the same time, each attempt has a name
    of its own; it counts once its .json is there, which says all that is not in the shards. What a user can mend is
    left in a file and not raised: a runner would try again, and print pages.

    Args:
        parts: folder of all parts.
        version: of the launching process's trainer.
        numbered: the unit's number, and its pickle.
    """
    # Without the tokenizer the folder cannot be seen from here, which the launching process says; or that one gave up.
    if not (parts / "tokenizer").is_dir() or (parts / "failed").is_file():
        return
    number, pickled = numbered
    stem = f"{number:06}-{secrets.token_hex(4)}"
    try:
        if version != __version__:
            raise UserError(f"A worker of Apache Beam has trainer {__version__}, and not {version}; install the same.")
        entries = _encode_part(pickle.loads(pickled), _tokenizer(parts), parts / f"{stem}.shards")
    except UserError as error:
        write_whole(parts / f"{stem}.error", str(error))
        (parts / "failed").write_bytes(b"")  # So that the others stop.
        return
    write_whole(parts / f"{stem}.json", json.dumps(entries))


def _encode_part(unit: Source, tokenizer: Tokenizer, part: Location) -> dict[str, Any]:
    """Writes the shards of a part; returns what else there is to know of it."""
    tally, findings = Tally(), Findings()
    with tempfile.TemporaryDirectory() if isinstance(part, Url) else contextlib.nullcontext(part) as name:
        folder = Path(name)
        folder.mkdir(exist_ok=True)
        writers = {split: SplitWriter(folder, split, tokenizer, shard_tokens=1 << 62) for split in unit.names()}
        for _ in encode_documents(unit.data, unit.read(tally), tokenizer, writers, findings):
            pass
        splits = {split: dataclasses.asdict(writer.close()) for split, writer in writers.items()}
        if isinstance(part, Url):
            copy_folder(folder, part)
    return {"splits": splits, "tally": vars(tally), "findings": vars(findings)}


@functools.lru_cache(maxsize=1)
def _tokenizer(parts: Location) -> Tokenizer:
    with on_disk(parts / "tokenizer") as folder:
        return load_tokenizer(folder)


# And then.


def _stems(parts: Location, suffix: str = ".json") -> dict[int, str]:
    """Returns, by number, the names of the units that have such a file, one attempt of each."""
    names = [path.name.removesuffix(suffix) for path in parts.iterdir() if path.name.endswith(suffix)]
    return {int(name.partition("-")[0]): name for name in names}


def _join(sources: tuple[Source, ...], parts: Location, prepared_folder: str, writers: Writers, say: Say) -> Findings:
    """Appends the parts to the shards, in order, and removes them."""
    stems, findings, number = _stems(parts), Findings(), 0
    for source in sources:
        tally = Tally()
        for unit in source.files_apart():
            if number not in stems:
                of = ", ".join(itertools.chain(*unit.names().values())) or "the storybook"
                raise UserError(
                    f"data.prepared_folder={prepared_folder!r}: no worker of Apache Beam left there what it made of "
                    f"{of}; name a folder that this machine and all workers see, such as one on gs://."
                )
            entries = json.loads((parts / f"{stems[number]}.json").read_text("utf-8"))
            part = parts / f"{stems[number]}.shards"
            with on_disk(part) as folder:
                for split, entry in entries["splits"].items():
                    writers[split].write_part(folder, split_of(entry))
            remove_folder(part)
            found = Tally(**entries["tally"])
            found.broken = [_as_named_here(line, unit) for line in found.broken]
            tally.add(found)
            findings.add(Findings(**entries["findings"]))
            number += 1
        source.finish(tally, say)
    return findings
