"""A hidden folder to write into, which gets its name when all of it is on the disk, or is removed after an error.

A process that is killed leaves its hidden folder, and the next process takes it up.
"""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.errors import UserError
from trainer.system.storage import reason_and_remedy
from trainer.system.whole import make_folder, rename_unless_there, sync, sync_tree

# The file in a hidden folder that records how far its process is.
PROGRESS = "progress.json"
# The file in a hidden folder that is locked by the process that writes there, and the folders this process has locked.
_LOCK = "lock"
_locked_here: set[Path] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def written_whole(folder: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Yields a hidden folder, which becomes `folder` at the end, or is removed after an error.

    The hidden folder is empty, or a killed process left it. Ctrl-C leaves it as well if it holds PROGRESS.

    Args:
        folder: the folder.
        say: prints a warning.

    Raises:
        UserError: the folder cannot be written.
    """
    partial: Path | None = None
    try:
        make_folder(folder.parent)
        with contextlib.ExitStack() as stack:
            partial = _lock_partial(folder, stack, say)
            yield partial
            # The lock's file is left out: closing a file gives up this process's locks on it.
            sync_tree(partial, except_for=partial / _LOCK)
            if rename_unless_there(partial, folder):
                (folder / _LOCK).unlink(missing_ok=True)
            sync(folder.parent)
    except KeyboardInterrupt:
        if partial is not None and (partial / PROGRESS).exists():
            partial = None
        raise
    except OSError as error:
        is_renamed = partial is not None and not partial.exists() and folder.exists()
        undone = f"{folder} is whole, but a loss of power could still undo it"
        left = undone if is_renamed else "nothing half-written is left"
        raise UserError(
            f"data.prepared_folder={str(folder.parent)!r}: cannot be written: {reason_and_remedy(error)}, or name "
            f"another folder; {left}."
        ) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _lock_partial(folder: Path, stack: contextlib.ExitStack, say: Callable[[str], None]) -> Path:
    """Returns a hidden folder that only this process works in as long as the stack lives.

    Takes up a folder that a stopped process left, if that process was this user's and its lock is free.
    """
    left = [path for path in sorted(folder.parent.glob(f".partial-{glob.escape(folder.name)}-*")) if _is_own(path)]
    taken: Path | None = None
    for path in left:
        try:
            if taken is None and _lock(path, stack):
                taken = path
            elif taken is not None:
                with contextlib.ExitStack() as briefly:
                    if _lock(path, briefly):
                        shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            say(f"warning: {path} stays, as it cannot be locked: {error.strerror}; if no process prepares, delete it")
    if taken is None:
        taken = folder.parent / f".partial-{folder.name}-{secrets.token_hex(4)}"
        taken.mkdir()
        # Without locks no other process takes this folder either, because it cannot lock it.
        with contextlib.suppress(OSError):
            _lock(taken, stack)
    return taken


def _is_own(path: Path) -> bool:
    """Whether a path is a folder, not a link to one, and this user's: another user could have put it there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _lock(partial: Path, stack: contextlib.ExitStack) -> bool:
    """Locks a partial folder for as long as the stack lives; returns False if another process holds or removed it.

    The lock is a POSIX lock of a file in the folder. NFS passes such locks on to other hosts, unlike a flock of the
    folder, and the kernel frees them when their process ends. Within one process they do not exclude each other, so
    _locked_here does.

    Raises:
        OSError: this file system has no such locks.
    """
    with _guard:
        if partial in _locked_here:
            return False
        _locked_here.add(partial)
    with contextlib.ExitStack() as until_locked:
        until_locked.callback(_locked_here.discard, partial)
        try:
            handle = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            until_locked.callback(os.close, handle)
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that held the lock may have just renamed or removed the folder.
            is_there = os.path.samestat(os.lstat(partial / _LOCK), os.fstat(handle))
        except (BlockingIOError, PermissionError, FileNotFoundError):
            return False
        if is_there:
            stack.push(until_locked.pop_all())
        return is_there


def empty(folder: Path) -> None:
    """Removes everything from a hidden folder, except its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
