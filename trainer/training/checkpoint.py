"""Checkpoints: named arrays and a manifest in a folder per step, whole or not there at all.

On a disk a folder is written under another name and renamed. An object store cannot rename a tree, so there a folder
counts once its manifest, written last, is there and agrees with the files.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np
import safetensors.numpy
import tensorflow as tf

from trainer.config import UserError
from trainer.model.gpt import GPT
from trainer.storage import is_url, sync

MANIFEST = "manifest.json"
FORMAT = 1

Arrays = Mapping[str, np.ndarray]


class Checkpoint(NamedTuple):
    """A verified checkpoint.

    folder: where it is. manifest: what it says of itself: step, files and the facts given to `save`.
    """

    folder: str
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of steps taken before it was saved."""
        return int(self.manifest["step"])

    def arrays(self, group: str) -> dict[str, np.ndarray]:
        """Reads a group of arrays, such as `weights`, and verifies it again.

        Raises:
            UserError: the file is not what the manifest says.
        """
        return safetensors.numpy.load(_verified_bytes(self.folder, f"{group}.safetensors", self.manifest))


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: holds a folder per step; a path, or a URL that tf.io.gfile understands.
        keep_last: how many of the newest `save` keeps.
        say: prints a line.
    """

    def __init__(self, folder: str, keep_last: int = 1, say: Callable[[str], None] = print) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.say = say
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, groups: Mapping[str, Arrays], facts: Mapping[str, Any]) -> None:
        """Writes a checkpoint beside the training: returns at once, after waiting for the one before.

        Args:
            step: steps taken so far.
            groups: arrays by name, by group; not to be changed afterwards.
            facts: what else the manifest says; JSON.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, step, groups, facts)

    def wait(self) -> None:
        """Returns once everything is written.

        Raises:
            UserError: it could not be written; nothing half-written is left.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Checkpoint | None:
        """Returns the newest checkpoint that verifies, and says which newer ones did not and why."""
        for step in reversed(self.steps()):
            folder = self._folder_of(step)
            try:
                return Checkpoint(folder, _verified_manifest(folder))
            except (UserError, tf.errors.OpError) as error:
                self.say(f"Skipping {folder}: {error}")
        return None

    def steps(self) -> list[int]:
        """Returns the steps there is a folder for, oldest first."""
        if not tf.io.gfile.isdir(self.folder):
            return []
        names = (re.fullmatch(r"step_(\d+)/?", name) for name in tf.io.gfile.listdir(self.folder))
        return sorted(int(match.group(1)) for match in names if match)

    def _folder_of(self, step: int) -> str:
        return f"{self.folder}/step_{step:09d}"

    def _write(self, step: int, groups: Mapping[str, Arrays], facts: Mapping[str, Any]) -> None:
        final = self._folder_of(step)
        files = {f"{group}.safetensors": _serialized(arrays) for group, arrays in groups.items()}
        manifest = _sealed(
            {"format": FORMAT, "step": step, **facts, "files": {n: _identity(d) for n, d in files.items()}}
        )
        # A run that is stopped before its first step saves what it has just read, perhaps its only checkpoint:
        # replacing a folder would leave a moment without it.
        if _holds(final, manifest):
            return
        # One name for all steps, so that what a killed process left is cleared away by the next one.
        written = final if is_url(final) else f"{self.folder}/.partial"
        try:
            _remove_tree(written)
            tf.io.gfile.makedirs(written)
            for name, data in files.items():
                _write_file(f"{written}/{name}", data)
            _write_file(f"{written}/{MANIFEST}", json.dumps(manifest, indent=2).encode())
            if written != final:
                sync(written)
                _remove_tree(final)
                tf.io.gfile.rename(written, final)
                sync(self.folder)
        except (OSError, tf.errors.OpError) as error:
            _remove_tree(written)
            raise UserError(
                f"Cannot write the checkpoint {final}: {error}. Make room, then go on from the one before; nothing "
                "half-written is left."
            ) from error
        self._forget_before(step)

    def _forget_before(self, step: int) -> None:
        # A later step than the one just saved is a checkpoint that did not verify, and takes nobody's place.
        for old in [other for other in self.steps() if other <= step][: -self.keep_last]:
            folder = self._folder_of(old)
            # The manifest goes first: a tree is not removed at once, and half of one must not look like a checkpoint.
            tf.io.gfile.remove(f"{folder}/{MANIFEST}") if tf.io.gfile.exists(f"{folder}/{MANIFEST}") else None
            _remove_tree(folder)


def named_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Returns every variable of a model by the name it is saved under.

    The GPT's are named by their path. Keras numbers the layers of other models by what was built before in the process,
    so theirs are named by their place in the model.
    """
    if isinstance(model, GPT):
        return {variable.path: variable for variable in model.variables}
    return {f"{i:04d}/{variable.name}": variable for i, variable in enumerate(model.variables)}


def assign(variables: Mapping[str, Any], arrays: Arrays, source: str) -> None:
    """Gives variables the values saved under their names.

    Raises:
        UserError: a variable has no array, an array has no variable, or their shapes or dtypes differ.
    """
    missing, extra = sorted(variables.keys() - arrays.keys()), sorted(arrays.keys() - variables.keys())
    if missing or extra:
        raise UserError(
            f"{source} does not hold this model: it lacks {missing[:3] or 'nothing'} and has {extra[:3] or 'nothing'} "
            "besides. Use the config, or the build_model function, that it was trained with."
        )
    for name, variable in variables.items():
        array = arrays[name]
        if tuple(variable.shape) != array.shape or tf.as_dtype(variable.dtype) != tf.as_dtype(array.dtype):
            raise UserError(
                f"{source} has {name} as {array.dtype}{list(array.shape)}, the model as "
                f"{tf.as_dtype(variable.dtype).name}{list(variable.shape)}. Use the config it was trained with."
            )
    for name, variable in variables.items():
        variable.assign(arrays[name])


def _serialized(arrays: Arrays) -> bytes:
    # safetensors copies the memory of an array whatever its strides are, and knows no NumPy scalars.
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def _read_manifest(folder: str) -> dict[str, Any]:
    path = f"{folder}/{MANIFEST}"
    if not tf.io.gfile.exists(path):
        raise UserError("it has no manifest, so it was not written to the end.")
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            manifest = json.loads(file.read())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    if not isinstance(manifest, dict) or manifest != _sealed(manifest):
        raise UserError(f"{path} is damaged: its SHA-256 is not the one it states.")
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} is of format {manifest['format']}, not {FORMAT}; use the release that wrote it.")
    return manifest


def _sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a manifest with its own SHA-256."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _verified_manifest(folder: str) -> dict[str, Any]:
    manifest = _read_manifest(folder)
    for name in manifest["files"]:
        _verified_bytes(folder, name, manifest)
    return manifest


def _holds(folder: str, manifest: Mapping[str, Any]) -> bool:
    """Whether a folder is whole and is what this manifest says."""
    try:
        return bool(_verified_manifest(folder)["sha256"] == manifest["sha256"])
    except (UserError, tf.errors.OpError):
        return False


def _verified_bytes(folder: str, name: str, manifest: Mapping[str, Any]) -> bytes:
    path = f"{folder}/{name}"
    if not tf.io.gfile.exists(path):
        raise UserError(f"{path} is missing.")
    with tf.io.gfile.GFile(path, "rb") as file:
        data = bytes(file.read())
    if _identity(data) != manifest["files"][name]:
        raise UserError(f"{path} is damaged: its length or SHA-256 is not the manifest's.")
    return data


def _identity(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_file(path: str, data: bytes) -> None:
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(data)
    sync(path)
    # gfile does not tell of every short write.
    if tf.io.gfile.stat(path).length != len(data):
        raise OSError(f"{path} was cut short; is the disk full?")


def _remove_tree(folder: str) -> None:
    if tf.io.gfile.exists(folder):
        tf.io.gfile.rmtree(folder)
