"""Saves everything that a step changes into a checkpoint, and restores it."""

from typing import Any

import numpy as np

from trainer.runs.checkpoint import Checkpoint, Checkpoints, assign
from trainer.runs.run_checkpoints import facts_of
from trainer.runs.run_folder import RunFolder
from trainer.training.step import TrainingStep


def restore(step_function: TrainingStep, checkpoint: Checkpoint | None) -> int:
    """Gives the model, the optimizer and the step counter the values of a checkpoint.

    Returns:
        The step to go on from: the checkpoint's, or 0 if there is none.
    """
    if checkpoint is None:
        return 0
    assign(step_function.named_variables, checkpoint.arrays("weights"), checkpoint.folder)
    # Runs of older releases did not count the steps that were skipped in a row.
    state = {"skipped_in_a_row": np.zeros([], np.int64), **checkpoint.arrays("optimizer")}
    assign(step_function.state(), state, checkpoint.folder)
    step_function.step.assign(checkpoint.step)
    return checkpoint.step


def save(checkpoints: Checkpoints, step_function: TrainingStep, run: RunFolder) -> None:
    """Saves everything that a step changes."""
    groups = {
        "weights": _snapshot(step_function.named_variables),
        "optimizer": _snapshot(step_function.state()),
    }
    checkpoints.save(int(step_function.step.numpy()), groups, facts_of(run))


def _snapshot(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    # A copy: on a CPU numpy() can return the memory that the next step writes to.
    return {name: np.array(variable.numpy()) for name, variable in variables.items()}
