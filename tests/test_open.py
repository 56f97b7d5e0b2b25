"""Laws of opening a model: one call for every kind of folder, and a mistake is reported before TensorFlow is loaded."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_run import folder_of, prepared_text, save_checkpoint, tiny  # type: ignore[import-not-found]

import trainer
from trainer.errors import UserError
from trainer.exchange.open import open_model, read_config
from trainer.runs.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    prepared = prepared_text(tmp_path)
    return RunFolder.create(tiny(tmp_path), prepared)


def test_a_run_and_its_checkpoint_open_as_the_same_model(run: RunFolder):
    weights = [save_checkpoint(run, step) for step in (1, 2)]
    newest = open_model(str(run.path))
    assert (newest.step, newest.folder, newest.config) == (2, run.path, run.config)
    assert newest.tokenizer.decode(newest.tokenizer.encode("the cat")) == "the cat"
    first = open_model(str(run.path), step=1)
    same = open_model(f"{run.path}/checkpoints/step_000000001")
    assert first.step == same.step == 1
    for variable, other in zip(first.model.variables, same.model.variables, strict=True):
        np.testing.assert_array_equal(variable, other)
        np.testing.assert_array_equal(variable, weights[0][variable.path])


def test_a_folder_that_cannot_be_opened_is_refused_by_its_name(run: RunFolder, tmp_path: Path):
    with pytest.raises(UserError, match="has no checkpoint yet; train on with: trainer train --resume"):
        open_model(str(run.path))
    for refuse in (open_model, read_config):
        with pytest.raises(UserError, match=rf"{tmp_path} is not a run folder: it has no run.json. Runs near it"):
            refuse(str(tmp_path))
        with pytest.raises(UserError, match="trains the GPT of its config, and not a model of"):
            refuse(str(run.path), build_model=lambda config, vocabulary_size: None)
        with pytest.raises(UserError, match="step='newest' is not a step of a checkpoint"):
            refuse(str(run.path), step="newest")


def test_settings_are_read_without_tensorflow(run: RunFolder):
    code = (
        "import sys; from trainer.exchange.open import read_config\n"
        f"assert read_config({str(folder_of(run))!r}).train.sequence_length == 8\n"
        "assert 'tensorflow' not in sys.modules and 'keras' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_damaged_keras_file_is_refused_whatever_is_damaged(run: RunFolder, tmp_path: Path):
    save_checkpoint(run, 1)
    file = tmp_path / "a.keras"
    trainer.export(str(run.path), "keras", str(file), say=lambda line: None)
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    damaged = tmp_path / "damaged.keras"
    for name in ("model.weights.h5", "assets/config.toml", "assets/export.json", "assets/tokenizer/settings.json"):
        for content in (None, b"junk{"):
            with zipfile.ZipFile(damaged, "w") as archive:
                for other, kept in contents.items():
                    if other != name or content is not None:
                        archive.writestr(other, content or b"" if other == name else kept)
            with pytest.raises(UserError, match=f"{damaged}: not a .keras file that trainer export wrote"):
                open_model(str(damaged))
    whole = file.read_bytes()
    place = whole.find(contents["model.weights.h5"][:8]) + len(contents["model.weights.h5"]) // 2
    damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match="Bad CRC-32"):
        open_model(str(damaged))
