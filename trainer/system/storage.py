"""Folders on a disk or in an object store, such as gs:// and the other stores that tf.io.gfile reads.

A `Url` has the methods of pathlib.Path that a run and its data need. An object store has no rename and no locks, but a
file in it is whole or not there. Data is read from a disk: each folder in a store has one place on this host's disk for
its copy.
"""

import contextlib
import errno
import getpass
import hashlib
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.errors import UserError

# Linux's limits, minus what trainer appends to a path.
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 3900


class Url:
    """A file or folder in an object store, with the methods of a Path that trainer uses.

    Args:
        text: scheme://name; a slash at the end is ignored.
    """

    def __init__(self, text: str) -> None:
        self._text = text.rstrip("/")

    def __str__(self) -> str:
        return self._text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self._text}/{name}")

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self._text.rpartition("/")[2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def is_file(self) -> bool:
        """Whether this is a file that exists."""
        return self._is_directory() is False

    def is_dir(self) -> bool:
        """Whether this is a folder that exists, which in a store means that something is in it."""
        return self._is_directory() is True

    def _is_directory(self) -> bool | None:
        """Whether this is a folder; None if it does not exist."""
        # Not gfile.isdir: it returns False for every error, so a store that is down would look empty.
        try:
            with _as_user_errors(self):
                return bool(_gfile().stat(self._text).is_directory)
        except FileNotFoundError:
            return None

    def iterdir(self) -> Iterator["Url"]:
        """Yields the entries of the folder, in the order of their names."""
        with _as_user_errors(self):
            names = sorted(name.rstrip("/") for name in _gfile().listdir(self._text))
        for name in names:
            yield self / name

    def glob(self) -> "list[Url]":
        """Returns this file if it exists, otherwise the files that match it as a pattern, sorted by name."""
        with _as_user_errors(self):
            if _gfile().exists(self._text):
                return [self]
            return [Url(text) for text in sorted(_gfile().glob(self._text)) if not _gfile().isdir(text)]

    def open(self, mode: str) -> Any:
        """Opens the file in a mode of the built-in `open`."""
        return _gfile().GFile(self._text, mode)

    def stat(self) -> os.stat_result:
        """Returns the size of the file; the other fields are 0."""
        with _as_user_errors(self):
            size = _gfile().stat(self._text).length
        return os.stat_result((0, 0, 0, 0, 0, 0, size, 0, 0, 0))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Makes the folder, if the store has folders."""
        with _as_user_errors(self):
            _gfile().makedirs(self._text)

    def read_bytes(self, start: int = 0) -> bytes:
        """Returns the content of the file from a byte on."""
        with _as_user_errors(self), _gfile().GFile(self._text, "rb") as file:
            if start:
                file.seek(start)
            return bytes(file.read())

    def write_bytes(self, content: bytes) -> None:
        """Writes the file; other processes see all of it or nothing."""
        self.write_parts([content])

    def write_parts(self, parts: Iterable[bytes]) -> int:
        """Writes the file as `write_bytes` does, one part of its content after the other. Returns their bytes.

        If a part raises an error, the store may keep a file that is cut short.
        """
        num_bytes = 0
        if self._text.startswith("ram://") and self.is_file():
            _gfile().remove(self._text)  # Only in this store TensorFlow appends to an existing file.
        with _as_user_errors(self), _gfile().GFile(self._text, "wb") as file:
            for part in parts:
                file.write(part)
                num_bytes += len(part)
        return num_bytes

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns the text of the file."""
        return self.read_bytes().decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Writes the file; other processes see all of it or nothing."""
        self.write_bytes(text.encode(encoding))


Location = Path | Url


class EndedError(OSError):
    """A file in a store ends before the place that is to be read."""


class OpenedFile:
    """A file that is read in parts, in any order. It is closed when nothing refers to it any more.

    Args:
        path: the file.

    Raises:
        OSError: it does not exist or cannot be read; a store may notice this only in `read`.
        UserError: the store cannot be read.
    """

    def __init__(self, path: Location) -> None:
        self._path = path
        with self._errors():
            self._file = path.open("rb")
        # Python warns of a file that is open when it is dropped.
        weakref.finalize(self, self._file.close)

    def read(self, start: int, num_bytes: int) -> bytes:
        """Returns the bytes from a place on; fewer at the end of the file.

        Raises:
            EndedError: in a store, the place is after the end.
            OSError: the file cannot be read, or it is in a store and was removed.
            UserError: the store cannot be read.
        """
        with self._errors():
            self._file.seek(start)
            return bytes(self._file.read(num_bytes))

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return _as_user_errors(self._path) if isinstance(self._path, Url) else contextlib.nullcontext()


def is_url(path: object) -> bool:
    """Whether a path is in an object store."""
    return "://" in str(path)


def locate(path: str | Location) -> Location:
    """Returns the Path or Url that a string names; ~ is the home folder.

    Raises:
        UserError: no file system accepts such a path.
    """
    if isinstance(path, Url):
        return path
    if is_url(path):
        return Url(str(path))
    # Path.expanduser raises for ~NOBODY, but a file can have that name.
    text = os.path.expanduser(path)  # noqa: PTH111
    try:
        size = max((len(name.encode()) for name in Path(text).parts), default=0)
    except UnicodeEncodeError:
        raise UserError(f"{text!r}: not a path in UTF-8; give the file or folder another name.") from None
    if "\0" in text:
        raise UserError(f"{text!r}: a path cannot hold a NUL character; leave it out.")
    if text.isspace():
        raise UserError(f"{text!r}: a path of blanks only; give the name of the file or folder.")
    if size > _MAX_NAME_BYTES or len(text.encode()) > _MAX_PATH_BYTES:
        raise UserError(
            f"{_shortened(text)}: a name in it has {size} bytes and the whole path {len(text.encode())}; at "
            f"most {_MAX_NAME_BYTES} and {_MAX_PATH_BYTES} are possible. Choose a shorter one."
        )
    return Path(text)


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]}...{text[-60:]}"


# What to do about an error of the file system, by its number.
REMEDIES = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room, or ask for a larger quota",
    errno.EFBIG: "Raise the limit on a file's size (ulimit -f), or use a file system that allows larger files",
    errno.EROFS: "The file system is mounted read-only, often after a disk error: see dmesg, and mount it again",
    errno.EIO: "The disk, or the connection to it, is failing: see dmesg",
    errno.ESTALE: "The server of this network file system has lost the folder: mount it again",
    errno.EMFILE: "This process has too many files open: raise the limit (ulimit -n)",
    errno.ENFILE: "This machine has too many files open: close some, or raise fs.file-max",
    errno.EACCES: "Give this user the permission to do that",
    errno.EPERM: "Give this user the permission to do that",
}


def reason_and_remedy(error: Exception) -> str:
    """Returns the message of an error of a file system or a store, and what to do, as "reason. Remedy"."""
    if isinstance(error, UserError):
        return str(error).removesuffix(".")
    if isinstance(error, OSError):
        return f"{error.strerror or error}. {REMEDIES.get(error.errno or 0, 'Check the path and its file system')}"
    # TensorFlow's own errors have the system's message, but not the number.
    known = (remedy for number, remedy in REMEDIES.items() if os.strerror(number) in str(error))
    return f"{error}. {next(known, 'Check that the disk or store exists, and that this machine may write to it')}"


def copy_folder(source: Location, target: Location) -> None:
    """Copies all files and folders of a folder; other files of the target stay."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if entry.is_dir():
            copy_folder(entry, target / entry.name)
        else:
            copy_file(entry, target / entry.name)


def copy_file(source: Location, target: Location) -> None:
    """Copies a file of any size."""
    if isinstance(source, Path) and isinstance(target, Path):
        shutil.copyfile(source, target)
        return
    with _as_user_errors(source if isinstance(source, Url) else target):
        _gfile().copy(str(source), str(target), overwrite=True)


def write_parts(file: Location, parts: Iterable[bytes]) -> None:
    """Writes a file, one part of its content after the other, so that no more than one of them has to be in memory.

    Raises:
        OSError: it cannot be written, or the store kept less than was written.
        UserError: the store cannot be written.
    """
    if isinstance(file, Path):
        with file.open("wb") as opened:
            opened.writelines(parts)
        return
    # gfile does not report every short write.
    if file.write_parts(parts) != file.stat().st_size:
        raise OSError(f"{file} was cut short")


def remove_folder(folder: Location) -> None:
    """Removes as much as possible of a folder and its content."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remove_tree(folder)


def remove_tree(folder: Location) -> None:
    """Removes a folder and its content, if it exists.

    Raises:
        OSError: something in it cannot be removed.
        UserError: the store does not allow it.
    """
    if not folder.is_dir():
        return
    if isinstance(folder, Path):
        shutil.rmtree(folder)
        return
    with _as_user_errors(folder):
        _gfile().rmtree(str(folder))


def remove_file(file: Location) -> None:
    """Removes a file, if it exists.

    Raises:
        OSError: it cannot be removed.
        UserError: the store does not allow it.
    """
    if isinstance(file, Path):
        file.unlink(missing_ok=True)
    elif file.is_file():
        with _as_user_errors(file):
            _gfile().remove(str(file))


@contextlib.contextmanager
def on_disk(folder: Location) -> Iterator[Path]:
    """Yields a folder on a disk to read from: the folder itself, or a copy that is removed at the end."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="trainer-") as name:
        copy_folder(folder, Path(name))
        yield Path(name)


def place_on_disk(folder: Url) -> Path:
    """Returns the place on this host's disk for the copy of a folder in a store; the same on every host for a user.

    It is below the folder for temporary files, which TMPDIR names, in a folder that only this user can read.

    Raises:
        UserError: another user made that folder first, or could have written to it.
    """
    of_parent = hashlib.sha256(str(folder).rpartition("/")[0].encode()).hexdigest()[:10]
    home = Path(tempfile.gettempdir()) / f"trainer-{_user_name()}"
    _make_private(home)
    return home / of_parent / folder.name


def _make_private(folder: Path) -> None:
    """Makes a folder that only this user can read and write, or checks that it is one.

    Every user may make a folder or a link in the folder for temporary files. In a folder of another user, data could be
    read and replaced; through a link, folders elsewhere would be filled and emptied.
    """
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            fault = "is a link" if stat.S_ISLNK(found.st_mode) else "is not a folder"
        elif found.st_uid != os.geteuid():
            fault = f"belongs to user {found.st_uid}"
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            fault = "can be written by others"
        else:
            folder.chmod(0o700)  # Earlier versions left it readable.
            return
    except OSError as error:
        fault = f"cannot be made: {error.strerror}"
    raise UserError(
        f"{folder} is for copies of data that only you may read and write, but it {fault}. Delete it, or set TMPDIR to "
        "a folder of your own."
    )


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # In a container the user can be a number without a name.
        return str(os.geteuid())


def _gfile() -> Any:
    # Not at the top: a run on a disk is checked before TensorFlow is loaded.
    import tensorflow as tf

    return tf.io.gfile


@contextlib.contextmanager
def _as_user_errors(where: object) -> Iterator[None]:
    import tensorflow as tf

    try:
        yield
    except tf.errors.NotFoundError as error:
        raise FileNotFoundError(f"{where}: {error.message}") from None
    except tf.errors.OutOfRangeError:
        raise EndedError(f"{where} has fewer bytes than it had, or than it should have") from None
    except tf.errors.UnimplementedError as error:  # Raised for http:// and s3://, too.
        raise UserError(
            f"{where}: the object store failed: {error.message[:300]}. TensorFlow cannot read this kind of URL here; "
            "name a copy on a disk or on gs://."
        ) from None
    except tf.errors.OpError as error:
        raise UserError(
            f"{where}: the object store failed: {error.message[:300]}. Check the name, and that this machine may "
            "read and write there (for gs://: gcloud auth application-default login)."
        ) from None
