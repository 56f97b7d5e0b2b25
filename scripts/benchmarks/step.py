#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures the speed of a training step on the CPU, beside other programs with the same sizes and the same update.

    scripts/benchmarks/step.py [--sizes tutorial 4x512] [--peers fit gpt2 torch] [--quick] [--json OUT]
    scripts/benchmarks/step.py --peers --precisions float32 --against ../before

These are the contestants; --peers chooses among all but the first, and --against adds another:
- trainer, with its own loop and input pipeline, in calls of train.steps_per_call steps;
- fit: the model of the KerasNLP tutorial under Keras fit, with XLA and without;
- gpt2: KerasNLP's GPT2Backbone with tied logits, in trainer's loop;
- torch: the same GPT in PyTorch (torch_gpt.py beside this file), eager and through torch.compile; the newest PyTorch is
  installed into .venv-torch, once;
- the trainer of another checkout, whose folder --against names, with the packages of this one.

Each trains in float32, and again in bfloat16 with float32 weights; all use AdamW, weight decay and clipping. The
tutorial's model is post-norm with ReLU and has an output layer, at all sizes. GPT2Backbone is pre-norm with GELU and
tied. trainer's model is like the tutorial's at size tutorial, and like GPT2Backbone at 4x512.

All contestants train on the same random tokens, each in its own process, on the cores that this program may use
(taskset narrows these). They take turns, and wait during the turns of others. All are in memory at the same time;
--peers and --precisions make them fewer. A ratio is the speed of trainer, at its faster precision, divided by another
contestant's, round by round. The lines below the table compare each precision of trainer with the fastest variant of
each other program, and trainer's steps in its loop with calls of the compiled step alone, which get the same batch each
time.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # For this process and those that it starts, PyTorch's too.

import numpy as np
import rich.console
import rich.live
import rich.table

from harness import Process, about, install_torch, stream_of, table_of
from trainer.config.file import load_config
from trainer.config.settings import Config
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData
from trainer.errors import UserError
from trainer.tokenizers.vocabulary import SPECIAL_TOKENS

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 5
WARMUP_STEPS = 2
VOCABULARY_SIZE = 5000
# What the step may take longer in the loop than alone: one of the two limits has to hold.
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
# The variants of each program: their names, and whether XLA or torch.compile compiles them.
VARIANTS = {
    "trainer": {"trainer": False},
    "against": {"trainer of the other checkout": False},
    "fit": {"Keras fit": False, "Keras fit, XLA": True},
    "gpt2": {"GPT2Backbone in trainer": False},
    "torch": {"PyTorch": False, "PyTorch, torch.compile": True},
}

Figures = dict[str, Any]


class Contestant:
    """A training in another process, and its speed.

    Args:
        name: the name in tables.
        job: the training, as contestant.py and torch_gpt.py read it.
        folder: the folder for the process's files.

    Attributes:
        num_steps: the number of steps of a turn.
        each_step_secs: the seconds of a step, for each round.
        each_alone_secs: the seconds of the compiled step alone, for each round; only for trainer.
        idle_cpu_secs: the CPU time that the process took while others had their turn.
    """

    def __init__(self, name: str, job: Figures, folder: Path) -> None:
        self.name, self.precision = name, job["config"]["train"]["precision"]
        self.num_tokens = job["config"]["train"]["global_batch_size"] * job["config"]["train"]["sequence_length"]
        self.num_steps = WARMUP_STEPS
        self.each_step_secs: list[float] = []
        self.each_alone_secs: list[float] = []
        self.loss, self.idle_cpu_secs = float("nan"), 0.0
        self._process = Process(f"{name}, {self.precision}", job, folder, Path(job["checkout"]))
        self.about = self._process.about

    def warm_up(self, block_secs: float) -> None:
        """Takes the first steps, which compile, and sets the number of steps that take this many seconds."""
        for what in ("steps", "alone") if self.is_ours() else ("steps",):
            self._ask(WARMUP_STEPS, what)
        secs, _ = self._ask(WARMUP_STEPS, "steps")
        self.num_steps = max(WARMUP_STEPS, round(block_secs / secs))

    def take(self) -> None:
        """Takes a turn."""
        secs, self.loss = self._ask(self.num_steps, "steps")
        self.each_step_secs.append(secs)
        if self.is_ours():
            self.each_alone_secs.append(self._ask(self.num_steps, "alone")[0])

    def is_ours(self) -> bool:
        """Returns whether this is trainer as a whole, of this checkout."""
        return self.name in VARIANTS["trainer"]

    def figures(self) -> Figures:
        """Returns the contestant's figures."""
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
        self._process.end()

    def _ask(self, num_steps: int, what: str) -> tuple[float, float]:
        answer = self._process.ask(f"{num_steps}{'' if what == 'steps' else f' {what}'}")
        self.idle_cpu_secs += answer["idle_cpu_secs"]
        return answer["step_secs"], answer["loss"]


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
            contestant.idle_cpu_secs = 0.0  # What it took while others were starting does not count.
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
    """Yields the name and the job of every contestant."""
    config, prepared = make_data(size, options.quick, folder)
    rows_of(prepared, config.train.sequence_length).tofile(folder / "rows")
    for program in ("trainer", *(["against"] if options.against else []), *options.peers):
        for name, is_compiled in VARIANTS[program].items():
            for precision in options.precisions:
                train = config.train.model_copy(update={"precision": precision})
                yield (
                    name,
                    {
                        "program": program,
                        "checkout": str(options.against if program == "against" else ROOT),
                        "is_compiled": is_compiled,
                        "config": config.model_copy(update={"train": train}).model_dump(mode="json", exclude_none=True),
                        "prepared": str(prepared.folder),
                        "rows": str(folder / "rows"),
                        "vocabulary_size": prepared.vocabulary_size,
                    },
                )


def make_data(size: str, is_quick: bool, folder: Path) -> tuple[Config, PreparedData]:
    """Prepares random tokens, some more frequent than others, so that there is something to learn."""
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
    """Returns all examples that trainer makes of packed data, except the last, which may be padded.

    Returns:
        int32 [examples, sequence_length + 1], each the inputs and the last target.
    """
    tokens = stream_of(prepared)
    rows: np.ndarray = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]
    return rows


def compare(rows: Sequence[Figures]) -> list[Figures]:
    """Adds to each contestant's figures the ratio of trainer's speed, at its faster precision, to the contestant's; and
    to trainer's figures the overhead, which is the time that a step takes in the loop beyond its time alone.
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
    """Returns how many times as fast ours is, for each round that both took part in."""
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
    """Prints the figures of `measure`: all of them; then trainer beside the fastest variant of each other program, and
    beside its own step alone.
    """
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
    for ours, (program, rows) in itertools.product(trainers, rows_of.items()):
        # Two checkouts are compared at the same precision, and another program at its faster one.
        others = [row for row in rows if program != "against" or row["precision"] == ours["precision"]]
        if not others:
            continue
        best = min(others, key=lambda row: row["step_secs"])
        each = times_as_fast(ours, best)
        digits = 3 if program == "against" else 2
        median, *each_text = (f"{ratio:.{digits}f}" for ratio in (statistics.median(each), *each))
        console.print(
            f"trainer in {ours['precision']} is {median} times as fast as {best['name']} in {best['precision']}, "
            f"median of {', '.join(each_text)}",
            highlight=False,
        )
    console.print(f"waiting contestants took {figures['idle_cores']:.1%} of a core", highlight=False)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="sizes of the model (all)")
    peers = [program for program in VARIANTS if program not in ("trainer", "against")]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, help="programs to compare with (all)")
    parser.add_argument("--against", metavar="FOLDER", type=Path, help="another checkout to compare with")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="precisions (both)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that the benchmark works")
    parser.add_argument("--block-secs", type=float, default=8, help="seconds of each turn (%(default)s)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="the file to write all figures to")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(block_secs=0)
    options = parser.parse_args()
    if options.against is not None:
        options.against = options.against.resolve()
        if not (options.against / "scripts" / "benchmarks" / "contestant.py").is_file():
            parser.error(f"--against {options.against} has no scripts/benchmarks/contestant.py; name a checkout.")
    console = rich.console.Console()
    if "torch" in options.peers:
        install_torch(console, "--peers fit gpt2")
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
