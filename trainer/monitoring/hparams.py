"""A run in TensorBoard's tab HParams: its settings and how it ended. Its figures are the curves of the validation text.

The tab compares the runs below a folder, `tensorboard --logdir runs`, and shows the settings first that differ.
"""

import contextlib
import time

import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.config.settings import Config
from trainer.system.storage import Location, reason_and_remedy
from trainer.system.terminal import Say

# TensorBoard's reader in Python reads the files of a folder in the order of their names, and never goes back to one.
# This file is before the curves, whose files go on to grow.
FILE = "a.tfevents.hparams"

SECTIONS = ("tokenizer", "model", "train", "optimizer")


class Session:
    """The file of a run for the tab HParams. A process that goes on with the run writes the file again: TensorBoard
    shows one session, with the settings and the end of the newest process.

    Args:
        folder: the folder with the curves that are the session's figures.
        config: the run's configuration.
        total_steps: the number of steps of the run.
        say: prints a line; called if the file cannot be written. Training goes on.
    """

    def __init__(self, folder: Location, config: Config, total_steps: int, say: Say) -> None:
        self._path = f"{folder}/{FILE}"
        self._say = say
        self._started = time.time()
        self._summaries = [hparams_pb(settings_of(config, total_steps), config.run_folder, self._started)]
        self._write()

    def end(self, is_finished: bool) -> None:
        """Records the end: success if the run has taken all its steps, failure if it was stopped or has failed."""
        status = STATUS_SUCCESS if is_finished else STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        content = plugin_data_pb2.HParamsPluginData(session_end_info=end)
        summary = Summary()
        summary.value.add(
            tag=metadata.SESSION_END_INFO_TAG,
            metadata=metadata.create_summary_metadata(content),
            tensor=metadata.NULL_TENSOR,
        )
        self._summaries.append(summary)
        self._write()

    def _write(self) -> None:
        try:
            with contextlib.closing(RecordWriter(tf.io.gfile.GFile(self._path, "wb"))) as writer:
                writer.write(Event(wall_time=self._started, file_version="brain.Event:2").SerializeToString())
                for summary in self._summaries:
                    writer.write(Event(wall_time=self._started, summary=summary).SerializeToString())
        except (OSError, tf.errors.OpError) as error:
            self._say(f"{self._path}, for TensorBoard's tab HParams, cannot be written: {reason_and_remedy(error)}.")


def settings_of(config: Config, total_steps: int) -> dict[str, bool | float | str]:
    """Returns the settings that decide what is trained and how, by name; "none" if one has no value.

    Args:
        config: the run's configuration.
        total_steps: the number of steps of the run, in place of the setting, which a run in epochs does not have.
    """
    sections = config.model_dump(mode="json")
    settings = {f"{name}.{key}": value for name in SECTIONS for key, value in sections[name].items()}
    settings |= {"data.train": config.data.train, "train.total_steps": total_steps}
    return {
        name: value if isinstance(value, (int, float, str)) else _as_text(value) for name, value in settings.items()
    }


def _as_text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
