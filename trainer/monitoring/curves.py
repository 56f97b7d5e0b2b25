"""Reads the curves of a run from its files for TensorBoard, also while they are written. It loads no TensorFlow."""

from typing import NamedTuple

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from trainer.monitoring.event_files import event_files, events_from, scalar_of
from trainer.monitoring.tags import current
from trainer.system.storage import Location


class Curve(NamedTuple):
    """The points of a curve.

    Attributes:
        steps: int64 [points], rising.
        values: float32 [points].
    """

    steps: np.ndarray
    values: np.ndarray


def read_history(run_folder: Location) -> dict[str, Curve]:
    """Returns the curves of a run by name, such as "train/loss/nats_per_token"; empty if nothing was logged.

    Raises:
        UserError: a file cannot be read.
    """
    return {
        f"{part}/{name}": curve
        for part in ("train", "validation")
        for name, curve in read_curves(run_folder / "logs" / part).items()
    }


def read_curves(folder: Location) -> dict[str, Curve]:
    """Returns the curves in a folder by name, without points that a later file makes void, as TensorBoard shows them.
    Points that version 0.1.0 has written are in the curves with the names of today.

    Args:
        folder: the folder that an `EventLog` writes into. If it is not there, there are no curves.

    Raises:
        UserError: a file cannot be read.
    """
    reader = CurveReader(folder)
    reader.read()
    return {
        tag: Curve(np.array(sorted(points), np.int64), np.array([points[step] for step in sorted(points)], np.float32))
        for tag, points in sorted(reader.points.items())
        if points
    }


class CurveReader:
    """Reads the curves in a folder as they grow.

    Args:
        folder: the folder that an `EventLog` writes into. It may be made later.

    Attributes:
        points: the value of each curve at each step, by the curve's name.
        wall_time: when the newest event was written, in seconds since 1970; 0 if there is none.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.points: dict[str, dict[int, float]] = {}
        self.wall_time = 0.0
        self._num_read: dict[str, int] = {}

    def read(self) -> None:
        """Reads what was written since the last call.

        Raises:
            UserError: a file cannot be read.
        """
        files = event_files(self.folder)
        if not self._num_read.keys() <= {file.name for file in files}:
            self.points, self._num_read = {}, {}  # Somebody has removed a file.
        for file in files:
            for event, end in events_from(file, self._num_read.setdefault(file.name, 0)):
                self._num_read[file.name] = end
                self._add(event)

    def _add(self, event: Event) -> None:
        self.wall_time = max(self.wall_time, event.wall_time)
        if event.session_log.status == SessionLog.START:
            self.points = {
                tag: {step: value for step, value in points.items() if step < event.step}
                for tag, points in self.points.items()
            }
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars":
                self.points.setdefault(current(value.tag), {})[event.step] = scalar_of(value)
