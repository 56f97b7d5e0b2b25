"""The parts that benchmarks share: a training to time, here or in another process, the tutorial's model, and tables."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import keras
import keras_nlp
import numpy as np
import rich.box
import rich.console
import rich.table
import tensorflow as tf

from trainer.config.settings import Config
from trainer.data.batches import training_batches
from trainer.data.shards import PreparedData
from trainer.distributed.strategy import distributed, make_strategy, share_cores
from trainer.distributed.workers import Workers
from trainer.model.build import BuildModel, make_model
from trainer.system.machine import num_cores
from trainer.training.step import TrainingStep

ROOT = Path(__file__).resolve().parents[2]
TORCH = ROOT / ".venv-torch"


class Training:
    """A model, its step and its batches as in a run, without the files that a run writes.

    Args:
        config: the training's configuration.
        prepared: the data.
        total_steps: the length of the training; the batches do not end there.
        build_model: a function as `trainer.train` takes it; None means the GPT that config describes.

    Attributes:
        loss: the mean loss of the steps of the last call of `take`, in nats.
        num_targets: the number of targets of these steps.
    """

    name = "trainer"

    def __init__(
        self, config: Config, prepared: PreparedData, total_steps: int, build_model: BuildModel | None = None
    ) -> None:
        share_cores(config, Workers())
        self.strategy = make_strategy(config.distribution)
        with self.strategy.scope():
            self.model = make_model(build_model, config, prepared.vocabulary_size, prepared.bos_id)
        self.step = TrainingStep(config, total_steps, self.model, self.strategy)
        self.batches = iter(
            distributed(self.strategy, lambda share: training_batches(prepared, config, 0, total_steps, share).repeat())
        )
        self.loss, self.num_targets = float("nan"), 0
        self._steps_per_call = config.train.steps_per_call

    def take(self, num_steps: int) -> float:
        """Trains some steps, train.steps_per_call of them in each call; returns the seconds of one step.

        Raises:
            FloatingPointError: a step was skipped because its loss or a gradient was not finite.
        """
        loss_sum = num_targets = 0.0
        start = time.perf_counter()
        for first in range(0, num_steps, self._steps_per_call):
            num_in_call = min(self._steps_per_call, num_steps - first)
            metrics = self.step.run_steps(self.batches, tf.constant(num_in_call, tf.int64))
            loss_sum += float(metrics.loss_sum)
            num_targets += float(metrics.num_targets)
            if int(metrics.num_skipped):
                raise FloatingPointError("A loss or a gradient was not finite; lower optimizer.learning_rate.")
        self.loss, self.num_targets = loss_sum / num_targets, round(num_targets)
        return (time.perf_counter() - start) / num_steps


class Process:
    """A program that trains in another process. It prints a line of JSON when it is ready; then it waits for a line of
    standard input, and prints another one as its answer.

    Args:
        name: what it is called if it ends early.
        job: the training, as contestant.py and torch_gpt.py read it; program "torch" is the latter.
        folder: the folder for the process's files.
        checkout: the folder whose trainer and benchmarks it runs.

    Attributes:
        about: what it printed when it was ready.
    """

    def __init__(self, name: str, job: dict[str, Any], folder: Path, checkout: Path = ROOT) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        (folder / f"{name}.json").write_text(json.dumps(job))
        python, program = Path(sys.executable), "contestant.py"
        if job["program"] == "torch":
            python, program = TORCH / "bin" / "python", "torch_gpt.py"
        # The process is killed at the end, and cannot remove its temporary files.
        environment = os.environ | {"PYTHONPATH": str(checkout), "TMPDIR": str(folder)}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(TORCH / "compiled")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), str(checkout / "scripts" / "benchmarks" / program), str(folder / f"{name}.json")],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.about = self._read()

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line and returns the answer. A program that learns nothing, or has ended, ends the benchmark."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _read prints why the process ended.
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        answer = self._read()
        if not math.isfinite(answer["loss"]):
            self.end()
            sys.exit(f"{self.name}: the loss is {answer['loss']}. It learns nothing, so its speed does not count.")
        return answer

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.end()
            sys.exit(f"{self.name} ended:\n{self._log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def tutorial_model(config: Config, vocabulary_size: int) -> keras.Model:
    """Builds a model of the config's sizes from KerasNLP's layers, as the tutorial does. Its logits are float32 in any
    dtype policy, as Keras's guide to mixed precision asks for the outputs of a model.
    """
    shape, length = config.model, config.train.sequence_length
    inputs = keras.layers.Input(shape=(None,), dtype="int32")
    x = keras_nlp.layers.TokenAndPositionEmbedding(vocabulary_size, length, shape.hidden_dim, mask_zero=True)(inputs)
    for _ in range(shape.num_layers):
        x = keras_nlp.layers.TransformerDecoder(shape.intermediate_dim, shape.num_heads)(x)
    return keras.Model(inputs, keras.layers.Dense(vocabulary_size, dtype="float32")(x))


def tokens_per_step(config: Config, prepared: PreparedData) -> float:
    """Returns the mean number of targets in a batch that are not padding; packed windows count as full."""
    if config.data.mode == "packed":
        return config.train.global_batch_size * config.train.sequence_length
    shards = prepared.split("train").shards
    offsets = [np.fromfile(prepared.folder / shard.offsets_file, np.int64) for shard in shards]
    lengths = np.concatenate([np.diff(shard_offsets) - 1 for shard_offsets in offsets]) + config.data.predict_end
    return float(np.minimum(lengths, config.train.sequence_length).mean() * config.train.global_batch_size)


def stream_of(prepared: PreparedData) -> np.ndarray:
    """Returns the tokens of a training text of one shard, each [BOS] included, int32 [tokens]."""
    (shard,) = prepared.split("train").shards
    tokens: np.ndarray = np.fromfile(prepared.folder / shard.tokens_file, prepared.dtype).astype(np.int32)
    return tokens


def about() -> dict[str, Any]:
    """Returns the facts that belong to figures: command, date, number of usable cores and TensorFlow's version."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": sys.argv, "date": date, "num_cores": num_cores(), "tensorflow": tf.__version__}


def table_of(title: str, names: Sequence[str], rows: Iterable[Sequence[str]], num_names: int) -> rich.table.Table:
    """Returns a table of rows; its first num_names columns are names, and the others numbers."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=title)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < num_names else "right")
    for row in rows:
        table.add_row(*row)
    return table


def install_torch(console: rich.console.Console, without: str, *others: str) -> None:
    """Makes the environment for PyTorch and other packages, or adds what it lacks of them.

    Args:
        console: prints that it takes a while.
        without: the options with which the benchmark needs none of this.
        others: names of other packages.
    """
    stamp = TORCH / "trainer.installed"
    installed = {"torch", *stamp.read_text().split()} if stamp.is_file() else set()
    missing = [package for package in ("torch", *others) if package not in installed]
    if not missing:
        return
    if TORCH.exists() and not (TORCH / "pyvenv.cfg").is_file():
        sys.exit(f"{TORCH} is in the way: it is not a virtual environment. Move it elsewhere, then run this again.")
    console.print(f"Installing {' and '.join(missing)} into .venv-torch; the first time this takes some minutes.")
    if not installed:
        shutil.rmtree(TORCH, ignore_errors=True)
        venv.create(TORCH, with_pip=True)
    pip = [str(TORCH / "bin" / "python"), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    # uv finds the builds for the CPU only. On Linux the build that pip finds includes CUDA, and works too.
    uv = [str(TORCH / "bin" / "uv"), "pip", "install", "--python", str(TORCH), "--torch-backend", "cpu", *missing]
    tail = ""
    for commands in ([[*pip, "uv"], uv], [[*pip, *missing]]):
        for command in commands:
            process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            tail = (process.stdout + process.stderr)[-3000:]
            if process.returncode:
                break
        else:
            stamp.write_text("\n".join(sorted({*installed, *missing})) + "\n")
            return
    sys.exit(f"{tail}\nPyTorch cannot be installed; the lines above have the reason. Without it: {without}")
