"""Laws of the tutorial: the notebook is the page with what its programs print.

tests/test_snippets.py runs the page, and so the cells of the notebook, from top to bottom, with configs of tiny models.
"""

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))


def program() -> Any:
    """scripts/notebook.py as a module."""
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "scripts/notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_has_the_cells_of_the_page():
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
    assert cells == program().cells_of(PAGE), "write it again: scripts/notebook.py docs/tutorial.md"
    assert [text for kind, text in cells if kind == "code"] == re.findall(r"^```python\n(.*?)\n```$", PAGE, re.M | re.S)


def test_the_notebook_is_of_nbformat_4_5_and_each_program_in_it_has_printed():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", id) for id in ids)
    programs = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in programs] == list(range(1, len(programs) + 1))
    for cell in programs:
        ast.parse("".join(cell["source"]))  # No magics, so that it also runs as a program.
        (output,) = cell["outputs"]
        assert (output["output_type"], output["name"]) == ("stream", "stdout") and "".join(output["text"]).strip()


def test_a_page_becomes_cells_and_what_they_print(capsys):
    notebook = program()
    page = "# A\n\nText.\n\n```python\nx = 1\n\nprint(x)\n```\n\n```text\nnot run\n```\n\n```python\nx += 1\n```\n"
    cells = notebook.cells_of(page)
    assert cells == [
        ("markdown", "# A\n\nText."),
        ("code", "x = 1\n\nprint(x)"),
        ("markdown", "```text\nnot run\n```"),
        ("code", "x += 1"),
    ]
    printed = notebook.run(cells)
    assert printed == ["", "1\n", "", ""] and capsys.readouterr().out == "1\n"
    assert [cell.get("outputs") for cell in notebook.notebook_of(cells, printed)["cells"]] == [
        None,
        [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}],
        None,
        [],
    ]
