"""Laws of train.batch_warmup: sizes by the step, one order of the examples, and the weights of smaller batches."""

import contextlib
import io
from pathlib import Path

import pytest
import tensorflow as tf
from tiny import quiet, tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path
from tiny_run import assert_same_bits, saved, text_run  # type: ignore[import-not-found]  # likewise
from watched_run import evaluation_at, interval_at, record  # type: ignore[import-not-found]  # likewise

import trainer
from trainer.config.schedule import batch_size_at, examples_before, steps_for
from trainer.config.settings import Config, TrainConfig
from trainer.data.batches import Share, training_batches
from trainer.execution import resolve
from trainer.hardware.processor import Processor
from trainer.monitoring import tags
from trainer.monitoring.monitor import Monitor
from trainer.reports.history import read_history
from trainer.system import progress
from trainer.training.step import Gradients, accumulate

WARMUP = {"global_batch_size": 8, "batch_warmup": {3: 2, 5: 4}}
SIZES = [2, 2, 2, 4, 4, 8, 8, 8]


def train_config(**settings: object) -> TrainConfig:
    return TrainConfig.model_validate({"precision": "float32", "total_steps": 8, **WARMUP, **settings})


def test_sizes_and_places_are_those_of_a_plain_loop():
    train, steps = train_config(), range(len(SIZES))
    before = [sum(SIZES[:step]) for step in steps]
    assert [batch_size_at(train, step) for step in steps] == SIZES
    assert [examples_before(train, step) for step in steps] == before
    numbers = tf.range(len(SIZES), dtype=tf.int64)
    assert batch_size_at(train, numbers, tf.minimum).numpy().tolist() == SIZES
    assert examples_before(train, numbers, tf.minimum).numpy().tolist() == before


@pytest.mark.parametrize("data_offset", [0, -3, 5])
def test_epochs_take_the_fewest_steps_that_hold_all_examples(data_offset: int):
    for num_examples in range(5, 40):
        train = train_config(total_steps=None, num_epochs=2)
        steps = steps_for(train, num_examples, data_offset)
        needed = 2 * num_examples - data_offset
        assert examples_before(train, steps - 1) < needed <= examples_before(train, steps)


def config_of(folder: Path, **train: object) -> Config:
    (folder / "text.txt").write_text("the cat sat on the mat with a hat\n" * 60, encoding="utf-8")
    data = {"train": str(folder / "text.txt"), "documents": "file", "held_out_fraction": 0.1}
    settings = {"total_steps": 8, "sequence_length": 8, **train}
    return tiny_config(folder, data=data, tokenizer={"kind": "char"}, train=settings)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_the_order_of_the_examples_is_that_of_a_run_without(tmp_path: Path, num_replicas: int):
    config, plain = config_of(tmp_path, **WARMUP), config_of(tmp_path, global_batch_size=2)
    prepared = tiny_prepared(config)
    share = Share(0, num_replicas, num_replicas)
    found = []
    for number, (inputs, _, weights) in enumerate(training_batches(prepared, config, 0, 8, share, 3)):
        is_used = weights.numpy().any(axis=1)
        num_used = SIZES[number // num_replicas] // num_replicas
        assert is_used[:num_used].all() and not is_used[num_used:].any()
        found += [row.tobytes() for row in inputs.numpy()[is_used]]
    pairs = training_batches(prepared, plain, 0, sum(SIZES) // 2, data_offset=3)
    assert found == [row.tobytes() for inputs, _, _ in pairs for row in inputs.numpy()]


def test_a_micro_batch_divides_every_share():
    train = {"total_steps": 3, "global_batch_size": 96, "sequence_length": 64, "batch_warmup": {1: 32, 2: 48}}
    config = tiny_config(train=train)
    for num_replicas, size in ((1, 16), (2, 8), (4, 4)):
        execution = resolve(config, Processor("GPU"), num_replicas)
        assert (execution.examples, execution.micro_batch_size) == (96 // num_replicas, size)
        assert resolve(config, Processor("GPU"), num_replicas, use="evaluation").micro_batch_size == 96 // num_replicas


def test_only_the_micro_batches_of_the_batch_are_computed():
    def one(weights, state, batch, first_example):
        return Gradients([tf.ones_like(weights[0])], tf.ones([]), tf.ones([]), [])

    batch = tuple(tf.zeros([8, 3]) for _ in range(3))
    count = tf.function(
        lambda used: (
            accumulate(one, [tf.zeros([2])], [], batch, tf.zeros([], tf.int64), 2, 1, tf.float32, used).loss_sum
        )
    )
    assert [float(count(tf.constant(used, tf.int64))) for used in (2, 6, 8)] == [1, 3, 4]


def test_speeds_shares_and_the_time_left_count_what_the_batches_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = ("train.total_steps=8", "train.global_batch_size=8", "train.batch_warmup.3=2", "train.batch_warmup.5=4")
    run, said, now = record(tmp_path / "run", *sizes), io.StringIO(), 0.0
    bar, secs_left = progress.Bar("training", 8), []
    monkeypatch.setattr("trainer.monitoring.progress.shown", lambda *_, **__: contextlib.nullcontext(bar))
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monitor = Monitor(run.path / "logs", run.config, 0, 8, 0.5, False, said)
    with monitor.running():
        now = 12.0
        for step, num_steps, overall in ((3, 3, 0.5), (8, 5, 2.0)):
            speeds = {"tokens_per_sec_in_steps": 2 * overall, "tokens_per_sec_overall": overall, "input_share": 0.0}
            monitor.advance(step)
            secs_left.append(bar.secs_left())
            monitor.interval(step, interval_at(step, 0.0)._replace(num_steps=num_steps, **speeds))
        monitor.evaluation(8, evaluation_at(8))
    first, second = sum(SIZES[:3]), sum(SIZES[3:])
    secs = first / 1.0 + second / 4.0
    history = read_history(str(run.path))
    assert [dot.value for dot in history.curve(tags.MEAN_TOKENS_PER_SEC, "validation")] == [
        pytest.approx(sum(SIZES) / secs)
    ]
    assert history.goodput()["computing"] == pytest.approx(secs / (first / 0.5 + second / 2.0))
    assert secs_left[0] == pytest.approx(12 / first * second)
    assert f"  {progress.clock(12 / first * second)} left" in said.getvalue()


@pytest.mark.slow
def test_a_warm_up_is_the_run_with_small_batches_that_is_forked_into_large_ones(tmp_path: Path):
    shared = ("train.micro_batch_size=1", "train.total_steps=5", "model.dropout=0.2", "checkpoint.every_steps=2")
    large = "train.global_batch_size=8"
    trainer.train(text_run(tmp_path, "warm", large, "train.batch_warmup.2=4", *shared), say=quiet)
    trainer.train(text_run(tmp_path, "small", "train.global_batch_size=4", *shared), say=quiet)
    warm, small = tmp_path / "warm", tmp_path / "small"
    assert_same_bits(saved(warm, 2), saved(small, 2))
    trainer.fork(f"{small}@2", [f"run_folder={tmp_path}/fork", large], say=quiet)
    assert_same_bits(saved(warm, 5), saved(tmp_path / "fork", 5))
