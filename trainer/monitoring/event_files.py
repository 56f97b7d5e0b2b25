"""Reads files for TensorBoard without TensorFlow, so that a list of runs or a report takes no longer than its files.

A file is a sequence of records: 8 bytes of size, 4 of a checksum of the size, the record, and 4 of its checksum.
Source: TensorFlow, core/lib/io/record_writer.h.
"""

import re
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from trainer.errors import UserError
from trainer.monitoring.tags import current
from trainer.system.storage import Location, Url, reason_and_remedy

_HISTOGRAM = b"J\x0e\n\x0c\n\nhistograms"
EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class Point(NamedTuple):
    """A point of a curve."""

    step: int
    value: float


def event_files(folder: Location) -> list[Location]:
    """Returns the files for TensorBoard in a folder, in the order of reading; none if there is no folder.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        if not folder.is_dir():
            return []
        return sorted((file for file in folder.iterdir() if EVENT_FILE.match(file.name)), key=lambda file: file.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {reason_and_remedy(error)}.") from None


def read_events(file: Location) -> Iterator[Event]:
    """Yields the events of a file, up to a damaged one: the file of a run that was killed may end in half a record. The
    graph and histograms are left out.

    Raises:
        UserError: the file cannot be read.
    """
    return (event for event, _ in events_from(file, 0))


def events_from(file: Location, start: int) -> Iterator[tuple[Event, int]]:
    """Yields the events that begin at a byte of a file and later, each with the byte at which the next one begins. The
    graph and histograms are left out.

    Raises:
        UserError: the file cannot be read.
    """
    content = _content(file, start)
    for first, end in _spans(content):
        if _is_large(content, first, end):
            continue
        event = _event(content, first, end)
        if event is None:
            return
        yield event, start + end + 4


def newest_points(folder: Location, wanted: Collection[str]) -> dict[str, Point]:
    """Returns the newest point of some curves, as `read_curves` would. It reads the files whole, but decodes only their
    ends, as far as the points are there.

    Args:
        folder: the folder that an `EventLog` writes into.
        wanted: the names of the curves. A curve without points is left out.
    """
    found: dict[str, Point] = {}
    void_from: float = float("inf")  # The points from this step on were made void by a later file.
    for file in reversed(event_files(folder)):
        content = _content(file)
        for start, end in reversed(list(_spans(content))):
            event = None if _is_large(content, start, end) else _event(content, start, end)
            if event is None:
                continue
            for value in event.summary.value:
                tag = current(value.tag)
                if tag in wanted and tag not in found and event.step < void_from:
                    found[tag] = Point(event.step, scalar_of(value))
            if len(found) == len(wanted):
                return found
            if event.session_log.status == SessionLog.START:
                void_from = min(void_from, event.step)
    return found


def scalar_of(value: object) -> float:
    """Returns the float32 of a point of a curve."""
    tensor = value.tensor  # type: ignore[attr-defined]
    return float(tensor.float_val[0]) if tensor.float_val else float(struct.unpack("<f", tensor.tensor_content)[0])


def _content(file: Location, start: int = 0) -> bytes:
    try:
        if file.stat().st_size <= start:
            return b""
        if isinstance(file, Url):
            return file.read_bytes(start)
        with file.open("rb") as opened:
            opened.seek(start)
            return opened.read()
    except FileNotFoundError:  # `EventLog` removes a file that it cannot write.
        return b""
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason_and_remedy(error)}.") from None


def _spans(content: bytes) -> Iterator[tuple[int, int]]:
    """Yields the first and the last place of each record that is there whole."""
    start = 12
    while start <= len(content):
        (size,) = struct.unpack_from("<Q", content, start - 12)
        if start + size + 4 > len(content):
            return
        yield start, start + size
        start += size + 16


def _is_large(content: bytes, start: int, end: int) -> bool:
    """Whether the record between two places holds a histogram or the graph, as `EventLog` writes them. Nobody wants
    these here, and the checksums of megabytes would take seconds.
    """
    # The graph is the field with tag 0x22, after the 9 bytes of the time: it has step 0, which takes no bytes.
    is_graph = content[start : start + 1] == b"\x09" and content[start + 9 : start + 10] == b"\x22"
    # The last field of a histogram's summary is its metadata, with the plugin's name and no content.
    return is_graph or content.endswith(_HISTOGRAM, start, end)


def _event(content: bytes, start: int, end: int) -> Event | None:
    """Returns the event between two places; None if it is damaged."""
    record = content[start:end]
    if struct.unpack_from("<I", content, end)[0] != _checksum(record):
        return None
    try:
        return Event.FromString(record)
    except DecodeError:
        return None


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC32C = _table()


def _checksum(record: bytes) -> int:
    """Returns the masked CRC-32C (Castagnoli) of a record."""
    crc = 0xFFFFFFFF
    for byte in record:
        crc = _CRC32C[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
