import html
import io
import re
import resource
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from trainer.config.file import make_config
from trainer.config.settings import ProfileConfig, SamplesConfig
from trainer.errors import UserError
from trainer.monitoring.event_log import EventLog, literal
from trainer.monitoring.events import Interval
from trainer.monitoring.monitor import Monitor
from trainer.runs.results import Evaluation
from trainer.scoring.score import Score
from trainer.system.terminal import printable
from trainer.training.meter import Meter
from trainer.training.step import CallMetrics

CONFIG = make_config({"run_folder": "r", "train": {"precision": "float32", "total_steps": 30}})
SCORE = Evaluation(loss=2.0, num_tokens=1000, bits_per_byte=1.5, is_lossy=False, excess=0.25)


def monitor(logs: Path, first_step: int = 0, is_lossy: bool = False, terminal: io.StringIO | None = None) -> Monitor:
    return Monitor(logs, CONFIG, first_step, 30, 0.5, is_lossy, terminal or io.StringIO())


def interval(**changes: Any) -> Interval:
    plain = Interval(
        num_steps=10, num_skipped=1, loss=2.0, grad_norm=3.0, clip_rate=0.5, input_share=0.01,
        tokens_per_sec_in_steps=1e6, tokens_per_sec_overall=9e5, learning_rate=1e-3,
    )  # fmt: skip
    return plain._replace(**changes)


def curves(folder: Path) -> Mapping[str, dict[int, Any]]:
    """What TensorBoard's own reader, which drops orphaned points, makes of a folder: values by tag and step."""
    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {
        tag: {event.step: tf.make_ndarray(event.tensor_proto)[()] for event in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }


def test_each_evaluation_set_has_its_own_curves_and_line(tmp_path: Path):
    terminal = io.StringIO()
    watched = monitor(tmp_path, terminal=terminal)
    books, news = Score(20.0, 10, 40, 5), Score(30.0, 10, 40, 5, num_unknown=1)
    with watched.running():
        watched.evaluation(20, SCORE._replace(sets={"books": books, "news": news}))
    validation = curves(tmp_path / "validation")
    assert (
        validation["loss/nats_per_token"],
        validation["loss/nats_per_token/books"],
        validation["loss/nats_per_token/news"],
    ) == ({20: 2.0}, {20: 2.0}, {20: 3.0})
    assert validation["loss/bits_per_byte/books"] == pytest.approx({20: books.bits_per_byte})
    assert validation["loss/bits_per_byte_lossy/news"] == pytest.approx({20: news.bits_per_byte})
    assert f"step 20/30  books: {books}\nstep 20/30  news: {news}\n" in terminal.getvalue()


def test_curves_hold_each_point_at_its_step(tmp_path: Path):
    watched = monitor(tmp_path)
    with watched.running():
        watched.interval(10, interval())
        watched.interval(20, interval(loss=1.0, num_skipped=0))
        watched.evaluation(20, SCORE)
    train = curves(tmp_path / "train")
    assert train["loss/nats_per_token"] == {10: 2.0, 20: 1.0}
    assert train["loss/perplexity"] == pytest.approx({10: np.exp(2), 20: np.exp(1)})
    assert train["loss/bits_per_byte"] == {10: 1.0, 20: 0.5}
    assert train["health/skipped_steps"] == {10: 1.0, 20: 0.0}
    assert train["optimizer/learning_rate"] == pytest.approx({10: 1e-3, 20: 1e-3})
    shown = (
        "optimizer/grad_norm",
        "optimizer/clip_rate",
        "speed/tokens_per_sec_in_steps",
        "speed/tokens_per_sec_overall",
    )
    assert [train[tag][10] for tag in shown] == [3.0, 0.5, 1e6, 9e5]
    assert train["health/input_share"][10] == pytest.approx(0.01)
    assert "num_steps" not in train
    validation = curves(tmp_path / "validation")
    assert {tag: points for tag, points in validation.items() if not tag.startswith("_hparams_")} == {
        "loss/nats_per_token": {20: 2.0},
        "loss/perplexity": {20: np.float32(np.exp(2))},
        "loss/bits_per_byte": {20: 1.5},
        "speed/mean_tokens_per_sec_in_steps": {20: 1e6},
        "loss/excess_nats_per_token": {20: 0.25},
    }


def profiling(logs: Path, terminal: io.StringIO) -> Monitor:
    config = CONFIG.model_copy(update={"profile": ProfileConfig(at_step=3)})
    return Monitor(logs, config, 0, 30, 0.5, False, terminal)


def test_a_profile_that_was_cut_short_is_written_all_the_same(tmp_path: Path):
    said = io.StringIO()
    watched = profiling(tmp_path, said)
    with watched.running():
        for step in range(5):
            with watched.profiled(step):
                pass
        assert not list(tmp_path.rglob("*.xplane.pb"))
    assert len(list(tmp_path.rglob("train/plugins/profile/*/*.xplane.pb"))) == 1
    assert said.getvalue() == f"Profile written into {tmp_path}/train/plugins/profile\n"


def test_training_goes_on_if_a_profile_is_not_possible(tmp_path: Path):
    said = io.StringIO()
    watched = profiling(tmp_path / "logs", said)
    tf.profiler.experimental.start(str(tmp_path / "other"))
    try:
        with watched.running(), watched.profiled(3):
            pass
    finally:
        tf.profiler.experimental.stop()
    assert said.getvalue() == "profile.at_step: no profile: this process is already being profiled.\n"
    (tmp_path / "logs/train/plugins").write_text("in the way")
    with watched.running(), watched.profiled(3):
        pass
    assert "profile.at_step: the profile could not be written into" in said.getvalue()


def test_points_are_there_before_the_run_ends(tmp_path: Path):
    watched = monitor(tmp_path)
    with watched.running():
        watched.interval(10, interval())
        watched.samples(10, {"greedy": "x"})
        watched.evaluation(10, SCORE)
        assert curves(tmp_path / "train")["loss/nats_per_token"] == {10: 2.0}
        assert "text/samples/greedy" in curves(tmp_path / "train")
        assert curves(tmp_path / "validation")["loss/nats_per_token"] == {10: 2.0}


def test_resumed_run_drops_what_was_logged_past_its_checkpoint(tmp_path: Path):
    killed = monitor(tmp_path)
    for step in (5, 10, 15, 20):
        killed.interval(step, interval(loss=1.0))
        killed.evaluation(step, SCORE)
        killed.samples(step, {"greedy": f"before {step}"})
    # Killed: nothing is closed. And resumed within the second in the file's name.
    resumed = monitor(tmp_path, first_step=10)
    with resumed.running():
        train, validation = curves(tmp_path / "train"), curves(tmp_path / "validation")
        assert list(train["loss/nats_per_token"]) == list(validation["loss/nats_per_token"]) == [5, 10]
        resumed.interval(12, interval(loss=3.0))
        resumed.interval(15, interval(loss=3.0))
        resumed.samples(15, {"greedy": "after 15"})
    train = curves(tmp_path / "train")
    assert train["loss/nats_per_token"] == {5: 1.0, 10: 1.0, 12: 3.0, 15: 3.0}
    assert train["text/samples/greedy"] == {5: b"before 5", 10: b"before 10", 15: b"after 15"}
    with killed.running():
        pass


def test_utilisation_is_shown_if_the_peak_is_known(tmp_path: Path):
    terminal = io.StringIO()
    watched = Monitor(tmp_path / "known", CONFIG, 0, 30, 0.5, False, terminal, peak_tokens_per_sec=4e6)
    with watched.running():
        watched.interval(10, interval())
    train = curves(tmp_path / "known" / "train")
    assert (train["speed/mfu_in_steps"][10], train["speed/mfu_overall"][10]) == pytest.approx((0.25, 0.225))
    speed = "  1,000,000 tokens/s in steps, 900,000 overall  mfu 25.0% in steps, 22.5% overall  input"
    assert speed in terminal.getvalue()
    unknown = monitor(tmp_path / "unknown")
    with unknown.running():
        unknown.interval(10, interval())
    assert not [tag for tag in curves(tmp_path / "unknown" / "train") if "mfu" in tag]


def test_bits_per_byte_of_a_lossy_tokenizer_are_called_so(tmp_path: Path):
    watched = monitor(tmp_path, is_lossy=True)
    with watched.running():
        watched.interval(10, interval())
        watched.evaluation(10, SCORE._replace(is_lossy=True))
    for name, value in (("train", 1.0), ("validation", 1.5)):
        values = curves(tmp_path / name)
        assert values["loss/bits_per_byte_lossy"] == {10: value}
        assert "loss/bits_per_byte" not in values


def test_each_curve_of_bits_per_byte_is_called_lossy_by_its_own_text(tmp_path: Path):
    watched = monitor(tmp_path, is_lossy=False)
    with watched.running():
        watched.interval(10, interval())
        watched.evaluation(10, SCORE._replace(is_lossy=True))
    assert "loss/bits_per_byte" in curves(tmp_path / "train")
    assert "loss/bits_per_byte_lossy" in curves(tmp_path / "validation")


def test_unknown_excess_has_no_curve(tmp_path: Path):
    watched = monitor(tmp_path)
    with watched.running():
        watched.evaluation(10, SCORE._replace(excess=None))
    assert "loss/excess_nats_per_token" not in curves(tmp_path / "validation")


@pytest.mark.parametrize("loss", [88.0, 89.0, 800.0, 1e300, float("inf"), float("nan")])
def test_a_diverged_run_is_still_shown(loss: float, tmp_path: Path):
    watched = monitor(tmp_path)
    with watched.running():
        watched.interval(10, interval(loss=loss, grad_norm=loss))
        watched.evaluation(10, SCORE._replace(loss=loss))
    train = curves(tmp_path / "train")
    assert (
        np.isnan(train["loss/perplexity"][10]) if np.isnan(loss) else train["loss/perplexity"][10] >= np.float32(1.6e38)
    )


def test_samples_and_config_are_shown_as_text(tmp_path: Path):
    watched = monitor(tmp_path)
    with watched.running():
        watched.samples(10, {"greedy": "once\nupon", "top-p": "옛날 옛적에"})
    train = curves(tmp_path / "train")
    assert train["text/samples/greedy"] == {10: b"once  \nupon"}  # Two spaces: where Markdown breaks a line.
    assert train["text/samples/top-p"][10].decode() == "옛날 옛적에"
    assert train["text/config"][0].decode() == f"```toml\n{CONFIG.to_toml()}\n```"


def test_plain_lines_without_a_terminal(tmp_path: Path):
    terminal = io.StringIO()
    watched = monitor(tmp_path, terminal=terminal)
    with watched.running():
        watched.advance(5)
        watched.interval(10, interval())
        watched.evaluation(10, SCORE)
        watched.say(
            "a [bold]line[/bold] of more than eighty characters is neither broken nor read as markup, however long"
        )
        watched.interval(30, interval())
    lines = terminal.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(
        "step 10/30  loss 2.0000  perplexity 7.39  rate 1.00e-03  norm 3.00  1,000,000 tokens/s in steps, "
        "900,000 overall  input 1.0%  0:00:0"
    )
    assert lines[1] == (
        "step 10/30  validation: loss 2.0000 nats per token, perplexity 7.39, 1.500 bits per byte, +0.2500 nats per "
        "token above the text's own entropy (1,000 tokens)"
    )
    assert lines[2].startswith("a [bold]line[/bold] of") and lines[2].endswith("however long")
    assert lines[3].endswith("  0:00:00 left")


def test_lines_and_bar_show_the_epoch_and_what_is_being_done(tmp_path: Path):
    terminal = io.StringIO()
    config = make_config({"run_folder": "r", "train": {"precision": "float32", "num_epochs": 3}})
    watched = Monitor(tmp_path, config, 0, 49, 0.5, False, terminal, epochs_at=lambda step: step / 16.25)
    with watched.running():
        watched.interval(13, interval())
        with watched.doing(13, "evaluating"):
            pass
        watched.evaluation(49, SCORE)
    lines = terminal.getvalue().splitlines()
    assert lines[0].startswith("step 13/49  epoch 0.80/3  loss 2.0000  ")
    assert lines[1] == "step 13/49  epoch 0.80/3  evaluating"
    assert lines[2].startswith("step 49/49  epoch 3.00/3  validation: ")  # Though the last batch begins a fourth.
    by_steps = Monitor(tmp_path, CONFIG, 0, 30, 0.5, False, terminal, epochs_at=lambda step: step / 20)
    with by_steps.running(), by_steps.doing(15, "saving"):
        pass
    assert terminal.getvalue().endswith("step 15/30  epoch 0.75/1.5  saving\n")


def test_every_line_goes_to_say_if_it_is_given(tmp_path: Path):
    said: list[str] = []
    terminal = Terminal()
    watched = Monitor(tmp_path, CONFIG, 0, 30, 0.5, False, terminal, say=said.append)
    with watched.running(), watched.doing(10, "saving"):
        watched.advance(10)
        watched.interval(10, interval())
        watched.evaluation(10, SCORE)
        watched.say("a line")
    assert [line.partition("  ")[2].partition(" ")[0] for line in said] == ["saving", "loss", "validation:", ""]
    assert terminal.getvalue() == ""


def points(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return [(event.step, event.wall_time) for event in events.Tensors("loss/nats_per_token")]


def test_curves_follow_the_steps_after_a_clock_was_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    killed = monitor(tmp_path)
    for step in (5, 10, 15):
        killed.interval(step, interval())
    first_time = points(tmp_path / "train")[0][1]
    for hours_back, first_step in ((1, 10), (48, 10), (0, 15)):  # On another host each time, killed again.
        monkeypatch.setattr(time, "time", lambda now=first_time - 3600 * hours_back: now)
        resumed = monitor(tmp_path, first_step=first_step)
        resumed.interval(first_step + 2, interval())
        resumed.interval(first_step + 5, interval())
    steps, times = zip(*points(tmp_path / "train"), strict=True)
    assert steps == (5, 10, 12, 15, 17, 20)
    assert list(times) == sorted(times)


def test_a_clock_set_back_during_a_run_does_not_turn_curves_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    watched = monitor(tmp_path)
    for step, now in ((5, 2e9), (10, 1e9), (15, 2e9 + 1)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        watched.interval(step, interval())
    assert points(tmp_path / "train") == [(5, 2e9), (10, 2e9), (15, 2e9 + 1)]


MARKDOWN = (
    "* item __x__", "![](http://a.b/c.png)", "[a](http://b)", "<img src=x>", "<b>x</b>", "    code", "\tcode",
    "```\nx\n```", "# x", "x\n===", "x\n---", "> x", "1. x", "12) x", "a | b\n--|--\n1 | 2", "[x]: http://y", "`x`",
    "&amp; &#42;", "\\*x\\*", "<!-- x -->", "x  y   z", "http://a.b", "- a\n- b", "<http://a.b>", "한글 _x_",
    "~~~\nx\n~~~", "once\n\nupon", "\x02klzzwxh:0000\x03", "\x1b[2J",
)  # fmt: skip


def shown_by_tensorboard(markdown: str) -> tuple[str, set[str]]:
    """The text that a page shows, and the HTML tags it is made of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Of a library within TensorBoard.
        from tensorboard.plugin_util import markdown_to_safe_html
    page = markdown_to_safe_html(markdown)
    text = re.sub(r"<br\s*/?>\n?", "\n", page)
    return html.unescape(re.sub("</?p>", "", text)).replace("\xa0", " "), set(re.findall(r"<\s*(\w+)", page))


@pytest.mark.parametrize("text", [*MARKDOWN, "  \n".join(MARKDOWN), "".join(MARKDOWN)])
def test_tensorboard_shows_text_as_it_is_and_neither_formats_nor_fetches(text: str):
    shown, tags = shown_by_tensorboard(literal(text))
    assert tags <= {"p", "br"}
    expected = printable(text).expandtabs(4)
    assert [line.rstrip() for line in shown.split("\n")] == [line.rstrip() for line in expected.split("\n")]


def test_nothing_in_a_config_leaves_its_block_in_tensorboard(tmp_path: Path):
    samples = SamplesConfig(prompt="\n```\n![](http://a.b/c.png) <img src=x>\n", stop="'''\n~~~")
    with Monitor(tmp_path, CONFIG.model_copy(update={"samples": samples}), 0, 30, 0.5, False, io.StringIO()).running():
        pass
    shown, tags = shown_by_tensorboard(curves(tmp_path / "train")["text/config"][0].decode())
    assert tags == {"pre", "code"} and "![](http://a.b/c.png)" in shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


IN_A_LINE = {
    80: "loss 2.0000  900,000 tokens/s",
    120: "loss 2.0000  1,000,000 tokens/s in steps, 900,000 overall",
    200: "loss 2.0000  perplexity 7.39  norm 3.00  1,000,000 tokens/s in steps, 900,000 overall",
}


@pytest.mark.parametrize("columns", IN_A_LINE)
def test_progress_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    watched = Monitor(tmp_path, CONFIG, 10, 30, 0.5, False, terminal, epochs_at=lambda step: step / 4)
    with watched.running():
        watched.advance(20)
        watched.interval(20, interval())
        watched.say("above the bar")
        with watched.doing(20, "evaluating") as note:
            note(3, 12)
            time.sleep(0.25)  # The bar is drawn ten times a second.
    shown = terminal.getvalue()
    assert "compiling" in shown and "training" in shown and "━" in shown
    assert "20/30" in shown and "10/30" not in shown.rpartition("20/30")[2]
    bars = [bar for bar in re.split(r"[\r\n]", re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown)) if "━" in bar]
    assert {len(bar) for bar in bars} == {columns}
    evaluating = next(bar for bar in reversed(bars) if bar.startswith("evaluating 3/12 ━"))
    # All of it has room, down to the time left.
    for bar in (evaluating, bars[-1]):
        assert re.search(rf"━ 20/30 epoch 5.00/7.5  {re.escape(IN_A_LINE[columns])} (-:--:--|\d:\d\d:\d\d)$", bar), bar
    assert "above the bar" in shown
    assert "step 20/30" not in shown  # The bar says it.


def test_meter_turns_sums_into_rates_and_starts_again():
    times = iter([100.0, 110.0, 110.0, 111.5, 111.5])
    meter = Meter(lambda: next(times))
    meter.add(CallMetrics(3, 1, 40.0, 20.0, 6.0, 1, 0.0, 0.5), secs=2.0)
    meter.add(CallMetrics(2, 0, 20.0, 10.0, 2.0, 1, 0.0, 0.5), secs=3.0)
    expected = Interval(
        num_steps=5, num_skipped=1, loss=2.0, grad_norm=2.0, clip_rate=0.5, input_share=0.2,
        tokens_per_sec_in_steps=6.0, tokens_per_sec_overall=3.0, learning_rate=0.1,
    )  # fmt: skip
    assert meter.report(0.1) == expected
    meter.add(CallMetrics(1, 0, 2.0, 4.0, 1.0, 0, 0.0, 0.0), secs=1.0)
    assert meter.report(0.1) == Interval(1, 0, 0.5, 1.0, 0.0, 0.0, 4.0, 4 / 1.5, 0.1)


def test_an_interval_without_an_applied_step_has_no_loss_and_no_point(tmp_path: Path):
    meter = Meter()
    meter.add(CallMetrics(2, 2, 0.0, 0.0, 0.0, 0, 0.0, 0.0), secs=1.0)
    nothing = meter.report(0.1)
    assert (nothing.loss, nothing.grad_norm, nothing.clip_rate) == (None, None, None)
    assert (nothing.num_steps, nothing.num_skipped, nothing.tokens_per_sec_in_steps) == (2, 2, 0.0)
    # Steps whose batches held only padding were applied, and predicted nothing.
    meter.add(CallMetrics(2, 0, 0.0, 0.0, 0.0, 0, 0.0, 0.0), secs=1.0)
    padding = meter.report(0.1)
    assert (padding.loss, padding.grad_norm, padding.clip_rate) == (None, 0.0, 0.0)

    terminal = io.StringIO()
    watched = monitor(tmp_path, terminal=terminal)
    with watched.running():
        watched.interval(10, nothing)
    train = curves(tmp_path / "train")
    assert train["health/skipped_steps"] == {10: 2.0} and train["optimizer/learning_rate"][10] > 0
    assert not train.keys() & {
        "loss/nats_per_token",
        "loss/perplexity",
        "loss/bits_per_byte",
        "optimizer/grad_norm",
        "optimizer/clip_rate",
    }
    assert terminal.getvalue().startswith(
        "step 10/30  no step was applied  rate 1.00e-01  0 tokens/s in steps, 0 overall"
    )


def test_curves_that_cannot_be_written_for_a_while_are_complete_in_the_end(tmp_path: Path):
    said: list[str] = []
    log = EventLog(tmp_path / "train", 0, said.append)
    log.scalars(1, {"loss/nats_per_token": 3.0})
    # The limit on a file's size stands in for the full disk.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        for step in (2, 3, 4):
            log.scalars(step, {"loss/nats_per_token": 3.0 - step / 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and said[0].startswith(f"Cannot write to {tmp_path}/train: ")
    assert "Raise the limit on a file's size" in said[0] and said[0].endswith("written once that can be done.")
    log.scalars(5, {"loss/nats_per_token": 1.75})
    assert said[1:] == [f"{tmp_path}/train can be written again."]
    log.scalars(6, {"loss/nats_per_token": 1.5})
    log.close()
    assert curves(tmp_path / "train")["loss/nats_per_token"] == {1: 3.0, 2: 2.5, 3: 2.25, 4: 2.0, 5: 1.75, 6: 1.5}
    assert len(list((tmp_path / "train").iterdir())) == 2

    log = EventLog(tmp_path / "other", 0, said.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        log.scalars(1, {"loss/nats_per_token": 3.0})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said[-1] == f"{tmp_path}/other lacks its last 1 points and texts: they cannot be written."


def test_logs_that_cannot_be_written_are_an_error_that_names_them(tmp_path: Path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match=r"Cannot write to .*logs/train: .*, then resume the run\."):
        monitor(tmp_path / "logs")
