"""Signals that stop a process. They are noticed at once, whatever the process is doing.

This module loads only the standard library: the command watches for signals from its first instruction on, while
everything else is still loading.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from trainer.system.terminal import leave_bar

# Ctrl-C; what schedulers and `kill` send; what a terminal sends when it is closed.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Signals that follow the first within this time belong to the same event.
SAME_EVENT_SECS = 1.0

# For each watch under way: the handlers that its signals had before.
_before: list[dict[int, Any]] = []


def _stop_watching_in_child() -> None:
    # A forked child has no thread that reads the socket, and would write its signals into its parent's.
    for before in reversed(_before):
        signal.set_wakeup_fd(-1)
        for number, each in before.items():
            signal.signal(number, each)


os.register_at_fork(after_in_child=_stop_watching_in_child)


@contextlib.contextmanager
def watched(
    numbers: Iterable[int], notice: Callable[[int], bool], handler: Callable[[int, Any], None]
) -> Iterator[dict[int, Any]]:
    """Calls notice with the number of each signal that arrives, in a separate thread.

    Python runs a signal's handler between two of its own instructions, and a call of the compiled loop or the import of
    a library can be one instruction that takes long. So the handler in C writes the number to a socket, and a thread
    reads it. A signal that the process was started to ignore stays ignored: SIGINT in a shell's background job, SIGHUP
    in a command behind nohup.

    Args:
        numbers: the signals.
        notice: returns whether it has handled the signal; if not, the signal is passed on to the watch around this one.
        handler: called by Python in the main thread, too, as soon as Python can.

    Yields:
        The handlers that the signals had before. Empty in any thread except the main one: only the main thread may
        handle signals, so nothing is watched there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    handlers = {number: signal.getsignal(number) for number in numbers}
    # None: the handler was not set from Python, and Python could not restore it.
    before = {number: each for number, each in handlers.items() if each not in (signal.SIG_IGN, None)}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        # Every signal that Python handles writes its number, not only the watched ones. No byte: the writer is closed.
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


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[], None], say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Calls request_stop at the first SIGINT, SIGTERM or SIGHUP, and prints that. A second signal ends the process, as
    it would without this function.

    One event can send several signals: when a terminal is closed, the shell sends SIGHUP to its jobs, and then the
    kernel does; Ctrl-C reaches a launcher, which passes it on, and its workers directly. So a signal within
    SAME_EVENT_SECS of the first belongs to the same event, and SIGHUP is never a second signal.
    """
    requested_at: float | None = None

    def is_second(number: int) -> bool:
        is_later = requested_at is not None and time.monotonic() - requested_at >= SAME_EVENT_SECS
        return is_later and number != signal.SIGHUP

    def notice(number: int) -> bool:
        nonlocal requested_at
        if requested_at is None:
            requested_at = time.monotonic()
            request_stop()
            name = signal.Signals(number).name
            say(f"{name}: saving after the step under way; a second signal ends at once, unsaved.")
        return not is_second(number)

    def handle(number: int, _: Any) -> None:
        if is_second(number):
            for name, handler in before.items():
                signal.signal(name, handler)
            signal.raise_signal(number)

    before: dict[int, Any] = {}
    with watched(STOPPING, notice, handle) as handlers:
        before |= handlers
        yield


@dataclasses.dataclass
class Ending:
    """How a signal ends the process.

    Attributes:
        status: the exit status; None: 128 plus the signal's number, as a shell reports it.
        advice: returns what the user can do next; called when the signal has arrived.
    """

    status: int | None = None
    advice: Callable[[], str] = str


@contextlib.contextmanager
def ended_by(numbers: Iterable[int], ending: Ending) -> Iterator[None]:
    """Ends the process at the first of these signals, from any state.

    It raises nothing that the running code could catch, and waits for nothing: all files are written so that the
    process may be killed at any instant.
    """
    stderr = os.dup(2)  # Still the terminal when file descriptor 2 is redirected, as by `quiet_import`.

    def end(number: int) -> bool:
        name = signal.Signals(number).name
        with contextlib.suppress(OSError, ValueError):
            leave_bar(stderr if os.isatty(stderr) else 1)
            os.write(stderr, f"trainer: stopped by {name}. {ending.advice()}".strip().encode(errors="replace") + b"\n")
        # Not imported: a process that has not loaded it has no children of it, and this must not take long.
        multiprocessing = sys.modules.get("multiprocessing")
        for child in multiprocessing.active_children() if multiprocessing is not None else ():
            child.kill()
        os._exit(128 + number if ending.status is None else ending.status)

    try:
        with watched(numbers, end, lambda *_: None):
            yield
    finally:
        os.close(stderr)
