"""Preparing with Apache Beam: the workers of a runner encode files, and this process joins the parts.

First this process reads the text for the vocabulary. Then a worker writes a part for each file: shards of its tokens,
and a JSON file with its counts. At the end this process joins the parts in the order of the files, with the writers
that it would use without Beam, so that the bytes are the same.
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

from trainer.config.settings import Config
from trainer.data.encoding import Findings, Writers, encode_documents
from trainer.data.prepare import prepare
from trainer.data.shard_writer import SplitWriter
from trainer.data.shards import SHARD_TOKENS, PreparedData, split_of
from trainer.errors import UserError
from trainer.system.machine import num_cores
from trainer.system.storage import Location, Url, copy_folder, locate, on_disk, remove_folder
from trainer.system.terminal import Say
from trainer.system.whole import write_whole
from trainer.text.source import Input, Source, Tally
from trainer.text.sources import Mixture
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.tokenizers.tokenizer_files import load_tokenizer
from trainer.version import __version__

# DirectRunner starts Prism, a program from the network that has only one Python process, unless an option needs what
# Prism cannot do.
_ALL_CORES = (
    "--runner=DirectRunner",
    "--allow_unsafe_triggers",
    "--direct_running_mode=multi_processing",
    f"--direct_num_workers={num_cores()}",
    "--default_sdk_harness_log_level=ERROR",
)
_PROGRESS_SECS = 10.0  # Each line needs a listing, for which a store may charge.


def prepare_with_beam(
    config: Config, options: Sequence[str], say: Say = print, shard_tokens: int = SHARD_TOKENS
) -> PreparedData:
    """Does what `prepare` does, on the workers of an Apache Beam runner.

    Args:
        config: the settings. All workers have to see the files and data.prepared_folder.
        options: the options of Apache Beam's command lines; without --runner, all cores of this machine are used.
        say: prints a line on the progress every few seconds.
        shard_tokens: a shard with this many tokens gets no further document.

    Raises:
        UserError: as in `prepare`; or Apache Beam is not installed, refuses an option or finds no workers; or the
            workers do not see data.prepared_folder, or have another version of trainer.
    """
    pipeline = _pipeline(options)
    return prepare(config, say, shard_tokens, functools.partial(_encode, pipeline, config.data.prepared_folder))


def _pipeline(options: Sequence[str]) -> Any:
    logging.disable(logging.WARNING)  # Importing warns about a package that only another runner needs.
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
    remove_folder(parts)  # A killed process may have left it.
    sources = source.sources if isinstance(source, Mixture) else (source,)
    units = [unit for each in sources for unit in each.inputs_apart()]
    try:
        copy_folder(folder / "tokenizer", parts / "tokenizer")
        # As bytes, which Beam does not convert.
        pickled = pipeline | apache_beam.Create([(i, pickle.dumps(_absolute(unit))) for i, unit in enumerate(units)])
        # Without the shuffle, all units would stay with the worker that creates them.
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
    """Returns a source with absolute paths, as a worker may have another working directory."""

    def moved(files: tuple[Input, ...]) -> tuple[Input, ...]:
        return tuple(file.absolute() if isinstance(file, Path) else file for file in files)

    return dataclasses.replace(
        unit, train_inputs=moved(unit.train_inputs), validation_inputs=moved(unit.validation_inputs)
    )


def _as_named_here(text: str, unit: Source) -> str:
    """Returns a worker's message about a unit, with the files named as in the config."""
    for file in (*unit.train_inputs, *unit.validation_inputs):
        text = text.replace(str(file.absolute()), str(file)) if isinstance(file, Path) else text
    return text


def _run(pipeline: Any) -> None:
    try:
        running = pipeline.run()
        try:
            running.wait_until_finish()
        except KeyboardInterrupt:
            with contextlib.suppress(NotImplementedError):  # Without cancel(), a cluster would go on.
                running.cancel()
            raise
    except Exception as error:  # Each runner raises its own kinds.
        raise UserError(f"Apache Beam could not run the pipeline: {error}") from error


@contextlib.contextmanager
def _watched(parts: Location, num_parts: int, say: Say) -> Iterator[None]:
    """Prints every few seconds how many parts there are, and stops the pipeline when a worker process of this machine
    was killed, for example because memory ran out: Beam would wait for it for ever.

    Raises:
        UserError: a worker process was killed.
    """
    start, is_over, is_stopped = time.monotonic(), threading.Event(), threading.Event()
    killed: list[object] = []
    hook = threading.excepthook

    def note(failed: threading.ExceptHookArgs) -> None:
        if failed.thread is not None and failed.thread.name == "run_worker":  # Beam's thread for the process.
            killed.append(failed.exc_value)
        hook(failed)

    def watch() -> None:
        while not is_over.wait(_PROGRESS_SECS):
            if killed:
                is_stopped.set()
                os.kill(os.getpid(), signal.SIGINT)  # Only a signal ends the call that the main thread waits in.
                return
            with contextlib.suppress(OSError, UserError):
                say(f"encoding: {len(_stems(parts))} of {num_parts} parts, {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    threading.excepthook = note
    try:
        with _sigint_stops(is_stopped):
            thread.start()
            yield
    except KeyboardInterrupt:
        if not is_stopped.is_set():
            raise
        raise UserError(
            f"Apache Beam: {killed[0]}. If memory ran out, use fewer workers: -- --direct_num_workers=1"
        ) from None
    finally:
        is_over.set()
        thread.join()
        threading.excepthook = hook


@contextlib.contextmanager
def _sigint_stops(is_stopped: threading.Event) -> Iterator[None]:
    """Lets SIGINT raise KeyboardInterrupt once is_stopped is set, even in a process that ignores SIGINT: a shell starts
    background processes so.
    """
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not is_ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        if is_stopped.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_part(parts: Location, version: str, numbered: tuple[int, bytes]) -> None:
    """Writes the part of a unit.

    A runner may start this twice, even at the same time, so each attempt has another name. It counts once its .json
    exists, which holds what is not in the shards. A UserError is written into a file and not raised: the runner would
    try again, and print pages.

    Args:
        parts: the folder of all parts.
        version: the version of trainer in the launching process.
        numbered: the unit's number, and its pickle.
    """
    # Without the tokenizer, this worker does not see the folder, which the launching process reports; or the launching
    # process has stopped and removed it.
    if not (parts / "tokenizer").is_dir() or (parts / "failed").is_file():
        return
    number, pickled = numbered
    stem = f"{number:06}-{secrets.token_hex(4)}"
    try:
        if version != __version__:
            raise UserError(
                f"A worker of Apache Beam has trainer {__version__}, and not {version}; install the same version."
            )
        entries = _encode_part(pickle.loads(pickled), _tokenizer(parts), parts / f"{stem}.shards")
    except UserError as error:
        write_whole(parts / f"{stem}.error", str(error))
        (parts / "failed").write_bytes(b"")  # The other workers stop.
        return
    write_whole(parts / f"{stem}.json", json.dumps(entries))


def _encode_part(unit: Source, tokenizer: Tokenizer, part: Location) -> dict[str, Any]:
    """Writes the shards of a part, and returns its entries, tally and findings."""
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


def _stems(parts: Location, suffix: str = ".json") -> dict[int, str]:
    """Returns the name of one attempt, by unit number, of each unit that has a file with the suffix."""
    names = [path.name.removesuffix(suffix) for path in parts.iterdir() if path.name.endswith(suffix)]
    return {int(name.partition("-")[0]): name for name in names}


def _join(sources: tuple[Source, ...], parts: Location, prepared_folder: str, writers: Writers, say: Say) -> Findings:
    """Appends the parts to the shards, in order, and removes them."""
    stems, findings, number = _stems(parts), Findings(), 0
    for source in sources:
        tally = Tally()
        for unit in source.inputs_apart():
            if number not in stems:
                of = ", ".join(itertools.chain(*unit.names().values())) or "the storybook"
                raise UserError(
                    f"data.prepared_folder={prepared_folder!r}: no worker of Apache Beam has written its part of "
                    f"{of} there; name a folder that this machine and all workers see, such as one on gs://."
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
