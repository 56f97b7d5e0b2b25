"""The names of all settings, and messages for values that are refused.

A message names the setting and the value, and the nearest known setting or what is allowed.
"""

import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from trainer.config.settings import Config, Section, TokenizerConfig
from trainer.errors import quoted

# How deeply a file may nest its sections; no setting is that deep.
MAX_NESTING = 5
# How much of a value a message shows.
_SHOWN_CHARS = 200


def setting_names(section: Any = Config, prefix: str = "") -> Iterable[str]:
    """Yields the full name of every setting, such as `train.total_steps`."""
    for name, field in section.model_fields.items():
        sections = list(sections_of(field.annotation))
        if not sections:
            yield prefix + name
        for kind in sections:
            yield from setting_names(kind, f"{prefix}{name}.")


def sections_of(annotation: Any) -> Iterable[type[Section]]:
    """Yields the sections that a setting can be: all members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in typing.get_args(annotation):
        yield from sections_of(part)


def explain(problem: Any) -> str:
    """Returns a message for one of pydantic's errors."""
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["tokenizer"]:
        # A tagged union puts its tag into the location: a user writes tokenizer.size for tokenizer.wordpiece.size.
        del location[1:2]
    if ".".join(location[:-1]) in setting_names() and isinstance(problem["loc"][-1], str):
        del location[-1]  # The last part is one of the types that the setting can have.
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return _explain_unknown(key, location, problem)
    if problem["type"] == "missing":
        return f"{key} is missing; it has no default.{_choices(location)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"].startswith("union_tag"):
        kinds = [typing.get_args(kind.model_fields["kind"].annotation) for kind in sections_of(TokenizerConfig)]
        known = ", ".join(dict.fromkeys(repr(name) for names in kinds for name in names))
        return f"{key}.kind must be one of {known}; received {shown(problem['input'].get('kind'))}."
    return (
        f"{key}={shown(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}.{_correction(key, problem)}"
    )


def _explain_unknown(key: str, location: list[str], problem: Any) -> str:
    if "." in location[0]:
        return f"{shown(key)} is one name in quotation marks; write it without them."
    if key not in setting_names():
        return f"{shown_key(key)} is not a setting.{_nearest(location)}"
    kind, _, is_file = problem["loc"][1].partition(" ")
    if is_file and key != "tokenizer.lowercase":
        return f"{key} cannot be set with tokenizer.path, because that file decides it; leave out one of the two."
    return f"{key} is not a setting of tokenizer.kind={kind!r}; leave it out."


def _correction(key: str, problem: Any) -> str:
    """Returns how to write a value that is almost right, as a sentence to append."""
    value = problem["input"]
    if problem["type"].startswith("int_") and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return f" Write {int(value)}."
    if problem["type"] == "tuple_type" and isinstance(value, str) and re.fullmatch(r"[\w.,+ -]{1,80}", value):
        return f" Write {quoted(f'{key}=[{value}]')}."
    return ""


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


def unwritable(value: Any, key: str) -> Iterator[str]:
    """Yields a message for each value that neither JSON nor a run's config.toml could hold."""
    if key.count(".") > MAX_NESTING:
        yield f"{shown_key(key)}: nested too deeply to be a setting."
    elif isinstance(value, Mapping | list | tuple):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, each in entries:
            yield from unwritable(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str):
        if not is_utf8(key + value):
            yield (
                f"{shown_key(key)}={shown(value)} holds bytes that are not UTF-8; set the terminal, or the script "
                "that it comes from, to UTF-8."
            )
    elif not isinstance(value, bool | int | float | None):
        name = shown_key(key)
        yield f'{name} = {value} is a {type(value).__name__}; write it in quotation marks: {name} = "{value}".'


def is_utf8(text: str) -> bool:
    """Whether a text can be written in UTF-8: a lone surrogate, half of a character, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """Returns a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def shown_key(key: str) -> str:
    """Returns a key for a message: shortened, and in quotation marks if it holds unusual characters."""
    return key if re.fullmatch(rf"[\w.-]{{1,{_SHOWN_CHARS}}}", key) else shown(key)
