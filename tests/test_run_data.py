import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import quiet  # type: ignore[import-not-found]  # pytest has this folder on its path
from tiny_run import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    damage_one_bit,
    folder_of,
    prepared_text,
    refuse,
    tiny,
)

import trainer
from trainer.config.file import load_config
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData
from trainer.errors import UserError
from trainer.runs.run_data import find_prepared, load_tokenizer_of, record_place_of
from trainer.runs.run_folder import RunFolder, find_run
from trainer.tokenizers.characters import CharTokenizer


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tiny(tmp_path), prepared_text(tmp_path))


def swap_tokenizer(path: Path) -> None:
    CharTokenizer(["[PAD]", "[UNK]", "[BOS]", *" acehmnost"]).save(path.parent)


DAMAGES = {
    "a shard lacks a byte": ("train-00000.tokens", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "a bit of a shard": ("validation-00000.tokens", damage_one_bit),
    "a bit of the offsets": ("train-00000.offsets", damage_one_bit),
    "no shard": ("train-00000.tokens", Path.unlink),
    "no manifest": ("manifest.json", Path.unlink),
    "a bit of the manifest": ("manifest.json", damage_one_bit),
    "another tokenizer": ("tokenizer/settings.json", swap_tokenizer),
    "no tokenizer": ("tokenizer/tokenizer.json", Path.unlink),
}


def test_data_that_is_gone_is_an_error_with_advice(run: RunFolder, tmp_path: Path):
    shutil.rmtree(tmp_path / "prepared")
    with pytest.raises(
        UserError, match=r"was started on the prepared data .*, which is gone. Prepare the same text"
    ) as e:
        find_prepared(run)
    assert f"(trainer prepare {run.path / 'config.toml'})" in str(e.value)
    prepare(load_config(str(run.path / "config.toml")), quiet)
    find_prepared(run)


def test_data_that_is_gone_can_be_prepared_again_if_it_comes_out_the_same(run: RunFolder, tmp_path: Path):
    shutil.rmtree(tmp_path / "prepared")
    assert find_prepared(run, lambda: prepared_text(tmp_path)).fingerprint == run.facts["data_fingerprint"]
    shutil.rmtree(tmp_path / "prepared")
    with pytest.raises(UserError, match=r"is not the data .*run was started on; start a new run for other data\."):
        find_prepared(run, lambda: prepared_text(tmp_path, "another text about a dog\n" * 30))


def test_data_that_is_gone_is_not_replaced_by_the_data_of_a_changed_text(run: RunFolder, tmp_path: Path):
    shutil.rmtree(tmp_path / "prepared")
    prepared_text(tmp_path, "another text about a dog\n" * 30)
    with pytest.raises(UserError, match=r"was started on the prepared data .*, which is gone\."):
        trainer.resume(str(run.path), say=quiet)


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_step_is_taken_on_damaged_data(tmp_path: Path, damage: str):
    prepared = prepared_text(tmp_path)
    name, do_damage = DAMAGES[damage]
    started = RunFolder.create(tiny(tmp_path, f"run_folder={tmp_path}/started"), prepared)
    do_damage(prepared.folder / name)
    for train in (
        lambda: trainer.train(tiny(tmp_path), say=refuse),
        lambda: trainer.resume(str(started.path), say=refuse),
    ):
        with pytest.raises(UserError, match=rf"^{prepared.folder}: {name} .*; delete the folder and prepare again\.$"):
            train()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "started" / "checkpoints").exists()


def test_text_changed_after_prepare_is_prepared_again_with_a_message(tmp_path: Path):
    class Begun(Exception):
        pass

    said: list[str] = []
    used: list[PreparedData] = []

    def listen(line: str) -> None:
        said.append(line)
        if "parameters" in line:
            used.append(find_prepared(RunFolder(str(tmp_path / "run"))))
            raise Begun

    old = prepared_text(tmp_path)
    (tmp_path / "a.txt").write_text("another text about a dog\n" * 30, encoding="utf-8")
    with pytest.raises(Begun):
        trainer.train(tiny(tmp_path), say=listen)
    assert said[1] == f"the text is not the one of {old.folder}; preparing it anew (that folder stays)"
    (new,) = used
    assert new.folder != old.folder
    assert new.fingerprint == prepare(tiny(tmp_path), quiet).fingerprint != old.fingerprint


@pytest.mark.slow
def test_text_changed_after_the_start_of_a_run_changes_nothing_in_it(tmp_path: Path):
    prepared_text(tmp_path)
    whole = trainer.train(tiny(tmp_path, "checkpoint.every_steps=1", "checkpoint.keep_last=2"), say=quiet)
    shutil.rmtree(tmp_path / "run/checkpoints/step_000000002")
    (tmp_path / "a.txt").write_text("another text about a dog\n" * 30, encoding="utf-8")
    said: list[str] = []
    resumed = trainer.resume(str(tmp_path / "run"), say=said.append)
    assert "; steps 1 to 2 of " in "\n".join(said)
    assert resumed.model is not None and whole.model is not None
    for ours, theirs in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_other_data_is_refused(run: RunFolder, tmp_path: Path):
    other = prepared_text(tmp_path, "another text about a dog\n" * 30)
    shutil.rmtree(find_prepared(run).folder)
    run.record(prepared_folder=str(other.folder))
    with pytest.raises(UserError, match=r"is not the data .*run was started on; start a new run for other data\."):
        find_prepared(RunFolder(run.path))


def test_other_tokenizer_is_refused(run: RunFolder, tmp_path: Path):
    other = prepared_text(tmp_path, "another text about a dog\n" * 30)
    shutil.copytree(other.folder / "tokenizer", tmp_path / "run/tokenizer", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"run/tokenizer is not the tokenizer this run was started with\."):
        load_tokenizer_of(run)


def test_a_damaged_tokenizer_of_a_run_can_be_copied_as_the_error_advises(run: RunFolder):
    for file in (folder_of(run) / "tokenizer").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError) as error:
        load_tokenizer_of(run)
    reason, _, data = str(error.value).partition(". Copy it again from the data of the run, whose folder has the same ")
    assert reason.startswith(f"{run.path}/tokenizer: not a whole tokenizer") and data.startswith("tokenizer/: ")
    shutil.copytree(f"{data.removeprefix('tokenizer/: ')}/tokenizer", folder_of(run) / "tokenizer", dirs_exist_ok=True)
    assert load_tokenizer_of(run).fingerprint == run.facts["tokenizer_fingerprint"]


def test_a_moved_project_finds_its_data_by_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    project, moved = tmp_path / "project", tmp_path / "moved"
    (project / "runs").mkdir(parents=True)
    prepared = prepared_text(project)
    run = RunFolder.create(tiny(project, f"run_folder={project}/runs/a"), prepared)
    project.rename(moved)
    found = find_prepared(RunFolder(moved / "runs/a"))
    assert found.folder == moved / "prepared" / prepared.folder.name
    # Where the old place has other data now, too.
    project.mkdir()
    prepared_text(project, "another text about a dog\n" * 30)
    (project / "prepared").rename(project / "other")
    (project / "prepared").mkdir()
    (next((project / "other").iterdir())).rename(project / "prepared" / prepared.folder.name)
    assert find_prepared(RunFolder(moved / "runs/a")).folder == found.folder
    # Beside the run, under another name.
    shutil.rmtree(project)
    found.folder.rename(moved / "runs" / "text")
    run = RunFolder(moved / "runs/a")
    assert find_prepared(run).folder == moved / "runs" / "text"
    record_place_of(run, find_prepared(run))
    assert RunFolder(moved / "runs/a").facts["prepared_folder"] == str(moved / "runs" / "text")
    # And in a folder that is named.
    (tmp_path / "mounted").mkdir()
    (moved / "runs/text").rename(tmp_path / "mounted" / "text")
    with pytest.raises(UserError, match=r"bring the folder text back into one of .* data\.prepared_folder=FOLDER"):
        find_prepared(run)
    for place in ("mounted", "mounted/text"):
        named = RunFolder(moved / "runs/a", [f"data.prepared_folder={tmp_path}/{place}"])
        assert find_prepared(named).fingerprint == prepared.fingerprint


def test_a_config_that_names_another_place_of_the_data_is_of_the_same_run(run: RunFolder, tmp_path: Path):
    (tmp_path / "prepared").rename(tmp_path / "elsewhere")
    found = find_run(tiny(tmp_path, f"data.prepared_folder={tmp_path}/elsewhere"), or_resume=True)
    assert found is not None and find_prepared(found).folder.parent == tmp_path / "elsewhere"
