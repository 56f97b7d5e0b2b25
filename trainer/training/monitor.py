"""Shows how a run learns: curves and samples in TensorBoard, progress on the terminal."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TextIO

import keras
import rich.progress
import tensorflow as tf

from trainer.config.settings import Config
from trainer.data.batches import num_examples
from trainer.data.batches import total_steps as count_steps
from trainer.data.coverage import TextBytes
from trainer.data.shards import PreparedData
from trainer.distributed.strategy import device_kind, device_names, find_devices
from trainer.model.language_model import adapt
from trainer.model.size import tokens_per_sec_at_peak
from trainer.runs.parentage import describe_history
from trainer.runs.results import Evaluation
from trainer.runs.run_folder import RunFolder
from trainer.system.storage import Location
from trainer.system.terminal import Say, console, printable
from trainer.system.terminal import say as print_line
from trainer.training.event_log import EventLog, literal
from trainer.training.step import CallMetrics

# The columns of a terminal that the bar needs to show both speeds; with fewer it shows only the overall speed.
_WIDE = 140


class Interval(NamedTuple):
    """The steps since the last report.

    Skipped steps count only in num_steps, in num_skipped and in all times.

    Attributes:
        num_steps: the steps that were taken.
        num_skipped: how many of them were skipped.
        loss: nats per token; None if no applied step has predicted a token.
        grad_norm: the mean norm of the gradients before clipping; None if no step was applied.
        clip_rate: the share of the steps whose gradients were clipped; None if no step was applied.
        input_share: the share of the steps' time that was spent waiting for batches.
        tokens_per_sec_in_steps: the predicted tokens, without padding, by the time of the steps.
        tokens_per_sec_overall: the same tokens by all the time since the last report, with saving, scoring and samples.
        learning_rate: the learning rate of the last step.
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
        # The steps and the time since the last report are measured by two clocks, which may differ a little.
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
        logs: the folder for TensorBoard.
        config: the run's configuration, which TensorBoard shows.
        first_step: the step that this process goes on from; the curves lose what earlier processes logged after it.
        total_steps: the number of steps of the run.
        bits_per_token_byte: the factor from nats per target to bits per byte of the training text.
        is_lossy: whether bits per byte are about less than the training text: its tokens do not hold all of it, or it
            is cut.
        terminal: the stream for lines and the progress bar; None: standard output.
        say: prints a line, in place of terminal; then there is no progress bar. None: terminal is used.
        steps_per_epoch: the steps of an epoch; None: the run has no epochs.
        data_begins_at: the step at which the first epoch begins; not 0 only in a fork with other data or batches.
        history: a line for each run that this one comes from, and for each change.
        peak_tokens_per_sec: the speed at a model FLOPs utilisation of 1; None: unknown, and the curve is left out.
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
        data_begins_at: float = 0.0,
        history: Sequence[str] = (),
        peak_tokens_per_sec: float | None = None,
    ) -> None:
        self.total_steps = total_steps
        self._peak_tokens_per_sec = peak_tokens_per_sec
        self._bits_per_token_byte = bits_per_token_byte
        self._bits_tag = _bits_tag(is_lossy)
        self._terminal = terminal or sys.stdout
        self._say = say
        self._steps_per_epoch = steps_per_epoch
        self._num_epochs = config.train.num_epochs or round(
            (total_steps - data_begins_at) / (steps_per_epoch or total_steps), 2
        )
        self._data_begins_at = data_begins_at
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
        # A run that has taken all its steps is resumed only to be scored: a score that an earlier process has logged at
        # this step is written again, so it must not stay.
        self._validation = EventLog(logs / "validation", first_step - (first_step == total_steps), self.say)
        texts = {"config": f"```toml\n{config.to_toml()}\n```"}
        if history:
            texts["history"] = literal("\n".join(history))
        self._train.texts(first_step, texts)
        self._profile = config.profile
        self._is_profiling = False
        self._started = time.monotonic()
        # The first call of the compiled loop also compiles it.
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
            self._end_profile()  # The run may have been stopped during the profiled steps.

    @contextlib.contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Profiles the call of the compiled loop in this block, if it takes a step that is to be profiled.

        Args:
            step: the steps taken so far.
        """
        if step == self._profile.at_step:
            self._begin_profile()
        if not self._is_profiling:
            yield
            return
        # TensorBoard recognizes a step by this name and these arguments.
        with tf.profiler.experimental.Trace("train", step_num=step + 1, _r=1):
            yield
        if step + 1 == self._profile.ends()[-1]:
            self._end_profile()

    def _begin_profile(self) -> None:
        try:
            tf.profiler.experimental.start(str(self._train.folder))
            self._is_profiling = True
        except tf.errors.AlreadyExistsError:
            self.say("profile.at_step: no profile: this process is already being profiled.")

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
        """Prints a line. If there is a progress bar, the line is above it and is wrapped between words."""
        if self._say is not None:
            self._say(line)
        elif self._has_bar:
            self._console.print(printable(line))
        else:
            print(printable(line), file=self._terminal, flush=True)

    @contextlib.contextmanager
    def doing(self, step: int, what: str) -> Iterator[None]:
        """Shows what is done in this block, after step steps: in the progress bar, or as a line."""
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
        values = interval._asdict() | {"skipped_steps": interval.num_skipped, "epoch": self._epochs_at(step)}
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
        if self._peak_tokens_per_sec is not None:
            values["mfu_in_steps"] = in_steps / self._peak_tokens_per_sec
            values["mfu_overall"] = overall / self._peak_tokens_per_sec
            speed += f"  mfu {values['mfu_in_steps']:.1%} in steps, {values['mfu_overall']:.1%} overall"
        # An unknown value gets no point: TensorBoard would draw 0 as the best loss.
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
            "epoch": self._epochs_at(step),
        }
        values |= {f"loss_of_source_{i}": loss for i, loss in enumerate(evaluation.losses)}
        for name, score in evaluation.sets.items():
            values |= {f"loss/{name}": score.loss, f"{_bits_tag(score.loses_text)}/{name}": score.bits_per_byte}
        self._validation.scalars(step, {name: value for name, value in values.items() if value is not None})
        self.say(f"{self._place_at(step)}  validation: {evaluation}")
        for name, score in evaluation.sets.items():
            self.say(f"{self._place_at(step)}  {name}: {score}")

    def samples(self, step: int, samples: Mapping[str, str]) -> None:
        """Reports the samples, by the decoder that wrote them."""
        self._train.texts(step, {f"samples/{name}": literal(text) for name, text in samples.items()})

    def _place_at(self, step: int) -> str:
        return f"step {step}/{self.total_steps}  {self._epoch_at(step)}".rstrip()

    def _epoch_at(self, step: int) -> str:
        epochs = self._epochs_at(step)
        return "" if epochs is None else f"epoch {epochs:.2f}/{self._num_epochs:g}  "

    def _epochs_at(self, step: int) -> float | None:
        """Returns the epochs that are done after step steps; None if the run has no epochs."""
        if self._steps_per_epoch is None:
            return None
        # The batch of the last step may be filled with examples of the next epoch.
        return min((step - self._data_begins_at) / self._steps_per_epoch, self._num_epochs)

    def _secs_left(self, step: int) -> float:
        per_step = (time.monotonic() - self._started) / max(1, step - self._first_step)
        return per_step * (self.total_steps - step)


class SilentMonitor:
    """A monitor that reports nothing, for the workers that are not the chief."""

    @contextlib.contextmanager
    def running(self, *_: object) -> Iterator[None]:
        """Does nothing."""
        yield

    profiled = doing = running

    def say(self, *_: object) -> None:
        """Does nothing."""

    advance = interval = evaluation = samples = say


def _bits_tag(is_lossy: bool) -> str:
    return "bits_per_byte_lossy" if is_lossy else "bits_per_byte"


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _clock(secs: float) -> str:
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def make_monitor(
    run: RunFolder,
    prepared: PreparedData,
    model: keras.Model,
    strategy: tf.distribute.Strategy,
    first_step: int,
    say: Say,
) -> Monitor:
    """Returns the monitor of a run that goes on from first_step."""
    config, split = run.config, prepared.split("train")
    text_bytes, parts = TextBytes(prepared), prepared.parts("train")
    is_cut = config.data.mode == "lines" and split.max_tokens > config.train.sequence_length
    has_epochs = config.data.weights is None  # The sources of a mixture end at different times.
    return Monitor(
        run.path / "logs",
        config,
        first_step=first_step,
        total_steps=count_steps(prepared, config, run.data_offset),
        bits_per_token_byte=1 / (text_bytes.of_target(config) * math.log(2)),
        is_lossy=is_cut or any(map(text_bytes.is_lossy, parts)),
        # print_line is the default of launch.py: in its place the Monitor may show a progress bar.
        say=None if say is print_line else say,
        steps_per_epoch=num_examples(split, config) / config.train.global_batch_size if has_epochs else None,
        data_begins_at=-run.data_offset / config.train.global_batch_size,
        history=describe_history(run),
        peak_tokens_per_sec=find_peak(config, model, prepared.vocabulary_size, strategy, say),
    )


def find_peak(
    config: Config, model: keras.Model, vocabulary_size: int, strategy: tf.distribute.Strategy, say: Say
) -> float | None:
    """Returns the tokens per second at a model FLOPs utilisation of 1. Returns None on a CPU, for a foreign model, and
    for an accelerator whose peak is unknown, which a line then names.
    """
    kind = device_kind(strategy)
    if kind == "CPU" or not adapt(model).is_gpt:
        return None
    names = device_names(strategy)
    devices = find_devices(kind, names, strategy.num_replicas_in_sync)
    at_peak = None if devices is None else tokens_per_sec_at_peak(config, vocabulary_size, devices)
    if at_peak is None:
        name = " and ".join(sorted(names)) or f"this {kind}"
        say(f"The peak of {name} in train.precision={config.train.precision!r} is not known: no utilisation is shown.")
    return at_peak


def describe_run(run: RunFolder, prepared: PreparedData, model: keras.Model, step: int, total_steps: int) -> str:
    """Returns a line about a run that goes on from a step."""
    train = run.config.train
    tokens = train.global_batch_size * train.sequence_length
    text = prepared.split("train")
    return (
        f"{run.path}: {model.count_params():,} parameters, {train.precision}; {text.num_tokens:,} tokens of text; "
        f"steps {step} to {total_steps} of {train.global_batch_size} x {train.sequence_length} = {tokens:,} tokens."
    )
