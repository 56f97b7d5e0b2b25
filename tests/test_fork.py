"""Laws of forks: a fork that changes nothing is its parent, and what changes is written down."""

import html
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import quiet, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path
from tiny_run import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    assert_same_bits,
    damage_one_bit,
    saved,
    text_run,
)

import trainer
from trainer.cli import main
from trainer.config.file import differing_settings, load_config, make_config
from trainer.config.settings import Config, examples_per_replica
from trainer.data.batches import total_steps, training_batches
from trainer.errors import UserError
from trainer.exchange.starting_weights import read_beginning
from trainer.runs.fork import Fork, check_batch_warmup, place_in_data, plan_fork
from trainer.runs.run_checkpoints import open_checkpoints
from trainer.runs.run_data import find_prepared
from trainer.runs.run_folder import RunFolder
from trainer.runs.run_lock import only_run_in
from trainer.system.storage import copy_folder, locate


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of three steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("parent")
    trainer.train(text_run(folder, "parent"), say=quiet)
    return RunFolder(folder / "parent")


def in_new_process(code: str, *arguments: object) -> None:
    """Runs code that trains: a process can train only once on several devices."""
    first = "import sys, tomllib, trainer\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", first + code, *map(str, arguments)], env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "more_steps"), [(1, 40), (2, 20)])
def test_a_fork_that_changes_nothing_ends_with_the_parent_s_bits(tmp_path: Path, replicas: int, more_steps: int):
    last = 10 + more_steps
    config = text_run(
        tmp_path,
        "parent",
        f"train.total_steps={last}",
        "model.dropout=0.1",
        "optimizer.schedule=cosine",
        "train.micro_batch_size=2",
        "checkpoint.every_steps=10",
        f"distribution.logical_devices={replicas}",
    )
    fork = tmp_path / "fork"
    in_new_process("trainer.train(trainer.make_config(tomllib.loads(sys.argv[1])))", config.to_toml())
    in_new_process(f"trainer.fork(sys.argv[1], ['run_folder={fork}'])", f"{config.run_folder}@10")
    assert_same_bits(saved(fork, last), saved(config.run_folder, last))


def test_what_a_fork_comes_from_is_in_its_record_in_tensorboard_and_in_inspect(
    parent: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one, two = tmp_path / "one", tmp_path / "two"
    rate = "optimizer.learning_rate=0.02"
    with only_run_in(parent.path):  # Another process trains in it.
        trainer.fork(f"{parent.path}@2", [f"run_folder={one}", rate], say=quiet)
    assert trainer.fork(str(one), [f"run_folder={two}", "train.total_steps=4"], say=quiet).step == 4
    facts = RunFolder(two).facts
    assert [each["from"] for each in facts["parents"]] == [str(one), str(parent.path)]
    assert [each["step"] for each in facts["parents"]] == [3, 2]
    assert facts["parents"][1]["changed"] == ["optimizer.learning_rate=0.02 (was 0.01)"]
    manifest = open_checkpoints(parent).of_step(2).manifest
    assert facts["parents"][1]["weights_sha256"] == manifest["files"]["weights.safetensors"]["sha256"]
    shutil.rmtree(one)  # A parent that is gone is no error.
    capsys.readouterr()
    assert main(["inspect", str(two), "--examples", "0"]) == 0
    lines = "".join(capsys.readouterr().out.split())  # The lines are wrapped, where depends on the folder's name.
    assert f"forkedfrom{one},step3,weights" in lines and "train.total_steps=4(was3)" in lines
    assert lines.index(str(one)) < lines.index(f"forkedfrom{parent.path},step2")
    events = EventAccumulator(f"{two}/logs/train")
    events.Reload()
    assert [event.step for event in events.Tensors("loss/nats_per_token")] == [4]  # The curve begins after the fork.
    text = tf.make_ndarray(events.Tensors("text/history")[0].tensor_proto).item()
    assert f"forked from {parent.path}, step 2" in html.unescape(text.decode())


def test_runs_in_an_object_store_are_forked_and_begun_with(
    parent: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert isinstance(parent.path, Path)
    store = f"ram://{secrets.token_hex(4)}"
    copy_folder(parent.path, locate(f"{store}/parent"))
    result = trainer.fork(f"{store}/parent@2", [f"run_folder={store}/fork"], say=quiet)
    assert result.step == 3
    run = RunFolder(f"{store}/fork")
    assert run.facts["parents"][0]["from"] == f"{store}/parent"
    assert_same_bits(saved(run.path, 3), saved(parent.path, 3))
    assert {entry.name for entry in locate(run.path).iterdir()} >= {"run.json", "config.toml", "checkpoints"}
    assert not (run.path / "begun").is_file()
    child = text_run(parent.path.parent, "unused", f"init.from={store}/parent@1")
    beginning = read_beginning(child, is_foreign=False, say=quiet)
    assert beginning is not None and beginning.parents[0]["step"] == 1


def planned(parent: RunFolder, *overrides: str) -> Fork:
    return plan_fork(str(parent.path), [f"run_folder={parent.path}-fork", *overrides])


def place(fork: Fork, step: int = 3) -> int:
    return place_in_data(fork, find_prepared(fork.parent), step)[0] + step * fork.config.train.global_batch_size


def test_the_place_in_the_data_is_the_parent_s_with_another_batch_size_too(parent: RunFolder):
    longer = "train.total_steps=9"
    assert place(planned(parent, longer)) == 12
    fork = planned(parent, longer, "train.global_batch_size=2")
    assert place(fork) == 12
    prepared = find_prepared(parent)
    offset, line = place_in_data(fork, prepared, 3)
    assert offset == 12 - 3 * 2 and line == "The fork's batches go on where the parent's ended, at example 12."
    of_parent = next(iter(training_batches(prepared, parent.config, 3, 4)))
    halves = list(training_batches(prepared, fork.config, 3, 5, data_offset=offset))
    for parts, whole in zip(zip(*halves, strict=True), of_parent, strict=True):
        tf.debugging.assert_equal(tf.concat(parts, axis=0), whole)


@pytest.mark.parametrize("override", ["train.seed=1", "data.shuffle_window_mb=1", "data.mode=lines"])
def test_another_order_begins_at_its_beginning(parent: RunFolder, override: str):
    fork = planned(parent, "train.total_steps=9", override)
    assert fork.keeps_data and place(fork) == 0
    key = override.partition("=")[0]
    assert place_in_data(fork, find_prepared(parent), 3)[1] == (
        f"The fork reads the text from the beginning, because of {key}."
    )


@pytest.mark.parametrize(
    ("before", "overrides", "line"),
    [
        ({}, ["data.weights_from_step.500=[1,1]"], "go on where the parent's ended, at example 1,600."),
        ({"50": [0, 1]}, ["data.weights_from_step.500=[1,1]"], "go on where the parent's ended, at example 1,600."),
        ({"700": [0, 1]}, ["data.weights_from_step=none"], "go on where the parent's ended, at example 1,600."),
        # Example 1,600 is in the turn that ends with example 2,047.
        ({}, ["data.weights_from_step.512=[1,1]"], "go on where the parent's ended, at example 1,600."),
        ({}, ["data.weights_from_step.511=[1,1]"], "begin among the 1,024 examples that the parent was mixing"),
        ({}, ["data.weights_from_step.400=[1,1]"], "begin among the 1,024 examples that the parent was mixing"),
        ({}, ["data.weights_from_step.399=[1,1]"], "from the beginning, because of data.weights_from_step."),
        ({"50": [0, 1]}, ["data.weights_from_step=none"], "from the beginning, because of data.weights_from_step."),
        ({"50": [0, 1]}, ["train.global_batch_size=2"], "from the beginning, because of train.global_batch_size."),
        ({}, ["train.global_batch_size=2"], "go on where the parent's ended, at example 1,600."),
    ],
)
def test_weights_from_a_later_step_keep_the_place_in_the_data(
    before: dict[str, list[int]], overrides: list[str], line: str
):
    data = {"train": ["a", "b"], "weights": [3, 1], "weights_from_step": before}
    train = {"precision": "float32", "total_steps": 900, "global_batch_size": 4}
    recorded = make_config({"run_folder": "parent", "data": data, "train": train})
    fork = fork_of(recorded, *overrides)
    if "500" in overrides[0]:
        assert len(fork.changed) == 1 and fork.changed[0].startswith("data.weights_from_step=")
    offset, found = place_in_data(fork, SimpleNamespace(fingerprint="f"), 400)  # type: ignore[arg-type]
    assert line in found
    at = 0 if "beginning" in found else 1600
    assert offset == at - 400 * fork.config.train.global_batch_size


def test_a_batch_warm_up_that_ends_before_the_fork_begins_is_refused(parent: RunFolder):
    longer, beginning = "train.total_steps=9", f"{parent.path}@3"
    for overrides in (["train.batch_warmup.3=2"], ["train.batch_warmup.2=1", "train.batch_warmup.5=2"]):
        with pytest.raises(UserError, match=rf"^train.{overrides[0][6:]} has no effect: the fork begins at step 3 of "):
            plan_fork(beginning, [f"run_folder={parent.path}-fork", longer, *overrides])
    with pytest.raises(UserError, match=r"^train.batch_warmup.1=2 has no effect: the fork begins at step \d of "):
        trainer.fork(f"{parent.path}@best", [f"run_folder={parent.path}-fork", "train.batch_warmup.1=2"], say=quiet)
    assert not Path(f"{parent.path}-fork").exists()
    for later in (["train.batch_warmup.4=2"], ["train.batch_warmup=none"]):
        assert planned(parent, longer, *later).step is None


def fork_of(recorded: Config, *overrides: str) -> Fork:
    config = make_config(recorded.model_dump(mode="json", exclude_none=True), overrides)
    parent = SimpleNamespace(recorded=recorded, data_offset=0, facts={"data_fingerprint": "f"}, path=Path("parent"))
    changed = tuple(differing_settings(config, recorded))
    return Fork(parent, None, config, changed, keeps_data=True)  # type: ignore[arg-type]


def test_sizes_of_a_parent_s_warm_up_stay_or_are_left_out_but_do_not_change_once_it_is_over():
    train = {"precision": "float32", "total_steps": 900, "global_batch_size": 8, "batch_warmup": {100: 2, 300: 4}}
    recorded = make_config({"run_folder": "parent", "train": train})
    for overrides in ([], ["train.batch_warmup.500=6"], ["train.batch_warmup.100=none"], ["train.batch_warmup=none"]):
        check_batch_warmup(fork_of(recorded, *overrides), 300)
    check_batch_warmup(fork_of(recorded, "train.batch_warmup.300=6"), 299)
    with pytest.raises(UserError, match=r"^train.batch_warmup.300=6 has no effect"):
        check_batch_warmup(fork_of(recorded, "train.batch_warmup.300=6"), 300)
    fork = fork_of(recorded, "train.batch_warmup=none")
    examples_per_replica(fork.config, 8)
    offset, _ = place_in_data(fork, SimpleNamespace(fingerprint="f"), 400)
    assert offset + 400 * 8 == 100 * 2 + 200 * 4 + 100 * 8


def test_epochs_count_from_the_place_where_the_data_begin(parent: RunFolder):
    prepared = find_prepared(parent)
    fork = planned(parent, "train.num_epochs=2", "train.seed=1")
    alone = total_steps(prepared, fork.config)
    assert total_steps(prepared, fork.config, place_in_data(fork, prepared, 3)[0]) == 3 + alone


def test_another_text_is_read_from_its_beginning_with_the_parent_s_tokenizer(parent: RunFolder, tmp_path: Path):
    (tmp_path / "b.txt").write_text("that hat is on a hot mat\n" * 60, encoding="utf-8")
    fork = tmp_path / "fork"
    said: list[str] = []
    overrides = [f"run_folder={fork}", f"data.train={tmp_path}/b.txt", "train.num_epochs=1"]
    result = trainer.fork(str(parent.path), overrides, say=said.append)
    assert f"A fork of {parent.path}, step 3. The fork reads its own text from the beginning." in said
    run = RunFolder(fork)
    assert run.facts["tokenizer_fingerprint"] == parent.facts["tokenizer_fingerprint"]
    prepared = find_prepared(run)
    assert prepared.source_fingerprint != find_prepared(parent).source_fingerprint
    assert result.step == 3 + total_steps(prepared, run.config) == total_steps(prepared, run.config, run.data_offset)
    # A resumed fork finds its place again.
    assert trainer.resume(str(fork), say=quiet, step=40).step == result.step


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.hidden_dim=16"],
            r"^model.hidden_dim=16 \(was 8\): this changes gpt/token_embedding/embeddings from \[1, 8\] to",
        ),
        (["model.num_layers=2"], r"gpt/block_1/.* from none to .* or begin a new run"),
        (
            ["train.sequence_length=4"],
            r"train.sequence_length=4 \(was 8\): this changes gpt/position_embedding/embeddings from",
        ),
        (
            ["train.precision=float64"],
            r"train.precision='float64' \(was 'float32'\): weights and optimizer have another",
        ),
        (
            ["optimizer.kind=muon"],
            r"optimizer.kind='muon' \(was 'adamw'\): a fork keeps the state of the optimizer, and the other one has",
        ),
        (
            ["tokenizer.kind=byte"],
            r"^tokenizer.kind cannot change in a fork, which keeps the weights and the tokenizer",
        ),
        (["init.from=x"], r"^init.from cannot change in a fork"),
        (
            [],
            r"^The fork begins at step 3 of .*, and its train.total_steps=3 leaves it no step to take; give more, ",
        ),
        (["run_folder=none"], r"^run_folder is missing"),
        (["train.total_stepz=9"], r"^train.total_stepz is not a setting\. Did you mean train.total_steps\?"),
    ],
)
def test_what_cannot_change_is_refused(parent: RunFolder, overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        trainer.fork(str(parent.path), [f"run_folder={parent.path}-fork", *overrides], say=quiet)
    assert not Path(f"{parent.path}-fork").exists()


def test_a_fork_has_a_folder_of_its_own(parent: RunFolder, tmp_path: Path):
    with pytest.raises(UserError, match=r"^A fork needs a folder of its own; add run_folder=\S+/parent-2$"):
        trainer.fork(str(parent.path), [], say=quiet)
    with pytest.raises(UserError, match=r"is the run that is to be forked; choose another folder, such as run_folder="):
        trainer.fork(str(parent.path), [f"run_folder={parent.path}"], say=quiet)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there already and is not a run"):
        trainer.fork(str(parent.path), [f"run_folder={tmp_path}/taken", "train.total_steps=9"], say=quiet)


def test_a_parent_or_checkpoint_that_is_missing_or_damaged_is_named(parent: RunFolder, tmp_path: Path):
    overrides = [f"run_folder={tmp_path}/fork", "train.total_steps=9"]
    with pytest.raises(UserError, match=r"/nothing is not a run folder"):
        trainer.fork(f"{tmp_path}/nothing", overrides, say=quiet)
    with pytest.raises(UserError, match=r"has no checkpoint of step 7; it has: 1, 2, 3\."):
        trainer.fork(f"{parent.path}@7", overrides, say=quiet)
    shutil.copytree(str(parent.path), tmp_path / "damaged")
    damage_one_bit(tmp_path / "damaged/checkpoints/step_000000002/optimizer.safetensors")
    with pytest.raises(UserError, match=r"step 2 cannot be used: .*optimizer.safetensors is damaged"):
        trainer.fork(f"{tmp_path}/damaged@2", overrides, say=quiet)
    assert not (tmp_path / "fork").exists()


def test_a_fork_of_a_foreign_model_needs_its_function(tmp_path: Path):
    def build_model(config: object, vocabulary_size: int) -> object:
        raise AssertionError("not called")

    config = text_run(tmp_path, "foreign", "train.total_steps=9")
    RunFolder.create(config, tiny_prepared(config), build_model)
    with pytest.raises(UserError, match=r"trains a foreign model, which .*build_model built, and not the GPT"):
        trainer.fork(config.run_folder, [f"run_folder={tmp_path}/fork"], say=quiet)
    assert not (tmp_path / "fork").exists()


def test_the_tokenizer_of_a_fork_is_the_parent_s_own_copy(parent: RunFolder, tmp_path: Path):
    fork = planned(parent, "data.train=storybook", "data.documents=none", "train.total_steps=9")
    assert fork.config.tokenizer.model_dump() == {"kind": "saved", "path": str(parent.path)}
    assert planned(parent, "train.total_steps=9").config.tokenizer == parent.config.tokenizer


def test_the_command_checks_before_tensorflow_and_the_commands_that_refusals_show_work(
    parent: RunFolder, capsys: pytest.CaptureFixture[str]
):
    assert main(["fork", str(parent.path)]) == 2
    words = shlex.split(capsys.readouterr().err.rpartition("add ")[2])
    assert plan_fork(str(parent.path), [*words, "train.total_steps=9"]).config.run_folder == f"{parent.path}-2"
    for override in ("optimizer.learning_rate=0.5", "data.train=storybook", "model.dropout=0.5"):
        assert main(["train", "--resume", str(parent.path), override]) == 2
        command, shown, *words = shlex.split(capsys.readouterr().err.rpartition("For this, fork the run: trainer ")[2])
        assert plan_fork(shown, [*words, "train.total_steps=9"]).changed and command == "fork"
    for override in ("model.num_layers=3", "tokenizer.kind=byte"):
        assert main(["train", "--resume", str(parent.path), override]) == 2
        words = shlex.split(capsys.readouterr().err.rpartition("For this, start a new run: trainer train ")[2])
        assert load_config(words[0], words[1:]).run_folder == f"{parent.path}-2" and words[-1] == override
    assert main(["fork", f"{parent.path}@7", f"run_folder={parent.path}-2"]) == 2
    assert "has no checkpoint of step 7; it has: 1, 2, 3." in capsys.readouterr().err
    assert main(["fork", str(parent.path), f"run_folder={parent.path}-2"]) == 2
    assert "leaves it no step to take; give more, such as train.total_steps=6" in capsys.readouterr().err
