import shutil
from pathlib import Path

import pytest
from tiny_run import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    damage_one_bit,
    folder_of,
    prepared_text,
    tiny,
)

from trainer.errors import UserError
from trainer.runs.results import Evaluation, read_scores, write_result, write_scores
from trainer.runs.run_checkpoints import open_checkpoints
from trainer.runs.run_folder import RunFolder
from trainer.system.storage import locate


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tiny(tmp_path), prepared_text(tmp_path))


def test_a_result_that_cannot_be_written_is_reported_and_not_an_error(run: RunFolder):
    said: list[str] = []
    run.path = locate("s3://bucket/run")
    write_result(run, 2, Evaluation(1.0, 1, 1.0, False, None), {}, said.append)
    assert len(said) == 1 and said[0].startswith("s3://bucket/run/result.json cannot be written: s3://bucket/run/res")


def test_damaged_scores_are_an_error_that_names_them(run: RunFolder):
    write_scores(run, {10: 1.5})
    assert read_scores(run) == {10: 1.5}
    for damage in (
        lambda: damage_one_bit(folder_of(run) / "scores.json"),
        lambda: shutil.copy(folder_of(run) / "run.json", folder_of(run) / "scores.json"),
    ):
        damage()
        with pytest.raises(UserError, match=r"scores\.json is damaged: .* or delete it: the best checkpoint is then"):
            open_checkpoints(run)
    (folder_of(run) / "scores.json").unlink()
    assert read_scores(run) == {}
