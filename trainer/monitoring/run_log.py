"""Reads everything that a run has logged for TensorBoard: curves with times, samples, and which process wrote them."""

import html
from typing import NamedTuple, TypeVar

from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from trainer.monitoring.event_files import event_files, read_events, scalar_of
from trainer.monitoring.tags import current
from trainer.system.storage import Location

_Value = TypeVar("_Value")


class Dot(NamedTuple):
    """A point of a curve, and when it was written.

    Attributes:
        step: the steps taken so far.
        value: the value.
        secs: the seconds that the run's processes had run until then, without the pauses between them.
    """

    step: int
    value: float
    secs: float


class RunLog(NamedTuple):
    """What a run has logged into a folder, without what a later process has made void.

    Attributes:
        curves: the points of each curve by its name, by rising steps.
        texts: each text by its name and step.
        num_processes: the processes that have written here.
        secs: the seconds that these processes have run.
        repeated: for each process that went on from an earlier step than was logged: the last logged step, and the step
            that it went on from.
    """

    curves: dict[str, list[Dot]]
    texts: dict[str, dict[int, str]]
    num_processes: int
    secs: float
    repeated: list[tuple[int, int]]


def read_log(folder: Location) -> RunLog:
    """Returns what a run has logged into a folder; nothing if the folder is not there.

    Raises:
        UserError: a file cannot be read.
    """
    reader = _Reader()
    for file in event_files(folder):
        for event in read_events(file):
            reader.add(event)
    curves = {
        tag: [Dot(step, *points[step]) for step in sorted(points)]
        for tag, points in sorted(reader.curves.items())
        if points
    }
    texts = {tag: dict(sorted(texts.items())) for tag, texts in sorted(reader.texts.items()) if texts}
    return RunLog(curves, texts, reader.num_processes, reader.secs, reader.repeated)


class _Reader:
    """Collects events, in the order in which they were written."""

    def __init__(self) -> None:
        self.curves: dict[str, dict[int, tuple[float, float]]] = {}
        self.texts: dict[str, dict[int, str]] = {}
        self.num_processes = 0
        self.secs = 0.0
        self.repeated: list[tuple[int, int]] = []
        self._wall_time: float | None = None  # The time of the previous event of this process.
        self._last_step = 0

    def add(self, event: Event) -> None:
        if event.HasField("file_version"):
            return  # Its time may be that of the process before.
        if event.session_log.status == SessionLog.START:
            self._begin_process(event.step)
        if self._wall_time is not None:
            self.secs += max(0.0, event.wall_time - self._wall_time)
        self._wall_time = event.wall_time
        for value in event.summary.value:
            kind, tag = value.metadata.plugin_data.plugin_name, current(value.tag)
            if kind == "scalars":
                self.curves.setdefault(tag, {})[event.step] = (scalar_of(value), self.secs)
                self._last_step = max(self._last_step, event.step)
            elif kind == "text":
                self.texts.setdefault(tag, {})[event.step] = _plain(value.tensor.string_val[0].decode("utf-8"))

    def _begin_process(self, first_void: int) -> None:
        self.num_processes += 1
        self._wall_time = None
        if self._last_step >= first_void:
            self.repeated.append((self._last_step, first_void - 1))
            self._last_step = first_void - 1
        self.curves = _before(first_void, self.curves)
        self.texts = _before(first_void, self.texts)


def _before(step: int, logged: dict[str, dict[int, _Value]]) -> dict[str, dict[int, _Value]]:
    return {tag: {at: value for at, value in values.items() if at < step} for tag, values in logged.items()}


def _plain(markdown: str) -> str:
    """Returns the text that `event_log.literal` has made Markdown of."""
    lines = [html.unescape(line).replace("\N{NO-BREAK SPACE}", " ") for line in markdown.split("  \n")]
    return "\n".join("" if line == " " else line for line in lines)
