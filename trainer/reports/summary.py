"""What there is to say about a run in words, for reports and comparisons."""

import json
from collections.abc import Iterable
from typing import Any

from trainer.config.schedule import describe_batch_warmup
from trainer.monitoring import tags
from trainer.monitoring.run_log import Dot
from trainer.reports.charts import Line, short
from trainer.reports.history import History
from trainer.reports.list_runs import short_time


def facts(history: History) -> dict[str, str]:
    """Returns what a run is, by short names."""
    config, run = history.config, history.run
    model, train = config.model, config.train
    size = "" if history.num_parameters is None else f"{history.num_parameters:,} parameters: "
    shape = f"{model.num_layers} layers, {model.num_heads} heads, width {model.hidden_dim}"
    tokens = "" if history.num_tokens is None else f" ({history.num_tokens:,} tokens)"
    release = run.facts.get("tensorflow", "?")
    warmup = describe_batch_warmup(train)
    batch = f"{train.global_batch_size} x {train.sequence_length} = {train.global_batch_size * train.sequence_length:,}"
    return {
        "state": f"{history.state}, step {history.step} of {run.total_steps or '?'}",
        "model": f"{size}{shape}" if run.facts["model"] == "gpt" else f"{size}foreign, {run.facts['model']}",
        "text": f"{', '.join(config.data.train)}{tokens}; tokenizer {config.tokenizer.kind}",
        "steps": f"{batch} tokens each{warmup}; {short(history.tokens_at(history.step))} tokens seen",
        "computed": f"in {train.precision}, devices: {config.distribution.kind}, TensorFlow {release}",
        "time": _time(history),
    }


def _time(history: History) -> str:
    processes = "" if history.train.num_processes < 2 else f" in {history.train.num_processes} processes"
    shares = ", ".join(f"{name} {share:.1%}" for name, share in history.goodput().items())
    return f"{short_time(history.train.secs)}{processes}{f': {shares}' if shares else ''}"


def scores(history: History) -> dict[str, str]:
    """Returns the scores of a run on its validation text, by short names."""
    found = {}
    if history.result is not None:
        found["final"] = str(history.result)
        found |= {name: str(score) for name, score in history.result.sets.items()}
    if history.best_step is not None:
        found["lowest"] = f"loss {history.scores[history.best_step]:.4f} nats per token at step {history.best_step}"
    return found


def remarks(history: History) -> list[str]:
    """Returns what a reader of the curves should know: skipped and repeated steps, and a loss that has risen."""
    lines = []
    skipped = sum(dot.value for dot in history.curve(tags.SKIPPED_STEPS))
    if skipped:
        lines.append(f"{skipped:,.0f} steps were skipped, because their loss or gradient was not finite.")
    lines += [
        f"Steps {back_at + 1} to {at} were taken again: a process ended before it had saved them."
        for at, back_at in history.train.repeated
    ]
    best, newest = history.best_step, max(history.scores, default=None)
    if best is not None and newest is not None and history.scores[newest] > history.scores[best]:
        lines.append(
            f"The validation loss has risen since step {best}, from {history.scores[best]:.4f} to "
            f"{history.scores[newest]:.4f}."
        )
    return lines


def loss_lines(history: History) -> list[Line]:
    """Returns the curves of the training and validation loss: with an average of the weights, also the weights' own."""
    raw = by_step(history.curve(tags.RAW_LOSS, "validation"))
    return [
        Line("training", by_step(history.curve(tags.LOSS)), 0),
        Line("validation", by_step(history.curve(tags.LOSS, "validation")), 1, is_dotted=True),
        *([Line("validation, not averaged", raw, 2, is_dotted=True)] if raw else []),
    ]


def by_step(dots: Iterable[Dot]) -> list[tuple[float, float]]:
    """Returns the points of a curve."""
    return [(dot.step, dot.value) for dot in dots]


def setting(value: Any) -> str:
    """Returns the value of a setting as a config file has it; "none" if it is not set."""
    if value is None:
        return "none"
    return json.dumps(value.model_dump() if hasattr(value, "model_dump") else value, ensure_ascii=False)
