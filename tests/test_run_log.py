from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from watched_run import record, watch  # type: ignore[import-not-found]

from trainer.monitoring import tags
from trainer.monitoring.event_files import event_files, newest_points, read_events
from trainer.monitoring.event_log import EventLog
from trainer.monitoring.events import Histogram
from trainer.monitoring.run_log import read_log

TEXTS = ("plain", "", " leading", "two  blanks ", "\n\nlines\n", "# *no* `Markdown` <b>&amp;</b> 1. - |", "고양이 😀")


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """The logs of a run that was killed after step 24 and went on from step 20."""
    run = record(tmp_path / "run")
    watch(run, 0, 24)
    watch(run, 20, 40)
    return tmp_path / "run/logs"


def test_the_points_are_those_that_tensorboard_reads(logs: Path):
    for split in ("train", "validation"):
        board = EventAccumulator(str(logs / split), purge_orphaned_data=True)
        board.Reload()
        theirs = {
            tag: {event.step: tf.make_ndarray(event.tensor_proto).item() for event in board.Tensors(tag)}
            for tag in board.Tags()["tensors"]
            if board.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
        }
        log = read_log(logs / split)
        assert {tag: {dot.step: dot.value for dot in dots} for tag, dots in log.curves.items()} == theirs
        newest = {tag: (max(points), points[max(points)]) for tag, points in theirs.items()}
        assert newest_points(logs / split, theirs) == newest
    train = read_log(logs / "train")
    assert (train.num_processes, train.repeated) == (2, [(24, 20)])
    assert list(train.texts[tags.samples_of("greedy")]) == [10, 20, 30, 40]


def test_texts_come_back_as_they_were_written(tmp_path: Path):
    run = record(tmp_path / "run")
    for number, text in enumerate(TEXTS):
        watch(run, number * 10, number * 10 + 10, sample=text)
    samples = read_log(tmp_path / "run/logs/train").texts[tags.samples_of("top-p")]
    assert list(samples.values()) == list(TEXTS)


def test_a_damaged_record_ends_a_file(tmp_path: Path):
    log = EventLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.scalars(step, {"x": step})
    log.close()
    (file,) = event_files(tmp_path)
    whole = file.read_bytes()
    assert [event.step for event in read_events(file)] == [0, 1, 1, 2, 3]
    size = len(whole) - len(cut_after(whole, 4))
    for missing in range(1, size + 1):  # A process was killed while it wrote the last record.
        file.write_bytes(whole[:-missing])
        assert [event.step for event in read_events(file)] == [0, 1, 1, 2]
        assert newest_points(tmp_path, ["x"]) == {"x": (2, 2.0)}
    flipped = bytearray(whole)
    flipped[-size - 20] ^= 1
    file.write_bytes(bytes(flipped))
    assert [event.step for event in read_events(file)] == [0, 1, 1]
    assert newest_points(tmp_path, ["x"]) == {"x": (3, 3.0)}
    file.write_bytes(b"\0" * 1000)
    assert list(read_events(file)) == [] and read_log(tmp_path).curves == {} and read_log(tmp_path / "no").curves == {}


def test_histograms_and_the_graph_are_skipped_unread(tmp_path: Path):
    log = EventLog(tmp_path, 0)
    log.graph(b"g" * 1000)
    log.histograms(1, {"weights/a": Histogram(0.0, 1.0, np.ones(30, int))})
    log.texts(2, {"a": "ends like one:\n\nhistograms"})
    log.scalars(3, {"x": 3.0})
    log.close()
    (file,) = event_files(tmp_path)
    assert [event.step for event in read_events(file)] == [0, 1, 2, 3]
    content = bytearray(file.read_bytes())
    content[content.index(b"weights/a") + 40] ^= 1  # A checksum would end the file here.
    file.write_bytes(bytes(content))
    assert [event.step for event in read_events(file)] == [0, 1, 2, 3]
    assert newest_points(tmp_path, ["x"]) == {"x": (3, 3.0)}


def cut_after(content: bytes, num_records: int) -> bytes:
    """Returns the first records of a file."""
    place = 0
    for _ in range(num_records):
        place += 16 + int.from_bytes(content[place : place + 8], "little")
    return content[:place]


def write_events(file: Path, events: Iterable[Event]) -> None:
    writer = RecordWriter(tf.io.gfile.GFile(str(file), "wb"))
    for event in events:
        writer.write(event.SerializeToString())
    writer.close()


def test_time_counts_processes_without_the_pauses_between_them(tmp_path: Path):
    def process(begin: float, first_step: int, times: dict[int, float]) -> list[Event]:
        start = Event(wall_time=begin, step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
        points = [Event(wall_time=at, step=step, summary=scalar_pb("x", 1.0)) for step, at in times.items()]
        return [Event(wall_time=0, file_version="brain.Event:2"), start, *points]

    write_events(tmp_path / "events.out.tfevents.0000000001.a", process(1000, 0, {5: 1010, 10: 1020, 15: 1030}))
    write_events(tmp_path / "events.out.tfevents.0000000002.a", process(9000, 10, {15: 9005, 20: 9015}))
    log = read_log(tmp_path)
    assert log.secs == 45 and log.repeated == [(15, 10)]
    # The time in which step 15 was taken for the first time was spent, too.
    assert [(dot.step, dot.secs) for dot in log.curves["x"]] == [(5, 10), (10, 20), (15, 35), (20, 45)]
