"""Printing: lines that cannot control the terminal, standard streams that may be closed, and quiet imports.

Imports the standard library only; rich is imported when a line is printed to a terminal.
"""

import contextlib
import errno
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from trainer.system.machine import has_nvidia_gpu

if TYPE_CHECKING:
    import rich.console

Say = Callable[[str], None]

# Line breaks, tabs, and the joiners that some scripts and emoji need.
_KEPT = frozenset("\n\t\u200c\u200d")
# Control characters, marks that change the direction of text, lone surrogates, and separators that end a line.
_HIDDEN_KINDS = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def printable(text: str) -> str:
    r"""Returns a text with its escape, such as \x1b, in place of every character that controls a terminal."""
    return "".join(
        repr(character)[1:-1]
        if character not in _KEPT and unicodedata.category(character) in _HIDDEN_KINDS
        else character
        for character in text
    )


def size_of(size: float) -> str:
    """Returns a number of bytes as it is printed: 1.50 GB, 20.0 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def say(line: str) -> None:
    """Prints a line to standard output at once; a terminal breaks it between words, a file keeps it whole."""
    _print(line, sys.stdout)


def show(text: str) -> None:
    """Prints a part of a line, or several lines, to standard output at once and as they are; see `printable`. While a
    progress bar is shown on the same terminal, they have to be whole lines.
    """
    if _live is not None and sys.stdout.isatty():
        _live.print(text, end="", soft_wrap=True)
        return
    sys.stdout.write(text)
    sys.stdout.flush()


def warn(line: str) -> None:
    """Prints a line to standard error, as `say` does."""
    _print(line, sys.stderr)


def _print(line: str, stream: TextIO) -> None:
    if stream.isatty():
        (_live or console(stream)).print(printable(line))
    else:
        print(printable(line), file=stream, flush=True)


# The console of the progress bar that is shown just now: a line that is printed to a terminal has to be above the bar.
_live: "rich.console.Console | None" = None


def live_console() -> "rich.console.Console | None":
    """Returns the console of the progress bar that is shown just now; None if there is none."""
    return _live


@contextlib.contextmanager
def printing_above(console: "rich.console.Console") -> Iterator[None]:
    """Prints what goes to a terminal in this block above the progress bar of a console."""
    global _live
    _live = console
    try:
        yield
    finally:
        _live = None


def leave_bar(stream: int) -> None:
    """Leaves a terminal as a process has to that ends at once: the cursor is seen, below the progress bar if there is
    one.

    Args:
        stream: the number of a file, perhaps of a terminal.
    """
    if os.isatty(stream):
        os.write(stream, b"\x1b[?25h" + b"\n" * (_live is not None))


def encodes(stream: TextIO, text: str = "\u2800\u25cf") -> bool:
    """Returns whether a stream can show a text; by default the characters of charts."""
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def console(stream: TextIO) -> "rich.console.Console":
    """Returns a console that prints to a stream and interprets no markup in a text."""
    import rich.console

    return rich.console.Console(file=stream, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def lasting_errors() -> Iterator[None]:
    """Lets a program continue if standard error cannot be written; the lines are dropped."""
    with contextlib.redirect_stderr(_Lasting(sys.stderr, lambda _: None)):
        yield


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Lets a program continue if standard output cannot be written any more: its reader has gone away, or the disk that
    it is redirected to is full. The rest of the output is dropped, after one message on standard error.
    """

    def report(error: OSError) -> None:
        reason = "its reader has gone away" if error.errno == errno.EPIPE else error.strerror
        with contextlib.suppress(OSError):  # Standard error may be the same pipe.
            warn(f"trainer: standard output cannot be written ({reason}); training continues without it.")

    with contextlib.redirect_stdout(_Lasting(sys.stdout, report)):
        yield


class _Lasting:
    """A text stream that reports its first failure and then drops what is written to it.

    A character that its encoding lacks is written as an escape.

    Args:
        stream: the stream to write to.
        report: a function that is called with the first failure.
    """

    def __init__(self, stream: TextIO, report: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._report = report
        self._is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._is_gone:
            with self._surviving():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError as error:  # A script's streams, which `open_streams` has not prepared.
                    self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        if not self._is_gone:
            with self._surviving():
                self._stream.flush()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._is_gone = True
            discard(self._stream)
            self._report(error)


def discard(stream: TextIO) -> None:
    """Drops what a stream still holds, and all that is written to it from now on."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_streams() -> None:
    """Prepares the standard streams for the command.

    A stream that was closed at the start is opened to the null device; otherwise the next file that is opened would
    take its number. A character that the terminal's encoding lacks is written as an escape. Lines appear at once.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # The lowest number that is free, which is this one.
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Keeps TensorFlow's greetings off the terminal; warnings and errors are printed."""
    if "tensorflow" in sys.modules:
        yield
        return
    # Without a GPU even TensorFlow's warnings are about GPUs; with one they explain why it is not used.
    has_gpu = has_nvidia_gpu()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if has_gpu else "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            lines = caught.read().decode(errors="replace").splitlines()
            for line in lines:
                if not is_greeting(line, has_gpu):
                    print(line, file=sys.stderr)


def is_greeting(line: str, has_gpu: bool) -> bool:
    """Whether a line of TensorFlow's log is of no use to its user.

    Args:
        line: a line of the log.
        has_gpu: whether the machine has a GPU; then TensorFlow's notes about GPUs and CUDA are of use.
    """
    if has_gpu and re.search("gpu|cuda", line, re.IGNORECASE):
        return False
    return line.startswith(("I0000 ", "WARNING: All log messages before absl", "To enable the following"))
