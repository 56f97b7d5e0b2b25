"""Checkpoints: a folder per step, with named arrays and a manifest, that exists complete or not at all.

On a disk a folder is written under another name and renamed. An object store cannot rename a tree: there the manifest
is written last, and a folder counts as a checkpoint once its manifest is there and agrees with its files.
"""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import tensorflow as tf

from trainer.errors import UserError
from trainer.runs.array_file import ArrayFile, Arrays, StoredArray, identity_of, parts_of
from trainer.runs.run_folder import steps_in
from trainer.system.manifest import DamagedError, sealed, unsealed
from trainer.system.storage import (
    Location,
    Url,
    locate,
    reason_and_remedy,
    remove_file,
    remove_tree,
)
from trainer.system.whole import sync, write_whole_folder

MANIFEST = "manifest.json"
FORMAT = 1

# Seconds to wait after each failure to write a checkpoint; the last number repeats. Once the run is over and waits for
# the checkpoint: the number of tries, and the seconds between them.
RETRY_SECS = (1.0, 5.0, 20.0, 60.0)
LAST_TRIES, LAST_RETRY_SECS = 3, 1.0


class Checkpoint(NamedTuple):
    """A verified checkpoint, whose files are open. On a local disk they can be read even if the checkpoint is removed.

    Attributes:
        folder: the checkpoint's folder.
        manifest: the entries of its manifest: the step, the files, and the facts that were given to `save`.
        files: its files by name.
    """

    folder: Location
    manifest: dict[str, Any]
    files: Mapping[str, ArrayFile]

    @property
    def step(self) -> int:
        """The number of steps taken before it was saved."""
        return int(self.manifest["step"])

    def has(self, group: str) -> bool:
        """Returns whether the checkpoint has a group. The first one of a run may lack `optimizer`: it begins anew."""
        return f"{group}.safetensors" in self.manifest["files"]

    def arrays(self, group: str) -> dict[str, StoredArray]:
        """Returns a group of arrays, such as `weights`. Each is read, and verified again, when NumPy needs it."""
        return self.files[f"{group}.safetensors"].arrays()


class Checkpoints:
    """The checkpoints of a run. As a context manager it waits at the end until everything is written.

    Args:
        folder: the folder that holds a folder per step; a path, or a URL that tf.io.gfile reads.
        keep_last: how many of the newest checkpoints `save` keeps.
        say: prints a line.
        max_failures: how many failures in a row to write a checkpoint stop the run; None: no number of failures does.
        scores: the validation losses by step. The checkpoint with the lowest loss is kept, too. The caller may add to
            it.
        fault_of: returns how a checkpoint's manifest shows that it belongs to another run; None if it does not.
        on_saved: called from another thread after a checkpoint was written, before older ones are removed.

    Attributes:
        kept_steps: steps whose checkpoints are kept, too.
        on_whole: called with the step and the folder of each checkpoint that is whole, by the thread that saves, from
            within `save`, `make_way`, `check` or `wait`; once for a step that is saved twice in a row.
    """

    def __init__(
        self,
        folder: str | Location,
        keep_last: int = 1,
        say: Callable[[str], None] = print,
        max_failures: int | None = None,
        scores: Mapping[int, float] | None = None,
        fault_of: Callable[[dict[str, Any]], str | None] = lambda manifest: None,
        on_saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = locate(folder)
        self.keep_last = keep_last
        self.say = say
        self.max_failures = max_failures
        self.scores = {} if scores is None else scores
        self.kept_steps: Collection[int] = ()
        self.on_whole: Callable[[int, Location], None] = lambda step, folder: None
        self._fault_of = fault_of
        self._on_saved = on_saved
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[int | None] | None = None
        self._num_failures = 0
        self._last_whole: int | None = None
        # For the writer, which may be waiting to try again: whether a newer checkpoint replaces the one that it writes,
        # whether the run is over and waits for it, and an event that ends the writer's wait.
        self._is_superseded, self._is_awaited, self._woken = False, False, threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except UserError as own:
            if error is None:
                raise
            self.say(str(own))  # The error that stopped the run is the one to raise.

    def save(self, step: int, groups: Mapping[str, Arrays], facts: Mapping[str, Any]) -> None:
        """Writes a checkpoint in another thread. Waits for the checkpoint before it, and then returns at once.

        A checkpoint that cannot be written is tried again until it is written, or until this is called for the next
        one.

        Args:
            step: the steps taken so far.
            groups: arrays by name, by group; the caller must not change them afterwards.
            facts: more entries for the manifest; JSON.

        Raises:
            UserError: checkpoints could not be written `max_failures` times in a row.
        """
        self.make_way()
        self._pending = self._writer.submit(self._write_or_try_again, step, groups, facts)

    def make_way(self) -> None:
        """Waits for the checkpoint before the next one, or for its present try if it cannot be written. Its arrays are
        dropped then, so the caller that waits before it copies the next ones holds no two copies.

        Raises:
            UserError: checkpoints could not be written `max_failures` times in a row.
        """
        self._is_superseded = True
        self._join()

    def check(self) -> None:
        """Raises the error of a checkpoint that could not be written, if there is one; does not wait.

        Raises:
            UserError: checkpoints could not be written `max_failures` times in a row.
        """
        if self._pending is not None and self._pending.done():
            self._join()

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            UserError: the last checkpoint could not be written in several tries.
        """
        self._is_awaited = True
        self._join()

    def _join(self) -> None:
        self._woken.set()
        pending, self._pending = self._pending, None
        try:
            step = None if pending is None else pending.result()
        finally:
            self._is_superseded, self._is_awaited = False, False
            self._woken.clear()
        if step is not None and step != self._last_whole:
            self._last_whole = step
            self.on_whole(step, self._folder_of(step))

    def latest(self) -> Checkpoint | None:
        """Returns the newest whole checkpoint, and prints which newer ones are damaged.

        Returns:
            The checkpoint. None if no step has a folder, or if no folder in an object store was written to the end.

        Raises:
            UserError: there are checkpoints and all are damaged, or the disk or the store cannot be read.
        """
        steps: list[int] | None = None
        # List again until nothing changes: a process that trains in the run replaces old checkpoints by newer ones.
        while steps != (steps := self.steps()):
            faults: dict[int, _Fault] = {}
            for step in reversed(steps):
                try:
                    found = self.of_step(step)
                except _Fault as fault:
                    faults[step] = fault
                else:
                    for skipped in faults.keys() & set(self.steps()):
                        self.say(f"Skipping {self._folder_of(skipped)}: {faults[skipped]}")
                    return found
        is_store = isinstance(self.folder, Url)
        if all(is_store and isinstance(fault, _Unfinished) for fault in faults.values()):
            return None
        listed = " ".join(f"step {step}: {faults[step]}" for step in sorted(faults))
        raise UserError(
            f"{self.folder}: none of the {len(faults)} checkpoints there can be used. {listed} Bring one back from a "
            "copy; training does not begin again at step 0 over them."
        )

    def of_step(self, step: int) -> Checkpoint:
        """Returns the checkpoint of a step.

        Raises:
            UserError: the checkpoint is not there, is damaged, or belongs to another run.
        """
        folder = self._folder_of(step)
        manifest = _read_manifest(folder)
        files = _verified_files(folder, manifest)
        if (fault := self._fault_of(manifest)) is not None:
            raise _Fault(fault)
        return Checkpoint(folder, manifest, files)

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, oldest first.

        Raises:
            UserError: the disk or the store cannot be read.
        """
        return steps_in(self.folder)

    def usable_steps(self, steps: Iterable[int]) -> list[int]:
        """Returns those of these steps that have a whole checkpoint of this run."""
        usable = []
        for step in steps:
            with contextlib.suppress(UserError):
                usable.append(self.of_step(step).step)
        return usable

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint with the lowest validation loss; None if no checkpoint was scored."""
        steps = [step for step in self.steps() if np.isfinite(self.scores.get(step, np.inf))]
        return min(steps, key=lambda step: (self.scores[step], step), default=None)

    def _folder_of(self, step: int) -> Location:
        return folder_of(self.folder, step)

    def _write_or_try_again(self, step: int, groups: Mapping[str, Arrays], facts: Mapping[str, Any]) -> int | None:
        """Returns the step once its checkpoint is written; None if a newer checkpoint has to take its place."""
        tries_left = LAST_TRIES
        for secs in itertools.chain(RETRY_SECS, itertools.repeat(RETRY_SECS[-1])):
            try:
                self._write(step, groups, facts)
                self._num_failures = 0
                return step
            except UserError as error:
                self._num_failures += 1
                if self._num_failures == self.max_failures:
                    raise UserError(
                        f"{error} The run stops: this was failure {self._num_failures} in a row and "
                        f"checkpoint.max_failures={self.max_failures}."
                    ) from error
                if self._is_superseded:
                    self.say(f"{error} The next checkpoint takes its place.")
                    return None
                tries_left -= self._is_awaited
                if not tries_left:
                    raise UserError(f"{error} What was saved before is still there.") from error
                secs = LAST_RETRY_SECS if self._is_awaited else secs
                self.say(f"{error} Trying again in {secs:.0f} s; what was saved before is still there.")
            # The event interrupts the first wait when the run is over. After that, each try waits its full time.
            if self._is_awaited:
                time.sleep(secs)
            else:
                self._woken.wait(secs)
            if self._is_superseded:
                return None
        return None

    def _write(self, step: int, groups: Mapping[str, Arrays], facts: Mapping[str, Any]) -> None:
        final = self._folder_of(step)
        files, manifest = _files_of(step, groups, facts)
        # A resumed run that is stopped before its first step saves the checkpoint that it has just read, perhaps its
        # only one. Replacing the folder would leave a moment without it. The facts may differ by an override.
        if not self._holds(step, manifest["files"]):
            _write_folder(final, files, manifest)
        if not isinstance(self.folder, Url):
            with _as_user_error(f"The checkpoint {final} is whole, but a loss of power could still undo it"):
                sync(self.folder)
        self._on_saved()
        self._remove_before(step)

    def _holds(self, step: int, files: Mapping[str, Any]) -> bool:
        """Returns whether there is a whole checkpoint of this step with the same files."""
        try:
            return bool(self.of_step(step).manifest["files"] == files)
        except UserError:
            return False

    def _remove_before(self, step: int) -> None:
        """Removes old checkpoints except the best one and those of kept_steps. If one cannot be removed, the next call
        tries again.
        """
        try:
            best = self.best_step()
            # A later step than the one just saved is a damaged checkpoint, and does not count as one of the newest.
            old_steps = [other for other in self.steps() if other <= step][: -self.keep_last]
        except UserError as error:
            self.say(f"Old checkpoints stay for now: {error}")
            return
        for old in old_steps:
            folder = self._folder_of(old)
            if old == best or old in self.kept_steps:
                continue
            try:
                # The manifest first: a process can be killed while it removes a tree, and the rest must not look like a
                # checkpoint.
                remove_file(folder / MANIFEST)
                remove_tree(folder)
            except (OSError, UserError, tf.errors.OpError) as error:
                self.say(
                    f"The old checkpoint {folder} cannot be removed and stays for now: {reason_and_remedy(error)}."
                )


class _Fault(UserError):
    """The checkpoint cannot be used."""


class _Unfinished(_Fault):
    """The checkpoint was not written to the end."""


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Turns an error of the disk or the store into a UserError with this beginning. An array of another checkpoint that
    cannot be read is not an error of what is written.
    """
    try:
        yield
    except DamagedError:
        raise
    except (OSError, UserError, tf.errors.OpError) as error:
        raise UserError(f"{what}: {reason_and_remedy(error)}.") from error


def folder_of(checkpoints: Location, step: int) -> Location:
    """Returns the folder of the checkpoint of a step, given the folder of all of them."""
    return checkpoints / f"step_{step:09d}"


def write_first(checkpoints: Location, step: int, groups: Mapping[str, Arrays], facts: Mapping[str, Any]) -> None:
    """Writes the first checkpoint of a new run, whose other checkpoints `Checkpoints` writes. Waits until it is there.

    Args:
        checkpoints: the folder that will hold a folder per step.
        step: the steps taken so far.
        groups: arrays by name, by group.
        facts: more entries for the manifest; JSON.

    Raises:
        UserError: it cannot be written.
        DamagedError: an array cannot be read any more.
    """
    _write_folder(folder_of(checkpoints, step), *_files_of(step, groups, facts))
    if not isinstance(checkpoints, Url):
        sync(checkpoints)


def _files_of(
    step: int, groups: Mapping[str, Arrays], facts: Mapping[str, Any]
) -> tuple[dict[str, Iterator[bytes]], dict[str, Any]]:
    """Returns the files of a checkpoint, whose parts are made as they are written, and its manifest."""
    files = {f"{group}.safetensors": arrays for group, arrays in groups.items()}
    identities = {name: identity_of(parts_of(arrays)) for name, arrays in files.items()}
    manifest = sealed({"format": FORMAT, "step": step, **facts, "files": identities})
    return {name: parts_of(arrays) for name, arrays in files.items()}, manifest


def _write_folder(final: Location, files: Mapping[str, Iterable[bytes]], manifest: Mapping[str, Any]) -> None:
    with _as_user_error(f"Cannot write the checkpoint {final}"):
        write_whole_folder(final, {**files, MANIFEST: [json.dumps(manifest, indent=2).encode()]})


def assign(variables: Mapping[str, Any], arrays: Arrays, source: str | Location) -> None:
    """Gives variables the values saved under their names, one after the other: no more than one array is in memory.

    Raises:
        UserError: a variable has no array, an array has no variable, or their shapes or dtypes differ; no variable was
            changed. Or an array cannot be read any more, and some variables were.
    """
    missing, extra = sorted(variables.keys() - arrays.keys()), sorted(arrays.keys() - variables.keys())
    if missing or extra:
        raise UserError(
            f"{source} does not hold this model: it lacks {missing[:3] or 'nothing'} and has {extra[:3] or 'nothing'} "
            "in addition. Use the config, or the build_model function, that it was trained with."
        )
    for name, variable in variables.items():
        array = arrays[name]
        if tuple(variable.shape) != array.shape or tf.as_dtype(variable.dtype) != tf.as_dtype(array.dtype):
            raise UserError(
                f"{source} has {name} as {array.dtype}{list(array.shape)}, the model as "
                f"{tf.as_dtype(variable.dtype).name}{list(variable.shape)}. Use the config it was trained with."
            )
    # In the order of the arrays, which is that of their file: a store reads ahead, and again after each jump back.
    for name, array in arrays.items():
        variables[name].assign(np.asarray(array))


def _read_manifest(folder: Location) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = unsealed(path.read_bytes(), path)
    except FileNotFoundError:
        raise _Unfinished("it has no manifest, so it was not written to the end.") from None
    except OSError as error:
        raise _Fault(f"{path} cannot be read: {reason_and_remedy(error)}.") from None
    except DamagedError as error:
        raise _Fault(str(error)) from None
    if manifest["format"] != FORMAT:
        raise _Fault(f"{path} is of format {manifest['format']}, not {FORMAT}; use the release that wrote it.")
    return manifest


def _verified_files(folder: Location, manifest: Mapping[str, Any]) -> dict[str, ArrayFile]:
    try:
        return {name: ArrayFile(folder / name, identity) for name, identity in manifest["files"].items()}
    except DamagedError as error:
        raise _Fault(str(error)) from None
