#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Takes the pictures of TensorBoard that the documents show.

    scripts/screenshots/take.py

trains three small runs, which takes some minutes, opens TensorBoard in Chromium without a window
(`apt-get install chromium`), and writes the pictures into docs/images/, with the hash of what they are drawn from.
`--runs FOLDER` takes the pictures of runs that are there already, or trains them there.
"""

import argparse
import ast
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from board import served
from browser import Browser, find_chromium, opened_browser

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
HASH = IMAGES / "drawn_from.txt"

# What decides which curves, charts, tables and boxes there are.
DRAWN_FROM = [ROOT / "trainer" / "monitoring" / f"{name}.py" for name in ("tags", "layout", "hparams", "graph")]

# By the name of the run: its settings.
RUNS = {
    "quickstart": (),
    "rate-0.0005": ("optimizer.learning_rate=0.0005",),
    "single-layer": ("model.num_layers=1",),
}
SETTINGS = (
    "train.total_steps=300",
    "log.every_steps=5",
    "log.histograms_every_steps=25",
    "evaluation.every_steps=20",
    "evaluation.num_batches=2",
    "samples.every_steps=150",
    "samples.num_tokens=60",
)


class Picture(NamedTuple):
    """A picture of a page.

    Attributes:
        name: the name of its file, without the ending.
        page: the address of the page, after that of the server.
        texts: what the page shows when all of it is there.
        height: pixels.
        before: expressions of JavaScript for elements to click on, one after the other.
    """

    name: str
    page: str
    texts: tuple[str, ...]
    height: int = 700
    before: tuple[str, ...] = ()


WIDTH = 1400

CLOSE_SETTINGS = "[...all(document)].find(e => e.localName === 'button' && e.innerText.trim() === 'Settings')"

# Settings that are equal in all runs, and would leave no room for the figures.
HIDE = tuple(
    f"[...all(document)].find(e => e.localName === 'paper-checkbox' && e.innerText.trim() === '{name}')"
    for name in ("data.train", "model.activation", "model.document_mask")
)

PICTURES = (
    Picture(
        "time_series",
        "?runFilter=quickstart&tagFilter=loss/(nats|perp)&smoothing=0#timeseries",
        ("/perplexity", "300"),
        620,
        (CLOSE_SETTINGS,),
    ),
    Picture("custom_scalars", "#custom_scalars&_smoothingWeight=0", ("norm of the gradients", "Matches (6)"), 900),
    Picture("hparams", "#hparams", ("single-layer", "0.00050000"), 340, HIDE),
    Picture("histograms", "#histograms&regexInput=quickstart&tagFilter=query_key_value", ("query_key_value",), 620),
    Picture("graph", "#graphs", ("block_1", "logits"), 760),
    Picture("text", "#text&regexInput=quickstart&tagFilter=greedy|top-p", ("text/samples/greedy",), 620),
)


def hash_of_what_is_drawn() -> str:
    """Returns a hash of the code that decides what the pictures show; comments and docstrings do not count."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in DRAWN_FROM]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
    drawn = [ast.unparse(tree) for tree in trees] + [repr((PICTURES, RUNS, SETTINGS, WIDTH))]
    return hashlib.sha256("\0".join(drawn).encode()).hexdigest()


def train(runs: Path) -> None:
    """Trains the runs that are not there yet."""
    for name, settings in RUNS.items():
        if not (runs / name).exists():
            words = ["train", "quickstart", f"run_folder={runs.name}/{name}", *SETTINGS, *settings]
            subprocess.run([sys.executable, "-m", "trainer", *words], cwd=runs.parent, check=True)


def take(browser: Browser, address: str, picture: Picture) -> None:
    """Opens a page and writes its picture."""
    browser.resize(WIDTH, picture.height)
    browser.open(address + picture.page)
    browser.wait_for_text(*picture.texts)
    for element in picture.before:
        browser.click(element)
    time.sleep(5)  # Curves and boxes move into place.
    browser.picture(IMAGES / f"{picture.name}.png")


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="a folder runs/ with the runs; by default they are trained anew")
    runs = parser.parse_args().runs
    program = find_chromium()
    if program is None:
        sys.exit("There is no Chromium on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        runs = (runs or Path(folder) / "runs").resolve()
        runs.mkdir(exist_ok=True, parents=True)
        train(runs)
        IMAGES.mkdir(exist_ok=True)
        with served(runs) as address, opened_browser(program) as browser:
            for picture in PICTURES:
                take(browser, address, picture)
                print(IMAGES / f"{picture.name}.png")
    HASH.write_text(hash_of_what_is_drawn() + "\n")


if __name__ == "__main__":
    main()
