"""Files of named arrays in safetensors' form, which are written and read one array at a time.

A checkpoint can be as large as the memory of its host. The library safetensors makes the bytes of a whole file at once,
and reads files lazily only on a disk. The files are the same as its own, byte for byte.
"""

import contextlib
import hashlib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from trainer.system.manifest import DamagedError
from trainer.system.storage import EndedError, Location, OpenedFile, reason_and_remedy

# The most bytes that are copied, hashed, read or written at once, in addition to one array.
BYTES_AT_ONCE = 1 << 24

# The dtypes by their names in a file, in the order in which a file has their arrays.
_DTYPES = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype.name: name for name, dtype in _DTYPES.items()}
_ORDER = {name: place for place, name in enumerate(_DTYPES)}


class StoredArray:
    """An array in a verified file. NumPy's functions read it, each time anew, and nothing keeps it.

    Args:
        file: the file.
        name: the array's name in it.
        dtype: the array's dtype.
        shape: its shape.
    """

    def __init__(self, file: "ArrayFile", name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self._file, self._name = file, name

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array.

        Raises:
            DamagedError: its bytes are not those that were verified.
        """
        array = self._file.read(self._name)
        return array if dtype is None else array.astype(dtype, copy=False)


Arrays = Mapping[str, np.ndarray | StoredArray]


def parts_of(arrays: Arrays) -> Iterator[bytes]:
    """Yields the content of the file of some arrays in parts of at most BYTES_AT_ONCE bytes.

    Args:
        arrays: by name; of any strides and byte order. Each is read once, after the one before it was dropped.

    Raises:
        ValueError: such a file cannot hold an array's dtype.
    """
    for name, array in arrays.items():
        if array.dtype.name not in _NAMES:
            known = ", ".join(_NAMES)
            raise ValueError(f"A checkpoint cannot hold {name}, whose dtype is {array.dtype}; it can hold: {known}.")
    order = sorted(arrays, key=lambda name: (_ORDER[_NAMES[arrays[name].dtype.name]], name))
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        dtype, shape = arrays[name].dtype, arrays[name].shape
        start, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in order:
        # In a function of its own, which ends, and with it its reference to the array, before the next one is read.
        yield from _parts_of_array(arrays[name])


def _parts_of_array(array: np.ndarray | StoredArray) -> Iterator[bytes]:
    row_by_row = np.asarray(array, order="C")
    little_endian = row_by_row.astype(row_by_row.dtype.newbyteorder("<"), copy=False)
    content = little_endian.reshape(-1).view(np.uint8)
    for start in range(0, len(content), BYTES_AT_ONCE):
        # A copy: whoever gets it would keep the whole array by a view.
        yield content[start : start + BYTES_AT_ONCE].tobytes()


def identity_of(parts: Iterable[bytes]) -> dict[str, Any]:
    """Returns what a manifest has about a file with this content: its length and its SHA-256."""
    digest, num_bytes = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        num_bytes += len(part)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


class _Entry(NamedTuple):
    """An array in a file, by the file's header.

    Attributes:
        name: its name.
        dtype: its dtype.
        shape: its shape.
        start: the place of its first byte in the file.
        end: the place after its last byte.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class _Verified(NamedTuple):
    """An array in a file whose SHA-256 was right.

    Attributes:
        entry: where it is.
        before: the SHA-256 of everything before the array, to go on with.
        after: the SHA-256 of everything up to its end.
    """

    entry: _Entry
    before: Any
    after: bytes


class ArrayFile:
    """A file that is opened once, verified as a whole, and then read one array at a time.

    An array that is read is hashed again, on from the SHA-256 of what comes before it in the file. So its bytes are
    those that were verified, even if somebody writes to the file in between. A file on a local disk stays readable if
    it is removed in between; in most stores it does not.

    Args:
        path: the file.
        identity: its length and its SHA-256, by `identity_of`.

    Raises:
        DamagedError: the file is missing, cannot be read, or is another one.
    """

    def __init__(self, path: Location, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, identity
        self._arrays: dict[str, _Verified] = {}
        with self._reading():
            self._file = OpenedFile(path)
            header = self._header()
        digest, end = hashlib.sha256(header), len(header)
        for entry in self._entries(header):
            before, end = digest.copy(), entry.end
            for part in self._parts(entry):
                digest.update(part)
            self._arrays[entry.name] = _Verified(entry, before, digest.digest())
        with self._reading():
            is_longer = bool(self._file.read(end, 1))
        if is_longer or {"bytes": end, "sha256": digest.hexdigest()} != self._identity:
            raise self._damaged()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file by its name, and verifies it, again: it gets a DamagedError if the file was
        removed meanwhile.
        """
        return ArrayFile, (self._path, self._identity)

    def arrays(self) -> dict[str, StoredArray]:
        """Returns the arrays by name, of which none is read yet."""
        entries = [each.entry for each in self._arrays.values()]
        return {entry.name: StoredArray(self, entry.name, entry.dtype, entry.shape) for entry in entries}

    def read(self, name: str) -> np.ndarray:
        """Reads an array.

        Raises:
            DamagedError: the file cannot be read any more, or the array was changed since it was verified.
        """
        entry, before, after = self._arrays[name]
        content, filled = np.empty(entry.end - entry.start, np.uint8), 0
        digest = before.copy()
        for part in self._parts(entry):
            digest.update(part)
            content[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
            filled += len(part)
        if digest.digest() != after:
            raise self._damaged()
        return content.view(entry.dtype).reshape(entry.shape)

    def _header(self) -> bytes:
        """Returns the file's beginning, up to its first array."""
        length = self._file.read(0, 8)
        num_bytes = int.from_bytes(length, "little")
        if num_bytes > self._identity["bytes"]:  # Memory for a damaged length could be more than there is.
            raise self._damaged()
        return length + self._file.read(8, num_bytes)

    def _entries(self, header: bytes) -> list[_Entry]:
        """Returns the arrays by a header that is not verified yet, in the order of the file.

        Raises:
            DamagedError: they do not follow each other without a gap, or it is no header at all.
        """
        try:
            found, end = [], len(header)
            for name, each in json.loads(header[8:]).items():
                dtype, shape = _DTYPES[each["dtype"]], tuple(map(operator.index, each["shape"]))
                start, end = end, end + dtype.itemsize * math.prod(shape)
                if [len(header) + at for at in each["data_offsets"]] != [start, end]:
                    raise self._damaged()
                found.append(_Entry(name, dtype, shape, start, end))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damaged() from None
        return found

    def _parts(self, entry: _Entry) -> Iterator[bytes]:
        for start in range(entry.start, entry.end, BYTES_AT_ONCE):
            with self._reading():
                part = self._file.read(start, min(BYTES_AT_ONCE, entry.end - start))
            yield part

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise DamagedError(f"{self._path} is missing.") from None
        except EndedError:
            raise self._damaged() from None
        except OSError as error:
            raise DamagedError(f"{self._path} cannot be read: {reason_and_remedy(error)}.") from None

    def _damaged(self) -> DamagedError:
        return DamagedError(f"{self._path} is damaged: its length or its SHA-256 differs from the manifest.")
