"""Laws of a model that several devices hold together after its training."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import split_model  # type: ignore[import-not-found]  # pytest has this folder on its path
import tensorflow as tf
from tiny import quiet, tiny_config  # type: ignore[import-not-found]

import trainer
from trainer.data.prepare import prepare
from trainer.errors import UserError
from trainer.exchange.keras_file import KerasFile
from trainer.exchange.open import _variables_on_host, open_model, read_config_on_devices
from trainer.model.build import build_gpt
from trainer.optimizers.average import name_of_average
from trainer.runs.run_checkpoints import open_checkpoints
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import RunFolder

SCRIPT = Path(__file__).parent / "split_model.py"
# Sizes that leave pieces of which the last rows are padding, on two and on three devices.
SHAPE = {"num_heads": 1, "hidden_dim": 10, "intermediate_dim": 14}
MODELS = {
    "untied": SHAPE | {"num_layers": 2},
    "tied": SHAPE
    | {
        "num_layers": 1,
        "tied_embeddings": True,
        "use_bias": False,
        "pre_norm": True,
        "norm": "rms",
        "positions": "rope",
        "activation": "swiglu",
    },
}


def make_run(folder: Path, name: str) -> RunFolder:
    """A run with a checkpoint of a model whose next token depends on all before it, and of the average of its weights,
    which is what counts.
    """
    config = tiny_config(
        folder,
        f"run_folder={folder}/{name}",
        data={"train": str(folder / "a.txt"), "documents": "file", "held_out_fraction": 0.2},
        tokenizer={"kind": "char"},
        model=MODELS[name],
        train={"total_steps": 2, "sequence_length": 12, "global_batch_size": 6, "precision": "float64"},
        optimizer={"ema_decay": 0.9},
        log={"histograms_every_steps": 1},  # No training in pieces makes them; scores and texts need none.
    )
    run = RunFolder.create(config, prepare(config, quiet))
    tokenizer, random = load_tokenizer_of(run), np.random.default_rng(2)
    weights, average = {}, {}
    for variable in build_gpt(config, tokenizer.vocabulary_size, tokenizer.bos_id).variables:
        mean = 1.0 if variable.path.endswith("gamma") else 0.0
        weights[variable.path] = np.zeros(variable.shape)
        average[name_of_average(variable.path)] = random.normal(mean, 0.9, variable.shape)
    checkpoints = open_checkpoints(run)
    checkpoints.save(2, {"weights": weights, "average": average}, {})
    checkpoints.wait()
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("split")
    (folder / "a.txt").write_text("the cat sat on the mat with a hat .\nand a dog\n" * 20, encoding="utf-8")
    return {name: str(make_run(folder, name).path) for name in MODELS}


def split_over(number: int, name: str, run: str) -> subprocess.Popen:
    devices = ("distribution.kind=cpu", f"distribution.logical_devices={number}", "distribution.shard=weights")
    command = [sys.executable, str(SCRIPT), name, run, *devices]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_devices_that_hold_a_model_together_score_and_write_what_a_single_one_does(runs: dict[str, str]):
    started = {"untied": split_over(2, "untied", runs["untied"]), "tied": split_over(3, "tied", runs["tied"])}
    try:
        for name, process in started.items():
            whole = getattr(split_model, name)(runs[name], [])
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
            split = json.loads(out)
            (one,), (other,) = whole.pop("scores"), split.pop("scores")
            assert one.keys() == other.keys()
            for figure, value in one.items():
                # float64: separates a bug from rounding.
                expected = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
                assert other[figure] == expected, figure
            assert split == whole
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def test_a_single_device_holds_a_model_whole_whatever_its_run_had(runs: dict[str, str]):
    model = trainer.load(runs["tied"], overrides=["distribution.kind=cpu", "distribution.shard=weights"])
    expected = trainer.load(runs["tied"])
    for one, other in zip(model.model.get_weights(), expected.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.generate("the", "greedy") == expected.generate("the", "greedy")


def test_other_holders_get_the_weights_of_each_kind_of_folder_and_file(runs: dict[str, str], tmp_path: Path):
    places = [runs["tied"]]
    for kind, name in (("keras", "model.keras"), ("huggingface", "model")):
        places.append(str(trainer.export(runs["tied"], kind, str(tmp_path / name), say=quiet).path))
    for place in places:
        expected = {variable.path: variable.numpy() for variable in open_model(place, say=quiet).model.variables}
        held: dict[str, tf.Variable] = {}

        def make_holders(model: keras.Model, held: dict[str, tf.Variable] = held) -> dict[str, tf.Variable]:
            held |= {each.path: tf.Variable(tf.zeros(each.shape, each.dtype)) for each in model.variables}
            return held

        open_model(place, say=quiet, make_holders=make_holders)
        assert held.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_array_equal(held[path].numpy(), array, err_msg=f"{place}: {path}")


def test_devices_that_cannot_write_are_refused(runs: dict[str, str]):
    with pytest.raises(
        UserError, match=r"train\.xla=on: generate and load change only the devices, distribution\.\*; leave"
    ):
        trainer.load(runs["tied"], overrides=["train.xla=on"])
    with pytest.raises(UserError, match=r"texts are written on a CPU or on GPUs; set distribution\.kind=cpu"):
        trainer.generate(runs["tied"], overrides=["distribution.kind=tpu"])


def test_a_training_in_pieces_makes_no_histograms_and_refuses_them(runs: dict[str, str], tmp_path: Path):
    pieces = ["distribution.kind=cpu", "distribution.logical_devices=2", "distribution.shard=weights"]
    config = read_config_on_devices(runs["tied"], pieces)
    assert config.log.histograms_every_steps == 1
    message = r"histograms_every_steps=1 needs whole weights .*; set log\.histograms_every_steps=none, or choose 'optim"
    with pytest.raises(UserError, match=message):
        trainer.train(config.model_copy(update={"run_folder": str(tmp_path / "new")}), say=quiet)
    with pytest.raises(UserError, match=message):
        trainer.resume(runs["tied"], overrides=pieces, say=quiet)
    with pytest.raises(UserError, match=message):
        trainer.fork(runs["tied"], [*pieces, "train.total_steps=4", f"run_folder={tmp_path}/fork"], say=quiet)
    assert not (tmp_path / "fork" / "run.json").exists() and not (tmp_path / "new" / "run.json").exists()


def test_a_keras_file_is_in_memory_only_once_when_other_holders_get_its_weights(runs: dict[str, str], tmp_path: Path):
    path = str(trainer.export(runs["tied"], "keras", str(tmp_path / "model.keras"), say=quiet).path)
    file = KerasFile(path)
    tokenizer = file.tokenizer()
    arrays = _variables_on_host(file, lambda: build_gpt(file.config, tokenizer.vocabulary_size, tokenizer.bos_id))
    # Copies by NumPy would be a second model: `assign` makes them one by one.
    assert arrays and not any(isinstance(array, np.ndarray) for array in arrays.values())
