"""Checks that a folder can be written, is fast enough, has room, and that its clock is this machine's."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.errors import UserError
from trainer.system.findings import Finding, error, ok, warning
from trainer.system.storage import Location, Url, reason_and_remedy, remove_file
from trainer.system.terminal import size_of

# Enough to leave the disk's own cache; less if the disk is slow.
_MOST_BYTES, _MOST_SECS = 64 << 20, 3.0
_BLOCK = os.urandom(1 << 20)  # Random, because some file systems compress.
# Less than this is the time that a file needs to get to a server, and a clock that NTP keeps right.
_MOST_SKEW_SECS = 5.0


class Need(NamedTuple):
    """What a run needs of a folder.

    Attributes:
        setting: the setting that names the folder.
        room_bytes: what will be written into it in all.
        least_bytes: what has to fit at least, or the run fails.
        what: what that is, for a message, such as "3 checkpoints of 0.5 GB".
        advice: how to need less, for a message; "": there is no way.
    """

    setting: str
    room_bytes: float = 0.0
    least_bytes: float = 0.0
    what: str = ""
    advice: str = ""


def unwritable(folder: Location, cause: Exception, instead: str) -> str:
    """Returns the message that a folder cannot be written, and what to do.

    Args:
        folder: the folder.
        cause: the error of the file system.
        instead: a further way, such as "choose another run_folder"; "": there is none.
    """
    return f"{folder} cannot be written: {reason_and_remedy(cause)}" + (f", or {instead}" if instead else "")


def check_space(folder: Location, need: Need) -> Iterator[Finding]:
    """Checks that a folder's disk has room for what a run writes into it."""
    if isinstance(folder, Url):
        return
    try:
        free = shutil.disk_usage(existing(folder)).free
    except OSError:
        return  # check_writing reports it.
    if free < need.room_bytes:
        advice = f"Make room, {need.advice}{', ' if need.advice else ''}or choose another {need.setting}"
        what = f"{folder} has {size_of(free)} free, and the run needs {size_of(need.room_bytes)} there: {need.what}"
        yield (error if free < need.least_bytes else warning)(need.setting, what, advice)


def check_writing(folder: Location, need: Need, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Checks that a folder can be written, by writing a file and removing it, and that its clock is this machine's.

    Args:
        folder: the folder, which may not exist yet.
        need: what a run needs of it.
        now: the clock of this machine.
    """
    if isinstance(folder, Url):
        yield from _check_store(folder, need)
        return
    try:
        place = existing(folder)
        with tempfile.NamedTemporaryFile(dir=place, prefix=".trainer-doctor-") as file:
            written, started = 0, time.perf_counter()
            while written < _MOST_BYTES and time.perf_counter() - started < _MOST_SECS:
                file.write(_BLOCK)
                written += len(_BLOCK)
            file.flush()
            os.fsync(file.fileno())
            secs = time.perf_counter() - started
            # A byte, and the clock around it: the writing above may have taken a slow disk longer than _MOST_SKEW_SECS.
            before = now()
            file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
            touched, after = Path(file.name).stat().st_mtime, now()
            ahead = touched - min(max(touched, before), after)
        free = shutil.disk_usage(place).free
    except OSError as cause:
        yield _refused(folder, cause, need)
        return
    yield ok(need.setting, f"{folder}: {size_of(free)} free, written at {size_of(written / secs)}/s")
    if abs(ahead) > _MOST_SKEW_SECS:
        direction = "ahead of" if ahead > 0 else "behind"
        yield warning(
            "clock",
            f"the clock that {folder} is written by is {abs(ahead):.0f} s {direction} this machine's",
            "Set the clocks of this machine and of the file server by NTP: sudo timedatectl set-ntp true",
        )


def _refused(folder: Location, cause: Exception, need: Need) -> Finding:
    what, _, remedy = unwritable(folder, cause, f"choose another {need.setting}").rpartition(". ")
    return error(need.setting, what, remedy)


def _check_store(folder: Url, need: Need) -> Iterator[Finding]:
    file = folder / ".trainer-doctor"
    try:
        started = time.perf_counter()
        file.write_bytes(_BLOCK)
        secs = time.perf_counter() - started
        remove_file(file)
    except (UserError, OSError) as cause:
        yield _refused(folder, cause, need)
        return
    yield ok(need.setting, f"{folder}: written at {size_of(len(_BLOCK) / secs)}/s")


def existing(folder: Path) -> Path:
    """Returns the folder itself, or the nearest one above it that exists.

    Raises:
        NotADirectoryError: a file is in its way.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    return place
