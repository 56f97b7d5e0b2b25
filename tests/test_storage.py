"""Laws of runs and data in an object store; ram:// stands in for one."""

import getpass
import os
import secrets
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

import trainer
from trainer.data.batches import evaluation_batches, training_batches
from trainer.data.prepare import fetch, prepare
from trainer.errors import UserError
from trainer.runs.run_checkpoints import load_model
from trainer.runs.run_folder import RunFolder
from trainer.system.folder_checks import Need, check_writing
from trainer.system.storage import Url, copy_folder, locate, on_disk, place_on_disk, remove_folder


def quiet(_):
    pass


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A bucket of its own, and a disk of its own for the copies."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return f"ram://{secrets.token_hex(4)}"


def config_in(store, *overrides):
    train = {"total_steps": 4, "sequence_length": 16, "global_batch_size": 4}
    return tiny_config(store, *overrides, data={"storybook_stories": 60}, train=train, samples={"num_tokens": 2})


def all_batches(dataset):
    return [[part.numpy() for part in batch] for batch in dataset]


def test_a_location_is_a_path_or_a_url():
    assert locate("runs/a") == Path("runs/a")
    url = locate("gs://bucket/runs/")
    assert isinstance(url, Url)
    assert (str(url), url.name, str(url / "a")) == ("gs://bucket/runs", "runs", "gs://bucket/runs/a")
    assert locate(url) is url


def test_a_folder_is_copied_to_a_store_and_back_byte_for_byte(store, tmp_path):
    (tmp_path / "a/deep").mkdir(parents=True)
    (tmp_path / "a/bytes").write_bytes(bytes(range(256)))
    (tmp_path / "a/deep/text").write_text("한국어")
    folder = locate(f"{store}/copy")
    copy_folder(tmp_path / "a", folder)
    assert [entry.name for entry in folder.iterdir()] == ["bytes", "deep"]
    assert folder.is_dir() and not folder.is_file() and (folder / "bytes").is_file()
    assert (folder / "bytes").read_bytes(200) == bytes(range(200, 256))
    with on_disk(folder) as copy:
        assert (copy / "bytes").read_bytes() == bytes(range(256))
        assert (copy / "deep/text").read_text() == (folder / "deep" / "text").read_text() == "한국어"
    remove_folder(folder)
    assert not folder.is_dir()


def test_a_missing_file_and_an_unknown_store_are_errors_that_name_the_url(store):
    with pytest.raises(FileNotFoundError, match=r"nothing"):
        locate(f"{store}/nothing").read_text()
    for url in ("nosuch://bucket/a", "http://127.0.0.1/a.txt", "s3://bucket/a"):
        with pytest.raises(
            UserError, match=rf"{url}: the object store failed: .* cannot read this kind of URL here; name a"
        ):
            locate(url).read_text()
        with pytest.raises(UserError, match=rf"{url}: the object store failed: .* name a copy on a disk or on gs://"):
            locate(url).is_dir()


def test_data_prepared_in_a_store_is_read_from_a_copy_on_the_disk(store, tmp_path):
    said = []
    prepared = prepare(config_in(store), said.append)
    on_a_disk = prepare(config_in(store, f"data.prepared_folder={tmp_path / 'prepared'}"), quiet)
    assert prepared.stored_in == f"{store}/prepared/{on_a_disk.folder.name}"
    assert prepared.fingerprint == on_a_disk.fingerprint
    assert prepared.folder == place_on_disk(locate(prepared.stored_in))
    assert said[-1].startswith(f"{prepared.stored_in}: prepared, and on this host's disk as {prepared.folder}; ")
    for make in (
        lambda data: training_batches(data, config_in(store), 1, 4),
        lambda data: evaluation_batches(data, config_in(store)),
    ):
        np.testing.assert_equal(all_batches(make(prepared)), all_batches(make(on_a_disk)))


def test_a_host_without_a_copy_gets_one(store):
    prepared = prepare(config_in(store), quiet)
    shutil.rmtree(prepared.folder)
    assert prepare(config_in(store), quiet) == prepared == fetch(locate(prepared.stored_in))


def test_copies_of_a_store_s_data_can_be_read_by_their_owner_only(store, tmp_path):
    prepared = prepare(config_in(store), quiet)
    home = tmp_path / f"trainer-{getpass.getuser()}"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert home in prepared.folder.parents
    # An earlier version let others read it.
    home.chmod(0o755)
    fetch(locate(prepared.stored_in))
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_place_for_copies_that_another_user_made_is_refused_and_left_as_it_is(store, tmp_path, monkeypatch):
    prepared = prepare(config_in(store), quiet)
    home = tmp_path / f"trainer-{getpass.getuser()}"
    victim = home.rename(tmp_path / "victim")
    of_parent = victim / prepared.folder.parent.name
    (of_parent / f".partial-{prepared.folder.name}-00000000").mkdir()
    (of_parent / f".partial-{prepared.folder.name}-00000000/diary").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in sorted(victim.rglob("*"))}

    def refused(fault):
        advice = "Delete it, or set TMPDIR to a folder of your own."
        message = f"{home} is for copies of data that only you may read and write, but it {fault}. {advice}"
        for use in (lambda: prepare(config_in(store), quiet), lambda: fetch(locate(prepared.stored_in))):
            with pytest.raises(UserError) as error:
                use()
            assert str(error.value) == message
        assert {path: path.stat().st_mtime_ns for path in sorted(victim.rglob("*"))} == before

    home.symlink_to(victim)
    refused("is a link")
    home.unlink()
    home.write_text("")
    refused("is not a folder")
    home.unlink()
    home.mkdir()
    home.chmod(0o777)
    refused("can be written by others")
    home.chmod(0o700)
    owner = home.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refused(f"belongs to user {owner}")
    monkeypatch.undo()
    # The advice holds.
    (tmp_path / "own").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "own"))
    assert fetch(locate(prepared.stored_in)).fingerprint == prepared.fingerprint


def test_a_host_that_runs_no_python_copies_the_shards_by_operations(store):
    prepared = prepare(config_in(store), quiet)
    expected = all_batches(training_batches(prepared, config_in(store), 0, 3))
    before = {path: path.read_bytes() for path in prepared.folder.rglob("*") if path.is_file()}
    dataset = training_batches(prepared, config_in(store), 0, 3)
    shutil.rmtree(prepared.folder)
    np.testing.assert_equal(all_batches(dataset), expected)
    assert {path: path.read_bytes() for path in prepared.folder.rglob("*") if path.is_file()} == before
    # Once: what is there is not touched again.
    times = {path: path.stat().st_mtime_ns for path in prepared.folder.iterdir()}
    np.testing.assert_equal(all_batches(dataset), expected)
    assert {path: path.stat().st_mtime_ns for path in prepared.folder.iterdir()} == times


def test_data_damaged_in_the_store_is_not_copied(store):
    prepared = prepare(config_in(store), quiet)
    shutil.rmtree(prepared.folder)
    shard = locate(prepared.stored_in) / "train-00000.tokens"
    content = shard.read_bytes()
    tf.io.gfile.remove(str(shard))  # ram:// would append.
    shard.write_bytes(b"x" + content[1:])
    with pytest.raises(UserError, match=rf"{prepared.stored_in}: train-00000.tokens was changed: its SHA-256 does not"):
        prepare(config_in(store), quiet)
    assert not prepared.folder.exists()


def test_a_manifest_damaged_in_the_store_is_an_error_though_the_copy_is_whole(store):
    prepared = prepare(config_in(store), quiet)
    manifest = locate(prepared.stored_in) / "manifest.json"
    content = manifest.read_bytes()
    tf.io.gfile.remove(str(manifest))  # ram:// would append.
    manifest.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{prepared.stored_in}: manifest.json is damaged: its SHA-256 does not match"):
        prepare(config_in(store), quiet)


@pytest.mark.slow
def test_a_run_in_a_store_is_the_same_as_on_a_disk(store, tmp_path):
    """Trained, stopped in the middle, resumed and used, with nothing of it on a disk but the copy of the data."""
    on_a_disk = trainer.train(config_in(store, f"run_folder={tmp_path / 'run'}"), say=quiet)

    config = config_in(store, "checkpoint.every_steps=1")
    trainer.train(config, say=quiet)
    remove_folder(locate(f"{config.run_folder}/checkpoints/step_000000004"))
    remove_folder(locate(f"{config.run_folder}/checkpoints/step_000000003"))
    said = []
    result = trainer.resume(config.run_folder, say=said.append)
    assert result.step == 4 and result.run_folder == config.run_folder
    for ours, theirs in zip(result.model.get_weights(), on_a_disk.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert result.samples == on_a_disk.samples
    run = RunFolder(config.run_folder)
    assert run.config == config
    assert load_model(run, say=quiet)[1].step == 4
    assert trainer.generate(config.run_folder, "once") == trainer.generate(str(tmp_path / "run"), "once")
    assert [entry.name for entry in run.path.iterdir()] == [
        "checkpoints",
        "config.toml",
        "logs",
        "result.json",
        "run.json",
        "scores.json",
        "tokenizer",
    ]
    (events,) = tf.io.gfile.glob(f"{config.run_folder}/logs/validation/*")[-1:]
    assert tf.io.gfile.stat(events).length > 0
    with pytest.raises(UserError, match=r"already holds a run"):
        trainer.train(config, say=quiet)


# Paths.


def test_a_tilde_is_the_home_folder_and_another_name_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~") == tmp_path
    assert locate("~/a/b") == locate(Path("~/a/b")) == tmp_path / "a/b"
    for other in ("~nobody-here", "~backup.txt", "a/~/b", "./a~"):
        assert locate(other) == Path(other)
    assert locate("gs://bucket/~/x") == Url("gs://bucket/~/x")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a/" + "한" * 86 + "/b", r"a name in it has 258 bytes and the whole path 262; at most 255 and"),
        ("a/" * 2000, r"\.\.\..*: a name in it has 1 bytes and the whole path 4000; at most"),
        ("a\0b", r"^'a\\x00b': a path cannot hold a NUL character"),
        ("\udced\udc95", r"^'\\udced\\udc95': not a path in UTF-8"),
    ],
)
def test_a_path_that_no_file_system_accepts_is_refused(path, message):
    with pytest.raises(UserError, match=message):
        locate(path)
    with pytest.raises(UserError, match=message):
        RunFolder(path)


def test_a_name_with_the_most_bytes_that_a_file_system_accepts_is_a_path(tmp_path):
    folder = locate(tmp_path / ("한" * 85))
    folder.mkdir()
    assert not (folder / "config.toml").is_file()


def test_the_doctor_writes_into_a_store_and_removes_what_it_wrote(store):
    (found,) = check_writing(locate(f"{store}/runs"), Need("run_folder"))
    assert found.level == "ok" and found.what.startswith(f"{store}/runs: written at ")
    assert not locate(f"{store}/runs/.trainer-doctor").is_file()
    (found,) = check_writing(locate("nowhere://runs"), Need("run_folder"))
    assert found.level == "error" and "nowhere://runs cannot be written" in found.what
    assert found.repair.endswith("or choose another run_folder")
