"""Files for TensorBoard. When a run is resumed, its curves go on from the checkpoint, without points that are void."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from trainer.errors import UserError
from trainer.monitoring.events import Histogram
from trainer.system.storage import Location, reason_and_remedy
from trainer.system.terminal import Say, printable

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class EventLog:
    """A file for TensorBoard. Its first event makes void what earlier files in the folder have after first_step: a run
    that was killed may have logged steps after its last checkpoint.

    TensorBoard reads the files of a folder in the order of their names, which begin with the time. If the clock was set
    back, the name and the times of the events go on from the newest ones in the folder.

    If the file cannot be written later on, for example because the disk is full, points and texts are kept in memory,
    and are written into another file once that is possible. Training goes on.

    Args:
        folder: the folder for the file.
        first_step: the last step of which earlier files keep their events.
        say: prints a line; called when the file cannot be written, and when it can be written again.

    Attributes:
        is_first: whether the folder had no file before this one.

    Raises:
        UserError: the file cannot be written at the start.
    """

    def __init__(self, folder: Location, first_step: int, say: Say = print) -> None:
        self.folder = folder
        self._say = say
        self._unwritten: list[bytes] = []
        self._wall_time = 0.0
        try:
            self._writer: RecordWriter | None = self._open()
            self._write_event(first_step + 1, {"session_log": SessionLog(status=SessionLog.START)})
            self._write_all(self._writer)
        except (OSError, tf.errors.OpError) as error:
            raise UserError(f"Cannot write to {folder}: {reason_and_remedy(error)}, then resume the run.") from error

    def _open(self) -> RecordWriter:
        tf.io.gfile.makedirs(str(self.folder))
        names = event_files(self.folder)
        self.is_first = not names
        second = int(time.time())
        if names:
            second = max(second, int(_EVENT_FILE.match(names[-1])[1]) + 1)  # type: ignore[index]
        if names and not self._wall_time:
            events = LegacyEventFileLoader(f"{self.folder}/{names[-1]}").Load()
            self._wall_time = max((event.wall_time for event in events), default=0.0)
        self._path = f"{self.folder}/events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
        writer = RecordWriter(tf.io.gfile.GFile(self._path, "wb"))
        writer.write(Event(wall_time=self._wall_time, file_version="brain.Event:2").SerializeToString())
        return writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a point of each curve."""
        limits = np.finfo(np.float32)  # TensorBoard keeps float32, and a perplexity can be larger.
        summaries = [scalar_pb(name, np.clip(value, limits.min, limits.max)) for name, value in values.items()]
        self._write(step, [{"summary": summary} for summary in summaries])

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, in Markdown."""
        self._write(step, [{"summary": text_pb(name, text)} for name, text in texts.items()])

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Writes histograms. While the file cannot be written they are dropped: a large model has megabytes of them."""
        if self._writer is None:
            return
        summaries = []
        for name, histogram in histograms.items():
            edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
            rows = np.stack([edges[:-1], edges[1:], histogram.counts], axis=1)  # What histogram_pb makes of values.
            summary = histogram_pb(name, [])
            summary.value[0].tensor.CopyFrom(make_tensor_proto(rows, np.float64))
            summaries.append(summary)
        self._write(step, [{"summary": summary} for summary in summaries])

    def summary(self, step: int, summary: Summary) -> None:
        """Writes a summary that is made elsewhere."""
        self._write(step, [{"summary": summary}])

    def graph(self, graph: bytes) -> None:
        """Writes a serialized GraphDef."""
        self._write(0, [{"graph_def": graph}])

    def close(self) -> None:
        """Closes the file, and prints if not everything could be written."""
        if self._unwritten:
            self._write(0, [])
        if self._unwritten:
            self._say(f"{self.folder} lacks its last {len(self._unwritten)} points and texts: they cannot be written.")
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError, tf.errors.OpError):
            if self._writer is not None:
                self._writer.close()
        self._writer = None

    def _write(self, step: int, events: list[dict[str, bytes | SessionLog | Summary]]) -> None:
        was_failing = self._writer is None
        for event in events:
            self._write_event(step, event)
        try:
            # Another file: the one before may end with half a record.
            self._writer = self._writer or self._open()
            self._write_all(self._writer)
        except (OSError, tf.errors.OpError) as error:
            self._close()
            if was_failing:
                with contextlib.suppress(OSError, tf.errors.OpError):
                    tf.io.gfile.remove(self._path)  # Otherwise each try would leave a useless file.
            else:
                self._say(
                    f"Cannot write to {self.folder}: {reason_and_remedy(error)}. Training goes on, and the curves are "
                    "written once that can be done."
                )
            return
        if was_failing:
            self._say(f"{self.folder} can be written again.")

    def _write_event(self, step: int, event: dict[str, Any]) -> None:
        self._wall_time = max(self._wall_time, time.time())
        self._unwritten.append(Event(step=step, wall_time=self._wall_time, **event).SerializeToString())

    def _write_all(self, writer: RecordWriter) -> None:
        for event in self._unwritten:
            writer.write(event)
        writer.flush()
        self._unwritten.clear()


def event_files(folder: Location) -> list[str]:
    """Returns the names of the files for TensorBoard in a folder, in the order in which they are read."""
    return sorted(name for name in tf.io.gfile.listdir(str(folder)) if _EVENT_FILE.match(name))


def literal(text: str) -> str:
    """Returns Markdown that shows a text unchanged: it has no formats, no links and no images."""
    lines = (
        # Neither Markdown nor HTML interprets an entity. Both drop some spaces: these become &nbsp;.
        re.sub(r"[!#&*+<=>\[\\\]_`{|}~-]|(?<=\d)[.)]", lambda found: f"&#{ord(found[0])};", line)
        for line in printable(text).expandtabs(4).split("\n")
    )
    return "  \n".join(re.sub("^ |(?<= ) | $|^$", "&nbsp;", line) for line in lines)
