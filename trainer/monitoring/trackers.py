"""Sends what a run reports to Weights & Biases, MLflow or trackio, beside TensorBoard: `log.trackers`.

A tracker is slow or unreachable at times, and training must not notice: a thread sends the reports, from a queue of
limited length. What cannot be sent is dropped, and reported once.
"""

import contextlib
import importlib
import importlib.util
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from trainer.config.settings import LogConfig
from trainer.errors import UserError, quoted
from trainer.monitoring.events import Interval, Place, Sink
from trainer.runs.results import Evaluation
from trainer.runs.run_folder import RunFolder
from trainer.system.terminal import Say

# The reports that wait to be sent; more are dropped.
_MAX_WAITING = 1_000
# How long the end of a run waits for its trackers. Everything else is saved by then.
_FINISH_SECS = 30.0
# MLflow takes this many parameters at a time, each of at most this length.
_PARAMS_AT_A_TIME, _MAX_PARAM_CHARS = 100, 500


class Service(Protocol):
    """What the three packages have in common.

    Attributes:
        id: the tracker's own name of the run, with which a later process goes on.
    """

    id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends figures of a step."""

    def finish(self, is_over: bool) -> None:
        """Sends what is left; is_over tells whether the run has taken all its steps and is scored."""


class _Wandb:
    def __init__(self, name: str, id: str | None, settings: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "trainer"),
            name=name,
            id=id,
            resume="allow",
            config=dict(settings),
            # Otherwise it replaces the standard streams, on which the progress bar is drawn.
            settings=wandb.Settings(console="off"),
        )
        self.id = str(self._run.id)
        # A step of our own: theirs can only grow, and a resumed run takes the steps since its checkpoint again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def finish(self, is_over: bool) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, name: str, id: str | None, settings: Mapping[str, Any]) -> None:
        mlflow = importlib.import_module("mlflow")
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        if id is not None:
            self._client.update_run(id, status="RUNNING")
            self.id = id
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", "trainer")
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        self.id = str(self._client.create_run(experiment_id, run_name=name).info.run_id)
        params = [self._entities.Param(key, str(value)[:_MAX_PARAM_CHARS]) for key, value in settings.items()]
        for first in range(0, len(params), _PARAMS_AT_A_TIME):
            self._client.log_batch(self.id, params=params[first : first + _PARAMS_AT_A_TIME])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def finish(self, is_over: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if is_over else "KILLED")


class _Trackio:
    def __init__(self, name: str, id: str | None, settings: Mapping[str, Any]) -> None:
        trackio = importlib.import_module("trackio")
        # A name is all that it knows a run by, so another run in a folder of this name needs another.
        self.id = id or f"{name}-{int(time.time())}"
        project = os.environ.get("TRACKIO_PROJECT", "trainer")
        self._run = trackio.init(project=project, name=self.id, config=dict(settings), resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, is_over: bool) -> None:
        self._run.finish()


_SERVICES: dict[str, Callable[[str, str | None, Mapping[str, Any]], Service]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def check_trackers(log: LogConfig) -> None:
    """Raises UserError if the package of a tracker is not installed."""
    for name in log.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"log.trackers names {name!r}, a package that is not installed; leave it out, or install it: "
                f"{quoted(sys.executable)} -m pip install {name}"
            )


def open_trackers(run: RunFolder, say: Say) -> list["Tracker"]:
    """Returns the trackers that a run's config names. The run's record keeps their ids, and a resumed run goes on with
    these.

    Raises:
        UserError: a tracker cannot be started for a run that it has not tracked before. A run that goes on does so
            without it, with a line.
    """
    known: dict[str, str] = run.facts.get("trackers", {})
    trackers, ids, end = list[Tracker](), dict(known), _End()
    for name in run.config.log.trackers:
        try:
            service = _SERVICES[name](run.path.name, known.get(name), _flat(run.config.model_dump(mode="json")))
        except Exception as error:  # Each package raises its own kinds.
            why = f"log.trackers: {name} cannot be started ({type(error).__name__}: {str(error).strip().rstrip('.')})"
            if name not in known:
                for tracker in trackers:  # Otherwise their service would show this run as running for ever.
                    tracker.abandon()
                raise UserError(f"{why}. Repair that, or leave {name} out.") from error
            say(f"warning: {why}; the run goes on without it.")
            continue
        ids[name] = service.id
        trackers.append(Tracker(name, service, say, end))
    if ids != known:
        run.record(trackers=ids)
    return trackers


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


_Reports = queue.Queue[tuple[int, dict[str, float]] | None]


class _End:
    """The end of a run, which its trackers share: all send what is left at the same time, until one deadline."""

    def __init__(self) -> None:
        self.has_come = threading.Event()
        self.queues: list[_Reports] = []
        self._deadline = 0.0

    def come(self) -> None:
        """Wakes all threads. A thread whose queue is full is not asleep."""
        if self.has_come.is_set():
            return
        self._deadline = time.monotonic() + _FINISH_SECS
        self.has_come.set()
        for waiting in self.queues:
            with contextlib.suppress(queue.Full):
                waiting.put_nowait(None)

    def secs_left(self) -> float:
        """Returns the seconds until the deadline."""
        return max(0.0, self._deadline - time.monotonic())


class Tracker(Sink):
    """Sends reports to a service, in a thread of its own.

    Args:
        name: the name of the service, for messages.
        service: the service.
        say: prints a line.
        end: what the trackers of a run share; None: there is no other one.
    """

    def __init__(self, name: str, service: Service, say: Say, end: _End | None = None) -> None:
        self._name, self._service, self._say = name, service, say
        self._waiting: _Reports = queue.Queue(_MAX_WAITING)
        self._end = end or _End()
        self._end.queues.append(self._waiting)
        self._num_lost, self._is_over = 0, False

    def abandon(self) -> None:
        """Ends a run that does not begin."""
        with contextlib.suppress(Exception):  # Each package raises its own kinds.
            self._service.finish(False)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sends until the run ends, and then for a limited time what is left."""
        thread = threading.Thread(target=self._send, name=self._name, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.come()
            thread.join(self._end.secs_left())
            if thread.is_alive():
                self._say(f"{self._name} does not answer: the run ends without its last reports.")
            elif self._num_lost:
                self._say(f"{self._name}: {self._num_lost} reports could not be sent; TensorBoard has all of them.")

    def interval(self, place: Place, interval: Interval, values: Mapping[str, float]) -> None:
        """Sends the figures of training."""
        self._put(place.step, {f"train/{name}": value for name, value in values.items()})

    def evaluation(self, place: Place, evaluation: Evaluation, values: Mapping[str, float]) -> None:
        """Sends the figures of the validation text. The run is over once it is scored after its last step."""
        self._is_over = place.step >= place.total_steps
        self._put(place.step, {f"validation/{name}": value for name, value in values.items()})

    def _put(self, step: int, values: dict[str, float]) -> None:
        try:
            self._waiting.put_nowait((step, values))
        except queue.Full:
            self._lose(f"it has not taken {_MAX_WAITING} reports")

    def _send(self) -> None:
        while not (self._end.has_come.is_set() and self._waiting.empty()):
            report = self._waiting.get()
            if report is None:
                break
            try:
                self._service.log(*report)
            except Exception as error:  # Each package raises its own kinds.
                self._lose(f"{type(error).__name__}: {error}")
        try:
            self._service.finish(self._is_over)
        except Exception as error:
            self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, reason: str) -> None:
        self._num_lost += 1
        if self._num_lost == 1:
            self._say(f"warning: {self._name} fails ({reason}); training goes on, and such reports are dropped.")
