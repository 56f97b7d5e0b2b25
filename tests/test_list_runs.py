import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from watched_run import evaluation_at, finish, loss_at, record, saved, watch  # type: ignore[import-not-found]

from trainer.cli import main
from trainer.reports.list_runs import Row, find_runs, short_time
from trainer.runs.results import write_scores
from trainer.runs.run_lock import only_run_in
from trainer.system.storage import Url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in every state: finished, stopped, killed, damaged, and one without a step; the newest file of each is as
    old as its place in this list in hours.
    """
    folder = tmp_path_factory.mktemp("runs")
    done = record(folder / "done")
    watch(done, 0, 40)
    finish(done)
    stopped = record(folder / "deep/er/stopped", facts={"parents": [{"kind": "fork", "from": "runs/done", "step": 20}]})
    watch(stopped, 0, 30)
    write_scores(stopped, {5: math.nan, 10: 3.0, 20: 2.5, 30: 2.75})
    saved(stopped, 30)
    killed = record(folder / "killed")
    watch(killed, 0, 20)
    watch(killed, 10, 14, above=1.0)  # Resumed from step 10: the points after it are void.
    saved(killed, 10)
    (folder / "killed/lock").touch()
    record(folder / "begun", "train.total_steps=none", "train.num_epochs=2")
    record(folder / "damaged")
    (folder / "damaged/run.json").write_text("{}")
    for hours, name in enumerate(("done", "deep/er/stopped", "killed", "begun", "damaged"), 1):
        for path in (folder / name).rglob("*"):
            os.utime(path, times=(time.time() - 3600 * hours,) * 2)
    return folder


def listed(folder: object, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main(["runs", str(folder), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {Path(row["name"]).name: row for row in rows}


def test_runs_in_every_state_are_listed_the_newest_first(folder: Path, capsys: pytest.CaptureFixture[str]):
    rows = listed(folder, capsys)
    assert {name: row["state"] for name, row in rows.items()} == {
        "done": "finished", "stopped": "stopped", "killed": "killed", "begun": "stopped", "damaged": "damaged",
    }  # fmt: skip
    assert list(rows) == ["done", "stopped", "killed", "begun", "damaged"]
    assert [row["age_secs"] for row in rows.values()] == pytest.approx([3600, 7200, 10800, 14400, 18000], abs=60)
    assert [row["step"] for row in rows.values()] == [40, 30, 10, 0, None]
    assert [row["total_steps"] for row in rows.values()] == [40, 40, 40, None, None]
    done, stopped, killed, begun, damaged = rows.values()
    assert (done["best_loss"], done["best_step"]) == (pytest.approx(evaluation_at(40).loss), 40)
    assert (stopped["best_loss"], stopped["best_step"], stopped["parent"]) == (2.5, 20, "runs/done@20")
    assert done["loss"] == pytest.approx(loss_at(40)) and done["tokens_per_sec"] == 800.0
    assert killed["loss"] == pytest.approx(loss_at(14, above=1.0)) and killed["best_loss"] is None
    assert begun["loss"] is begun["best_step"] is begun["parent"] is None
    assert "run.json is damaged" in str(damaged["fault"])


def test_a_loss_that_is_no_number_is_none_in_json():
    figures = Row("runs/x", "killed", step=3, loss=math.nan, best_loss=2.0).figures()
    assert (figures["loss"], figures["best_loss"], figures["step"], figures["name"]) == (None, 2.0, 3, "runs/x")


def test_the_table_fits_80_columns_and_names_what_is_damaged(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs", str(folder)]) == 0
    table, _, fault = capsys.readouterr().out.partition("\n" + str(folder))
    assert max(map(len, table.splitlines())) <= 80
    assert "2.5000 (20)" in table and " 40/40 " in table and " 1 h" in table and "0/?" in table
    assert "/damaged/run.json is damaged" in fault
    # A long name goes on in the next line; nothing of it is cut off.
    at = next(line.index("from") for line in table.splitlines() if "from" in line)
    assert "".join(line[at:].strip() for line in table.splitlines()[1:] if "─" not in line) == "fromruns/done@20"
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["runs", str(folder)]) == 0
    assert "tokens/s" not in table and "tokens/s" in capsys.readouterr().out


def test_a_run_that_is_being_trained_shows_the_step_of_its_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = record(tmp_path / "run")
    watch(run, 0, 8)
    with only_run_in(tmp_path / "run"):
        row = listed(tmp_path, capsys)["run"]
    assert (row["state"], row["step"]) == ("training", 8)
    assert listed(tmp_path / "run", capsys)["run"]["state"] == "stopped"


def test_links_are_followed_once_and_folders_of_a_run_are_not_searched(tmp_path: Path):
    record(tmp_path / "a/run")
    record(tmp_path / "a/run/checkpoints/step_000000001")
    record(tmp_path / ".hidden")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "a/same").symlink_to(tmp_path / "a/run")
    assert list(find_runs(tmp_path)) == [tmp_path / "a/run"]


def test_runs_in_a_store_are_listed(capsys: pytest.CaptureFixture[str]):
    Url("ram://listed/one").mkdir()
    Url("ram://listed/one/run.json").write_text("{}")
    rows = listed("ram://listed", capsys)
    assert rows["one"]["state"] == "damaged" and rows["one"]["age_secs"] is None


def test_a_folder_without_runs_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path, what in ((tmp_path, "has no runs in it"), (tmp_path / "nothing", "is not a folder")):
        assert main(["runs", str(path)]) == 2
        assert f"{path} {what}. Start one with: trainer train quickstart" in capsys.readouterr().err


def test_a_time_is_shown_by_its_largest_unit():
    assert [short_time(secs) for secs in (None, 0, 59, 60, 3599, 3600, 86400 * 3)] == [
        "", "0 s", "59 s", "1 min", "60 min", "1 h", "3 d",
    ]  # fmt: skip


def test_what_may_not_be_read_hides_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("open", "secret", "locked/run"):
        record(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "locked/run")
    stat, iterdir = Path.stat, Path.iterdir

    def stat_outside(path: Path, **options: Any) -> os.stat_result:
        if path.parent.name == "locked" or path.name == "link":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    def iterdir_outside(path: Path) -> Iterator[Path]:
        if path.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    # Not chmod: root may read everything.
    monkeypatch.setattr(Path, "stat", stat_outside)
    monkeypatch.setattr(Path, "iterdir", iterdir_outside)
    rows = listed(tmp_path, capsys)
    assert {name: row["state"] for name, row in rows.items()} == {"open": "stopped", "secret": "damaged"}
    assert rows["secret"]["fault"] == (
        f"{tmp_path}/secret cannot be read: Permission denied. Give this user the permission to do that."
    )
