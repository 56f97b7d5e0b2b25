#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures preparing text: its speed and its vocabulary beside those of others, its memory, and texts that are nasty.

    scripts/benchmarks/prepare.py [--only speed vocabulary scale] [--quick] [--text FILE] [--json OUT]

speed: all of `prepare` but the training of a vocabulary, in turn with keras_nlp's tokenizer in a bare tf.data map and
with encode_batch_fast of tokenizers alone, each in two settings, of which the better counts. vocabulary: trainer's
training of one beside that of TensorFlow Text, and a small model trained with each. scale: `trainer prepare` on texts
of growing size and on nasty ones, with the memory of all its processes; the exit status is 1 where anything was lost.

FILE is text, plain or .gz, a document per line; left out, the books in the folder that TRAINER_TEST_DATA names, or
without those the storybook. Texts are written below TMPDIR, which needs room for twice the largest. psutil comes with
the test extra, which scripts/test installs.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_nlp
import psutil
import rich.console
import tensorflow as tf
import tokenizers

from harness import Training, about, table_of
from trainer.config import BpeConfig, Config, WordPieceConfig
from trainer.config_file import make_config
from trainer.data.files import parts_of, read_documents
from trainer.data.prepare import prepare
from trainer.data.shards import load_prepared
from trainer.data.vocabulary import SPECIAL_TOKENS, train_bpe, train_wordpiece
from trainer.errors import UserError
from trainer.storybook.storybook import story
from trainer.training.evaluation import Evaluator

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("speed", "vocabulary", "scale")
ROUNDS = 5
WORDPIECE = WordPieceConfig(kind="wordpiece")
BPE = BpeConfig(kind="bpe")
# A longer text tells the same stories again, under other numbers.
STORYBOOK_BYTES = 50e6
SAMPLE_SECS = 0.05
# Each becomes one token, so that a text of them has as many tokens as words.
WORDS = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]

Figures = dict[str, Any]
# Tokenizes a text, and returns how many tokens it has.
Contestant = Callable[[], int]


# Speed.


def measure_speed(text: Path, folder: Path) -> list[Figures]:
    """Times tokenizing a text with a WordPiece and with a byte-level BPE vocabulary."""
    vocabulary, file = folder / "vocab.txt", folder / "tokenizer.json"
    write_vocabulary(vocabulary, train_wordpiece(WORDPIECE, read_documents(text, "line")))
    file.write_text(train_bpe(BPE, read_documents(text, "line")), "utf-8")
    return [
        compete("wordpiece", preparing(text, folder, "wordpiece", vocabulary), keras_tokenizing(text, vocabulary)),
        compete("bpe", preparing(text, folder, "bpe", file), encoding(text, file)),
    ]


def preparing(text: Path, folder: Path, kind: str, vocabulary: Path) -> Contestant:
    """Returns `prepare` with a vocabulary that is there: hashing, reading, tokenizing, writing and checking."""

    def run() -> int:
        # Clearing up is timed too, and against us.
        with tempfile.TemporaryDirectory(dir=folder) as prepared_folder:
            prepared = prepare(config_of(text, prepared_folder, kind, vocabulary, 1), _be_silent)
            return sum(split.num_tokens for split in prepared.splits.values())

    return run


def keras_tokenizing(text: Path, vocabulary: Path) -> dict[str, Contestant]:
    """Returns keras_nlp's tokenizer mapped over lines and over batches of them, its tokens counted and dropped."""
    tokenizer = keras_nlp.tokenizers.WordPieceTokenizer(str(vocabulary), lowercase=WORDPIECE.lowercase)

    def count(lines: tf.Tensor) -> tf.Tensor:
        tokens = tokenizer(lines)
        return tf.size(tokens.flat_values if isinstance(tokens, tf.RaggedTensor) else tokens, tf.int64)

    def counting(data: tf.data.Dataset) -> Contestant:
        counts = data.map(count, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
        return lambda: int(counts.reduce(tf.zeros([], tf.int64), tf.add))

    lines = tf.data.TextLineDataset(str(text))
    return {"keras_nlp, line by line": counting(lines), "keras_nlp, 1,024 lines at once": counting(lines.batch(1024))}


def encoding(text: Path, file: Path) -> dict[str, Contestant]:
    """Returns tokenizers' encode_batch_fast, which takes all cores, on lines that are in memory already."""
    encoder = tokenizers.Tokenizer.from_file(str(file))
    lines = text.read_text("utf-8").removesuffix("\n").split("\n")

    def counting(size: int) -> Contestant:
        batches = [lines[start : start + size] for start in range(0, len(lines), size)]
        return lambda: sum(len(each) for batch in batches for each in encoder.encode_batch_fast(batch))

    return {f"tokenizers, {size:,} lines at once": counting(size) for size in (1000, 10_000)}


def compete(kind: str, ours: Contestant, others: dict[str, Contestant]) -> Figures:
    """Times contestants in turn, and compares ours with the better of the others, round by round."""
    contestants = {"trainer": ours, **others}
    num_tokens: dict[str, int] = {}
    secs: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1 + ROUNDS):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            num_tokens[name] = contestant()
            if number:  # The first round traces, and brings the text into memory.
                secs[name].append(time.perf_counter() - start)
    best = min(others, key=lambda name: statistics.median(secs[name]))
    return {
        "kind": kind,
        "contestants": [
            {
                "name": name,
                "num_tokens": num_tokens[name],
                "tokens_per_sec": num_tokens[name] / statistics.median(secs[name]),
                "each_secs": secs[name],
            }
            for name in contestants
        ],
        "compared_with": best,
        # Of times and not of rates: the text is the same, and where a tokenizer makes more of it, that is no gain.
        "ratio": statistics.median(b / a for a, b in zip(secs["trainer"], secs[best], strict=True)),
    }


def print_speed(console: rich.console.Console, comparisons: Sequence[Figures]) -> None:
    """Prints the figures of `measure_speed`."""
    rows = [
        [comparison["kind"], each["name"], f"{each['num_tokens']:,}", f"{each['tokens_per_sec'] / 1e6:.2f}"]
        for comparison in comparisons
        for each in comparison["contestants"]
    ]
    names = ["vocabulary", "tokenized by", "tokens", "million tokens/s"]
    console.print(table_of(f"speed, medians of {ROUNDS} rounds", names, rows, num_names=2))
    for comparison in comparisons:
        console.print(
            f"{comparison['kind']}: trainer is {comparison['ratio']:.2f} times as fast as "
            f"{comparison['compared_with']}",
            highlight=False,
        )


# Vocabulary.


def measure_vocabulary(text: Path, folder: Path, num_steps: int) -> list[Figures]:
    """Trains a WordPiece vocabulary of one size in two ways, and a model with each."""
    size, lowercase = WORDPIECE.vocabulary_size, WORDPIECE.lowercase

    def theirs() -> list[str]:
        lines = tf.data.TextLineDataset(str(text)).batch(1024)
        reserved = list(SPECIAL_TOKENS)
        vocabulary: list[str] = keras_nlp.tokenizers.compute_word_piece_vocabulary(
            lines, size, lowercase=lowercase, reserved_tokens=reserved
        )
        return vocabulary

    trainings = {
        "trainer": lambda: train_wordpiece(WORDPIECE, read_documents(text, "line")),
        "TensorFlow Text": theirs,
    }
    rows: list[Figures] = []
    for name, training in trainings.items():
        start = time.perf_counter()
        vocabulary = training()
        secs = time.perf_counter() - start
        path = folder / f"{len(rows)}.txt"
        write_vocabulary(path, vocabulary)
        rows.append({"name": name, "vocabulary_size": len(vocabulary), "secs": secs, **score(text, path, num_steps)})
    return rows


def score(text: Path, vocabulary: Path, num_steps: int) -> Figures:
    """Returns how well a text is written in a vocabulary, and learned by a small model."""
    with tempfile.TemporaryDirectory(dir=vocabulary.parent) as folder:
        config = config_of(text, folder, "wordpiece", vocabulary, max(1, num_steps))
        prepared = prepare(config, _be_silent)
        splits = prepared.splits.values()
        num_tokens = sum(split.num_tokens for split in splits)
        figures = {
            "bytes_per_token": sum(split.num_bytes for split in splits) / num_tokens,
            "unknown_share": sum(split.num_unknown for split in splits) / num_tokens,
        }
        if num_steps:
            training = Training(config, prepared, num_steps)
            training.take(num_steps)
            figures["bits_per_byte"] = Evaluator(training.model, training.strategy, prepared, config)().bits_per_byte
    return figures


def print_vocabulary(console: rich.console.Console, rows: Sequence[Figures], num_steps: int) -> None:
    """Prints the figures of `measure_vocabulary`."""
    names = ["trained by", "tokens", "s", "bytes/token", "[UNK]"]
    if num_steps:
        names.append(f"bits/byte after {num_steps} steps")
    cells = [
        [
            row["name"],
            f"{row['vocabulary_size']:,}",
            f"{row['secs']:.1f}",
            f"{row['bytes_per_token']:.2f}",
            f"{row['unknown_share']:.3%}",
            *([f"{row['bits_per_byte']:.3f}"] if num_steps else []),
        ]
        for row in rows
    ]
    console.print(table_of("WordPiece vocabularies", names, cells, num_names=1))


# Scale.


class Counts(NamedTuple):
    """Of documents: what is in their text, or what was found of it. A word is a token at least."""

    num_documents: int
    num_tokens: int
    num_bytes: int

    def plus(self, other: "Counts") -> "Counts":
        """Returns the counts of both."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Case(NamedTuple):
    """A text to prepare.

    name: what it is. write: writes its files into a folder. is_exact: whether it is all made of WORDS; then it has a
    file to validate on. settings: beside those. says: what has to be said of it.
    """

    name: str
    write: Callable[[Path], Counts]
    is_exact: bool = True
    settings: tuple[str, ...] = ()
    says: str = ""


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yields the texts of growing size, and then the nasty ones."""
    smaller = (factor * 10**power for power in range(1, 7) for factor in (1, 3))
    for num_mb in [*itertools.takewhile(lambda size: size < options.max_mb, smaller), options.max_mb]:
        write = functools.partial(write_numbered, num_bytes=num_mb * 1e6)
        yield Case(f"{num_mb:g} MB of stories", write, is_exact=False)
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(100)]
    yield Case(
        f"{options.documents:,} tiny documents",
        lambda folder: write_documents(folder, itertools.islice(itertools.cycle(WORDS), options.documents)),
    )
    yield Case(f"{options.long_mb:g} MB in one line", lambda folder: write_long(folder, options.long_mb * 1e6))
    yield Case("no newline at the end", lambda folder: write_unended(folder, lines))
    yield Case(
        "blank lines between",
        lambda folder: write_documents(folder, (part for line in lines for part in (line, "", " \t", "\u3000\u00a0 "))),
    )
    yield Case(
        "a file with invalid UTF-8",
        lambda folder: write_broken(folder, lines),
        settings=("data.max_broken_fraction=0.01",),
        says="1 broken records",
    )


def write_documents(folder: Path, documents: Iterable[str], name: str = "text.txt") -> Counts:
    """Writes documents a line each, and counts those that are not blank."""
    num_documents = num_words = num_bytes = 0
    with (folder / name).open("wb") as file:
        for document in documents:
            line = document.encode()
            file.write(line + b"\n")
            if document and not document.isspace():
                num_documents += 1
                num_words += document.count(" ") + 1
                num_bytes += len(line)
    return Counts(num_documents, num_words, num_bytes)


def write_numbered(folder: Path, num_bytes: float) -> Counts:
    """Writes so many bytes of stories, each with a number of its own, and after a while the same ones again."""

    def documents() -> Iterator[str]:
        told: list[str] = []
        num_written = 0
        for number in itertools.count():
            if len(told) == number and num_written < STORYBOOK_BYTES:
                told.append(story(0, number))
            document = f"{number} {told[number % len(told)]}"
            num_written += len(document) + 1
            yield document
            if num_written >= num_bytes:
                return

    return write_documents(folder, documents())


def write_long(folder: Path, num_bytes: float) -> Counts:
    """Writes so many bytes in one line."""
    words = " ".join([*WORDS, ""])
    num_repeats = math.ceil(num_bytes / len(words))
    with (folder / "text.txt").open("wb") as file:
        file.writelines(itertools.repeat(words.encode(), num_repeats))
        file.write(b"\n")
    return Counts(1, num_repeats * len(WORDS), num_repeats * len(words))


def write_unended(folder: Path, lines: Sequence[str]) -> Counts:
    """Writes lines of which the last does not end."""
    counts = write_documents(folder, lines)
    path = folder / "text.txt"
    os.truncate(path, path.stat().st_size - 1)
    return counts


def write_broken(folder: Path, lines: Sequence[str]) -> Counts:
    """Writes lines into 20 files, one of which has another line that is not UTF-8."""
    counts = Counts(0, 0, 0)
    for i in range(20):
        counts = counts.plus(write_documents(folder, lines, f"{i}.txt"))
    path = folder / "7.txt"
    path.write_bytes("café\n".encode("latin-1") + path.read_bytes())
    return counts


def measure_case(case: Case) -> Figures:
    """Prepares a text in a process of its own; returns what that took, and what is wrong with what came out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, prepared, log = folder / "text", folder / "prepared", folder / "log"
        text.mkdir()
        expected = case.write(text)
        text_bytes = sum(path.stat().st_size for path in text.iterdir())
        # Packed: lines mode refuses a text of which it would leave out the most.
        settings = [f"data.train={text}/*.txt", f"data.prepared_folder={prepared}", "data.mode=packed", *case.settings]
        if case.is_exact:
            expected = expected.plus(write_documents(folder, [" ".join(WORDS)], "validation.txt"))
            settings.append(f"data.validation={folder / 'validation.txt'}")
        config = str(ROOT / "configs" / "quickstart.toml")
        status, secs, peak_bytes = watch([sys.executable, "-m", "trainer", "prepare", config, *settings], log)
        said = log.read_text("utf-8", "replace")
        found = count_prepared(prepared) if status == 0 else Counts(0, 0, 0)
        fault = find_fault(case, expected, found) if status == 0 else f"exit status {status}"
        if not fault and case.says not in said:
            fault = f"{case.says!r} was not said"
        return {
            "text": case.name,
            "text_bytes": text_bytes,
            **found._asdict(),
            "secs": secs,
            "peak_bytes": peak_bytes,
            "fault": f"{fault}\n{said}" if fault else "",
        }


def watch(command: Sequence[str], log: Path) -> tuple[int, float, int]:
    """Runs a command; returns its exit status, seconds, and the most memory that all its processes had at a time.

    What processes share is counted for each of them.
    """
    start, peak_bytes = time.perf_counter(), 0
    with log.open("wb") as output:
        process = psutil.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            num_bytes = 0
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in (process, *process.children(recursive=True)):
                    num_bytes += each.memory_info().rss
            peak_bytes = max(peak_bytes, num_bytes)
            time.sleep(SAMPLE_SECS)
    return process.returncode, time.perf_counter() - start, peak_bytes


def count_prepared(folder: Path) -> Counts:
    """Returns what is in the one prepared data set of a folder."""
    (path,) = folder.iterdir()
    splits = load_prepared(path).splits.values()
    return Counts(*(sum(getattr(split, name) for split in splits) for name in Counts._fields))


def find_fault(case: Case, expected: Counts, found: Counts) -> str:
    """Returns where counts differ from what they must be, or nothing."""
    if not case.is_exact and found.num_tokens >= expected.num_tokens:
        expected = expected._replace(num_tokens=found.num_tokens)
    return "" if found == expected else f"{found} instead of {expected}"


def print_scale(console: rich.console.Console, rows: Sequence[Figures]) -> None:
    """Prints the figures of `measure_case`."""
    names = ["text", "MB", "documents", "tokens", "s", "MB/s", "peak MB", "nothing lost"]
    cells = [
        [
            row["text"],
            f"{row['text_bytes'] / 1e6:.1f}",
            f"{row['num_documents']:,}",
            f"{row['num_tokens']:,}",
            f"{row['secs']:.1f}",
            f"{row['text_bytes'] / 1e6 / row['secs']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            "no" if row["fault"] else "yes",
        ]
        for row in rows
    ]
    console.print(table_of("trainer prepare, start and vocabulary included", names, cells, num_names=1))


# What the parts share.


def config_of(text: Path, prepared_folder: str, kind: str, vocabulary: Path, num_steps: int) -> Config:
    """Returns a config of a small model on a text, with a vocabulary that is there."""
    return make_config(
        {
            "run_folder": "none",
            "data": {"train": str(text), "mode": "packed", "prepared_folder": prepared_folder},
            "tokenizer": {"kind": kind, "path": str(vocabulary)},
            "model": {"num_layers": 2, "num_heads": 2, "hidden_dim": 64, "intermediate_dim": 256, "pre_norm": True},
            "train": {"precision": "float32", "total_steps": num_steps, "global_batch_size": 32},
            "optimizer": {"learning_rate": 3e-3, "clip_norm": 1.0},
        }
    )


def write_text(path: Path, source: str | None, num_bytes: float) -> None:
    """Writes so many bytes of a file's documents, or all there are, a line each; without a file, of the storybook."""
    if source is None:
        documents = (story(0, number) for number in itertools.count())
    else:
        documents = ("".join(parts_of(document)) for document in read_documents(Path(source), "line"))
    with path.open("wb") as file:
        for document in documents:
            file.write(document.encode() + b"\n")
            if file.tell() >= num_bytes:
                break


def write_vocabulary(path: Path, vocabulary: Iterable[str]) -> None:
    """Writes a vocab.txt."""
    path.write_text("".join(f"{token}\n" for token in vocabulary), "utf-8", newline="\n")


def _books() -> str | None:
    path = Path(os.environ.get("TRAINER_TEST_DATA", "")) / "books" / "simple_train.txt.gz"
    return str(path) if path.is_file() else None


def _be_silent(_: str) -> None:
    pass


def main() -> None:
    """Measures, prints and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (everything)")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--text", metavar="FILE", help="text for speed and vocabulary")
    parser.add_argument("--speed-mb", type=float, default=30, help="how much of it for speed (%(default)s)")
    parser.add_argument("--vocabulary-mb", type=float, default=13, help="and for vocabulary (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of the training with each vocabulary, 0 for none")
    parser.add_argument("--max-mb", type=float, default=100, help="of the largest text of scale (%(default)s)")
    parser.add_argument("--documents", type=int, default=1_000_000, help="how many tiny ones (%(default)s)")
    parser.add_argument("--long-mb", type=float, default=100, help="of the one long document (%(default)s)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file to write all figures to")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(speed_mb=0.5, vocabulary_mb=0.5, steps=3, max_mb=2, documents=3_000, long_mb=6)
    options = parser.parse_args()

    tf.get_logger().setLevel("ERROR")  # It warns of the functions that each of many vocabularies brings along.
    console = rich.console.Console()
    source = options.text or _books()
    report: Figures = {
        **about(),
        "tokenizers": tokenizers.__version__,
        "text": source or "storybook",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if "speed" in options.only:
                write_text(folder / "speed.txt", source, options.speed_mb * 1e6)
                report["speed"] = measure_speed(folder / "speed.txt", folder)
                print_speed(console, report["speed"])
            if "vocabulary" in options.only:
                write_text(folder / "vocabulary.txt", source, options.vocabulary_mb * 1e6)
                report["vocabulary"] = measure_vocabulary(folder / "vocabulary.txt", folder, options.steps)
                print_vocabulary(console, report["vocabulary"], options.steps)
        except UserError as error:
            sys.exit(str(error))
    if "scale" in options.only:
        report["scale"] = []
        for case in cases(options):
            console.print(f"preparing {case.name}", highlight=False)
            report["scale"].append(measure_case(case))
        print_scale(console, report["scale"])
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if faults := [f"{row['text']}: {row['fault']}" for row in report.get("scale", []) if row["fault"]]:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
