"""Writes what a run reports for TensorBoard: curves, texts, histograms, the graph, the settings and profiles."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

import keras
import tensorflow as tf

from trainer.config.settings import Config
from trainer.monitoring import tags
from trainer.monitoring.event_log import EventLog, literal
from trainer.monitoring.events import Histogram, Interval, Place, Sink
from trainer.monitoring.graph import graph_of
from trainer.monitoring.hparams import Session
from trainer.monitoring.layout import layout_summary
from trainer.runs.results import Evaluation
from trainer.system.storage import Location
from trainer.system.terminal import Say


class TensorBoard(Sink):
    """Writes into two folders, train and validation, so that TensorBoard draws both losses into one chart.

    Args:
        logs: the folder for both.
        config: the run's configuration, which is shown as a text.
        first_step: the step that this process goes on from; the curves lose what earlier processes logged after it.
        total_steps: the number of steps of the run.
        history: a line for each run that this one comes from, and for each change.
        say: prints a line.
        model: the model whose graph is shown; None: no graph.
    """

    def __init__(
        self,
        logs: Location,
        config: Config,
        first_step: int,
        total_steps: int,
        history: Sequence[str],
        say: Say,
        model: keras.Model | None = None,
    ) -> None:
        self._say = say
        self._train = EventLog(logs / "train", first_step, say)
        # A run that has taken all its steps is resumed only to be scored: a score that an earlier process has logged at
        # this step is written again, so it must not stay.
        self._validation = EventLog(logs / "validation", first_step - (first_step == total_steps), say)
        texts = {tags.CONFIG: f"```toml\n{config.to_toml()}\n```"}
        if history:
            texts[tags.HISTORY] = literal("\n".join(history))
        self._train.texts(first_step, texts)
        self._train.summary(first_step, layout_summary(config))
        # A process that goes on with a run finds the graph in an earlier file.
        if model is not None and self._train.is_first:
            self._add_graph(model, config.train.sequence_length)
        self._session = Session(self._validation.folder, config, total_steps, say)
        self._is_finished = False
        self._profile = config.profile
        self._is_profiling = False

    def _add_graph(self, model: keras.Model, sequence_length: int) -> None:
        try:
            graph = graph_of(model, sequence_length)
        except Exception as error:  # A foreign model may take only the batches that it is trained with.
            reason = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())[:200]  # Keras writes lines, some in bold.
            self._say(
                f"TensorBoard's graph is left out: the model cannot be traced ({type(error).__name__}: {reason})."
            )
            return
        if graph is not None:
            self._train.graph(graph)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Closes the log files at the end."""
        try:
            yield
        finally:
            self._session.end(self._is_finished)
            self._train.close()
            self._validation.close()
            self._end_profile()  # The run may have been stopped during the profiled steps.

    def interval(self, place: Place, interval: Interval, values: Mapping[str, float]) -> None:
        """Adds a point to each curve of training."""
        self._train.scalars(place.step, values)

    def evaluation(self, place: Place, evaluation: Evaluation, values: Mapping[str, float]) -> None:
        """Adds a point to each curve of the validation text."""
        self._validation.scalars(place.step, values)
        self._is_finished = place.step == place.total_steps

    def histograms(self, place: Place, histograms: Mapping[str, Histogram]) -> None:
        """Adds the histograms of weights and gradients."""
        self._train.histograms(place.step, histograms)

    def samples(self, place: Place, samples: Mapping[str, str]) -> None:
        """Adds the samples as texts."""
        self._train.texts(place.step, {tags.samples_of(name): literal(text) for name, text in samples.items()})

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
            self._say("profile.at_step: no profile: this process is already being profiled.")

    def _end_profile(self) -> None:
        if not self._is_profiling:
            return
        self._is_profiling = False
        try:
            tf.profiler.experimental.stop()
            self._say(f"Profile written into {self._train.folder / 'plugins' / 'profile'}")
        except (OSError, tf.errors.OpError) as error:
            self._say(f"profile.at_step: the profile could not be written into {self._train.folder}: {error}")
