"""Finds the prepared data that a run was started on, even if it was moved, and loads the run's tokenizer."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.data.prepare import fetch
from trainer.data.shards import MANIFEST, PreparedData, load_prepared, read_manifest
from trainer.errors import UserError, quoted
from trainer.runs.run_folder import CONFIG, RunFolder, place_of
from trainer.system.storage import Location, Url, locate, on_disk
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.tokenizers.tokenizer_files import load_tokenizer


def find_prepared(run: RunFolder, prepare_again: Callable[[], PreparedData] | None = None) -> PreparedData:
    """Returns the data that a run was started on.

    Args:
        run: the run.
        prepare_again: prepares the data; called if the data is gone. None: missing data is an error.

    Raises:
        UserError: the data is gone, or is not the same.
    """
    try:
        folder = find_data_folder(run)
    except UserError:
        if prepare_again is None:
            raise
        prepared = prepare_again()
    else:
        prepared = fetch(folder) if isinstance(folder, Url) else load_prepared(folder)
    if prepared.fingerprint != run.facts["data_fingerprint"]:
        raise UserError(f"{prepared.folder} is not the data {run.path} was started on; start a new run for other data.")
    return prepared


def find_data_folder(run: RunFolder) -> Location:
    """Returns the folder of the data that a run was started on. The data is recognized by its fingerprint.

    The first place is the one that the run's record names. A project may have been moved or mounted elsewhere: the next
    places are the same place relative to the run, data.prepared_folder, and the folder beside the run. If the data is
    in none of them, the first place is returned, if there is a folder.

    Raises:
        UserError: the data is gone.
    """
    recorded = locate(run.facts["prepared_folder"])
    for folder in _folders_to_try(run):
        try:
            if read_manifest(folder)["fingerprint"] == run.facts["data_fingerprint"]:
                return folder
        except UserError:
            continue  # It is damaged, or in a store that does not answer. Below, the recorded place still counts.
    with contextlib.suppress(PermissionError):  # On this machine the recorded place can belong to another user.
        if recorded.is_dir():
            return recorded
    homes = ", ".join(dict.fromkeys(str(home) for home in _homes_to_try(run)))
    raise UserError(
        f"{run.path} was started on the prepared data {recorded}, which is gone. Prepare the same text with the "
        f"same settings again (trainer prepare {quoted(run.path / CONFIG)}), or bring the folder {recorded.name} "
        f"back into one of {homes}, or name another folder that has it, data.prepared_folder=FOLDER after `trainer "
        f"train --resume {quoted(run.path)}` or `trainer evaluate {quoted(run.path)}`. Or start a new run."
    )


def record_place_of(run: RunFolder, prepared: PreparedData) -> None:
    """Writes into the run's record where its data is, if the data has moved.

    Raises:
        UserError: the record cannot be written.
    """
    place = place_of(prepared, run.path)
    if any(run.facts.get(key) != value for key, value in place.items()):
        run.record(**place)


def _folders_to_try(run: RunFolder) -> Iterator[Location]:
    recorded = locate(run.facts["prepared_folder"])
    yield recorded
    homes = list(dict.fromkeys(_homes_to_try(run)))
    yield from (home / recorded.name for home in homes)
    # data.prepared_folder is the folder above the data, but a user may have given the folder of the data itself.
    yield locate(run.config.data.prepared_folder)
    for home in homes:
        if isinstance(home, Path):
            yield from (manifest.parent for manifest in sorted(home.glob(f"*/{MANIFEST}")))


def _homes_to_try(run: RunFolder) -> Iterator[Location]:
    """Yields the folders that may hold the folder of the prepared data."""
    yield locate(run.config.data.prepared_folder)
    if isinstance(run.path, Path):
        path = run.path.resolve()
        if relative := run.facts.get("prepared_folder_from_run"):
            yield Path(os.path.normpath(path / relative)).parent
        yield from (path.parent, path.parent / "prepared", path.parent.parent / "prepared")


def load_tokenizer_of(run: RunFolder) -> Tokenizer:
    """Returns a run's tokenizer.

    Raises:
        UserError: its files are damaged, or were replaced by another tokenizer's.
    """
    try:
        with on_disk(run.path / "tokenizer") as folder:
            tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint != run.facts["tokenizer_fingerprint"]:
            raise UserError(f"{run.path / 'tokenizer'} is not the tokenizer this run was started with.")
    except (OSError, UserError) as error:
        reason = str(error).partition("; delete the folder that holds it")[0].rstrip(".")
        raise UserError(
            f"{reason}. Copy it again from the data of the run, whose folder has the same tokenizer/: "
            f"{run.facts['prepared_folder']}"
        ) from None
    return tokenizer
