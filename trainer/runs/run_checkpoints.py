"""Opens the checkpoints of a run, finds the one that is meant, and loads a model from it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import keras
import numpy as np

from trainer.config.file import differing_settings, make_config, shortened
from trainer.config.schedule import can_extend
from trainer.errors import UserError, quoted
from trainer.model.build import BuildModel, make_model
from trainer.model.held import without_values
from trainer.model.language_model import adapt
from trainer.optimizers.average import name_of_average
from trainer.runs.array_file import Arrays, StoredArray
from trainer.runs.checkpoint import Checkpoint, Checkpoints, assign, write_first
from trainer.runs.parentage import Beginning
from trainer.runs.results import read_scores
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import CONFIG, CheckpointStep, RunFolder, check_has_checkpoint
from trainer.system.manifest import DamagedError
from trainer.system.storage import Location, Url

# The facts of a run's record that the manifest of each checkpoint repeats.
_FACTS = ("data_fingerprint", "tokenizer_fingerprint", "model")

# Makes what holds the weights of a model that has no values, by the names of `named_variables`.
MakeHolders = Callable[[keras.Model], Mapping[str, Any]]


def open_checkpoints(run: RunFolder, say: Callable[[str], None] = print) -> Checkpoints:
    """Returns the checkpoints of a run, with the validation losses so far.

    Raises:
        UserError: the file of the losses is damaged.
    """
    config = run.config.checkpoint

    def note_saved() -> None:
        if not run.facts.get("has_saved"):
            run.record(has_saved=True)

    return Checkpoints(
        run.path / "checkpoints",
        keep_last=config.keep_last,
        say=say,
        max_failures=config.max_failures,
        scores=read_scores(run),
        fault_of=lambda manifest: _fault_of(run, manifest),
        on_saved=note_saved,
    )


def find_checkpoint(run: RunFolder, checkpoints: Checkpoints, step: CheckpointStep | None = None) -> Checkpoint | None:
    """Returns a checkpoint of a run.

    Args:
        run: the run.
        checkpoints: the run's checkpoints.
        step: the checkpoint's step, or "best" for the one with the lowest validation loss; None: the newest.

    Returns:
        The checkpoint. None if step is None and the run has never saved a checkpoint.

    Raises:
        UserError: the checkpoint does not exist or is damaged; or the run has saved checkpoints, and all are gone.
    """
    if step is None:
        newest = checkpoints.latest()
        if newest is None and run.facts.get("has_saved"):
            raise UserError(
                f"{checkpoints.folder} is empty, though this run has saved checkpoints. Bring them back (is a disk "
                f"not mounted?), or begin again in another folder: trainer train {quoted(run.path / CONFIG)} "
                f"{quoted(f'run_folder={run.path}-2')}"
            )
        return newest
    if step == "best":
        step = checkpoints.best_step()
        if step is None:
            raise UserError(
                f"{run.path}: no checkpoint was scored on the validation text, so the best one is not known; a run "
                "with evaluation.every_steps scores its checkpoints as it trains."
            )
    check_has_checkpoint(run.path, step)
    try:
        return checkpoints.of_step(step)
    except UserError as error:
        raise UserError(f"{run.path}: the checkpoint of step {step} cannot be used: {error}") from None


def load_model(
    run: RunFolder,
    build_model: BuildModel | None = None,
    say: Callable[[str], None] = print,
    step: CheckpointStep | None = None,
    make_holders: MakeHolders | None = None,
) -> tuple[keras.Model, Checkpoint]:
    """Builds the model of a run with the weights of a checkpoint, or with their average if it has one.

    Args:
        run: the run, in which another process may be training.
        build_model: the function that was given to `trainer.train`.
        say: prints a line.
        step: the checkpoint's step, or "best" for the one with the lowest validation loss; None: the newest.
        make_holders: see `built`.

    Raises:
        UserError: the checkpoint does not exist, is damaged, or belongs to another model.
    """
    run.check_model(build_model)
    tokenizer = load_tokenizer_of(run)
    build = functools.partial(make_model, build_model, run.config, tokenizer.vocabulary_size, tokenizer.bos_id)

    def model_of(checkpoint: Checkpoint) -> tuple[keras.Model, Checkpoint]:
        model, holders = built(build, make_holders)
        assign(holders, averaged(checkpoint), checkpoint.folder)
        return model, checkpoint

    return read_checkpoint(run, model_of, say, step)


def built(
    build: Callable[[], keras.Model], make_holders: MakeHolders | None = None
) -> tuple[keras.Model, Mapping[str, Any]]:
    """Builds a model, for `assign` to fill.

    Args:
        build: builds it.
        make_holders: if something else than the model's variables holds the weights. Then these have no values.

    Returns:
        (model, what holds its weights, by name).
    """
    if make_holders is None:
        model = build()
        return model, adapt(model).named_variables()
    with without_values():
        model = build()
    return model, make_holders(model)


def averaged(checkpoint: Checkpoint) -> dict[str, StoredArray]:
    """Returns the weights to use a model with: their average if its checkpoint has one, else they themselves. A
    variable that is not trained has no average.
    """
    average = checkpoint.arrays("average") if checkpoint.has("average") else {}
    return {name: average.get(name_of_average(name), array) for name, array in checkpoint.arrays("weights").items()}


T = TypeVar("T")


def read_checkpoint(
    run: RunFolder,
    read: Callable[[Checkpoint], T],
    say: Callable[[str], None] = print,
    step: CheckpointStep | None = None,
) -> T:
    """Reads a checkpoint of a run, in which another process may be training.

    Args:
        run: the run.
        read: returns what is wanted of the checkpoint. Called again, for another checkpoint, if an array cannot be
            read because the first one was replaced.
        say: prints a line.
        step: the checkpoint's step, or "best" for the one with the lowest validation loss; None: the newest.

    Returns:
        What `read` returns.

    Raises:
        UserError: the checkpoint does not exist, is damaged, or belongs to another run; or `read` raised it.
    """
    while True:
        checkpoints = open_checkpoints(run, say)
        seen = checkpoints.steps(), checkpoints.scores
        checkpoint = None
        try:
            checkpoint = find_checkpoint(run, checkpoints, step)
            if checkpoint is None:
                raise UserError(
                    f"{run.path} has no checkpoint yet; train on with: trainer train --resume {quoted(run.path)}"
                )
            return read(checkpoint)
        except UserError as error:
            # The process that trains may have replaced it by a newer or a better one since it was listed. Another
            # checkpoint does not help if `read` cannot use what it got, such as a model that does not fit.
            may_be_replaced = checkpoint is None or isinstance(error, DamagedError)
            if not may_be_replaced or seen == (checkpoints.steps(), read_scores(run)):
                raise


def lasting(arrays: Mapping[str, StoredArray], checkpoint: Checkpoint) -> Arrays:
    """Returns arrays of a checkpoint that can still be used when the run that it is of has removed it. From a disk they
    are read when they are used; those in an object store are read now, into memory.

    Raises:
        DamagedError: they cannot be read any more.
    """
    if isinstance(checkpoint.folder, Url):
        return {name: np.asarray(array) for name, array in arrays.items()}
    return arrays


def facts_of(run: RunFolder) -> dict[str, Any]:
    """Returns the facts about a run that the manifest of each checkpoint repeats."""
    facts = {key: run.facts[key] for key in _FACTS}
    return facts | {"config": run.config.model_dump(mode="json"), "total_steps": run.total_steps}


def write_beginning(beginning: Beginning, folder: Location, facts: dict[str, Any]) -> None:
    """Writes the first checkpoint of a new run, and adds to the run's record where it comes from.

    Raises:
        UserError: it cannot be written.
    """
    manifest = {key: facts[key] for key in (*_FACTS, "config")}
    write_first(folder / "checkpoints", beginning.step, beginning.groups, manifest)
    facts |= {
        "has_saved": True,
        "parents": list(beginning.parents),
        "first_step": beginning.step,
        "data_offset": beginning.data_offset,
    }


def _fault_of(run: RunFolder, manifest: dict[str, Any]) -> str | None:
    """Returns how a checkpoint's manifest shows that it belongs to another run, or is beyond the run's end; None if it
    is of this run.
    """
    differing = [
        f"{key}={manifest[key]!r} (this run's is {run.facts[key]!r})"
        for key in _FACTS
        if manifest.get(key, run.facts[key]) != run.facts[key]
    ]
    if "config" in manifest:
        try:
            saved = make_config(manifest["config"])
            differing += differing_settings(run.recorded, saved)
            now, then = run.total_steps, manifest.get("total_steps") or saved.train.total_steps
            # A run that was made longer keeps the checkpoints of before.
            if now and then and not can_extend(saved.optimizer, then, now, min(manifest["step"], then, now)):
                differing.append(f"{_length_of(run)} (was {then})")
        except UserError as error:
            return f"it was saved with settings that this release does not have: {error}"
    if differing:
        return f"it is of another run: {shortened(differing)}."
    # A run that was made shorter, from an earlier checkpoint, has left it.
    end = run.total_steps
    return f"it is beyond {_length_of(run)}." if end is not None and manifest["step"] > end else None


def _length_of(run: RunFolder) -> str:
    """Returns the number of steps of a run by its record, and the setting that it comes from."""
    if run.recorded.train.num_epochs is None:
        return f"train.total_steps={run.total_steps}"
    return f"the {run.total_steps} steps of train.num_epochs={run.recorded.train.num_epochs}"
