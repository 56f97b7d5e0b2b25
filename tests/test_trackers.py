"""Laws of trackers. The packages are stand-ins that record our calls: this is a test of what we call, not of them."""

import contextlib
import importlib.machinery
import sys
import threading
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_run import prepared_text, tiny  # type: ignore[import-not-found]

from trainer.config.settings import LogConfig
from trainer.errors import UserError
from trainer.monitoring import trackers
from trainer.monitoring.events import Place
from trainer.monitoring.trackers import Tracker, check_trackers, open_trackers
from trainer.runs.run_folder import RunFolder

NAMES = ("wandb", "mlflow", "trackio")


class Recorder:
    """Stands for any object of a package: writes down what is called on it, and returns what is in `answers`."""

    def __init__(self, calls: list[Any], name: str = "", answers: Mapping[str, Any] | None = None) -> None:
        self._calls, self._name, self._answers = calls, name, answers or {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self._calls.append((f"{self._name}.{name}", arguments, options))
            return self._answers.get(name, self)

        return self._answers.get(f"={name}", call)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the three packages, which are stand-ins."""
    calls: list[Any] = []
    run = Recorder(calls, "run", {"=id": "w1"})
    created = types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
    client = Recorder(
        calls, "client", {"get_experiment_by_name": None, "create_experiment": "7", "create_run": created}
    )
    entities = types.SimpleNamespace(Metric=lambda *of: of, Param=lambda *of: of)
    fakes = {
        "wandb": {"init": Recorder(calls, "wandb", {"init": run}).init, "Settings": dict},
        "mlflow": {"MlflowClient": lambda: client, "entities": entities},
        "trackio": {"init": Recorder(calls, "trackio", {"init": run}).init},
    }
    for name, content in fakes.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return calls


def run_with(folder: Path, *names: str) -> RunFolder:
    prepared = prepared_text(folder)
    return RunFolder.create(tiny(folder, f"log.trackers=[{','.join(names)}]"), prepared)


def follow(opened: list[Tracker], last_step: int, total_steps: int = 2) -> None:
    with contextlib.ExitStack() as stack:
        for tracker in opened:
            stack.enter_context(tracker.running())
            place = Place(last_step, total_steps, None, 0)
            tracker.advance(place)
            tracker.interval(place, None, {"loss/nats_per_token": 2.0})  # type: ignore[arg-type]
            tracker.evaluation(place, None, {"loss/nats_per_token": 2.5})  # type: ignore[arg-type]


def test_each_tracker_gets_every_figure_at_its_step_and_goes_on_after_a_stop(tmp_path: Path, calls: list[Any]):
    run = run_with(tmp_path, *NAMES)
    follow(open_trackers(run, print), 1)
    first = {name: (arguments, options) for name, arguments, options in calls}
    assert first["wandb.init"][1]["project"] == "trainer" and first["wandb.init"][1]["id"] is None
    assert first["wandb.init"][1]["config"]["train.total_steps"] == 2
    assert first["wandb.init"][1]["settings"] == {"console": "off"}
    assert ("client.create_experiment", ("trainer",), {}) in calls
    assert ("client.set_terminated", ("m1", "KILLED"), {}) in calls
    logged = [arguments[0] for name, arguments, options in calls if name == "run.log" and not options]
    assert logged[:2] == [{"step": 1, "train/loss/nats_per_token": 2.0},
                          {"step": 1, "validation/loss/nats_per_token": 2.5}]  # fmt: skip
    steps = [options["step"] for name, _, options in calls if name == "run.log" and options]
    assert steps == [1, 1]
    metrics = [options["metrics"][0] for _, _, options in calls if "metrics" in options]
    assert [(name, value, step) for name, value, _, step in metrics] == [
        ("train/loss/nats_per_token", 2.0, 1), ("validation/loss/nats_per_token", 2.5, 1),
    ]  # fmt: skip
    ids = RunFolder(run.path).facts["trackers"]
    assert ids == {"wandb": "w1", "mlflow": "m1", "trackio": first["trackio.init"][1]["name"]}

    calls.clear()
    follow(open_trackers(RunFolder(run.path), print), 2)
    again = {name: options for name, _, options in calls}
    assert again["wandb.init"]["id"] == "w1" and again["wandb.init"]["resume"] == "allow"
    assert again["trackio.init"]["name"] == ids["trackio"]
    assert ("client.update_run", ("m1",), {"status": "RUNNING"}) in calls
    assert "client.create_run" not in again and ("client.set_terminated", ("m1", "FINISHED"), {}) in calls


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it():
    check_trackers(LogConfig())
    missing = [name for name in NAMES if importlib.util.find_spec(name) is None]
    for name in missing:
        with pytest.raises(UserError, match=f"names '{name}', a package that is not .* -m pip install {name}$"):
            check_trackers(LogConfig(trackers=(name,)))


def test_a_tracker_that_cannot_be_started_ends_a_new_run_but_not_one_that_goes_on(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
):
    run, said = run_with(tmp_path, "wandb"), list[str]()

    def fail(**options: Any) -> None:
        raise RuntimeError("no login.")

    working = sys.modules["wandb"].init
    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(UserError, match=r"wandb cannot be started \(RuntimeError: no login\). Repair that, or leave"):
        open_trackers(run, said.append)
    monkeypatch.setattr(sys.modules["wandb"], "init", working)
    assert len(open_trackers(run, said.append)) == 1
    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    assert open_trackers(RunFolder(run.path), said.append) == []
    assert len(said) == 1 and said[0].endswith("no login); the run goes on without it.")


class Service:
    """A service that fails, or that does not answer before it is released."""

    id = "x"

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.released, self.steps = error, threading.Event(), list[int]()
        self.asked, self.finished, self.is_over = threading.Event(), threading.Event(), False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.error is not None:
            raise self.error
        self.asked.set()
        self.released.wait(10)
        self.steps.append(step)

    def finish(self, is_over: bool) -> None:
        self.is_over = is_over
        self.finished.set()


def test_a_tracker_that_fails_is_reported_once():
    said: list[str] = []
    tracker = Tracker("wandb", Service(ConnectionError("no network")), said.append)
    with tracker.running():
        for step in range(5):
            tracker.interval(Place(step, 9, None, 0), None, {})
    assert said == [
        "warning: wandb fails (ConnectionError: no network); training goes on, and such reports are dropped.",
        "wandb: 5 reports could not be sent; TensorBoard has all of them.",
    ]


def test_a_tracker_that_hangs_neither_stops_nor_holds_up_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "_MAX_WAITING", 3)
    monkeypatch.setattr(trackers, "_FINISH_SECS", 0.05)
    said, service = list[str](), Service()
    tracker = Tracker("mlflow", service, said.append)
    with tracker.running():
        for step in range(10):
            tracker.interval(Place(step, 10, None, 0), None, {})  # type: ignore[arg-type]
            assert service.asked.wait(10)  # It holds the first one, so that the others fill the queue.
    service.released.set()
    assert said[0].startswith("warning: mlflow fails (it has not taken 3 reports); training goes on")
    assert said[1] == "mlflow does not answer: the run ends without its last reports."
    assert service.finished.wait(10)  # No thread waits for ever, though the queue was full at the end.
    assert service.steps == [0, 1, 2, 3]


def test_all_trackers_of_a_run_share_the_time_at_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "_FINISH_SECS", 0.5)
    said, end, services = list[str](), trackers._End(), [Service(), Service(), Service()]
    services[1].released.set()  # It answers.
    with contextlib.ExitStack() as stack:
        for name, service in zip(NAMES, services, strict=True):
            tracker = Tracker(name, service, said.append, end)
            stack.enter_context(tracker.running())
            tracker.interval(Place(1, 9, None, 0), None, {})  # type: ignore[arg-type]
        started = time.monotonic()
    assert time.monotonic() - started < 0.9
    assert said == [f"{name} does not answer: the run ends without its last reports." for name in ("trackio", "wandb")]
    assert services[1].finished.is_set() and services[1].steps == [1]
    for service in services:
        service.released.set()
        assert service.finished.wait(10)


def test_a_run_is_over_once_it_is_scored_after_its_last_step():
    place, service = Place(9, 9, None, 0), Service()
    tracker = Tracker("mlflow", service, print)
    with pytest.raises(KeyError), tracker.running():
        tracker.advance(place)
        raise KeyError  # While it was scored.
    assert service.finished.is_set() and not service.is_over
    tracker = Tracker("mlflow", resumed := Service(), print)
    resumed.released.set()
    with tracker.running():  # It was resumed only to be scored, so it takes no step.
        tracker.evaluation(place, None, {})
    assert resumed.is_over


def test_trackers_that_were_started_are_ended_if_another_one_cannot_be(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def fail(**options: Any) -> None:
        raise RuntimeError("no login.")

    monkeypatch.setattr(sys.modules["trackio"], "init", fail)
    with pytest.raises(UserError, match="trackio cannot be started"):
        open_trackers(run_with(tmp_path, "wandb", "mlflow", "trackio"), print)
    assert ("run.finish", (), {}) in calls and ("client.set_terminated", ("m1", "KILLED"), {}) in calls
