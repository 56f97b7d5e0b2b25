#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/venv_python" "$0" "$@"'
"""Runs the programs of a page from top to bottom, and writes the page as a notebook with what they print.

    scripts/notebook.py docs/tutorial.md

writes docs/tutorial.ipynb. It runs in an empty folder, so it trains again.
"""

import argparse
import contextlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any


def cells_of(page: str) -> list[tuple[str, str]]:
    """Returns the cells of a page: ("code", a block of Python) or ("markdown", what stands before or after one)."""
    parts = re.split(r"^```python\n(.*?)\n```$", page, flags=re.M | re.S)
    kinds = ("markdown", "code")
    cells = [(kinds[i % 2], part.strip("\n")) for i, part in enumerate(parts)]
    return [(kind, text) for kind, text in cells if text]


def notebook_of(cells: list[tuple[str, str]], printed: list[str]) -> dict[str, Any]:
    """Returns a notebook of nbformat 4.5.

    Args:
        cells: what `cells_of` returns.
        printed: what each cell printed; "" for Markdown.
    """
    written: list[dict[str, Any]] = []
    for i, ((kind, text), output) in enumerate(zip(cells, printed, strict=True)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{i:02d}", "metadata": {}, "source": _lines(text)}
        if kind == "code":
            outputs = [{"name": "stdout", "output_type": "stream", "text": _lines(output)}] if output else []
            number = sum(each[0] == "code" for each in cells[: i + 1])
            cell |= {"execution_count": number, "outputs": outputs}
        written.append(cell)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": written, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def run(cells: list[tuple[str, str]]) -> list[str]:
    """Runs the code of all cells in one namespace, and returns what each printed."""
    namespace: dict[str, Any] = {}
    printed = []
    for kind, text in cells:
        output = io.StringIO()
        if kind == "code":
            with contextlib.redirect_stdout(output):
                exec(text, namespace)
        printed.append(output.getvalue())
        print(output.getvalue(), end="", flush=True)
    return printed


def main() -> None:
    """Writes the notebook of the page that is named on the command line."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, metavar="PAGE.md")
    page = parser.parse_args().page.resolve()
    cells = cells_of(page.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        printed = run(cells)
    notebook = json.dumps(notebook_of(cells, printed), indent=1, ensure_ascii=False)
    page.with_suffix(".ipynb").write_text(f"{notebook}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
