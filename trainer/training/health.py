"""What keeps a run from being lost: signals that stop it cleanly, one run per folder, and an eye on its numbers."""

import contextlib
import fcntl
import signal
from collections.abc import Callable, Iterator
from typing import Any

from trainer.config import UserError
from trainer.signals import STOPPING, watched
from trainer.storage import Location, Url


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[], None], say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Calls request_stop at the first SIGINT, SIGTERM or SIGHUP, and says so; a second one ends the process as it would
    have without this.
    """
    is_asked = False

    def notice(number: int) -> bool:
        nonlocal is_asked
        if is_asked:
            return False
        is_asked = True
        request_stop()
        say(f"{signal.Signals(number).name}: saving after the step under way; a second signal ends at once, unsaved.")
        return True

    def restore(*_: object) -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    before: dict[int, Any] = {}
    with watched(STOPPING, notice, restore) as handlers:
        before |= handlers
        yield


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
