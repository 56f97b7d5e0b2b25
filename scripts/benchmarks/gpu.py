#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures the training of GPT-2 124M on one GPU: tokens per second, model FLOPs utilisation and memory.

    scripts/benchmarks/gpu.py [--batch-size 64] [--micro-batch-size 16] [--quick] [--json OUT]

This trains configs/gpt2_124m_8gpu.toml on the first GPU, in mixed_bfloat16 and compiled by XLA. Its text is replaced by
the storybook in bytes, with the vocabulary rounded up to GPT-2's size. Without a GPU the program prints that and exits
with status 0.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import rich.console
import tensorflow as tf

from harness import Training, about, table_of
from trainer.config.file import load_config
from trainer.config.settings import Config
from trainer.data.prepare import prepare
from trainer.distributed.strategy import device_kind, device_names, find_devices, unseen_gpu
from trainer.errors import UserError
from trainer.model.size import tokens_per_sec_at_peak

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "gpt2_124m_8gpu.toml"
ROUNDS = 5
WARMUP_STEPS = 3
ON_GPU = ("distribution.kind=gpu", "distribution.gpus=[0]")
QUICK = ("model.num_layers=1", "model.vocabulary_multiple=1", "train.sequence_length=32", "samples.num_tokens=1")

Figures = dict[str, Any]


def config_of(folder: Path, overrides: Sequence[str]) -> Config:
    """Returns the configuration: the storybook in bytes, and a vocabulary rounded up to GPT-2's size."""
    return load_config(
        CONFIG,
        [
            "data.train=storybook",
            "data.validation=none",
            "data.held_out_fraction=0.01",  # the configuration's is for ten billion tokens
            f"data.prepared_folder={folder}",
            "tokenizer.kind=byte",
            "tokenizer.vocabulary_size=none",
            "model.vocabulary_multiple=50304",
            *overrides,
        ],
    )


def measure(config: Config, num_steps: int, console: rich.console.Console) -> Figures:
    """Takes the steps that compile, then times rounds of steps and prints each round's speed."""
    prepared = prepare(config, lambda _: None)
    train = config.train
    assert train.total_steps is not None
    training = Training(config, prepared, train.total_steps)
    training.take(WARMUP_STEPS)
    on_gpu = device_kind(training.strategy) == "GPU"
    if on_gpu:
        tf.config.experimental.reset_memory_stats("GPU:0")
    rates = []
    for number in range(ROUNDS):
        rates.append(train.global_batch_size * train.sequence_length / training.take(num_steps))
        console.print(f"round {number + 1}: {rates[-1]:,.0f} tokens/s", highlight=False)
    names = device_names(training.strategy)
    devices = find_devices(device_kind(training.strategy), names, 1)
    at_peak = None if devices is None else tokens_per_sec_at_peak(config, prepared.vocabulary_size, devices)
    rate = statistics.median(rates)
    return {
        "device": " and ".join(sorted(names)) or device_kind(training.strategy),
        "num_parameters": training.model.count_params(),
        "batch": f"{train.global_batch_size} x {train.sequence_length}",
        "micro_batch_size": train.micro_batch_size,
        "precision": train.precision,
        "loss": training.loss,
        "tokens_per_sec": rate,
        "each_tokens_per_sec": rates,
        "mfu": None if at_peak is None else rate / at_peak,
        "peak_bytes": tf.config.experimental.get_memory_info("GPU:0")["peak"] if on_gpu else None,
    }


def print_figures(console: rich.console.Console, figures: Figures) -> None:
    """Prints the figures of `measure`."""
    row = [
        figures["device"],
        figures["batch"],
        f"{figures['num_parameters']:,}",
        f"{figures['tokens_per_sec']:,.0f}",
        "not known" if figures["mfu"] is None else f"{figures['mfu']:.1%}",
        "not known" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 1e9:.2f}",
    ]
    names = ["device", "batch", "parameters", "tokens/s", "mfu", "peak GB"]
    console.print(table_of(f"{figures['precision']}, median of {ROUNDS} rounds", names, [row], num_names=2))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that the benchmark works")
    parser.add_argument("--batch-size", type=int, default=64, help="examples of a step (%(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="examples at a time (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each round (%(default)s)")
    parser.add_argument("--stories", type=int, default=20_000, help="stories of the storybook (%(default)s)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="the file to write all figures to")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(batch_size=4, micro_batch_size=2, steps=2, stories=300)
    options = parser.parse_args()
    if not tf.config.list_physical_devices("GPU"):
        print("TensorFlow finds no GPU: skipped")
        if warning := unseen_gpu():
            print(f"warning: {warning}")
        return
    overrides = [
        *ON_GPU,
        f"train.global_batch_size={options.batch_size}",
        f"train.micro_batch_size={options.micro_batch_size}",
        f"data.storybook_stories={options.stories}",
        *(QUICK if options.quick else ()),
    ]
    console = rich.console.Console()
    with tempfile.TemporaryDirectory() as folder:
        try:
            figures = measure(config_of(Path(folder), overrides), options.steps, console)
        except UserError as error:
            sys.exit(str(error))
    print_figures(console, figures)
    if options.json is not None:
        options.json.write_text(json.dumps({**about(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
