"""Reads the curves of a run from its files for TensorBoard."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from trainer.errors import UserError
from trainer.monitoring.event_log import event_files
from trainer.monitoring.tags import current
from trainer.system.storage import Location, reason_and_remedy


class Curve(NamedTuple):
    """The points of a curve.

    Attributes:
        steps: int64 [points], rising.
        values: float32 [points].
    """

    steps: np.ndarray
    values: np.ndarray


def read_curves(folder: Location) -> dict[str, Curve]:
    """Returns the curves in a folder by name, without points that a later file makes void, as TensorBoard shows them.
    Points that version 0.1.0 has written are in the curves with the names of today.

    Args:
        folder: the folder that an `EventLog` writes into. If it is not there, there are no curves.

    Raises:
        UserError: a file cannot be read.
    """
    curves: dict[str, dict[int, float]] = {}
    try:
        for name in event_files(folder) if tf.io.gfile.isdir(str(folder)) else []:
            for event in _events(f"{folder}/{name}"):
                if event.session_log.status == SessionLog.START:
                    curves = {
                        tag: {step: value for step, value in points.items() if step < event.step}
                        for tag, points in curves.items()
                    }
                for value in event.summary.value:
                    if value.metadata.plugin_data.plugin_name == "scalars":
                        curves.setdefault(current(value.tag), {})[event.step] = tf.make_ndarray(value.tensor).item()
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"{folder} cannot be read: {reason_and_remedy(error)}.") from None
    return {
        tag: Curve(np.array(sorted(points), np.int64), np.array([points[step] for step in sorted(points)], np.float32))
        for tag, points in sorted(curves.items())
        if points
    }


def _events(path: str) -> Iterator[Event]:
    """Yields the events of a file, up to a damaged one: the file of a run that was killed may end in half a record."""
    with contextlib.suppress(tf.errors.DataLossError):
        yield from LegacyEventFileLoader(path).Load()
