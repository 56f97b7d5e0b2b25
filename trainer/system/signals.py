"""Signals that ask a process to end, noticed at once whatever it is doing.

Imports the standard library only: the command watches from its first instruction on, while all else is still loading.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Ctrl-C, what schedulers and `kill` send, and what a terminal sends that is closed.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again. Schedulers can be told to.
EXIT_STOPPED = 75


# What the signals that are watched were handled by before, for each watch there is.
_before: list[dict[int, Any]] = []


def _stop_watching_in_child() -> None:
    # A forked child has no thread that reads, and its signals would end up with its parent's.
    for before in reversed(_before):
        signal.set_wakeup_fd(-1)
        for number, each in before.items():
            signal.signal(number, each)


os.register_at_fork(after_in_child=_stop_watching_in_child)


@contextlib.contextmanager
def watched(
    numbers: Iterable[int], notice: Callable[[int], bool], handler: Callable[[int, Any], None]
) -> Iterator[dict[int, Any]]:
    """Calls notice with the number of each signal that comes, in a thread of its own.

    Python runs a signal's handler between two of its own instructions, and both a call of the compiled loop and the
    import of a library can be a single one for a long time. So the handler in C writes the number to a socket, and a
    thread reads it. A signal that the process was started to ignore, as a shell's background job is SIGINT and a
    command behind nohup SIGHUP, stays ignored.

    Args:
        numbers: the signals.
        notice: whether the signal is dealt with; if not, it is passed on to whoever watched before.
        handler: what Python calls in the main thread as well, as soon as it can.

    Yields:
        The handlers that the signals had before. Empty outside of the main thread, where nothing is watched: only the
        main thread may handle signals, so whoever started the other one has to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    handlers = {number: signal.getsignal(number) for number in numbers}
    # None: a handler that is not Python's, and which Python could not put back.
    before = {number: each for number, each in handlers.items() if each not in (signal.SIG_IGN, None)}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        # Any signal that Python handles writes its number, not these alone. No byte: the other end is closed.
        while number := reader.recv(1):
            if not (number[0] in before and notice(number[0])) and previous >= 0:
                with contextlib.suppress(OSError):
                    os.write(previous, number)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    _before.append(before)
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        _before.pop()
        for number, each in before.items():
            signal.signal(number, each)
        signal.set_wakeup_fd(previous)
        writer.close()
        thread.join()
        reader.close()


@dataclasses.dataclass
class Ending:
    """How a signal ends the process.

    Attributes:
        status: the exit status; None: 128 and the signal's number, as a shell has it.
        advice: returns what to do next; called when the signal has come.
    """

    status: int | None = None
    advice: Callable[[], str] = str


@contextlib.contextmanager
def ended_by(numbers: Iterable[int], ending: Ending) -> Iterator[None]:
    """Ends the process at the first of these signals, from any state that it can be in.

    Nothing is raised that the code under way could catch, and nothing is waited for: whatever is written to a disk is
    written so that a process may be killed at any instant.
    """
    stderr = os.dup(2)  # The terminal's, also while somebody has put something else in its place.

    def end(number: int) -> bool:
        name = signal.Signals(number).name
        with contextlib.suppress(OSError, ValueError):
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # A progress bar hides the cursor.
            os.write(stderr, f"trainer: stopped by {name}. {ending.advice()}".strip().encode(errors="replace") + b"\n")
        if "multiprocessing" in sys.modules:
            import multiprocessing

            for child in multiprocessing.active_children():
                child.kill()
        os._exit(128 + number if ending.status is None else ending.status)

    try:
        with watched(numbers, end, lambda *_: None):
            yield
    finally:
        os.close(stderr)
