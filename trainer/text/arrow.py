"""Files as Apache Arrow reads them, from a disk or an object store. Imports Arrow only when a file needs it."""

import io
from typing import Any, BinaryIO


class _Raw(io.RawIOBase):
    """An open file with all that Arrow asks of a file in Python; a file of tf.io.gfile has only a part of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def arrow_file(file: BinaryIO) -> Any:
    """Returns an open file as a pyarrow.NativeFile."""
    import pyarrow

    return pyarrow.PythonFile(_Raw(file), mode="r")


def unpacked_zstd(packed: BinaryIO) -> BinaryIO:
    """Returns a stream of the bytes in a file packed with zstd, in one frame or several.

    Its `read` raises an OSError without a number if the file is broken, or cut off.
    """
    import pyarrow

    stream: BinaryIO = pyarrow.CompressedInputStream(arrow_file(packed), "zstd")
    return stream
