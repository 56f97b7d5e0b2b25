"""What keeps a run from being lost: signals that stop it cleanly, one run per folder, and an eye on its numbers."""

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.system.signals import STOPPING, watched
from trainer.system.storage import Location, Url, make_folder, reason_and_remedy
from trainer.training.run_folder import RECORD

# After so many the next one will not be finite either: only the data is new.
MAX_SKIPPED_IN_A_ROW = 20


SAME_EVENT_SECS = 1.0

LOCK_TRIES = 100


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[], None], say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Calls request_stop at the first SIGINT, SIGTERM or SIGHUP, and says so; a second one ends the process as it would
    have without this.

    One event can be several signals: a terminal that is closed hangs up the shell, which hangs up its jobs, before the
    kernel does the same; and Ctrl-C reaches a launcher, which passes it on, as well as its workers. So what follows
    within SAME_EVENT_SECS is the same event, and a hang-up never is a second one.
    """
    asked_at: float | None = None

    def is_second(number: int) -> bool:
        is_later = asked_at is not None and time.monotonic() - asked_at >= SAME_EVENT_SECS
        return is_later and number != signal.SIGHUP

    def notice(number: int) -> bool:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
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


@contextlib.contextmanager
def only_run_in(folder: Location, say: Callable[[str], None] = print) -> Iterator[None]:
    """Makes a run's folder if it is missing, and holds it for this process; one in an object store, which has no locks,
    it cannot. The lock goes away at the end, and so does a folder that it made in which no run has begun.

    Args:
        folder: of the run.
        say: prints a line, if its file system has no locks either.

    Raises:
        UserError: another process trains in it, or it cannot be written.
    """
    if isinstance(folder, Url):
        yield
        return
    is_new = not folder.exists()
    lock = _locked(folder, say)
    try:
        yield
    finally:
        # A lock file that cannot be removed holds nothing, and a folder with a run in it is not empty.
        with contextlib.suppress(OSError):
            (folder / "lock").unlink()
        os.close(lock)
        with contextlib.suppress(OSError):
            if is_new:
                folder.rmdir()


def _locked(folder: Path, say: Callable[[str], None]) -> int:
    """Returns the open file by which this process holds a folder."""
    tries_left = LOCK_TRIES
    while True:
        tries_left -= 1
        try:
            make_folder(folder)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            # Its holder can have removed it between the one and the other. A folder that nobody can make, as in /proc,
            # is not found for ever.
            if isinstance(error, FileNotFoundError) and tries_left > 0:
                continue
            is_run = os.access(folder / RECORD, os.F_OK)
            instead = "" if is_run else ", or choose another run_folder"
            raise UserError(f"{folder} cannot be written: {reason_and_remedy(error)}{instead}.") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A file that its holder removed meanwhile holds nothing.
            if os.path.samestat(os.fstat(lock), (folder / "lock").stat()):
                return lock
            os.close(lock)
        except FileNotFoundError:
            os.close(lock)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                say(
                    f"warning: the file system of {folder} has no locks ({error.strerror}): see to it that no two "
                    "processes train in it."
                )
                return lock
            os.close(lock)
            if not isinstance(error, BlockingIOError | PermissionError):
                raise UserError(f"{folder} cannot be locked: {reason_and_remedy(error)}.") from None
            raise UserError(f"{folder} is being trained in by another process; wait for it or stop it.") from None


def report_skipped(
    step: int, num_steps: int, num_skipped: int, loss_scale: float | None, say: Callable[[str], None]
) -> None:
    """Says how many steps were skipped because a loss or gradient was not finite, if any were.

    Args:
        step: steps taken so far.
        num_steps: how many of the last steps to report.
        num_skipped: how many of these were skipped.
        loss_scale: with train.precision='mixed_float16' its value now.
        say: prints a line.
    """
    if not num_skipped:
        return
    scale = "" if loss_scale is None else f"; the loss scale, which each of them halves, is {loss_scale:g} now"
    say(f"step {step}: skipped {num_skipped} of {num_steps} steps, whose loss or gradient was not finite{scale}.")


def check_is_learning(step: int, total_steps: int, skipped_in_a_row: int, num_updates: int) -> None:
    """Ends a run that learns nothing any more.

    Args:
        step: steps taken so far.
        total_steps: of the run.
        skipped_in_a_row: steps that were skipped since the last applied one, except those that lowered a loss scale.
        num_updates: steps applied so far.

    Raises:
        UserError: too many steps were skipped one after the other, or the run is at its end, and none of its steps was
            applied or none of the later half.
    """
    is_over = step >= total_steps
    if is_over and not num_updates:
        what = f"All {step} steps of the run"
    elif skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW or (is_over and 2 * skipped_in_a_row >= step):
        what = f"The last {skipped_in_a_row} steps before step {step} all"
    else:
        return
    raise UserError(
        f"{what} had a loss or gradient that was not finite and were skipped. Lower optimizer.learning_rate, set "
        "optimizer.clip_norm (1.0 is common) or raise optimizer.warmup_steps. Skipped steps leave the weights alone: "
        "the newest checkpoint is finite."
    )
