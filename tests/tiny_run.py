"""A tiny run that the tests of its folder, data and checkpoints begin with."""

from pathlib import Path

import numpy as np
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.config.settings import Config
from trainer.data.shards import PreparedData
from trainer.model.build import build_gpt
from trainer.runs.run_checkpoints import facts_of, open_checkpoints
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import RunFolder


def text_run(folder: Path, name: str, *overrides: str) -> Config:
    """Makes the config of a run that trains three steps on a text in a folder, within seconds."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("the cat sat on the mat with a hat\n" * 60, encoding="utf-8")
    return tiny_config(
        folder,
        f"run_folder={folder}/{name}",
        *overrides,
        data={"train": str(text), "documents": "file", "held_out_fraction": 0.1},
        tokenizer={"kind": "char"},
        train={"total_steps": 3, "sequence_length": 8, "global_batch_size": 4},
        optimizer={"learning_rate": 0.01},
        samples={"num_tokens": 2},
        log={"every_steps": 1},
        checkpoint={"every_steps": 1, "keep_last": 20},
    )


def saved(run: str | Path, step: int) -> dict[str, np.ndarray]:
    """Returns all arrays of a checkpoint."""
    checkpoint = open_checkpoints(RunFolder(run)).of_step(step)
    arrays = {group: checkpoint.arrays(group) for group in ("weights", "optimizer")}
    return {f"{group}/{name}": np.asarray(array) for group in arrays for name, array in arrays[group].items()}


def assert_same_bits(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), name


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


def save_checkpoint(
    run: RunFolder, step: int, config: Config | None = None, with_facts: bool = False
) -> dict[str, np.ndarray]:
    tokenizer = load_tokenizer_of(run)
    model = build_gpt(config or run.config, tokenizer.vocabulary_size, tokenizer.bos_id)
    weights = {variable.path: variable.numpy() + 1 for variable in model.variables}
    checkpoints = open_checkpoints(run)
    checkpoints.save(step, {"weights": weights}, facts_of(run) if with_facts else {})
    checkpoints.wait()
    return weights


def damage_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
