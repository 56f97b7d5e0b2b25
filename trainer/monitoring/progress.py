"""Shows what a run reports: a progress bar on a terminal or in a notebook, and plain lines elsewhere."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

from trainer.config.schedule import full_steps_between
from trainer.config.settings import TrainConfig
from trainer.monitoring import tags
from trainer.monitoring.events import Interval, Place, Sink
from trainer.runs.results import Evaluation
from trainer.system.progress import Bar, clock, shown
from trainer.system.terminal import Say, printable


class TrainingProgress(Sink):
    """Shows the progress of a run.

    Args:
        train: the batch size and its warm-up, which decide how long the rest takes.
        first_step: the step that this process goes on from.
        total_steps: the number of steps of the run.
        terminal: the stream for lines and the progress bar; None: standard output.
        say: prints a line, in place of terminal; then there is no progress bar. None: terminal is used.
    """

    def __init__(
        self,
        train: TrainConfig,
        first_step: int,
        total_steps: int,
        terminal: TextIO | None = None,
        say: Say | None = None,
    ) -> None:
        self._train = train
        self._first_step = first_step
        self._total_steps = total_steps
        self._terminal = terminal or sys.stdout
        self._say = say
        self._started = time.monotonic()
        self._bar = Bar("")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Shows the progress bar."""
        self._started = time.monotonic()
        # The first call of the compiled loop also compiles it.
        with shown(self._say or self._terminal, "compiling", self._total_steps, stays=True) as self._bar:
            self._bar.work_between = self._full_steps_between
            self._bar.update(self._first_step)
            yield
        self._bar = Bar("")

    def say(self, line: str) -> None:
        """Prints a line. If there is a progress bar, the line is above it and is wrapped between words."""
        if self._say is not None:
            self._say(line)
        elif self._bar.is_shown:
            self._bar.print(line)
        else:
            print(printable(line), file=self._terminal, flush=True)

    @contextlib.contextmanager
    def doing(self, place: Place, what: str) -> Iterator[None]:
        """Shows what is done in this block: in the progress bar, or as a line."""
        if not self._bar.is_shown:
            self.say(f"{place}  {what}")
        self._bar.update(what=what)
        try:
            yield
        finally:
            self._bar.update(what="training")

    def part(self, what: str, done: int, total: int | None) -> None:
        """Shows in the progress bar how much of what `doing` names is done."""
        self._bar.update(what=f"{what} {done:,}" if total is None else f"{what} {done:,}/{total:,}")

    def advance(self, place: Place) -> None:
        """Moves the progress bar."""
        self._bar.update(place.step, what="training")

    def interval(self, place: Place, interval: Interval, values: Mapping[str, float]) -> None:
        """Shows the loss and the speed: in the progress bar, or as a line."""
        news = News(place, interval, values)
        if self._bar.is_shown:
            self._bar.update(place.step, news.states())
        else:
            self.say(news.line(self._secs_left(place)))

    def evaluation(self, place: Place, evaluation: Evaluation, values: Mapping[str, float]) -> None:
        """Prints a line for the validation text and for each of evaluation.sets."""
        self.say(f"{place}  validation: {evaluation}")
        for name, score in evaluation.sets.items():
            self.say(f"{place}  {name}: {score}")

    def _secs_left(self, place: Place) -> float:
        done = self._full_steps_between(self._first_step, place.step)
        per_step = (time.monotonic() - self._started) / (done or 1.0)
        return per_step * self._full_steps_between(place.step, place.total_steps)

    def _full_steps_between(self, step: float, later: float) -> float:
        return full_steps_between(self._train, step, later)


class News:
    """What is said about the steps since the last report.

    Args:
        place: how far the run is.
        interval: the steps.
        values: the figures of the report, by the name of their curve.
    """

    def __init__(self, place: Place, interval: Interval, values: Mapping[str, float]) -> None:
        self._place, self._interval = place, interval
        self._loss = self._learned = "no step was applied"
        if interval.loss is not None:
            self._loss = f"loss {interval.loss:.4f}"
            # A reader can find the loss in the file before the figures that are written after it.
            perplexity = values.get(tags.PERPLEXITY, math.exp(min(interval.loss, 700.0)))
            self._learned = f"{self._loss}  perplexity {perplexity:.2f}"
        self._norm = "" if interval.grad_norm is None else f"norm {interval.grad_norm:.2f}  "
        in_steps, overall = interval.tokens_per_sec_in_steps, interval.tokens_per_sec_overall
        self._speed = f"{in_steps:,.0f} tokens/s in steps, {overall:,.0f} overall"
        self._short_speed = f"{overall:,.0f} tokens/s"
        if {tags.MFU_IN_STEPS, tags.MFU_OVERALL} <= values.keys():
            mfu = f"mfu {values[tags.MFU_IN_STEPS]:.1%} in steps, {values[tags.MFU_OVERALL]:.1%} overall"
            self._speed += f"  {mfu}"

    def states(self) -> list[str]:
        """Returns the news for a progress bar, from long to short."""
        epoch = self._place.epoch()
        return [
            f"{epoch}{self._learned}  {self._norm}{self._speed}",
            f"{epoch}{self._learned}  {self._speed}",
            f"{epoch}{self._loss}  {self._speed}",
            f"{epoch}{self._learned}  {self._short_speed}",
            f"{epoch}{self._loss}  {self._short_speed}",
            f"{self._loss}  {self._short_speed}",
            self._loss,
        ]

    def line(self, secs_left: float | None) -> str:
        """Returns the news as a line."""
        return (
            f"{self._place}  {self._learned}  rate {self._interval.learning_rate:.2e}  {self._norm}{self._speed}  "
            f"input {self._interval.input_share:.1%}  {clock(secs_left)} left"
        )
