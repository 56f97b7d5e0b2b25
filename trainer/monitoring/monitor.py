"""Turns what a run measures into the figures that it shows, and passes them to the sinks."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

import keras
import tensorflow as tf

from trainer.config.schedule import describe_batch_warmup, examples_before, full_steps_between
from trainer.config.settings import Config
from trainer.data.batches import num_examples
from trainer.data.batches import total_steps as count_steps
from trainer.data.coverage import TextBytes
from trainer.data.shards import PreparedData
from trainer.distributed.strategy import device_kind, device_names, find_devices
from trainer.model.language_model import adapt
from trainer.model.size import tokens_per_sec_at_peak
from trainer.monitoring import tags
from trainer.monitoring.events import Histogram, Interval, Place, Sink
from trainer.monitoring.progress import TrainingProgress
from trainer.monitoring.tensorboard import TensorBoard
from trainer.runs.parentage import describe_history
from trainer.runs.results import Evaluation
from trainer.runs.run_folder import RunFolder
from trainer.system.progress import Note, ignore
from trainer.system.storage import Location
from trainer.system.terminal import Say
from trainer.system.terminal import say as print_line


class Monitor:
    """Passes what a run reports to its sinks: TensorBoard, the terminal, and others.

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
        epochs_at: returns how often all examples were used before a step; None: the run has no epochs.
        history: a line for each run that this one comes from, and for each change.
        peak_tokens_per_sec: the speed at a model FLOPs utilisation of 1; None: unknown, and the curve is left out.
        sinks: what else receives the reports.
        model: the model whose graph TensorBoard shows; None: no graph.
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
        epochs_at: Callable[[int], float] | None = None,
        history: Sequence[str] = (),
        peak_tokens_per_sec: float | None = None,
        sinks: Sequence[Sink] = (),
        model: keras.Model | None = None,
    ) -> None:
        self.total_steps = total_steps
        self._peak_tokens_per_sec = peak_tokens_per_sec
        self._bits_per_token_byte = bits_per_token_byte
        self._bits_tag = tags.bits_per_byte(is_lossy)
        self._epochs_at = epochs_at
        self._num_epochs = config.train.num_epochs or (1.0 if epochs_at is None else round(epochs_at(total_steps), 2))
        terminal_sink = TrainingProgress(config.train, first_step, total_steps, terminal, say)
        self.say = terminal_sink.say
        tensorboard = TensorBoard(logs, config, first_step, total_steps, history, self.say, model)
        self.profiled = tensorboard.profiled
        self._train = config.train
        # The steps of this process, counted as full ones, and the seconds that they took for each token of a full step.
        self._num_steps, self._secs_per_token = 0.0, 0.0
        self._sinks: list[Sink] = [tensorboard, terminal_sink, *sinks]

    def add(self, sinks: Sequence[Sink]) -> None:
        """Adds sinks. Call it before the block of `running`."""
        self._sinks += sinks

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Opens the sinks, and closes them at the end."""
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.enter_context(sink.running())
            yield

    @contextlib.contextmanager
    def doing(self, step: int, what: str) -> Iterator[Note]:
        """Shows what is done in this block, after step steps. Yields a function that takes how much of it is done."""

        def note(done: int, total: int | None = None) -> None:
            for sink in self._sinks:
                sink.part(what, done, total)

        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.enter_context(sink.doing(self._place(step), what))
            yield note

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        for sink in self._sinks:
            sink.advance(self._place(step))

    def interval(self, step: int, interval: Interval) -> None:
        """Reports the steps since the last report."""
        place = self._place(step)
        values: dict[str, float | None] = {
            tags.LOSS: interval.loss,
            tags.TOKENS_PER_SEC_IN_STEPS: interval.tokens_per_sec_in_steps,
            tags.TOKENS_PER_SEC_OVERALL: interval.tokens_per_sec_overall,
            tags.LEARNING_RATE: interval.learning_rate,
            tags.GRAD_NORM: interval.grad_norm,
            tags.CLIP_RATE: interval.clip_rate,
            tags.LOSS_SCALE: interval.loss_scale,
            tags.SKIPPED_STEPS: interval.num_skipped,
            tags.INPUT_SHARE: interval.input_share,
            tags.EPOCH: place.epochs,
        }
        if interval.loss is not None:
            values[tags.PERPLEXITY] = _perplexity(interval.loss)
            values[self._bits_tag] = interval.loss * self._bits_per_token_byte
        if self._peak_tokens_per_sec is not None:
            values[tags.MFU_IN_STEPS] = interval.tokens_per_sec_in_steps / self._peak_tokens_per_sec
            values[tags.MFU_OVERALL] = interval.tokens_per_sec_overall / self._peak_tokens_per_sec
        if interval.tokens_per_sec_in_steps:
            num_steps = full_steps_between(self._train, step - interval.num_steps, step)
            self._num_steps += num_steps
            self._secs_per_token += num_steps / interval.tokens_per_sec_in_steps
        for sink in self._sinks:
            sink.interval(place, interval, _known(values))

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Reports a score on the validation text."""
        place = self._place(step)
        values = {
            tags.LOSS: evaluation.loss,
            tags.RAW_LOSS: evaluation.raw_loss,
            tags.PERPLEXITY: evaluation.perplexity,
            tags.bits_per_byte(evaluation.is_lossy): evaluation.bits_per_byte,
            tags.EXCESS: evaluation.excess,
            tags.EPOCH: place.epochs,
            tags.MEAN_TOKENS_PER_SEC: self._num_steps / self._secs_per_token if self._num_steps else None,
        }
        values |= {tags.loss_of_source(i): loss for i, loss in enumerate(evaluation.losses)}
        for name, score in evaluation.sets.items():
            values[tags.of_set(tags.LOSS, name)] = score.loss
            values[tags.of_set(tags.bits_per_byte(score.loses_text), name)] = score.bits_per_byte
        for sink in self._sinks:
            sink.evaluation(place, evaluation, _known(values))

    def checkpoint(self, step: int, folder: Location) -> None:
        """Reports the folder of a checkpoint that is whole."""
        for sink in self._sinks:
            sink.checkpoint(self._place(step), str(folder))

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Reports the histograms of weights and gradients, by their tags."""
        for sink in self._sinks:
            sink.histograms(self._place(step), histograms)

    def samples(self, step: int, samples: Mapping[str, str]) -> None:
        """Reports the samples, by the decoder that wrote them."""
        for sink in self._sinks:
            sink.samples(self._place(step), samples)

    def _place(self, step: int) -> Place:
        epochs = None
        if self._epochs_at is not None:
            # The batch of the last step may be filled with examples of the next epoch.
            epochs = min(self._epochs_at(step), self._num_epochs)
        return Place(step, self.total_steps, epochs, self._num_epochs)


class SilentMonitor:
    """A monitor that reports nothing, for the workers that are not the chief."""

    @contextlib.contextmanager
    def running(self, *_: object) -> Iterator[Note]:
        """Does nothing."""
        yield ignore

    profiled = doing = running

    def say(self, *_: object) -> None:
        """Does nothing."""

    advance = interval = evaluation = checkpoint = histograms = samples = say


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    """Returns the figures that are known. An unknown one gets no point: TensorBoard would draw 0 as the best loss."""
    return {name: value for name, value in values.items() if value is not None}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def make_monitor(
    run: RunFolder,
    prepared: PreparedData,
    model: keras.Model,
    strategy: tf.distribute.Strategy,
    first_step: int,
    say: Say,
    sinks: Sequence[Sink] = (),
) -> Monitor:
    """Returns the monitor of a run that goes on from first_step. `sinks` receive the reports, too."""
    config, split = run.config, prepared.split("train")
    text_bytes, parts = TextBytes(prepared), prepared.parts("train")
    is_cut = config.data.mode == "lines" and split.max_tokens > config.train.sequence_length
    epoch_examples = num_examples(split, config)

    def epochs_at(step: int) -> float:
        return (examples_before(config.train, step) + run.data_offset) / epoch_examples

    return Monitor(
        run.path / "logs",
        config,
        first_step=first_step,
        total_steps=count_steps(prepared, config, run.data_offset),
        bits_per_token_byte=1 / (text_bytes.of_target(config) * math.log(2)),
        is_lossy=is_cut or any(map(text_bytes.is_lossy, parts)),
        # print_line is the default of launch.py: in its place the Monitor may show a progress bar.
        say=None if say is print_line else say,
        # The sources of a mixture end at different times.
        epochs_at=epochs_at if config.data.weights is None else None,
        history=describe_history(run),
        peak_tokens_per_sec=find_peak(config, model, prepared.vocabulary_size, strategy, say),
        sinks=sinks,
        model=model,
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
        f"steps {step} to {total_steps} of {train.global_batch_size} x {train.sequence_length} = {tokens:,} "
        f"tokens{describe_batch_warmup(train)}."
    )
