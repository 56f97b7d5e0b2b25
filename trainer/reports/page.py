"""The parts of an HTML page about runs. A page is one file that loads nothing, so it can be sent and kept."""

import contextlib
import html
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer.errors import UserError, quoted
from trainer.system.storage import Location, Url, reason_and_remedy
from trainer.system.whole import write_whole
from trainer.version import __version__

_HERE = Path(__file__).parent


def page(title: str, body: str) -> str:
    """Returns a whole page."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing may be loaded, and nothing but the script below may run, whatever a sample holds.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}"
        f"<footer>Written by trainer {__version__}.</footer>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def write_page(file: Location, text: str) -> None:
    """Writes a page, or replaces it.

    Raises:
        UserError: it cannot be written.
    """
    if file.is_dir():
        raise UserError(
            f"--html {file} is a folder: name a file in it, after the runs: --html {quoted(file)}/page.html"
        )
    try:
        write_whole(file, text)
    except OSError as error:
        if not isinstance(file, Url):
            with contextlib.suppress(OSError):
                file.with_name(f"{file.name}.partial").unlink()
        raise UserError(f"{file} cannot be written: {reason_and_remedy(error)}.") from None


def section(title: str, content: str) -> str:
    """Returns content below a heading; "" if there is no content."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{content}</section>\n" if content else ""


def cards(entries: Iterable[tuple[str, str, str]]) -> str:
    """Returns figures in large letters: each has a name, a value and a remark."""
    shown = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(remark)}</small></dd></div>\n"
        for name, value, remark in entries
    )
    return f'<dl class="cards">\n{shown}</dl>\n'


def warnings(lines: Sequence[str]) -> str:
    """Returns a box with warnings; "" if there are none."""
    return f'<div class="warnings">{"".join(f"<p>{html.escape(line)}</p>" for line in lines)}</div>\n' if lines else ""


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False, best: Sequence[int | None] = ()
) -> str:
    """Returns a table.

    Args:
        heads: the heads of the columns.
        rows: the cells of each row; the first names the row.
        numbers: whether the other cells are numbers, which are aligned at the right.
        best: for each row the number of the cell that is emphasized.
    """
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    body = ""
    for row, marked in itertools.zip_longest(rows, best):
        cells = "".join(
            f"<td{' class=best' if i == marked else ''}>{html.escape(each)}</td>" for i, each in enumerate(row[1:], 1)
        )
        body += f"<tr><th>{html.escape(row[0])}</th>{cells}</tr>\n"
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'


def texts(entries: Iterable[tuple[str, str, str, int | None]]) -> str:
    """Returns texts side by side: each has a title, a remark, the text, and the number of its color or None."""
    shown = "".join(
        f"<div><h4>{html.escape(title)}{f' <span>{html.escape(remark)}</span>' if remark else ''}</h4>"
        f'<blockquote dir="auto"{"" if color is None else f" class=c{color}"}>{html.escape(text)}</blockquote></div>\n'
        for title, remark, text, color in entries
    )
    return f'<div class="texts">\n{shown}</div>\n'


def folded(summary: str, content: str, is_open: bool = False) -> str:
    """Returns content that is shown after a click on its summary."""
    return f"<details{' open' if is_open else ''}><summary>{html.escape(summary)}</summary>\n{content}</details>\n"
