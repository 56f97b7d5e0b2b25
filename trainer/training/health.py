"""What keeps a run from being lost: signals that stop it cleanly, one run per folder, and an eye on its numbers."""

import contextlib
import fcntl
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.config import UserError

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again. Schedulers can be told to.
EXIT_INTERRUPTED = 75


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """Calls request_stop at the first SIGINT or SIGTERM; a second one ends the process as it always does.

    Python runs a signal's handler between two of its own instructions, and a call of the compiled loop is one for
    minutes. So the handler in C writes to a socket, and a thread that reads it calls request_stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may handle signals: whoever started this one has to.
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.getsignal(name) for name in names}

    def watch() -> None:
        # Any signal that Python handles writes its number, not these two alone. No byte: the other end is closed.
        while number := reader.recv(1):
            if number[0] in names:
                request_stop()

    def note(*_: object) -> None:
        for name in names:
            signal.signal(name, before[name])

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for name in names:
        signal.signal(name, note)
    try:
        yield
    finally:
        for name in names:
            signal.signal(name, before[name])
        signal.set_wakeup_fd(previous)
        writer.close()
        thread.join()
        reader.close()


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process.

    Raises:
        UserError: another process trains in it.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being trained in by another process; wait for it or stop it.") from None
        yield


def check_finite(step: int, num_steps: int, num_skipped: int, say: Callable[[str], None]) -> None:
    """Reports steps that were skipped because a loss or gradient was not finite.

    Args:
        step: steps taken so far.
        num_steps: the last of them to look at.
        num_skipped: how many of these were skipped.
        say: prints a line.

    Raises:
        UserError: all of them were: the model learns nothing any more.
    """
    if not num_skipped:
        return
    if num_skipped < num_steps:
        say(f"step {step}: skipped {num_skipped} of {num_steps} steps, whose loss or gradient was not finite.")
        return
    raise UserError(
        f"All {num_steps} steps before step {step} had a loss or gradient that was not finite and were skipped. Lower "
        "optimizer.learning_rate, set optimizer.clip_norm (1.0 is common) or raise optimizer.warmup_steps; the newest "
        "checkpoint is from before."
    )
