"""Follows a run from another process: `trainer watch RUN`. It reads only the run's folder, and loads no TensorFlow.

The folder may be on a disk that hosts share or in an object store. On a disk the lock shows whether a process trains
there. An object store has no locks: there only the result and the time of the last report are known.
"""

import enum
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from trainer.config.schedule import examples_before
from trainer.errors import quoted
from trainer.exit_status import ExitStatus
from trainer.monitoring import tags
from trainer.monitoring.curves import CurveReader
from trainer.monitoring.events import Interval, Place
from trainer.monitoring.progress import News
from trainer.runs.run_changes import newest_step
from trainer.runs.run_folder import RECORD, RESULT, RunFolder
from trainer.runs.run_lock import is_training_in
from trainer.system.progress import Bar, shown
from trainer.system.storage import Location, Url, locate
from trainer.system.terminal import say

# How often the folder is read.
_POLL_SECS, _STORE_POLL_SECS = 1.0, 10.0
# A lock of another host may be invisible here, so a run that has just reported is not called killed.
_FRESH_SECS = 30.0
# After this long without a report a run in a store is said to be silent.
_SILENT_SECS = 600.0


class State(enum.Enum):
    """What is known about the process that trains a run."""

    TRAINS = "training"
    FINISHED = "finished"
    STOPPED = "stopped"
    KILLED = "killed"
    UNKNOWN = "no report"


class Report(NamedTuple):
    """The newest figures of a split.

    Attributes:
        step: the step of the report.
        values: the figures by the name of their curve.
    """

    step: int
    values: Mapping[str, float]


class Watched:
    """A run that another process trains, as its folder shows it.

    Args:
        run: the run.
        now: returns the time in seconds since 1970.
    """

    def __init__(self, run: RunFolder, now: Callable[[], float] = time.time) -> None:
        self.run = run
        self._now = now
        self._train = CurveReader(run.path / "logs" / "train")
        self._validation = CurveReader(run.path / "logs" / "validation")

    def read(self) -> None:
        """Reads what is new."""
        self.run = RunFolder(self.run.path)  # A run that goes on may have another length.
        self._train.read()
        self._validation.read()

    @property
    def newest(self) -> Report | None:
        """The newest report on the training; None if there is none."""
        return _newest(self._train)

    @property
    def evaluation(self) -> Report | None:
        """The newest report on the validation text; None if there is none."""
        return _newest(self._validation)

    @property
    def secs_since_report(self) -> float | None:
        """How long ago the run has reported something; None if it never has."""
        newest = max(self._train.wall_time, self._validation.wall_time)
        return max(0.0, self._now() - newest) if newest else None

    def state(self) -> State:
        """Returns what is known about the process that trains the run."""
        path, silence = self.run.path, self.secs_since_report
        locked = is_training_in(path)
        if locked:
            return State.TRAINS
        if (path / RESULT).is_file():
            return State.FINISHED
        if locked is None:
            return State.UNKNOWN if silence is None or silence > _SILENT_SECS else State.TRAINS
        if not (path / "lock").is_file():
            return State.STOPPED
        return State.TRAINS if silence is not None and silence < _FRESH_SECS else State.KILLED

    def place(self, step: int) -> Place:
        """Returns how far the run is after a step."""
        train = self.run.config.train
        epochs = self._train.points.get(tags.EPOCH, {}).get(step)
        total = self.run.total_steps or step
        num_epochs = train.num_epochs or (epochs * self._examples(total) / self._examples(step) if epochs else 0.0)
        return Place(step, total, epochs, round(num_epochs, 2))

    def news(self, report: Report) -> News:
        """Returns what a report on the training says."""
        return News(self.place(report.step), _interval(report.values), report.values)

    def secs_left(self, report: Report) -> float | None:
        """Returns how long the rest takes at the speed of a report, if all batches are full; None: unknown."""
        train, speed = self.run.config.train, report.values.get(tags.TOKENS_PER_SEC_OVERALL)
        if not speed or self.run.total_steps is None:
            return None
        left = self._examples(self.run.total_steps) - self._examples(report.step)
        return left * train.sequence_length / speed

    def _examples(self, step: int) -> int:
        return int(examples_before(self.run.config.train, step))

    def describe(self, state: State) -> str:
        """Returns a line on how the run is."""
        report, silence, path = self.newest, self.secs_since_report, self.run.path
        saved = newest_step(self.run)
        step = max(saved, 0 if report is None else report.step)
        ago = "it has reported nothing yet" if silence is None else f"its last report is {_age(silence)} old"
        at = f"{path}: step {step}/{self.run.total_steps or '?'}"
        resume = f"Step {saved} is saved; go on with: trainer train --resume {quoted(path)}"
        return {
            State.TRAINS: f"{at}, training; {ago}.",
            State.FINISHED: f"{at}, finished.",
            State.STOPPED: f"{at}, no process trains: the run was stopped, or ended with an error; {ago}. {resume}",
            State.KILLED: f"{at}, killed: its process holds no lock any more (or trains on a host whose locks this one "
            f"does not see); {ago}. {resume}",
            State.UNKNOWN: f"{at}, silent: {ago}. An object store has no locks, so its process may be gone.",
        }[state]


def follow(path: str, once: bool = False, poll_secs: float | None = None) -> ExitStatus:
    """Shows a run until it ends: in a progress bar on a terminal, elsewhere as lines.

    Args:
        path: the run's folder. Unless once is set, the run may begin later.
        once: whether to print one state, and end.
        poll_secs: how often to look; None: often on a disk, seldom in a store.

    Returns:
        How the run has ended; DONE if it is finished, or still trains.

    Raises:
        UserError: once is set and the folder holds no run, or the folder cannot be read.
    """
    folder = locate(path)
    poll_secs = poll_secs or (_STORE_POLL_SECS if isinstance(folder, Url) else _POLL_SECS)
    watched = Watched(RunFolder(folder) if once else _when_there(folder, poll_secs))
    watched.read()
    state = watched.state()
    say(watched.describe(state))
    if (report := watched.newest) is not None and (once or state is not State.TRAINS):
        say(watched.news(report).line(watched.secs_left(report)))
    if (scored := watched.evaluation) is not None:
        say(_line_of(watched.place(scored.step), scored.values))
    if not once and state in (State.TRAINS, State.UNKNOWN):
        with shown(say, "waiting", watched.run.total_steps, stays=True) as bar:
            state = _until_it_ends(watched, bar, poll_secs)
        say(watched.describe(state))
    return {State.STOPPED: ExitStatus.STOPPED, State.KILLED: ExitStatus.FAILED}.get(state, ExitStatus.DONE)


def _when_there(folder: Location, poll_secs: float) -> RunFolder:
    """Returns the run in a folder once it has begun."""
    is_said = False
    while not (folder / RECORD).is_file():
        if not is_said:
            say(f"{folder} holds no run yet; waiting until one begins there. Ctrl-C ends the waiting.")
            is_said = True
        time.sleep(poll_secs)
    return RunFolder(folder)


def _until_it_ends(watched: Watched, bar: Bar, poll_secs: float) -> State:
    """Shows each new report until the run ends; returns how it has ended."""
    seen, scored, was_silent = None, watched.evaluation, False
    while True:
        report, evaluation, state = watched.newest, watched.evaluation, watched.state()
        if report is not None and report != seen:
            news, bar.total = watched.news(report), watched.run.total_steps
            bar.known_secs_left = watched.secs_left(report)
            bar.update(report.step, news.states())
            if not bar.is_shown:
                say(news.line(bar.known_secs_left))
            seen = report
        if evaluation is not None and evaluation != scored:
            say(_line_of(watched.place(evaluation.step), evaluation.values))
            scored = evaluation
        if state is State.UNKNOWN and not was_silent:
            say(watched.describe(state))
        was_silent = state is State.UNKNOWN
        bar.update(what=state.value)
        if state not in (State.TRAINS, State.UNKNOWN):
            return state
        time.sleep(poll_secs)
        watched.read()


def _newest(reader: CurveReader) -> Report | None:
    step = max((step for points in reader.points.values() for step in points), default=None)
    if step is None:
        return None
    return Report(step, {tag: points[step] for tag, points in reader.points.items() if step in points})


def _interval(values: Mapping[str, float]) -> Interval:
    return Interval(
        num_steps=0,  # The curves do not hold it, and nothing shows it.
        num_skipped=int(values.get(tags.SKIPPED_STEPS, 0)),
        loss=values.get(tags.LOSS),
        grad_norm=values.get(tags.GRAD_NORM),
        clip_rate=values.get(tags.CLIP_RATE),
        input_share=values.get(tags.INPUT_SHARE, 0.0),
        tokens_per_sec_in_steps=values.get(tags.TOKENS_PER_SEC_IN_STEPS, 0.0),
        tokens_per_sec_overall=values.get(tags.TOKENS_PER_SEC_OVERALL, 0.0),
        learning_rate=values.get(tags.LEARNING_RATE, 0.0),
        loss_scale=values.get(tags.LOSS_SCALE),
    )


def _line_of(place: Place, values: Mapping[str, float]) -> str:
    """Returns a line on a score of the validation text, and of each of evaluation.sets."""
    parts = [f"loss {values.get(tags.LOSS, float('nan')):.4f} nats per token"]
    if tags.PERPLEXITY in values:
        parts.append(f"perplexity {values[tags.PERPLEXITY]:.2f}")
    for is_lossy in (False, True):
        if (tag := tags.bits_per_byte(is_lossy)) in values:
            parts.append(f"{values[tag]:.3f} bits per byte{' (of what the tokenizer keeps)' * is_lossy}")
    if tags.EXCESS in values:
        parts.append(f"{values[tags.EXCESS]:+.4f} nats per token above the text's own entropy")
    if tags.RAW_LOSS in values:
        parts.append(f"without the average of the weights {values[tags.RAW_LOSS]:.4f}")
    sets = sorted(tag.removeprefix(f"{tags.LOSS}/") for tag in values if tag.startswith(f"{tags.LOSS}/"))
    parts += [f"{name}: loss {values[tags.of_set(tags.LOSS, name)]:.4f}" for name in sets]
    return f"{place}  validation: {', '.join(parts)}"


def _age(secs: float) -> str:
    if secs < 90:
        return f"{secs:.0f} s"
    return f"{secs / 60:.0f} min" if secs < 90 * 60 else f"{secs / 3600:.1f} h"
