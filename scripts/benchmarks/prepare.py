#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures preparing text: speed and vocabulary beside other programs, memory, and what becomes of unusual texts.

    scripts/benchmarks/prepare.py [--only speed vocabulary scale] [--quick] [--text FILE] [--json OUT]

speed: all of `prepare` except the training of a vocabulary. It takes turns with KerasNLP's tokenizer, which only a
tf.data map applies, and with encode_batch_fast of the package tokenizers; each has two settings, and the faster counts.
vocabulary: trainer and TensorFlow Text train one each, and a small model is trained with each vocabulary. scale:
`trainer prepare` on texts of growing size and on unusual ones, with the memory of all its processes; the exit status is
1 if anything was lost.

FILE is a text, plain or .gz, one document a line. The default is the books in the folder that TRAINER_TEST_DATA names,
or the storybook if that is not set. Texts are written below TMPDIR, which needs room for twice the largest. psutil is
in the test extra, which scripts/test installs.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_nlp
import psutil
import rich.console
import tensorflow as tf
import tokenizers

from harness import Training, about, table_of
from texts import WORDS, Case, Counts, cases, write_documents
from trainer.config.file import make_config
from trainer.config.settings import BpeConfig, Config, WordPieceConfig
from trainer.data.prepare import prepare
from trainer.data.shards import load_prepared
from trainer.errors import UserError
from trainer.storybook.storybook import story
from trainer.text.files import parts_of, read_documents
from trainer.tokenizers.vocabulary import SPECIAL_TOKENS, train_bpe, train_wordpiece
from trainer.training.evaluation import Evaluator

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("speed", "vocabulary", "scale")
ROUNDS = 5
WORDPIECE = WordPieceConfig(kind="wordpiece")
BPE = BpeConfig(kind="bpe")
SAMPLE_SECS = 0.05

Figures = dict[str, Any]
# Tokenizes a text, and returns the number of its tokens.
Contestant = Callable[[], int]


# Speed.


def measure_speed(text: Path, folder: Path) -> list[Figures]:
    """Times tokenizing a text with a WordPiece vocabulary and with a byte-level BPE vocabulary."""
    vocabulary, file = folder / "vocab.txt", folder / "tokenizer.json"
    write_vocabulary(vocabulary, train_wordpiece(WORDPIECE, read_documents(text, "line")))
    file.write_text(train_bpe(BPE, read_documents(text, "line")), "utf-8")
    return [
        compete("wordpiece", preparing(text, folder, "wordpiece", vocabulary), keras_tokenizing(text, vocabulary)),
        compete("bpe", preparing(text, folder, "bpe", file), encoding(text, file)),
    ]


def preparing(text: Path, folder: Path, kind: str, vocabulary: Path) -> Contestant:
    """Returns `prepare` with a vocabulary that exists: hashing, reading, tokenizing, writing and checking."""

    def run() -> int:
        # The time includes removing the folder, which counts against trainer.
        with tempfile.TemporaryDirectory(dir=folder) as prepared_folder:
            prepared = prepare(config_of(text, prepared_folder, kind, vocabulary, 1), _be_silent)
            return sum(split.num_tokens for split in prepared.splits.values())

    return run


def keras_tokenizing(text: Path, vocabulary: Path) -> dict[str, Contestant]:
    """Returns KerasNLP's tokenizer mapped over lines and over batches of lines; it counts its tokens and drops them."""
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
    """Returns encode_batch_fast of the package tokenizers, which uses all cores, on lines that are in memory."""
    encoder = tokenizers.Tokenizer.from_file(str(file))
    lines = text.read_text("utf-8").removesuffix("\n").split("\n")

    def counting(size: int) -> Contestant:
        batches = [lines[start : start + size] for start in range(0, len(lines), size)]
        return lambda: sum(len(each) for batch in batches for each in encoder.encode_batch_fast(batch))

    return {f"tokenizers, {size:,} lines at once": counting(size) for size in (1000, 10_000)}


def compete(kind: str, ours: Contestant, others: dict[str, Contestant]) -> Figures:
    """Times contestants in turn, and compares trainer with the faster of the others, round by round."""
    contestants = {"trainer": ours, **others}
    num_tokens: dict[str, int] = {}
    secs: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1 + ROUNDS):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            num_tokens[name] = contestant()
            if number:  # The first round traces, and reads the text into memory.
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
        # A ratio of times, not of rates: the text is the same, and more tokens for it would not be a gain.
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
    """Trains WordPiece vocabularies of the same size in two ways, and a model with each."""
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
    """Returns how well a vocabulary fits a text, and how well a small model learns the text with it."""
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


def measure_case(case: Case) -> Figures:
    """Prepares a text in a new process; returns its time and memory, and what is wrong with the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, prepared, log = folder / "text", folder / "prepared", folder / "log"
        text.mkdir()
        expected = case.write(text)
        text_bytes = sum(path.stat().st_size for path in text.iterdir())
        # Packed, because lines mode refuses a text if it would leave out most of it.
        settings = [f"data.train={text}/*.txt", f"data.prepared_folder={prepared}", "data.mode=packed"]
        settings += ["tokenizer.kind=wordpiece", *case.settings]  # A word of `WORDS` is one token.
        if case.is_exact:
            expected = expected.plus(write_documents(folder, [" ".join(WORDS)], "validation.txt"))
            settings.append(f"data.validation={folder / 'validation.txt'}")
        config = str(ROOT / "configs" / "quickstart.toml")
        status, secs, peak_bytes = watch([sys.executable, "-m", "trainer", "prepare", config, *settings], log)
        printed = log.read_text("utf-8", "replace")
        found = count_prepared(prepared) if status == 0 else Counts(0, 0, 0)
        fault = find_fault(case, expected, found) if status == 0 else f"exit status {status}"
        if not fault and case.message not in printed:
            fault = f"{case.message!r} was not printed"
        return {
            "text": case.name,
            "text_bytes": text_bytes,
            **found._asdict(),
            "secs": secs,
            "peak_bytes": peak_bytes,
            "fault": f"{fault}\n{printed}" if fault else "",
        }


def watch(command: Sequence[str], log: Path) -> tuple[int, float, int]:
    """Runs a command; returns its exit status, its seconds, and the largest memory of all its processes together.

    Memory that processes share is counted for each of them.
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
    """Returns the counts of the one prepared data set in a folder."""
    (path,) = folder.iterdir()
    splits = load_prepared(path).splits.values()
    return Counts(*(sum(getattr(split, name) for split in splits) for name in Counts._fields))


def find_fault(case: Case, expected: Counts, found: Counts) -> str:
    """Returns the difference between the counts and what they must be, or an empty text."""
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


# Functions that the parts share.


def config_of(text: Path, prepared_folder: str, kind: str, vocabulary: Path, num_steps: int) -> Config:
    """Returns a config of a small model on a text, with a vocabulary that exists."""
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
    """Writes this many bytes of documents, one a line, or all if there are fewer: the source file's, or stories."""
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
    """Measures, prints and writes the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (everything)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that the benchmark works")
    parser.add_argument("--text", metavar="FILE", help="the text for speed and vocabulary")
    parser.add_argument("--speed-mb", type=float, default=30, help="MB of the text for speed (%(default)s)")
    parser.add_argument("--vocabulary-mb", type=float, default=13, help="MB of the text for vocabulary (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of the training with each vocabulary, 0 for none")
    parser.add_argument("--max-mb", type=float, default=100, help="MB of the largest text of scale (%(default)s)")
    parser.add_argument("--documents", type=int, default=1_000_000, help="number of tiny documents (%(default)s)")
    parser.add_argument("--long-mb", type=float, default=100, help="MB of the one long document (%(default)s)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="the file to write all figures to")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(speed_mb=0.5, vocabulary_mb=0.5, steps=3, max_mb=2, documents=3_000, long_mb=6)
    options = parser.parse_args()

    tf.get_logger().setLevel("ERROR")  # Each of the many vocabularies traces functions, and TensorFlow would warn.
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
