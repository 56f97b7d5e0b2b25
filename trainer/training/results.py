"""The results of a run: scores.json has the validation losses so far, result.json the last evaluation and samples."""

import math
from collections.abc import Callable
from typing import Any

from trainer.distributed.workers import Workers
from trainer.errors import UserError, quoted
from trainer.system.manifest import DamagedError, unsealed, write_sealed
from trainer.system.storage import reason_and_remedy
from trainer.training.checkpoint import Checkpoints
from trainer.training.evaluation import Evaluation
from trainer.training.run_folder import RESULT, SCORES, RunFolder, Step


def read_scores(run: RunFolder) -> dict[int, float]:
    """Returns the validation losses so far, by step.

    Raises:
        UserError: their file is damaged or cannot be read.
    """
    file = run.path / SCORES
    try:
        losses = unsealed(file.read_bytes(), file).get("losses")
        if not isinstance(losses, dict):
            raise DamagedError(f"{file} is damaged: it is another file of trainer's, without losses.")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason_and_remedy(error)}.") from None
    except DamagedError as error:
        raise UserError(
            f"{error} Bring it back from a copy, or delete it: the best checkpoint is then looked for among the "
            "checkpoints that are scored from here on."
        ) from None
    return {int(step): float(loss) for step, loss in losses.items()}


def write_scores(run: RunFolder, scores: dict[int, float]) -> None:
    """Writes the validation losses so far.

    Raises:
        UserError: they cannot be written.
    """
    file = run.path / SCORES
    try:
        write_sealed(file, {"losses": {str(step): loss for step, loss in scores.items()}})
    except OSError as error:
        raise UserError(f"{file} cannot be written: {reason_and_remedy(error)}.") from None


def scores_to_keep(checkpoints: Checkpoints, step: int, from_step: Step | None) -> dict[int, float]:
    """Returns the validation losses that a process which goes on from a step has to keep.

    A process that was killed may have scored steps after its last checkpoint: they are taken and scored again. But if
    the user has chosen an earlier checkpoint, the losses of the later checkpoints are kept.

    Args:
        checkpoints: the run's checkpoints, with the losses so far.
        step: the step of the checkpoint to go on from; 0 if there is none.
        from_step: the checkpoint that the user has chosen; None: the newest.
    """
    later = () if from_step is None else checkpoints.steps()
    return {at: loss for at, loss in checkpoints.scores.items() if at <= step or at in later}


def keep_score(
    run: RunFolder, workers: Workers, step: int, loss: float, scores: dict[int, float], say: Callable[[str], None]
) -> bool:
    """Adds a validation loss to the losses so far, which the chief writes. Prints a line if the loss has risen.

    Args:
        run: the run.
        workers: the workers of the run.
        step: the steps taken so far.
        loss: nats per token; it is added if it is finite.
        scores: the losses so far, by step. A run that was resumed from an earlier checkpoint has losses of later steps.
        say: prints a line.

    Returns:
        Whether the loss is the best so far.
    """
    best = min((at for at in scores if at <= step), key=lambda at: (scores[at], at), default=None)
    is_best = math.isfinite(loss) and (best is None or loss < scores[best] or best == step)
    if math.isfinite(loss):
        scores[step] = loss
    if best is not None and not loss <= scores[best]:
        say(
            f"step {step}: the validation loss has risen above its best, {scores[best]:.4f} at step {best}. That "
            f"checkpoint is kept: trainer generate {quoted(run.path)} --step best"
        )
    if workers.is_chief:
        try:
            write_scores(run, scores)
        except UserError as error:
            say(f"{error} The next score tries again.")
    return is_best


def write_result(
    run: RunFolder, step: int, evaluation: Evaluation, samples: dict[str, str], say: Callable[[str], None] = print
) -> None:
    """Writes the last evaluation and samples of a finished run. Prints a line if they cannot be written."""
    try:
        write_sealed(run.path / RESULT, {"step": step, "evaluation": evaluation._asdict(), "samples": samples})
    except (OSError, UserError) as error:
        say(f"{run.path / RESULT} cannot be written: {reason_and_remedy(error)}. The checkpoint is whole.")


def read_result(run: RunFolder, step: int) -> tuple[Evaluation, dict[str, str]] | None:
    """Returns the evaluation and the samples that were written after this step; None if there are none in the form that
    this release writes.
    """
    file = run.path / RESULT
    if not file.is_file():
        return None
    try:
        result = unsealed(file.read_bytes(), file)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in result["evaluation"].items()
        }
        return (Evaluation(**values), dict(result["samples"])) if result["step"] == step else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # The run is scored again.
