"""What keeps a run from being lost: signals that stop it cleanly, one run per folder, and an eye on its numbers."""

import contextlib
import fcntl
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from trainer.config import UserError
from trainer.storage import Location, Url

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again. Schedulers can be told to.
EXIT_INTERRUPTED = 75


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """Calls request_stop at the first SIGINT or SIGTERM; a second one ends the process as it always does. A signal that
    the process was started to ignore, as a shell's background job is SIGINT, stays ignored.

    Python runs a signal's handler between two of its own instructions, and a call of the compiled loop is one for
    minutes. So the handler in C writes to a socket, and a thread that reads it calls request_stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may handle signals: whoever started this one has to.
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    before = {name: handler for name, handler in handlers.items() if handler != signal.SIG_IGN}

    def watch() -> None:
        # Any signal that Python handles writes its number, not these two alone. No byte: the other end is closed.
        while number := reader.recv(1):
            if number[0] in before:
                request_stop()

    def note(*_: object) -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for name in before:
        signal.signal(name, note)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(previous)
        writer.close()
        thread.join()
        reader.close()


@contextlib.contextmanager
def only_run_in(folder: Location) -> Iterator[None]:
    """Holds a run's folder for this process; one in an object store, which has no locks, it cannot.

    Raises:
        UserError: another process trains in it.
    """
    if isinstance(folder, Url):
        yield
        return
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
