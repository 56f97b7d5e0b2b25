"""Laws of a run in Python: its callbacks, how they stop it, and what its result tells."""

import inspect
import pydoc
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
from tiny import quiet  # type: ignore[import-not-found]
from tiny_run import text_run  # type: ignore[import-not-found]

import trainer
from trainer.monitoring.callbacks import Callbacks
from trainer.monitoring.events import Place
from trainer.runs.run_checkpoints import open_checkpoints
from trainer.runs.run_folder import RunFolder
from trainer.training.loop import TrainingResult


class Recording(trainer.Callback):
    """Writes down every call."""

    def __init__(self) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}
        self.losses: dict[int, float] = {}
        self.checkpoints: dict[int, bool] = {}

    def on_step(self, step, values):
        self.steps[step] = values

    def on_evaluation(self, step, evaluation):
        self.losses[step] = evaluation.loss

    def on_checkpoint(self, step, folder):
        self.checkpoints[step] = open_checkpoints(RunFolder(Path(folder).parents[1])).of_step(step).has("weights")


class Raising(trainer.Callback):
    """Raises an error at a step."""

    def __init__(self, step: int, error: Exception) -> None:
        self.step, self.error = step, error

    def on_step(self, step, values):
        if step == self.step:
            raise self.error


class Runs(NamedTuple):
    """A run of three steps that reports each of them: a callback stops it after one step, and it goes on."""

    stopped: TrainingResult
    finished: TrainingResult
    said: list[str]
    recording: Recording


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    recording, said = Recording(), list[str]()
    config = text_run(tmp_path_factory.mktemp("callbacks"), "run", "evaluation.every_steps=2")
    stopped = trainer.train(config, say=said.append, callbacks=[recording, Raising(1, trainer.StopTraining())])
    # After the last step there is nothing to stop: the run is finished, and then the error is raised.
    with pytest.raises(ZeroDivisionError):
        trainer.resume(stopped.run_folder, say=quiet, callbacks=[recording, Raising(3, ZeroDivisionError())])
    return Runs(stopped, trainer.resume(stopped.run_folder, say=quiet), said, recording)


def test_a_run_calls_at_each_report_each_score_and_each_checkpoint_that_is_whole(runs: Runs):
    recording = runs.recording
    assert list(recording.steps) == [1, 2, 3] and list(recording.losses) == [2]
    # The step at which an error came was saved before, and nothing is called after an error.
    assert recording.checkpoints == {1: True, 2: True}


def test_a_callback_stops_a_run_which_is_saved_and_can_go_on(runs: Runs):
    assert (runs.stopped.step, runs.stopped.is_stopped, runs.stopped.evaluation) == (1, True, None)
    assert any(line.startswith("Stopped at step 1 of 3, saved. Go on with: ") for line in runs.said)
    assert (runs.finished.step, runs.finished.is_stopped) == (3, False)
    assert (Path(runs.finished.run_folder) / "result.json").is_file()


def test_history_of_a_result_has_what_callbacks_got(runs: Runs):
    curve = runs.finished.history["train/loss/nats_per_token"]
    assert curve.steps.tolist() == [1, 2, 3]
    losses = [values["loss/nats_per_token"] for values in runs.recording.steps.values()]
    np.testing.assert_array_equal(curve.values, np.array(losses, np.float32))
    scored = runs.finished.history["validation/loss/nats_per_token"]
    assert scored.steps.tolist() == [2, 3] and scored.values[0] == np.float32(runs.recording.losses[2])


def test_a_result_reads_well(runs: Runs):
    result = runs.finished
    assert result.evaluation is not None
    text = repr(result)
    assert text.startswith(f"<{result.run_folder} at step 3; validation: loss {result.evaluation.loss:.4f} nats")
    assert "samples by greedy" in text and "keras" not in text.lower() and len(text) < 500
    assert repr(runs.stopped) == f"<{result.run_folder} at step 1, stopped>"


def test_nothing_is_called_after_an_error_and_nothing_is_stopped_after_the_last_step():
    stops, recording = list[int](), Recording()
    error = ZeroDivisionError()
    callbacks = Callbacks([Raising(2, error), recording], lambda: stops.append(1))
    for step in (1, 2, 3):
        callbacks.interval(Place(step, 3, None, 0), None, {})
    assert list(recording.steps) == [1] and stops == [1]
    with pytest.raises(ZeroDivisionError):
        callbacks.ended()
    callbacks.ended()
    callbacks.advance(Place(3, 3, None, 0))
    callbacks.interval(Place(2, 3, None, 0), None, {})
    assert stops == [1]


def test_keras_gets_the_loss_of_score_from_the_validation_batches(runs: Runs):
    result = runs.finished
    assert result.evaluation is not None
    model = trainer.load(result.run_folder).model
    entropy = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="entropy")
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), weighted_metrics=[entropy])
    config = trainer.make_config(RunFolder(result.run_folder).facts["config"])
    batches = trainer.validation_batches(config, quiet)
    found = model.evaluate(batches, verbose=0, return_dict=True)
    assert found["entropy"] == pytest.approx(result.evaluation.loss, rel=1e-6)  # Sums of float32.
    num_tokens = sum(float(weights.numpy().sum()) for _, _, weights in batches)
    assert num_tokens == result.evaluation.num_tokens


def test_help_names_every_function_and_explains_every_argument():
    text = pydoc.render_doc(trainer, renderer=pydoc.plaintext)
    functions = [name for name in trainer.__all__ if inspect.isfunction(getattr(trainer, name, None))]
    assert len(functions) >= 10
    for name in functions:
        assert f"\n    {name}(" in text
        arguments = list(inspect.signature(getattr(trainer, name)).parameters)
        docstring = inspect.getdoc(getattr(trainer, name)) or ""
        assert not [each for each in arguments if f"\n    {each}: " not in docstring], name
    assert "class Callback" in text and "class GPT" not in text
    assert {"Callback", "load_config", "train"} <= set(dir(trainer))


def test_an_error_that_is_kept_is_said_if_another_one_ends_the_run():
    said, place = list[str](), Place(1, 3, None, 0)
    callbacks = Callbacks([Raising(1, ZeroDivisionError("by 0"))], lambda: None, said.append)
    with pytest.raises(OSError, match="full"), callbacks.running():
        callbacks.interval(place, None, {})
        raise OSError("the disk is full")
    assert said == ["Before that, a callback raised ZeroDivisionError: by 0"]
    with pytest.raises(ZeroDivisionError), callbacks.running():
        callbacks.ended()
    assert len(said) == 1
