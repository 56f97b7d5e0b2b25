"""The files of a data set that is a folder, as Hugging Face's library `datasets` saves it or as its hub has it.

- Dataset.save_to_disk writes state.json, which lists Arrow files; DatasetDict.save_to_disk a folder for each split.
- A clone from the hub has Parquet or JSON Lines files. The hub takes the split of a file from its name.
"""

import fnmatch
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import UserError, quoted
from trainer.system.storage import Location, Url
from trainer.text.formats import is_json_lines, is_table, packer_of_name

_STATE, _DICTIONARY = "state.json", "dataset_dict.json"
# The words that the hub looks for between characters that are not letters.
# Source: huggingface.co/docs/hub/datasets-file-names-and-splits.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NUM_NAMED = 5


class _Group(NamedTuple):
    """Files that belong together: those of a folder with the same split and kind.

    Attributes:
        folder: the folder that they are in.
        split: the split that their names tell, or "".
        suffix: the end of their names.
    """

    folder: Location
    split: str
    suffix: str


def files_of_dataset(folder: Location, setting: str) -> list[Location] | None:
    """Returns the files of a data set in order; None if a folder is not a data set.

    Args:
        folder: the folder.
        setting: the setting that names it, for the error.

    Raises:
        UserError: the folder has several splits or parts, of which the setting has to name one; or it is damaged.
        OSError: a folder cannot be listed.
    """
    if (folder / _DICTIONARY).is_file():
        splits = _listed(folder / _DICTIONARY, lambda content: content["splits"])
        raise UserError(
            f"{setting}={str(folder)!r} has the splits {', '.join(splits)}; name one: "
            f"{quoted(f'{setting}={folder / splits[0]}')}."
        )
    if (folder / _STATE).is_file():
        return _saved_files(folder)
    groups: dict[_Group, list[Location]] = {}
    for file in _data_files(folder):
        groups.setdefault(_group_of(file), []).append(file)
    if len(groups) > 1:
        raise UserError(
            f"{setting}={str(folder)!r} has files of {len(groups)} splits or kinds; name those of one: "
            + _ways_to_name(groups, setting)
        )
    return next(iter(groups.values()), None)


def _saved_files(folder: Location) -> list[Location]:
    """Returns the Arrow files of a folder that Dataset.save_to_disk wrote."""

    def names_in(state: dict[str, list[dict[str, str]]]) -> list[str]:
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise UserError(
                f"{folder}: a selection of rows, saved by an old version of datasets; save it again, after "
                "dataset.flatten_indices()."
            )
        return [each["filename"] for each in state["_data_files"]]

    files = [folder / name for name in _listed(folder / _STATE, names_in)]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{folder}: {missing[0].name} is missing, which its {_STATE} names; save or fetch it again.")
    return files


def _listed(path: Location, names_in: Callable[[Any], list[str]]) -> list[str]:
    """Returns the names of files or folders that a file of JSON lists; each is a single part of a path."""
    try:
        names = names_in(json.loads(path.read_text("utf-8")))
        if not isinstance(names, list) or not names or not all(map(_is_name, names)):
            raise ValueError("it lists no names of files")
    except UserError:  # A ValueError, too.
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not as the library datasets writes it ({error!r:.100}); save it again.") from None
    return names


def _is_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[^./\0][^/\0]*", name) is not None


def folders_in(top: Path) -> Iterator[Path]:
    """Yields a folder and the folders below it, each once even if several links lead to it, without hidden ones."""
    seen: set[str] = set()
    for folder, names, _ in os.walk(top, onerror=_raise, followlinks=True):
        names[:] = [] if os.path.realpath(folder) in seen else sorted(name for name in names if name[0] != ".")
        if os.path.realpath(folder) not in seen:
            seen.add(os.path.realpath(folder))
            yield Path(folder)


def _raise(error: OSError) -> None:
    raise error


def _data_files(top: Location) -> Iterator[Location]:
    """Yields the tables and JSON Lines in a folder, sorted, and on a disk those in the folders below it."""
    # In a store, looking into every folder could take minutes.
    folders: Iterable[Location] = folders_in(top) if isinstance(top, Path) else (top,)
    for folder in folders:
        entries: Iterator[Location] = iter(folder.iterdir())
        yield from (file for file in sorted(entries, key=str) if _is_data(file) and file.is_file())


def _is_data(file: Location) -> bool:
    # Plain .json holds what is known about a data set more often than its records.
    return file.name[0] != "." and (is_table(file) or (is_json_lines(file) and not file.name.lower().endswith(".json")))


def _group_of(file: Location) -> _Group:
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    split = next((split for split, names in _SPLITS.items() if words.intersection(names)), "")
    name = Path(file.name)
    suffix = "".join(name.suffixes[-1 if packer_of_name(file) is None else -2 :])
    folder = file.parent if isinstance(file, Path) else Url(str(file).rpartition("/")[0])
    return _Group(folder, split, suffix)


def _ways_to_name(groups: dict[_Group, list[Location]], setting: str) -> str:
    """Returns a setting for each of the first groups, which names its files."""
    ways = []
    for group, files in itertools.islice(groups.items(), _NUM_NAMED):
        names = [file.name for file in files]
        others = [file.name for key, each in groups.items() if key.folder == group.folder for file in each]
        start = os.path.commonprefix(names)  # noqa: RUF071  # Of characters, not of folders.
        pattern = f"{glob.escape(start)}*{group.suffix}"
        if len(names) > 1 and len(fnmatch.filter(others, pattern)) == len(names):
            names = [pattern]
        paths = [str(group.folder / name) for name in names]
        value = paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"
        ways.append(quoted(f"{setting}={value}"))
    return ", or ".join(ways) + (", and so on." if len(groups) > _NUM_NAMED else ".")
