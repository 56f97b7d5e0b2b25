"""What a program prints: lines that a terminal shows as they are, and streams that may go away.

Imports the standard library only, until a line is printed to a terminal.
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

# Joiners that scripts and emoji are written with, and what sets lines.
_KEPT = frozenset("\n\t\u200c\u200d")
# Control characters, marks that turn the direction of text, lone surrogates, separators that end a line.
_HIDDEN_KINDS = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def printable(text: str) -> str:
    r"""Returns a text with every character that steers a terminal written as its escape, such as \x1b."""
    return "".join(
        repr(character)[1:-1]
        if character not in _KEPT and unicodedata.category(character) in _HIDDEN_KINDS
        else character
        for character in text
    )


def say(line: str) -> None:
    """Prints a line to standard output at once; a terminal breaks it between words, a file keeps it whole."""
    _print(line, sys.stdout)


def warn(line: str) -> None:
    """Prints a line to standard error, as `say` does."""
    _print(line, sys.stderr)


def _print(line: str, stream: TextIO) -> None:
    if stream.isatty():
        console(stream).print(printable(line))
    else:
        print(printable(line), file=stream, flush=True)


def console(stream: TextIO) -> "rich.console.Console":
    """Returns what prints to a stream and reads nothing in a text but its words."""
    import rich.console

    return rich.console.Console(file=stream, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def lasting_errors() -> Iterator[None]:
    """Lets a program go on where what it prints to standard error cannot be written; it is dropped."""
    with contextlib.redirect_stderr(_Lasting(sys.stderr, lambda _: None)):
        yield


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Lets a program go on where the reader of standard output goes away, or the disk is full that it is redirected to:
    the rest of it is dropped, which is said once on standard error.
    """

    def tell(error: OSError) -> None:
        reason = "nobody reads it any more" if error.errno == errno.EPIPE else error.strerror
        with contextlib.suppress(OSError):  # Standard error may be the same pipe.
            warn(f"trainer: standard output is gone ({reason}); training goes on without it.")

    with contextlib.redirect_stdout(_Lasting(sys.stdout, tell)):
        yield


class _Lasting:
    """A stream for text whose failures are told once, and after that drops what is written. What its encoding lacks is
    written as an escape.
    """

    def __init__(self, stream: TextIO, tell: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._tell = tell
        self._is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._is_gone:
            with self._surviving():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError as error:  # Of a script, whose streams are not made ready by `open_streams`.
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
            self._tell(error)


def discard(stream: TextIO) -> None:
    """Sends what a stream still holds, and all that is written to it from now on, nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_streams() -> None:
    """Readies standard streams for the command: one that was closed at the start goes nowhere, lest the next file that
    is opened takes its place; what the terminal's encoding lacks is written as an escape; and lines come out at once.
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
    """Keeps TensorFlow's greetings off the terminal, and nothing else: warnings and errors are passed on."""
    if "tensorflow" in sys.modules:
        yield
        return
    # Without a GPU TensorFlow's warnings, too, are about GPUs; with one they say why it is not used.
    has_gpu = has_nvidia_gpu()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if has_gpu else "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            heard.seek(0)
            lines = heard.read().decode(errors="replace").splitlines()
            for line in lines:
                if not is_greeting(line, has_gpu):
                    print(line, file=sys.stderr)


def is_greeting(line: str, has_gpu: bool) -> bool:
    """Whether a line of TensorFlow's log says nothing that its user has to know.

    Args:
        line: of the log.
        has_gpu: whether the machine has a GPU, which makes what TensorFlow notes about GPUs and CUDA worth reading.
    """
    if has_gpu and re.search("gpu|cuda", line, re.IGNORECASE):
        return False
    return line.startswith(("I0000 ", "WARNING: All log messages before absl", "To enable the following"))
