"""The page of a report about a run."""

import html
from collections.abc import Sequence

from trainer.monitoring import tags
from trainer.reports.charts import Line, chart, number, short
from trainer.reports.history import History, Sample
from trainer.reports.list_runs import short_time
from trainer.reports.page import cards, folded, page, section, table, texts, warnings
from trainer.reports.summary import by_step, facts, loss_lines, remarks, setting
from trainer.runs.parentage import describe_history

# A page shows at most this many steps of samples, evenly spread, and the newest.
MAX_SAMPLE_STEPS = 24


def report_page(history: History) -> str:
    """Returns a report about a run as a page."""
    what = facts(history)
    lines = "".join(f'<p class="soft">{html.escape(what[name])}</p>\n' for name in ("model", "text", "computed"))
    body = (
        f'<header><h1>{html.escape(history.name)} <span class="state">{html.escape(history.state)}</span></h1>\n{lines}'
        f"</header>\n{cards(_figures(history))}{warnings(remarks(history))}"
        f'<div class="charts">\n{_charts(history)}</div>\n'
        + section("Samples", _samples(history.samples))
        + section("Scores on the validation text", _scores(history))
        + section("Settings that are not the defaults", _settings(history))
        + section("Where it comes from", _origin(history))
    )
    return page(history.name, body)


def _figures(history: History) -> list[tuple[str, str, str]]:
    total = history.run.total_steps
    done = f"of {total:,}" if total else ""
    figures = []
    if history.result is not None:
        bits = f"{history.result.bits_per_byte:.3f} bits per byte"
        excess = "" if history.result.excess is None else f", {history.result.excess:+.4f} above the text's entropy"
        figures.append(("final validation loss", f"{history.result.loss:.4f}", f"nats per token, {bits}{excess}"))
    if history.best_step is not None and (history.result is None or history.best_step < history.step):
        best = f"{history.scores[history.best_step]:.4f}"
        figures.append(("lowest validation loss", best, f"nats per token, at step {history.best_step:,}"))
    figures.append(("steps", f"{history.step:,}", done))
    seen = f"of a text of {short(history.num_tokens)}" if history.num_tokens else ""
    figures.append(("tokens seen", short(history.tokens_at(history.step)), seen))
    if history.train.secs:
        shares = history.goodput()
        figures.append(
            ("time", short_time(history.train.secs), f"{shares['computing']:.1%} of it computing" if shares else "")
        )
    speeds = sorted(dot.value for dot in history.curve(tags.TOKENS_PER_SEC_OVERALL))
    if speeds:
        figures.append(("tokens per second", f"{speeds[len(speeds) // 2]:,.0f}", "median, with all pauses"))
    return figures


def _charts(history: History) -> str:
    speeds = [
        Line("in steps", by_step(history.curve(tags.TOKENS_PER_SEC_IN_STEPS)), 0),
        Line("overall", by_step(history.curve(tags.TOKENS_PER_SEC_OVERALL)), 2),
    ]
    rate = [Line("learning rate", by_step(history.curve(tags.LEARNING_RATE)), 0)]
    norm = [Line("before clipping", by_step(history.curve(tags.GRAD_NORM)), 0)]
    return (
        chart("Loss", loss_lines(history), "step", "nats per token", may_be_log=True, is_large=True)
        + chart("Learning rate", rate, "step", from_zero=True)
        + chart("Gradient norm", norm, "step", may_be_log=True)
        + chart("Speed", speeds, "step", "tokens per second", from_zero=True)
    )


def _samples(samples: Sequence[Sample]) -> str:
    steps = sorted({sample.step for sample in samples})
    kept = set(spread(steps, MAX_SAMPLE_STEPS))
    parts = []
    for step in sorted(kept, reverse=True):
        entries = [(each.decoder, each.remark, each.text, None) for each in samples if each.step == step]
        parts.append(folded(f"step {step:,}", texts(entries), is_open=step == steps[-1]))
    return "".join(parts)


def spread(steps: Sequence[int], most: int) -> list[int]:
    """Returns at most this many of the steps, evenly spread, with the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _scores(history: History) -> str:
    bits = {dot.step: dot.value for dot in history.bits_per_byte()}
    rows = [
        (f"{dot.step:,}", short(history.tokens_at(dot.step)), f"{dot.value:.4f}", number(bits.get(dot.step, 0.0)))
        for dot in history.curve(tags.LOSS, "validation")
    ]
    if not rows:
        return ""
    heads = ("step", "tokens seen", "nats per token", "bits per byte")
    best = min(range(len(rows)), key=lambda i: float(rows[i][2]))
    marks = [2 if i == best else None for i in range(len(rows))]
    return folded(f"{len(rows)} scores", table(heads, rows, numbers=True, best=marks))


def _settings(history: History) -> str:
    rows = [(key, setting(value), setting(default)) for key, value, default in history.differing()]
    whole = f"<pre><code>{html.escape(history.config.to_toml())}</code></pre>\n"
    return table(("setting", "value", "default"), rows) + folded("config.toml, with every default", whole)


def _origin(history: History) -> str:
    lines = "".join(f"<li>{html.escape(line)}</li>\n" for line in describe_history(history.run))
    return f"<ul>\n{lines}</ul>\n" if lines else ""
