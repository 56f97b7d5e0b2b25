#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../../scripts/venv_python" "$0" "$@"'
"""Mutates the inputs of trainer, thousands of times, and checks that each mutation is accepted or refused properly.

    tests/mutations/mutate.py [KIND ...] [--number 2000] [--seed 0] [--secs SECS]
    tests/mutations/mutate.py --case KIND/NUMBER [--seed 0]

A mutation is refused properly with exit status 2 (or 1 if a verification failed) and a short message: no traceback, no
warning of a library, no hang, no killed process. It is accepted properly if the result agrees with the mutated input;
each kind of input has a cheap check of that. Neither may leave files behind that make the next try with the original
input fail. The program prints for each kind how many mutations were tried, accepted and refused, and each fault with
its case. --case runs such a case again, and prints its input and traceback. --secs ends the program after that many
seconds. The exit status is 1 if there are faults.

The mutations run in another process, which is started again if a mutation kills it or hangs.
"""

import argparse
import collections
import json
import math
import os
import random
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from mutated_commands import options, prompt, prompts, tf_config
from mutated_folders import prepared_folder, run_folder, stopped_folder
from mutated_settings import config, overrides
from mutated_tables import dataset_folder, table
from mutated_texts import jsonl, text, tokenizer_json, vocabulary, zstd
from mutation_lab import LOG, Fault, Lab

# The watching process waits longer for a case than the case's own limit, in case no signal ends the hang.
DEAD_SECS = 600.0
# The limit of a process's memory. Without it a mutated size could use up the machine's memory.
MAX_MEMORY_BYTES = 6 << 30
MAX_NAMED_FAULTS = 200

KINDS: dict[str, Callable[[Lab, random.Random], bool]] = {
    "config": config,
    "overrides": overrides,
    "text": text,
    "jsonl": jsonl,
    "zstd": zstd,
    "table": table,
    "dataset": dataset_folder,
    "vocabulary": vocabulary,
    "tokenizer.json": tokenizer_json,
    "prompt": prompt,
    "prompts": prompts,
    "run": run_folder,
    "prepared": prepared_folder,
    "stopped": stopped_folder,
    "tf_config": tf_config,
    "options": options,
}


class Verdict(NamedTuple):
    """The outcome of a case.

    Attributes:
        result: "accepted", "refused" or "fault".
        secs: the CPU time.
        fault: a description of the fault.
        details: the case's inputs and the fault's traceback.
    """

    result: str
    secs: float = 0.0
    fault: str = ""
    details: str = ""


def attempt(lab: Lab, kind: str, number: int, seed: int) -> Verdict:
    """Runs one case."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    start = time.process_time()
    try:
        with lab.case():
            result = "accepted" if KINDS[kind](lab, rng) else "refused"
        return Verdict(result, time.process_time() - start)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A panic in a Rust library is not an Exception.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/trainer/" in frame.filename]
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        name = "" if isinstance(error, Fault) else f"{type(error).__name__}{place}: "
        return Verdict(
            "fault",
            time.process_time() - start,
            f"{name}{str(error)[:600]}",
            "\n".join([*lab.notes, traceback.format_exc()]),
        )


# One process runs the cases, and writes a line before and after each; the other process reads these lines.


def work(folder: Path, seed: int, kinds: Sequence[str], first: int, last: int) -> None:
    """Runs the cases at places first to last, and writes a line before and after each: its place, its verdict."""
    channel = os.fdopen(os.dup(1), "w")
    # The output of libraries while they are imported does not belong to a case.
    os.dup2(os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    lab = Lab(folder)
    for place in range(first, last):
        print(json.dumps([place]), file=channel, flush=True)
        verdict = attempt(lab, kinds[place % len(kinds)], place // len(kinds), seed)
        print(json.dumps([place, *verdict[:3]]), file=channel, flush=True)


def watch(folder: Path, options: argparse.Namespace, deadline: float) -> Iterator[tuple[str, int, Verdict]]:
    """Yields (kind, number, verdict) for each case, and starts the working process again if a case killed it.

    A case that has begun by the deadline may still end, because it may be one that hangs.
    """
    place, last = 0, options.number * len(options.kinds)
    while place < last and time.monotonic() < deadline:
        # Libraries leak memory, so a process runs only this many cases.
        words = f"--work {folder} --from {place} --to {min(last, place + 3_000)} --seed {options.seed}".split()
        with subprocess.Popen(
            [sys.executable, __file__, *options.kinds, *words],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            bufsize=0,
        ) as process:
            assert process.stdout is not None
            is_under_way = False
            for place, *found in _messages(process.stdout, deadline):
                is_under_way = not found
                if found:
                    yield options.kinds[place % len(options.kinds)], place // len(options.kinds), Verdict(*found)
                    if time.monotonic() >= deadline:
                        break
            place += not is_under_way
            process.kill()
            status = process.wait()
        if is_under_way:
            log = (folder / LOG).read_text("utf-8", "replace").splitlines()
            how = f"the process ended with status {status}: {' / '.join(log[-5:])}"
            yield options.kinds[place % len(options.kinds)], place // len(options.kinds), Verdict("fault", 0.0, how)
            place += 1
        elif status not in (0, -signal.SIGKILL):
            raise SystemExit((folder / LOG).read_text("utf-8", "replace"))


def _messages(stream: IO[bytes], deadline: float) -> Iterator[list[Any]]:
    """Yields a process's lines until it ends, or until the deadline if no case is running."""
    rest, is_under_way = b"", False
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(DEAD_SECS if is_under_way else min(DEAD_SECS, max(0.0, deadline - time.monotonic()))):
            read = os.read(stream.fileno(), 1 << 16)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            for message in map(json.loads, lines):
                is_under_way = len(message) == 1
                yield message


def report(kinds: Sequence[str], verdicts: dict[str, list[tuple[int, Verdict]]], seed: int) -> int:
    """Prints the outcomes of all cases; returns the number of faults."""
    for kind in kinds:
        results = collections.Counter(verdict.result for _, verdict in verdicts[kind])
        counts = ", ".join(f"{results[result]} {result}" for result in ("accepted", "refused"))
        secs = sum(verdict.secs for _, verdict in verdicts[kind]) / max(results.total(), 1)
        print(f"{kind:15} {results.total()} tried, {counts}, {results['fault']} faults, {1000 * secs:.0f} ms each")
        for number, verdict in [case for case in verdicts[kind] if case[1].result == "fault"][:MAX_NAMED_FAULTS]:
            print(f"  --case {kind}/{number} --seed {seed}: {verdict.fault}")
    return sum(verdict.result == "fault" for cases in verdicts.values() for _, verdict in cases)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases that the command line names; returns the exit status."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"kinds of input: {', '.join(KINDS)} (all)")
    parser.add_argument("--number", type=int, default=2_000, help="mutations of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default: %(default)s)")
    parser.add_argument("--secs", type=float, default=math.inf, help="end after this many seconds")
    parser.add_argument("--case", metavar="KIND/NUMBER", help="run one case again, and print its details")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--to", dest="last", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"{', '.join(unknown)}: not a kind of input; choose among {', '.join(KINDS)}")
    options.kinds = options.kinds or list(KINDS)
    if options.work:
        work(options.work, options.seed, options.kinds, options.first, options.last)
        return 0
    deadline = time.monotonic() + options.secs
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        if options.case:
            kind, _, number = options.case.rpartition("/")
            verdict = attempt(Lab(Path(folder)), kind, int(number), options.seed)
            print(verdict.result, verdict.fault, verdict.details, sep="\n")
            return int(verdict.result == "fault")
        verdicts: dict[str, list[tuple[int, Verdict]]] = collections.defaultdict(list)
        for kind, number, verdict in watch(Path(folder), options, deadline):
            verdicts[kind].append((number, verdict))
    return int(report(options.kinds, verdicts, options.seed) > 0)


if __name__ == "__main__":
    sys.exit(main())
