import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import trainer
from trainer.cli import main
from trainer.config import Config, UserError, load_config, make_config
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData
from trainer.data.tokenizer import CharTokenizer
from trainer.run import RunFolder, build_gpt, check_is_free, find_run


def quiet(line: str) -> None:
    pass


def refuse(line: str) -> None:
    raise AssertionError(f"said, though nothing should have begun: {line}")


def tiny(folder: Path, *overrides: str) -> Config:
    settings = {
        "run_folder": str(folder / "run"),
        "data": {"train": str(folder / "a.txt"), "prepared_folder": str(folder / "prepared"), "documents": "file"},
        "tokenizer": {"kind": "char"},
        "model": {"num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4},
        "train": {"precision": "float32", "total_steps": 2, "sequence_length": 8, "global_batch_size": 2},
    }
    return make_config(settings, overrides)


def prepared_text(folder: Path, text: str = "the cat sat on the mat\n" * 30) -> PreparedData:
    (folder / "a.txt").write_text(text, encoding="utf-8")
    return prepare(tiny(folder), quiet)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tiny(tmp_path), prepared_text(tmp_path))


def save_checkpoint(run: RunFolder, step: int, config: Config | None = None) -> dict[str, np.ndarray]:
    tokenizer = run.tokenizer()
    model = build_gpt(config or run.config, tokenizer.vocabulary_size, tokenizer.bos_id)
    weights = {variable.path: variable.numpy() + 1 for variable in model.variables}
    checkpoints = run.checkpoints()
    checkpoints.save(step, {"weights": weights}, {})
    checkpoints.wait()
    return weights


def test_run_comes_back_as_it_was_created(run: RunFolder, tmp_path: Path):
    again = RunFolder(str(run.path))
    assert again.config == run.config == tiny(tmp_path)
    assert again.facts == run.facts
    prepared = again.prepared()
    assert prepared.fingerprint == run.facts["data_fingerprint"]
    assert again.tokenizer().fingerprint == prepared.tokenizer_fingerprint
    assert load_config(str(run.path / "config.toml")) == run.config
    assert sorted(path.name for path in run.path.iterdir()) == ["config.toml", "run.json", "tokenizer"]


@pytest.mark.slow
def test_every_path_of_a_run_may_begin_at_the_home_folder_and_hold_brackets_blanks_and_hangul(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "my [run] 'x'"
    home.mkdir()
    name = "가" * 78
    (home / f"{name}.txt").write_text("the cat sat on the mat\n" * 30, encoding="utf-8")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[BOS]", *"thecasonm", *(f"##{c}" for c in "hecatsnmo")])
    )
    text = f"~/my [run] 'x'/{name}.txt"
    overrides = [
        f"data.train={text}",
        f"data.validation={text}",
        "data.prepared_folder=~/my [run] 'x'/prepared",
        "run_folder=~/my [run] 'x'/run",
        "tokenizer.kind=wordpiece",
        "tokenizer.path=~/vocab.txt",
    ]
    config = tiny(tmp_path, *overrides)
    trainer.train(config, say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == [home.name, "vocab.txt"]
    assert {path.name for path in home.iterdir()} == {f"{name}.txt", "prepared", "run"}
    assert RunFolder(config.run_folder).checkpoints().latest() is not None
    with pytest.raises(UserError, match="already holds a run"):
        check_is_free(config)
    assert main(["inspect", config.run_folder]) == 0
    capsys.readouterr()
    assert main(["plan", str(home / "run/config.toml")]) == 0
    assert "examples" in capsys.readouterr().out  # Which only prepared data tells.


def test_a_run_may_go_on_on_other_devices_and_never_with_another_model(run: RunFolder):
    assert RunFolder(run.path, ["distribution.gpus=[0,1]"]).config.distribution.gpus == (0, 1)
    with pytest.raises(UserError, match=r"model\.vocabulary_multiple=8: a run goes on with the config it was started"):
        RunFolder(run.path, ["model.vocabulary_multiple=8"])


def test_empty_folder_is_free_for_a_run(tmp_path: Path):
    prepared = prepared_text(tmp_path)
    (tmp_path / "run").mkdir()
    RunFolder.create(tiny(tmp_path), prepared)


def test_folder_of_another_run_is_refused(run: RunFolder, tmp_path: Path):
    for refuse in (lambda: check_is_free(run.config), lambda: RunFolder.create(run.config, run.prepared())):
        with pytest.raises(UserError) as error:
            refuse()
        assert str(error.value) == (
            f"run_folder='{run.path}' already holds a run. Go on with it: trainer train --resume {run.path}; or start "
            f"another beside it with the override run_folder={run.path}-2; or delete it."
        )


def test_folder_or_file_that_is_no_run_is_refused_and_left_alone(tmp_path: Path):
    prepared = prepared_text(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a").write_text("mine")
    for path in (tmp_path / "notes", tmp_path / "notes/a"):
        with pytest.raises(UserError, match=r"is there already and is no run; choose another folder\."):
            RunFolder.create(tiny(tmp_path, f"run_folder={path}"), prepared)
    assert (tmp_path / "notes/a").read_text() == "mine"


def test_run_folder_that_cannot_be_written_is_refused_and_nothing_left(tmp_path: Path):
    prepared = prepared_text(tmp_path)
    with pytest.raises(UserError, match=r"run_folder='.*a.txt/run' cannot be written: Not a directory. Make room, or"):
        RunFolder.create(tiny(tmp_path, f"run_folder={tmp_path}/a.txt/run"), prepared)
    shutil.rmtree(prepared.folder / "tokenizer")
    with pytest.raises(UserError, match=r"run_folder='.*run' cannot be written: "):
        RunFolder.create(tiny(tmp_path), prepared)
    assert not (tmp_path / "run").exists()


def test_folder_that_is_no_run_is_not_opened(run: RunFolder, tmp_path: Path):
    beside = tmp_path / "beside"
    with pytest.raises(UserError) as error:
        RunFolder(beside)
    assert str(error.value) == f"{beside} is not a run folder: it has no config.toml. Runs near it: {run.path}."
    with pytest.raises(UserError, match=r"nowhere/at/all is not a run folder: it has no config.toml\.$"):
        RunFolder(tmp_path / "nowhere/at/all")
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(UserError, match=r"is not a run folder: it has no run.json\."):
        RunFolder(run.path)


def test_damaged_config_of_a_run_is_an_error_that_names_it(run: RunFolder):
    (run.path / "config.toml").write_text("[train", encoding="utf-8")
    with pytest.raises(UserError, match=r"run/config.toml: not a readable TOML file"):
        RunFolder(run.path)


def test_data_that_is_gone_is_an_error_that_says_how_to_get_it_back(run: RunFolder, tmp_path: Path):
    shutil.rmtree(tmp_path / "prepared")
    with pytest.raises(
        UserError, match=r"was started on the prepared data .*, which is gone. Prepare the same text"
    ) as e:
        run.prepared()
    assert f"(trainer prepare {run.path / 'config.toml'})" in str(e.value)
    prepare(load_config(str(run.path / "config.toml")), quiet)
    run.prepared()


def test_data_that_is_gone_can_be_prepared_again_if_it_comes_out_the_same(run: RunFolder, tmp_path: Path):
    shutil.rmtree(tmp_path / "prepared")
    assert run.prepared(lambda: prepared_text(tmp_path)).fingerprint == run.facts["data_fingerprint"]
    shutil.rmtree(tmp_path / "prepared")
    with pytest.raises(UserError, match=r"is not the data .*run was started on; start a new run for other data\."):
        run.prepared(lambda: prepared_text(tmp_path, "another text about a dog\n" * 30))


def test_a_run_is_found_again_with_what_may_change_as_the_config_now_has_it(run: RunFolder, tmp_path: Path):
    config = tiny(tmp_path, "train.steps_per_call=3", "distribution.logical_devices=2", "log.every_steps=7")
    found = find_run(config, or_resume=True)
    assert found is not None and found.config == config != run.config
    assert found.facts == run.facts
    # Moved or named otherwise, it is the same run.
    (tmp_path / "run").rename(tmp_path / "moved")
    assert find_run(tiny(tmp_path, f"run_folder={tmp_path}/moved"), or_resume=True) is not None
    assert find_run(config, or_resume=True) is None


def test_a_micro_batch_that_was_found_is_kept_where_the_run_leaves_it_open(tmp_path: Path):
    auto, numbered = tiny(tmp_path, "train.micro_batch_size=auto"), tiny(tmp_path, "train.micro_batch_size=1")
    run = RunFolder.create(auto, prepared_text(tmp_path))
    assert RunFolder.of(auto).config == auto
    before = RunFolder(run.path, ["train.xla=off"])
    before.keep_micro_batch_size(1)
    assert RunFolder(run.path).config == numbered  # And of the overrides nothing.
    assert RunFolder.of(auto).config == numbered
    # Asked for anew, it is of that process alone.
    RunFolder(run.path, ["train.micro_batch_size=auto"]).keep_micro_batch_size(2)
    assert RunFolder(run.path).config == numbered
    assert RunFolder(run.path, ["train.micro_batch_size=auto"]).config == auto


def test_a_micro_batch_that_cannot_be_kept_is_an_error(tmp_path: Path):
    run = RunFolder.create(tiny(tmp_path, "train.micro_batch_size=auto"), prepared_text(tmp_path))
    (run.path / "config.toml.partial").mkdir()
    with pytest.raises(UserError, match=r"run/config.toml cannot be written: Is a directory. Make room\."):
        run.keep_micro_batch_size(1)


def test_a_run_with_other_settings_is_not_gone_on_with(run: RunFolder, tmp_path: Path):
    others = ["train.seed=7", "model.dropout=0.5", "optimizer.clip_norm=1.0", "samples.prompt=x", "log.every_steps=7"]
    with pytest.raises(UserError) as error:
        find_run(tiny(tmp_path, *others), or_resume=True)
    assert str(error.value).startswith(
        f"run_folder='{run.path}' holds a run that was started with other settings: model.dropout=0.5 (was 0.0); "
        "train.seed=7 (was 0); optimizer.clip_norm=1.0 (was None); and 1 more. Go on with the settings it was started "
    )
    with pytest.raises(UserError, match=r"tokenizer.kind='wordpiece' \(was 'char'\)"):
        find_run(tiny(tmp_path, "tokenizer={kind='wordpiece'}"), or_resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        find_run(tiny(tmp_path), or_resume=False)


def test_a_folder_that_is_no_run_is_not_gone_on_with(tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert find_run(tiny(tmp_path), or_resume=True) is None
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there already and is no run"):
        find_run(tiny(tmp_path), or_resume=True)


def test_data_that_is_gone_is_not_replaced_by_that_of_a_changed_text(run: RunFolder, tmp_path: Path):
    shutil.rmtree(tmp_path / "prepared")
    prepared_text(tmp_path, "another text about a dog\n" * 30)
    with pytest.raises(UserError, match=r"was started on the prepared data .*, which is gone\."):
        trainer.resume(str(run.path), say=quiet)


def damage_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


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


def test_text_changed_after_prepare_is_prepared_anew_by_train_which_says_so(tmp_path: Path):
    class Begun(Exception):
        pass

    said: list[str] = []

    def listen(line: str) -> None:
        said.append(line)
        if "parameters" in line:
            raise Begun

    old = prepared_text(tmp_path)
    (tmp_path / "a.txt").write_text("another text about a dog\n" * 30, encoding="utf-8")
    with pytest.raises(Begun):
        trainer.train(tiny(tmp_path), say=listen)
    assert said[0] == f"the text is not the one of {old.folder}; preparing it anew (that folder stays)"
    new = RunFolder(str(tmp_path / "run")).prepared()
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
    assert "; steps 1 to 2 of " in said[0]
    for ours, theirs in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_other_data_is_refused(run: RunFolder, tmp_path: Path):
    other = prepared_text(tmp_path, "another text about a dog\n" * 30)
    facts = run.facts | {"prepared_folder": str(other.folder)}
    (run.path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(UserError, match=r"is not the data .*run was started on; start a new run for other data\."):
        RunFolder(run.path).prepared()


def test_other_tokenizer_is_refused(run: RunFolder, tmp_path: Path):
    other = prepared_text(tmp_path, "another text about a dog\n" * 30)
    shutil.copytree(other.folder / "tokenizer", tmp_path / "run/tokenizer", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"run/tokenizer is not the tokenizer this run was started with\."):
        run.tokenizer()


def test_run_is_usable_without_its_data(run: RunFolder, tmp_path: Path):
    save_checkpoint(run, 1)
    shutil.rmtree(tmp_path / "prepared")
    run.load_model()


def test_model_comes_back_with_the_newest_weights(run: RunFolder):
    save_checkpoint(run, 1)
    weights = save_checkpoint(run, 2)
    model, checkpoint = run.load_model()
    assert checkpoint.step == 2
    for variable in model.variables:
        np.testing.assert_array_equal(variable.numpy(), weights[variable.path])


def test_model_that_comes_back_knows_bos(run: RunFolder):
    save_checkpoint(run, 1)
    model, _ = run.load_model()
    assert model.bos_id == run.tokenizer().bos_id == run.prepared().bos_id


def test_run_without_a_checkpoint_has_no_model(run: RunFolder):
    with pytest.raises(UserError) as error:
        run.load_model()
    assert str(error.value) == f"{run.path} has no checkpoint yet; train on with: trainer train --resume {run.path}"


def test_checkpoint_of_another_model_is_refused(run: RunFolder, tmp_path: Path):
    save_checkpoint(run, 1, tiny(tmp_path, "model.num_layers=2"))
    with pytest.raises(
        UserError, match=r"step_000000001 does not hold this model: it lacks nothing and has \['gpt/block_1"
    ):
        run.load_model()
    save_checkpoint(run, 2, tiny(tmp_path, "model.hidden_dim=8"))
    with pytest.raises(UserError, match=r"step_000000002 has gpt/.* as float32\[.*\], the model as float32\["):
        run.load_model()


def test_a_folder_that_a_killed_process_began_to_make_is_free(tmp_path: Path):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{")
    config = make_config({"run_folder": str(tmp_path / "run"), "train": {"precision": "float32", "total_steps": 1}})
    check_is_free(config)
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there already and is no run"):
        check_is_free(config)
