"""The lock of a run's folder: only one process trains in it."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.errors import UserError
from trainer.runs.run_folder import RECORD
from trainer.system.folder_checks import unwritable
from trainer.system.storage import Location, Url, reason_and_remedy
from trainer.system.whole import make_folder

LOCK_TRIES = 100
# `is_training_in` holds a lock for an instant: wait this often, this long, before another process is believed to train.
_WAITS, _WAIT_SECS = 5, 0.01


@contextlib.contextmanager
def only_run_in(folder: Location, say: Callable[[str], None] = print) -> Iterator[None]:
    """Makes a run's folder if it is missing, and locks it for this process. A folder in an object store is not locked:
    object stores have no locks. At the end the lock is removed, and a folder that was made here if no run began in it.

    Args:
        folder: the run's folder.
        say: prints a line; called if the folder's file system has no locks.

    Raises:
        UserError: another process trains in the folder, or the folder cannot be written.
    """
    if isinstance(folder, Url):
        yield
        return
    is_new = not folder.exists()
    lock = _locked(folder, say)
    try:
        yield
    finally:
        # Without an open descriptor the file locks nothing, so it may stay if it cannot be removed.
        with contextlib.suppress(OSError):
            (folder / "lock").unlink()
        os.close(lock)
        with contextlib.suppress(OSError):
            if is_new:
                folder.rmdir()  # Fails, as it should, if a run is in it.


def is_training_in(folder: Location) -> bool | None:
    """Returns whether a process trains in a run's folder; None in an object store, where that cannot be found out."""
    if isinstance(folder, Url):
        return None
    try:
        lock = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared: it fails beside the process that trains, and not beside another one that only looks.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # The file system has no locks.
        return None
    finally:
        os.close(lock)
    return False


def _locked(folder: Path, say: Callable[[str], None]) -> int:
    """Returns the descriptor of the open file that locks a folder for this process."""
    tries_left, waits_left = LOCK_TRIES, _WAITS
    while True:
        tries_left -= 1
        try:
            make_folder(folder)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            # The process that held the folder can have removed it after make_folder. A folder that cannot be made, as
            # in /proc, is never found, so the number of tries has a limit.
            if isinstance(error, FileNotFoundError) and tries_left > 0:
                continue
            is_run = os.access(folder / RECORD, os.F_OK)
            instead = "" if is_run else "choose another run_folder"
            raise UserError(f"{unwritable(folder, error, instead)}.") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # If another process has removed the file meanwhile, the lock on it protects nothing.
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
            if isinstance(error, BlockingIOError) and waits_left > 0:
                waits_left -= 1
                time.sleep(_WAIT_SECS)
                continue
            if not isinstance(error, BlockingIOError | PermissionError):
                raise UserError(f"{folder} cannot be locked: {reason_and_remedy(error)}.") from None
            raise UserError(f"{folder} is being trained in by another process; wait for it or stop it.") from None
