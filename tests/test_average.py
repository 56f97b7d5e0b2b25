"""Laws of the average of the weights: NumPy is the reference, and whatever leaves a run has the average."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import quiet  # type: ignore[import-not-found]  # pytest has this folder on its path
from tiny_run import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    assert_same_bits,
    folder_of,
    prepared_text,
    save_checkpoint,
    saved,
    text_run,
    tiny,
)

import trainer
from trainer.cli import main
from trainer.config.file import make_config
from trainer.distributed.strategy import make_strategy
from trainer.errors import UserError
from trainer.exchange.open import open_model
from trainer.exchange.starting_weights import read_beginning
from trainer.model.build import make_model
from trainer.optimizers.average import ETA, WeightAverage, name_of_average
from trainer.reports.history import read_history
from trainer.reports.summary import loss_lines
from trainer.runs.fork import plan_fork
from trainer.runs.parentage import Beginning
from trainer.runs.results import read_scores
from trainer.runs.run_checkpoints import open_checkpoints
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import RunFolder
from trainer.training import launch
from trainer.training.loop import TrainingResult
from trainer.training.snapshot import restore
from trainer.training.step import TrainingStep

DECAY = 0.9


def average_of(weights: list[np.ndarray], decay: float) -> np.ndarray:
    """The average of the weights after the updates 1, 2, ...: the docstring of WeightAverage, in their dtype."""
    average = np.zeros_like(weights[0])
    for t, newest in enumerate(weights, 1):
        average = average + np.asarray(max(1 - decay, (ETA + 1) / (t + ETA)), newest.dtype) * (newest - average)
    return average


@pytest.fixture
def weights() -> dict[str, keras.Variable]:
    return {"a/kernel": keras.Variable(np.full([2, 3], 100.0), dtype="float64", name="kernel")}


@pytest.mark.parametrize("jit_compile", [False, True])
def test_equals_numpy_and_forgets_the_initial_weights(weights: dict[str, keras.Variable], jit_compile: bool):
    average = WeightAverage(DECAY, weights)
    average.begin()
    np.testing.assert_array_equal(average.averages[0].numpy(), np.full([2, 3], 100.0))
    update = tf.function(average.update, jit_compile=jit_compile, autograph=False)
    random, seen = np.random.default_rng(0), []
    # After 82 updates the decay is the smaller limit.
    for t in range(1, 100):
        seen.append(random.normal(size=[2, 3]))
        weights["a/kernel"].assign(seen[-1])
        update()
        if t in (1, 2, 10, 99):
            np.testing.assert_allclose(average.averages[0].numpy(), average_of(seen, DECAY), rtol=0, atol=1e-14)
    assert {name: variable.shape for name, variable in average.state().items()} == {
        "num_averaged": [],
        "a/kernel/average": [2, 3],
    }


def test_the_model_has_the_average_for_a_while_and_then_its_own_bits_again(weights: dict[str, keras.Variable]):
    average = WeightAverage(DECAY, weights)
    own, other = np.pi * np.arange(6.0).reshape(2, 3), np.e * np.arange(6.0).reshape(2, 3)
    weights["a/kernel"].assign(own)
    average.averages[0].assign(other)
    with pytest.raises(KeyError), average.in_the_model():
        np.testing.assert_array_equal(weights["a/kernel"].numpy(), other)
        raise KeyError
    assert weights["a/kernel"].numpy().tobytes() == own.tobytes()
    assert average.averages[0].numpy().tobytes() == other.tobytes()
    # As a TPU does it.
    tf.function(average._exchange_on_replica, jit_compile=True, autograph=False)()
    assert weights["a/kernel"].numpy().tobytes() == other.tobytes()
    assert average.averages[0].numpy().tobytes() == own.tobytes()


@pytest.mark.parametrize("value", ["0", "1", "0.99999999"])
def test_a_decay_without_a_meaning_is_refused(value: str):
    with pytest.raises(UserError, match=r"optimizer\.ema_decay="):
        make_config(
            {"run_folder": "r", "train": {"total_steps": 1, "precision": "float32"}}, [f"optimizer.ema_decay={value}"]
        )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A run of three large steps with an average, with a checkpoint and a score of each."""
    overrides = (f"optimizer.ema_decay={DECAY}", "optimizer.learning_rate=0.1", "evaluation.every_steps=1")
    config = text_run(tmp_path_factory.mktemp("averaged"), "run", *overrides)
    return trainer.train(config, say=quiet)


def arrays_of(run: str, step: int) -> dict[str, np.ndarray]:
    stored = open_checkpoints(RunFolder(run)).of_step(step).arrays("average")
    return {name: np.asarray(array) for name, array in stored.items()}


def assert_has_average(model: keras.Model, run: str, step: int = 3) -> None:
    averages, weights = arrays_of(run, step), saved(run, step)
    for variable in model.variables:
        average = averages[name_of_average(variable.path)]
        assert variable.numpy().tobytes() == average.tobytes(), variable.path
        assert np.linalg.norm(average - weights[f"weights/{variable.path}"]) > 1e-3


def test_a_checkpoint_has_the_average_of_the_weights_after_each_step(result: TrainingResult):
    steps = [saved(result.run_folder, step) for step in (1, 2, 3)]
    averages = arrays_of(result.run_folder, 3)
    assert averages.pop("num_averaged") == 3 and result.model is not None
    assert averages.keys() == {name_of_average(variable.path) for variable in result.model.variables}
    for variable in result.model.variables:
        expected = average_of([step[f"weights/{variable.path}"] for step in steps], DECAY)
        np.testing.assert_allclose(averages[name_of_average(variable.path)], expected, rtol=1e-6, atol=1e-7)


def test_what_is_trained_loaded_exported_evaluated_and_begun_with_is_the_average(
    result: TrainingResult, tmp_path: Path
):
    run = result.run_folder
    assert_has_average(result.model, run)
    assert_has_average(trainer.load(run).model, run)
    assert_has_average(trainer.load(run, step=2).model, run, step=2)
    trainer.export(run, "keras", str(tmp_path / "a.keras"), say=quiet)
    assert_has_average(open_model(str(tmp_path / "a.keras")).model, run)
    assert result.evaluation is not None and result.evaluation.raw_loss is not None
    assert trainer.score(run, say=quiet).loss == result.evaluation.loss
    assert abs(result.evaluation.raw_loss - result.evaluation.loss) > 1e-3
    child = read_beginning(text_run(Path(run).parent, "child", f"init.from={run}"), is_foreign=False, say=quiet)
    assert child is not None and child.groups.keys() == {"weights"}
    averages = arrays_of(run, 3)
    for name, array in child.groups["weights"].items():
        np.testing.assert_array_equal(array, averages[name_of_average(name)])
    manifest = open_checkpoints(RunFolder(run)).of_step(3).manifest
    assert child.parents[0]["weights_sha256"] == manifest["files"]["average.safetensors"]["sha256"]


def test_generate_writes_with_the_average(tmp_path: Path):
    prepared_text(tmp_path)
    run = RunFolder.create(tiny(tmp_path), prepared_text(tmp_path))
    weights = save_checkpoint(run, 1)
    letter = load_tokenizer_of(run).encode("s")[0]
    averages = {name_of_average(name): np.zeros_like(array) for name, array in weights.items()}
    averages["gpt/unembedding/bias/average"][letter] = 1.0  # The likeliest token whatever comes before.
    checkpoints = open_checkpoints(run)
    checkpoints.save(2, {"weights": weights, "average": averages}, {})
    checkpoints.wait()
    texts = [trainer.generate(folder_of(run), "th", sampler="greedy", num_tokens=3, step=step)[0] for step in (1, 2)]
    assert str(texts[1]) == "thsss" != str(texts[0])


def test_both_losses_are_shown_and_the_best_one_is_the_average_s(
    result: TrainingResult, capsys: pytest.CaptureFixture[str]
):
    curves = result.history
    averaged, raw = (curves[f"validation/loss/nats_per_token{each}"] for each in ("", "_raw"))
    assert averaged.steps.tolist() == raw.steps.tolist() == [1, 2, 3]
    assert averaged.values[0] == raw.values[0] and np.all(averaged.values[1:] != raw.values[1:])
    losses = read_scores(RunFolder(result.run_folder))
    np.testing.assert_allclose([losses[step] for step in (1, 2, 3)], averaged.values, rtol=1e-6)
    assert [line.name for line in loss_lines(read_history(result.run_folder))][2] == "validation, not averaged"
    assert f"without the average of the weights {raw.values[2]:.4f}" in str(result.evaluation)
    capsys.readouterr()
    assert main(["watch", result.run_folder, "--once"]) == 0
    assert f"without the average of the weights {raw.values[2]:.4f}" in capsys.readouterr().out
    assert main(["inspect", result.run_folder, "--examples", "0"]) == 0
    assert f"optimizer.ema_decay={DECAY}" in capsys.readouterr().out


def test_a_run_that_was_killed_and_resumed_has_the_bits_of_an_uninterrupted_one(result: TrainingResult, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(result.run_folder, run)
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step_00000000{step}")
    resumed = trainer.resume(
        str(run), say=quiet, overrides=[f"data.prepared_folder={Path(result.run_folder).parent}/prepared"]
    )
    assert_same_bits(saved(run, 3), saved(result.run_folder, 3))
    assert_same_bits(arrays_of(str(run), 3), arrays_of(result.run_folder, 3))
    assert resumed.evaluation == result.evaluation
    assert_has_average(resumed.model, str(run))
    # A finished run has its result in its folder, and only its model is loaded.
    assert_has_average(trainer.resume(str(run), say=quiet).model, str(run))


def new_step(run: RunFolder, *overrides: str) -> TrainingStep:
    config = make_config(run.config.model_dump(mode="json"), overrides)
    strategy = make_strategy(config.distribution)
    with strategy.scope():
        model = make_model(None, config, load_tokenizer_of(run).vocabulary_size, 2)
    return TrainingStep(config, 3, model, strategy)


def beginning(run: str, *overrides: str) -> Beginning:
    """What a fork begins with."""
    fork = plan_fork(f"{run}@2", ["run_folder=fork", *overrides])
    request = launch.Request(fork.config, None, None, may_prepare=True, fork=fork)
    found = launch._beginning(request, read_beginning, quiet)
    assert found is not None
    return found


def test_a_fork_keeps_adds_or_drops_the_average(result: TrainingResult):
    run = RunFolder(result.run_folder)
    begun = {name: np.asarray(array) for name, array in beginning(result.run_folder).groups["average"].items()}
    assert_same_bits(begun, arrays_of(result.run_folder, 2))
    assert beginning(result.run_folder, "optimizer.ema_decay=none").groups.keys() == {"weights", "optimizer"}
    without = new_step(run, "optimizer.ema_decay=none")
    assert without.average is None and not [name for name in without.state() if "average" in name]
    added, checkpoint = new_step(run), open_checkpoints(run).of_step(2)
    files = {name: each for name, each in checkpoint.manifest["files"].items() if name != "average.safetensors"}
    assert restore(added, checkpoint._replace(manifest=checkpoint.manifest | {"files": files})) == 2
    assert added.average is not None and added.average.num_averaged.numpy() == 0
    for name, variable in added.named_variables.items():
        np.testing.assert_array_equal(added.average.state()[name_of_average(name)], variable)
