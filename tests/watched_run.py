"""Runs as the writers of a run leave them, without a training: a record, curves, samples, scores and a result."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.file import make_config
from trainer.monitoring.events import Interval
from trainer.monitoring.monitor import Monitor
from trainer.runs.results import Evaluation, write_result, write_scores
from trainer.runs.run_folder import FORMAT, RunFolder
from trainer.system.manifest import write_sealed

STORY = "the cat sat"


def record(folder: Path, *overrides: str, facts: Mapping[str, Any] | None = None) -> RunFolder:
    """Writes the record and the config of a run with these settings."""
    settings = {"run_folder": str(folder), "train": {"precision": "float32", "total_steps": 40}}
    config = make_config(settings, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    known = {
        "format": FORMAT,
        "config": config.model_dump(mode="json", exclude_none=True),
        "model": "gpt",
        "tensorflow": "2.20.0",
        "keras": "3.15.0",
        "data_fingerprint": "d" * 64,
        "tokenizer_fingerprint": "t" * 64,
    }
    write_sealed(folder / "run.json", known | dict(facts or {}))
    (folder / "config.toml").write_text(config.to_toml())
    return RunFolder(folder)


def loss_at(step: int, above: float = 0.0) -> float:
    return 2.0 + above + 4.0 * math.exp(-step / 10)


def watch(
    run: RunFolder, first_step: int, last_step: int, above: float = 0.0, skipped: int = 0, sample: str = STORY
) -> None:
    """Writes the curves and samples of a process that goes on from a step: a point of training at every second step, a
    score and a sample at every tenth.
    """
    total = run.total_steps or last_step
    monitor = Monitor(run.path / "logs", run.config, first_step, total, 0.5, False, io.StringIO())
    with monitor.running():
        for step in range(first_step + 2, last_step + 1, 2):
            monitor.interval(step, interval_at(step, above, skipped if step == last_step else 0))
            if step % 10 == 0:
                monitor.evaluation(step, evaluation_at(step, above))
                monitor.samples(step, {"greedy": f"{sample} {step}", "top-p": f"{sample}"})


def interval_at(step: int, above: float, num_skipped: int = 0) -> Interval:
    return Interval(
        num_steps=2,
        num_skipped=num_skipped,
        loss=loss_at(step, above),
        grad_norm=1 + 50 / step,
        clip_rate=0.5,
        input_share=0.02,
        tokens_per_sec_in_steps=1000.0,
        tokens_per_sec_overall=800.0,
        learning_rate=1e-3 * min(1, step / 10),
    )


def evaluation_at(step: int, above: float = 0.0) -> Evaluation:
    loss = loss_at(step, above) + 0.1
    return Evaluation(loss=loss, num_tokens=1000, bits_per_byte=loss / 3, is_lossy=False, excess=None)


def finish(run: RunFolder, above: float = 0.0, sample: str = STORY) -> None:
    """Writes what a finished run has: its scores, the folder of its last checkpoint and its result."""
    total = run.total_steps or 0
    write_scores(run, {step: evaluation_at(step, above).loss for step in range(10, total + 1, 10)})
    saved(run, total)
    write_result(run, total, evaluation_at(total, above), {"greedy": f"{sample} {total}", "top-p": sample})


def saved(run: RunFolder, step: int) -> None:
    """Makes the folder of a checkpoint, without one in it."""
    (run.path / f"checkpoints/step_{step:09d}").mkdir(parents=True)
