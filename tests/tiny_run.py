"""A tiny run that the tests of its folder, data and checkpoints begin with."""

from pathlib import Path

import numpy as np
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.config.settings import Config
from trainer.data.shards import PreparedData
from trainer.model.build import build_gpt
from trainer.runs.run_checkpoints import open_checkpoints
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import RunFolder


def refuse(line: str) -> None:
    if line.startswith(("Devices: ", "warning: ")):  # Said first, before anything is read.
        return
    raise AssertionError(f"printed, though nothing should have begun: {line}")


def tiny(folder: Path, *overrides: str) -> Config:
    data = {"train": str(folder / "a.txt"), "documents": "file"}
    model = {"num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4}
    train = {"total_steps": 2, "sequence_length": 8, "global_batch_size": 2}
    return tiny_config(folder, *overrides, data=data, tokenizer={"kind": "char"}, model=model, train=train)


def prepared_text(folder: Path, text: str = "the cat sat on the mat\n" * 30) -> PreparedData:
    (folder / "a.txt").write_text(text, encoding="utf-8")
    return tiny_prepared(tiny(folder))


def folder_of(run: RunFolder) -> Path:
    assert isinstance(run.path, Path)
    return run.path


def save_checkpoint(run: RunFolder, step: int, config: Config | None = None) -> dict[str, np.ndarray]:
    tokenizer = load_tokenizer_of(run)
    model = build_gpt(config or run.config, tokenizer.vocabulary_size, tokenizer.bos_id)
    weights = {variable.path: variable.numpy() + 1 for variable in model.variables}
    checkpoints = open_checkpoints(run)
    checkpoints.save(step, {"weights": weights}, {})
    checkpoints.wait()
    return weights


def damage_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
