"""What TensorBoard is given beside the curves: layout, graph, settings and end of a run, histograms."""

import io
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from test_monitor import SCORE, curves, interval  # type: ignore[import-not-found]
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.model.build import build_gpt
from trainer.monitoring import tags
from trainer.monitoring.event_log import EventLog
from trainer.monitoring.events import Histogram
from trainer.monitoring.graph import MAX_NODES, graph_of
from trainer.monitoring.hparams import settings_of
from trainer.monitoring.monitor import Monitor
from trainer.scoring.score import Score

CONFIG = tiny_config("runs", train={"total_steps": 30}, optimizer={"learning_rate": 0.25})


def monitor(logs: Path, first_step: int = 0, model: keras.Model | None = None, config=CONFIG) -> Monitor:
    return Monitor(logs, config, first_step, 30, 0.5, False, io.StringIO(), model=model)


def hparams_of(logs: Path) -> dict[str, bytes]:
    """The content of each tag for the tab HParams, as TensorBoard reads it."""
    events = EventAccumulator(str(logs / "validation"))
    events.Reload()
    return dict(events.PluginTagToContent("hparams"))


def status_of(logs: Path) -> int | None:
    content = hparams_of(logs).get(metadata.SESSION_END_INFO_TAG)
    return None if content is None else metadata.parse_session_end_info_plugin_data(content).status


def test_a_session_has_the_settings_and_the_end_of_its_newest_process(tmp_path: Path):
    failed = monitor(tmp_path)
    with pytest.raises(KeyError), failed.running():
        assert status_of(tmp_path) is None
        failed.evaluation(10, SCORE)
        raise KeyError
    assert status_of(tmp_path) == api_pb2.STATUS_FAILURE
    resumed = monitor(tmp_path, first_step=10)
    with resumed.running():
        assert status_of(tmp_path) is None  # It runs again.
        resumed.evaluation(30, SCORE)
    assert status_of(tmp_path) == api_pb2.STATUS_SUCCESS
    start = metadata.parse_session_start_info_plugin_data(hparams_of(tmp_path)[metadata.SESSION_START_INFO_TAG])
    assert start.group_name == "runs/run"
    assert start.hparams["optimizer.learning_rate"].number_value == 0.25
    assert len(list(tmp_path.rglob("*hparams*"))) == 1
    # Beside the figures of the session, which the tab looks for in the folder of the session.
    assert curves(tmp_path / "validation")["loss/nats_per_token"] == {10: 2.0, 30: 2.0}


def test_a_stopped_run_has_not_succeeded(tmp_path: Path):
    stopped = monitor(tmp_path)
    with stopped.running():
        stopped.evaluation(20, SCORE)
    assert status_of(tmp_path) == api_pb2.STATUS_FAILURE


def test_settings_are_numbers_texts_and_truth_values():
    settings = settings_of(tiny_config("runs", data={"train": ["a.txt", "b.txt"]}), 77)
    assert settings["train.total_steps"] == 77 and settings["train.num_epochs"] == "none"
    assert settings["data.train"] == "a.txt, b.txt" and settings["optimizer.clip_norm"] == "none"
    assert settings["model.pre_norm"] is False
    assert all(isinstance(value, (bool, int, float, str)) for value in settings.values())


def test_a_session_that_cannot_be_written_is_said_and_no_error(tmp_path: Path):
    (tmp_path / "validation" / "a.tfevents.hparams").mkdir(parents=True)
    terminal = io.StringIO()
    with Monitor(tmp_path, CONFIG, 0, 30, 0.5, False, terminal).running():
        pass
    assert "a.tfevents.hparams, for TensorBoard's tab HParams, cannot be written: " in terminal.getvalue()


@pytest.mark.parametrize(("sets", "raw_loss"), [({}, None), ({"books": "a.txt"}, 2.5)])
def test_every_chart_of_the_layout_finds_a_curve(tmp_path: Path, sets: dict[str, str], raw_loss: float | None):
    average = {} if raw_loss is None else {"ema_decay": 0.9}
    evaluation = {"every_steps": 5, "sets": sets}
    watched = monitor(tmp_path, config=tiny_config("runs", evaluation=evaluation, optimizer=average))
    with watched.running():
        watched.interval(10, interval())
        sets_scores = {name: Score(20.0, 10, 40, 5) for name in sets}
        watched.evaluation(10, SCORE._replace(sets=sets_scores, raw_loss=raw_loss))
    events = EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    tensor = events.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(tf.make_ndarray(tensor).item())
    names = {*curves(tmp_path / "train"), *curves(tmp_path / "validation")}
    assert [category.title for category in layout.category] == ["loss", "speed", "optimizer"] + ["texts"] * bool(sets)
    for category in layout.category:
        for chart in category.chart:
            found = [name for name in names for pattern in chart.multiline.tag if re.match(pattern, name)]
            assert found and len(found) == len(set(found)), chart.title
            if chart.title == "loss, nats per token":  # The average and the weights are in one chart.
                assert (tags.RAW_LOSS in found) == (raw_loss is not None)


def graphs(logs: Path) -> list[tf.compat.v1.GraphDef]:
    files = sorted((logs / "train").glob("events*"))
    found = [event.graph_def for file in files for event in LegacyEventFileLoader(str(file)).Load() if event.graph_def]
    return [tf.compat.v1.GraphDef.FromString(graph) for graph in found]


def test_the_graph_is_written_once_and_shows_each_layer_with_its_weights(tmp_path: Path):
    model = build_gpt(CONFIG, 20, 2)
    for first_step in (0, 10):
        with monitor(tmp_path, first_step, model).running():
            pass
    (graph,) = graphs(tmp_path)
    nodes = {node.name: node for node in graph.node}
    assert len(nodes) == len(graph.node) < 200 and graph.ByteSize() < 50_000
    assert all(name.partition(":")[0] in nodes for node in graph.node for name in node.input)
    layers = {name.partition("/")[0] for name in nodes if "/" in name}
    assert {"token_embedding", "block_0", "unembedding"} <= layers and not any(name.endswith("_1") for name in layers)
    assert (
        nodes["block_0/output/kernel"].op == "Placeholder"
        and nodes["logits"].op == "Identity"
        and "Identity" not in nodes
    )
    assert any(node.op == "Softmax" for name, node in nodes.items() if name.startswith("block_0/"))


def test_a_graph_that_no_page_can_show_is_left_out(monkeypatch: pytest.MonkeyPatch):
    model = build_gpt(CONFIG, 20, 2)
    monkeypatch.setattr("trainer.monitoring.graph.MAX_NODES", 50)
    assert graph_of(model, 8) is None and MAX_NODES == 10_000


def test_the_graph_of_a_foreign_model_has_its_layers():
    model = keras.Sequential([keras.layers.Embedding(20, 8), keras.layers.Dense(8), keras.layers.Dense(20)])
    model.build((None, 4))
    graph = tf.compat.v1.GraphDef.FromString(graph_of(model, 4))
    layers = {node.name.partition("/")[0] for node in graph.node if node.op == "MatMul"}
    assert len(layers) == 2 and all(layer.startswith("dense") for layer in layers)


def test_histograms_are_what_tensorboard_makes_of_the_values(tmp_path: Path):
    values = np.arange(60.0)
    watched = monitor(tmp_path)
    with watched.running():
        watched.histograms(10, {"weights/a": Histogram(0.0, 59.0, np.histogram(values, 30)[0])})
    from tensorboard.plugins.histogram.summary_v2 import histogram_pb

    expected = histogram_pb("weights/a", values).value[0]
    events = EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    (event,) = events.Tensors("weights/a")
    np.testing.assert_allclose(tf.make_ndarray(event.tensor_proto), tf.make_ndarray(expected.tensor))
    assert event.step == 10 and "weights/a" in events.PluginTagToContent("histograms")


def test_the_mean_speed_of_a_run_counts_every_step(tmp_path: Path):
    watched = monitor(tmp_path)
    with watched.running():
        watched.interval(10, interval(num_steps=10, tokens_per_sec_in_steps=100.0))
        watched.interval(15, interval(num_steps=5, tokens_per_sec_in_steps=25.0))
        watched.evaluation(15, SCORE)
    # 15 steps of 100 tokens: 10 took 10 s, and 5 took 20 s.
    assert curves(tmp_path / "validation")["speed/mean_tokens_per_sec_in_steps"] == {15: 50.0}


class OfEight(keras.Model):
    """Takes only batches of eight."""

    def call(self, tokens):
        raise ValueError(f"a batch of 8, not of {tokens.shape[0]}\nTraceback of a library")


def test_a_run_goes_on_without_the_graph_of_a_model_that_cannot_be_traced(tmp_path: Path):
    terminal = io.StringIO()
    with Monitor(tmp_path, CONFIG, 0, 30, 0.5, False, terminal, model=OfEight()).running():
        pass
    (line,) = terminal.getvalue().splitlines()
    assert line.startswith("TensorBoard's graph is left out: the model cannot be traced (ValueError: ")
    assert "a batch of 8, not of 1" in line and graphs(tmp_path) == []


def test_histograms_are_written_at_once_and_are_dropped_while_that_is_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    histogram, said, flushes = Histogram(0.0, 1.0, np.ones(30, int)), list[str](), list[int]()
    log = EventLog(tmp_path / "train", 0, said.append)

    def fail(writer: RecordWriter) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "flush", lambda writer: flushes.append(1))
        log.histograms(1, {f"weights/{i}": histogram for i in range(5)})
        assert flushes == [1]
        patch.setattr(RecordWriter, "flush", fail)
        log.scalars(2, {"x": 2.0})
        log.histograms(3, {"weights/dropped": histogram})
    log.scalars(4, {"x": 4.0})
    log.close()
    found = curves(tmp_path / "train")
    assert found["x"] == {2: 2.0, 4: 4.0} and "weights/4" in found and "weights/dropped" not in found
    assert len(said) == 2
