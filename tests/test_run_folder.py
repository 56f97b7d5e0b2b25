import errno
import itertools
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import quiet  # type: ignore[import-not-found]  # pytest has this folder on its path
from tiny_run import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    folder_of,
    prepared_text,
    refuse,
    save_checkpoint,
    tiny,
)

import trainer
from trainer.cli import main
from trainer.config.file import load_config, make_config
from trainer.config.settings import Config
from trainer.data.shards import PreparedData
from trainer.errors import UserError
from trainer.model.build import model_name
from trainer.runs.run_changes import record_changes
from trainer.runs.run_checkpoints import load_model, open_checkpoints
from trainer.runs.run_data import find_prepared, load_tokenizer_of
from trainer.runs.run_folder import RunFolder, check_is_free, find_run
from trainer.runs.run_lock import only_run_in
from trainer.system.storage import locate
from trainer.verbs import how_to_resume


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tiny(tmp_path), prepared_text(tmp_path))


def create_alone(config: Config, prepared: PreparedData) -> RunFolder:
    """Makes a run's folder as `trainer.train` does, while no other process can."""
    with only_run_in(locate(config.run_folder)):
        return RunFolder.create(config, prepared)


def test_run_comes_back_as_it_was_created(run: RunFolder, tmp_path: Path):
    again = RunFolder(str(run.path))
    assert again.config == run.config == tiny(tmp_path)
    assert again.facts == run.facts
    prepared = find_prepared(again)
    assert prepared.fingerprint == run.facts["data_fingerprint"]
    assert load_tokenizer_of(again).fingerprint == prepared.tokenizer_fingerprint
    assert load_config(str(run.path / "config.toml")) == run.config
    assert sorted(path.name for path in run.path.iterdir()) == ["config.toml", "run.json", "tokenizer"]


@pytest.mark.slow
def test_every_path_of_a_run_may_begin_at_the_home_folder_and_have_brackets_blanks_and_hangul(
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
    assert open_checkpoints(RunFolder(config.run_folder)).latest() is not None
    with pytest.raises(UserError, match="already holds a run"):
        check_is_free(config)
    assert main(["inspect", config.run_folder]) == 0
    capsys.readouterr()
    assert main(["plan", str(home / "run/config.toml")]) == 0
    assert "examples" in capsys.readouterr().out  # Which only prepared data tells.


def test_the_commands_that_messages_show_work_in_a_shell_whatever_the_folder_s_name(tmp_path: Path):
    folder = tmp_path / "my [run]; it's $HOME"
    folder.mkdir()
    run = RunFolder.create(tiny(folder), prepared_text(folder))
    with pytest.raises(UserError) as error:
        check_is_free(run.config)
    words = shlex.split(str(error.value).partition("Go on with it: ")[2].replace(";", " ;"))
    assert words[:4] == ["trainer", "train", "--resume", str(run.path).replace(";", " ;")]
    beside = next(word for word in words if word.startswith("run_folder=")).replace(" ;", ";")
    assert make_config(run.config.model_dump(mode="json", exclude_none=True), [beside]).run_folder == f"{run.path}-2"
    with pytest.raises(UserError) as error:
        load_config(str(run.path))
    assert shlex.split(str(error.value).rpartition(": ")[2]) == ["trainer", "train", "--resume", str(run.path)]
    with pytest.raises(UserError) as error:
        load_model(run)
    assert shlex.split(str(error.value).rpartition(": ")[2]) == ["trainer", "train", "--resume", str(run.path)]


def test_a_run_may_go_on_on_other_devices_and_never_with_another_model(run: RunFolder):
    assert RunFolder(run.path, ["distribution.gpus=[0,1]"]).config.distribution.gpus == (0, 1)
    with pytest.raises(
        UserError, match=r"model\.vocabulary_multiple=8: a resumed run keeps the config that it was started"
    ):
        RunFolder(run.path, ["model.vocabulary_multiple=8"])


def test_empty_folder_is_free_for_a_run(tmp_path: Path):
    prepared = prepared_text(tmp_path)
    (tmp_path / "run").mkdir()
    RunFolder.create(tiny(tmp_path), prepared)


def test_folder_of_another_run_is_refused(run: RunFolder, tmp_path: Path):
    for use in (lambda: check_is_free(run.config), lambda: RunFolder.create(run.config, find_prepared(run))):
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value) == (
            f"run_folder='{run.path}' already holds a run. Go on with it: trainer train --resume {run.path}; or start "
            f"another beside it with the override run_folder={run.path}-2; or delete it."
        )


def test_folder_or_file_that_is_not_a_run_is_refused_and_not_changed(tmp_path: Path):
    prepared = prepared_text(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a").write_text("mine")
    for path in (tmp_path / "notes", tmp_path / "notes/a"):
        with pytest.raises(UserError, match=r"is there already and is not a run; choose another folder\."):
            RunFolder.create(tiny(tmp_path, f"run_folder={path}"), prepared)
    assert (tmp_path / "notes/a").read_text() == "mine"
    # Not even under a name that trainer itself uses.
    (tmp_path / "run/tokenizer").mkdir(parents=True)
    (tmp_path / "run/tokenizer/tokenizer.json").write_text("mine")
    with pytest.raises(UserError, match=r"is there already and is not a run; choose another folder\."):
        RunFolder.create(tiny(tmp_path), prepared)
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_text() == "mine"


def test_a_start_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepared = prepared_text(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("trainer.runs.run_folder._write_record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            create_alone(tiny(tmp_path), prepared)
    assert not (tmp_path / "run").exists()
    create_alone(tiny(tmp_path), prepared)


def test_run_folder_that_cannot_be_written_is_refused_and_nothing_left(tmp_path: Path):
    prepared = prepared_text(tmp_path)
    with pytest.raises(UserError, match=r"a.txt/run cannot be written: Not a directory\. "):
        create_alone(tiny(tmp_path, f"run_folder={tmp_path}/a.txt/run"), prepared)
    shutil.rmtree(prepared.folder / "tokenizer")
    with pytest.raises(UserError, match=r"run_folder='.*run' cannot be written: "):
        create_alone(tiny(tmp_path), prepared)
    assert not (tmp_path / "run").exists()


def test_folder_that_is_not_a_run_is_not_opened(run: RunFolder, tmp_path: Path):
    beside = tmp_path / "beside"
    with pytest.raises(UserError) as error:
        RunFolder(beside)
    assert str(error.value) == f"{beside} is not a run folder: it has no run.json. Runs near it: {run.path}."
    (folder_of(run) / "checkpoints").mkdir()
    for name in ("run.json", "checkpoints"):
        with pytest.raises(UserError, match=rf"it has no run\.json\. Runs near it: {run.path}\.$"):
            RunFolder(run.path / name)
    with pytest.raises(UserError, match=r"nowhere/at/all is not a run folder: it has no run.json\.$"):
        RunFolder(tmp_path / "nowhere/at/all")
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(UserError, match=r"is not a run folder: it has no run.json\."):
        RunFolder(run.path)


def test_damaged_config_of_a_run_is_an_error_that_names_it(run: RunFolder):
    (run.path / "config.toml").write_text("[train", encoding="utf-8")
    with pytest.raises(UserError, match=r"run/config.toml is damaged: not a readable TOML file"):
        RunFolder(run.path)


def test_a_run_is_found_again_with_the_config_s_settings_that_may_change(run: RunFolder, tmp_path: Path):
    config = tiny(tmp_path, "train.steps_per_call=3", "distribution.logical_devices=2", "log.every_steps=7")
    found = find_run(config, or_resume=True)
    assert found is not None and found.config == config != run.config
    assert found.facts == run.facts
    # Moved or named otherwise, it is the same run.
    (tmp_path / "run").rename(tmp_path / "moved")
    assert find_run(tiny(tmp_path, f"run_folder={tmp_path}/moved"), or_resume=True) is not None
    assert find_run(config, or_resume=True) is None


def test_a_micro_batch_that_was_found_is_kept_if_the_run_s_setting_is_auto(tmp_path: Path):
    auto, numbered = tiny(tmp_path, "train.micro_batch_size=auto"), tiny(tmp_path, "train.micro_batch_size=1")
    run = RunFolder.create(auto, prepared_text(tmp_path))
    assert RunFolder.of(auto).config == auto
    before = RunFolder(run.path, ["train.xla=off"])
    before.record_micro_batch_size(1)
    assert RunFolder(run.path).config == numbered  # And of the overrides nothing.
    assert RunFolder.of(auto).config == numbered
    # As an override it is valid only for that process.
    RunFolder(run.path, ["train.micro_batch_size=auto"]).record_micro_batch_size(2)
    assert RunFolder(run.path).config == numbered
    assert RunFolder(run.path, ["train.micro_batch_size=auto"]).config == auto


def test_a_micro_batch_that_cannot_be_kept_is_an_error(tmp_path: Path):
    run = RunFolder.create(tiny(tmp_path, "train.micro_batch_size=auto"), prepared_text(tmp_path))
    (run.path / "config.toml.partial").mkdir()
    with pytest.raises(UserError, match=r"run/config.toml cannot be written: Is a directory\."):
        run.record_micro_batch_size(1)


def test_a_run_with_other_settings_is_not_resumed(run: RunFolder, tmp_path: Path):
    others = ["train.seed=7", "model.dropout=0.5", "optimizer.clip_norm=1.0", "samples.prompt=x", "log.every_steps=7"]
    with pytest.raises(UserError) as error:
        find_run(tiny(tmp_path, *others), or_resume=True)
    assert str(error.value).startswith(
        f"run_folder='{run.path}' holds a run that was started with other settings: model.dropout=0.5 (was 0.0); "
        "train.seed=7 (was 0); optimizer.clip_norm=1.0 (was None). Go on with the settings that it was "
    )
    with pytest.raises(UserError, match=r"tokenizer.kind='wordpiece' \(was 'char'\)"):
        find_run(tiny(tmp_path, "tokenizer={kind='wordpiece'}"), or_resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        find_run(tiny(tmp_path), or_resume=False)


def test_a_folder_that_is_not_a_run_is_not_resumed(tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert find_run(tiny(tmp_path), or_resume=True) is None
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there already and is not a run"):
        find_run(tiny(tmp_path), or_resume=True)


def test_a_folder_that_a_killed_process_began_to_make_is_free(tmp_path: Path):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "run.json.partial").write_text("{")
    (tmp_path / "run" / "lock").touch()
    config = make_config({"run_folder": str(tmp_path / "run"), "train": {"precision": "float32", "total_steps": 1}})
    check_is_free(config)
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there already and is not a run"):
        check_is_free(config)


def test_a_flipped_bit_in_a_run_s_files_never_changes_a_setting(run: RunFolder):
    """Flips a bit of every seventh byte, and cuts the file there: the settings stay, or an error names the file."""
    config, facts = run.config, run.facts
    for name in ("config.toml", "run.json"):
        path = run.path / name
        whole = path.read_bytes()
        flipped = (whole[:i] + bytes([whole[i] ^ 1 << i // 7 % 8]) + whole[i + 1 :] for i in range(0, len(whole), 7))
        for content in itertools.chain(flipped, (whole[:length] for length in range(0, len(whole) - 1, 49))):
            path.write_bytes(content)
            try:
                found = RunFolder(run.path)
            except UserError as error:
                assert str(error).startswith(f"{path} "), error
                continue
            assert found.config == config and found.facts == facts, content
        path.write_bytes(whole)


def test_a_changed_config_of_a_run_is_refused_with_the_difference_and_what_to_do(run: RunFolder):
    file = folder_of(run) / "config.toml"
    whole = file.read_text()
    changed = (
        whole.replace("\nseed = 0", "\nseed = 7")
        .replace("\nlearning_rate = ", "\nlearning_rate = 1")
        .replace("keep_last = 3", "keep_last = 4")
    )
    file.write_text(changed)
    with pytest.raises(UserError) as error:
        RunFolder(run.path)
    text = str(error.value)
    assert text.startswith(f"{file} was changed after the run was started: ")
    assert "train.seed=7 (was 0)" in text and "optimizer.learning_rate=10." in text and "checkpoint.keep_last=4" in text
    assert "Delete that file: it is written again from run.json" in text
    file.unlink()
    again = RunFolder(run.path)
    again.write_config_file()
    assert file.read_text() == whole and again.config == run.config


def test_a_setting_that_may_change_has_to_be_given_as_an_override(run: RunFolder):
    file = folder_of(run) / "config.toml"
    file.write_text(file.read_text().replace("keep_last = 3", "keep_last = 4"))
    with pytest.raises(UserError) as error:
        RunFolder(run.path)
    assert "checkpoint.keep_last=4 (was 3)" in str(error.value)
    assert str(error.value).endswith(f"as overrides: trainer train --resume {run.path} checkpoint.keep_last=...")
    file.unlink()
    assert RunFolder(run.path, ["checkpoint.keep_last=4"]).config.checkpoint.keep_last == 4


def test_comments_and_the_order_in_a_run_s_config_may_change(run: RunFolder):
    file = folder_of(run) / "config.toml"
    file.write_text("# mine\n" + file.read_text(), encoding="utf-8-sig")
    assert RunFolder(run.path).config == run.config


@pytest.mark.parametrize("name", ["config.toml", "run.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"\0" * 100])
def test_a_damaged_file_of_a_run_is_an_error_that_names_it(run: RunFolder, name: str, content: bytes):
    (run.path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{run.path / name} is damaged: .*[Dd]elete"):
        RunFolder(run.path)
    if not content:
        with pytest.raises(UserError, match="it has 0 bytes"):
            RunFolder(run.path)


def test_the_record_of_another_release_is_refused_by_its_format_or_its_settings(run: RunFolder):
    before = run.facts["config"]
    run.record(config={**before, "train": {**before["train"], "magic": 3}})
    with pytest.raises(UserError, match=r"run\.json was written by another release of trainer, .* train\.magic is not"):
        RunFolder(run.path)
    run.record(format=1)
    with pytest.raises(UserError, match=r"run\.json is of format 1, not 2; use the release that wrote it\."):
        RunFolder(run.path)
    # The first releases kept three facts, and did not seal them.
    kept = {key: run.facts[key] for key in ("prepared_folder", "data_fingerprint", "tokenizer_fingerprint")}
    (folder_of(run) / "run.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"does not contain its own SHA-256\. If an .* use that release\."):
        RunFolder(run.path)


def test_a_micro_batch_kept_by_a_process_that_was_killed_is_not_a_change_by_hand(tmp_path: Path):
    run = RunFolder.create(tiny(tmp_path, "train.micro_batch_size=auto"), prepared_text(tmp_path))
    record = (run.path / "run.json").read_bytes()
    run.record_micro_batch_size(2)
    (run.path / "run.json").write_bytes(record)
    assert RunFolder(run.path).config == run.config


def test_all_of_a_new_run_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A loss of power loses what was not synced: so that is removed here, and the run has to be whole."""
    prepared = prepared_text(tmp_path)
    synced: set[tuple[int, int]] = set()
    sync = os.fsync

    def note(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.add((status.st_ino, status.st_size if stat.S_ISREG(status.st_mode) else 0))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    config = tiny(tmp_path, f"run_folder={tmp_path}/runs/of/mine")
    run = RunFolder.create(config, prepared)
    save_checkpoint(run, 1)
    folder = folder_of(run)
    for path in [*folder.rglob("*"), folder, folder.parent, folder.parent.parent, tmp_path]:
        status = path.stat()
        size = status.st_size if path.is_file() else 0
        assert (status.st_ino, size) in synced, path


def test_a_signal_s_advice_is_to_resume_if_there_is_a_run(run: RunFolder, tmp_path: Path):
    (folder_of(run) / "config.toml").unlink()  # It is written again from the record.
    assert how_to_resume(run.config, str(run.path)) == f"Go on with: trainer train --resume {run.path}"
    assert how_to_resume(run.config, f"{tmp_path}/none").startswith("There is no run yet.")
    longer = RunFolder(run.path, ["train.total_steps=9"])
    assert how_to_resume(longer.config, str(run.path)) == "Go on with the same command."
    record_changes(longer, 0, 9, quiet)
    assert how_to_resume(longer.config, str(run.path)) == f"Go on with: trainer train --resume {run.path}"
    # A fork has no --or-resume, so the advice is one that all commands can follow.
    assert how_to_resume(run.config, "s3://bucket/run").endswith(
        "the same command. Otherwise go on with: trainer train --resume s3://bucket/run"
    )


def build_own(config: Config, vocabulary_size: int) -> Any:
    raise AssertionError


def test_a_run_remembers_that_its_model_is_foreign(tmp_path: Path):
    prepared = prepared_text(tmp_path)
    own = RunFolder.create(tiny(tmp_path), prepared, build_own)
    assert RunFolder(own.path).facts["model"] == f"{__name__}.build_own"
    for use in (
        lambda: trainer.resume(str(own.path), say=refuse),
        lambda: trainer.generate(str(own.path)),
        lambda: trainer.score(str(own.path)),
        lambda: load_model(own),
    ):
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value) == (
            f"{own.path} trains a foreign model, which {__name__}.build_own built, and not the GPT of its config. "
            f"Go on from Python, with that function: trainer.resume('{own.path}', build_model); trainer.generate and "
            "trainer.score take build_model, too."
        )
    gpt = RunFolder.create(tiny(tmp_path, f"run_folder={tmp_path}/gpt"), prepared)
    with pytest.raises(UserError, match=r"trains the GPT of its config, and not a model of .*build_own; leave out"):
        trainer.resume(str(gpt.path), build_own, say=refuse)
    assert model_name(partial(build_own)) == f"{__name__}.build_own"
    assert model_name(Building()) == f"{__name__}.Building"


class Building:
    def __call__(self, config: Config, vocabulary_size: int) -> Any:
        raise AssertionError


START = """
import os, sys
from pathlib import Path
import keras, tensorflow
from trainer.errors import UserError
sys.path.insert(0, sys.argv[1])
import tiny
import tiny_run
from trainer.data.prepare import prepare
from trainer.system.storage import locate
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import RunFolder
from trainer.runs.run_lock import only_run_in
folder = Path(sys.argv[2])
prepared = prepare(tiny_run.tiny(folder), tiny.quiet)
for pair in range(int(sys.argv[3])):
    path = folder / f"run-{pair}"
    children = []
    reader, writer = os.pipe()
    for seed in (1, 2):
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # Both go at once, when the last writer closes.
            try:
                config = tiny_run.tiny(folder, f"run_folder={path}", f"train.seed={seed}")
                with only_run_in(locate(path)):
                    RunFolder.create(config, prepared)
                os._exit(seed)
            except UserError as error:
                os._exit(10 if "another process" in str(error) or "already holds" in str(error) else 11)
        children.append(child)
    os.close(reader)
    os.close(writer)
    ends = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert ends in ([1, 10], [2, 10]), ends
    run = RunFolder(path)
    assert run.config.train.seed == ends[0], (run.config.train.seed, ends)
    assert load_tokenizer_of(run)
    assert {path.name for path in run.path.iterdir()} == {"config.toml", "run.json", "tokenizer"}
"""


@pytest.mark.slow
def test_if_two_start_at_the_same_moment_one_has_the_whole_run(tmp_path: Path):
    prepared_text(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", START, str(Path(__file__).parent), str(tmp_path), "20"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)


def test_a_start_that_fails_removes_what_it_made_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepared = prepared_text(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("trainer.runs.run_folder._write_record", fail)
    with pytest.raises(UserError, match=r"run' cannot be written: No space left on device\. Make room, or choose an"):
        create_alone(tiny(tmp_path), prepared)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="Make room"):
        create_alone(tiny(tmp_path), prepared)
    assert list((tmp_path / "run").iterdir()) == []
