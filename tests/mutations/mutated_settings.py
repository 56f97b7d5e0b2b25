"""Mutated configs and overrides."""

import contextlib
import decimal
import json
import random
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trainer
from mutated_values import DEEP, mutated_text, mutated_toml, mutated_tree, nasty
from mutation_lab import CONFIG, GIVEN, Lab, as_argument, expect, expect_no_leftovers, write_inputs


def config(lab: Lab, rng: random.Random) -> bool:
    """A config file."""
    write_inputs()
    shipped = (path.read_bytes() for path in sorted((Path(trainer.__file__).parent / "configs").glob("*.toml")))
    resolved = trainer.make_config(tomllib.loads(CONFIG)).to_toml().encode()
    seeds = [*[CONFIG.encode()] * 4, resolved, *shipped]
    data = mutated_toml(rng, rng.choice(seeds), rng.choice(seeds))
    lab.write("config.toml", data)
    return _try_settings(lab, rng, [], data)


def overrides(lab: Lab, rng: random.Random) -> bool:
    """Settings on the command line."""
    from trainer.config.refusals import setting_names
    from trainer.config.settings import Config

    write_inputs()
    names = [*setting_names(), *Config.model_fields, "model.num_layer", "train", "tokenizer.path"]
    settings = trainer.make_config(tomllib.loads(CONFIG)).model_dump(mode="json")
    words = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key, value = rng.choice(names), nasty(rng)
        section, _, name = key.partition(".")
        known = settings.get(section, {}).get(name) if name else settings.get(section)
        if known is not None and rng.random() < 0.5:
            value = mutated_tree(rng, [known])
            value = value[0] if isinstance(value, list) and value else value
        written = str(value).lower() if isinstance(value, bool | float) else str(value)
        if isinstance(value, list | dict) and rng.random() < 0.5:
            written = json.dumps(value)
        word = f"{key}={written.replace(DEEP, '[' * rng.choice((100, 100_000)))}"
        words.append(mutated_text(rng, word) if rng.random() < 0.3 else word)
    return _try_settings(lab, rng, [as_argument(word) for word in words], CONFIG.encode())


def _try_settings(lab: Lab, rng: random.Random, words: Sequence[str], data: bytes) -> bool:
    from trainer.config.file import load_config, parse_config
    from trainer.errors import UserError

    words = [word for word in words if not word.startswith("-")]
    lab.note("overrides", words)
    try:
        config = load_config("config.toml", words)
    except UserError as error:
        answer = lab.trainer("prepare", "config.toml", *words, statuses=(2,))
        shown = str(error).encode(errors="backslashreplace").decode()
        expect(shown[:30] in answer.err or "usage: " in answer.err, f"prepare says {answer.err!r}, load_config {error}")
        left = {path.name for path in Path().iterdir()} - set(GIVEN)
        expect(not left, f"left behind: {left}")
        return False
    # A run keeps its config as a file, which has to be read as the same config.
    expect(parse_config(config.to_toml(), "again") == config, "to_toml is not read back as it was written")
    if not words:
        expect_values(tomllib.loads(data.decode("utf-8-sig")), config.model_dump(mode="json"))
    for key, _, written in (word.partition("=") for word in words):
        # An override that another one may replace is not checked.
        if sum(word.split(".")[0].split("=")[0].strip() == key.split(".")[0].strip() for word in words) == 1:
            expect_override(config.model_dump(mode="json"), key.strip(), written)
    config.prepared_name()
    if not _is_inside(config) or not _is_small(config):
        return True
    lab.trainer("plan", "config.toml", *words, *([] if config.vocabulary_size() else ["--vocabulary-size", "300"]))
    answer = lab.trainer("prepare", "config.toml", *words)
    if (
        not answer.status
        and rng.random() < 0.05
        and config.distribution.logical_devices == 1
        and config.distribution.kind != "tpu"
    ):
        trained = lab.trainer("train", "config.toml", *words)
        if trained.status:
            again = lab.trainer("train", "config.toml", *words)
            expect(again.err == trained.err, f"the second refusal has another reason: {again.err[:300]!r}")
    expect_no_leftovers(Path())
    if not answer.status:
        lab.trainer("prepare", "config.toml", *words, statuses=(0,))
    return not answer.status


def expect_values(given: Any, taken: Any, key: str = "") -> None:
    """Checks that a config has the values of its file."""
    for name, value in given.items():
        if isinstance(value, dict):
            expect_values(value, taken[name], f"{key}{name}.")
            continue
        found = taken[name]
        listed = [value] if isinstance(found, list) and not isinstance(value, list) else value
        if isinstance(found, float) and type(value) is int:
            listed = float(value)
        expect(
            found == listed and not isinstance(value, bool) ^ isinstance(found, bool),
            f"{key}{name}={value!r} is read as {found!r}",
        )


def expect_override(taken: Any, key: str, written: str) -> None:
    """Checks that a config has the value of an override, by a second and simpler way of reading it."""
    for name in key.split("."):
        taken = taken.get(name)
    bare = written.strip()
    if bare.lower() == "none" or isinstance(taken, list | dict):
        return
    readings: list[Any] = [written]
    with contextlib.suppress(ValueError, RecursionError):
        readings.append(tomllib.loads(f"value = {bare}")["value"])
    if isinstance(taken, bool):
        readings = [{"true": True, "false": False}.get(bare.lower())]
    elif isinstance(taken, int | float):
        with contextlib.suppress(ValueError, ArithmeticError):
            readings.append(type(taken)(decimal.Decimal(bare)))
    expect(
        any(taken == each and isinstance(taken, bool) == isinstance(each, bool) for each in readings),
        f"{key}={written!r} is read as {taken!r}",
    )


def _is_inside(config: Any) -> bool:
    """Returns whether a config reads and writes only in the case's folder."""
    names = [config.run_folder, config.data.prepared_folder, *config.data.train, *(config.data.validation or ())]
    names += [config.tokenizer.path] if hasattr(config.tokenizer, "path") else []
    try:
        return all(
            "://" not in name
            and not name.startswith(("~", "tfds:"))
            and "\0" not in name
            and Path(name).resolve().is_relative_to(Path().resolve())
            for name in names
        )
    except (OSError, ValueError, RuntimeError):
        return False


def _is_small(config: Any) -> bool:
    """Returns whether a step of a config takes little time and memory."""
    model, train, samples = config.model, config.train, config.samples
    tokens = train.global_batch_size * train.sequence_length
    width = max(model.hidden_dim, model.intermediate_dim, model.vocabulary_multiple)
    return (
        model.num_layers * width <= 2_000
        and tokens <= 4_096
        and (train.total_steps or 1) <= 10
        and (train.num_epochs or 1) <= 2
        and max(samples.num_beams, samples.top_k) <= 64
        and (not config.data.is_storybook() or config.data.storybook_stories <= 1_000)
        and config.distribution.logical_devices <= 8
    )
