from pathlib import Path

import pytest
from tiny_run import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    prepared_text,
    refuse,
    tiny,
)

from trainer.errors import UserError
from trainer.runs.first_batch import check_first_batch
from trainer.runs.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tiny(tmp_path), prepared_text(tmp_path))


def test_another_order_of_the_batches_is_refused_and_another_release_reported(run: RunFolder):
    check_first_batch(run, "abc", refuse)
    run = RunFolder(run.path)
    check_first_batch(run, "abc", refuse)
    with pytest.raises(UserError, match=r"the batches of this run come in another order here\. It was started with Te"):
        check_first_batch(run, "abd", refuse)
    run.record(tensorflow="2.20.0")
    said: list[str] = []
    check_first_batch(run, "abc", said.append)
    assert len(said) == 1 and "was started with TensorFlow 2.20.0 and Keras" in said[0]
    assert "The batches are the same" in said[0]
