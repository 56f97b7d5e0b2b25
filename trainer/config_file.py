"""Reads a run's settings: a TOML file plus `section.key=value` overrides, into the models of config.py.

An unknown or impossible setting is refused; the message names it, and the nearest known setting or what is allowed.
This module also decides what a resumed run may change, and makes the JSON schema that editors complete and check by.
"""

import copy
import decimal
import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from trainer.config import Config, DataConfig, Section, TokenizerConfig, tokenizer_tag
from trainer.errors import UserError, quoted

# The configs that ship with trainer; in a checkout this folder is a link to configs/.
SHIPPED_CONFIGS = Path(__file__).parent / "configs"

_OF_STORYBOOK = ("data.storybook_stories", "data.storybook_seed")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_NESTING = 5
# How much of a value a message shows.
_SHOWN_CHARS = 200


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


# What a resumed run may change: where it runs and what that costs, but not the model that comes out.
RESUMABLE = (
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
_RESUMABLE_TEXT = ", ".join(f"{key}*" if key.endswith(".") else key for key in RESUMABLE)


def check_resumable(overrides: Iterable[str]) -> None:
    """Raises UserError if an override would make a resumed run another run."""
    for override in overrides:
        if not override.startswith(RESUMABLE):
            raise UserError(
                f"{override}: a resumed run keeps the config that it was started with; only {_RESUMABLE_TEXT} can "
                "change. Start a new run for anything else."
            )


def check_same_run(config: Config, started: Config) -> None:
    """Raises UserError if a config differs from the one that a run was started with, in more than a run may change."""
    if differing := differing_settings(config, started):
        raise UserError(
            f"run_folder={config.run_folder!r} holds a run that was started with other settings: {shortened(differing)}"
            f". Go on with the settings that it was started with (only {_RESUMABLE_TEXT} can change), or choose "
            "another run_folder for a new run."
        )


def differing_settings(config: Config, started: Config, resumable: bool = False) -> list[str]:
    """Returns the settings in which a config differs from the one that a run was started with.

    Args:
        config: the config as it is now.
        started: the config as it was.
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


def shortened(differing: Sequence[str]) -> str:
    """Returns the first three of these differences, and the number of the others."""
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    return "; ".join(differing[:3]) + more


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json", exclude={"run_folder"})
    return {f"{section}.{name}": value for section, settings in sections.items() for name, value in settings.items()}


def make_config(settings: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Builds a checked config from nested settings, as `tomllib` returns them, and overrides.

    Raises:
        UserError: a setting is unknown or impossible; the message has a line for each.
    """
    merged = copy.deepcopy(dict(settings))
    overrides = list(overrides)
    _drop_replaced_length(merged, overrides)
    _drop_replaced_tokenizer(merged, overrides)
    for override in overrides:
        _apply_override(merged, override)
    problems = [*_unwritable(merged, "")]
    if problems:
        raise UserError("\n".join(problems))
    try:
        # From JSON strict mode refuses "3" and true as numbers, but accepts a list as a tuple.
        config = Config.model_validate_json(json.dumps(merged), strict=True)
    except pydantic.ValidationError as error:
        raise UserError("\n".join(_explain(problem) for problem in error.errors())) from None
    _check_effect(config.data, overrides)
    return config


def _check_effect(data: DataConfig, overrides: Iterable[str]) -> None:
    """Raises UserError if an override has no effect with the rest of the config. In a file that is allowed: the file
    may be meant for several texts."""
    in_vain = {} if data.is_storybook() else dict.fromkeys(_OF_STORYBOOK, f"data.train={list(data.train)}")
    if data.validation is not None:
        in_vain["data.held_out_fraction"] = f"data.validation={list(data.validation)}"
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip() in in_vain and value.strip().lower() != "none":
            raise UserError(f"{_shown(override)} has no effect with {in_vain[key.strip()]}; leave out one of the two.")


def _unwritable(value: Any, key: str) -> Iterator[str]:
    """Yields a message for each value that neither JSON nor a run's config.toml could hold."""
    if key.count(".") > _MAX_NESTING:
        yield f"{_shown_key(key)}: nested too deeply to be a setting."
    elif isinstance(value, Mapping | list | tuple):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, each in entries:
            yield from _unwritable(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str):
        if not is_utf8(key + value):
            yield (
                f"{_shown_key(key)}={_shown(value)} holds bytes that are not UTF-8; set the terminal, or the script "
                "that it comes from, to UTF-8."
            )
    elif not isinstance(value, bool | int | float | None):
        shown = _shown_key(key)
        yield f'{shown} = {value} is a {type(value).__name__}; write it in quotation marks: {shown} = "{value}".'


def is_utf8(text: str) -> bool:
    """Whether a text can be written in UTF-8: a lone surrogate, half of a character, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _shown_key(key: str) -> str:
    """Returns a key for a message: shortened, and in quotation marks if it holds unusual characters."""
    return key if re.fullmatch(rf"[\w.-]{{1,{_SHOWN_CHARS}}}", key) else _shown(key)


def _drop_replaced_length(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Drops train.num_epochs if an override sets train.total_steps instead, or the other way round."""
    values = {key.strip(): value.strip().lower() for key, _, value in (each.partition("=") for each in overrides)}
    for given, replaced in (("total_steps", "num_epochs"), ("num_epochs", "total_steps")):
        # If both are given, the check of the two refuses them.
        is_set = values.get(f"train.{given}", "none") != "none"
        if is_set and f"train.{replaced}" not in values and isinstance(settings.get("train"), dict):
            settings["train"].pop(replaced, None)


def _drop_replaced_tokenizer(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Drops the file's settings of a tokenizer if the overrides choose a tokenizer of another kind."""
    of_file = settings.get("tokenizer")
    given = {key.strip(): value for key, _, value in (each.partition("=") for each in overrides)}
    chosen = {
        name: _read_override(given[f"tokenizer.{name}"], [str])
        for name in ("kind", "path")
        if given.get(f"tokenizer.{name}", "none").strip().lower() != "none"
    }
    if not isinstance(of_file, dict) or not chosen:
        return
    before, after = tokenizer_tag(of_file), tokenizer_tag({**of_file, **chosen})
    if "kind" in chosen and chosen["kind"] != of_file.get("kind"):
        after = tokenizer_tag(chosen)  # The path of another kind's vocabulary is dropped, too.
    allowed = next((kind.model_fields for kind, tag in _tokenizer_sections() if tag == after), None)
    if before == after or allowed is None:
        return
    known = {name for kind, _ in _tokenizer_sections() for name in kind.model_fields}
    for name in known - set(allowed):
        if f"tokenizer.{name}" not in given:
            of_file.pop(name, None)


def _tokenizer_sections() -> Iterator[tuple[type[Section], str]]:
    for member in typing.get_args(typing.get_args(TokenizerConfig)[0]):
        kind, tag = typing.get_args(member)
        yield kind, tag.tag


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{_shown(override)} is not an override; write section.key=value.")
    if key != key.rstrip():
        text = text.lstrip()  # The blanks of "key = value" do not belong to the value.
    key = key.strip()
    *sections, name = key.split(".")
    if len(sections) > _MAX_NESTING:
        raise UserError(f"{key[:100]} is not a setting: too many dots.")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise UserError(f"{_shown(override)}: {section} is a setting, not a section.")
    # A misspelt key is refused below.
    if text.strip().lower() == "none" and key in {*setting_names(), *Config.model_fields}:
        settings.pop(name, None)
        return
    annotations = _annotations(key)
    kinds = [kind for annotation in annotations for kind in _plain_types(annotation)]
    value = _read_override(text, kinds)
    if not isinstance(value, dict) and any(True for kind in kinds for _ in _sections(kind)):
        inner = ", ".join(dict.fromkeys(known for known in setting_names() if known.startswith(f"{key}.")))
        raise UserError(f"{_shown(override)}: {key} is a section; give its settings one by one: {inner}.")
    settings[name] = value


def _annotations(key: str) -> list[Any]:
    """Returns the annotations of a setting: several if kinds of tokenizer share it, none if it is unknown."""
    found: list[Any] = [Config]
    for name in key.split("."):
        sections = [section for annotation in found for section in _sections(annotation)]
        found = [section.model_fields[name].annotation for section in sections if name in section.model_fields]
    return found


def _plain_types(annotation: Any) -> Iterator[Any]:
    """Yields the types that a setting can have, without their bounds: for a Literal the types of its values."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _plain_types(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for each in arguments:
            yield from _plain_types(each)
    elif origin is Literal:
        yield from map(type, arguments)
    else:
        yield annotation


# Numbers that TOML does not read: .5 and 1. and, as whole numbers, 1e4.
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_WHOLE = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{1,40})?[eE]\+?[0-9]{1,2}")


def _read_override(text: str, kinds: Sequence[Any]) -> Any:
    """Reads the text of an override by the types that its setting can have. A text that fits none of them stays text,
    and the setting refuses it."""
    bare = text.strip()
    value = _read_toml(bare)
    for kind in kinds:
        if kind is bool and bare.lower() in ("true", "false"):
            return bare.lower() == "true"
        if kind is int and type(value) is int:
            return value
        if kind is int and _WHOLE.fullmatch(bare) and (number := decimal.Decimal(bare)) == number.to_integral_value():
            return int(number)
        if kind is float and type(value) in (int, float):
            return value
        if kind is float and _FLOAT.fullmatch(bare):
            return float(bare)
        if typing.get_origin(kind) is tuple and bare.startswith("[") and bare.endswith("]"):
            return _read_list(bare, value, list(_plain_types(typing.get_args(kind)[0])))
        if any(_sections(kind)) and isinstance(value, dict):
            return value
    # In brackets a TOML comment swallows the closing one, so `"Hi" # said he` does not count as a quoted text.
    return value if isinstance(value, str) and _read_toml(f"[{bare}]") is not None else text


def _read_list(bare: str, value: Any, kinds: Sequence[Any]) -> list[Any]:
    if str in kinds and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    # The shell removes quotation marks: ["a","b"] arrives as [a,b].
    items = bare[1:-1].split(",")
    if not items[-1].strip():
        del items[-1]  # The empty item of [], or after a last comma.
    return [_read_override(item.strip(), kinds) for item in items]


def _read_toml(text: str) -> Any:
    """Returns the value that a text has in TOML, or None."""
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # Not only TOMLDecodeError: Python refuses numbers with too many digits.
        return None
    return read["value"] if len(read) == 1 else None  # After a line's end there can be more keys.


def _toml_advice(text: str, error: str) -> str:
    """Returns how to write the line that an error names in TOML, as a sentence to append; "" if that is unclear."""
    place = re.search(r"at line (\d+)", error)
    line = text.split("\n")[int(place[1]) - 1] if place else ""
    assignment = re.fullmatch(r"\s*([\w.-]+)\s*=\s*([^#]*?)\s*(#.*)?", line)
    if not assignment:
        return ""
    key, value = assignment[1], assignment[2].strip("\"'\u201c\u201d\u2018\u2019")
    value = str(float(value)) if _FLOAT.fullmatch(value) else value
    value = value.lower() if value.lower() in ("true", "false") else value
    for written in (value, json.dumps(value, ensure_ascii=False)):
        if value and _read_toml(written) is not None:
            return f". In TOML that line is: {key} = {written}"
    return ""


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["tokenizer"]:
        # A tagged union puts its tag into the location: a user writes tokenizer.size for tokenizer.wordpiece.size.
        del location[1:2]
    if ".".join(location[:-1]) in setting_names() and isinstance(problem["loc"][-1], str):
        del location[-1]  # The last part is one of the types that the setting can have.
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        if "." in location[0]:
            return f"{_shown(key)} is one name in quotation marks; write it without them."
        if key in setting_names():
            kind, _, is_file = problem["loc"][1].partition(" ")
            if is_file and key != "tokenizer.lowercase":
                return (
                    f"{key} cannot be set with tokenizer.path, because that file decides it; leave out one of the two."
                )
            return f"{key} is not a setting of tokenizer.kind={kind!r}; leave it out."
        return f"{_shown_key(key)} is not a setting.{_nearest(location)}"
    if problem["type"] == "missing":
        return f"{key} is missing; it has no default.{_choices(location)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"].startswith("union_tag"):
        kinds = [typing.get_args(kind.model_fields["kind"].annotation) for kind in _sections(TokenizerConfig)]
        known = ", ".join(dict.fromkeys(repr(name) for names in kinds for name in names))
        return f"{key}.kind must be one of {known}; received {_shown(problem['input'].get('kind'))}."
    value, right = problem["input"], ""
    if problem["type"].startswith("int_") and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        right = f" Write {int(value)}."
    if problem["type"] == "tuple_type" and isinstance(value, str) and re.fullmatch(r"[\w.,+ -]{1,80}", value):
        right = f" Write {quoted(f'{key}=[{value}]')}."
    return f"{key}={_shown(value)}: {problem['msg'][0].lower()}{problem['msg'][1:]}.{right}"


def _nearest(location: list[str]) -> str:
    known = list(dict.fromkeys(setting_names()))
    section, name = ".".join(location[:-1]), location[-1]
    # A correct key in the wrong section is as common as a misspelt key.
    namesakes = [key for key in known if key.rpartition(".")[2] == name]
    if namesakes:
        nearest = difflib.get_close_matches(".".join(location), namesakes, n=1, cutoff=0.0)[0]
        return f" Did you mean {nearest}?"
    siblings = [key.rpartition(".")[2] for key in known if section and key.startswith(f"{section}.")]
    matches = difflib.get_close_matches(name, siblings or Config.model_fields, n=1)
    if matches:
        # batch_size is equally near to global_batch_size and to micro_batch_size.
        alike = [sibling for sibling in siblings if name in sibling] if name in matches[0] else matches
        return f" Did you mean {' or '.join('.'.join([*location[:-1], match]) for match in alike)}?"
    # The key may be misspelt and in the wrong section.
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(known) if "." in key}
    matches = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    if matches:
        return f" Did you mean {elsewhere[matches[0]]}?"
    return f" Known {'settings' if siblings else 'sections'}: {', '.join(siblings or Config.model_fields)}."


def _choices(location: list[str]) -> str:
    section: Any = Config
    for part in location:
        annotation = section.model_fields[part].annotation
        section = annotation
    options = typing.get_args(section) if typing.get_origin(section) is Literal else ()
    return f" Choose one of: {', '.join(map(repr, options))}." if options else ""


def setting_names(section: Any = Config, prefix: str = "") -> Iterable[str]:
    """Yields the full name of every setting, such as `train.total_steps`."""
    for name, field in section.model_fields.items():
        sections = list(_sections(field.annotation))
        if not sections:
            yield prefix + name
        for kind in sections:
            yield from setting_names(kind, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterable[type[Section]]:
    """Yields the sections that a setting can be: all members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections(part)


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
