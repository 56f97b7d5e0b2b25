#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures the speed of a training step on the CPU, in turn with others at the same sizes and with the same update.

    scripts/benchmarks/step.py [--sizes tutorial 4x512] [--peers fit gpt2 torch] [--quick] [--json OUT]

trainer has its own loop and input pipeline, in calls of train.steps_per_call steps. fit: the KerasNLP tutorial's model
under Keras fit, with XLA and without. gpt2: KerasNLP's GPT2Backbone with tied logits, in trainer's loop. torch: a GPT
of the shape that trainer's has, in torch_gpt.py beside this file, eager and through torch.compile; the newest PyTorch
is installed for it into .venv-torch, once. All in float32, and in bfloat16 with float32 weights; all with AdamW, weight
decay and clipping. The tutorial's model is post-norm with ReLU and an output layer of its own at all sizes,
GPT2Backbone pre-norm with GELU and tied; trainer's is as the former at size tutorial, and as the latter at 4x512.

All train on the same random tokens, in processes of their own that wait while another has its turn, on the cores that
this program may use; taskset narrows these. They are in memory at the same time: fewer with --peers and --precisions. A
ratio is of trainer's speed, at its better precision, to another's, round by round; below the table either precision is
compared with the best of each other. trainer's steps in its loop are also compared with calls of the compiled step
alone, on a batch that is there.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Of this process and those it starts, PyTorch's too.

import keras
import keras_nlp
import numpy as np
import rich.console
import rich.live
import rich.table
import tensorflow as tf

from harness import Training, about, table_of, tutorial_model
from trainer.config import Config
from trainer.config_file import load_config, make_config
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData, load_prepared
from trainer.data.vocabulary import SPECIAL_TOKENS
from trainer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TORCH = ROOT / ".venv-torch"
ROUNDS = 5
WARMUP_STEPS = 2
VOCABULARY_SIZE = 5000
# Of the step in the loop over the step alone; either will do.
TARGET_OVERHEAD = 0.02
TARGET_OVERHEAD_SECS = 0.005

SIZES = {
    "tutorial": (),
    "4x512": (
        "model.num_layers=4",
        "model.num_heads=8",
        "model.hidden_dim=512",
        "model.intermediate_dim=2048",
        "model.pre_norm=true",
        "model.activation=gelu",
        "model.tied_embeddings=true",
        "train.global_batch_size=8",
        "train.sequence_length=512",
    ),
}
QUICK = ("model.hidden_dim=48", "model.intermediate_dim=64", "train.global_batch_size=4", "train.sequence_length=32")
PRECISIONS = ("float32", "mixed_bfloat16")
# Of each program what it is called, and whether it is compiled.
VARIANTS = {
    "trainer": {"trainer": False},
    "fit": {"Keras fit": False, "Keras fit, XLA": True},
    "gpt2": {"GPT2Backbone in trainer": False},
    "torch": {"PyTorch": False, "PyTorch, torch.compile": True},
}

Figures = dict[str, Any]
# Takes a number of steps, and returns the seconds of one, and their mean loss in nats.
Take = Callable[[int], tuple[float, float]]


# A contestant, in a process of its own.


def answer(job: Figures) -> None:
    """Reads numbers of steps from standard input, takes them, and answers each with a line of JSON."""
    config = make_config(job["config"])
    keras.utils.set_random_seed(config.train.seed)
    keras.config.set_dtype_policy(config.train.precision)
    takes: dict[str, Take] = {}
    if job["program"] == "fit":
        model, takes["steps"] = fitting(config, job["rows"], job["vocabulary_size"], job["is_compiled"])
    else:
        prepared = load_prepared(job["prepared"], check_hashes=False)
        build_model = gpt2_model if job["program"] == "gpt2" else None
        # A constant learning rate knows no end.
        training = Training(config, prepared, sys.maxsize, build_model)
        model, takes["alone"] = training.model, alone(training)
        takes["steps"] = lambda num_steps: (training.take(num_steps), training.loss)
    print(json.dumps({"num_parameters": model.count_params(), "version": f"Keras {keras.__version__}"}), flush=True)
    answered = time.process_time()
    for line in sys.stdin:
        idle_cpu_secs = time.process_time() - answered
        num_steps, _, which = line.strip().partition(" ")
        secs, loss = takes[which or "steps"](int(num_steps))
        print(json.dumps({"step_secs": secs, "loss": loss, "idle_cpu_secs": idle_cpu_secs}), flush=True)
        answered = time.process_time()


def alone(training: Training) -> Take:
    """Returns the compiled step without loop and pipeline, on one batch. It leaves the training as it was: the loss of
    that is compared with others' too.
    """
    batch, step = next(training.batches), training.step
    stop = tf.constant(False)
    take_step = tf.function(lambda: training.strategy.run(step.take_on_replica, (batch, stop)), autograph=False)

    variables = [*step.named_variables.values(), *step.state().values(), step.step]

    def take(num_steps: int) -> tuple[float, float]:
        # Copies: on a CPU numpy() can be the memory that the next step writes to.
        before = [np.array(variable.numpy()) for variable in variables]
        start = time.perf_counter()
        for _ in range(num_steps):
            _, _, loss_sum, num_targets, *_ = take_step()
        secs = (time.perf_counter() - start) / num_steps
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        return secs, float(loss_sum / num_targets)

    return take


def fitting(config: Config, rows_file: str, vocabulary_size: int, is_compiled: bool) -> tuple[keras.Model, Take]:
    """Returns the tutorial's model and its training with fit, as fast as that is: its metric is left out."""
    train, optimizer = config.train, config.optimizer
    model = tutorial_model(config, vocabulary_size)
    adamw = keras.optimizers.AdamW(
        optimizer.learning_rate,
        optimizer.weight_decay,
        optimizer.beta_1,
        optimizer.beta_2,
        optimizer.epsilon,
        global_clipnorm=optimizer.clip_norm,
    )
    adamw.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(adamw, loss, jit_compile=is_compiled)
    rows = np.fromfile(rows_file, np.int32).reshape(-1, train.sequence_length + 1)
    data = tf.data.Dataset.from_tensor_slices((rows[:, :-1], rows[:, 1:])).repeat().shuffle(1024, seed=train.seed)
    data = data.batch(train.global_batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)

    def take(num_steps: int) -> tuple[float, float]:
        ends: list[float] = []
        clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
        # One more, which is not timed: fit begins by filling its shuffle buffer.
        history = model.fit(data, verbose=0, shuffle=False, steps_per_epoch=num_steps + 1, callbacks=[clock])
        return (ends[-1] - ends[0]) / num_steps, history.history["loss"][0]

    return model, take


def gpt2_model(config: Config, vocabulary_size: int) -> keras.Model:
    """Builds KerasNLP's GPT-2 with logits, in the policy that is set."""
    shape = config.model
    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size,
        shape.num_layers,
        shape.num_heads,
        shape.hidden_dim,
        shape.intermediate_dim,
        dropout=0.0,
        max_sequence_length=config.train.sequence_length,
    )
    tokens = keras.Input((None,), dtype="int32")
    hidden = backbone({"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)})
    return keras.Model(tokens, backbone.token_embedding(hidden, reverse=True))


# The process that asks them.


class Contestant:
    """A training in another process, and how fast it was.

    Args:
        name: for people to read.
        job: what it is to do.
        folder: for its files.

    Attributes:
        num_steps: of a block.
        each_step_secs: of every round.
        each_alone_secs: of every round, for trainer's own.
        idle_cpu_secs: CPU time that it took while others had their turn.
    """

    def __init__(self, name: str, job: Figures, folder: Path) -> None:
        self.name, self.precision = name, job["config"]["train"]["precision"]
        self.num_tokens = job["config"]["train"]["global_batch_size"] * job["config"]["train"]["sequence_length"]
        self.num_steps = WARMUP_STEPS
        self.each_step_secs: list[float] = []
        self.each_alone_secs: list[float] = []
        self.loss, self.idle_cpu_secs = float("nan"), 0.0
        stem = f"{name}, {self.precision}"
        self._log = folder / f"{stem}.log"
        (folder / f"{stem}.json").write_text(json.dumps(job))
        program = [sys.executable, __file__, "--job"]
        if job["program"] == "torch":
            program = [str(TORCH / "bin" / "python"), str(Path(__file__).with_name("torch_gpt.py"))]
        # It is killed in the end, and cannot clear up.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(TORCH / "compiled")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*program, str(folder / f"{stem}.json")],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.about = self._read()

    def warm_up(self, block_secs: float) -> None:
        """Takes the first steps, which compile, and settles how many make a block of so many seconds."""
        for what in ("steps", "alone") if self.is_ours() else ("steps",):
            self._ask(WARMUP_STEPS, what)
        secs, _ = self._ask(WARMUP_STEPS, "steps")
        self.num_steps = max(WARMUP_STEPS, round(block_secs / secs))

    def take(self) -> None:
        """Takes its turn."""
        secs, self.loss = self._ask(self.num_steps, "steps")
        self.each_step_secs.append(secs)
        if self.is_ours():
            self.each_alone_secs.append(self._ask(self.num_steps, "alone")[0])

    def is_ours(self) -> bool:
        """Whether it is all of trainer."""
        return self.name in VARIANTS["trainer"]

    def figures(self) -> Figures:
        """Returns what is known of it."""
        secs = statistics.median(self.each_step_secs)
        figures = {
            "name": self.name,
            "precision": self.precision,
            **self.about,
            "num_steps": self.num_steps,
            "step_secs": secs,
            "tokens_per_sec": self.num_tokens / secs,
            "each_step_secs": list(self.each_step_secs),
            "loss": self.loss,
            "idle_cpu_secs": self.idle_cpu_secs,
        }
        return figures | ({"each_alone_secs": list(self.each_alone_secs)} if self.is_ours() else {})

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, num_steps: int, what: str) -> tuple[float, float]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _read says why.
            self._process.stdin.write(f"{num_steps}{'' if what == 'steps' else f' {what}'}\n")
            self._process.stdin.flush()
        answer = self._read()
        if not math.isfinite(answer["loss"]):
            self.end()
            sys.exit(
                f"{self.name}, {self.precision}: the loss is {answer['loss']}, so it learns nothing: no speed counts."
            )
        self.idle_cpu_secs += answer["idle_cpu_secs"]
        return answer["step_secs"], answer["loss"]

    def _read(self) -> Figures:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.end()
            sys.exit(f"{self.name}, {self.precision} ended:\n{self._log.read_text()[-3000:]}")
        found: Figures = json.loads(line)
        return found


def measure(size: str, options: argparse.Namespace, console: rich.console.Console) -> Figures:
    """Lets all contestants train a model of one size in turn; prints as it goes."""
    with contextlib.ExitStack() as stack:
        contestants: list[Contestant] = []
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, job in jobs(size, options, folder):
            start = time.perf_counter()
            contestants.append(Contestant(name, job, folder))
            stack.callback(contestants[-1].end)
            contestants[-1].warm_up(options.block_secs)
            count, secs = contestants[-1].about["num_parameters"], time.perf_counter() - start
            precision = contestants[-1].precision
            console.print(
                f"{size}: {name}, {precision}: {count:,} parameters, started in {secs:.0f} s", highlight=False
            )
        for contestant in contestants:
            contestant.idle_cpu_secs = 0.0  # Of starting, which the others' start was no part of.
        start = time.perf_counter()
        with rich.live.Live(console=console, auto_refresh=False, transient=True) as live:
            for number in range(ROUNDS):
                for contestant in contestants:
                    contestant.take()
                    so_far = compare([each.figures() for each in contestants if each.each_step_secs])
                    live.update(speed_table(size, number + 1, so_far), refresh=True)
        idle = sum(contestant.idle_cpu_secs for contestant in contestants) / (time.perf_counter() - start)
        rows = compare([contestant.figures() for contestant in contestants])
        return {"size": size, "num_tokens": contestants[0].num_tokens, "contestants": rows, "idle_cores": idle}


def jobs(size: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Figures]]:
    """Yields the name of every contestant, and what it is to do."""
    config, prepared = make_data(size, options.quick, folder)
    rows_of(prepared, config.train.sequence_length).tofile(folder / "rows")
    for program in ("trainer", *options.peers):
        for name, is_compiled in VARIANTS[program].items():
            for precision in options.precisions:
                train = config.train.model_copy(update={"precision": precision})
                yield (
                    name,
                    {
                        "program": program,
                        "is_compiled": is_compiled,
                        "config": config.model_copy(update={"train": train}).model_dump(mode="json", exclude_none=True),
                        "prepared": str(prepared.folder),
                        "rows": str(folder / "rows"),
                        "vocabulary_size": prepared.vocabulary_size,
                    },
                )


def make_data(size: str, is_quick: bool, folder: Path) -> tuple[Config, PreparedData]:
    """Prepares random tokens, some commoner than others, so that there is something to learn."""
    vocabulary = folder / "vocab.txt"
    words = ["".join(chr(ord("a") + i // 26**k % 26) for k in range(3)) for i in range(VOCABULARY_SIZE)]
    words = words[: VOCABULARY_SIZE - len(SPECIAL_TOKENS)]
    vocabulary.write_text("".join(f"{token}\n" for token in (*SPECIAL_TOKENS, *words)), "utf-8")
    shares = 1 / np.arange(10, 10 + len(words))
    drawn = np.random.default_rng(0).choice(words, 2 ** (15 if is_quick else 20), p=shares / shares.sum())
    (folder / "text.txt").write_text("".join(f"{' '.join(line)}\n" for line in drawn.reshape(-1, 64)), "utf-8")
    overrides = [
        f"data.train={folder / 'text.txt'}",
        "data.validation=none",
        "data.min_bytes=0",
        "data.mode=packed",
        "data.predict_end=none",
        f"data.prepared_folder={folder / 'prepared'}",
        "tokenizer.vocabulary_size=none",
        f"tokenizer.path={vocabulary}",
        "train.num_epochs=none",
        "train.total_steps=1",
        "optimizer.weight_decay=0.1",
        "optimizer.clip_norm=1.0",
        "samples.num_tokens=none",
        "distribution.kind=cpu",
    ]
    config = load_config(ROOT / "configs" / "minigpt.toml", [*overrides, *SIZES[size], *(QUICK if is_quick else ())])
    prepared = prepare(config, lambda _: None)
    assert prepared.vocabulary_size == VOCABULARY_SIZE
    return config, prepared


def rows_of(prepared: PreparedData, sequence_length: int) -> np.ndarray:
    """Returns all examples that trainer makes of packed data but for the last, which may be padded.

    Returns:
        int32 [examples, sequence_length + 1], each the inputs and the last target.
    """
    (shard,) = prepared.split("train").shards
    tokens = np.fromfile(prepared.folder / shard.tokens_file, prepared.dtype).astype(np.int32)
    rows: np.ndarray = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]
    return rows


def compare(rows: Sequence[Figures]) -> list[Figures]:
    """Adds to contestants' figures the ratio of trainer's speed, at its better precision, to theirs; and to trainer's
    own the overhead, which is what a step takes in the loop beyond what it takes alone.
    """
    compared: list[Figures] = []
    best = min((row for row in rows if "each_alone_secs" in row), key=lambda row: row["step_secs"])
    for row in rows:
        each = times_as_fast(best, row)
        new = {"compared_with": best["precision"], "each_ratio": each, "ratio": statistics.median(each)}
        if "each_alone_secs" in row:
            pairs = list(zip(row["each_step_secs"], row["each_alone_secs"], strict=True))
            new["overhead_secs"] = statistics.median(loop - alone for loop, alone in pairs)
            new["overhead"] = statistics.median(loop / alone - 1 for loop, alone in pairs)
        compared.append(row | new)
    return compared


def times_as_fast(ours: Figures, theirs: Figures) -> list[float]:
    """Returns how many times as fast ours is, round by round, in the rounds that both have been in."""
    pairs = zip(ours["each_step_secs"], theirs["each_step_secs"], strict=False)
    return [their_secs / our_secs for our_secs, their_secs in pairs]


def speed_table(size: str, num_rounds: int, rows: Sequence[Figures]) -> rich.table.Table:
    """Shows what `compare` returns."""
    cells = [
        [
            row["name"],
            row["precision"],
            f"{row['step_secs'] * 1e3:,.0f}",
            f"{row['tokens_per_sec']:,.0f}",
            f"{row['loss']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    names = ["trained by", "precision", "ms/step", "tokens/s", "loss", "ratio"]
    return table_of(f"{size}, medians of {num_rounds} rounds", names, cells, num_names=2)


def print_figures(console: rich.console.Console, figures: Figures) -> None:
    """Prints what `measure` returns: all, and trainer beside the best of each program and beside its own step alone."""
    console.print(speed_table(figures["size"], ROUNDS, figures["contestants"]))
    rows_of = {
        program: [row for row in figures["contestants"] if row["name"] in names] for program, names in VARIANTS.items()
    }
    target = f"target: at most {TARGET_OVERHEAD:.0%} or {TARGET_OVERHEAD_SECS * 1e3:.0f} ms"
    trainers = rows_of.pop("trainer")
    for row in trainers:
        console.print(
            f"{row['precision']}: the loop and its input take {row['overhead']:.1%}, "
            f"{row['overhead_secs'] * 1e3:.1f} ms, more than the step alone ({target})",
            highlight=False,
        )
    for ours, rows in itertools.product(trainers, filter(None, rows_of.values())):
        best = min(rows, key=lambda row: row["step_secs"])
        each = times_as_fast(ours, best)
        console.print(
            f"trainer in {ours['precision']} is {statistics.median(each):.2f} times as fast as {best['name']} in "
            f"{best['precision']}, median of {', '.join(f'{ratio:.2f}' for ratio in each)}",
            highlight=False,
        )
    console.print(f"waiting contestants took {figures['idle_cores']:.1%} of a core", highlight=False)


def install_torch(console: rich.console.Console) -> None:
    """Makes the environment that PyTorch is in, unless it is there."""
    stamp = TORCH / "trainer.installed"
    if stamp.is_file():
        return
    if TORCH.exists() and not (TORCH / "pyvenv.cfg").is_file():
        sys.exit(f"{TORCH} is in the way: it is not a virtual environment. Move it elsewhere, then run this again.")
    console.print("Installing PyTorch into .venv-torch; the first time this takes some minutes.")
    shutil.rmtree(TORCH, ignore_errors=True)
    venv.create(TORCH, with_pip=True)
    pip = [str(TORCH / "bin" / "python"), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    # uv knows where builds for the CPU alone are. What pip finds by itself brings CUDA along on Linux, and works too.
    uv = [str(TORCH / "bin" / "uv"), "pip", "install", "--python", str(TORCH), "--torch-backend", "cpu", "torch"]
    tail = ""
    for commands in ([[*pip, "uv"], uv], [[*pip, "torch"]]):
        for command in commands:
            process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            tail = (process.stdout + process.stderr)[-3000:]
            if process.returncode:
                break
        else:
            stamp.touch()
            return
    sys.exit(f"{tail}\nPyTorch cannot be installed; the lines above say why. Without it: --peers fit gpt2")


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the model (all)")
    peers = [program for program in VARIANTS if program != "trainer"]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, help="whom to compare with (all)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of all (both)")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--block-secs", type=float, default=8, help="of each turn (%(default)s)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file to write all figures to")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(block_secs=0)
    options = parser.parse_args()
    if options.job is not None:
        answer(json.loads(options.job.read_text()))
        return
    console = rich.console.Console()
    if "torch" in options.peers:
        install_torch(console)
    report = {**about(), "sizes": []}
    try:
        for size in options.sizes:
            report["sizes"].append(measure(size, options, console))
            print_figures(console, report["sizes"][-1])
    except UserError as error:
        sys.exit(str(error))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
