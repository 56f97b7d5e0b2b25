"""Files and folders that exist whole or not at all, even after a process was killed or the power was lost.

There is one way for each kind of place:

- On a disk a file or folder is written under another name, synced, and renamed.
- An object store cannot rename a folder, but a file in it is whole or does not exist. The files of a folder are written
  one after the other, and the folder counts once its last file, the manifest, exists.
"""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from trainer.errors import UserError
from trainer.system.storage import Location, Url, copy_file, copy_folder, is_url, remove_tree, write_parts

# One name for all folders below a parent: the next process clears away what a killed process left there.
_PARTIAL_FOLDER = ".partial"


def write_whole(file: Location, text: str) -> None:
    """Writes a text file, or replaces an existing one."""
    if isinstance(file, Url):
        file.write_text(text)
        return
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.rename(file)
    sync(file.parent)


def write_whole_folder(folder: Location, files: Mapping[str, Iterable[bytes]]) -> None:
    """Writes a folder of files, or replaces an existing one. The caller syncs the folder that it is in.

    An existing folder is removed before the new one gets its name, because a rename cannot replace a folder that has
    files: a process that is killed between the two leaves neither.

    Args:
        folder: the folder. The folder that it is in is made if it is missing; only one process may write there at a
            time.
        files: the content of each file by its name, in parts, each of which is dropped once it is written. The last
            file is the manifest: a folder without it does not count.

    Raises:
        OSError: the disk cannot be written, or the store kept less than was written. Nothing half-written is left.
        UserError: the store cannot be written. What is left there has no manifest.
    """
    written = folder if isinstance(folder, Url) else folder.parent / _PARTIAL_FOLDER
    try:
        remove_tree(written)
        if not isinstance(folder, Url):
            make_folder(folder.parent)
        written.mkdir()
        for name, parts in files.items():
            write_parts(written / name, parts)
        if not isinstance(folder, Url) and not isinstance(written, Url):
            sync_tree(written)
            remove_tree(folder)
            written.rename(folder)
    except (OSError, UserError):
        with contextlib.suppress(OSError, UserError):
            remove_tree(written)
        raise


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a place at which to write a file or folder. It gets its name, path, when the block ends without an error.

    The place has the last name of path, for programs that read a file's kind from its name.

    Raises:
        OSError: the disk cannot be written. Nothing half-written is left.
        FileExistsError: path was made meanwhile.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        remove_tree(partial)  # A killed process may have left it.
        make_folder(partial)
        yield partial / path.name
        sync_tree(partial)
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        (partial / path.name).rename(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            remove_tree(partial)


def copy_whole_folder(source: Path, target: Url, manifest: str) -> None:
    """Copies a folder from a disk into a store, the manifest last."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == manifest):
        copy_folder(path, target / path.name) if path.is_dir() else copy_file(path, target / path.name)


def rename_unless_there(partial: Path, folder: Path) -> bool:
    """Renames a folder that was written and synced; returns False if another process has already put one there."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        return False
    return True


def make_folder(folder: Location) -> None:
    """Makes a folder and the missing folders above it, so that they survive a loss of power."""
    if isinstance(folder, Url):
        folder.mkdir()
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def sync_tree(folder: Path, except_for: Path | None = None) -> None:
    """Makes a folder and its content, except one path, survive a loss of power."""
    for path in folder.rglob("*"):
        if path != except_for:
            sync(path)
    sync(folder)


def sync(path: str | os.PathLike[str]) -> None:
    """Makes a file or folder on a disk survive a loss of power; in a store it does so anyway."""
    if is_url(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; nothing can be done about that.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not Path(path).is_dir():
            raise
    finally:
        os.close(descriptor)
