"""Saves everything that a step changes into a checkpoint, and restores it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.runs.checkpoint import Checkpoint, Checkpoints, assign
from trainer.runs.run_checkpoints import facts_of
from trainer.runs.run_folder import RunFolder
from trainer.training.split import SplitArray
from trainer.training.step import TrainingStep


def restore(training_step: TrainingStep, checkpoint: Checkpoint | None) -> int:
    """Gives the model, the optimizer and the step counter the values of a checkpoint.

    An average of the weights that the checkpoint does not have begins with the weights: the run is new, or a fork that
    adds the average.

    Returns:
        The step to go on from: the checkpoint's, or 0 if there is none.
    """
    if checkpoint is not None:
        assign(training_step.named_variables, checkpoint.arrays("weights"), checkpoint.folder)
    if training_step.average is not None:
        if checkpoint is not None and checkpoint.has("average"):
            assign(training_step.average_state(), checkpoint.arrays("average"), checkpoint.folder)
        else:
            training_step.average.begin()
    if checkpoint is None:
        return 0
    if checkpoint.step == 0 and not checkpoint.has("optimizer"):
        return 0  # A new run, which begins with the weights of another model.
    # Runs of older releases did not count the steps that were skipped in a row.
    state: dict[str, Any] = {"skipped_in_a_row": np.zeros([], np.int64), **checkpoint.arrays("optimizer")}
    assign(training_step.state(), _with_loss_scale(state, training_step), checkpoint.folder)
    training_step.step.assign(checkpoint.step)
    return checkpoint.step


def _with_loss_scale(state: dict[str, Any], training_step: TrainingStep) -> dict[str, Any]:
    """Returns a state with a loss scale if the step has one, and without if not: a fork may change the precision."""
    names = ("loss_scale", "good_steps")
    if training_step.loss_scale is None:
        return {name: array for name, array in state.items() if name not in names}
    return {name: variable.numpy() for name, variable in training_step.loss_scale.state().items()} | state


def save(checkpoints: Checkpoints, training_step: TrainingStep, run: RunFolder, writes: bool = True) -> None:
    """Saves everything that a step changes.

    Args:
        checkpoints: the run's checkpoints.
        training_step: the model, the optimizer and the step counter.
        run: the run.
        writes: whether this worker writes the checkpoint. If distribution.shard splits something, all workers call
            this: those that do not write pass on their pieces.
    """
    if writes:
        checkpoints.make_way()
    groups = {
        "weights": _snapshot(training_step.named_variables, writes),
        "optimizer": _snapshot(training_step.state(), writes),
    }
    if training_step.average is not None:
        groups["average"] = _snapshot(training_step.average_state(), writes)
    if writes:
        checkpoints.save(int(training_step.step.numpy()), groups, facts_of(run))


def _snapshot(variables: Mapping[str, Any], keeps: bool) -> dict[str, np.ndarray]:
    arrays = {}
    for name, variable in variables.items():
        if keeps:
            # A copy: on a CPU numpy() can return the memory that the next step writes to.
            arrays[name] = np.array(variable.numpy())
        elif isinstance(variable, SplitArray):
            variable.send()
    return arrays
