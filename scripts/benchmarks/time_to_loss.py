#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures how soon a training reaches a validation loss, on the CPU, beside other programs on the same text.

    scripts/benchmarks/time_to_loss.py [--texts shakespeare_char books] [--seeds 0 1 2] [--json OUT] [--curves FOLDER]
    scripts/benchmarks/time_to_loss.py --contestants trainer fast torch-compile --steps 500 --seeds 0

The texts are tiny Shakespeare, with configs/shakespeare_char.toml, and the books, with configs/minigpt.toml for two
epochs; both are in the folder that TRAINER_TEST_DATA names. The contestants, all of which run by default:
- trainer: the text's config;
- fast: configs/shakespeare_char_fast.toml or configs/minigpt_fast.toml, with its own length, or the file of --fast;
  left out if there is none;
- keras, keras-xla: the tutorial's own code, with its layers, its Adam and `fit`, without XLA and with it. On books the
  input is the tutorial's too; on tiny Shakespeare it is windows at random places;
- torch, torch-compile: torch_gpt.py, a plain GPT of the config's sizes with the model and the hyperparameters that
  nanoGPT published for its CPU run on tiny Shakespeare (pre-norm, GELU, no biases), eager and compiled. Its rows are
  drawn at random, as in nanoGPT: windows at any place, or lines of the books.

Each program has its own recipe, so a time to a loss compares the recipes as much as the programs. Only step.py beside
this file compares equal models with the same update. The learning rates and the embeddings are:
- trainer on tiny Shakespeare: AdamW, cosine from 5e-3, untied embeddings; on books AdamW, constant 1e-3, untied;
- keras, on both texts: Adam, constant 1e-3, untied;
- torch, on both texts: AdamW, cosine from 1e-3, tied. For books nanoGPT has published nothing.

Each is a process of its own. They take turns: in a turn a contestant trains the next of --blocks equal parts of its
steps and is scored, while the others wait, so that a busy machine slows all alike. Each seed starts all of them anew.
All compute in bfloat16 with float32 weights if this CPU is fast in it, otherwise in float32; with --precisions each
takes part once in each of these. Every score is of all of the validation text, cut into the same windows for all, with
the same tokens.

Two times are counted. Training is the time of the steps. The second one has the start, too: from the start of the
process to the end of its first two steps, with imports, opening the data, tracing and compiling; these steps count in
the start only. PyTorch keeps in .venv-torch what it has compiled, so its later starts are faster. Neither time has the
time of scoring. `fit` begins each turn by filling its buffer; its first step of a turn counts like the others.

The target is nanoGPT's published validation loss for tiny Shakespeare. For books it is the loss at which the tutorial's
code ends, with the same seed. Between two scores the loss is taken as a straight line. A time or number of tokens is
the median of the seeds, a share the median of the ratios seed by seed; a program is compared in its fastest variant.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # For this process and those that it starts, PyTorch's too.

import rich.console
import rich.live
import rich.table

from curves import Panel, draw
from harness import about, install_torch, table_of
from learners import CONTESTANTS, TEXTS, Contestant, Point, check_contests, jobs, to_target, write_quick_texts
from trainer.errors import UserError
from trainer.hardware.processor import multiplies_bfloat16
from trainer.reports.charts import Line

BLOCKS = 20
PRECISIONS = ("float32", "mixed_bfloat16")

Figures = dict[str, Any]


def compete(
    text: str, seed: int, options: argparse.Namespace, folder: Path, console: rich.console.Console
) -> list[Figures]:
    """Lets all contestants train in turn; returns the figures of each, and prints as it goes."""
    with contextlib.ExitStack() as stack:
        contestants: list[Contestant] = []
        start = time.perf_counter()
        for job in jobs(text, seed, options, folder):
            contestants.append(Contestant(job, folder))
            stack.callback(contestants[-1].process.end)
            about = f"{job['name']}, {job['total_steps']:,} steps, started in {contestants[-1].start_secs:.0f} s"
            console.print(f"{text}, seed {seed}: {about}", highlight=False)
        with rich.live.Live(console=console, auto_refresh=False, transient=True) as live:
            for block in range(options.blocks):
                for contestant in contestants:
                    contestant.take_turn(block, options.blocks)
                    live.update(progress_table(text, seed, contestants), refresh=True)
        idle = sum(each.idle_cpu_secs for each in contestants) / (time.perf_counter() - start)
        console.print(f"{text}, seed {seed}: waiting contestants took {idle:.1%} of a core", highlight=False)
        return [each.figures() for each in contestants]


def progress_table(text: str, seed: int, contestants: Sequence[Contestant]) -> rich.table.Table:
    """Shows the newest score of each contestant."""
    cells = [
        [each.name, f"{point.steps:,}", f"{point.tokens:,.0f}", f"{point.secs:,.0f}", f"{point.loss:.3f}"]
        for each in contestants
        for point in each.points[-1:]
    ]
    return table_of(f"{text}, seed {seed}", ["trained by", "steps", "tokens", "s", "loss"], cells, num_names=1)


# What comes out.


def summary(text: str, of_seeds: dict[int, list[Figures]], given: float | None) -> Figures:
    """Returns the contestants with all their seeds, and when each reached the target.

    Args:
        text: the name of the text.
        of_seeds: what `compete` returns, by the seed.
        given: the target in nats; None: the text's own.
    """
    targets = [target_of(text, figures, given) for figures in of_seeds.values()]
    rows: list[Figures] = []
    for each_seed in zip(*of_seeds.values(), strict=True):
        runs = []
        for seed, target, run in zip(of_seeds, targets, each_seed, strict=True):
            tokens, secs = to_target([Point(**point) for point in run["points"]], target) or (None, None)
            with_start = None if secs is None else secs + run["start_secs"]
            runs.append({"seed": seed, **run, "tokens": tokens, "secs": secs, "secs_with_start": with_start})
        row: Figures = {
            key: runs[0][key] for key in ("contestant", "name", "precision", "program", "recipe", "num_parameters")
        }
        row |= {"final_loss": statistics.fmean(run["points"][-1]["loss"] for run in runs), "runs": runs}
        for key in ("start_secs", "tokens", "secs", "secs_with_start"):
            each = [run[key] for run in runs]
            row[key] = None if None in each else statistics.median(each)
        rows.append(row)
    return {"text": text, "targets": targets, "contestants": rows}


def target_of(text: str, figures: Sequence[Figures], given: float | None) -> float:
    """Returns the loss to be reached with a seed."""
    fixed = TEXTS[text].target if given is None else given
    if fixed is not None:
        return fixed
    tutorial = next(each for each in figures if each["program"] == "tutorial")
    return float(tutorial["points"][-1]["loss"])


def shares(ours: Figures, theirs: Figures, key: str) -> list[float] | None:
    """Returns our time as a share of theirs, seed by seed; None if a seed of either has not reached the target."""
    pairs = [(mine[key], other[key]) for mine, other in zip(ours["runs"], theirs["runs"], strict=True)]
    return None if any(None in pair for pair in pairs) else [mine / other for mine, other in pairs]


def print_figures(console: rich.console.Console, figures: Figures) -> None:
    """Prints what `summary` returns: all contestants; then our times as shares of those of each other program, in its
    faster variant, with the recipes of both.
    """
    rows = figures["contestants"]
    cells = [
        [
            row["name"],
            f"{row['num_parameters']:,}",
            f"{row['runs'][0]['points'][-1]['steps']:,}",
            f"{row['final_loss']:.3f}",
            *("-" if row[key] is None else f"{row[key]:,.0f}" for key in ("tokens", "secs", "start_secs")),
            "-" if row["secs_with_start"] is None else f"{row['secs_with_start']:,.0f}",
        ]
        for row in rows
    ]
    targets = list(dict.fromkeys(f"{target:.3f}" for target in figures["targets"]))
    names = [
        "trained by",
        "parameters",
        "steps",
        "loss at end",
        "tokens to target",
        "s to target",
        "s of start",
        "both",
    ]
    console.print(table_of(f"{figures['text']}, target {', '.join(targets)} nats", names, cells, num_names=1))
    is_compared = False
    for ours in [row for row in rows if row["program"] == "trainer"]:
        for program in ("tutorial", "torch"):
            others = [row for row in rows if row["program"] == program and row["secs"] is not None]
            if not others or ours["secs"] is None:
                continue
            best = min(others, key=lambda row: row["secs"])
            each, with_start = (shares(ours, best, key) for key in ("secs", "secs_with_start"))
            assert each is not None and with_start is not None
            console.print(
                f"{ours['name']} reaches the target in {statistics.median(each):.2f} of the time of {best['name']}, "
                f"median of {', '.join(f'{share:.2f}' for share in each)}; with the start "
                f"{statistics.median(with_start):.2f}",
                highlight=False,
            )
            console.print(f"  {ours['name']}: {ours['recipe']}; {best['name']}: {best['recipe']}", highlight=False)
            is_compared = True
    if is_compared:
        console.print(
            "A share compares recipes as much as programs; only scripts/benchmarks/step.py compares equal models.",
            highlight=False,
        )


def draw_curves(file: Path, figures: Figures) -> None:
    """Writes the losses by tokens and by seconds, a line for each seed."""

    def lines(x: str) -> list[Line]:
        return [
            Line(row["name"], [(point[x], point["loss"]) for point in run["points"]])
            for row in figures["contestants"]
            for run in row["runs"]
        ]

    panels = [Panel("tokens", lines("tokens")), Panel("seconds of training", lines("secs"))]
    target = statistics.fmean(figures["targets"])
    draw(file, f"{figures['text']}: validation loss in nats per token", panels, target)


def read_options() -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="the texts (both)")
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="who takes part (all)"
    )
    parser.add_argument("--fast", metavar="CONFIG", type=Path, help="the config of fast, for a single text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="values of train.seed (0 1 2)")
    parser.add_argument("--steps", type=int, help="steps of each training, with its schedule, in place of its length")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="turns of each contestant (%(default)s)")
    parser.add_argument("--target", type=float, help="the loss to reach, in nats, in place of the text's")
    best = "mixed_bfloat16" if multiplies_bfloat16() else "float32"
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=[best], help=f"precisions of all (here {best})"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that the benchmark works")
    parser.add_argument("--json", metavar="OUT", type=Path, help="the file to write all figures to")
    parser.add_argument("--curves", metavar="FOLDER", type=Path, help="the folder to write a picture of each text to")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(seeds=[0], steps=8, blocks=2)
    options = parser.parse_args()
    if options.fast is not None and len(options.texts) > 1:
        parser.error("--fast is the config of a single text; name the text with --texts.")
    needs_target = [text for text in options.texts if TEXTS[text].target is None and options.target is None]
    if needs_target and not {"keras", "keras-xla"} & set(options.contestants):
        parser.error(f"{needs_target[0]} has no target without keras or keras-xla; give --target.")
    if options.blocks < 1:
        parser.error(f"--blocks {options.blocks} is less than one turn.")
    if options.json is not None and options.json.is_dir():
        parser.error(f"--json: {options.json} is a folder; name a file.")
    for option, out in (("--json", options.json and options.json.parent), ("--curves", options.curves)):
        if out is not None and not (out.is_dir() and os.access(out, os.W_OK)):
            parser.error(f"{option}: {out} is not a folder that can be written to; make it first.")
    return options


def main() -> None:
    """Measures, prints and writes."""
    options = read_options()
    console = rich.console.Console()
    report: Figures = {**about(), "texts": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.quick:
            write_quick_texts(folder)
        try:
            check_contests(options, folder)
        except UserError as error:
            sys.exit(str(error))
        if {"torch", "torch-compile"} & set(options.contestants):
            install_torch(console, "--contestants trainer fast keras keras-xla")
        for text in options.texts:
            try:
                of_seeds = {seed: compete(text, seed, options, folder, console) for seed in options.seeds}
            except UserError as error:
                sys.exit(str(error))
            figures = summary(text, of_seeds, options.target)
            report["texts"].append(figures)
            print_figures(console, figures)
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=2) + "\n")
            if options.curves is not None:
                draw_curves(options.curves / f"time_to_loss_{text}.png", figures)


if __name__ == "__main__":
    main()
