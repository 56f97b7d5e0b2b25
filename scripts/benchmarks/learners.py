"""The texts and the contestants of scripts/benchmarks/time_to_loss.py, and what each contestant's process is told."""

import argparse
import gzip
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from harness import Process, stream_of, tokens_per_step
from trainer.config.file import load_config
from trainer.config.schedule import learning_rate
from trainer.config.settings import Config
from trainer.data.batches import total_steps, training_batches, whole_validation
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData, num_examples

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# These compile. At least two: the first step of a call of fit is not timed.
FIRST_STEPS = 2
# The least that a turn may have. The first turn has FIRST_STEPS fewer left, and fit needs two to time one.
MIN_STEPS = FIRST_STEPS + 2

Figures = dict[str, Any]


class Text(NamedTuple):
    """A text to train on.

    Attributes:
        config: the name of its config.
        files: the settings that name a file, which is below the folder of test data.
        length: the settings for the length of a training, if it is not the config's.
        target: the loss to be reached, in nats; None: the loss at which the tutorial's code ends.
    """

    config: str
    files: dict[str, str]
    length: tuple[str, ...] = ()
    target: float | None = None


TEXTS = {
    "shakespeare_char": Text("shakespeare_char", {"data.train": "tinyshakespeare.txt"}, target=1.88),
    "books": Text(
        "minigpt",
        {"data.train": "books/simple_train.txt.gz", "data.validation": "books/simple_valid.txt"},
        ("train.num_epochs=2",),
    ),
}
# For each contestant its program, its name in tables, and whether XLA or torch.compile compiles it.
CONTESTANTS = {
    "trainer": ("trainer", "trainer", False),
    "fast": ("trainer", "trainer, fast", False),
    "keras": ("tutorial", "Keras fit", False),
    "keras-xla": ("tutorial", "Keras fit, XLA", True),
    "torch": ("torch", "PyTorch", False),
    "torch-compile": ("torch", "PyTorch, torch.compile", True),
}
# Source: nanoGPT's README (its run on tiny Shakespeare on a CPU), config/train_shakespeare_char.py and train.py. It has
# published none for the books; there the same are taken.
NANOGPT = (
    "model.pre_norm=true",
    "model.activation=gelu",
    "model.use_bias=false",
    "model.tied_embeddings=true",
    "optimizer.learning_rate=1e-3",
    "optimizer.schedule=cosine",
    "optimizer.warmup_steps=100",
    "optimizer.final_learning_rate=1e-4",
    "optimizer.beta_1=0.9",
    "optimizer.beta_2=0.99",
    "optimizer.epsilon=1e-8",
    "optimizer.weight_decay=0.1",
    "optimizer.clip_norm=1.0",
)
QUICK = (
    *("data.min_bytes=0", "model.num_layers=1", "model.hidden_dim=24", "model.intermediate_dim=24"),
    *("optimizer.warmup_steps=2", "train.global_batch_size=4", "train.sequence_length=16", "samples.num_tokens=none"),
)


def jobs(text: str, seed: int, options: argparse.Namespace, folder: Path) -> Iterator[Figures]:
    """Yields the job of every contestant, in each precision."""
    for name, precision in itertools.product(options.contestants, options.precisions):
        program, shown, is_compiled = CONTESTANTS[name]
        path = fast_config(text, options) if name == "fast" else CONFIGS / f"{TEXTS[text].config}.toml"
        if path is None:
            continue
        settings = [f"train.precision={precision}", f"train.seed={seed}"]
        config = config_of(path, text, name, settings, options, folder)
        prepared = prepare(config, lambda _: None)
        validation = folder / f"{text}-validation"
        rows = rows_of(whole_validation(prepared, config))
        if not validation.exists():
            rows.tofile(validation)
        elif not np.array_equal(np.fromfile(validation, np.int32), rows.ravel()):
            sys.exit(f"{path}: its validation text has other tokens or windows than {TEXTS[text].config}.toml's.")
        steps = total_steps(prepared, config)
        job: Figures = {
            "contestant": name,
            "name": f"{shown}, {precision}" if len(options.precisions) > 1 else shown,
            "precision": precision,
            "program": program,
            "is_compiled": is_compiled,
            "recipe": recipe_of(program, config),
            "config": config.model_dump(mode="json", exclude_none=True),
            "prepared": str(prepared.folder),
            "vocabulary_size": prepared.vocabulary_size,
            "total_steps": steps,
            "tokens_per_step": tokens_per_step(config, prepared),
            "num_scored": int((rows[:, 1:] != 0).sum()),
        }
        if program == "torch":
            rates = learning_rate(config.optimizer, np.arange(steps, dtype=np.float64), steps)
            job |= {"learning_rates": rates.tolist(), "validation": str(validation)}
            job |= torch_rows(config, prepared, folder / f"{text}-train")
        yield job


def recipe_of(program: str, config: Config) -> str:
    """Returns what differs most between the programs: optimizer, peak of the learning rate, schedule and embeddings."""
    if program == "tutorial":
        return "adam at 0.001, constant, untied embeddings"
    optimizer = config.optimizer
    embeddings = "tied" if config.model.tied_embeddings else "untied"
    return f"{optimizer.kind} at {optimizer.learning_rate:g}, {optimizer.schedule}, {embeddings} embeddings"


def config_of(
    path: Path, text: str, name: str, settings: list[str], options: argparse.Namespace, folder: Path
) -> Config:
    """Returns the config of a contestant."""
    settings = [*settings, *(NANOGPT if CONTESTANTS[name][0] == "torch" else ())]
    if options.quick:
        settings += QUICK
    if options.steps is not None:
        settings.append(f"train.total_steps={options.steps}")
    elif name != "fast":
        settings += TEXTS[text].length
    settings += [f"{setting}={file}" for setting, file in files_of(text, options, folder).items()]
    return load_config(
        path, [*settings, f"data.prepared_folder={folder / f'{text}-prepared'}", "distribution.kind=cpu"]
    )


def files_of(text: str, options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Returns the files of a text, by the settings that name them."""
    data = folder if options.quick else Path(os.environ.get("TRAINER_TEST_DATA", ""))
    return {setting: data / file for setting, file in TEXTS[text].files.items()}


def check_contests(options: argparse.Namespace, folder: Path) -> None:
    """Makes the jobs of the first seed of all texts, which finds most faults before hours of training.

    Raises:
        UserError: a config does not fit its text.
    """
    check_files(options, folder)
    for text in options.texts:
        for job in jobs(text, options.seeds[0], options, folder):
            if job["total_steps"] < MIN_STEPS * options.blocks:
                sys.exit(
                    f"{text}, {job['name']}: {job['total_steps']:,} steps are too few for {options.blocks} turns of at "
                    f"least {MIN_STEPS}; give at least --steps {MIN_STEPS * options.blocks}, or fewer --blocks."
                )


def check_files(options: argparse.Namespace, folder: Path) -> None:
    """Ends the program if a file of one of its texts is not there."""
    files = [file for text in options.texts for file in files_of(text, options, folder).values()]
    missing = ", ".join(str(file) for file in files if not file.is_file())
    if missing:
        sys.exit(
            f"There is no {missing}. TRAINER_TEST_DATA names the folder of the texts; without it they are looked for "
            "in this folder. `trainer prepare shakespeare_char --download` fetches tinyshakespeare.txt into this "
            "folder, and --texts shakespeare_char needs no other."
        )


def fast_config(text: str, options: argparse.Namespace) -> Path | None:
    """Returns the fast config of a text; None if it has none."""
    path: Path = options.fast or CONFIGS / f"{TEXTS[text].config}_fast.toml"
    return path if options.fast or path.is_file() else None


def torch_rows(config: Config, prepared: PreparedData, file: Path) -> Figures:
    """Writes what PyTorch trains on: the text, whose windows begin at any token, or its lines."""
    if config.data.mode == "packed":
        stream_of(prepared).tofile(file)
        return {"rows": str(file), "stride": 1}
    num_batches = num_examples(prepared.split("train"), config) // config.train.global_batch_size
    rows_of(training_batches(prepared, config, 0, num_batches)).tofile(file)
    return {"rows": str(file)}


def rows_of(batches: tf.data.Dataset) -> np.ndarray:
    """Returns the examples of batches, int32 [examples, sequence + 1]: the first input and the targets, which are 0 if
    they do not count.
    """
    parts = [
        np.concatenate([inputs[:, :1], np.where(weights > 0, targets, 0)], axis=1, dtype=np.int32)
        for inputs, targets, weights in batches.as_numpy_iterator()
    ]
    rows = np.concatenate(parts)
    # The last batch may be filled up with examples that do not count.
    filled: np.ndarray = rows[(rows[:, 1:] != 0).any(axis=1)]
    return filled


def write_quick_texts(folder: Path) -> None:
    """Writes small texts in place of those of the folder of test data."""
    for file in {file for text in TEXTS.values() for file in text.files.values()}:
        (folder / file).parent.mkdir(exist_ok=True)
        text = "".join(f"{i} cats sat on {i % 7} mats.\n" for i in range(300)).encode()
        (folder / file).write_bytes(gzip.compress(text) if file.endswith(".gz") else text)


# Their trainings.


class Point(NamedTuple):
    """A score of a training: what it had taken before, and its validation loss in nats."""

    steps: int
    tokens: float
    secs: float
    loss: float


class Contestant:
    """A training in another process, from its start on.

    Args:
        job: the training, as `jobs` yields it.
        folder: the folder for the process's files.

    Attributes:
        start_secs: the seconds to the end of the first steps.
        points: the scores so far.
        idle_cpu_secs: the CPU time that the process took while others started or had their turn.
    """

    def __init__(self, job: Figures, folder: Path) -> None:
        self.name, self.job = job["name"], job
        self.points: list[Point] = []
        self.idle_cpu_secs = 0.0
        self._steps, self._tokens, self._secs = 0, 0.0, 0.0
        start = time.perf_counter()
        self.process = Process(self.name, job, folder)
        self._take(FIRST_STEPS)
        self.start_secs, self._secs = time.perf_counter() - start, 0.0

    def take_turn(self, block: int, num_blocks: int) -> None:
        """Trains the steps of a block of all blocks, and is scored."""
        self._take(self.job["total_steps"] * (block + 1) // num_blocks - self._steps)
        score = self._ask("evaluate")
        assert score["num_tokens"] == self.job["num_scored"], f"{self.name} scores {score['num_tokens']} tokens"
        self.points.append(Point(self._steps, self._tokens, self._secs, score["loss"]))

    def figures(self) -> Figures:
        """Returns the figures of the training so far."""
        about = {
            key: self.job[key] for key in ("contestant", "name", "precision", "program", "recipe")
        } | self.process.about
        points = [point._asdict() for point in self.points]
        return {**about, "start_secs": self.start_secs, "points": points, "idle_cpu_secs": self.idle_cpu_secs}

    def _take(self, num_steps: int) -> None:
        if num_steps <= 0:
            return
        answer = self._ask(str(num_steps))
        self._steps += num_steps
        self._tokens += answer.get("num_targets", num_steps * self.job["tokens_per_step"])
        self._secs += num_steps * answer["step_secs"]

    def _ask(self, line: str) -> Figures:
        answer = self.process.ask(line)
        self.idle_cpu_secs += answer["idle_cpu_secs"]
        return answer


def to_target(points: Sequence[Point], target: float) -> tuple[float, float] | None:
    """Returns the tokens and the seconds after which a target was reached; None if it was not."""
    for number, point in enumerate(points):
        if point.loss <= target:
            before = points[number - 1] if number else point
            share = (before.loss - target) / (before.loss - point.loss) if number else 1.0
            tokens = before.tokens + share * (point.tokens - before.tokens)
            return tokens, before.secs + share * (point.secs - before.secs)
    return None
