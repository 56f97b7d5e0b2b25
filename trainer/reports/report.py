"""A report about a run: on the terminal, or as a page. TensorFlow is not loaded."""

import sys

import rich.table
import rich.text

from trainer.reports.charts import text_chart
from trainer.reports.history import History, read_history
from trainer.reports.page import write_page
from trainer.reports.report_page import report_page
from trainer.reports.summary import facts, loss_lines, remarks, scores
from trainer.runs.parentage import describe_history
from trainer.system.storage import Location, locate
from trainer.system.terminal import console, encodes, printable, say

REPORT = "report.html"


def report(path: str, page_file: str | None, as_page: bool) -> None:
    """Prints a report about a run, or writes it as a page.

    Args:
        path: the run's folder.
        page_file: the page's file; None: report.html in the run's folder.
        as_page: whether to write a page.

    Raises:
        UserError: the folder holds no run, or the page cannot be written.
    """
    history = read_history(path)
    if not as_page:
        _print(history)
        return
    file: Location = history.run.path / REPORT if page_file is None else locate(page_file)
    write_page(file, report_page(history))
    say(str(file))


def _print(history: History) -> None:
    screen = console(sys.stdout)
    width = min(screen.width, 120)
    is_ascii = not encodes(sys.stdout)
    screen.print(rich.text.Text(printable(history.name), "bold"))
    grid = rich.table.Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in {**facts(history), **scores(history)}.items():
        grid.add_row(name, rich.text.Text(printable(value)))
    for line in describe_history(history.run):
        grid.add_row("from", rich.text.Text(printable(line)))
    for line in remarks(history):
        grid.add_row("note", rich.text.Text(printable(line)))
    screen.print(grid)
    lines = text_chart(loss_lines(history), width, is_ascii=is_ascii)
    if lines:
        dot = "x" if is_ascii else "●"
        print(f"\nloss in nats per token by step: a line for training, {dot} for validation")
        print("\n".join(lines))
    newest = history.samples[-1].step if history.samples else None
    for sample in (each for each in history.samples if each.step == newest):
        say(f"\n{sample.decoder}, step {sample.step}{f' ({sample.remark})' if sample.remark else ''}:\n{sample.text}")
