#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures what a run adds to its steps: the time to the first step, and the cost of a checkpoint.

    scripts/benchmarks/run.py [--only start checkpoint] [--quick] [--json OUT]

start: the time from the start of the process `trainer train configs/quickstart.toml` to the end of its first step, with
prepared text. checkpoint: blocks of steps with a save before them, in turn with blocks of the same length without one,
for the quickstart's model and for a model of GPT-2's width and vocabulary. The checkpoint is written during the steps;
its cost is the time that the block with it takes longer, with the wait for what is not yet written at its end.
scripts/benchmarks/step.py measures what the loop and its input add to a step.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # For this process and those that it starts.

import rich.console

from harness import Training, about, table_of
from trainer.config.file import load_config
from trainer.config.settings import Config
from trainer.data.prepare import prepare
from trainer.errors import UserError
from trainer.runs.run_checkpoints import open_checkpoints
from trainer.runs.run_folder import RunFolder
from trainer.training.snapshot import save

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PARTS = ("start", "checkpoint")
ROUNDS = 5
STARTS = 3
TARGET_START_SECS = 15
WARMUP_STEPS = 3
# More steps than are taken, so that the schedule does not end.
TOTAL_STEPS = 100_000
# The time of a block of steps, as a multiple of the time that writing a checkpoint takes without steps beside it.
BLOCK_PER_WRITING = 1.5

Figures = dict[str, Any]


# Start.


def measure_start(options: argparse.Namespace, folder: Path) -> Figures:
    """Starts the quickstart several times, each time in a new process and a new run."""
    overrides = [f"data.prepared_folder={folder / 'prepared'}", "log.every_steps=1"]
    if options.stories is not None:
        # Few stories make few steps, fewer than the quickstart's warm-up.
        overrides += [f"data.storybook_stories={options.stories}", "optimizer.warmup_steps=1"]
    prepare(load_config(CONFIGS / "quickstart.toml", overrides), lambda _: None)
    each = [secs_to_first_step([*overrides, f"run_folder={folder / f'start-{i}'}"], folder) for i in range(STARTS)]
    return {"secs": statistics.median(each), "each_secs": each, "target_secs": TARGET_START_SECS}


def secs_to_first_step(overrides: list[str], folder: Path) -> float:
    """Trains the quickstart in a process until it prints its first step."""
    command = [sys.executable, "-m", "trainer", "train", str(CONFIGS / "quickstart.toml"), *overrides]
    # The process is killed, and cannot remove its temporary files.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    lines: list[str] = []
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("step 1/"):
                    return time.perf_counter() - start
                lines.append(line)
        finally:
            process.kill()
    sys.exit(f"{''.join(lines)[-3000:]}\ntrainer train ended before its first step; the lines above have the reason.")


def print_start(console: rich.console.Console, figures: Figures) -> None:
    """Prints the figures of `measure_start`."""
    each = ", ".join(f"{secs:.1f}" for secs in figures["each_secs"])
    console.print(
        f"start to the end of the quickstart's first step: {figures['secs']:.1f} s (target: under "
        f"{figures['target_secs']} s), median of {each}",
        highlight=False,
    )


# Checkpoint.


def configs_of(options: argparse.Namespace, folder: Path) -> dict[str, Config]:
    """Returns the configurations whose checkpoints are measured, by name."""
    shared = [f"data.prepared_folder={folder / 'prepared'}", "distribution.kind=cpu"]
    if options.stories is not None:
        shared.append(f"data.storybook_stories={options.stories}")
    gpt2 = [
        "data.train=storybook",
        "data.validation=none",
        "data.held_out_fraction=0.01",  # the configuration's is for ten billion tokens
        "data.storybook_stories=1000",
        "tokenizer.kind=byte",
        "tokenizer.vocabulary_size=none",
        "model.vocabulary_multiple=50304",
        f"model.num_layers={options.layers}",
        "train.precision=float32",
        "train.global_batch_size=2",
        "train.micro_batch_size=none",
        "train.sequence_length=128",
        "distribution.gpus=none",
    ]
    if options.quick:
        gpt2 += ["model.hidden_dim=48", "model.intermediate_dim=64", "model.vocabulary_multiple=128"]
    name = f"GPT-2, {options.layers} layers"
    return {
        "quickstart": load_config(CONFIGS / "quickstart.toml", [*shared, f"run_folder={folder / 'quickstart'}"]),
        name: load_config(CONFIGS / "gpt2_124m_8gpu.toml", [*gpt2, *shared, f"run_folder={folder / 'gpt2'}"]),
    }


def measure_checkpoints(name: str, config: Config) -> Figures:
    """Trains a model in blocks of steps, with a checkpoint written beside them and without."""
    prepared = prepare(config, lambda _: None)
    run = RunFolder.create(config, prepared)
    checkpoints = open_checkpoints(run, lambda _: None)
    training = Training(config, prepared, TOTAL_STEPS)

    def write_alone() -> float:
        start = time.perf_counter()
        save(checkpoints, training.step, run)
        checkpoints.wait()
        return time.perf_counter() - start

    training.take(WARMUP_STEPS)
    # There is a step between two saves, because a checkpoint that exists would not be written again.
    writing_secs, step_secs = write_alone(), training.take(WARMUP_STEPS)
    num_steps = max(2, math.ceil(BLOCK_PER_WRITING * writing_secs / step_secs))
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        writing_secs = write_alone()
        without_secs = num_steps * training.take(num_steps)
        start = time.perf_counter()
        save(checkpoints, training.step, run)
        call_secs = time.perf_counter() - start
        training.take(num_steps)
        before_wait = time.perf_counter()
        checkpoints.wait()
        ended = time.perf_counter()
        rounds.append(
            {
                "step_secs": without_secs / num_steps,
                "call_secs": call_secs,
                "wait_secs": ended - before_wait,
                "stall_secs": ended - start - without_secs,
                "writing_secs": writing_secs,
            }
        )
    newest = checkpoints.latest()
    assert newest is not None
    return {
        "model": name,
        "num_parameters": training.model.count_params(),
        "num_bytes": sum(file["bytes"] for file in newest.manifest["files"].values()),
        "num_steps": num_steps,
        **{key: statistics.median(each[key] for each in rounds) for key in rounds[0]},
        "rounds": rounds,
    }


def print_checkpoints(console: rich.console.Console, figures: Figures) -> None:
    """Prints the figures of `measure_checkpoints`."""
    shown = ("step_secs", "call_secs", "writing_secs", "stall_secs")
    row = [
        figures["model"],
        f"{figures['num_bytes'] / 1e6:,.1f}",
        *(f"{figures[key] * 1e3:,.1f}" for key in shown),
        f"{figures['stall_secs'] / figures['step_secs']:.1f}",
    ]
    names = ["checkpoint", "MB", "ms/step", "ms in save", "ms until written", "ms it costs", "as steps"]
    console.print(table_of(f"medians of {ROUNDS} rounds", names, [row], num_names=1))


def main() -> None:
    """Measures, prints and writes the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (everything)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that the benchmark works")
    parser.add_argument("--stories", type=int, help="stories in place of the configs' numbers")
    parser.add_argument("--layers", type=int, default=4, help="layers of GPT-2's 12, for checkpoint (%(default)s)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="the file to write all figures to")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(stories=300, layers=1)
    options = parser.parse_args()
    console = rich.console.Console()
    report: Figures = about()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if "start" in options.only:
                report["start"] = measure_start(options, Path(folder))
                print_start(console, report["start"])
            if "checkpoint" in options.only:
                report["checkpoint"] = []
                for name, config in configs_of(options, Path(folder)).items():
                    report["checkpoint"].append(measure_checkpoints(name, config))
                    print_checkpoints(console, report["checkpoint"][-1])
        except UserError as error:
            sys.exit(str(error))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
