import html.parser
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from tiny_run import prepared_text  # type: ignore[import-not-found]
from watched_run import evaluation_at, finish, loss_at, record, watch  # type: ignore[import-not-found]

from trainer.cli import main
from trainer.reports.charts import MAX_POINTS, Line, chart, make_scale, number, padded, short, text_chart, thinned
from trainer.reports.history import read_history
from trainer.reports.report_page import MAX_SAMPLE_STEPS, spread
from trainer.system.storage import Url, copy_folder

EVIL = "<script>alert('no')</script> & \"quoted\" </blockquote> \x1b[31m 고양이\n  two  blanks\n\n# no *Markdown*"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Reads a page: its elements, and the words of each kind of element. An element that is not closed fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.words.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.words[self._open[-1]][-1] += data

    def lines(self) -> dict[str, dict[str, list[Any]]]:
        """What each chart's script shows: for each chart, in order, the points of each line."""
        plots = [each for _, each in self.elements if "data-lines" in each]
        return {
            title: {line["name"]: line["points"] for line in json.loads(plot["data-lines"] or "")}
            for title, plot in zip((word.strip() for word in self.words["h3"]), plots, strict=True)
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that two processes have trained, with skipped steps, a parent, and samples that would be code."""
    folder = tmp_path_factory.mktemp("report") / "run"
    parent = {"kind": "init", "from": "<b>parent</b>", "step": 7, "changed": []}
    run = record(folder, "optimizer.learning_rate=3e-3", "train.global_batch_size=4", facts={"parents": [parent]})
    watch(run, 0, 24)
    watch(run, 20, 40, skipped=3, sample=EVIL)
    finish(run, sample=EVIL)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    assert main(["report", str(run), "--html"]) == 0
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_a_report_is_one_file_that_loads_nothing(run: Path, page: Page):
    loading = {"src", "href", "srcset", "data", "action", "poster", "style"}
    assert all(loading.isdisjoint(attributes) or set(attributes) == {"style"} for _, attributes in page.elements)
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form"})
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w|@import|url\(|\bfetch\b|XMLHttp", re.sub(r"(?m)^// .*$", "", text))
    (policy,) = [each["content"] for tag, each in page.elements if tag == "meta" and "http-equiv" in each]
    assert policy is not None and policy.startswith("default-src 'none';")
    for svg in re.findall(r"<svg.*?</svg>", text):
        xml.etree.ElementTree.fromstring(svg)
    assert not list(run.glob("*.partial"))


def test_the_words_of_a_sample_are_shown_and_never_run(page: Page):
    assert [tag for tag, _ in page.elements].count("script") == 1
    shown = [word for word in page.words["blockquote"] if "alert" in word]
    # A text of TensorBoard has the escape of a control character in its place.
    assert EVIL.replace("\x1b", "\\x1b") in shown and f"{EVIL} 40".replace("\x1b", "\\x1b") in shown
    assert any("<b>parent</b>" in word for word in page.words["li"]) and "b" not in [
        tag for tag, attributes in page.elements if "parent" in attributes
    ]


def test_the_charts_have_the_values_of_the_curves(run: Path, page: Page):
    lines = page.lines()
    assert list(lines) == ["Loss", "Learning rate", "Gradient norm", "Speed"]
    loss, rate, norm, speed = lines.values()
    steps = range(2, 41, 2)
    assert [point[2:] for point in loss["training"]] == [[f"{step}", f"{loss_at(step):.5g}"] for step in steps]
    assert [point[2:] for point in loss["validation"]] == [
        [f"{step}", f"{evaluation_at(step).loss:.5g}"] for step in (10, 20, 30, 40)
    ]
    assert [point[3] for point in rate["learning rate"]][:5] == ["0.0002", "0.0004", "0.0006", "0.0008", "0.001"]
    assert norm["before clipping"][0][3] == "26" and {point[3] for point in speed["overall"]} == {"800"}
    # Higher values are higher on the page, and later steps further to the right.
    for points in loss.values():
        assert [p[0] for p in points] == sorted(p[0] for p in points)
        assert [p[1] for p in points] == sorted(p[1] for p in points)


def test_a_report_has_scores_settings_samples_and_what_went_wrong(page: Page, run: Path):
    text = " ".join(word for words in page.words.values() for word in words)
    final = evaluation_at(40).loss
    assert f"{final:.4f}" in text and "3 steps were skipped" in text
    assert "Steps 21 to 24 were taken again" in text
    assert {"optimizer.learning_rate", "train.total_steps"} <= set(page.words["th"])
    assert "optimizer.beta_2" not in page.words["th"]
    assert "0.003" in page.words["td"] and "0.001" in page.words["td"]
    assert [word for word in page.words["summary"] if word.startswith("step ")] == [
        "step 40", "step 30", "step 20", "step 10",
    ]  # fmt: skip


def test_a_report_on_the_terminal_fits_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    above, _, samples = shown.partition("\ngreedy, step 40")
    assert max(map(len, above.splitlines())) <= 80 and "\x1b" not in shown
    for part in (
        "finished, step 40 of 40",
        f"loss {evaluation_at(40).loss:.4f} nats per token",
        "note",
        "in 2 processes",
    ):
        assert part in above
    assert "computing 78.4%, waiting for batches 1.6%" in " ".join(above.split()) and "●" in above
    assert "<script>alert('no')</script>" in samples


def test_a_run_without_a_step_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record(tmp_path / "run", "train.total_steps=none", "train.num_epochs=1")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "stopped, step 0 of ?" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run"), "--html", str(tmp_path / "page.html")]) == 0
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert main(["report", str(tmp_path), "--html"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--html", str(tmp_path / "nowhere/page.html")]) == 2
    assert "nowhere/page.html cannot be written" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--html", str(tmp_path)]) == 2
    assert f"is a folder: name a file in it, after the runs: --html {tmp_path}/page.html" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--html", str(tmp_path / "page.html/x.html")]) == 2
    assert "page.html/x.html cannot be written: Not a directory" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.partial"))


def test_tokens_of_a_fork_include_those_of_its_parents(tmp_path: Path):
    changed = ["train.global_batch_size=8 (was 4)", "optimizer.beta_2=0.9 (was 0.999)"]
    parents = [
        {"kind": "fork", "from": "b", "step": 30, "changed": changed},
        {"kind": "fork", "from": "a", "step": 10, "changed": ["train.sequence_length=16 (was 8)"]},
        {"kind": "init", "from": "c", "step": 99, "changed": []},
    ]
    overrides = ("train.global_batch_size=8", "train.sequence_length=16")
    history = read_history(str(record(tmp_path / "run", *overrides, facts={"parents": parents}).path))
    seen = [history.tokens_at(step) for step in (0, 5, 10, 20, 30, 31)]
    assert seen == [0, 5 * 4 * 8, 320, 320 + 10 * 4 * 16, 320 + 20 * 4 * 16, 320 + 20 * 64 + 8 * 16]


def test_tokens_of_a_batch_warm_up_are_those_of_its_batches(tmp_path: Path):
    parents = [{"kind": "fork", "from": "a", "step": 30, "changed": ["train.batch_warmup={'40': 3} (was {'10': 2})"]}]
    sizes = ("train.global_batch_size=4", "train.batch_warmup.40=3")
    overrides = ("train.total_steps=50", "train.sequence_length=8", *sizes)
    history = read_history(str(record(tmp_path / "run", *overrides, facts={"parents": parents}).path))
    seen = [history.tokens_at(step) / 8 for step in (0, 10, 30, 40, 50)]
    assert seen == [0, 20, 20 + 80, 20 + 80 + 30, 20 + 80 + 30 + 40]
    alone = read_history(str(record(tmp_path / "alone", *overrides).path))
    assert [alone.tokens_at(step) / 8 for step in (0, 40, 50)] == [0, 120, 160]


def test_tokens_do_not_count_padding_while_the_prepared_data_are_there(tmp_path: Path):
    prepared = prepared_text(tmp_path, "the cat\nsat on the mat\n" * 30)
    facts = {"data_fingerprint": prepared.fingerprint, "prepared_folder": str(prepared.folder)}
    settings = ("train.global_batch_size=2", "train.sequence_length=64")
    packed = read_history(str(record(tmp_path / "packed", *settings, facts=facts).path))
    lines = read_history(str(record(tmp_path / "lines", *settings, "data.mode=lines", facts=facts).path))
    split = prepared.split("train")
    assert packed.num_tokens == lines.num_tokens == split.num_tokens
    assert packed.bytes_per_token == split.num_bytes / split.num_tokens
    assert packed.tokens_per_step == 128 and lines.tokens_per_step == min(
        128, 2 * split.num_tokens / split.num_documents
    )


def test_a_run_in_a_store_has_a_report(run: Path, capsys: pytest.CaptureFixture[str]):
    url = Url("ram://reported/run")
    copy_folder(run, url)
    assert main(["report", str(url), "--html"]) == 0
    assert capsys.readouterr().out == "ram://reported/run/report.html\n"
    there, here = (Page((folder / "report.html").read_text(encoding="utf-8")) for folder in (url, run))
    assert there.lines() == here.lines()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_shows_the_values_under_the_pointer(run: Path, page: Page, tmp_path: Path):
    text = (run / "report.html").read_text(encoding="utf-8")
    moved = (
        "const box = document.querySelector('.plot').getBoundingClientRect();"
        "document.querySelector('.plot').dispatchEvent("
        "new PointerEvent('pointermove', {clientX: box.left + box.width * 0.49}));"
    )
    (tmp_path / "moved.html").write_text(text.replace("</script>", f"{moved}</script>"), encoding="utf-8")
    command = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        str(tmp_path / "moved.html"),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (tip,) = re.findall(r'<div class="tip".*?</div>', shown)
    assert "step 20<br>" in tip and f"{loss_at(20):.5g}" in tip and f"{evaluation_at(20).loss:.5g}" in tip


def test_scales_have_round_ticks_within_their_values():
    assert make_scale([1, 300]).ticks == [50, 100, 150, 200, 250, 300]
    assert make_scale([0.0001, 0.0045], from_zero=True).ticks == [0, 0.001, 0.002, 0.003, 0.004]
    loss = make_scale([0.6, 7.4], may_be_log=True)
    assert loss.is_log and loss.ticks == [1, 2, 3, 5] and loss.place(0.6) == 0 and loss.place(7.4) == 1
    assert not make_scale([1.6, 7.4], may_be_log=True).is_log and make_scale([2.0]).ticks == [1.8, 1.9, 2.0, 2.1, 2.2]
    assert make_scale([-1.0, 9.0], may_be_log=True).low == -1
    wide = padded(make_scale([0.0, 10.0]))
    assert (wide.low, wide.high) == (0.0, 10.4)
    for values in ([1e-9, 1.0], [3.0, 1e12], [0.0], [1.0, 1.0000001]):
        for may_be_log in (False, True):
            scale = make_scale(values, may_be_log=may_be_log)
            assert 1 < len(scale.ticks) < 12 and all(-1e-6 <= scale.place(each) <= 1 for each in scale.ticks)


def test_numbers_are_short():
    assert [short(value) for value in (0, 0.00045, 0.0045, 1.5, 999.96, 1000, 123456, 4e6, -2e9, 0.1 + 0.2)] == [
        "0", "4.5e-4", "0.0045", "1.5", "1k", "1k", "123k", "4M", "-2B", "0.3",
    ]  # fmt: skip
    assert [number(value) for value in (0.0, 1234567, 2.000049, 1e-5)] == ["0", "1,234,567", "2", "1e-05"]


def test_a_long_curve_keeps_its_extremes_and_its_end():
    points = [(float(i), float(i % 97)) for i in range(10_000)]
    points[5000] = (5000.0, 1e6)
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS and set(kept) <= set(points) and list(kept) == sorted(kept)
    assert (5000.0, 1e6) in kept and kept[-1] == points[-1]
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS] and len(thinned(points[: MAX_POINTS + 1])) <= MAX_POINTS
    assert spread(range(100), MAX_SAMPLE_STEPS)[-1] == 99 and len(set(spread(range(100), MAX_SAMPLE_STEPS))) == 24
    assert spread([5], 3) == [5]


def test_a_chart_leaves_out_what_is_not_finite_and_one_point_is_a_dot():
    nan = float("nan")
    assert chart("Loss", [Line("a", [(1, nan)])], "step") == "" and text_chart([Line("a", [(1, nan)])], 80) == []
    drawn = chart("Loss", [Line("a", [(1, nan), (2, 3.0)])], "step")
    assert "nan" not in drawn and "h0" in drawn
    plain = text_chart([Line("a", [(1, 2.0), (9, 3.0)]), Line("b", [(5, 2.5)])], 40, 6, is_ascii=True)
    assert "".join(plain).isascii() and "x" in "".join(plain) and max(map(len, plain)) <= 40
