"""Reports skipped steps, and stops a run that no longer learns because its steps are skipped."""

from collections.abc import Callable

from trainer.errors import UserError

# After this many skipped steps in a row the next one will be skipped, too: only its data is new, not the weights.
MAX_SKIPPED_IN_A_ROW = 20


def report_skipped(
    step: int, num_steps: int, num_skipped: int, loss_scale: float | None, say: Callable[[str], None]
) -> None:
    """Prints how many steps were skipped because a loss or gradient was not finite; nothing if there were none.

    Args:
        step: the steps taken so far.
        num_steps: the number of steps since the last report.
        num_skipped: how many of them were skipped.
        loss_scale: the loss scale now; None if train.precision is not 'mixed_float16'.
        say: prints a line.
    """
    if not num_skipped:
        return
    scale = "" if loss_scale is None else f"; the loss scale, which each of them halves, is {loss_scale:g} now"
    say(f"step {step}: skipped {num_skipped} of {num_steps} steps, whose loss or gradient was not finite{scale}.")


def check_is_learning(step: int, total_steps: int, skipped_in_a_row: int, num_updates: int) -> None:
    """Stops a run that no longer learns.

    Args:
        step: the steps taken so far.
        total_steps: the number of steps of the run.
        skipped_in_a_row: the steps that were skipped since the last applied one, except steps that lowered a loss
            scale.
        num_updates: the steps that were applied so far.

    Raises:
        UserError: too many steps in a row were skipped; or the run is over, and no step was applied, or no step of its
            second half.
    """
    is_over = step >= total_steps
    if is_over and not num_updates:
        what = f"All {step} steps of the run"
    elif skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW or (is_over and 2 * skipped_in_a_row >= step):
        what = f"The last {skipped_in_a_row} steps before step {step} all"
    else:
        return
    raise UserError(
        f"{what} had a loss or gradient that was not finite and were skipped. Lower optimizer.learning_rate, set "
        "optimizer.clip_norm (1.0 is common) or raise optimizer.warmup_steps. Skipped steps do not change the weights: "
        "the newest checkpoint is finite."
    )
