"""Reads a run's settings: a TOML file plus `section.key=value` overrides, into the models of settings.py.

An unknown or impossible setting is refused; the message names it, and the nearest known setting or what is allowed.
This module also decides what a resumed run may change, and makes the JSON schema that editors complete and check by.
"""

import copy
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from trainer.config.overrides import FLOAT, apply_overrides, read_toml
from trainer.config.refusals import explain, shown, unwritable
from trainer.config.settings import Config, DataConfig, learns_vocabulary, tokenizer_tag
from trainer.errors import UserError, quoted

# The configs that ship with trainer; in a checkout this folder is a link to configs/.
SHIPPED_CONFIGS = Path(__file__).parents[1] / "configs"

_OF_STORYBOOK = ("data.storybook_stories", "data.storybook_seed")
_MAX_CONFIG_BYTES = 1 << 20


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies overrides and checks the result.

    Args:
        path: the TOML file, or the name of a config that ships with trainer, such as quickstart. A file of that name
            has precedence. If the file does not set run_folder, it is `runs/` and the file's stem.
        overrides: `section.key=value` strings. The value is read by the type of the setting: a text as it stands (in
            quotation marks: as in TOML), a list as [a,b] with or without quotation marks, a number also as .5, 1. or
            1e4, true and false also with capitals. `none` removes the key. train.total_steps replaces the file's
            train.num_epochs, and the other way round. tokenizer.kind and tokenizer.path replace the settings of
            another kind of tokenizer.

    Raises:
        UserError: the file cannot be read, or a setting is unknown or impossible.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111 (Path's raises for ~NOBODY)
    try:
        path = _find_config(path)
        text = _read_toml_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file.{_known_configs()}") from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder, not a config file; to resume a run in it: trainer train --resume {quoted(path)}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not a readable TOML file: not UTF-8 at byte offset {error.start}; save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: not a readable TOML file: {error.strerror or error}.") from None
    except ValueError as error:
        raise UserError(f"{path}: not a readable TOML file: {error}") from None
    return parse_config(text, str(path), overrides)


def _read_toml_file(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_CONFIG_BYTES + 1)  # /dev/zero has no end.
    if len(content) > _MAX_CONFIG_BYTES:
        raise UserError(f"{path}: not a readable TOML file: more than {_MAX_CONFIG_BYTES} bytes.")
    return content.decode("utf-8-sig")


def _find_config(path: Path) -> Path:
    """Returns the path of the shipped config if a bare name means one, otherwise the path itself."""
    shipped = SHIPPED_CONFIGS / f"{path.name.removesuffix('.toml')}.toml"
    # A run's folder of that name is probably meant to be resumed, so it is refused like any other folder.
    is_taken = path.is_file() or (path / "config.toml").is_file()
    return shipped if len(path.parts) == 1 and shipped.is_file() and not is_taken else path


def parse_config(text: str, path: str, overrides: Sequence[str] = ()) -> Config:
    """Does what `load_config` does, for a text that was read from the file at that path."""
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable TOML file: {error}{_toml_advice(text, str(error))}") from None
    settings.setdefault("run_folder", f"runs/{Path(path).stem}")
    return make_config(settings, overrides)


def whole_number(text: str) -> int | None:
    """Returns the number that a text of up to 18 digits writes, which 64 bits hold; None for any other text.

    `int` reads digits of every script and raises ValueError for more than 4,300 of them.
    """
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def split_step(path: str) -> tuple[str, str | None]:
    """Returns a run's folder, and the step of the checkpoint that a path also names: RUN@1000, RUN@best, or the
    checkpoint's own folder, RUN/checkpoints/step_000001000. The step is None if the path names none.
    """
    if named := re.fullmatch(r"(.*[^/])@(best|[0-9]{1,18})", path, re.DOTALL):
        return named[1], named[2]
    if named := re.fullmatch(r"(?:(.*)/)?checkpoints/step_([0-9]{1,18})/*", path, re.DOTALL):
        return named[1] or ".", named[2]
    return path, None


# The settings that a resumed run may change. These belong to the machine, and a change is valid for one process: they
# decide the devices and the costs, but not the resulting model.
OF_PROCESS = (
    "distribution.",
    "train.micro_batch_size",
    "train.steps_per_call",
    "train.xla",
    "train.recompute",
    "log.",
    "profile.",
    "checkpoint.",
    "data.prepared_folder",
)
# These belong to the run, and a change is kept for all processes that follow.
OF_RUN = ("samples.", "evaluation.", "train.total_steps", "train.num_epochs")
RESUMABLE = OF_PROCESS + OF_RUN
_RESUMABLE_TEXT = ", ".join(f"{key}*" if key.endswith(".") else key for key in RESUMABLE)


def check_resumable(overrides: Iterable[str], run_folder: object) -> None:
    """Raises UserError if an override would make a resumed run another run."""
    for override in overrides:
        if not override.startswith(RESUMABLE):
            changed = f"{quoted(f'run_folder={run_folder}-2')} {quoted(override)}"
            instead = f"fork the run: trainer fork {quoted(run_folder)} {changed}"
            if override.startswith(("model.", "tokenizer", "init", "optimizer.kind")) and not override.startswith(
                "model.dropout"
            ):
                instead = f"start a new run: trainer train {quoted(f'{run_folder}/config.toml')} {changed}"
            raise UserError(
                f"{override}: a resumed run keeps the config that it was started with; only {_RESUMABLE_TEXT} can "
                f"change. For this, {instead}"
            )


def check_same_run(config: Config, started: Config) -> None:
    """Raises UserError if a config differs from the one that a run was started with, in more than a run may change."""
    if differing := differing_settings(config, started):
        raise UserError(
            f"run_folder={config.run_folder!r} holds a run that was started with other settings: {shortened(differing)}"
            f". Go on with the settings that it was started with (only {_RESUMABLE_TEXT} can change), choose another "
            f"run_folder for a new run, or fork this one: trainer fork {quoted(config.run_folder)} "
            f"{quoted(f'run_folder={config.run_folder}-2')} KEY=VALUE"
        )


def differing_settings(config: Config, started: Config, resumable: bool = False) -> list[str]:
    """Returns the settings in which a config differs from the one that a run was started with.

    Args:
        config: the new config.
        started: the config that the run was started with.
        resumable: whether to return the settings that a resumed run may change, or all others.

    Returns:
        One `key=value (was value)` for each setting.
    """
    now, before = _flat(config), _flat(started)
    return [
        f"{key}={now.get(key)!r} (was {before.get(key)!r})"
        for key in {**before, **now}
        if now.get(key) != before.get(key) and key.startswith(RESUMABLE) == resumable
    ]


def kept_changes(config: Config, recorded: Config) -> list[str]:
    """Returns the settings that belong to the run and are others than in its record, as `differing_settings` does."""
    return [each for each in differing_settings(config, recorded, resumable=True) if each.startswith(OF_RUN)]


def with_kept_changes(config: Config, recorded: Config) -> Config:
    """Returns the config of a run's record, with the settings of another config that belong to the run."""
    settings, now = recorded.model_dump(mode="json"), config.model_dump(mode="json")
    for section, values in now.items():
        if isinstance(values, dict):
            settings[section] |= {key: each for key, each in values.items() if f"{section}.{key}".startswith(OF_RUN)}
    return make_config(settings)


def shortened(differing: Sequence[str]) -> str:
    """Returns the first three of these differences, and the number of the others."""
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    return "; ".join(differing[:3]) + more


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json", exclude={"run_folder"})
    return {f"{section}.{name}": value for section, settings in sections.items() for name, value in settings.items()}


def make_config(settings: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Builds a checked config from nested settings and overrides.

    Args:
        settings: the settings by section, as `tomllib` returns them: `{"run_folder": "runs/x", "train": {...}}`.
        overrides: `section.key=value` strings; see `load_config`.

    Raises:
        UserError: a setting is unknown or impossible; the message has a line for each.
    """
    merged = copy.deepcopy(dict(settings))
    overrides = list(overrides)
    apply_overrides(merged, overrides)
    _take_tokenizer_of_source(merged, overrides)
    problems = [*unwritable(merged, "")]
    if problems:
        raise UserError("\n".join(problems))
    try:
        # From JSON strict mode refuses "3" and true as numbers, but accepts a list as a tuple.
        config = Config.model_validate_json(json.dumps(merged), strict=True)
    except pydantic.ValidationError as error:
        raise UserError("\n".join(explain(problem) for problem in error.errors())) from None
    _check_effect(config.data, overrides)
    return config


def _take_tokenizer_of_source(settings: dict[str, Any], overrides: Iterable[str]) -> None:
    """With init.from, replaces a tokenizer that would learn another vocabulary by the tokenizer of that model, in
    place. A file may describe such a tokenizer, because it may be meant for runs from the start, too.

    Raises:
        UserError: an override describes such a tokenizer.
    """
    init, tokenizer = settings.get("init"), settings.get("tokenizer", {})
    source = init.get("from") if isinstance(init, dict) else None
    if not isinstance(source, str) or not source:
        return
    if isinstance(tokenizer, dict) and (not tokenizer or learns_vocabulary(tokenizer_tag(tokenizer))):
        for override in overrides:
            if override.startswith("tokenizer") and override.partition("=")[2].strip().lower() != "none":
                raise UserError(
                    f"{shown(override)} has no effect with init.from={source!r}, whose tokenizer is used; leave out "
                    "one of the two."
                )
        tokenizer = settings["tokenizer"] = {"kind": "saved"}
    if isinstance(tokenizer, dict) and tokenizer.get("kind") == "saved":
        tokenizer.setdefault("path", split_step(source)[0])


def _check_effect(data: DataConfig, overrides: Iterable[str]) -> None:
    """Raises UserError if an override has no effect with the rest of the config. A file may have such a setting: it may
    be meant for several texts."""
    in_vain = {} if data.is_storybook() else dict.fromkeys(_OF_STORYBOOK, f"data.train={list(data.train)}")
    if data.validation is not None:
        in_vain["data.held_out_fraction"] = f"data.validation={list(data.validation)}"
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip() in in_vain and value.strip().lower() != "none":
            raise UserError(f"{shown(override)} has no effect with {in_vain[key.strip()]}; leave out one of the two.")


def json_schema() -> str:
    """Returns the JSON schema by which editors complete and check a config file: configs/schema.json."""
    schema = Config.model_json_schema()
    # `load_config` chooses a run_folder if the file has none.
    schema["required"].remove("run_folder")
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _known_configs() -> str:
    here = sorted(str(path) for path in Path("configs").glob("*.toml"))
    shipped = sorted(path.stem for path in SHIPPED_CONFIGS.glob("*.toml"))
    return (f" In configs/: {', '.join(here)}." if here else "") + f" Shipped configs: {', '.join(shipped)}."


def _toml_advice(text: str, error: str) -> str:
    """Returns how to write the line that an error names in TOML, as a sentence to append; "" if that is unclear."""
    place = re.search(r"at line (\d+)", error)
    line = text.split("\n")[int(place[1]) - 1] if place else ""
    assignment = re.fullmatch(r"\s*([\w.-]+)\s*=\s*([^#]*?)\s*(#.*)?", line)
    if not assignment:
        return ""
    key, value = assignment[1], assignment[2].strip("\"'\u201c\u201d\u2018\u2019")
    value = str(float(value)) if FLOAT.fullmatch(value) else value
    value = value.lower() if value.lower() in ("true", "false") else value
    for written in (value, json.dumps(value, ensure_ascii=False)):
        if value and read_toml(written) is not None:
            return f". In TOML that line is: {key} = {written}"
    return ""
