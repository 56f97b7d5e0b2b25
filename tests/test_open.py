"""Laws of opening a model: one call for every kind of folder, and a mistake is reported before TensorFlow is loaded."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import folder_of, prepared_text, save_checkpoint, tiny  # type: ignore[import-not-found]

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
