"""Shows runs side by side: on the terminal, or as a page. TensorFlow is not loaded."""

import html
import sys
from collections.abc import Sequence

import rich.box
import rich.table
import rich.text

from trainer.errors import UserError
from trainer.monitoring import tags
from trainer.reports.charts import NUM_COLORS, Line, Points, chart, marks_of, short, text_chart
from trainer.reports.comparison import Comparison, compare, differing_settings
from trainer.reports.history import History, Sample, read_history
from trainer.reports.list_runs import short_time
from trainer.reports.page import folded, page, section, table, texts, warnings, write_page
from trainer.reports.summary import by_step, setting
from trainer.system.storage import locate
from trainer.system.terminal import console, encodes, printable, say

PAGE = "compare.html"


def compare_runs(paths: Sequence[str], page_file: str | None, as_page: bool) -> None:
    """Prints how runs compare, or writes it as a page.

    Args:
        paths: the folders of at least two runs.
        page_file: the page's file; None: compare.html in the working directory.
        as_page: whether to write a page.

    Raises:
        UserError: there are not two different runs, or the page cannot be written.
    """
    if len(paths) < 2:
        raise UserError(f"{' '.join(paths)}: compare needs at least two runs; trainer runs lists them.")
    histories = [read_history(path) for path in paths]
    names = [history.name for history in histories]
    if len(set(names)) < len(names):
        raise UserError(f"{' '.join(names)}: a run is named twice; leave it out, or name another.")
    comparison = compare(histories)
    if not as_page:
        _print(comparison)
        return
    file = locate(page_file or PAGE)
    write_page(file, comparison_page(comparison))
    say(str(file))


def short_names(histories: Sequence[History]) -> list[str]:
    """Returns the names of runs without the folder that all of them are in."""
    names = [history.name for history in histories]
    parents = {name.rpartition("/")[0] for name in names}
    return [name.rpartition("/")[2] for name in names] if len(parents) == 1 else names


def verdict(comparison: Comparison) -> str:
    """Returns which run has the lowest final score, or why that is not said."""
    names, winner = short_names(comparison.histories), comparison.winner()
    if winner is not None:
        best, ahead = winner
        limits = "; the notes limit what that means" if comparison.notes else ""
        return f"{names[best]} has the lowest final loss, by {ahead:.4f} {comparison.unit}{limits}."
    if not comparison.is_fair:
        are = "may be" if comparison.is_uncertain else "are"
        return f"No run is called the best: they {are} scored on different texts."
    unfinished = [name for name, each in zip(names, comparison.histories, strict=True) if each.result is None]
    if unfinished:
        return f"No run is called the best yet, because not all are finished: {', '.join(unfinished)}."
    diverged = [name for name, each in zip(names, comparison.histories, strict=True) if comparison.final(each) is None]
    if diverged:
        return f"No run is called the best, because a final loss is not a number: {', '.join(diverged)}."
    return "The final losses are equal."


def score_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Returns the rows of a table of the runs' figures."""
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, values: Sequence[str | None]) -> None:
        if any(values):
            rows.append((name, [value or "" for value in values]))

    each = comparison.histories
    best = [comparison.best(h) for h in each]
    finals = [comparison.final(h) for h in each]
    add("state", [h.state for h in each])
    add("steps", [f"{h.step:,} of {h.run.total_steps:,}" if h.run.total_steps else f"{h.step:,}" for h in each])
    add("tokens seen", [short(h.tokens_at(h.step)) for h in each])
    add("parameters", [None if h.num_parameters is None else f"{h.num_parameters:,}" for h in each])
    add("time", [short_time(h.train.secs) if h.train.secs else None for h in each])
    add("tokens per second", [_speed(h) for h in each])
    add(f"final, {comparison.unit}", [None if value is None else f"{value:.4f}" for value in finals])
    add("lowest while training", [None if dot is None else f"{dot.value:.4f}, step {dot.step:,}" for dot in best])
    if not comparison.by_bits:
        add("final, bits per byte", [None if h.result is None else f"{h.result.bits_per_byte:.4f}" for h in each])
    return rows


def _speed(history: History) -> str | None:
    speeds = sorted(dot.value for dot in history.curve(tags.TOKENS_PER_SEC_OVERALL))
    return f"{speeds[len(speeds) // 2]:,.0f}" if speeds else None


def _print(comparison: Comparison) -> None:
    screen = console(sys.stdout)
    names = short_names(comparison.histories)
    screen.print(_grid(["", *names], score_rows(comparison)))
    say(verdict(comparison))
    for note in comparison.notes:
        say(f"note: {note}")
    rows = [(key, [setting(value) for value in values]) for key, values in differing_settings(comparison.histories)]
    screen.print(_grid(["setting", *names], rows) if rows else "\nAll settings are equal.")
    equal = [(short(x), [f"{value:.4f}" for value in values]) for x, values in comparison.at_equal_amounts()]
    if equal:
        say(f"validation loss in {comparison.unit} after the same {comparison.amount}")
        screen.print(_grid([comparison.amount, *names], equal))
    lines, is_ascii = _validation_lines(comparison), not encodes(sys.stdout)
    if any(line.points for line in lines):
        signs = list(zip(names, marks_of(len(names), is_ascii), strict=True))
        marks = f"a line for {names[0]}; {', '.join(f'{mark} {name}' for name, mark in signs[1:])}"
        say(f"validation loss in {comparison.unit} by {comparison.amount}: {marks}")
        print("\n".join(text_chart(lines, min(screen.width, 120), is_ascii=is_ascii)))
    for decoder, samples in _newest_samples(comparison):
        for name, sample in zip(names, samples, strict=True):
            if sample is not None:
                remark = f" ({sample.remark})" if sample.remark else ""
                say(f"\n{decoder}, {name}, step {sample.step}{remark}:\n{sample.text}")


def _grid(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> rich.table.Table:
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        grid.add_column(rich.text.Text(printable(head)), justify="right" if i else "left", overflow="fold")
    for name, cells in rows:
        grid.add_row(*(rich.text.Text(printable(cell)) for cell in (name, *cells)))
    return grid


def _newest_samples(comparison: Comparison) -> list[tuple[str, list[Sample | None]]]:
    """Returns the newest sample of each run by the decoder, for each decoder of any run."""
    newest = [{sample.decoder: sample for sample in history.samples} for history in comparison.histories]
    decoders = list(dict.fromkeys(name for each in newest for name in each))
    return [(decoder, [each.get(decoder) for each in newest]) for decoder in decoders]


def _validation_lines(comparison: Comparison) -> list[Line]:
    names = short_names(comparison.histories)
    return [
        Line(
            name, [(comparison.seen(h, dot.step), dot.value) for dot in comparison.validation(h)], i % NUM_COLORS, True
        )
        for i, (name, h) in enumerate(zip(names, comparison.histories, strict=True))
    ]


def comparison_page(comparison: Comparison) -> str:
    """Returns the comparison as a page."""
    histories = comparison.histories
    names = short_names(histories)
    winner = comparison.winner()
    scores = score_rows(comparison)
    marks = [winner[0] + 1 if winner and name.startswith("final, ") else None for name, _ in scores]
    equal = [(short(x), *(f"{value:.4f}" for value in values)) for x, values in comparison.at_equal_amounts()]
    times = [(short_time(x), *(f"{value:.4f}" for value in values)) for x, values in comparison.at_equal_time()]
    settings = [(key, *map(setting, values)) for key, values in differing_settings(histories)]
    same = f"Validation loss ({comparison.unit}) after the same {comparison.amount}"
    between = '<p class="soft">A loss between two scores of a run is read off the straight line between them.</p>\n'
    body = (
        f"<header><h1>{html.escape(' / '.join(names))}</h1>\n<p>{html.escape(verdict(comparison))}</p></header>\n"
        + warnings(comparison.notes)
        + section("Scores", table(("", *names), [(name, *cells) for name, cells in scores], True, marks))
        + f'<div class="charts">\n{_charts(comparison)}</div>\n'
        + section(same, table((comparison.amount, *names), equal, True) + between if equal else "")
        + section("The same after equal time of training", table(("time", *names), times, True) if times else "")
        + section("Settings that differ", table(("setting", *names), settings) if settings else "<p>None.</p>\n")
        + section("Samples", _samples(comparison))
    )
    return page(f"{' / '.join(names)}: comparison", body)


def _charts(comparison: Comparison) -> str:
    histories, names = comparison.histories, short_names(comparison.histories)

    def lines(points: Sequence[Points]) -> list[Line]:
        return [Line(name, each, i % NUM_COLORS) for i, (name, each) in enumerate(zip(names, points, strict=True))]

    training = lines([[(comparison.seen(h, dot.step), dot.value) for dot in comparison.training(h)] for h in histories])
    by_time = lines([[(dot.secs / 60, dot.value) for dot in comparison.validation(h)] for h in histories])
    rates = lines([by_step(h.curve(tags.LEARNING_RATE)) for h in histories])
    unit, amount = comparison.unit, comparison.amount
    return (
        chart("Validation loss", _validation_lines(comparison), amount, unit, may_be_log=True, is_large=True)
        + chart("Training loss", training, amount, unit, may_be_log=True)
        + chart("Validation loss by time", by_time, "minutes of training", unit, may_be_log=True)
        + chart("Learning rate", rates, "step", from_zero=True)
    )


def _samples(comparison: Comparison) -> str:
    names = short_names(comparison.histories)
    parts = []
    for i, (decoder, samples) in enumerate(_newest_samples(comparison)):
        found = zip(names, samples, range(len(names)), strict=True)
        entries = [
            (
                name,
                f"step {sample.step:,}{f'; {sample.remark}' if sample.remark else ''}",
                sample.text,
                color % NUM_COLORS,
            )
            for name, sample, color in found
            if sample is not None
        ]
        parts.append(folded(decoder, texts(entries), is_open=i == 0))
    return "".join(parts)
