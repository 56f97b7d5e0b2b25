"""Laws of files of arrays: the bytes of the library safetensors, and never more than one array in memory."""

import pickle
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from trainer.runs import array_file
from trainer.runs.array_file import ArrayFile, Arrays, StoredArray, identity_of, parts_of
from trainer.runs.checkpoint import Checkpoint, Checkpoints, assign, write_first
from trainer.system.manifest import DamagedError
from trainer.system.storage import locate

DTYPES = ["bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "c8", "u8", "i8", "f8", ">f4", ">i8", "bfloat16"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (3, 5), (0, 4), (2, 3, 4), (1, 1)]
NAMES = [
    "a",
    "b",
    "B",
    "a/b",
    'quote"d',
    "back\\slash",
    "line\nend",
    "tab\t\x01\x7f",
    "é",
    "한국어",
    "😀",
    "z" * 99,
    "",
]


def random_arrays(seed: int) -> dict[str, np.ndarray]:
    draw, choose = np.random.default_rng(seed), random.Random(seed)
    arrays = {}
    for name in choose.sample(NAMES, choose.randrange(len(NAMES) + 1)):
        dtype = choose.choice(DTYPES)
        array = np.asarray(draw.integers(0, 100, choose.choice(SHAPES)))
        array = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
        change = choose.choice(["as it is", "transposed", "every second", "backwards"])
        if array.ndim and change != "as it is":
            array = array.T if change == "transposed" else array[:: 2 if change == "every second" else -1]
        arrays[name] = array
    return arrays


def write(path: Path, arrays: Arrays) -> ArrayFile:
    path.write_bytes(b"".join(parts_of(arrays)))
    return ArrayFile(path, identity_of(parts_of(arrays)))


@pytest.mark.parametrize("bytes_at_once", [1, 8, 100, 1 << 24])
def test_a_file_has_the_bytes_of_the_library_safetensors_and_returns_its_arrays(
    bytes_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(array_file, "BYTES_AT_ONCE", bytes_at_once)
    for seed in range(100):
        arrays = random_arrays(seed)
        stored = write(tmp_path / "file", arrays).arrays()
        whole = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
        assert (tmp_path / "file").read_bytes() == whole, seed
        assert stored.keys() == arrays.keys()
        for name, array in arrays.items():
            read = np.asarray(stored[name])
            assert stored[name].shape == read.shape == array.shape
            assert stored[name].dtype == read.dtype == array.dtype.newbyteorder("=")
            assert read.tobytes() == array.astype(read.dtype).tobytes()
        if not any(array.dtype == ml_dtypes.bfloat16 for array in arrays.values()):  # The library cannot read it.
            assert all(np.array_equal(array, stored[name]) for name, array in safetensors.numpy.load(whole).items())
    assert all(max(map(len, list(parts_of(random_arrays(seed)))[1:] or [b""])) <= bytes_at_once for seed in range(100))


def test_an_array_that_no_file_can_hold_is_an_error_that_names_it():
    for dtype in ("complex128", "U3", "f16"):
        with pytest.raises(
            ValueError, match=r"A checkpoint cannot hold x, whose dtype is .*; it can hold: uint64, int64, f"
        ):
            next(parts_of({"x": np.zeros(3, dtype)}))


def test_no_content_of_a_file_is_anything_but_its_arrays_or_damage(tmp_path: Path):
    """Also if a manifest agrees with it, so that only its header is wrong."""
    arrays = {"a": np.arange(3.0), "b": np.ones([2, 2], np.int32), "c": np.zeros([0], bool)}
    whole, path, choose = b"".join(parts_of(arrays)), tmp_path / "file", random.Random(0)
    identity = identity_of([whole])
    contents = [whole[:n] for n in range(len(whole))]
    contents += [whole + b"\0", b"\xff" * 8 + whole[8:], b"\xff\xff\xff\x7f" + bytes(4) + whole[8:]]
    contents += [whole[:8] + header + whole[8 + len(header) :] for header in (b"[" * 60, b"null" + b" " * 60, b"[1]")]
    for place in range(len(whole)):
        for other in (whole[place] ^ 1 << choose.randrange(8), choose.choice(b'"{}[]:,.e-019')):
            contents.append(whole[:place] + bytes([other]) + whole[place + 1 :])
    for content in contents:
        path.write_bytes(content)
        if content != whole:
            with pytest.raises(DamagedError, match=r"file is damaged: its length or its SHA-256 differs"):
                ArrayFile(path, identity)
        try:
            found = ArrayFile(path, identity_of([content])).arrays()
        except DamagedError:
            continue
        assert sum(np.asarray(array).nbytes for array in found.values()) == 3 * 8 + 4 * 4


def test_stored_arrays_go_to_another_process_by_their_file(tmp_path: Path):
    arrays = {"a": np.arange(1000.0), "b": np.ones(3, np.float32)}
    pickled = pickle.dumps(write(tmp_path / "file", arrays).arrays())
    assert len(pickled) < 1000
    for name, array in pickle.loads(pickled).items():
        assert isinstance(array, StoredArray)
        np.testing.assert_array_equal(np.asarray(array), arrays[name])
    (tmp_path / "file").unlink()
    with pytest.raises(DamagedError, match=r"file is missing\."):
        pickle.loads(pickled)


# Memory. NumPy tells tracemalloc of its arrays.

NUM_ARRAYS, ARRAY_BYTES, PART_BYTES = 10, 1 << 22, 1 << 18
# What may be in memory besides what the caller holds: one array, and some parts of a file.
MOST_BYTES = ARRAY_BYTES + 4 * PART_BYTES


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_file, "BYTES_AT_ONCE", PART_BYTES)


def large_arrays() -> dict[str, np.ndarray]:
    side = int((ARRAY_BYTES // 8) ** 0.5)
    arrays = {f"kernel_{i}": np.full([side, ARRAY_BYTES // 8 // side], i, np.float64) for i in range(NUM_ARRAYS)}
    return {name: array.T if i else array for i, (name, array) in enumerate(arrays.items())}


def peak_bytes(function: Callable[[], object]) -> int:
    """Returns the most bytes that Python held while a function ran, besides those that it held before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def saved_checkpoint(folder: str) -> Checkpoint:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, {"weights": large_arrays()}, {})
    return checkpoints.of_step(3)


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    # Through gfile: TensorFlow's store in memory would keep what is written.
    return str(tmp_path / "run") if request.param == "disk" else f"file://{tmp_path}/run"


@pytest.mark.usefixtures("small_parts")
def test_a_checkpoint_is_written_with_no_copy_of_more_than_one_array(folder: str):
    arrays, checkpoints = large_arrays(), Checkpoints(folder)

    def write() -> None:
        checkpoints.save(3, {"weights": arrays, "optimizer": arrays}, {})
        checkpoints.wait()

    assert peak_bytes(write) <= MOST_BYTES
    assert peak_bytes(write) <= MOST_BYTES  # It is compared with what is there.
    assert checkpoints.steps() == [3]


@pytest.mark.usefixtures("small_parts")
def test_a_checkpoint_is_found_and_restored_with_no_more_than_one_array_in_memory(folder: str):
    saved_checkpoint(folder)
    expected = large_arrays()
    variables = {name: KeepsNothing(array) for name, array in expected.items()}

    def restore() -> None:
        checkpoint = Checkpoints(folder).latest()
        assert checkpoint is not None
        assign(variables, checkpoint.arrays("weights"), folder)

    assert peak_bytes(restore) <= MOST_BYTES
    assert [each.total for each in variables.values()] == [float(array.sum()) for array in expected.values()]


class KeepsNothing:
    """What `assign` takes for a variable, in memory that is not the host's. TensorFlow may keep an array of NumPy as
    the value of a variable on a CPU.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.shape, self.dtype, self.total = array.shape, array.dtype, 0.0

    def assign(self, array: np.ndarray) -> None:
        self.total = float(array.sum())


@pytest.mark.usefixtures("small_parts")
def test_a_run_that_begins_with_the_arrays_of_another_one_never_holds_them(folder: str, tmp_path: Path):
    parent = saved_checkpoint(folder)
    child = locate(f"{folder}-child")
    assert peak_bytes(lambda: write_first(child, 3, {"weights": parent.arrays("weights")}, {})) <= MOST_BYTES
    assert Checkpoints(child).of_step(3).manifest["files"] == parent.manifest["files"]


# Whatever takes the memory, TensorFlow too: the greatest part of memory that the process ever had.
SAVE_OR_RESTORE = """
import resource, sys
import numpy as np, tensorflow as tf
from trainer.runs.checkpoint import Checkpoints, assign

verb, folder = sys.argv[1:]
SIDE, NUMBER = 2048, 16  # 32 MiB each, 512 in all.
names = [f"kernel_{i}" for i in range(NUMBER)]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
if verb == "save":
    arrays = {name: np.full([SIDE, SIDE], i, np.float64) for i, name in enumerate(names)}
    before = peak()
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, {"weights": arrays}, {})
else:
    variables = {name: tf.Variable(tf.ones([SIDE, SIDE], tf.float64)) for name in names}
    before = peak()
    assign(variables, Checkpoints(folder).latest().arrays("weights"), folder)
    assert [float(variables[name][-1, -1]) for name in names] == list(range(NUMBER))
print(peak() - before)
"""


@pytest.mark.slow
def test_neither_saving_nor_restoring_makes_a_process_much_larger(folder: str):
    for verb in ("save", "restore"):
        command = [sys.executable, "-c", SAVE_OR_RESTORE, verb, folder]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # An array of 32 MiB and copies of it and of parts of the file, in Python and in TensorFlow: 144 MiB were seen.
        # All arrays have 512.
        assert float(done.stdout) < 224, verb
