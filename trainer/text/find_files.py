"""The files that a setting names, by name or glob, on a disk or in an object store."""

import collections
import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from trainer.errors import UserError, quoted
from trainer.system.storage import Location, Url, locate
from trainer.text.downloads import download_of
from trainer.text.folders import files_of_dataset, folders_in
from trainer.text.formats import fault_of_name, packer_of_name

Item = TypeVar("Item")


def find_files(sources: Iterable[str], setting: str) -> list[Location]:
    """Expands file names and globs to files, in the order given, with the matches of a glob sorted. Each file is there
    once, even if several names or links lead to it.

    Args:
        sources: the names of files, of folders that `files_of_dataset` knows, or globs, in which ** matches any depth
            and ~ is the home folder; or URLs, or globs of URLs, such as gs://bucket/*.jsonl.gz.
        setting: the setting that names the sources, for the error.

    Raises:
        UserError: a source matches no file, is another directory, a pipe or a device, or has the name of a table
            without types (.csv, .tsv); or a folder cannot be listed.
    """
    files: list[Location] = []
    for source in sources:
        path = locate(source)
        try:
            matches: Sequence[Location] | None
            if path.is_dir():
                matches = files_of_dataset(path, setting)
                if matches is None:
                    raise UserError(f"{setting}={source!r} is a directory; {_files_to_name(path, setting)}")
            else:
                matches = path.glob() if isinstance(path, Url) else _matches(path)
            if not matches:
                raise UserError(f"{setting}={source!r}: {_nothing_there(source, setting)}")
            for match in matches:
                if (fault := _fault_of_file(match)) is not None:
                    raise UserError(f"{setting}={source!r}: {fault}")
                files.append(match)
        except OSError as error:
            where = error.filename or path
            raise UserError(f"{setting}={source!r}: {where} cannot be read: {error.strerror or error}.") from None
    return each_once(files)


def each_once(files: Iterable[Item]) -> list[Item]:
    """Returns each file once, by its first name: links give a file several names."""
    found: dict[object, Item] = {}
    for file in files:
        found.setdefault(os.path.realpath(file) if isinstance(file, Path) else file, file)
    return list(found.values())


def _matches(path: Path) -> list[Path]:
    # A name that exists is not a glob: book[1].txt can be a file, and in book[1]/*.txt only the end can be a glob.
    folder, patterns = path, list[str]()
    while not _is_there(folder) and folder != folder.parent:
        folder, patterns = folder.parent, [folder.name, *patterns]
    return sorted(match for match in _expand(folder, patterns) if not match.is_dir()) if patterns else [path]


def _expand(folder: Path, patterns: list[str]) -> Iterator[Path]:
    """Yields what a glob in a folder matches, as the module glob does, with two differences: a folder that cannot be
    listed is an error, and a link that leads back to a folder above is not followed."""
    if not patterns:
        yield folder
        return
    first, *rest = patterns
    if first == "**":
        for each in folders_in(folder):
            yield from _expand(each, rest or ["*"])
    elif not glob.has_magic(first):
        if _is_there(folder / first):
            yield from _expand(folder / first, rest)
    elif folder.is_dir():
        for name in fnmatch.filter([path.name for path in folder.iterdir()], first):
            if not name.startswith(".") or first.startswith("."):
                yield from _expand(folder / name, rest)


def _is_there(path: Path) -> bool:
    """Whether there is such a file or link; raises OSError if the folder above may not be searched."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _fault_of_file(path: Location) -> str | None:
    if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):
        return f"{path} is a pipe, a device or a socket; text is read several times, so name a file that holds it."
    return fault_of_name(path)


def _files_to_name(folder: Location, setting: str) -> str:
    """Returns the setting that names the files in a folder."""
    ends, pattern = [""], "*.txt"
    if isinstance(folder, Path):
        for below in folders_in(folder):
            files = [path for path in sorted(below.iterdir()) if path.is_file() and path.name[0] != "."]
            ends = ["".join(path.suffixes[-1 if packer_of_name(path) is None else -2 :]) for path in files]
            if ends:
                end = collections.Counter(ends).most_common(1)[0][0]
                pattern = f"{'' if below == folder else '**/'}*{end}"
                break
        else:
            return "name files; there are none in it."
    return f"name its files, for example {quoted(f'{setting}={folder / pattern}')}."


def _nothing_there(source: str, setting: str) -> str:
    if (download := download_of(source)) is not None:
        own = "data.train=PATH" if download.member == "" else "data.train=PATH data.validation=PATH"
        return (
            f"no such file, seen from {Path.cwd()}. Fetch {download.name} with\n"
            f"  trainer prepare {quoted(download.config)} --download\nor train on your own text: {own}"
        )
    if "," in source:
        several = quoted(f"{setting}=[{source.strip('[]')}]")
        return f"no such file, seen from {Path.cwd()}. Name several files so: {several}"
    what = "no file matches" if glob.has_magic(source) else "no such file"
    # Without data.validation, part of data.train is held out; a set of evaluation.sets is only scored.
    is_needless = setting == "data.validation" or setting.startswith("evaluation.sets.")
    without = f", or leave it out with {setting}=none" if is_needless else ""
    return (
        f"{what}, seen from {Path.cwd()}. Check the path, or give your own text: {setting}=PATH, a file or a glob in "
        f"quotes, such as '{setting}=texts/*.txt'{without}."
    )
