"""Laws of whole runs, in real processes if a process has to die."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorflow.tsl.profiler.protobuf import xplane_pb2

import trainer
from trainer.cli import main
from trainer.data.prepare import prepare
from trainer.distributed.strategy import make_strategy
from trainer.distributed.workers import Workers
from trainer.exchange.open import open_model
from trainer.model.build import make_model
from trainer.model.gpt import GPT
from trainer.runs import checkpoint, results
from trainer.runs.checkpoint import write_first
from trainer.runs.results import read_scores, write_scores
from trainer.runs.run_checkpoints import open_checkpoints
from trainer.runs.run_folder import RunFolder
from trainer.scoring.score import total
from trainer.scoring.scorer import Scorer
from trainer.training import launch
from trainer.training.loop import is_due, steps_until_due
from trainer.training.loss_scale import LossScale
from trainer.training.snapshot import restore
from trainer.training.step import TrainingStep

SETTINGS = {
    "data": {"mode": "packed", "documents": "file", "held_out_fraction": 0.2},
    "tokenizer": {"kind": "char"},
    "model": {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 16, "dropout": 0.1},
    "train": {
        "precision": "float32",
        "total_steps": 40,
        "global_batch_size": 4,
        "sequence_length": 8,
        "steps_per_call": 7,
    },
    "optimizer": {"schedule": "cosine", "warmup_steps": 5, "clip_norm": 1.0, "weight_decay": 0.1},
    "checkpoint": {"every_steps": 10, "keep_last": 10},
    "log": {"every_steps": 4},
    "evaluation": {"every_steps": 15},
    # To compile all samplers takes several times as long as these runs.
    "samples": {"every_steps": 20, "num_tokens": 4, "samplers": ["greedy", "top-p"]},
}

# A run in a new process, which waits PAUSE seconds before each call of the compiled loop.
RUN = """
import json, os, sys, time
import trainer
from trainer.training import launch, loop
pause = float(os.environ["PAUSE"])
if pause:
    due = loop.steps_until_due
    loop.steps_until_due = lambda *arguments: (time.sleep(pause), due(*arguments))[1]
if sys.argv[1] == "train":
    result = trainer.train(trainer.make_config(json.loads(sys.argv[2])))
elif sys.argv[1] == "train or resume":
    result = launch.start(trainer.make_config(json.loads(sys.argv[2])), or_resume=True)
else:
    result = trainer.resume(sys.argv[2], overrides=sys.argv[3:])
sys.exit(75 if result.is_stopped else 0)
"""


def settings_of(tmp_path, name="run", **overrides):
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text("the quick brown fox jumps over the lazy dog .\n" * 40, encoding="utf-8")
    settings = json.loads(json.dumps(SETTINGS))
    settings["run_folder"] = str(tmp_path / name)
    settings["data"] |= {"train": str(text), "prepared_folder": str(tmp_path / "prepared")}
    for key, value in overrides.items():
        section, _, field = key.partition("__")
        settings[section][field] = value
    return settings


# A run with Muon, smaller batches at first and an average of the weights has all kinds of state that resuming restores.
ALL_STATE = {
    "train__global_batch_size": 8,
    "train__batch_warmup": {12: 4},
    "optimizer__kind": "muon",
    "optimizer__ema_decay": 0.9,
}

# Sends SIGTERM to the process when it has taken its last step.
STOP_AFTER_THE_LAST_STEP = """
import os, signal, time
from trainer.runs.checkpoint import Checkpoints
wait = Checkpoints.wait
def wait_and_be_stopped(checkpoints):
    Checkpoints.wait = wait
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    checkpoints.wait()
Checkpoints.wait = wait_and_be_stopped
"""


def start(verb, what, *overrides, pause=0.0, tf_config=None, first=""):
    """Starts a process that trains; it runs the code first before anything else."""
    variables = {"PAUSE": str(pause), "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    if tf_config is not None:
        variables["TF_CONFIG"] = json.dumps(tf_config)
    return subprocess.Popen(
        [sys.executable, "-c", first + RUN, verb, what, *overrides],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def wait_for(path, process, secs=90):
    """Waits until a path is there."""
    deadline = time.monotonic() + secs
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def saved(run, step):
    """All arrays of a checkpoint."""
    folder = run / "checkpoints" / f"step_{step:09d}"
    return {
        f"{group}/{name}": array
        for group in sorted(file.stem for file in folder.glob("*.safetensors"))
        for name, array in safetensors.numpy.load((folder / f"{group}.safetensors").read_bytes()).items()
    }


def assert_bit_identical(one, two):
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), name


def assert_same_best(one, two):
    one, two = RunFolder(one), RunFolder(two)
    assert read_scores(one) == read_scores(two) and set(read_scores(one)) == {15, 30, 40}
    assert open_checkpoints(one).best_step() == open_checkpoints(two).best_step() is not None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    returncode, output = finish(start("train", json.dumps(settings_of(folder))))
    assert returncode == 0, output
    return folder / "run"


@pytest.fixture(scope="module")
def uninterrupted_with_all_state(tmp_path_factory):
    """The folder of an uninterrupted run with ALL_STATE."""
    folder = tmp_path_factory.mktemp("all_state")
    returncode, output = finish(start("train", json.dumps(settings_of(folder, **ALL_STATE))))
    assert returncode == 0, output
    assert all(any(kind in name for name in saved(folder / "run", 40)) for kind in ("momentum", "average/"))
    return folder / "run"


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_run(tmp_path, uninterrupted_with_all_state):
    process = start("train", json.dumps(settings_of(tmp_path, **ALL_STATE)), pause=0.4)
    run = tmp_path / "run"
    # Past step 20, with logs and steps that no checkpoint has.
    wait_for(run / "checkpoints" / "step_000000020", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "checkpoints" / "step_000000040").exists()
    returncode, output = finish(start("resume", str(run)))
    assert returncode == 0, output
    assert_bit_identical(saved(run, 40), saved(uninterrupted_with_all_state, 40))
    assert_same_best(run, uninterrupted_with_all_state)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75_and_the_resumed_run_ends_with_the_same_bits(
    tmp_path, uninterrupted_with_all_state, number
):
    process = start("train", json.dumps(settings_of(tmp_path, **ALL_STATE, checkpoint__every_steps=1000)), pause=0.4)
    run = tmp_path / "run"
    wait_for(run / "lock", process)
    while "step 4/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    returncode, output = finish(process)
    assert returncode == 75, output
    assert f"trainer train --resume {run}" in output
    folder = max((run / "checkpoints").iterdir())
    assert 4 <= int(folder.name.removeprefix("step_")) < 40
    returncode, output = finish(start("resume", str(run)))
    assert returncode == 0, output
    assert_bit_identical(saved(run, 40), saved(uninterrupted_with_all_state, 40))
    assert_same_best(run, uninterrupted_with_all_state)


@pytest.mark.slow
def test_a_script_goes_on_training_when_its_output_is_closed(tmp_path, uninterrupted):
    process = start("train", json.dumps(settings_of(tmp_path)))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert_bit_identical(saved(tmp_path / "run", 40), saved(uninterrupted, 40))


def two_workers(workers, verb, what, *overrides, pause=0.0):
    return [
        start(
            verb,
            what,
            *overrides,
            pause=pause,
            tf_config={"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}},
        )
        for i in range(2)
    ]


@pytest.mark.slow
def test_a_run_killed_and_resumed_on_other_devices_sees_the_same_batches(tmp_path, uninterrupted, free_addresses):
    run = tmp_path / "run"
    process = start("train", json.dumps(settings_of(tmp_path)), pause=0.4)
    wait_for(run / "checkpoints" / "step_000000010", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = start("resume", str(run), "distribution.logical_devices=4", pause=0.4)
    wait_for(run / "checkpoints" / "step_000000020", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "checkpoints" / "step_000000040").exists()

    more = (f"evaluation.sets.foxes={tmp_path}/text.txt", "log.histograms_every_steps=10")
    for process in two_workers(free_addresses(2), "resume", str(run), *more):
        returncode, output = finish(process)
        assert returncode == 0, output
    steps = histogram_steps(run)
    assert {tag.partition("/")[0] for tag in steps} == {"weights", "weight_gradients"}
    assert all(each[-1] == 30 for each in steps.values())
    # Each worker has scored its share of the set.
    opened = open_model(str(run))
    scorer = Scorer(opened.model, opened.tokenizer, opened.config.train.sequence_length)
    alone = total(scorer.scores([(tmp_path / "text.txt").read_text()]))
    together = json.loads((run / "result.json").read_text())["evaluation"]["sets"]["foxes"]
    assert (together["num_texts"], together["num_tokens"]) == (alone.num_texts, alone.num_tokens)
    assert together["nats"] == pytest.approx(alone.nats, rel=1e-6)
    expected, found = saved(uninterrupted, 40), saved(run, 40)
    assert found["optimizer/batches_hash"] == expected["optimizer/batches_hash"]
    weights = [name for name in expected if name.startswith("weights/")]
    difference, size = (
        np.linalg.norm(np.concatenate([np.ravel(array[name]) for name in weights]))
        for array in ({name: found[name] - expected[name] for name in weights}, expected)
    )
    assert difference / size < 1e-5


def kill_after(run, step, *processes):
    """Kills the last of the processes once a checkpoint is there. Returns what the others print, who end with 1."""
    wait_for(run / "checkpoints" / f"step_{step:09d}", processes[0])
    processes[-1].send_signal(signal.SIGKILL)
    processes[-1].communicate()
    ends = [finish(process) for process in processes[:-1]]
    assert all(returncode == 1 for returncode, _ in ends), ends
    return [output for _, output in ends]


@pytest.mark.slow
def test_what_a_run_with_split_weights_scores_and_writes_is_what_one_without_does(tmp_path, free_addresses):
    (tmp_path / "other.txt").write_text("a lazy fox jumps .\nthe dog\n" * 5, encoding="utf-8")
    on_two = {"logical_devices": 2}
    runs = {"whole": on_two, "split": on_two | {"shard": "weights"}, "workers": {"shard": "weights"}}
    found = {}
    for name, distribution in runs.items():
        settings = settings_of(tmp_path, name, train__precision="float64", train__total_steps=6)
        settings["optimizer"] |= {"ema_decay": 0.9, "warmup_steps": 2}
        settings["evaluation"] = {"every_steps": 2, "sets": {"other": str(tmp_path / "other.txt")}}
        settings["samples"] = {"samplers": ["greedy", "top-p"], "num_tokens": 5, "every_steps": 3}
        settings["distribution"] = distribution
        if name == "workers":
            processes = two_workers(free_addresses(2), "train", json.dumps(settings))
        else:
            processes = [start("train", json.dumps(settings))]
        for returncode, output in map(finish, processes):
            assert returncode == 0, output
        found[name] = json.loads((tmp_path / name / "result.json").read_text())
        assert all(found[name]["samples"].values()) and len(found[name]["samples"]) == 2
        scores = [found[name]["evaluation"][score] for score in ("loss", "raw_loss")]
        scores.append(found[name]["evaluation"]["sets"]["other"]["nats"])
        found[name]["scores"] = scores
    for name in ("split", "workers"):
        assert found[name]["samples"] == found["whole"]["samples"]
        np.testing.assert_allclose(found[name]["scores"], found["whole"]["scores"], rtol=1e-12)


@pytest.mark.slow
def test_a_run_goes_on_with_another_split_and_ends_with_the_same_weights(tmp_path, free_addresses):
    settings = settings_of(
        tmp_path,
        train__precision="float64",
        train__total_steps=30,
        checkpoint__every_steps=6,
        evaluation__every_steps=8,
    )
    settings["samples"] = {"samplers": ["greedy"], "num_tokens": 1, "every_steps": 10}
    settings["optimizer"] |= {"ema_decay": 0.9, "kind": "muon"}  # The embeddings have AdamW.
    run, split = tmp_path / "run", "distribution.shard=optimizer"
    kill_after(run, 6, start("train", json.dumps(settings), pause=0.4))
    on_four = ("distribution.shard=weights", "distribution.logical_devices=4", "train.micro_batch_size=auto")
    kill_after(run, 12, start("resume", str(run), *on_four, pause=0.4))
    (output,) = kill_after(run, 18, *two_workers(free_addresses(2), "resume", str(run), split, pause=0.4))
    assert "UserError: worker 1 (127.0.0.1:" in output and f"trainer train --resume {run}" in output
    # The best so far, which is saved between two saves: both workers pass on their pieces.
    assert (run / "checkpoints" / "step_000000016").is_dir()
    returncode, output = finish(start("resume", str(run)))
    assert returncode == 0, output
    returncode, output = finish(start("train", json.dumps(settings | {"run_folder": str(tmp_path / "whole")})))
    assert returncode == 0, output
    expected, found = saved(tmp_path / "whole", 30), saved(run, 30)
    assert found["optimizer/batches_hash"] == expected["optimizer/batches_hash"]
    assert found.keys() == expected.keys()
    for group in ("weights/", "average/", "/momentum", "first_moment", "second_moment"):
        one, two = (
            np.concatenate([np.ravel(arrays[name]) for name in sorted(arrays) if group in name])
            for arrays in (found, expected)
        )
        assert np.linalg.norm(one - two) <= 1e-12 * np.linalg.norm(two)  # float64: separates a bug from rounding


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["optimizer", "weights"])
def test_a_split_run_that_resumes_from_a_checkpoint_ends_with_the_same_bits(tmp_path, shard):
    settings = settings_of(tmp_path, train__total_steps=12, checkpoint__every_steps=6)
    settings |= {"distribution": {"shard": shard, "logical_devices": 2}, "samples": {"samplers": ["greedy"]}}
    run = tmp_path / "run"
    returncode, output = finish(start("train", json.dumps(settings)))
    assert returncode == 0, output
    whole = saved(run, 12)
    # What a process leaves that is killed before it saves the last step.
    shutil.rmtree(run / "checkpoints" / "step_000000012")
    (run / "result.json").unlink()
    returncode, output = finish(start("resume", str(run)))
    assert returncode == 0, output
    assert_bit_identical(saved(run, 12), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "group"), [("weights", "weights"), ("optimizer", "optimizer")])
def test_a_checkpoint_that_lacks_an_array_is_an_error_with_its_name_on_every_worker(
    tmp_path, uninterrupted, free_addresses, shard, group
):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    found = open_checkpoints(RunFolder(run)).latest()
    groups = {name: found.arrays(name) for name in ("weights", "optimizer")}
    lacking = next(name for name in groups[group] if "/block_0/" in name)
    del groups[group][lacking]
    facts = {key: each for key, each in found.manifest.items() if key not in ("format", "step", "files", "sha256")}
    write_first(run / "checkpoints", found.step, groups, facts)
    split = f"distribution.shard={shard}"
    ends = [finish(start("resume", str(run), split, "distribution.logical_devices=2"))]
    ends += [finish(process) for process in two_workers(free_addresses(2), "resume", str(run), split)]
    for returncode, output in ends:
        assert returncode == 1, output
        assert f"UserError: {found.folder} does not hold this model: it lacks ['{lacking}'] and has nothing" in output


@pytest.mark.slow
def test_two_workers_begin_with_the_weights_of_another_run(tmp_path, uninterrupted, free_addresses):
    settings = settings_of(tmp_path, train__total_steps=8, tokenizer__kind="saved", tokenizer__path=str(uninterrupted))
    settings |= {"init": {"from": str(uninterrupted)}, "samples": {"samplers": ["greedy"]}}
    ends = [finish(process) for process in two_workers(free_addresses(2), "train", json.dumps(settings))]
    assert [returncode for returncode, _ in ends] == [0, 0], ends
    weights = {name: array for name, array in saved(uninterrupted, 40).items() if name.startswith("weights/")}
    assert_bit_identical(saved(tmp_path / "run", 0), weights)


def test_a_split_that_cannot_be_is_refused_and_leaves_nothing_behind(tmp_path):
    settings = settings_of(tmp_path) | {"distribution": {"kind": "cpu", "shard": "optimizer"}}
    with pytest.raises(trainer.UserError, match=r"distribution.shard='optimizer' splits over several .*; choose 'noth"):
        trainer.train(trainer.make_config(settings))
    settings["distribution"] = {"kind": "cpu", "shard": "weights", "logical_devices": 2}
    with pytest.raises(trainer.UserError, match=r"distribution.shard='weights' works only with trainer's own GPT"):
        trainer.train(trainer.make_config(settings), build_model=lambda config, vocabulary_size: None)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_all_of_them_saved(tmp_path, free_addresses):
    run = tmp_path / "run"
    # The save needs both workers' pieces.
    settings = settings_of(tmp_path, checkpoint__every_steps=1000) | {"distribution": {"shard": "weights"}}
    settings["samples"] = {"samplers": ["greedy"], "num_tokens": 1, "every_steps": 2}
    chief, other = two_workers(free_addresses(2), "train", json.dumps(settings), pause=0.4)
    while "step 4/" not in chief.stdout.readline():
        assert chief.poll() is None
    other.send_signal(signal.SIGTERM)
    for process in (chief, other):
        returncode, output = finish(process)
        assert returncode == 75, output
    folder = max((run / "checkpoints").iterdir())
    assert 4 <= int(folder.name.removeprefix("step_")) < 40


@pytest.mark.slow
def test_a_signal_to_one_worker_after_the_last_step_is_named_by_the_others_and_loses_nothing(tmp_path, free_addresses):
    workers, settings = free_addresses(2), json.dumps(settings_of(tmp_path, train__total_steps=8))
    chief, other = (
        start(
            "train",
            settings,
            tf_config={"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}},
            first=STOP_AFTER_THE_LAST_STEP if i == 1 else "",
        )
        for i in range(2)
    )
    assert finish(other)[0] == 75
    returncode, output = finish(chief)
    assert returncode == 1, output
    assert f"UserError: worker 1 ({workers[1]}) " in output
    assert f"trainer train --resume {tmp_path / 'run'}" in output
    assert (tmp_path / "run/checkpoints/step_000000008").is_dir()


@pytest.mark.slow
def test_workers_that_train_or_resume_start_then_go_on_and_a_difference_is_an_error_on_all(
    tmp_path, uninterrupted, free_addresses
):
    settings, run = settings_of(tmp_path), tmp_path / "run"
    processes = two_workers(free_addresses(2), "train or resume", json.dumps(settings), pause=0.4)
    wait_for(run / "checkpoints" / "step_000000020", processes[0])
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (run / "checkpoints" / "step_000000040").exists()

    settings["train"]["seed"] = 7
    for process in two_workers(free_addresses(2), "train or resume", json.dumps(settings)):
        returncode, output = finish(process)
        assert returncode == 1, output
        assert "holds a run that was started with other settings: train.seed=7 (was 0)" in output

    settings["train"]["seed"] = 0
    shutil.rmtree(tmp_path / "prepared")
    for process in two_workers(free_addresses(2), "train or resume", json.dumps(settings)):
        returncode, output = finish(process)
        assert returncode == 0, output
        assert "steps 0 to 40" not in output
    expected, found = saved(uninterrupted, 40), saved(run, 40)
    assert found["optimizer/batches_hash"] == expected["optimizer/batches_hash"]


@pytest.mark.slow
def test_train_or_resume_starts_then_goes_on_then_reports_the_result_again(tmp_path):
    lines = []
    settings = settings_of(tmp_path)
    # Made, and killed before the first checkpoint.
    config = trainer.make_config(settings)
    RunFolder.create(config, prepare(config, lines.append))
    result = launch.start(config, say=lines.append, or_resume=True)
    assert (result.step, "steps 0 to 40" in " ".join(lines)) == (40, True)

    run = Path(result.run_folder)
    shutil.rmtree(run / "checkpoints" / "step_000000040")
    shutil.rmtree(tmp_path / "prepared")
    lines.clear()
    # The cadence of today's config applies, not the one it was started with.
    config = trainer.make_config(settings_of(tmp_path, checkpoint__every_steps=5))
    again = launch.start(config, say=lines.append, or_resume=True)
    assert "steps 30 to 40" in " ".join(lines)
    assert (run / "checkpoints" / "step_000000035").is_dir()
    assert again.evaluation == result.evaluation
    finished = launch.start(config, say=lines.append, or_resume=True)
    assert (finished.step, finished.evaluation, finished.samples) == (40, result.evaluation, result.samples)
    with pytest.raises(trainer.UserError, match=r"train.seed=7 \(was 0\)"):
        launch.start(trainer.make_config(settings_of(tmp_path, train__seed=7)), say=lines.append, or_resume=True)


def test_a_checkpoint_without_a_count_of_skipped_steps_restores_0(tmp_path):
    config = trainer.make_config(settings_of(tmp_path))
    strategy = make_strategy(config.distribution)
    with strategy.scope():
        step = TrainingStep(config, 40, GPT(config.model, 13, config.train.sequence_length), strategy)
    arrays = {"weights": step.named_variables, "optimizer": step.state()}
    arrays = {group: {name: value.numpy() for name, value in values.items()} for group, values in arrays.items()}
    del arrays["optimizer"]["skipped_in_a_row"]
    step.skipped_in_a_row.assign(3)
    assert restore(step, SimpleNamespace(arrays=arrays.get, folder="older", step=7)) == 7
    assert (step.skipped_in_a_row.numpy(), step.step.numpy()) == (0, 7)


def test_a_fork_may_change_the_precision_and_gets_or_loses_the_loss_scale(tmp_path):
    def step_in(precision):
        config = trainer.make_config(settings_of(tmp_path, train__precision=precision))
        with strategy.scope():
            return TrainingStep(config, 40, GPT(config.model, 13, config.train.sequence_length), strategy)

    def arrays_of(step):
        groups = {"weights": step.named_variables, "optimizer": step.state()}
        return {group: {name: value.numpy() for name, value in values.items()} for group, values in groups.items()}

    strategy = make_strategy(trainer.make_config(settings_of(tmp_path)).distribution)
    single, half = step_in("float32"), step_in("mixed_float16")
    first_scale = half.loss_scale.value.numpy()
    single.optimizer.num_updates.assign(7)
    restore(half, SimpleNamespace(arrays=arrays_of(single).get, folder="parent", step=7))
    assert (half.loss_scale.value.numpy(), half.optimizer.num_updates.numpy()) == (first_scale, 7)
    single.optimizer.num_updates.assign(0)
    restore(single, SimpleNamespace(arrays=arrays_of(half).get, folder="parent", step=7))
    assert single.optimizer.num_updates.numpy() == 7


@pytest.mark.slow
def test_a_routine_overflow_does_not_stop_a_run(tmp_path, monkeypatch):
    # Doubled after each step, the scale overflows again and again, each time in a step with a report of its own.
    monkeypatch.setattr(LossScale, "STEPS_TO_DOUBLE", 1)
    settings = settings_of(
        tmp_path, train__precision="mixed_float16", train__total_steps=40, log__every_steps=1,
        checkpoint__every_steps=30, evaluation__every_steps=None, samples__every_steps=None,
    )  # fmt: skip
    result = trainer.train(trainer.make_config(settings), say=lambda _: None)
    assert result.step == 40
    events = EventAccumulator(str(tmp_path / "run/logs/train"), size_guidance={"tensors": 0}).Reload()
    skipped = {event.step for event in events.Tensors("health/skipped_steps") if tf.make_ndarray(event.tensor_proto)}
    assert len(skipped) > 3
    for tag in ("loss/nats_per_token", "loss/perplexity", "optimizer/grad_norm"):
        assert {event.step for event in events.Tensors(tag)} == {*range(1, 41)} - skipped
    # The count is kept with the rest, so that a resumed run goes on with it.
    assert saved(tmp_path / "run", 40)["optimizer/skipped_in_a_row"] == 0


def test_a_run_that_skips_all_steps_stops_before_it_is_saved(tmp_path):
    # A step of this size leaves weights whose logits overflow.
    settings = settings_of(
        tmp_path, optimizer__learning_rate=1e30, optimizer__warmup_steps=0, log__every_steps=40,
        evaluation__every_steps=None, samples__every_steps=None,
    )  # fmt: skip
    with pytest.raises(trainer.UserError, match=r"The last \d+ steps before step \d+ all had a loss or gradient that"):
        trainer.train(trainer.make_config(settings), say=lambda _: None)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name < "step_000000030"


def test_a_batch_that_the_workers_cannot_share_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "TF_CONFIG", json.dumps({"cluster": {"worker": ["a:1", "b:2", "c:3"]}, "task": {"type": "worker", "index": 1}})
    )
    with pytest.raises(trainer.UserError, match=r"train.global_batch_size=4 is not a multiple of \d+ replicas"):
        trainer.train(trainer.make_config(settings_of(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.slow
def test_a_batch_that_the_devices_cannot_share_leaves_nothing_behind(tmp_path):
    settings = settings_of(tmp_path) | {"distribution": {"kind": "cpu", "logical_devices": 3}}
    returncode, output = finish(start("train", json.dumps(settings)))
    assert returncode == 1
    assert "train.global_batch_size=4 is not a multiple of 3 replicas" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_worker_that_is_killed_stops_the_others_with_what_to_do(tmp_path, free_addresses):
    chief, other = two_workers(free_addresses(2), "train", json.dumps(settings_of(tmp_path)), pause=0.4)
    while "step 4/" not in chief.stdout.readline():
        assert chief.poll() is None
    other.send_signal(signal.SIGKILL)
    other.communicate()
    returncode, output = finish(chief)
    assert returncode == 1, output
    assert "UserError: worker 1 (127.0.0.1:" in output
    assert ") broke its connection" in output
    assert f"trainer train --resume {tmp_path / 'run'}" in output


@pytest.mark.slow
def test_workers_with_different_configs_refuse_to_start(tmp_path, free_addresses):
    workers = free_addresses(2)
    settings = [settings_of(tmp_path), settings_of(tmp_path, train__seed=7)]
    processes = [
        start(
            "train", json.dumps(one), tf_config={"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}}
        )
        for i, one in enumerate(settings)
    ]
    for process in processes:
        returncode, output = finish(process)
        assert returncode == 1, output
        assert "UserError: train.seed differs: worker 1" in output
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The config of a run that learned its text by heart, and what came of it."""
    settings = settings_of(
        tmp_path_factory.mktemp("trained"),
        model__dropout=0.0,
        train__total_steps=60,
        train__sequence_length=16,
        optimizer__learning_rate=0.03,
        checkpoint__every_steps=20,
        evaluation__every_steps=30,
        samples__every_steps=30,
    )
    del settings["samples"]["samplers"]  # All those that write by default.
    config = trainer.make_config(settings)
    return config, trainer.train(config, say=lambda _: None)


def test_run_leaves_all_that_is_needed_and_a_finished_run_reports_again(trained):
    config, result = trained
    run = Path(result.run_folder)
    assert (result.step, result.is_stopped) == (60, False)
    assert set(result.samples) == set(config.samples.samplers)
    assert {path.name for path in run.iterdir()} >= {"config.toml", "run.json", "tokenizer", "checkpoints", "logs"}
    # At step 30 it was scored, and was the best so far.
    assert open_checkpoints(RunFolder(run)).steps() == [20, 30, 40, 60]
    scores = read_scores(RunFolder(run))
    assert (
        set(scores) == {30, 60}
        and scores[60] == result.evaluation.loss
        and result.best_step == min(scores, key=scores.get)
    )
    logs = {path: path.stat().st_size for path in run.rglob("*tfevents*")}
    again = trainer.resume(str(run), say=lambda _: None)
    assert again.evaluation == result.evaluation
    assert {path: path.stat().st_size for path in run.rglob("*tfevents*")} == logs  # No point is added.
    assert (again.samples, again.best_step) == (result.samples, result.best_step)
    assert trainer.load_config(run / "config.toml") == config

    texts = trainer.generate(str(run), ["the ", "dog"], "greedy", num_tokens=3)
    assert [text[:4] for text in texts] == ["the ", "dog" + texts[1][3]]
    with pytest.raises(trainer.UserError, match="already holds a run"):
        trainer.train(config, say=lambda _: None)


def test_loss_falls_to_the_entropy_of_a_text_that_repeats(trained):
    # A pangram has few repeats, so after its first letters everything is certain.
    assert trained[1].evaluation.loss < 0.5


class Subclassed(keras.Model):
    def __init__(self, vocabulary_size):
        super().__init__()
        self.embedding = keras.layers.Embedding(vocabulary_size, 8)
        self.logits = keras.layers.Dense(vocabulary_size)

    def call(self, tokens):
        return self.logits(self.embedding(tokens))


def sequential(config, vocabulary_size):
    return keras.Sequential([keras.layers.Embedding(vocabulary_size, 8), keras.layers.Dense(vocabulary_size)])


def functional(config, vocabulary_size):
    tokens = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(vocabulary_size, 8)(tokens)
    return keras.Model(tokens, keras.layers.Dense(vocabulary_size)(embedded))


def subclassed(config, vocabulary_size):
    return Subclassed(vocabulary_size)


@pytest.mark.parametrize("build", [sequential, functional, subclassed])
def test_a_foreign_keras_model_of_any_style_trains_resumes_and_writes(tmp_path, build):
    settings = settings_of(tmp_path, model__dropout=0.0, evaluation__every_steps=None, samples__every_steps=None)
    config = trainer.make_config(settings | {"log": {"histograms_every_steps": 20}})
    said, said_again = [], []
    result = trainer.train(config, build, say=said.append)
    assert result.evaluation.loss < np.log(40)
    assert len(histogram_steps(Path(result.run_folder))) == 2 * len(result.model.trainable_variables)
    again = trainer.resume(result.run_folder, build, say=said_again.append)
    assert said[0].startswith("Devices: ") and said_again[0] == said[0]
    assert again.evaluation == result.evaluation
    assert trainer.generate(result.run_folder, "the ", "greedy", num_tokens=3, build_model=build)[0].startswith("the ")
    assert trainer.score(result.run_folder, build, say=lambda _: None) == result.evaluation
    with pytest.raises(trainer.UserError, match=r"trains a foreign model, which test_loop\.\w+ built, and not the GPT"):
        trainer.resume(result.run_folder, say=lambda _: None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda config, size: None, r"build_model returned None; return a Keras model\."),
        (
            lambda config, size: keras.Sequential([keras.layers.Embedding(size, 8)]),
            r"turns tokens \[batch, 8\] into \[None, 8, 8\]; it must return logits .*, here \[None, 8, 40\]\.",
        ),
        (
            lambda config, size: keras.Sequential([keras.layers.Embedding(size, size), keras.layers.Flatten()]),
            r"turns tokens \[batch, 8\] into \[None, 320\]",
        ),
    ],
)
def test_a_foreign_model_that_returns_no_logits_is_refused(build, message):
    train = {"precision": "float32", "total_steps": 1, "sequence_length": 8}
    config = trainer.make_config({"run_folder": "x", "train": train})
    with pytest.raises(trainer.UserError, match=message):
        make_model(build, config, vocabulary_size=40, bos_id=2)


def test_a_run_that_fails_before_its_first_step_leaves_its_folder_free(tmp_path):

    def build_wrongly(config, vocabulary_size):
        raise KeyError("a slip in a first draft")

    config = trainer.make_config(settings_of(tmp_path))
    with pytest.raises(KeyError, match="a slip in a first draft"):
        trainer.train(config, build_wrongly, say=lambda _: None)
    assert not Path(config.run_folder).exists()
    result = trainer.train(config, sequential, say=lambda _: None)
    # What is there goes on to be kept.
    with pytest.raises(KeyError, match="a slip in a first draft"):
        build_wrongly.__qualname__ = sequential.__qualname__
        trainer.resume(result.run_folder, build_wrongly, say=lambda _: None)
    assert trainer.resume(result.run_folder, sequential, say=lambda _: None).step == result.step


class Greedy(Subclassed):
    """Asks for more memory than there is, in each step."""

    def call(self, tokens):
        return super().call(tokens) + tf.reduce_max(tf.tile(tf.cast(tokens, tf.float32), [1, 1 << 40]))


@pytest.mark.slow
def test_a_step_that_does_not_fit_the_memory_is_an_error_with_advice(tmp_path):
    settings = settings_of(tmp_path)
    with pytest.raises(trainer.UserError, match=r"does not fit the device's memory with train\.micro_batch_size=") as e:
        trainer.train(trainer.make_config(settings), lambda config, size: Greedy(size), say=lambda _: None)
    *_, advice = str(e.value).partition("trainer train --resume ")
    folder, override = advice.split()
    assert RunFolder(folder, [override]).config.train.micro_batch_size == "auto"


def profiled_steps(run):
    """The steps in each profile of a run."""
    found = []
    for file in sorted((Path(run) / "logs").rglob("*.xplane.pb")):
        space = xplane_pb2.XSpace.FromString(file.read_bytes())
        steps = []
        for plane in space.planes:
            (step_num,) = [key for key, stat in plane.stat_metadata.items() if stat.name == "step_num"] or [None]
            for event in (event for line in plane.lines for event in line.events):
                if plane.event_metadata[event.metadata_id].name == "train":
                    steps += [
                        stat.int64_value or stat.uint64_value for stat in event.stats if stat.metadata_id == step_num
                    ]
        found.append(sorted(steps))
    return found


def histogram_steps(run):
    """The steps of each histogram, by its tag."""
    events = EventAccumulator(str(run / "logs/train"), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith(("weights/", "weight_gradients/"))]
    return {tag: tuple(event.step for event in events.Tensors(tag)) for tag in tags}


def settings_to_profile(tmp_path, name="run", **profile):
    short = {"samples__num_tokens": 2, "train__total_steps": 14, "checkpoint__every_steps": 4}
    return settings_of(tmp_path, name, **short) | {"profile": profile}


@pytest.mark.slow
def test_a_profile_has_the_steps_of_its_settings_and_with_histograms_changes_nothing(tmp_path):
    plain, run = (
        Path(trainer.train(trainer.make_config(settings), say=lambda _: None).run_folder)
        for settings in (
            settings_to_profile(tmp_path, "plain"),
            settings_to_profile(tmp_path, at_step=7, num_steps=3) | {"log": {"histograms_every_steps": 5}},
        )
    )
    assert_bit_identical(saved(run, 14), saved(plain, 14))
    assert set(histogram_steps(run).values()) == {(5, 10)} and not histogram_steps(plain)
    assert profiled_steps(run) == [[8, 9, 10]]
    assert profiled_steps(plain) == []


@pytest.mark.slow
def test_a_resumed_run_makes_the_profile_that_is_ahead_of_it_and_no_other(tmp_path):
    settings = settings_to_profile(tmp_path, at_step=7, num_steps=3)
    run = Path(trainer.train(trainer.make_config(settings), say=lambda _: None).run_folder)
    whole = saved(run, 14)

    def profiles_from(step, *overrides):
        for folder in (run / "checkpoints").iterdir():
            if folder.name > f"step_{step:09d}":
                shutil.rmtree(folder)
        shutil.rmtree(run / "logs")
        trainer.resume(str(run), say=lambda _: None, overrides=overrides)
        assert_bit_identical(saved(run, 14), whole)
        return profiled_steps(run)

    assert profiles_from(8) == []
    assert profiles_from(4) == [[8, 9, 10]]
    assert profiles_from(12, "profile.at_step=12", "profile.num_steps=2") == [[13, 14]]


def test_a_run_that_only_skips_steps_stops_with_advice(tmp_path):
    settings = settings_of(tmp_path, optimizer__learning_rate=1e30, optimizer__warmup_steps=0)
    with pytest.raises(trainer.UserError, match=r"Lower optimizer.learning_rate"):
        trainer.train(trainer.make_config(settings), say=lambda _: None)


def test_cadences_meet_at_their_multiples():
    assert [is_due(step, 3) for step in range(7)] == [False, False, False, True, False, False, True]
    assert not is_due(3, None)
    assert steps_until_due(0, (100,), (10, None, 4)) == 4
    assert steps_until_due(4, (100,), (10, None, 4)) == 4
    assert steps_until_due(8, (100,), (10, None, 4)) == 2
    assert steps_until_due(99, (100,), (10, None, 4)) == 1
    assert [steps_until_due(step, (100, 6, 7), (50, None)) for step in (0, 5, 6, 7, 98)] == [6, 1, 1, 43, 2]


@pytest.mark.slow
@pytest.mark.parametrize("data", [{}, {"mode": "lines"}])
def test_models_of_short_documents_write_their_ends(tmp_path, data):
    names = [one + two for one in ("ka", "mi", "lo", "an", "er") for two in ("ra", "na", "li", "so")]
    (tmp_path / "text.txt").write_text("\n".join(names * 20) + "\n")
    settings = settings_of(tmp_path, train__total_steps=150, train__sequence_length=16, train__global_batch_size=16)
    settings["data"] = {key: settings["data"][key] for key in ("train", "prepared_folder")} | data
    settings["data"]["validation"] = settings["data"]["train"]
    settings["model"] |= {"dropout": 0.0, "hidden_dim": 32, "pre_norm": True}
    settings["samples"] = {}  # Up to the model's last position.
    settings["optimizer"] = {"learning_rate": 0.01}
    run = trainer.train(trainer.make_config(settings), say=lambda _: None)
    written = trainer.generate(run.run_folder, "", "top-k", k=5, num_samples=20)
    assert {len(name) for name in written} == {4}
    assert len(set(written) & set(names)) > 0.8 * len(set(written))


@pytest.fixture
def copy_of_trained(trained, tmp_path):
    """A run of 60 steps, scored after 30 and 60 of them, which may be changed."""
    return shutil.copytree(trained[1].run_folder, tmp_path / "run")


def test_a_score_that_a_killed_process_did_not_keep_is_computed_again(copy_of_trained):
    run = RunFolder(copy_of_trained)
    scores = read_scores(run)
    for step in (40, 60):
        shutil.rmtree(run.path / "checkpoints" / f"step_0000000{step}")
    write_scores(run, {60: 0.0})  # After the checkpoint; it is scored anew.
    lines = []
    result = trainer.resume(str(run.path), say=lines.append)
    assert read_scores(RunFolder(run.path)) == scores
    assert result.best_step == 60 and "steps 30 to 60" in " ".join(lines)


def test_a_run_goes_on_from_the_step_that_is_given(copy_of_trained, capsys):
    lines = []
    result = trainer.resume(f"{copy_of_trained}/checkpoints/step_000000020", say=lines.append)
    assert "steps 20 to 60" in " ".join(lines) and result.step == 60
    assert trainer.score(str(copy_of_trained), step=60) == result.evaluation
    assert f"step 60: {result.evaluation}" in capsys.readouterr().out
    early, late = (trainer.score(str(copy_of_trained), step=step, say=lines.append).loss for step in (20, "best"))
    assert early > late == result.evaluation.loss
    texts = {
        step: trainer.generate(str(copy_of_trained), "the ", "greedy", num_tokens=9, step=step) for step in (20, 60)
    }
    assert texts[20] != texts[60]
    assert (
        trainer.generate(f"{copy_of_trained}/checkpoints/step_000000020", "the ", "greedy", num_tokens=9) == texts[20]
    )


def test_a_signal_while_the_last_checkpoint_is_written_stops_the_run(copy_of_trained, monkeypatch):
    shutil.rmtree(copy_of_trained / "checkpoints" / "step_000000060")
    wait, lines = checkpoint.Checkpoints.wait, []

    def wait_and_be_stopped(checkpoints):
        monkeypatch.setattr(checkpoint.Checkpoints, "wait", wait)
        os.kill(os.getpid(), signal.SIGTERM)
        while not any("SIGTERM: saving" in line for line in lines):
            time.sleep(0.01)
        checkpoints.wait()

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", wait_and_be_stopped)
    result = trainer.resume(str(copy_of_trained), say=lines.append)
    assert result.is_stopped and result.step == 60 and result.evaluation is None
    assert "Stopped at step 60 of 60, saved." in lines[-1]
    assert open_checkpoints(RunFolder(copy_of_trained)).steps()[-1] == 60


def test_a_skipped_checkpoint_is_reported_once_and_not_on_standard_output(copy_of_trained, capsys):
    weights = copy_of_trained / "checkpoints/step_000000060/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    facts = launch.contents(RunFolder(copy_of_trained), None)
    assert facts[f"the checkpoint to go on from in {copy_of_trained}"] != "none"
    assert capsys.readouterr() == ("", "")  # `train`, which comes next, prints it.
    for words in (["generate", "--sampler", "greedy", "--num-tokens", "2"], ["evaluate", "distribution.kind=cpu"]):
        assert main([words[0], str(copy_of_trained), *words[1:]]) == 0
        out, err = capsys.readouterr()
        assert "Skipping" not in out and err.count(f"Skipping {weights.parent}: ") == 1


def test_workers_that_read_different_records_or_checkpoints_of_a_run_differ(copy_of_trained):
    run, later = RunFolder(copy_of_trained), RunFolder(copy_of_trained)
    assert launch.contents(run, None) == launch.contents(later, None)
    assert launch.contents(run, None) != launch.contents(run, 20)
    later.record(first_batch="another")
    assert launch.contents(run, None) != launch.contents(later, None) == launch.contents(RunFolder(run.path), None)


def test_a_run_that_went_on_from_an_earlier_step_keeps_the_scores_of_later_checkpoints(copy_of_trained):
    scores = read_scores(RunFolder(copy_of_trained))
    lines = []

    def stop_after_the_score(line):
        lines.append(line)
        if "step 32/" in line and "loss" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    result = trainer.resume(str(copy_of_trained), say=stop_after_the_score, step=20)
    assert result.is_stopped and 32 <= result.step < 60
    # Saved though a later step is known to be better: it is the best of those that this process has come to.
    assert not any("has risen above" in line for line in lines)
    assert read_scores(RunFolder(copy_of_trained)) == scores
    assert open_checkpoints(RunFolder(copy_of_trained)).best_step() == result.best_step == min(scores, key=scores.get)
    # The newest is of the process before.
    assert lines[-1].endswith(f" Go on with: trainer train --resume {copy_of_trained} --step {result.step}")


def test_a_validation_loss_that_rises_is_reported_with_the_best_step(copy_of_trained):
    run = RunFolder(copy_of_trained)
    lines = []
    scores = {10: 2.5}
    assert [
        results.record_score(run, Workers(), step, loss, scores, lines.append)
        for step, loss in ((20, 2.0), (30, 2.125), (40, 2.0), (50, float("nan")), (60, 1.0))
    ] == [True, False, False, False, True]
    assert len(lines) == 2 and lines[0] == (
        "step 30: the validation loss has risen above its best, 2.0000 at step 20. That checkpoint is kept: trainer "
        f"generate {run.path} --step best"
    )
    assert read_scores(run) == scores == {10: 2.5, 20: 2.0, 30: 2.125, 40: 2.0, 60: 1.0}


@pytest.mark.usefixtures("short_retries")
def test_max_failures_stops_a_run_whose_checkpoints_cannot_be_written(copy_of_trained):
    shutil.rmtree(copy_of_trained / "checkpoints" / "step_000000060")
    lines = []

    obstacle = copy_of_trained / "checkpoints" / ".partial"

    def put_something_in_the_way(line):
        lines.append(line)
        if "steps 40 to 60" in line:
            obstacle.write_text("in the way")

    overrides = ["checkpoint.every_steps=1", "train.steps_per_call=1", "checkpoint.max_failures=2"]
    with pytest.raises(
        trainer.UserError, match=r"Cannot write the checkpoint .* failure 2 in a row and checkpoint\.max"
    ):
        trainer.resume(str(copy_of_trained), say=put_something_in_the_way, overrides=overrides)
    assert not (copy_of_trained / "lock").exists()
    assert open_checkpoints(RunFolder(copy_of_trained)).steps()[-1] == 40

    # Without that setting it trains on, reports each failure, and saves again once that is possible.
    def clear_the_way_after_a_while(line):
        lines.append(line)
        if sum("Cannot write the checkpoint" in each for each in lines) == 3 and obstacle.is_file():
            obstacle.unlink()

    lines.clear()
    result = trainer.resume(str(copy_of_trained), say=clear_the_way_after_a_while, overrides=overrides[:2])
    assert result.step == open_checkpoints(RunFolder(copy_of_trained)).steps()[-1] == 60


@pytest.fixture
def short_retries(monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECS", (0.01,))
    monkeypatch.setattr(checkpoint, "LAST_RETRY_SECS", 0.01)


def test_a_changed_text_is_reported_when_a_run_goes_on_without_it(trained, tmp_path):
    config, result = trained
    text = Path(config.data.train[0])
    whole = text.read_text()
    try:
        for content, is_reported in ((whole, False), (whole + "more\n", True), (None, True)):
            text.write_text(content) if content else text.unlink()
            lines = []
            assert launch.start(config, say=lines.append, or_resume=True).evaluation == result.evaluation
            found = [line for line in lines if "the run goes on with the text as it was prepared then, in" in line]
            assert len(found) == is_reported, lines
        assert "cannot be compared" in found[0]
    finally:
        text.write_text(whole)
