"""TensorBoard as a person sees it: its pages in a browser without a window.

Chromium comes from the system's packages, as in `apt-get install chromium`; without one, these tests are skipped.
"""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from test_monitor import SCORE, interval  # type: ignore[import-not-found]
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from board import served
from browser import Browser, find_chromium, opened_browser
from trainer.model.build import build_gpt
from trainer.monitoring.events import Histogram
from trainer.monitoring.monitor import Monitor

OpenTab = Callable[[str], Browser]

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]

SAMPLE = "once upon a *time* <b>there</b> was a `cat`"


def write_run(folder: Path, name: str, rate: float) -> None:
    """Writes the logs of a run of 30 steps, in whose middle it was stopped and resumed."""
    config = tiny_config(
        "runs", f"run_folder=runs/{name}", train={"total_steps": 30}, optimizer={"learning_rate": rate}
    )
    for first in (0, 20):
        watched = Monitor(
            folder / name / "logs", config, first, 30, 0.5, False, io.StringIO(), model=build_gpt(config, 20, 2)
        )
        with watched.running():
            for step in range(first + 2, first + 22 if first == 0 else 31, 2):
                watched.interval(step, interval(loss=3 - step / 20))
                watched.evaluation(step, SCORE._replace(loss=3.25 - step / 20))
                watched.histograms(step, {"weights/kernel": Histogram(-1.0, float(step), np.arange(30))})
            watched.samples(step, {"greedy": SAMPLE})


@pytest.fixture(scope="module")
def open_tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenTab]:
    """A function that opens a tab of TensorBoard with two runs."""
    logs = tmp_path_factory.mktemp("runs")
    write_run(logs, "one", 0.125)
    write_run(logs, "two", 0.25)
    assert CHROMIUM is not None
    with served(logs) as address, opened_browser(CHROMIUM) as browser:
        browser.resize(1400, 1000)

        def open_page(tab: str) -> Browser:
            browser.open(f"{address}#{tab}")
            return browser

        yield open_page


def test_curves_are_in_groups_and_a_chart_has_training_and_validation_of_all_runs(open_tab: OpenTab):
    browser = open_tab("timeseries")
    shown = browser.wait_for_text("/nats_per_token", "/perplexity", "5.7546")
    assert {"health", "loss", "optimizer", "speed", "weights"} <= {*shown.split("\n")}
    chart = shown.partition("/nats_per_token")[2].partition("/perplexity")[0]  # The legend is a table.
    for name, value in (("train", "1.5"), ("validation", "1.75")):
        for run in ("one", "two"):
            assert re.search(rf"^{run}/logs/{name}\n[0-9.]+\n{value}\n30$", chart, re.M), chart


def test_the_layout_puts_curves_together(open_tab: OpenTab):
    browser = open_tab("custom_scalars")
    titles = "loss, nats per token", "perplexity", "bits per byte", "tokens per second", "norm of the gradients"
    browser.wait_for_text(*titles, "Matches (4)")


def test_samples_are_shown_as_they_are(open_tab: OpenTab):
    browser = open_tab("text")
    shown = browser.wait_for_text("text/config", "text/samples/greedy", SAMPLE)
    assert "learning_rate = 0.125" in shown


def test_hparams_has_a_row_for_each_run_with_what_differs_first_and_its_figures(open_tab: OpenTab):
    browser = open_tab("hparams")
    shown = browser.wait_for_text("runs/one", "runs/two", "0.12500").split("\n")
    assert shown.count("runs/one") == 1  # Though it was resumed.
    table = shown[shown.index("Trial ID") :]
    assert table[2] == "optimizer.learning_rate"
    figures = ["loss/bits_per_byte", "loss/excess_nats_per_token", "loss/nats_per_token", "loss/perplexity"]
    first = table.index(figures[0])
    assert table[first : first + 5] == [*figures, "speed/mean_tokens_per_sec_in_steps"]
    for name, rate in (("runs/one", "0.12500"), ("runs/two", "0.25000")):
        row = table[table.index(name) :][: first - 1 + 5]
        assert row[1] == rate and row[-5:] == ["1.5000", "0.25000", "1.7500", "5.7546", "1.0000e+6"]


def test_histograms_are_drawn(open_tab: OpenTab):
    browser = open_tab("histograms")
    browser.wait_for_text("weights/kernel", "one/logs/train")
    browser.wait_for("[...all(document)].filter(e => e.localName === 'path' && e.getAttribute('d')).length > 20")


def test_the_graph_shows_the_layers(open_tab: OpenTab):
    browser = open_tab("graphs")
    browser.wait_for_text("token_embed", "block_0", "unembed", "logits")  # A long name is cut.
