"""Folders on a disk or in an object store: what of pathlib a run and its data need, for gs:// and whatever else
tf.io.gfile reads.

An object store has no rename and no locks, but a file there is whole or not there at all. Data is read from a disk: a
folder in a store has a place on this host's disk where a copy of it belongs.
"""

import contextlib
import errno
import getpass
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import UserError

# Linux's limits, less what trainer itself adds to a path.
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 3900


class Url:
    """A file or folder in an object store, with the methods of a Path that are used here.

    Args:
        text: scheme://name; a slash at its end says nothing.
    """

    def __init__(self, text: str) -> None:
        self._text = text.rstrip("/")

    def __str__(self) -> str:
        return self._text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self._text}/{name}")

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self._text.rpartition("/")[2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def is_file(self) -> bool:
        """Whether there is such a file."""
        return self._is_directory() is False

    def is_dir(self) -> bool:
        """Whether there is anything in such a folder."""
        return self._is_directory() is True

    def _is_directory(self) -> bool | None:
        """Whether this is a folder, or None if it is not there."""
        # Not gfile.isdir, which answers False for every error: a store that is down would look empty.
        try:
            with _telling_of_errors(self):
                return bool(_gfile().stat(self._text).is_directory)
        except FileNotFoundError:
            return None

    def iterdir(self) -> Iterator["Url"]:
        """Yields what is in the folder, by name."""
        with _telling_of_errors(self):
            names = sorted(name.rstrip("/") for name in _gfile().listdir(self._text))
        for name in names:
            yield self / name

    def glob(self) -> "list[Url]":
        """Returns the files that this matches as a pattern, or itself where it is one, by name."""
        with _telling_of_errors(self):
            if _gfile().exists(self._text):
                return [self]
            return [Url(text) for text in sorted(_gfile().glob(self._text)) if not _gfile().isdir(text)]

    def open(self, mode: str) -> Any:
        """Opens the file; mode is that of `open`."""
        return _gfile().GFile(self._text, mode)

    def stat(self) -> os.stat_result:
        """Returns what is known of the file; only its size."""
        with _telling_of_errors(self):
            size = _gfile().stat(self._text).length
        return os.stat_result((0, 0, 0, 0, 0, 0, size, 0, 0, 0))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Makes the folder, where the store has folders at all."""
        with _telling_of_errors(self):
            _gfile().makedirs(self._text)

    def read_bytes(self) -> bytes:
        """Returns the file's content."""
        with _telling_of_errors(self), _gfile().GFile(self._text, "rb") as file:
            return bytes(file.read())

    def write_bytes(self, content: bytes) -> None:
        """Writes the file; others see all of it or nothing."""
        if self._text.startswith("ram://") and self.is_file():
            _gfile().remove(self._text)  # TensorFlow appends to a file that is there, in this store alone.
        with _telling_of_errors(self), _gfile().GFile(self._text, "wb") as file:
            file.write(content)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns the file's text."""
        return self.read_bytes().decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Writes the file; others see all of it or nothing."""
        self.write_bytes(text.encode(encoding))


Location = Path | Url


def is_url(path: object) -> bool:
    """Whether a path is in an object store."""
    return "://" in str(path)


def locate(path: str | Location) -> Location:
    """Returns the Path or Url that a string means; ~ is the home folder.

    Raises:
        UserError: no file system takes such a path.
    """
    if isinstance(path, Url):
        return path
    if is_url(path):
        return Url(str(path))
    # Path.expanduser raises for ~NOBODY, which can be the name of a file.
    text = os.path.expanduser(path)  # noqa: PTH111
    try:
        size = max((len(name.encode()) for name in Path(text).parts), default=0)
    except UnicodeEncodeError:
        raise UserError(f"{text!r}: not a path in UTF-8; give the file or folder another name.") from None
    if "\0" in text:
        raise UserError(f"{text!r}: a path cannot hold a NUL character; leave it out.")
    if text.isspace():
        raise UserError(f"{text!r}: a path of nothing but blanks; give the file's or folder's name.")
    if size > _MAX_NAME_BYTES or len(text.encode()) > _MAX_PATH_BYTES:
        raise UserError(
            f"{_shortened(text)}: a name in it has {size} bytes and the whole path {len(text.encode())}; at "
            f"most {_MAX_NAME_BYTES} and {_MAX_PATH_BYTES} can be had. Choose a shorter one."
        )
    return Path(text)


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]}...{text[-60:]}"


# What can be done about an error of the file system; for the others, see what the system calls them.
REMEDIES = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room, or have the quota raised",
    errno.EFBIG: "Raise the limit on a file's size (ulimit -f), or use a file system that takes larger files",
    errno.EROFS: "The file system is mounted read-only, often after an error of the disk: see dmesg, and mount it anew",
    errno.EIO: "The disk, or the connection to it, fails: see dmesg",
    errno.ESTALE: "The server of this network file system has lost the folder: mount it anew",
    errno.EMFILE: "This process has too many files open: raise the limit (ulimit -n)",
    errno.ENFILE: "This machine has too many files open: close some, or raise fs.file-max",
    errno.EACCES: "Give this user the right to do that",
    errno.EPERM: "Give this user the right to do that",
}


def reason_and_remedy(error: Exception) -> str:
    """Returns what an error of a file system or a store says, and what can be done about it, as "reason. Remedy"."""
    if isinstance(error, UserError):
        return str(error).removesuffix(".")
    if isinstance(error, OSError):
        return f"{error.strerror or error}. {REMEDIES.get(error.errno or 0, 'Check the path and its file system')}"
    # TensorFlow's own errors hold the system's words, and no number.
    known = (remedy for number, remedy in REMEDIES.items() if os.strerror(number) in str(error))
    return f"{error}. {next(known, 'Check that the disk or store is there, and that this machine may write there')}"


def copy_folder(source: Location, target: Location) -> None:
    """Copies the files and folders in a folder; those already in the target stay unless they have the same name."""
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
    with _telling_of_errors(source if isinstance(source, Url) else target):
        _gfile().copy(str(source), str(target), overwrite=True)


def remove_folder(folder: Location) -> None:
    """Removes a folder and all in it, as far as that can be done."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remove_tree(folder)


def remove_tree(folder: Location) -> None:
    """Removes a folder and all in it, if it is there.

    Raises:
        OSError: something in it cannot be removed.
        UserError: the store does not allow it.
    """
    if not folder.is_dir():
        return
    if isinstance(folder, Path):
        shutil.rmtree(folder)
        return
    with _telling_of_errors(folder):
        _gfile().rmtree(str(folder))


def remove_file(file: Location) -> None:
    """Removes a file, if it is there.

    Raises:
        OSError: it cannot be removed.
        UserError: the store does not allow it.
    """
    if isinstance(file, Path):
        file.unlink(missing_ok=True)
    elif file.is_file():
        with _telling_of_errors(file):
            _gfile().remove(str(file))


@contextlib.contextmanager
def on_disk(folder: Location) -> Iterator[Path]:
    """Gives a folder on a disk for as long as it takes to read it: the folder itself or a copy."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="trainer-") as name:
        copy_folder(folder, Path(name))
        yield Path(name)


def place_on_disk(folder: Url) -> Path:
    """Returns where on a host's disk a folder of a store belongs; the same on every host with the same user.

    It is below the folder for temporary files, which TMPDIR names, in one that only this user can read.

    Raises:
        UserError: somebody else made that one first, or could have written to it.
    """
    of_parent = hashlib.sha256(str(folder).rpartition("/")[0].encode()).hexdigest()[:10]
    home = Path(tempfile.gettempdir()) / f"trainer-{_user_name()}"
    _make_private(home)
    return home / of_parent / folder.name


def _make_private(folder: Path) -> None:
    """Makes a folder that only this user can read and write, or finds that it is one.

    Anybody may make a folder or a link in the folder for temporary files: in another user's, data could be read and
    replaced; through a link, folders elsewhere would be filled and emptied.
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
    except (KeyError, OSError):  # As in a container that runs under a number.
        return str(os.geteuid())


def _gfile() -> Any:
    # Here, as a run on a disk is looked at before TensorFlow is loaded.
    import tensorflow as tf

    return tf.io.gfile


@contextlib.contextmanager
def _telling_of_errors(where: object) -> Iterator[None]:
    import tensorflow as tf

    try:
        yield
    except tf.errors.NotFoundError as error:
        raise FileNotFoundError(f"{where}: {error.message}") from None
    except tf.errors.UnimplementedError as error:  # Of http:// and s3://, too.
        raise UserError(
            f"{where}: the object store says: {error.message[:300]}. TensorFlow reads nothing of that kind here; name "
            "a copy on a disk or on gs://."
        ) from None
    except tf.errors.OpError as error:
        raise UserError(
            f"{where}: the object store says: {error.message[:300]}. Check the name, and that this machine may "
            "read and write there (for gs://: gcloud auth application-default login)."
        ) from None
