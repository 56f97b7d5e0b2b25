"""Reads `section.key=value` overrides by the types of the settings, and applies them to the settings of a file."""

import decimal
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from trainer.config.refusals import MAX_NESTING, sections_of, setting_names, shown
from trainer.config.settings import Config, Section, TokenizerConfig, tokenizer_tag
from trainer.errors import UserError


def apply_overrides(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Applies overrides to nested settings, as `tomllib` returns them, in place.

    Raises:
        UserError: an override has no value or no setting, or names a section.
    """
    _drop_replaced_length(settings, overrides)
    _drop_replaced_tokenizer(settings, overrides)
    for override in overrides:
        _apply_override(settings, override)


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
        raise UserError(f"{shown(override)} is not an override; write section.key=value.")
    if key != key.rstrip():
        text = text.lstrip()  # The blanks of "key = value" do not belong to the value.
    key = key.strip()
    *sections, name = key.split(".")
    if len(sections) > MAX_NESTING:
        raise UserError(f"{key[:100]} is not a setting: too many dots.")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise UserError(f"{shown(override)}: {section} is a setting, not a section.")
    # A misspelt key is refused below.
    is_known = key in {*setting_names(), *Config.model_fields} or any(
        map(_is_mapping, _annotations(".".join(sections)))
    )
    if text.strip().lower() == "none" and is_known:
        settings.pop(name, None)
        return
    annotations = _annotations(key)
    kinds = [kind for annotation in annotations for kind in _plain_types(annotation)]
    value = _read_override(text, kinds)
    if not isinstance(value, dict) and any(True for kind in kinds for _ in sections_of(kind)):
        inner = ", ".join(dict.fromkeys(known for known in setting_names() if known.startswith(f"{key}.")))
        raise UserError(f"{shown(override)}: {key} is a section; give its settings one by one: {inner}.")
    settings[name] = value


def _annotations(key: str) -> list[Any]:
    """Returns the annotations of a setting: several if kinds of tokenizer share it, none if it is unknown."""
    found: list[Any] = [Config]
    for name in filter(None, key.split(".")):
        if any(map(_is_mapping, found)):
            found = [typing.get_args(annotation)[1] for annotation in found]
            continue
        sections = [section for annotation in found for section in sections_of(annotation)]
        found = [section.model_fields[name].annotation for section in sections if name in section.model_fields]
    return found


def _is_mapping(annotation: Any) -> bool:
    """Whether a setting has entries whose names the user chooses."""
    return typing.get_origin(annotation) is dict


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
FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_WHOLE = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{1,40})?[eE]\+?[0-9]{1,2}")


def _read_override(text: str, kinds: Sequence[Any]) -> Any:
    """Reads the text of an override by the types that its setting can have. A text that fits none of them stays text,
    and the setting refuses it."""
    bare = text.strip()
    value = read_toml(bare)
    for kind in kinds:
        if kind is bool and bare.lower() in ("true", "false"):
            return bare.lower() == "true"
        if kind is int and type(value) is int:
            return value
        if kind is int and _WHOLE.fullmatch(bare) and (number := decimal.Decimal(bare)) == number.to_integral_value():
            return int(number)
        if kind is float and type(value) in (int, float):
            return value
        if kind is float and FLOAT.fullmatch(bare):
            return float(bare)
        if typing.get_origin(kind) is tuple and bare.startswith("[") and bare.endswith("]"):
            return _read_list(bare, value, list(_plain_types(typing.get_args(kind)[0])))
        if (any(sections_of(kind)) or _is_mapping(kind)) and isinstance(value, dict):
            return value
    # In brackets a TOML comment hides the closing bracket, so `"Hi" # he wrote` does not count as a quoted text.
    return value if isinstance(value, str) and read_toml(f"[{bare}]") is not None else text


def _read_list(bare: str, value: Any, kinds: Sequence[Any]) -> list[Any]:
    if str in kinds and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    # The shell removes quotation marks: ["a","b"] arrives as [a,b].
    items = bare[1:-1].split(",")
    if not items[-1].strip():
        del items[-1]  # The empty item of [], or after a last comma.
    return [_read_override(item.strip(), kinds) for item in items]


def read_toml(text: str) -> Any:
    """Returns the value that a text has in TOML, or None."""
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # Not only TOMLDecodeError: Python refuses numbers with too many digits.
        return None
    return read["value"] if len(read) == 1 else None  # After a line's end there can be more keys.
