"""Callbacks: functions of a user's program that a run calls, in Python, as it reports something."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from trainer.monitoring.events import Interval, Place, Sink
from trainer.runs.results import Evaluation
from trainer.system.terminal import Say, say


class StopTraining(Exception):
    """A callback raises this to stop its run: the run is saved, and `TrainingResult.is_stopped` is True."""


class Callback:
    """Methods that a run calls. Override those that you need, and pass the object to `trainer.train`.

        class StopEarly(trainer.Callback):
            def on_evaluation(self, step, evaluation):
                if evaluation.loss < 1.0:
                    raise trainer.StopTraining

        trainer.train(config, callbacks=[StopEarly()])

    The calls come from the thread that trains, between two calls of the compiled loop, so a slow callback delays
    training. If a method raises `StopTraining` or another exception, the run takes no further step (with several
    workers one more), is saved, and ends; another exception is raised again then, and nothing is called in between.
    After the last step there is nothing to stop: the run is scored and finished. If there are several workers, only the
    chief calls.
    """

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """Is called after every `log.every_steps` steps, and after the last one; not after each step.

        Args:
            step: the steps that were taken.
            values: the figures of the steps since the last call, by the names that `run.history` has after "train/":
                "loss/nats_per_token", "optimizer/learning_rate", "speed/tokens_per_sec_overall" and others.
        """

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Is called when the model was scored on the validation text.

        Args:
            step: the steps that were taken.
            evaluation: the score: `loss` in nats per token, `perplexity`, `bits_per_byte` and more.
        """

    def on_checkpoint(self, step: int, folder: str) -> None:
        """Is called when a checkpoint is whole. It is written while training goes on, so the run may be further.

        Args:
            step: the steps that the checkpoint holds.
            folder: the folder of the checkpoint, which `trainer.load` takes. With `checkpoint.keep_last=1` it is
                removed soon after the next one is written.
        """


class Callbacks(Sink):
    """Calls the callbacks of a run, until one of them raises an exception other than `StopTraining`.

    Args:
        callbacks: the callbacks.
        request_stop: stops the run after the step under way, as a signal does.
        say: prints a line.
    """

    def __init__(self, callbacks: Sequence[Callback], request_stop: Callable[[], object], say: Say = say) -> None:
        self._callbacks = callbacks
        self._request_stop = request_stop
        self._say = say
        self._is_over = False
        self._error: Exception | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Says what a callback has raised, if the run ends by another error before `ended` could raise it: for example,
        what was trained cannot be saved.
        """
        try:
            yield
        except BaseException as other:
            if self._error is not None and other is not self._error:
                self._say(f"Before that, a callback raised {type(self._error).__name__}: {self._error}")
            raise

    def advance(self, place: Place) -> None:
        """Notes whether steps are left."""
        self._is_over = place.step >= place.total_steps

    def interval(self, place: Place, interval: Interval, values: Mapping[str, float]) -> None:
        """Calls `on_step`."""
        self._call(lambda callback: callback.on_step(place.step, values))

    def evaluation(self, place: Place, evaluation: Evaluation, values: Mapping[str, float]) -> None:
        """Calls `on_evaluation`."""
        self._call(lambda callback: callback.on_evaluation(place.step, evaluation))

    def checkpoint(self, place: Place, folder: str) -> None:
        """Calls `on_checkpoint`."""
        self._call(lambda callback: callback.on_checkpoint(place.step, folder))

    def ended(self) -> None:
        """Raises what a callback has raised, unless that is `StopTraining`. Call it when everything is saved."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, method: Callable[[Callback], None]) -> None:
        for callback in self._callbacks:
            if self._error is not None:
                return
            try:
                method(callback)
            except StopTraining:
                self._stop()
            except Exception as error:  # Raised by `ended`: nothing that was trained must be lost.
                self._error = error
                self._stop()

    def _stop(self) -> None:
        if not self._is_over:
            self._request_stop()
