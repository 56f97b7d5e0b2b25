"""What a resumed run changes for good: its length, its samples and its evaluation."""

from collections.abc import Callable

from trainer.config.file import kept_changes, shortened, with_kept_changes
from trainer.config.schedule import can_extend
from trainer.errors import UserError, quoted
from trainer.runs.run_folder import RESULT, SCORES, RunFolder, steps_in
from trainer.system.storage import remove_file


def newest_step(run: RunFolder) -> int:
    """Returns the newest step of the run that has the folder of a checkpoint; 0 if none has."""
    end = run.total_steps
    return max((step for step in steps_in(run.path / "checkpoints") if end is None or step <= end), default=0)


def has_steps_left(run: RunFolder) -> bool:
    """Whether the newest step that has the folder of a checkpoint is before the last one; True if that is not known."""
    train, is_longer = run.config.train, run.config.train.num_epochs != run.recorded.train.num_epochs
    end = train.total_steps or (None if is_longer else run.total_steps)
    return end is None or newest_step(run) < end


def changes_of(run: RunFolder) -> list[str]:
    """Returns the settings of a run's config that change the run for good, one `key=value (was value)` for each."""
    return kept_changes(run.config, run.recorded)


def check_length(run: RunFolder, step: int, before: int | None = None, now: int | None = None) -> None:
    """Raises UserError if a run cannot go on from a step with another number of steps than it had.

    Args:
        run: the run.
        step: the steps taken so far.
        before: the number of steps of the run by its record; None: run.total_steps.
        now: the number of steps by its config; None: train.total_steps, if that is set.
    """
    train = run.config.train
    old, new = before or run.total_steps, now or train.total_steps
    changed = [each for each in changes_of(run) if each.startswith("train.")]
    if old is None or new is None:
        return
    name = "total_steps" if train.num_epochs is None else "num_epochs"
    length = f"train.{name}={getattr(train, name)}"
    what = shortened(changed) or length
    if new < step:
        raise UserError(
            f"{what}: the run has taken {step} steps already. Give at least as many, or go on from an earlier "
            "checkpoint, with --step."
        )
    if not can_extend(run.config.optimizer, old, new, min(step, old)):
        at, advice = step, "Make a fork, which goes on from here with the new schedule"
        if shared := _newest_before_decay(run, old, new):
            at = shared
            advice = (
                f"The checkpoint of step {shared} is from before the decay. Fork it, and the fork ends as the run that "
                "has this length from the start"
            )
        raise UserError(
            f"{what}: optimizer.schedule={run.config.optimizer.schedule!r} depends on the length, so the {step} steps "
            f"that are taken would have had other learning rates. {advice}: trainer fork {quoted(f'{run.path}@{at}')} "
            f"{quoted(f'run_folder={run.path}-2')} {length}"
        )


def _newest_before_decay(run: RunFolder, old: int, new: int) -> int:
    """Returns the newest step that has the folder of a checkpoint and is before the decay of a run of either length; 0
    if there is none, or no decay.
    """
    if run.config.optimizer.decay_steps is None:
        return 0
    end = min(old, new)
    steps = [step for step in steps_in(run.path / "checkpoints") if step <= end]
    return max((step for step in steps if can_extend(run.config.optimizer, old, new, step)), default=0)


def has_other_scores(run: RunFolder) -> bool:
    """Returns whether the validation losses so far are of other batches than those that the run's config scores."""
    return run.config.evaluation.num_batches != run.recorded.evaluation.num_batches


def record_changes(run: RunFolder, step: int, total_steps: int, say: Callable[[str], None]) -> None:
    """Records the settings that belong to the run and are others from a step on, and prints them. Records the number of
    steps of train.num_epochs, too, which only the data tell.

    The result of a finished run is dropped: the run goes on, or is scored again. If the validation losses so far are of
    other batches, they are dropped, too: no later loss can be compared with them.

    Raises:
        UserError: the record or the config cannot be written.
    """
    changed = changes_of(run)
    length = {} if run.config.train.num_epochs is None else {"epochs_steps": total_steps}
    if not changed:
        if run.facts | length != run.facts:
            run.record(**length)
        return
    entry, is_scored_otherwise = {"step": step, "changed": changed}, has_other_scores(run)
    changes = [*run.facts.get("changes", []), entry]
    run.record_config(with_kept_changes(run.config, run.recorded), changes=changes, **length)
    remove_file(run.path / RESULT)
    if is_scored_otherwise:
        remove_file(run.path / SCORES)
        say(
            "evaluation.num_batches has changed, so the validation losses so far are of other batches: the best "
            "checkpoint is looked for among those that are scored from here on."
        )
    say(f"From step {step} on, as {run.path} records: {'; '.join(changed)}")
