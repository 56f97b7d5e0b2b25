#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures the speed of the input pipeline without a model, and the time that a training waits for its batches.

    scripts/benchmarks/input.py [--quick] [--data PATH] [--json OUT]

The batches are packed and shuffled. There are two shapes of a batch; for each, the data is in one shard or in several,
and shuffled as a whole or in windows. Each round times all pipelines of a shape in turn; a ratio divides a pipeline's
speed by the first pipeline's, in the same round. PATH is text, or a prepared folder, whose shards are read as they are;
the default is the storybook. The training is configs/quickstart.toml with its own text.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import rich.console
import tensorflow as tf
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

import trainer
from harness import about, table_of
from trainer.config.file import load_config, make_config
from trainer.config.settings import Config
from trainer.data.batches import BLOCK_BYTES, training_batches
from trainer.data.prepare import prepare
from trainer.data.shards import MANIFEST, PreparedData, load_prepared
from trainer.distributed.strategy import distributed, make_strategy
from trainer.errors import UserError
from trainer.monitoring import tags

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.toml"
ROUNDS = 5
TARGET_INPUT_SHARE = 0.01


class Shape(NamedTuple):
    """The shape of a batch, and its target.

    Attributes:
        batch_size: the number of examples.
        sequence_length: the number of tokens of an example.
        target_tokens_per_sec: the speed that the pipeline should have.
    """

    batch_size: int
    sequence_length: int
    target_tokens_per_sec: float

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.sequence_length}"


SHAPES = (Shape(64, 128, 20e6), Shape(8, 1024, 30e6))


class Pipeline:
    """Batches of a data set, read as the training loop reads them.

    Attributes:
        name: the number of shards, and the order of the examples.
        rates: the tokens per second of each round.
        num_tokens: the tokens of the last round; rounds differ only in padding.
    """

    def __init__(self, prepared: PreparedData, shape: Shape, window_mb: int | None, num_steps: int) -> None:
        num_shards = len(prepared.split("train").shards)
        order = "in full" if window_mb is None else f"in windows of {window_mb} MB"
        self.name = f"{num_shards} shard{'s' if num_shards > 1 else ''}, {order}"
        self.rates: list[float] = []
        self.num_tokens = 0
        self._num_steps = num_steps
        config = config_of({"mode": "packed", "shuffle_window_mb": window_mb}, shape)
        strategy = make_strategy(config.distribution)
        total_steps = 2 * num_steps * (1 + ROUNDS)
        self._batches = iter(
            distributed(strategy, lambda share: training_batches(prepared, config, 0, total_steps, share).repeat())
        )
        read = tf.function(read_batches, autograph=False)
        self._read = read.get_concrete_function(self._batches, tf.constant(0, tf.int64))

    def take(self) -> float:
        """Reads some batches; returns the tokens per second, without padding."""
        # The batches that were made ahead, during the turns of the other pipelines, are not timed.
        self._read(self._batches, tf.constant(-(-self._num_steps // 8), tf.int64))
        start = time.perf_counter()
        self.num_tokens = int(self._read(self._batches, tf.constant(self._num_steps, tf.int64)))
        return self.num_tokens / (time.perf_counter() - start)


def read_batches(batches: tf.data.Iterator, num_steps: tf.Tensor) -> tf.Tensor:
    """Reads batches as `TrainingStep` does, and returns the number of their targets."""

    def read(i: tf.Tensor, num_targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        _, _, weights = next(batches)
        return i + 1, num_targets + tf.cast(tf.reduce_sum(weights), tf.int64)

    none = tf.zeros([], tf.int64)
    _, num_targets = tf.while_loop(lambda i, _: i < num_steps, read, (none, none), parallel_iterations=1)
    return num_targets


def config_of(data: dict[str, Any], shape: Shape) -> Config:
    """Returns a config for the CPU only: without a model, no other device is needed."""
    train = {"global_batch_size": shape.batch_size, "sequence_length": shape.sequence_length}
    return make_config(
        {
            "run_folder": "none",
            "data": {key: value for key, value in data.items() if value is not None},
            # Bytes need no training of a vocabulary, and make many tokens of a short text.
            "tokenizer": {"kind": "byte"},
            "train": {"precision": "float32", "total_steps": 1, **train},
            "distribution": {"kind": "cpu"},
        }
    )


def find_data(options: argparse.Namespace, folder: Path) -> list[PreparedData]:
    """Returns the data to read: a prepared folder as it is, or a text, prepared into one shard and into several."""
    if options.data is not None and (Path(options.data) / MANIFEST).is_file():
        return [load_prepared(options.data, check_hashes=False)]
    source = {"storybook_stories": options.stories} if options.data is None else {"train": options.data}

    def prepare_in(name: str, shard_tokens: int) -> PreparedData:
        config = config_of({**source, "prepared_folder": str(folder / name)}, SHAPES[0])
        return prepare(config, lambda _: None, shard_tokens)

    whole = prepare_in("whole", sys.maxsize)
    num_tokens = whole.split("train").shards[0].stream_length()
    return [whole, prepare_in("in-parts", -(-num_tokens // options.shards))]


def check_window(prepared: PreparedData, window_mb: int) -> None:
    """Ends the program if a window holds all of the data: shuffling in windows would be shuffling as a whole."""
    split = prepared.split("train")
    num_bytes = sum((prepared.folder / shard.tokens_file).stat().st_size for shard in split.shards)
    if num_bytes <= max(1, window_mb * 10**6 // BLOCK_BYTES) * BLOCK_BYTES:
        sys.exit(
            f"--window-mb {window_mb} holds all of the data, {num_bytes / 1e6:.1f} MB of tokens; give more text (with "
            f"--stories or --data), or a smaller window (at least {BLOCK_BYTES / 1e6:.0f} MB)."
        )


def measure_pipelines(data: list[PreparedData], shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times all pipelines of a shape, and returns a row of figures for each."""
    num_steps = max(1, options.block_tokens // (shape.batch_size * shape.sequence_length))
    orders = [(prepared, window_mb) for prepared in data for window_mb in (None, options.window_mb)]
    pipelines = [Pipeline(prepared, shape, window_mb, num_steps) for prepared, window_mb in orders]
    for pipeline in pipelines:
        pipeline.take()  # This reads the shards into memory.
    for _ in range(ROUNDS):
        for pipeline in pipelines:
            pipeline.rates.append(pipeline.take())
    return [_row(pipeline, pipelines[0], shape) for pipeline in pipelines]


def _row(pipeline: Pipeline, first: Pipeline, shape: Shape) -> dict[str, Any]:
    return {
        "batch": str(shape),
        "pipeline": pipeline.name,
        "num_tokens": pipeline.num_tokens,
        "tokens_per_sec": statistics.median(pipeline.rates),
        "each_tokens_per_sec": pipeline.rates,
        "target_tokens_per_sec": shape.target_tokens_per_sec,
        "ratio": statistics.median(a / b for a, b in zip(pipeline.rates, first.rates, strict=True)),
    }


def measure_waiting(num_steps: int, num_stories: int | None, folder: Path) -> dict[str, Any]:
    """Trains the quickstart's first steps, and returns the share of its time that each part waited for input."""
    log_every_steps = max(1, num_steps // (1 + ROUNDS))
    num_steps = log_every_steps * (1 + ROUNDS)
    overrides = [
        "train.num_epochs=none",
        f"train.total_steps={num_steps}",
        f"optimizer.warmup_steps={min(50, num_steps // 2)}",
        f"log.every_steps={log_every_steps}",
        f"run_folder={folder / 'run'}",
        f"data.prepared_folder={folder / 'prepared'}",
        "evaluation.every_steps=none",
        "samples.every_steps=none",
        "samples.num_tokens=1",
    ]
    if num_stories is not None:
        overrides.append(f"data.storybook_stories={num_stories}")
    trainer.train(load_config(QUICKSTART, overrides))
    curves = EventAccumulator(str(folder / "run" / "logs" / "train"))
    curves.Reload()
    shares = [float(tf.make_ndarray(point.tensor_proto)) for point in curves.Tensors(tags.INPUT_SHARE)]
    assert len(shares) == 1 + ROUNDS
    # The first part includes the start of the pipeline.
    return {
        "num_steps": num_steps,
        "input_share": statistics.median(shares[1:]),
        "each_input_share": shares[1:],
        "target_input_share": TARGET_INPUT_SHARE,
    }


def print_pipelines(console: rich.console.Console, rows: list[dict[str, Any]]) -> None:
    """Prints the figures of a shape, with their targets."""
    cells = []
    for row in rows:
        rates = (f"{row[key] / 1e6:.1f}" for key in ("tokens_per_sec", "target_tokens_per_sec"))
        cells.append([row["batch"], row["pipeline"], *rates, f"{row['ratio']:.2f}"])
    names = ["batch", "pipeline", "measured", "target", "ratio"]
    console.print(table_of(f"million tokens/s, medians of {ROUNDS} rounds", names, cells, num_names=2))


def print_waiting(console: rich.console.Console, waiting: dict[str, Any]) -> None:
    """Prints the figures of the training, with their target."""
    each = ", ".join(f"{share:.2%}" for share in waiting["each_input_share"])
    console.print(
        f"waiting for input: {waiting['input_share']:.2%} of the quickstart's first {waiting['num_steps']} steps "
        f"(target: under {waiting['target_input_share']:.0%}), median of {each}",
        highlight=False,
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that the benchmark works")
    parser.add_argument("--data", metavar="PATH", help="a text or a prepared folder in place of the storybook")
    parser.add_argument("--stories", type=int, default=100_000, help="stories of the storybook (%(default)s)")
    parser.add_argument("--shards", type=int, default=16, help="number of the several shards (%(default)s)")
    parser.add_argument("--window-mb", type=int, default=16, help="data.shuffle_window_mb (%(default)s)")
    parser.add_argument("--block-tokens", type=int, default=1 << 22, help="tokens of a timed block (%(default)s)")
    parser.add_argument("--steps", type=int, default=180, help="steps of the training (%(default)s)")
    parser.add_argument("--training-stories", type=int, help="stories in place of the quickstart's number")
    parser.add_argument("--json", metavar="OUT", type=Path, help="the file to write all figures to")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(stories=13_000, window_mb=8, block_tokens=1 << 17, steps=12, training_stories=300)
    options = parser.parse_args()
    console = rich.console.Console()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            data = find_data(options, Path(folder))
            check_window(data[0], options.window_mb)
            for shape in SHAPES:
                of_shape = measure_pipelines(data, shape, options)
                print_pipelines(console, of_shape)
                rows += of_shape
            waiting = measure_waiting(options.steps, options.training_stories, Path(folder))
        except UserError as error:
            sys.exit(str(error))
    print_waiting(console, waiting)
    if options.json is not None:
        options.json.write_text(json.dumps({**about(), "pipelines": rows, "training": waiting}, indent=2) + "\n")


if __name__ == "__main__":
    main()
