"""Laws of train.micro_batch_size = "auto"."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

import trainer
import trainer.training.step as step_module
from trainer.config.file import load_config, make_config
from trainer.distributed.strategy import make_strategy
from trainer.errors import UserError
from trainer.model.gpt import GPT
from trainer.training import launch
from trainer.training.micro_batch import first_that_fits, fit_micro_batch
from trainer.training.step import TrainingStep

VOCABULARY = 17

# A run in a process of its own, on devices with memory for LIMIT examples at a time.
RUN = """
import json, os, sys
import test_micro_batch
import trainer.training.step as step_module
from trainer.config.file import make_config
from trainer.training import launch
step_module.forward_backward = test_micro_batch.limited(int(os.environ["LIMIT"]))
launch.start(make_config(json.loads(sys.argv[1])))
"""


def refused(tensor):
    """Fails as an allocation does, but at once: TensorFlow's allocators wait for seconds that memory be given back."""

    def refuse(value):
        raise MemoryError

    return tf.ensure_shape(tf.numpy_function(refuse, [tensor], tensor.dtype), [])


def too_large(tensor):
    """Asks the allocator for more than any address space holds; the size is an input, as constants are folded."""
    return tf.reduce_sum(tf.fill([tf.cast(tensor * 0, tf.int64) + 2**49], tensor))


def limited(num_rows, fail=refused, forward_backward=step_module.forward_backward):
    """Returns a forward_backward that fails as it runs, for more rows than that at a time."""

    def forward_backward_of(model, weights, state, batch, *rest, **settings):
        gradients = forward_backward(model, weights, state, batch, *rest, **settings)
        if batch[0].shape[0] <= num_rows:
            return gradients
        return gradients._replace(loss_sum=fail(gradients.loss_sum))

    return forward_backward_of


def make_step(model=None, **train):
    train = {"total_steps": 9, "global_batch_size": 12, "sequence_length": 6, **train}
    config = tiny_config(model={"dropout": 0.1}, train=train)
    strategy = make_strategy(config.distribution)
    with strategy.scope():
        model = model or GPT(config.model, VOCABULARY, config.train.sequence_length, dtype=config.train.precision)
        return TrainingStep(config, 9, model, strategy)


def all_bits(step):
    variables = [*step.model.variables, *step.state().values(), step.step, step.stop_requested]
    return [np.array(variable.numpy()).tobytes() for variable in variables]


@pytest.mark.parametrize("rows", [1, 2, 7, 60, 64, 720])
def test_the_largest_that_fits_is_found_in_a_handful_of_trials(rows):
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    for limit in range(rows + 1):
        tried = []
        found = first_that_fits(sizes, lambda size, tried=tried, limit=limit: tried.append(size) or size <= limit)
        assert found == max((size for size in sizes if size <= limit), default=None)
        assert tried[0] == rows
        assert len(tried) == 1 if limit == rows else len(tried) <= 1 + math.ceil(math.log2(len(sizes)))


@pytest.mark.parametrize(
    ("limit", "expected", "precision"),
    [(12, 12, "float32"), (11, 6, "float32"), (5, 4, "mixed_float16"), (1, 1, "float32")],
)
def test_the_largest_micro_batch_with_memory_is_taken_and_nothing_else_changes(monkeypatch, limit, expected, precision):
    monkeypatch.setattr(step_module, "forward_backward", limited(limit))
    step = make_step(precision=precision, micro_batch_size="auto")
    before, lines = all_bits(step), []
    fit_micro_batch(step, lines.append)
    assert step.execution.micro_batch_size == expected
    assert all_bits(step) == before
    assert all("of a replica's 12 examples at a time do not fit." in line for line in lines)
    assert bool(lines) == (limit < 12)


@pytest.mark.slow
def test_a_real_allocation_that_fails_is_survived(monkeypatch):
    monkeypatch.setattr(step_module, "forward_backward", limited(6, too_large))
    step = make_step(micro_batch_size="auto")
    fit_micro_batch(step, lambda line: None)
    assert step.execution.micro_batch_size == 6


def test_the_random_state_of_a_foreign_model_stays(monkeypatch):
    monkeypatch.setattr(step_module, "forward_backward", limited(2))
    layers = [keras.layers.Embedding(VOCABULARY, 4), keras.layers.Dropout(0.5), keras.layers.Dense(VOCABULARY)]
    step = make_step(keras.Sequential([keras.Input((6,), dtype="int32"), *layers]), micro_batch_size="auto")
    assert step.model.non_trainable_variables
    before = all_bits(step)
    fit_micro_batch(step, lambda line: None)
    assert step.execution.micro_batch_size == 2
    assert all_bits(step) == before


def test_auto_on_a_cpu_is_what_a_config_without_the_setting_takes():
    sizes = {"global_batch_size": 32, "sequence_length": 64}
    step = make_step(**sizes, micro_batch_size="auto")
    fit_micro_batch(step, lambda line: None)
    assert step.execution.micro_batch_size == make_step(**sizes).execution.micro_batch_size == 16


def test_a_device_without_memory_for_one_example_is_an_error(monkeypatch):
    monkeypatch.setattr(step_module, "forward_backward", limited(0))
    with pytest.raises(UserError, match=r"not even one example at a time fits the device; lower train\.sequence_len"):
        fit_micro_batch(make_step(micro_batch_size="auto"), lambda line: None)


def settings_of(tmp_path, micro_batch_size, **sections):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog .\n" * 40, encoding="utf-8")
    return {
        "run_folder": str(tmp_path / f"run-{micro_batch_size}"),
        "data": {
            "mode": "packed",
            "documents": "file",
            "held_out_fraction": 0.2,
            "train": str(tmp_path / "text.txt"),
            "prepared_folder": str(tmp_path / "prepared"),
        },
        "tokenizer": {"kind": "char"},
        "model": {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 16, "dropout": 0.1},
        "train": {
            "precision": "float32",
            "total_steps": 4,
            "global_batch_size": 12,
            "sequence_length": 8,
            "micro_batch_size": micro_batch_size,
        },
        "samples": {"num_tokens": 2},
        "checkpoint": {"every_steps": 2},
    } | sections


def kept_in(run_folder):
    return load_config(f"{run_folder}/config.toml").train.micro_batch_size


def saved(run_folder, step):
    """All bytes of a checkpoint."""
    folder = Path(run_folder) / "checkpoints" / f"step_{step:09d}"
    return {
        f"{group}/{name}": array.tobytes()
        for group in ("weights", "optimizer")
        for name, array in safetensors.numpy.load((folder / f"{group}.safetensors").read_bytes()).items()
    }


@pytest.mark.slow
def test_a_run_that_tried_it_out_is_bit_for_bit_the_run_with_that_number_and_is_resumed_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "forward_backward", limited(5))
    numbered = trainer.train(make_config(settings_of(tmp_path, 4)), say=lambda line: None)
    lines, config = [], make_config(settings_of(tmp_path, "auto"))
    run = trainer.train(config, say=lines.append).run_folder
    assert "train.micro_batch_size='auto' comes to 4 of a replica's 12 examples." in lines
    assert saved(run, 4) == saved(numbered.run_folder, 4)
    assert kept_in(run) == 4

    # With memory for all, a resumed run still takes the four of before.
    monkeypatch.setattr(step_module, "forward_backward", limited(12))
    lines.clear()
    for go_on in (
        lambda: trainer.resume(run, say=lines.append),
        lambda: launch.start(config, say=lines.append, or_resume=True),
    ):
        for file in (Path(run) / "checkpoints/step_000000004").iterdir():
            file.unlink()
        go_on()
        assert saved(run, 4) == saved(numbered.run_folder, 4)
    assert not [line for line in lines if "micro_batch" in line]

    # Asked for anew, it is tried out anew, for that process.
    trainer.resume(run, say=lines.append, overrides=["train.micro_batch_size=auto"])
    assert "train.micro_batch_size='auto' comes to 12 of a replica's 12 examples." in lines
    assert kept_in(run) == 4


def start(settings, limit, tf_config=None):
    variables = {"LIMIT": str(limit), "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    if tf_config is not None:
        variables["TF_CONFIG"] = json.dumps(tf_config)
    return subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(settings)],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_two_replicas_go_on_after_a_trial_that_failed(tmp_path):
    two = {"distribution": {"kind": "cpu", "logical_devices": 2}}
    output = finish(start(settings_of(tmp_path, "auto", **two), limit=2))
    assert "comes to 2 of a replica's 6 examples." in output
    finish(start(settings_of(tmp_path, 2, **two), limit=2))
    assert kept_in(tmp_path / "run-auto") == 2
    assert saved(tmp_path / "run-auto", 4) == saved(tmp_path / "run-2", 4)


@pytest.mark.slow
def test_workers_take_what_fits_the_smallest_of_them(tmp_path, free_addresses):
    workers = free_addresses(2)
    settings = settings_of(tmp_path, "auto", distribution={"kind": "multi_worker"})
    processes = [
        start(settings, limit, {"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}})
        for i, limit in enumerate([5, 2])
    ]
    outputs = [finish(process) for process in processes]
    assert "comes to 2 of a replica's 6 examples." in outputs[0]
    assert "micro_batch" not in outputs[1]
    assert kept_in(tmp_path / "run-auto") == 2
    finish(start(settings_of(tmp_path, 2), limit=2))
    assert saved(tmp_path / "run-auto", 4) == saved(tmp_path / "run-2", 4)
