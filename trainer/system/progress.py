"""How far a long task is: a bar on a terminal, a line that is updated in place in a notebook, nothing elsewhere."""

import collections
import contextlib
import html
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from trainer.system import terminal
from trainer.system.terminal import Say, console, printable

if TYPE_CHECKING:
    import rich.console

# Takes how much is done, and of how much; None: unknown.
Note = Callable[[int, int | None], None]

# A bar is drawn this often; a notebook's line is changed at most this often, each time by a message to the browser.
_REDRAWS_PER_SEC = 10
_NOTEBOOK_SECS = 0.5
# The time left follows from the pace of about the last minute.
_SAMPLE_SECS, _NUM_SAMPLES = 0.5, 120
# The columns that a state leaves to the bar itself, and to the name of what is done: a longer name takes them from the
# bar, so that the state does not change with each word.
_BAR_COLUMNS, _MIN_BAR_COLUMNS = 8, 3
_WHAT_COLUMNS = len("evaluating")
_NOTEBOOK_COLUMNS = 120


def ignore(done: int, total: int | None = None) -> None:
    """Is a `Note` that nobody reads."""


def _difference(done: float, later: float) -> float:
    return later - done


class Bar:
    """How far a task is. This one shows nothing; to tell it something takes microseconds.

    Attributes:
        is_shown: whether somebody sees it, so that lines on the progress are not needed.
        what: what is being done, such as "training".
        done: how much is done; None: not known yet.
        total: how much there is to do; None: unknown.
        in_bytes: whether bytes are counted.
        states: the same news from long to short; the longest that has room is shown.
        work_between: returns how much work is done between two values of `done`; the time left is in proportion to it.
        known_secs_left: how long the rest will take; None: that follows from the pace of the last minute.
    """

    is_shown = False

    def __init__(self, what: str, total: float | None = None, in_bytes: bool = False) -> None:
        self.what, self.total = what, total
        self.in_bytes = in_bytes
        self.done: float | None = None
        self.states: Sequence[str] = ("",)
        self.work_between: Callable[[float, float], float] = _difference
        self.known_secs_left: float | None = None
        self._samples: collections.deque[tuple[float, float]] = collections.deque(maxlen=_NUM_SAMPLES)

    def update(self, done: float | None = None, states: Sequence[str] | None = None, what: str | None = None) -> None:
        """Sets what is given."""
        self.what = self.what if what is None else what
        self.states = self.states if states is None else states
        if done is not None:
            self.done = done
            self._sample(done)
        self._changed()

    def note(self, done: int, total: int | None = None) -> None:
        """Sets how much is done, and of how much; a `Note`."""
        self.total = total
        self.update(done)

    def count(self) -> str:
        """Returns how much is done, and of how much."""
        form: Callable[[float], str] = (lambda size: f"{size / 1e6:,.1f}") if self.in_bytes else "{:,}".format
        of = "" if self.total is None else f"/{form(self.total)}"
        return f"{form(self.done or 0)}{of}{' MB' * self.in_bytes}"

    def print(self, line: str) -> None:
        """Prints a line; on a terminal above the bar, wrapped between words."""
        print(printable(line), flush=True)

    def _sample(self, done: float) -> None:
        now = time.monotonic()
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()  # Another part of the task has begun.
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_SECS:
            self._samples.append((now, done))

    def secs_left(self) -> float | None:
        """Returns how long the rest will take; None: unknown."""
        if self.known_secs_left is not None:
            return self.known_secs_left
        if self.total is None or self.done is None or len(self._samples) < 2:
            return None
        (first, before), (last, now) = self._samples[0], self._samples[-1]
        if now <= before:
            return None
        left = self.work_between(self.done, self.total)
        return max(0.0, left * (last - first) / self.work_between(before, now))

    def line(self, columns: int) -> tuple[str, str]:
        """Returns what stands to the left and to the right of the bar in a line of this many columns."""
        left = "" if self.total is None else clock(self.secs_left())
        parts = [" ".join(filter(None, (self.count(), state, left))) for state in (*self.states, "")]
        room = columns - max(_WHAT_COLUMNS + _BAR_COLUMNS, len(self.what) + _MIN_BAR_COLUMNS) - 2
        shown = next((part for part in parts if len(part) <= room), parts[-1][: max(0, room)])
        return self.what[: max(0, columns - _BAR_COLUMNS - 1)], shown

    def _changed(self) -> None:
        pass


class _TerminalBar(Bar):
    """A bar in the last line of a terminal, as wide as the terminal is when it is drawn."""

    is_shown = True

    def __init__(self, stream: TextIO, what: str, total: float | None, in_bytes: bool) -> None:
        super().__init__(what, total, in_bytes)
        self.console = console(stream)
        self.measure: Callable[[], float] | None = None

    def __rich_console__(self, _: "rich.console.Console", options: "rich.console.ConsoleOptions") -> Iterator[Any]:
        import rich.progress_bar
        import rich.table

        if self.measure is not None:
            with contextlib.suppress(OSError):  # A file that is measured can be renamed meanwhile.
                self.done = self.measure()
                self._sample(self.done)
        columns = options.max_width
        what, state = self.line(columns)
        width = max(1, columns - len(what) - len(state) - (2 if state else 1))
        bar = rich.progress_bar.ProgressBar(self.total or 1, self.done or 0, width, pulse=self.total is None)
        grid = rich.table.Table.grid(padding=(0, 1), pad_edge=False)
        for _name in ("what", "bar", "state"):
            grid.add_column(no_wrap=True)
        grid.add_row(what, bar, state)
        yield grid

    def print(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(printable(line))


class _NotebookBar(Bar):
    """A line of a notebook that is updated in place. It is updated only in calls, so only by the thread of the cell."""

    is_shown = True

    def __init__(self, what: str, total: float | None, in_bytes: bool) -> None:
        super().__init__(what, total, in_bytes)
        self._id = f"trainer-{secrets.token_hex(8)}"
        self._drawn = 0.0
        self._display = sys.modules["IPython"].display.display
        self._display(self._bundle(), raw=True, display_id=self._id)

    def _bundle(self) -> dict[str, str]:
        what, state = self.line(_NOTEBOOK_COLUMNS)
        ends = "" if self.total is None else f' max="{self.total}" value="{self.done or 0}"'
        text = '<span style="font-family: monospace; white-space: pre">{}</span>'
        bar = f'<progress style="width: 16em; vertical-align: middle"{ends}></progress>'
        page = f"<div>{text.format(html.escape(what))} {bar} {text.format(html.escape(state))}</div>"
        return {"text/html": page, "text/plain": f"{what} {state}"}

    def _changed(self) -> None:
        if time.monotonic() - self._drawn >= _NOTEBOOK_SECS:
            self.draw()

    def draw(self, is_over: bool = False) -> None:
        """Updates the line; if the task is over and leaves no line, it gets empty."""
        self._drawn = time.monotonic()
        bundle = {"text/html": "", "text/plain": ""} if is_over else self._bundle()
        self._display(bundle, raw=True, display_id=self._id, update=True)


@contextlib.contextmanager
def shown(
    to: Say | TextIO,
    what: str,
    total: float | None = None,
    in_bytes: bool = False,
    stays: bool = False,
    measure: Callable[[], float] | None = None,
) -> Iterator[Bar]:
    """Shows in this block how far a task is. Only one bar is shown at a time: a bar within another shows nothing.

    Args:
        to: the function that prints lines, or the stream: there is a bar if it is one of `say`, `warn` and `print`, and
            prints to a terminal or into a notebook.
        what: what is being done.
        total: how much there is to do; None: unknown.
        in_bytes: whether bytes are counted.
        stays: whether the bar stays when the task is over.
        measure: returns how much is done, for a task that does not tell; called each time a terminal's bar is drawn.
    """
    stream = _stream_of(to)
    if stream is None or terminal.live_console() is not None:
        yield Bar(what, total, in_bytes)
    elif is_notebook(stream):
        with _in_notebook(_NotebookBar(what, total, in_bytes), stays) as bar:
            yield bar
    elif stream.isatty() and (on_terminal := _TerminalBar(stream, what, total, in_bytes)).console.is_terminal:
        on_terminal.measure = measure
        with _drawn(on_terminal, stays) as bar:
            yield bar
    else:
        yield Bar(what, total, in_bytes)


def _stream_of(to: Say | TextIO) -> TextIO | None:
    if to is terminal.say or to is print:
        return sys.stdout
    if to is terminal.warn:
        return sys.stderr
    return None if callable(to) else to


@contextlib.contextmanager
def _in_notebook(bar: _NotebookBar, stays: bool) -> Iterator[Bar]:
    try:
        yield bar
    finally:
        bar.draw(is_over=not stays)


@contextlib.contextmanager
def _drawn(bar: _TerminalBar, stays: bool) -> Iterator[Bar]:
    import rich.live

    live = rich.live.Live(
        bar,
        console=bar.console,
        refresh_per_second=_REDRAWS_PER_SEC,
        transient=not stays,
        # What other programs print is shown above the bar; but what goes into a file or a pipe goes there.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )
    with live, terminal.printing_above(bar.console):
        yield bar


def is_notebook(stream: TextIO) -> bool:
    """Whether what is written to a stream is shown in a notebook: it is ipykernel's, and a kernel runs."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel") and hasattr(stream, "pub_thread")


def clock(secs: float | None) -> str:
    """Returns a time as hours, minutes and seconds."""
    if secs is None:
        return "-:--:--"
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
