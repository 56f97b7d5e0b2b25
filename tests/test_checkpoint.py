import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import UserError
from trainer.runs import checkpoint as module
from trainer.runs.checkpoint import FORMAT, Checkpoint, Checkpoints, assign
from trainer.system.manifest import DamagedError, sealed
from trainer.system.storage import OpenedFile

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["disk", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "checkpoints")
        return
    yield f"ram://{tmp_path.name}/checkpoints"
    if tf.io.gfile.exists(f"ram://{tmp_path.name}"):
        tf.io.gfile.rmtree(f"ram://{tmp_path.name}")


def groups(step: int) -> dict[str, dict[str, np.ndarray]]:
    draw = np.random.default_rng(step)
    return {
        "weights": {
            "kernel": draw.normal(size=[3, 5]).astype(np.float32),
            "double": draw.normal(size=[2]),
            "view": draw.normal(size=[4, 6]).T[::2],
            "nothing": np.zeros([0, 3], np.float32),
        },
        "optimizer": {
            "num_updates": np.array(step, np.int64),
            "numpy_scalar": cast(np.ndarray, np.float64(step / 3)),
            "flag": np.array(True),
            "half": draw.normal(size=[7]).astype(np.float16),
        },
    }


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, groups(step), {"data_fingerprint": "abc"})
    checkpoints.wait()


def assert_is_of(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.manifest["data_fingerprint"] == "abc"
    for group, arrays in groups(step).items():
        read = checkpoint.arrays(group)
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(np.asarray(read[name]), array)


def rewrite(path: str, change: Callable[[bytes], bytes]) -> None:
    with tf.io.gfile.GFile(path, "rb") as file:
        content = file.read()
    tf.io.gfile.remove(path)  # TensorFlow's ram:// appends to a file that is there.
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(change(content))


def flip_a_bit(content: bytes) -> bytes:
    return content[:-30] + bytes([content[-30] ^ 0x10]) + content[-29:]


def test_latest_returns_what_was_saved(folder: str):
    checkpoints = Checkpoints(folder, keep_last=2)
    assert checkpoints.latest() is None
    save(checkpoints, 7)
    assert_is_of(Checkpoints(folder).latest(), 7)


def test_the_newest_are_kept_by_number_and_not_by_name(folder: str):
    checkpoints = Checkpoints(folder, keep_last=3)
    save(checkpoints, 0, 5, 10)
    assert checkpoints.steps() == [0, 5, 10]
    save(checkpoints, 10**9 - 1, 10**9)
    assert checkpoints.steps() == [10, 10**9 - 1, 10**9]
    assert_is_of(checkpoints.latest(), 10**9)


def test_keeping_one_leaves_one(folder: str):
    checkpoints = Checkpoints(folder)
    for step in (1, 2, 3):
        save(checkpoints, step)
        assert checkpoints.steps() == [step]


def test_saving_returns_before_it_is_written_and_writes_what_it_was_given(tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path))
    big = {"weights": {"x": np.ones([4096, 4096], np.float32)}}
    start = time.monotonic()
    checkpoints.save(1, big, {})
    returned = time.monotonic() - start
    checkpoints.wait()
    assert returned < (time.monotonic() - start) / 2


def test_the_arrays_of_a_checkpoint_are_dropped_once_it_makes_way(tmp_path: Path):
    array = np.ones([4096], np.float32)
    kept, checkpoints = weakref.ref(array), Checkpoints(str(tmp_path))
    checkpoints.save(1, {"weights": {"x": array}}, {})
    del array
    checkpoints.make_way()
    wait_until(lambda: kept() is None)  # The writer returns a moment before its thread has dropped its arguments.
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "manifest.json"])
def test_damaged_checkpoint_is_skipped_for_the_one_before(folder: str, name: str):
    path = f"{folder}/step_000000020/{name}"
    damages = [
        lambda: rewrite(path, flip_a_bit),
        lambda: rewrite(path, lambda content: content[:-5]),
        lambda: rewrite(path, lambda content: b"{" + content),
        lambda: rewrite(path, lambda content: b""),
        lambda: tf.io.gfile.remove(path),
    ]
    for damage in damages:
        said: list[str] = []
        checkpoints = Checkpoints(folder, keep_last=2, say=said.append)
        save(checkpoints, 10, 20)
        assert_is_of(checkpoints.latest(), 20)
        damage()
        assert_is_of(checkpoints.latest(), 10)
        [line] = said
        assert line.startswith(f"Skipping {folder}/step_000000020: ")
        if tf.io.gfile.exists(path):
            assert f"{path} is damaged: " in line
        else:
            assert f"{path} is missing." in line or "it has no manifest, so it was not written to the end." in line


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path), say=lambda line: None)
    save(checkpoints, 3)
    path = tmp_path / "step_000000003/manifest.json"
    whole = path.read_bytes()
    expected = json.loads(whole)
    for position in range(len(whole)):
        bit = 1 << position % 8
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        try:
            checkpoint = checkpoints.latest()
        except UserError as error:
            assert "none of the 1 checkpoints there can be used" in str(error)
            continue
        # White space may become other white space.
        assert checkpoint is not None and checkpoint.manifest == expected


def test_a_file_changed_after_it_was_verified_is_noticed(folder: str):
    checkpoints = Checkpoints(folder)
    save(checkpoints, 3)
    checkpoint = checkpoints.latest()
    assert checkpoint is not None
    path, is_on_disk = f"{folder}/step_000000003/weights.safetensors", "://" not in folder
    arrays, expected = checkpoint.arrays("weights"), groups(3)["weights"]

    def refused() -> list[str]:
        """The arrays that cannot be read; the others are those that were saved."""
        names = []
        for name, array in arrays.items():
            try:
                np.testing.assert_array_equal(np.asarray(array), expected[name])
            except UserError as error:
                assert str(error) == f"{path} is damaged: its length or its SHA-256 differs from the manifest."
                names.append(name)
        return names

    assert not refused()
    # On a disk the file that was opened is changed, not replaced. A store may return either content.
    change = (lambda: overwrite(path, flip_a_bit)) if is_on_disk else (lambda: rewrite(path, flip_a_bit))
    change()
    assert refused() == ["kernel"] if is_on_disk else refused() in ([], ["kernel"])  # The float32s are at the end.
    change()
    assert not refused()
    # Nor is a part of an array ever returned.
    if is_on_disk:
        overwrite(path, lambda content: content[:-40])
        assert refused() == ["kernel"]
        overwrite(path, lambda content: b"")
        assert set(refused()) == arrays.keys() - {"nothing"}


def overwrite(path: str, change: Callable[[bytes], bytes]) -> None:
    Path(path).write_bytes(change(Path(path).read_bytes()))


def test_a_checkpoint_on_a_disk_can_be_read_if_it_is_removed_after_it_was_found(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    checkpoint = checkpoints.latest()
    shutil.rmtree(tmp_path / "step_000000003")
    assert_is_of(checkpoint, 3)
    with pytest.raises(UserError, match=r"it has no manifest"):
        checkpoints.of_step(3)


def test_a_file_that_is_gone_when_an_array_is_read_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    checkpoint = checkpoints.of_step(3)

    def fail(self: OpenedFile, start: int, num_bytes: int) -> bytes:
        raise FileNotFoundError(2, "No such file or directory")  # As a store does, which has no open files.

    monkeypatch.setattr(OpenedFile, "read", fail)
    with pytest.raises(DamagedError) as error:
        np.asarray(checkpoint.arrays("weights")["kernel"])
    assert str(error.value) == f"{tmp_path}/step_000000003/weights.safetensors is missing."


def test_another_format_is_refused_with_the_advice_to_use_its_release(tmp_path: Path):
    save(Checkpoints(str(tmp_path)), 3)
    path = tmp_path / "step_000000003/manifest.json"
    manifest = json.loads(path.read_bytes()) | {"format": FORMAT + 1}
    path.write_text(json.dumps(sealed(manifest)), encoding="utf-8")
    with pytest.raises(UserError, match=f"is of format {FORMAT + 1}, not {FORMAT}; use the release that wrote it."):
        Checkpoints(str(tmp_path)).latest()


def test_damaged_newer_checkpoints_take_no_place_of_good_ones(folder: str):
    checkpoints = Checkpoints(folder, keep_last=4, say=lambda line: None)
    save(checkpoints, 10, 20, 30, 40)
    for step in (20, 30, 40):
        rewrite(f"{folder}/step_{step:09d}/weights.safetensors", flip_a_bit)
    resumed = Checkpoints(folder, keep_last=1, say=lambda line: None)
    save(resumed, 15)
    assert_is_of(resumed.latest(), 15)
    save(resumed, 20)
    assert_is_of(resumed.latest(), 20)
    assert resumed.steps() == [20, 30, 40]


def test_saving_what_is_there_already_does_not_touch_it(tmp_path: Path):
    """A run stopped before its first step does so, and the one checkpoint it has must not be away for a moment."""
    checkpoints = Checkpoints(str(tmp_path))
    save(checkpoints, 3)
    before = (tmp_path / "step_000000003").stat()
    save(checkpoints, 3)
    after = (tmp_path / "step_000000003").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # Nor if the manifest's facts differ, by an override of the resumed run.
    checkpoints.save(3, groups(3), {"config": {"log": {"every_steps": 5}}})
    checkpoints.wait()
    assert (tmp_path / "step_000000003").stat().st_ino == before.st_ino
    # One that is damaged is replaced.
    rewrite(str(tmp_path / "step_000000003/weights.safetensors"), flip_a_bit)
    save(checkpoints, 3)
    assert_is_of(checkpoints.latest(), 3)


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial/weights.safetensors").write_bytes(b"x")
    (tmp_path / "step_abc").mkdir()
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.latest() is None
    save(checkpoints, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000003", "step_abc"]


@pytest.fixture
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECS", (0.01,))
    monkeypatch.setattr(module, "LAST_RETRY_SECS", 0.01)


@pytest.mark.usefixtures("short_retries")
def test_unwritable_folder_is_an_error_that_names_it(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file")
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(3, groups(3), {})
    with pytest.raises(UserError, match=r"Cannot write the checkpoint .*checkpoints/step_000000003: File exists"):
        checkpoints.wait()


@pytest.mark.usefixtures("short_retries")
def test_full_disk_leaves_nothing_half_written(tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, {"weights": {"x": np.zeros(1000, np.float32)}}, {})
    checkpoints.wait()
    # The limit on a file's size stands in for the full disk, which takes root to make: the write fails on its way, too.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        checkpoints.save(2, {"weights": {"x": np.zeros(1000, np.float32), "y": np.zeros(1000, np.float32)}}, {})
        with pytest.raises(UserError) as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"Cannot write the checkpoint {tmp_path}/step_000000002: ")
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001"]
    checkpoint = Checkpoints(str(tmp_path)).latest()
    assert checkpoint is not None and checkpoint.step == 1


# Forks, because importing TensorFlow for each kill would take minutes. A child reports what it has saved through a
# file, and dies before its n-th system call that changes a folder; without strace, after n milliseconds.
SAVE_AND_DIE = """
import ctypes, itertools, os, signal, subprocess, sys, time
import numpy as np
from trainer.runs.checkpoint import Checkpoints

root, strace = sys.argv[1:]
CALLS = "mkdir,openat,write,fsync,rename,unlink,unlinkat,rmdir"
NAMES = ("weights.safetensors", "optimizer.safetensors", "manifest.json")

def save(folder):
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, {g: {"x": np.full(100, step)} for g in ("weights", "optimizer")}, {})
        checkpoints.wait()
        with open(f"{folder}.saved", "w") as file:
            file.write(str(step))

for n in itertools.count(1):
    folder = f"{root}/{n}"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        if strace:
            ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER, to anybody.
        os.read(reader, 1)
        save(folder)
        os._exit(0)
    if strace:
        folders = [folder, *(f"{folder}/{name}" for name in (".partial", "step_000000001", "step_000000002"))]
        paths = folders + [f"{one}/{name}" for one in folders for name in NAMES]
        command = [strace, "-f", "-p", str(child), "-o", "/dev/null", "-e", f"inject={CALLS}:signal=KILL:when={n}"]
        tracer = subprocess.Popen(command + [f"-P{path}" for path in paths], stderr=subprocess.PIPE)
        assert b"attached" in tracer.stderr.readline()
    os.write(writer, b".")
    if not strace:
        time.sleep(n / 1000)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0
        break
"""


@pytest.mark.slow
def test_checkpoints_survive_a_kill_at_any_time(tmp_path: Path):
    strace = shutil.which("strace") or ""
    if strace and subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True).returncode:
        strace = ""  # A container may forbid it.
    subprocess.run([sys.executable, "-W", "ignore", "-c", SAVE_AND_DIE, str(tmp_path), strace], cwd=ROOT, check=True)
    folders = sorted((path for path in tmp_path.iterdir() if path.is_dir()), key=lambda path: int(path.name))
    steps = []
    for folder in folders:
        saved = folder.with_name(f"{folder.name}.saved")
        announced = int(saved.read_text()) if saved.exists() and saved.read_text() else 0
        said: list[str] = []
        checkpoint = Checkpoints(str(folder), say=said.append).latest()
        # Only what was being removed may be skipped, and that is never the newest.
        assert said == []
        step = 0 if checkpoint is None else checkpoint.step
        assert step in (announced, announced + 1)
        if checkpoint is not None:
            for group in ("weights", "optimizer"):
                np.testing.assert_array_equal(np.asarray(checkpoint.arrays(group)["x"]), np.full(100, step))
        steps.append(step)
    if strace:
        assert steps == sorted(steps)
        assert set(steps) == {0, 1, 2}


def test_assign_gives_variables_their_values():
    variables = {
        "a": keras.Variable(np.zeros([2, 3], np.float32)),
        "b": tf.Variable(0, dtype=tf.int64),
        "c": tf.Variable(np.zeros(2)),
    }
    arrays = {"a": np.ones([2, 3], np.float32), "b": np.array(2**40), "c": np.array([1 / 3, 2])}
    assign(variables, arrays, "here")
    for name, variable in variables.items():
        np.testing.assert_array_equal(variable.numpy(), arrays[name])


def test_assign_reads_a_file_from_its_beginning_to_its_end(folder: str, monkeypatch: pytest.MonkeyPatch):
    arrays: dict[str, np.ndarray] = {name: np.ones(3, np.float32) for name in ("c", "d")}
    arrays |= {"a": np.ones(2, np.int64), "b": np.ones(4)}
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"weights": arrays}, {})
    checkpoints.wait()
    checkpoint = checkpoints.of_step(1)
    starts: list[int] = []
    read = OpenedFile.read

    def read_and_note(self: OpenedFile, start: int, num_bytes: int) -> bytes:
        starts.append(start)
        return read(self, start, num_bytes)

    monkeypatch.setattr(OpenedFile, "read", read_and_note)
    # The model has them in another order than the file, which sorts them by their dtypes and names.
    variables = {name: tf.Variable(np.zeros_like(arrays[name])) for name in ("d", "c", "b", "a")}
    assign(variables, checkpoint.arrays("weights"), folder)
    assert len(starts) == 4 and starts == sorted(starts)
    for name, variable in variables.items():
        np.testing.assert_array_equal(variable.numpy(), arrays[name])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {},
            "here does not hold this model: it lacks ['a'] and has nothing in addition. Use the config, or the",
        ),
        (
            {"a": np.zeros(2), "b": np.zeros(2)},
            "here does not hold this model: it lacks nothing and has ['b'] in addition.",
        ),
        ({"a": np.zeros(3)}, "here has a as float64[3], the model as float64[2]. Use the config it was trained with."),
        ({"a": np.zeros([])}, "here has a as float64[], the model as float64[2]."),
        ({"a": np.zeros(2, np.float32)}, "here has a as float32[2], the model as float64[2]."),
        ({"a": np.zeros(2, np.int64)}, "here has a as int64[2], the model as float64[2]."),
    ],
)
def test_assign_refuses_another_model_and_changes_nothing(arrays: dict[str, np.ndarray], message: str):
    variable = tf.Variable(np.ones(2))
    with pytest.raises(UserError) as error:
        assign({"a": variable}, arrays, "here")
    assert message in str(error.value)
    np.testing.assert_array_equal(variable.numpy(), np.ones(2))


def test_checkpoints_of_which_none_verifies_are_an_error_that_names_each(folder: str):
    checkpoints = Checkpoints(folder, keep_last=2)
    save(checkpoints, 10, 20)
    rewrite(f"{folder}/step_000000010/weights.safetensors", flip_a_bit)
    tf.io.gfile.remove(f"{folder}/step_000000020/optimizer.safetensors")
    with pytest.raises(UserError) as error:
        checkpoints.latest()
    assert str(error.value) == (
        f"{folder}: none of the 2 checkpoints there can be used. step 10: {folder}/step_000000010/weights.safetensors "
        f"is damaged: its length or its SHA-256 differs from the manifest. step 20: {folder}/step_000000020/"
        "optimizer.safetensors is missing. Bring one back from a copy; training does not begin again at step 0 over "
        "them."
    )


def test_what_a_store_has_of_a_checkpoint_whose_writer_was_killed_is_none(tmp_path: Path):
    folder = f"ram://{tmp_path.name}-killed"
    tf.io.gfile.makedirs(f"{folder}/step_000000010")
    with tf.io.gfile.GFile(f"{folder}/step_000000010/weights.safetensors", "wb") as file:
        file.write(b"half")
    assert Checkpoints(folder).latest() is None
    # On a disk a folder of a step is there once it is whole, so one without a manifest has lost it.
    (tmp_path / "step_000000010").mkdir()
    with pytest.raises(UserError, match="step 10: it has no manifest, so it was not written to the end"):
        Checkpoints(tmp_path).latest()


def test_a_store_that_does_not_answer_is_an_error_and_not_an_empty_folder():
    with pytest.raises(UserError, match="nosuchscheme://bucket/checkpoints: the object store failed: "):
        Checkpoints("nosuchscheme://bucket/checkpoints").latest()


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(path: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(
        UserError, match=r"cannot be listed: Stale file handle\. The server of this network file system"
    ):
        Checkpoints(tmp_path).latest()


def test_a_checkpoint_of_another_run_is_skipped_with_the_reason(tmp_path: Path):
    save(Checkpoints(tmp_path, keep_last=2), 1, 2)
    said: list[str] = []
    fault_of = lambda manifest: "it is of another run." if manifest["step"] == 2 else None  # noqa: E731
    assert_is_of(Checkpoints(tmp_path, say=said.append, fault_of=fault_of).latest(), 1)
    assert said == [f"Skipping {tmp_path}/step_000000002: it is of another run."]


def test_a_failed_checkpoint_is_reported_at_once_and_tried_until_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "RETRY_SECS", (0.05,))
    said: list[str] = []
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "checkpoints", say=said.append)
    checkpoints.save(3, groups(3), {"data_fingerprint": "abc"})
    wait_until(lambda: len(said) >= 2)
    checkpoints.check()  # Nothing that ends a run.
    (tmp_path / "checkpoints").unlink()
    wait_until(lambda: checkpoints.steps() == [3])
    checkpoints.check()
    assert_is_of(checkpoints.latest(), 3)
    assert said[0] == (
        f"Cannot write the checkpoint {tmp_path}/checkpoints/step_000000003: File exists. Check the path and its file "
        "system. Trying again in 0 s; what was saved before is still there."
    )


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_checkpoint_that_cannot_be_written_gives_way_to_the_next(tmp_path: Path):
    said: list[str] = []
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "checkpoints", say=said.append)
    checkpoints.save(3, groups(3), {"data_fingerprint": "abc"})
    wait_until(lambda: len(said) == 1)
    (tmp_path / "checkpoints").unlink()
    start = time.monotonic()
    save(checkpoints, 4)
    assert time.monotonic() - start < module.RETRY_SECS[0]
    assert checkpoints.steps() == [4]


@pytest.mark.usefixtures("short_retries")
def test_failures_in_a_row_end_the_run_only_when_set_to(tmp_path: Path):
    said: list[str] = []
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "checkpoints", say=said.append, max_failures=3)
    checkpoints.save(3, groups(3), {})
    with pytest.raises(UserError, match=r"was failure 3 in a row and checkpoint\.max_failures=3\."):
        wait_until(lambda: checkpoints.check() is not None)  # type: ignore[func-returns-value]
    assert len(said) == 2


@pytest.mark.usefixtures("short_retries")
def test_a_block_that_raises_ends_after_its_checkpoint_is_written(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(ZeroDivisionError), checkpoints:
        checkpoints.save(1, {"weights": {"x": np.ones([2048, 2048], np.float32)}}, {})
        1 / 0  # noqa: B018
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]
    # The error of the block is raised, and a lost checkpoint is reported.
    said: list[str] = []
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file", say=said.append)
    with pytest.raises(ZeroDivisionError), checkpoints:
        checkpoints.save(1, groups(1), {})
        1 / 0  # noqa: B018
    assert "step_000000001: File exists" in said[-1]
    with pytest.raises(UserError, match="File exists"), checkpoints:
        checkpoints.save(1, groups(1), {})


def test_an_old_checkpoint_that_cannot_be_removed_is_reported_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    save(checkpoints, 1)
    remove = shutil.rmtree

    def fail(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shutil, "rmtree", fail)
    save(checkpoints, 2)
    assert said == [
        f"The old checkpoint {tmp_path}/step_000000001 cannot be removed and stays for now: Input/output error. The "
        "disk, or the connection to it, is failing: see dmesg."
    ]
    assert_is_of(checkpoints.latest(), 2)
    monkeypatch.setattr(shutil, "rmtree", remove)
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]


@pytest.mark.usefixtures("short_retries")
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EDQUOT, "Make room"),
        (errno.EROFS, "mounted read-only"),
        (errno.EIO, "see dmesg"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EACCES, "Give this user the permission"),
    ],
)
def test_an_error_of_the_disk_comes_with_what_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
):
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    checkpoints = Checkpoints(tmp_path, say=lambda line: None)
    checkpoints.save(1, groups(1), {})
    with pytest.raises(UserError) as error:
        checkpoints.wait()
    assert os.strerror(number) in str(error.value) and remedy in str(error.value)
    assert ("Make room" in str(error.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short_retries")
def test_an_error_of_the_sync_after_the_rename_reports_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(Checkpoints(tmp_path), 1)
    sync = module.sync

    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(path)

    monkeypatch.setattr(module, "sync", fail)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    checkpoints.save(2, groups(2), {"data_fingerprint": "abc"})
    with pytest.raises(UserError) as error:
        checkpoints.wait()
    assert str(error.value).startswith(
        f"The checkpoint {tmp_path}/step_000000002 is whole, but a loss of power could still undo it: Input/output "
    )
    assert_is_of(checkpoints.latest(), 2)
    assert checkpoints.steps() == [1, 2]  # The one before stays until the new one is safe.
    monkeypatch.setattr(module, "sync", sync)
    save(checkpoints, 2)
    assert checkpoints.steps() == [2]


def test_a_reader_beside_a_training_that_keeps_one_always_finds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # As fast as can be.
    save(Checkpoints(tmp_path), 0)
    training = threading.Thread(target=lambda: save(Checkpoints(tmp_path), *range(1, 300)))
    training.start()
    said: list[str] = []
    found = []
    while training.is_alive():
        found.append(Checkpoints(tmp_path, say=said.append).latest())
    assert None not in found and said == []
    assert len(found) > 10


def test_the_best_by_validation_is_kept_besides_the_newest(folder: str):
    checkpoints = Checkpoints(folder, keep_last=2, scores=(scores := {}))
    assert checkpoints.best_step() is None
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, float("nan")), (50, 2.0)):
        save(checkpoints, step)
        scores[step] = loss
    assert checkpoints.steps() == [20, 40, 50]
    assert checkpoints.best_step() == 20
    scores[60] = 1.0  # Scored, and not saved yet.
    assert checkpoints.best_step() == 20
    save(checkpoints, 60)
    assert checkpoints.best_step() == 60 and checkpoints.steps() == [50, 60]


def test_steps_that_are_to_be_kept_are_kept_besides_the_newest(folder: str):
    checkpoints = Checkpoints(folder, keep_last=1)
    checkpoints.kept_steps = (20, 50)
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    assert checkpoints.steps() == [20, 40]


def test_a_step_that_is_saved_twice_is_reported_once(tmp_path: Path):
    checkpoints, reported = Checkpoints(str(tmp_path)), list[int]()
    checkpoints.on_whole = lambda step, folder: reported.append(step)
    save(checkpoints, 1, 1)
    save(checkpoints, 1, 2)
    assert reported == [1, 2]
