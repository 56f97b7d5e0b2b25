"""Mutated folders: prepared data, stopped preparations and runs."""

import functools
import random
import shutil
from pathlib import Path
from typing import Any

from mutated_values import mutated_bytes, mutated_json, mutated_toml
from mutation_lab import (
    ANY_TOKENIZER,
    Lab,
    expect,
    expect_message,
    expect_no_leftovers,
    is_next_tried,
    settings_of,
    write_inputs,
)


def prepared_folder(lab: Lab, rng: random.Random) -> bool:
    """A folder of prepared data."""
    write_inputs()
    kind = rng.choice(ANY_TOKENIZER)
    shutil.copytree(lab.seed(kind) / "prepared", "prepared")
    folder = next(Path("prepared").iterdir())
    is_changed = _damage(lab, rng, folder)
    inspected = lab.trainer("inspect", str(folder), statuses=(0, 1, 2))
    expect(bool(inspected.status) or not is_changed, "inspect did not notice the change")
    words = settings_of(kind)
    answer = lab.trainer("prepare", "config.toml", *words)
    expect(answer.status == 2 or not is_changed or not folder.is_dir(), "prepare did not notice the change")
    expect_no_leftovers(Path())
    shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)
    if is_next_tried(rng, answer):
        lab.trainer("prepare", "config.toml", *words, statuses=(0,))
    return not inspected.status


def stopped_folder(lab: Lab, rng: random.Random) -> bool:
    """The folder that a stopped preparation left."""
    from trainer.data.shards import load_prepared

    write_inputs()
    kind = rng.choice(ANY_TOKENIZER)
    (whole,) = (lab.seed(kind) / "prepared").iterdir()
    shutil.copytree(lab.seed(kind) / "stopped", "prepared")
    (left,) = Path("prepared").iterdir()
    _damage(lab, rng, left, may_be_folder=False)
    answer = lab.trainer("prepare", "config.toml", *settings_of(kind), statuses=(0,))
    expect([path.name for path in Path("prepared").iterdir()] == [whole.name], "other files are left")
    found, expected = (load_prepared(path / whole.name).fingerprint for path in (Path("prepared"), whole.parent))
    expect(found == expected, "the data differs from an uninterrupted preparation's")
    return "going on where another" in answer.out


def run_folder(lab: Lab, rng: random.Random) -> bool:
    """A run's folder."""
    from trainer.errors import UserError

    write_inputs()
    kind = rng.choice(ANY_TOKENIZER)
    shutil.copytree(lab.seed(kind) / "run", "run")
    before = _as_planted(lab.seed(kind) / "run")
    _damage(lab, rng, Path("run"))
    verbs = ["inspect"] * 10 + ["generate"] * 5 + ["evaluate", "train"]
    words = {"generate": ("run", "--num-tokens", "3"), "train": ("--resume", "run")}
    verb = rng.choice(verbs)
    # A run whose weights were saved without an optimizer's state cannot be resumed.
    if rng.random() < 0.4 and (kind == "byte" or verb != "train"):
        lab.trainer(verb, *words.get(verb, ("run",)), statuses=(0, 1, 2))
    try:
        with lab.heard():
            opened = _opened(Path("run"))
    except UserError as error:
        expect_message(lab, error)
        opened = None
    if opened is not None:
        for key in {**before["config"], **opened["config"]}:
            now, was = opened["config"].get(key), before["config"].get(key)
            expect(now == was or key.startswith(_resumable()), f"{key}={was!r} became {now!r}")
        expect(opened["tokenizer"] == before["tokenizer"], "another tokenizer")
        step = opened["step"]
        expect(opened["weights"] == _weights_of(str(lab.seed(kind) / "run"), step), "other weights")
    shutil.rmtree("run") if Path("run").is_dir() else Path("run").unlink(missing_ok=True)
    return opened is not None


def _resumable() -> tuple[str, ...]:
    from trainer.config.file import RESUMABLE

    return RESUMABLE


def _opened(path: Path) -> dict[str, Any]:
    """Opens a run's config, data, tokenizer and checkpoint; returns what was read."""
    from trainer.runs.run_checkpoints import load_model
    from trainer.runs.run_data import find_prepared, load_tokenizer_of
    from trainer.runs.run_folder import RunFolder

    run = RunFolder(str(path))
    find_prepared(run)
    model, checkpoint = load_model(run, say=lambda _: None)
    return {
        "config": {
            f"{section}.{name}": value
            for section, settings in run.config.model_dump(mode="json", exclude={"run_folder"}).items()
            for name, value in settings.items()
        },
        "tokenizer": load_tokenizer_of(run).fingerprint,
        "step": checkpoint.step,
        "weights": {variable.path: variable.numpy().tobytes() for variable in model.variables},
    }


_as_planted = functools.cache(_opened)


@functools.cache
def _weights_of(path: str, step: int) -> dict[str, bytes]:
    import safetensors.numpy

    arrays = safetensors.numpy.load_file(f"{path}/checkpoints/step_{step:09d}/weights.safetensors")
    return {name: array.tobytes() for name, array in arrays.items()}


def _damage(lab: Lab, rng: random.Random, folder: Path, may_be_folder: bool = True) -> bool:
    """Mutates a file of a folder, or replaces it by a folder; returns whether the file has changed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    if rng.random() < 0.5:  # The files at the top of the folder matter most.
        files = [path for path in files if path.parent == folder]
    path, other = rng.choice(files), rng.choice(files)
    data = path.read_bytes()
    what = rng.randrange(20)
    if what == 0:
        lab.note("removed", str(path))
        path.unlink()
        return True
    if what == 1 and may_be_folder:
        lab.note("replaced by a folder", str(path))
        path.unlink()
        path.mkdir()
        return True
    if what == 2:
        lab.note("replaced by another file", (str(path), str(other)))
        path.write_bytes(other.read_bytes())
        return path.read_bytes() != data
    mutate = {".json": mutated_json, ".toml": mutated_toml}.get(path.suffix, mutated_bytes)
    changed = (
        b""
        if what == 3
        else data[: rng.randrange(len(data) + 1)]
        if what == 4
        else mutate(rng, data, other.read_bytes())
    )
    lab.write(str(path), changed)
    return changed != data
