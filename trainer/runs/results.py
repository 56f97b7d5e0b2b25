"""The results of a run: scores.json has the validation losses so far, result.json the last evaluation and samples."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.distributed.workers import Workers
from trainer.errors import UserError, quoted
from trainer.runs.run_folder import RESULT, SCORES, CheckpointStep, RunFolder
from trainer.scoring.score import Score
from trainer.system.manifest import DamagedError, unsealed, write_sealed
from trainer.system.storage import reason_and_remedy

if TYPE_CHECKING:
    from trainer.runs.checkpoint import Checkpoints


class Evaluation(NamedTuple):
    """The score of a model on the validation text.

    Attributes:
        loss: nats per scored token. The ends of documents are scored, too.
        num_tokens: the number of scored tokens.
        bits_per_byte: the sum of the losses in bits, divided by the bytes of the original text that the scored tokens
            stand for. The end of a document costs bits but has no bytes, so the same documents have the same bytes with
            every tokenizer. If only a part of the text is scored, or lines mode cuts it, only the bytes of that part
            count.
        is_lossy: whether bits_per_byte is about less than the text: the tokenizer loses some of it, it has [UNK]
            tokens, or lines mode cuts it.
        excess: nats per scored token above the text's own entropy. None if the entropy is unknown: it is known only for
            the storybook, if every story was scored whole.
        losses: the loss of each source that data.weights mixes.
        cut_share: the share of the validation tokens that lines mode cuts off.
        sets: the score of each text of evaluation.sets, by its name.
        raw_loss: the loss of the weights themselves, if everything else is about their average; otherwise None.
    """

    loss: float
    num_tokens: int
    bits_per_byte: float
    is_lossy: bool
    excess: float | None
    losses: tuple[float, ...] = ()
    cut_share: float = 0.0
    sets: dict[str, Score] = {}  # noqa: RUF012 (nothing changes it)
    raw_loss: float | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    def figures(self) -> dict[str, Any]:
        """Returns the figures by name, as JSON can hold them; None if a figure is not known or not a number."""
        values = {"loss": self.loss, "perplexity": self.perplexity, **self._asdict()}
        values["sets"] = {name: score.figures() for name, score in self.sets.items()}
        is_number = {name: not isinstance(value, float) or math.isfinite(value) for name, value in values.items()}
        return {name: value if is_number[name] else None for name, value in values.items()}

    def __str__(self) -> str:
        lossy = ""
        if self.is_lossy:
            uncut = f", of the {1 - self.cut_share:.1%} that is not cut" if self.cut_share else ""
            lossy = f" (of what the tokenizer keeps{uncut})"
        parts = [
            f"loss {self.loss:.4f} nats per token",
            f"perplexity {self.perplexity:.2f}",
            f"{self.bits_per_byte:.3f} bits per byte{lossy}",
        ]
        if self.excess is not None:
            parts.append(f"{self.excess:+.4f} nats per token above the text's own entropy")
        if self.raw_loss is not None:
            parts.append(f"without the average of the weights {self.raw_loss:.4f}")
        if self.losses:
            parts.append("by source " + ", ".join(f"{loss:.4f}" for loss in self.losses))
        return ", ".join(parts) + f" ({self.num_tokens:,} tokens)"


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


def scores_to_keep(checkpoints: "Checkpoints", step: int, from_step: CheckpointStep | None) -> dict[int, float]:
    """Returns the validation losses that a process which goes on from a step has to keep.

    A process that was killed may have scored steps after its last checkpoint: they are taken and scored again. But if
    the user has chosen an earlier checkpoint, the losses of the later checkpoints that can be used are kept.

    Args:
        checkpoints: the run's checkpoints, with the losses so far.
        step: the step of the checkpoint to go on from; 0 if there is none.
        from_step: the checkpoint that the user has chosen; None: the newest.
    """
    later = () if from_step is None else checkpoints.usable_steps(at for at in checkpoints.scores if at > step)
    return {at: loss for at, loss in checkpoints.scores.items() if at <= step or at in later}


def record_score(
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
        sets = {name: score.figures() | score._asdict() for name, score in evaluation.sets.items()}
        values = evaluation._asdict() | {"sets": sets}
        write_sealed(run.path / RESULT, {"step": step, "evaluation": values, "samples": samples})
    except (OSError, UserError) as error:
        say(f"{run.path / RESULT} cannot be written: {reason_and_remedy(error)}. The checkpoint is whole.")


def read_result(run: RunFolder, step: int) -> tuple[Evaluation, dict[str, str]] | None:
    """Returns the evaluation and the samples that were written after this step; None if there are none in the form that
    this release writes, or if the evaluation has other sets than the run's config.
    """
    file = run.path / RESULT
    if not file.is_file():
        return None
    try:
        result = unsealed(file.read_bytes(), file)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in result["evaluation"].items()
        }
        sets = {
            name: Score._make(figures[field] for field in Score._fields)
            for name, figures in values.pop("sets", {}).items()
        }
        is_of_run = result["step"] == step and sets.keys() == run.config.evaluation.sets.keys()
        return (Evaluation(**values, sets=sets), dict(result["samples"])) if is_of_run else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # The run is scored again.
