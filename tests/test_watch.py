"""Laws of `trainer watch`: it shows what a run's folder holds, and ends as the run ends."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import prepared_text, save_checkpoint, tiny  # type: ignore[import-not-found]

from trainer.errors import UserError
from trainer.exit_status import ExitStatus
from trainer.monitoring import tags
from trainer.monitoring.event_log import EventLog
from trainer.reports import watch
from trainer.reports.watch import Watched, follow
from trainer.runs.run_folder import RunFolder
from trainer.runs.run_lock import is_training_in, only_run_in

INTERVAL = {
    tags.LOSS: 2.0, tags.PERPLEXITY: 7.39, tags.GRAD_NORM: 0.5, tags.LEARNING_RATE: 1e-3, tags.INPUT_SHARE: 0.01,
    tags.TOKENS_PER_SEC_IN_STEPS: 900.0, tags.TOKENS_PER_SEC_OVERALL: 800.0, tags.EPOCH: 0.5,
}  # fmt: skip
SCORE = {tags.LOSS: 2.5, tags.PERPLEXITY: 12.18, tags.bits_per_byte(True): 3.6, tags.EXCESS: 0.25,
         tags.of_set(tags.LOSS, "books"): 2.75}  # fmt: skip
ROW = "loss 2.0000  perplexity 7.39  rate 1.00e-03  norm 0.50  900 tokens/s in steps, 800 overall  input 1.0%"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of 2000 steps that has not reported anything."""
    prepared = prepared_text(tmp_path)
    return RunFolder.create(tiny(tmp_path, "train.total_steps=2000"), prepared)


def log_of(run: RunFolder, first_step: int = 0) -> EventLog:
    return EventLog(run.path / "logs/train", first_step)


def finish(run: RunFolder) -> None:
    (run.path / "result.json").write_text("{}")


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_run_is_followed_from_before_it_begins_until_it_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny(tmp_path, "train.total_steps=2000")
    prepared = prepared_text(tmp_path)

    def train() -> None:
        time.sleep(0.1)
        with only_run_in(tmp_path / "run"):
            run = RunFolder.create(config, prepared)
            log = log_of(run)
            for step in (500, 1000):
                log.scalars(step, INTERVAL)
                time.sleep(0.1)
            EventLog(run.path / "logs/validation", 0).scalars(1000, SCORE)
            time.sleep(0.2)
            finish(run)

    thread = in_background(train)
    assert follow(str(tmp_path / "run"), poll_secs=0.02) is ExitStatus.DONE
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/run holds no run yet; waiting until one begins there. Ctrl-C ends the waiting."
    rows = [line for line in lines if "rate" in line]
    # 1000 steps of 2 x 8 tokens at 800 a second are 20 s.
    assert rows[-2:] == [f"step 500/2000  epoch 0.50/2  {ROW}  0:00:30 left",
                         f"step 1000/2000  epoch 0.50/1  {ROW}  0:00:20 left"]  # fmt: skip
    assert (
        "step 1000/2000  epoch 0.50/1  validation: loss 2.5000 nats per token, perplexity 12.18, 3.600 bits per byte "
        "(of what the tokenizer keeps), +0.2500 nats per token above the text's own entropy, books: loss 2.7500"
    ) in lines
    assert lines[-1] == f"{tmp_path}/run: step 1000/2000, finished."


def test_one_state_of_each_kind_of_run(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert isinstance(run.path, Path)
    save_checkpoint(run, 300)
    log = log_of(run)
    log.scalars(500, INTERVAL)

    def once() -> tuple[ExitStatus, str]:
        status = follow(str(run.path), once=True)
        return status, capsys.readouterr().out.splitlines()[0].removeprefix(f"{run.path}: step 500/2000, ")

    with only_run_in(run.path):
        assert once()[1].startswith("training; its last report is 0 s old.")
        (run.path / "result.json").write_text("{}")  # Of an earlier end: the run goes on.
        assert once() == (ExitStatus.DONE, "training; its last report is 0 s old.")
    assert once() == (ExitStatus.DONE, "finished.")
    (run.path / "result.json").unlink()
    advice = f"Step 300 is saved; go on with: trainer train --resume {run.path}"
    status, line = once()
    assert status is ExitStatus.STOPPED and line.startswith("no process trains: the run was stopped") and advice in line
    (run.path / "lock").touch()  # A killed process leaves it.
    assert once()[1].startswith("training")  # Its last report is too new.
    monkeypatch.setattr(watch, "_FRESH_SECS", 0.0)
    status, line = once()
    assert status is ExitStatus.FAILED and line.startswith("killed: ") and advice in line


def test_a_run_in_a_store_is_silent_after_a_while(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "is_training_in", lambda folder: None)
    watched = Watched(run)
    assert watched.describe(watched.state()).endswith("it has reported nothing yet. An object store has no locks, so "
                                                      "its process may be gone.")  # fmt: skip
    log_of(run).scalars(500, INTERVAL)
    watched.read()
    assert watched.state() is watch.State.TRAINS
    later = Watched(run, now=lambda: time.time() + 7200)
    later.read()
    assert "silent: its last report is 2.0 h old." in later.describe(later.state())


def test_a_resumed_run_that_takes_steps_again_is_followed_on(run: RunFolder, capsys: pytest.CaptureFixture[str]):
    log_of(run).scalars(900, INTERVAL)
    watched = Watched(run)
    watched.read()
    assert watched.newest is not None and watched.newest.step == 900
    log = log_of(run, first_step=300)
    watched.read()
    assert watched.newest is None
    log.scalars(400, INTERVAL)
    watched.read()
    assert watched.newest is not None and watched.newest.step == 400


def test_asking_for_a_lock_does_not_keep_a_run_from_starting(tmp_path: Path):
    assert is_training_in(tmp_path) is False
    with only_run_in(tmp_path):
        assert is_training_in(tmp_path) is True
        with pytest.raises(UserError, match="is being trained in by another process"), only_run_in(tmp_path):
            pass
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            is_training_in(tmp_path)

    thread = in_background(ask)
    try:
        for _ in range(300):
            with only_run_in(tmp_path):
                pass
    finally:
        is_over.set()
        thread.join()


def test_once_needs_a_run(tmp_path: Path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} is not a run folder")):
        follow(str(tmp_path), once=True)


def test_watching_loads_no_tensorflow(run: RunFolder):
    log_of(run).scalars(500, INTERVAL)
    program = (
        "import json, sys; from trainer.cli import main; status = main(['watch', sys.argv[1], '--once']); "
        "print(json.dumps([status, 'tensorflow' in sys.modules]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(run.path)], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(found.splitlines()[-1]) == [ExitStatus.STOPPED, False]


def test_a_loss_that_is_read_before_its_perplexity_is_shown(run: RunFolder):
    log_of(run).scalars(500, {tags.LOSS: 2.0, tags.MFU_OVERALL: 0.5})  # The rest of the report is not written yet.
    watched = Watched(run)
    watched.read()
    assert watched.newest is not None
    assert "loss 2.0000  perplexity 7.39  " in watched.news(watched.newest).line(None)
