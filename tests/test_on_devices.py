"""Laws of a model that several devices hold together after its training."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import split_model  # type: ignore[import-not-found]  # pytest has this folder on its path
from tiny import quiet, tiny_config  # type: ignore[import-not-found]

from trainer.data.prepare import prepare
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    (folder / "a.txt").write_text("the cat sat on the mat with a hat .\nand a dog\n" * 20, encoding="utf-8")
    return folder


def split_over(number: int, name: str, run: str) -> subprocess.Popen:
    devices = ("distribution.kind=cpu", f"distribution.logical_devices={number}", "distribution.shard=weights")
    command = [sys.executable, str(SCRIPT), name, run, *devices]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_devices_that_hold_a_model_together_score_and_write_what_a_single_one_does(folder: Path):
    runs = {name: str(make_run(folder, name).path) for name in MODELS}
    started = {"untied": split_over(2, "untied", runs["untied"]), "tied": split_over(3, "tied", runs["tied"])}
    try:
        for name, process in started.items():
            whole = getattr(split_model, name)(runs[name], [])
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
            split = json.loads(out)
            assert split["texts"] == whole["texts"]
            assert split["written"] == whole["written"]
            ((one,), (other,)) = whole["scores"], split["scores"]
            assert one.keys() == other.keys()
            for figure, value in one.items():
                # float64: separates a bug from rounding.
                expected = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
                assert other[figure] == expected, figure
    finally:
        for process in started.values():
            process.kill()
            process.communicate()
