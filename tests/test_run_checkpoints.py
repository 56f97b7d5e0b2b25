import errno
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    folder_of,
    prepared_text,
    save_checkpoint,
    tiny,
)

from trainer.config.file import load_config
from trainer.errors import UserError
from trainer.runs import run_checkpoints
from trainer.runs.array_file import StoredArray
from trainer.runs.checkpoint import Checkpoints
from trainer.runs.parentage import Beginning
from trainer.runs.results import write_scores
from trainer.runs.run_checkpoints import (
    facts_of,
    find_checkpoint,
    lasting,
    load_model,
    open_checkpoints,
    write_beginning,
)
from trainer.runs.run_data import find_prepared, load_tokenizer_of
from trainer.runs.run_folder import RunFolder, run_and_step
from trainer.system.manifest import DamagedError
from trainer.system.storage import OpenedFile, copy_folder, locate, remove_tree


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tiny(tmp_path, "train.total_steps=6"), prepared_text(tmp_path))


def test_run_is_usable_without_its_data(run: RunFolder, tmp_path: Path):
    save_checkpoint(run, 1)
    shutil.rmtree(tmp_path / "prepared")
    load_model(run)


def test_model_comes_back_with_the_newest_weights(run: RunFolder):
    save_checkpoint(run, 1)
    weights = save_checkpoint(run, 2)
    model, checkpoint = load_model(run)
    assert checkpoint.step == 2
    for variable in model.variables:
        np.testing.assert_array_equal(variable.numpy(), weights[variable.path])


def test_model_that_comes_back_knows_bos(run: RunFolder):
    save_checkpoint(run, 1)
    model, _ = load_model(run)
    assert model.bos_id == load_tokenizer_of(run).bos_id == find_prepared(run).bos_id


def test_run_without_a_checkpoint_has_no_model(run: RunFolder):
    with pytest.raises(UserError) as error:
        load_model(run)
    assert str(error.value) == f"{run.path} has no checkpoint yet; train on with: trainer train --resume {run.path}"


def test_checkpoint_of_another_model_is_refused(run: RunFolder, tmp_path: Path):
    save_checkpoint(run, 1, tiny(tmp_path, "model.num_layers=2"))
    with pytest.raises(
        UserError, match=r"step_000000001 does not hold this model: it lacks nothing and has \['gpt/block_1"
    ):
        load_model(run)
    save_checkpoint(run, 2, tiny(tmp_path, "model.hidden_dim=8"))
    with pytest.raises(UserError, match=r"step_000000002 has gpt/.* as float32\[.*\], the model as float32\["):
        load_model(run)


def test_checkpoints_of_another_run_are_not_resumed(run: RunFolder, tmp_path: Path):
    other = RunFolder.create(tiny(tmp_path, f"run_folder={tmp_path}/other", "train.seed=7"), find_prepared(run))
    checkpoints = open_checkpoints(other)
    checkpoints.save(5, {"weights": {}}, facts_of(other))
    checkpoints.wait()
    shutil.copytree(folder_of(other) / "checkpoints", folder_of(run) / "checkpoints")
    with pytest.raises(UserError, match=r"step 5: it is of another run: train\.seed=0 \(was 7\)"):
        load_model(run)
    # Another micro-batch, or place of the data, makes no other run.
    same = RunFolder(run.path, ["train.micro_batch_size=1", "log.every_steps=3"])
    checkpoints = open_checkpoints(same)
    checkpoints.save(6, {"weights": {}}, facts_of(same))
    checkpoints.wait()
    said: list[str] = []
    newest = find_checkpoint(run, open_checkpoints(run, said.append))
    assert newest is not None and newest.step == 6


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(run: RunFolder):
    assert find_checkpoint(run, open_checkpoints(run)) is None
    save_checkpoint(run, 1)
    shutil.rmtree(folder_of(run) / "checkpoints")
    with pytest.raises(UserError) as error:
        find_checkpoint(run, open_checkpoints(RunFolder(run.path)))
    assert str(error.value) == (
        f"{run.path}/checkpoints is empty, though this run has saved checkpoints. Bring them back (is a disk not "
        f"mounted?), or begin again in another folder: trainer train {run.path}/config.toml run_folder={run.path}-2"
    )
    again = RunFolder.create(
        load_config(folder_of(run) / "config.toml", [f"run_folder={run.path}-2"]), find_prepared(run)
    )
    assert find_checkpoint(again, open_checkpoints(again)) is None


def test_a_checkpoint_is_found_by_its_step_by_best_and_by_its_folder(run: RunFolder):
    for step in (1, 2, 3):
        save_checkpoint(run, step)
    with pytest.raises(
        UserError, match=r"no checkpoint was scored on the validation text, so the best one is not known"
    ):
        load_model(run, step="best")
    write_scores(run, {1: 2.5, 2: 2.25, 3: 2.75})
    assert [load_model(run, step=step)[1].step for step in (None, 1, "best")] == [3, 1, 2]
    with pytest.raises(UserError, match=r"run has no checkpoint of step 7; it has: 1, 2, 3\."):
        load_model(run, step=7)
    folder = f"{run.path}/checkpoints/step_000000002"
    assert run_and_step(folder) == run_and_step(f"{folder}/") == run_and_step(folder, 2) == (str(run.path), 2)
    assert run_and_step("checkpoints/step_000000002") == (".", 2)
    assert run_and_step(Path(folder)) == (str(run.path), 2) and run_and_step(run.path) == (str(run.path), None)  # type: ignore[arg-type]
    assert run_and_step("RUN", "best") == ("RUN", "best") and run_and_step("RUN", "010") == ("RUN", 10)
    for text in ("bset", "-1", "1.5", "", "9" * 5_000):
        with pytest.raises(UserError, match=r"is not a step of a checkpoint; give a number of steps, or 'best'\."):
            run_and_step("RUN", text)
    with pytest.raises(
        UserError, match=r"step_000000002 and step='best' are two different checkpoints; leave out one of them\."
    ):
        run_and_step(folder, "best")


@pytest.mark.parametrize("loss", ["nothing", "content", "file"])
def test_a_reader_reads_the_checkpoint_that_it_found_or_goes_on_to_the_one_that_took_its_place(
    loss: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    weights = save_checkpoint(run, 1)
    verified, read = run_checkpoints.find_checkpoint, OpenedFile.read
    num_failures = 0

    def fail_in(folder: Path) -> Any:
        def read_or_fail(self: OpenedFile, start: int, num_bytes: int) -> bytes:
            nonlocal num_failures
            if str(self._path).startswith(str(folder)):
                num_failures += 1
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
            return read(self, start, num_bytes)

        return read_or_fail

    def then_replaced(run: RunFolder, *arguments: Any) -> Any:
        found: Any = verified(run, *arguments)
        if found.step == 1:
            save_checkpoint(run, 2)
            # A file on a disk stays as long as it is open, but one in a store is lost.
            if loss == "content":
                os.truncate(found.folder / "weights.safetensors", 0)
            if loss == "file":
                monkeypatch.setattr(OpenedFile, "read", fail_in(found.folder))
            shutil.rmtree(found.folder)
        return found

    monkeypatch.setattr(run_checkpoints, "find_checkpoint", then_replaced)
    model, checkpoint = load_model(run)
    assert checkpoint.step == (1 if loss == "nothing" else 2)
    assert num_failures == (1 if loss == "file" else 0)
    for variable in model.variables:
        np.testing.assert_array_equal(variable.numpy(), weights[variable.path])


def test_a_model_that_does_not_fit_is_refused_at_once_though_the_run_trains_on(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    save_checkpoint(run, 1)
    tries = []

    def fail(*arguments: Any) -> Any:
        tries.append(1)
        save_checkpoint(run, 1 + len(tries))
        raise UserError("no such model")

    monkeypatch.setattr(run_checkpoints, "built", fail)
    with pytest.raises(UserError, match="no such model"):
        load_model(run)
    assert tries == [1]


def test_arrays_from_a_store_last_and_those_of_a_disk_are_read_when_they_are_used(run: RunFolder, tmp_path: Path):
    save_checkpoint(run, 1)
    store = f"ram://{tmp_path.name}/checkpoints"
    copy_folder(run.path / "checkpoints", locate(store))
    for place, kind in ((run.path / "checkpoints", StoredArray), (store, np.ndarray)):
        checkpoint = Checkpoints(place).of_step(1)
        arrays = lasting(checkpoint.arrays("weights"), checkpoint)
        expected = {name: np.asarray(array) for name, array in checkpoint.arrays("weights").items()}
        remove_tree(checkpoint.folder)
        assert {type(array) for array in arrays.values()} == {kind}
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(array), expected[name])


def test_a_parent_that_is_damaged_while_it_is_copied_is_named_and_not_the_new_folder(run: RunFolder, tmp_path: Path):
    save_checkpoint(run, 1)
    checkpoint = find_checkpoint(run, open_checkpoints(run))
    assert checkpoint is not None
    beginning = Beginning(0, {"weights": checkpoint.arrays("weights")}, [])
    file = f"{run.path}/checkpoints/step_000000001/weights.safetensors"
    os.truncate(file, 0)
    config = tiny(tmp_path, "train.total_steps=6", f"run_folder={tmp_path}/new")
    with pytest.raises(DamagedError) as error:
        write = functools.partial(write_beginning, beginning)
        RunFolder.create(config, prepared_text(tmp_path), write_first=write)
    assert str(error.value) == f"{file} is damaged: its length or its SHA-256 differs from the manifest."
    assert not list((tmp_path / "new").iterdir())
