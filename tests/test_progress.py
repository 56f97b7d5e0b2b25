import contextlib
import io
import os
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from trainer.system import progress, terminal
from trainer.system.progress import Bar, clock, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def on_terminal() -> Iterator[Terminal]:
    """Standard error as a terminal of 80 columns; standard output stays what it is."""
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(Terminal()) as stream:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        yield stream


@pytest.mark.parametrize("columns", [10, 40, 80, 120, 200])
@pytest.mark.parametrize("total", [None, 60, 10**12])
def test_a_bar_never_needs_more_than_its_line(columns: int, total: int | None):
    bar = Bar("evaluating 123,456/1,000,000", total)
    bar.update(59, ["much " * 30, "a bit more", "short"])
    what, state = bar.line(columns)
    assert len(what) + len(state) + 2 <= columns
    if columns >= 120:
        assert state.startswith("59")


def test_the_longest_state_that_has_room_is_shown_and_the_numbers_come_before_it():
    bar = Bar("training", 60)
    bar.update(20, ["s" * 40, "s" * 30, "s"])
    assert [bar.line(columns)[1] for columns in (200, 75, 40)] == [
        f"20/60 {'s' * 40} -:--:--", f"20/60 {'s' * 40} -:--:--", "20/60 s -:--:--",
    ]  # fmt: skip
    assert bar.line(73)[1] == f"20/60 {'s' * 30} -:--:--"
    bar = Bar("reading", 3_000_000, in_bytes=True)
    bar.update(1_200_000)
    assert bar.line(80)[1] == "1.2/3.0 MB -:--:--"


def test_time_left_follows_the_pace_of_the_last_minute(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = Bar("training", 1000)
    for second in range(200):
        now = float(second)
        bar.update(second if second < 100 else 100 + 2 * (second - 100))  # Twice as fast from 100 s on.
    assert bar.secs_left() == pytest.approx((1000 - 298) / 2, rel=0.2)
    bar.update(0)
    assert bar.secs_left() is None
    assert (clock(None), clock(3725.4)) == ("-:--:--", "1:02:05")


def test_lines_are_printed_above_the_bar_and_nothing_is_left_of_it():
    with on_terminal() as stream:
        with shown(terminal.warn, "evaluating") as bar:
            bar.note(3, 4)
            terminal.warn("a line")
            with shown(terminal.warn, "within") as inner:
                assert not inner.is_shown
        terminal.warn("after")
    text = stream.getvalue()
    assert re.search(r"evaluating .*━.* 3/4 -:--:--", text) and "a line\n" in text and "within" not in text
    assert text.endswith("\x1b[2Kafter\n") and terminal.live_console() is None


def test_a_bar_on_standard_error_leaves_standard_output_alone():
    with (
        on_terminal() as stream,
        contextlib.redirect_stdout(io.StringIO()) as piped,
        shown(terminal.warn, "writing", 2),
    ):
        print("data")
        terminal.say("more")
        terminal.show("data\n")
    assert piped.getvalue() == "data\nmore\ndata\n"
    assert "writing" in stream.getvalue() and "data" not in stream.getvalue()


def test_an_error_leaves_the_terminal_as_it_was():
    with on_terminal() as stream, pytest.raises(KeyboardInterrupt), shown(terminal.warn, "evaluating", 4):
        raise KeyboardInterrupt
    assert stream.getvalue().count("\x1b[?25h") == stream.getvalue().count("\x1b[?25l") == 1
    assert terminal.live_console() is None


def test_a_process_that_ends_at_once_leaves_the_cursor_seen_and_below_the_bar():
    reader, writer = os.openpty()
    try:
        terminal.leave_bar(writer)
        assert os.read(reader, 100) == b"\x1b[?25h"
        with on_terminal(), shown(terminal.warn, "evaluating"):
            terminal.leave_bar(writer)
        assert os.read(reader, 100) in (b"\x1b[?25h\n", b"\x1b[?25h\r\n")
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("to", [terminal.warn, lambda line: None, io.StringIO()])
def test_nothing_is_shown_without_a_terminal(to: Any):
    with contextlib.redirect_stderr(io.StringIO()) as stream, shown(to, "evaluating", 4) as bar:
        bar.note(1, 4)
        assert not bar.is_shown
    assert stream.getvalue() == ""


def test_in_a_notebook_one_line_is_updated_in_place(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[dict[str, str], dict[str, Any]]] = []
    display = types.SimpleNamespace(display=lambda bundle, **options: calls.append((bundle, options)))
    kernel = types.SimpleNamespace(kernel=object())
    fake = types.SimpleNamespace(display=display, get_ipython=lambda: kernel)
    monkeypatch.setitem(sys.modules, "IPython", fake)  # A recording of our calls; IPython is not installed here.
    monkeypatch.setattr(progress, "_NOTEBOOK_SECS", 0.0)
    stream = io.StringIO()
    stream.pub_thread = None  # type: ignore[attr-defined]  # As ipykernel's stream has.
    with contextlib.redirect_stdout(stream), shown(terminal.say, "training", 30, stays=True) as bar:
        bar.update(20, ["loss <2>"])
        bar.print("a line")
    assert stream.getvalue() == "a line\n"
    assert [options.get("update", False) for _, options in calls] == [False, True, True]
    assert len({options["display_id"] for _, options in calls}) == 1
    last = calls[-1][0]
    assert 'max="30" value="20"' in last["text/html"] and "20/30 loss &lt;2&gt;" in last["text/html"]
    assert last["text/plain"] == "training 20/30 loss <2> -:--:--"
