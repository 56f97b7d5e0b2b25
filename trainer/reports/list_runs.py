"""Lists the runs in a folder: how far each has come, its losses and its age. TensorFlow is not loaded."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
import rich.table
import rich.text

from trainer.errors import UserError
from trainer.monitoring import tags
from trainer.monitoring.event_files import newest_points
from trainer.runs.results import read_scores
from trainer.runs.run_changes import newest_step
from trainer.runs.run_folder import RECORD, RESULT, RunFolder
from trainer.runs.run_lock import is_training_in
from trainer.system.storage import Location, Url, locate, reason_and_remedy
from trainer.system.terminal import console, printable, say

# Folders of a run, in which no other run is looked for.
_PARTS = {"checkpoints", "logs", "tokenizer"}
# From this width on the table has room for the speed.
_WIDE = 96


class Row(NamedTuple):
    """What the list has about a run.

    Attributes:
        name: the run's folder.
        state: training, finished, stopped, killed (its process left a lock), "not finished" (in a store or on a
            file system without locks, which do not tell more), or damaged.
        step: the newest step: of a checkpoint, or of a point of the curves if the run is training.
        total_steps: the number of steps of the run; None: it is by epochs, and was never started.
        best_loss: the lowest validation loss in nats per token; None: nothing was scored.
        best_step: the step that has it.
        loss: the newest training loss in nats per token.
        tokens_per_sec: the newest speed, with saving, scoring and samples.
        age_secs: the seconds since a file of the run was written; None in a store.
        parent: the run that it comes from, with the step.
        fault: what is wrong with a damaged run.
    """

    name: str
    state: str
    step: int | None = None
    total_steps: int | None = None
    best_loss: float | None = None
    best_step: int | None = None
    loss: float | None = None
    tokens_per_sec: float | None = None
    age_secs: float | None = None
    parent: str | None = None
    fault: str | None = None

    def figures(self) -> dict[str, Any]:
        """Returns the row as JSON can hold it; None if a figure is not a number: a loss may be NaN."""
        is_number = (not isinstance(value, float) or math.isfinite(value) for value in self)
        return {
            name: value if known else None
            for (name, value), known in zip(self._asdict().items(), is_number, strict=True)
        }


def print_runs(path: str, as_json: bool) -> None:
    """Prints a table of the runs in a folder, the one that was written last at the top.

    Args:
        path: the folder. Runs in folders below it are listed, too.
        as_json: whether to print a JSON object for each run instead, a line each.

    Raises:
        UserError: there is no such folder, or no run is in it.
    """
    folder = locate(path)
    rows = sorted(map(_row, find_runs(folder)), key=lambda row: (row.age_secs is None, row.age_secs, row.name))
    if not rows:
        there = "has no runs in it" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"{folder} {there}. Start one with: trainer train quickstart; or name the folder that has runs: trainer "
            "runs FOLDER"
        )
    if as_json:
        for row in rows:
            print(json.dumps(row.figures()), flush=True)
        return
    screen = console(sys.stdout)
    screen.print(_table(rows, folder, screen.width))
    for row in rows:
        if row.fault is not None:
            say(f"{row.name}: {row.fault}")


def find_runs(folder: Location) -> Iterator[Location]:
    """Yields the folders of the runs in a folder and below it; the folder itself if it is a run."""
    yield from _find_runs(folder, set())


def _find_runs(folder: Location, seen: set[Path]) -> Iterator[Location]:
    if isinstance(folder, Path):
        real = folder.resolve()
        if real in seen:  # A link leads here, perhaps from below.
            return
        seen.add(real)
    is_run = (folder / RECORD).is_file()
    if is_run:
        yield folder
    try:
        entries: Iterator[Location] = iter(folder.iterdir())
        names = sorted(entries, key=lambda each: each.name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for each in names:
        # What this user may not look into is left out, and does not hide what is beside it.
        with contextlib.suppress(PermissionError):
            if not each.name.startswith(".") and not (is_run and each.name in _PARTS) and each.is_dir():
                yield from _find_runs(each, seen)


def _row(folder: Location) -> Row:
    age_secs = None
    try:
        age_secs = _age_secs(folder)
        run = RunFolder(folder)
        scores = read_scores(run)
        points = newest_points(folder / "logs" / "train", (tags.LOSS, tags.TOKENS_PER_SEC_OVERALL))
        step = newest_step(run)
        state = state_of(run, step)
    except UserError as error:
        return Row(str(folder), "damaged", age_secs=age_secs, fault=str(error))
    except OSError as error:
        fault = f"{error.filename or folder} cannot be read: {reason_and_remedy(error)}."
        return Row(str(folder), "damaged", age_secs=age_secs, fault=fault)
    loss, speed = points.get(tags.LOSS), points.get(tags.TOKENS_PER_SEC_OVERALL)
    if state == "training" and loss is not None:
        step = max(step, loss.step)
    best = min((at for at in scores if math.isfinite(scores[at])), key=lambda at: (scores[at], at), default=None)
    return Row(
        str(folder),
        state,
        step,
        run.total_steps,
        None if best is None else scores[best],
        best,
        None if loss is None else loss.value,
        None if speed is None else speed.value,
        age_secs,
        parent_of(run),
    )


def state_of(run: RunFolder, step: int) -> str:
    """Returns what a run does, given its newest step; see `Row.state`."""
    is_training = is_training_in(run.path)
    if is_training:
        return "training"
    if step == run.total_steps and (run.path / RESULT).is_file():
        return "finished"
    if is_training is None:
        return "not finished"
    return "killed" if (run.path / "lock").is_file() else "stopped"


def parent_of(run: RunFolder) -> str | None:
    """Returns the nearest parent of a run, with the step; None if it has none."""
    parents: list[dict[str, Any]] = run.facts.get("parents", [])
    if not parents:
        return None
    at = parents[0].get("step")
    return str(parents[0]["from"]) + ("" if at is None else f"@{at}")


def _age_secs(folder: Location) -> float | None:
    """Returns the seconds since a file of a run was written."""
    if isinstance(folder, Url):
        return None
    logs = folder / "logs"
    files = [*folder.iterdir(), *logs.glob("*/events.out.tfevents.*"), *folder.glob("checkpoints/*")]
    newest = 0.0
    for file in files:
        try:
            newest = max(newest, file.stat().st_mtime)
        except FileNotFoundError:  # The process that trains has removed it.
            continue
    return max(0.0, time.time() - newest)


def _table(rows: list[Row], folder: Location, width: int) -> rich.table.Table:
    is_wide = width >= _WIDE
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("step", "best (step)", "loss", *(["tokens/s"] if is_wide else []), "age"):
        table.add_column(name, justify="right", no_wrap=True)
    if any(row.parent for row in rows):
        table.add_column("from", overflow="fold")
    for row in rows:
        best = "" if row.best_loss is None else f"{row.best_loss:.4f} ({row.best_step})"
        step = "" if row.step is None else f"{row.step}/{row.total_steps or '?'}"
        loss = "" if row.loss is None else f"{row.loss:.4f}"
        speed = [] if not is_wide else ["" if row.tokens_per_sec is None else f"{row.tokens_per_sec:,.0f}"]
        cells = [_shown(row.name, folder), row.state, step, best, loss, *speed, short_time(row.age_secs)]
        cells += [_shown(row.parent, folder)] if row.parent else []
        table.add_row(*map(rich.text.Text, cells))
    return table


def _shown(path: str, folder: Location) -> str:
    return printable(path.removeprefix(f"{folder}/")).replace("\n", "\\n")


def short_time(secs: float | None) -> str:
    """Returns a time by its largest unit, such as "5 min"; "" if it is not known."""
    if secs is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if secs >= size:
            return f"{secs / size:.0f} {unit}"
    return f"{secs:.0f} s"
