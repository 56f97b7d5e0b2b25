#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures what a run adds to its steps: how long it takes to the first of them, and what a checkpoint costs.

    scripts/benchmarks/run.py [--only start checkpoint] [--quick] [--json OUT]

start: from the start of a process, trainer train on configs/quickstart.toml, to the end of its first step, with the
text prepared. checkpoint: steps with a save before them, which is written beside them, in turn with as many steps
without, for the quickstart's model and for one of GPT-2's width and vocabulary. What the steps with it take longer, the
wait for what is not written by their end included, is what it costs. What the loop and its input add to a step is in
scripts/benchmarks/step.py.
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
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Of this process and those it starts.

import rich.console

from harness import Training, about, table_of
from trainer.config import Config
from trainer.config_file import load_config
from trainer.data.prepare import prepare
from trainer.errors import UserError
from trainer.training.run_checkpoints import open_checkpoints, save
from trainer.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PARTS = ("start", "checkpoint")
ROUNDS = 5
STARTS = 3
TARGET_START_SECS = 15
WARMUP_STEPS = 3
# More than are taken, so that the schedule does not end.
TOTAL_STEPS = 100_000
# Of the steps beside a checkpoint, by the time it takes to write it alone.
BLOCK_PER_WRITING = 1.5

Figures = dict[str, Any]


# Start.


def measure_start(options: argparse.Namespace, folder: Path) -> Figures:
    """Starts the quickstart several times, each in a process and a run of its own."""
    overrides = [f"data.prepared_folder={folder / 'prepared'}", "log.every_steps=1"]
    if options.stories is not None:
        # Of few stories there are few steps.
        overrides += [f"data.storybook_stories={options.stories}", "optimizer.warmup_steps=1"]
    prepare(load_config(CONFIGS / "quickstart.toml", overrides), lambda _: None)
    each = [secs_to_first_step([*overrides, f"run_folder={folder / f'start-{i}'}"], folder) for i in range(STARTS)]
    return {"secs": statistics.median(each), "each_secs": each, "target_secs": TARGET_START_SECS}


def secs_to_first_step(overrides: list[str], folder: Path) -> float:
    """Trains the quickstart in a process until it tells of its first step."""
    command = [sys.executable, "-m", "trainer", "train", str(CONFIGS / "quickstart.toml"), *overrides]
    # It is killed, and cannot clear up.
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
    sys.exit(f"{''.join(lines)[-3000:]}\ntrainer train ended before its first step; the lines above say why.")


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
    """Returns the trainings whose checkpoints are measured, by name."""
    shared = [f"data.prepared_folder={folder / 'prepared'}", "distribution.kind=cpu"]
    if options.stories is not None:
        shared.append(f"data.storybook_stories={options.stories}")
    gpt2 = [
        "data.train=storybook",
        "data.validation=none",
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
    """Trains a model some steps at a time, with a checkpoint beside them and without."""
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
    # A save of a step that is there already would not write.
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
    """Measures, prints and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (everything)")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--stories", type=int, help="in place of the configs' own numbers")
    parser.add_argument("--layers", type=int, default=4, help="of GPT-2's 12, for checkpoint (%(default)s)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file to write all figures to")
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
