"""What a run shows while it learns: curves and samples in TensorBoard, progress on the terminal."""

import contextlib
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TextIO

import numpy as np
import rich.progress
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.config import Config
from trainer.errors import UserError
from trainer.system.storage import Location, reason_and_remedy
from trainer.system.terminal import Say, console, printable
from trainer.training.evaluation import Evaluation
from trainer.training.step import CallMetrics

# Columns of a terminal on which the bar has room for both speeds; on fewer it shows the overall one.
_WIDE = 140


class Interval(NamedTuple):
    """The steps since the last report.

    Skipped steps count for num_steps, num_skipped and all times, and for nothing else.

    Attributes:
        num_steps: steps taken.
        num_skipped: those of them that were skipped.
        loss: nats per token; None if no token was predicted by an applied step.
        grad_norm: mean over steps, before clipping; None if no step was applied.
        clip_rate: share of steps; None likewise.
        input_share: share of the steps' time spent waiting for batches.
        tokens_per_sec_in_steps: predicted tokens, padding not counted, by the time of the steps alone.
        tokens_per_sec_overall: the same tokens by all the time since the last report: also that of saving, scoring and
            samples.
        learning_rate: of the last step.
    """

    num_steps: int
    num_skipped: int
    loss: float | None
    grad_norm: float | None
    clip_rate: float | None
    input_share: float
    tokens_per_sec_in_steps: float
    tokens_per_sec_overall: float
    learning_rate: float


class Meter:
    """Adds up the metrics of calls until they are reported.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sums = [0.0] * len(CallMetrics._fields)
        self._secs = 0.0
        self._reported = clock()

    def add(self, metrics: CallMetrics, secs: float) -> None:
        """Adds a call that took secs seconds."""
        self._sums = [total + float(value) for total, value in zip(self._sums, metrics, strict=True)]
        self._secs += secs

    def report(self, learning_rate: float) -> Interval:
        """Returns the sums as rates and means, and starts again."""
        sums, secs = CallMetrics(*self._sums), self._secs
        self._sums, self._secs = [0.0] * len(sums), 0.0
        # Two clocks may differ by a little.
        overall_secs, self._reported = max(secs, self._clock() - self._reported), self._clock()
        applied = sums.num_steps - sums.num_skipped
        return Interval(
            num_steps=int(sums.num_steps),
            num_skipped=int(sums.num_skipped),
            loss=sums.loss_sum / sums.num_targets if sums.num_targets else None,
            grad_norm=sums.grad_norm_sum / applied if applied else None,
            clip_rate=sums.num_clipped / applied if applied else None,
            input_share=sums.input_secs / secs,
            tokens_per_sec_in_steps=sums.num_targets / secs,
            tokens_per_sec_overall=sums.num_targets / overall_secs,
            learning_rate=learning_rate,
        )


class Monitor:
    """Writes to TensorBoard and to the terminal.

    Args:
        logs: folder for TensorBoard.
        config: of the run, shown in TensorBoard.
        first_step: where this process goes on; what an earlier one logged from there on is dropped from the curves.
        total_steps: of the run.
        bits_per_token_byte: factor from nats per target to bits per byte of the training text.
        is_lossy: whether bits per byte are of less than the training text: its tokens do not say all of it, or it is
            cut.
        terminal: where lines and the progress bar go; None: to standard output.
        say: gets the lines instead, and there is no bar.
        steps_per_epoch: None: there are no epochs.
        tokens_per_sec_at_peak: what would be a model FLOPs utilisation of 1; None: not known, and it has no curve.
    """

    def __init__(
        self,
        logs: Location,
        config: Config,
        first_step: int,
        total_steps: int,
        bits_per_token_byte: float,
        is_lossy: bool,
        terminal: TextIO | None = None,
        say: Say | None = None,
        steps_per_epoch: float | None = None,
        tokens_per_sec_at_peak: float | None = None,
    ) -> None:
        self.total_steps = total_steps
        self._tokens_per_sec_at_peak = tokens_per_sec_at_peak
        self._bits_per_token_byte = bits_per_token_byte
        self._bits_tag = _bits_tag(is_lossy)
        self._terminal = terminal or sys.stdout
        self._say = say
        self._steps_per_epoch = steps_per_epoch
        self._num_epochs = config.train.num_epochs or round(total_steps / (steps_per_epoch or total_steps), 2)
        self._console = console(self._terminal)
        self._has_bar = say is None and self._console.is_terminal
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[state]}"),
            rich.progress.TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._has_bar,
        )
        self._first_step = first_step
        self._train = EventLog(logs / "train", first_step, self.say)
        # A run that is over is resumed to be scored, which a process before may have begun to.
        self._validation = EventLog(logs / "validation", first_step - (first_step == total_steps), self.say)
        self._train.texts(first_step, {"config": f"```toml\n{config.to_toml()}\n```"})
        self._profile = config.profile
        self._is_profiling = False
        self._started = time.monotonic()
        # The first call of the compiled loop takes as long as to compile it.
        self._task = self._progress.add_task("compiling", total=total_steps, completed=first_step, state="")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Shows the progress bar, and closes the log files at the end."""
        self._started = time.monotonic()
        try:
            with self._progress:
                yield
        finally:
            self._train.close()
            self._validation.close()
            self._end_profile()  # Of a run that was stopped meanwhile.

    @contextlib.contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Profiles the call of the compiled loop in this block, where it is one of the steps to profile.

        Args:
            step: how many steps were taken before.
        """
        if step == self._profile.at_step:
            self._begin_profile()
        if not self._is_profiling:
            yield
            return
        # The name and argument by which TensorBoard knows a step.
        with tf.profiler.experimental.Trace("train", step_num=step + 1, _r=1):
            yield
        if step + 1 == self._profile.ends()[-1]:
            self._end_profile()

    def _begin_profile(self) -> None:
        try:
            tf.profiler.experimental.start(str(self._train.folder))
            self._is_profiling = True
        except tf.errors.AlreadyExistsError:
            self.say("profile.at_step: no profile, as somebody else profiles this process already.")

    def _end_profile(self) -> None:
        if not self._is_profiling:
            return
        self._is_profiling = False
        try:
            tf.profiler.experimental.stop()
            self.say(f"Profile written into {self._train.folder / 'plugins' / 'profile'}")
        except (OSError, tf.errors.OpError) as error:
            self.say(f"profile.at_step: the profile could not be written into {self._train.folder}: {error}")

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar where there is one, which breaks it between words."""
        if self._say is not None:
            self._say(line)
        elif self._has_bar:
            self._console.print(printable(line))
        else:
            print(printable(line), file=self._terminal, flush=True)

    @contextlib.contextmanager
    def doing(self, step: int, what: str) -> Iterator[None]:
        """Says what takes the time of this block, after step steps: the bar does, or a line."""
        if not self._has_bar:
            self.say(f"{self._place_at(step)}  {what}")
        self._progress.update(self._task, description=what)
        try:
            yield
        finally:
            self._progress.update(self._task, description="training")

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._progress.update(self._task, completed=step, description="training")

    def interval(self, step: int, interval: Interval) -> None:
        """Reports the steps since the last report."""
        values = interval._asdict() | {"skipped_steps": interval.num_skipped}
        del values["num_steps"], values["num_skipped"]
        loss, learned, norm = "no step was applied", "no step was applied", ""
        if interval.loss is not None:
            values["perplexity"] = _perplexity(interval.loss)
            values[self._bits_tag] = interval.loss * self._bits_per_token_byte
            loss = f"loss {interval.loss:.4f}"
            learned = f"{loss}  perplexity {values['perplexity']:.2f}"
        if interval.grad_norm is not None:
            norm = f"norm {interval.grad_norm:.2f}  "
        in_steps, overall = interval.tokens_per_sec_in_steps, interval.tokens_per_sec_overall
        speed, short = f"{in_steps:,.0f} tokens/s in steps, {overall:,.0f} overall", f"{overall:,.0f} tokens/s"
        if self._tokens_per_sec_at_peak is not None:
            values["mfu_in_steps"] = in_steps / self._tokens_per_sec_at_peak
            values["mfu_overall"] = overall / self._tokens_per_sec_at_peak
            speed += f"  mfu {values['mfu_in_steps']:.1%} in steps, {values['mfu_overall']:.1%} overall"
        # What nothing is known of has no point: a 0 would be drawn as the best loss of all.
        self._train.scalars(step, {name: value for name, value in values.items() if value is not None})
        shown = speed if self._console.width >= _WIDE else short
        self._progress.update(self._task, completed=step, state=f"{self._epoch_at(step)}{loss}  {shown}")
        if not self._has_bar:
            self.say(
                f"{self._place_at(step)}  {learned}  rate {interval.learning_rate:.2e}  {norm}{speed}  "
                f"input {interval.input_share:.1%}  {_clock(self._secs_left(step))} left"
            )

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Reports a score on the validation text."""
        values = {
            "loss": evaluation.loss,
            "perplexity": evaluation.perplexity,
            _bits_tag(evaluation.is_lossy): evaluation.bits_per_byte,
            "excess_nats_per_token": evaluation.excess,
        }
        values |= {f"loss_of_source_{i}": loss for i, loss in enumerate(evaluation.losses)}
        self._validation.scalars(step, {name: value for name, value in values.items() if value is not None})
        self.say(f"{self._place_at(step)}  validation: {evaluation}")

    def samples(self, step: int, samples: Mapping[str, str]) -> None:
        """Reports what each decoder makes of the model."""
        self._train.texts(step, {f"samples/{name}": literal(text) for name, text in samples.items()})

    def _place_at(self, step: int) -> str:
        return f"step {step}/{self.total_steps}  {self._epoch_at(step)}".rstrip()

    def _epoch_at(self, step: int) -> str:
        if self._steps_per_epoch is None:
            return ""
        # A run's last step may begin the next epoch, to fill its batch.
        done = min(step / self._steps_per_epoch, self._num_epochs)
        return f"epoch {done:.2f}/{self._num_epochs:g}  "

    def _secs_left(self, step: int) -> float:
        per_step = (time.monotonic() - self._started) / max(1, step - self._first_step)
        return per_step * (self.total_steps - step)


class Silence:
    """A monitor that reports nothing: of a worker that is not the first."""

    @contextlib.contextmanager
    def running(self, *_: object) -> Iterator[None]:
        """Does nothing."""
        yield

    profiled = doing = running

    def say(self, *_: object) -> None:
        """Does nothing."""

    advance = interval = evaluation = samples = say


_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class EventLog:
    """A file for TensorBoard, that begins by making void what earlier ones in its folder have after first_step.

    A killed run may have logged past its checkpoint. TensorBoard reads the files of a folder in the order of their
    names, which begin with the time; where a clock was set back, the name and the times of events go on from the newest
    ones that are there.

    What cannot be written later on, because the disk is full for example, is kept in memory and written into another
    file once that can be done: curves are no reason to end a run.

    Args:
        folder: for the file.
        first_step: what earlier files have up to here stays.
        say: prints a line, when the file cannot be written, and when it can be again.

    Raises:
        UserError: it cannot be written from the start.
    """

    def __init__(self, folder: Location, first_step: int, say: Say = print) -> None:
        self.folder = folder
        self._say = say
        self._unwritten: list[bytes] = []
        self._wall_time = 0.0
        try:
            self._writer: RecordWriter | None = self._open()
            self._write_event(first_step + 1, {"session_log": SessionLog(status=SessionLog.START)})
            self._write_all(self._writer)
        except (OSError, tf.errors.OpError) as error:
            raise UserError(f"Cannot write to {folder}: {reason_and_remedy(error)}, then resume the run.") from error

    def _open(self) -> RecordWriter:
        tf.io.gfile.makedirs(str(self.folder))
        names = sorted(name for name in tf.io.gfile.listdir(str(self.folder)) if _EVENT_FILE.match(name))
        second = int(time.time())
        if names:
            second = max(second, int(_EVENT_FILE.match(names[-1])[1]) + 1)  # type: ignore[index]
        if names and not self._wall_time:
            events = LegacyEventFileLoader(f"{self.folder}/{names[-1]}").Load()
            self._wall_time = max((event.wall_time for event in events), default=0.0)
        self._path = f"{self.folder}/events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
        writer = RecordWriter(tf.io.gfile.GFile(self._path, "wb"))
        writer.write(Event(wall_time=self._wall_time, file_version="brain.Event:2").SerializeToString())
        return writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a point of each curve."""
        limits = np.finfo(np.float32)  # All that TensorBoard keeps, and a perplexity can be more.
        summaries = [scalar_pb(name, np.clip(value, limits.min, limits.max)) for name, value in values.items()]
        self._write(step, [{"summary": summary} for summary in summaries])

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, in Markdown."""
        self._write(step, [{"summary": text_pb(name, text)} for name, text in texts.items()])

    def close(self) -> None:
        """Closes the file, and says if not everything could be written."""
        if self._unwritten:
            self._write(0, [])
        if self._unwritten:
            self._say(f"{self.folder} lacks its last {len(self._unwritten)} points and texts: they cannot be written.")
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError, tf.errors.OpError):
            if self._writer is not None:
                self._writer.close()
        self._writer = None

    def _write(self, step: int, events: list[dict[str, str | SessionLog | Summary]]) -> None:
        was_failing = self._writer is None
        for event in events:
            self._write_event(step, event)
        try:
            # Another file, as the end of the one before may be half a record.
            self._writer = self._writer or self._open()
            self._write_all(self._writer)
        except (OSError, tf.errors.OpError) as error:
            self._close()
            if was_failing:
                with contextlib.suppress(OSError, tf.errors.OpError):
                    tf.io.gfile.remove(self._path)  # One of no use for each try would be many.
            else:
                self._say(
                    f"Cannot write to {self.folder}: {reason_and_remedy(error)}. Training goes on, and the curves are "
                    "written once that can be done."
                )
            return
        if was_failing:
            self._say(f"{self.folder} can be written again.")

    def _write_event(self, step: int, event: dict[str, Any]) -> None:
        self._wall_time = max(self._wall_time, time.time())
        self._unwritten.append(Event(step=step, wall_time=self._wall_time, **event).SerializeToString())

    def _write_all(self, writer: RecordWriter) -> None:
        for event in self._unwritten:
            writer.write(event)
        writer.flush()
        self._unwritten.clear()


def _bits_tag(is_lossy: bool) -> str:
    return "bits_per_byte_lossy" if is_lossy else "bits_per_byte"


def literal(text: str) -> str:
    """Returns Markdown that shows a text as it is: nothing in it formats, links or fetches."""
    lines = (
        # An entity is neither Markdown's nor HTML's to read; a space that counts is one that neither drops.
        re.sub(r"[!#&*+<=>\[\\\]_`{|}~-]|(?<=\d)[.)]", lambda found: f"&#{ord(found[0])};", line)
        for line in printable(text).expandtabs(4).split("\n")
    )
    return "  \n".join(re.sub("^ |(?<= ) | $|^$", "&nbsp;", line) for line in lines)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _clock(secs: float) -> str:
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
