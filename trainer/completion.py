"""Completion of the command in bash, zsh and fish, by argcomplete.

A shell runs `trainer` at each Tab with `_ARGCOMPLETE` in the environment, and shows what it prints. So everything here
reads only names of files and the schema of the settings: nothing slow is loaded.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainer.parser import make_parser

SHELLS = ("bash", "zsh", "fish")
_CONFIGS = Path(__file__).parent / "configs"
_CHECKPOINT = "step_"
# Settings whose value is a path.
_PATHS = ("run_folder", "data.train", "data.validation", "data.prepared_folder", "tokenizer.path", "init.from")
# The settings that `evaluate` and `train --resume` do not change are completed too: the message of the refusal explains
# more than a list without them.

# zsh has compdef only once its completion is started.
_START_ZSH = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n"


def shell_code(shell: str) -> str:
    """Returns the program that turns completion on, for the shell to evaluate."""
    import argcomplete

    # fish does not pass on how the command was called, and it may not be on PATH.
    command = str(Path(shutil.which(sys.argv[0]) or "trainer").absolute()) if shell == "fish" else None
    code: str = argcomplete.shellcode(["trainer"], shell=shell, argcomplete_script=command)
    return (_START_ZSH if shell == "zsh" else "") + code


def complete() -> None:
    """Prints what can stand at the cursor, and ends the process."""
    import argcomplete

    argcomplete.autocomplete(completed_parser(), always_complete_options="long")


def completed_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command, whose arguments know what they may be."""
    parser = make_parser()
    for verb in (action for action in parser._actions if isinstance(action, argparse._SubParsersAction)):
        for action in (action for each in verb.choices.values() for action in each._actions):
            completer = _COMPLETERS.get(action.dest)
            if completer is not None:
                action.completer = completer
    return parser


def configs(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> dict[str, str] | list[str]:
    """Returns the shipped configs and the TOML files that begin with a prefix, and the folders on the way to one."""
    if getattr(parsed_args, "resume", None):  # argparse takes the first override for the config.
        return overrides(prefix)
    return [
        *sorted(path.stem for path in _CONFIGS.glob("*.toml")),
        *_paths(prefix, lambda path: path.suffix == ".toml"),
    ]


def runs(prefix: str, **_: Any) -> list[str]:
    """Returns the runs whose path begins with a prefix, and the folders on the way to one."""
    return [path if _is_run(path) else f"{path}/" for path in _entries(prefix) if Path(path).is_dir()]


def steps(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Returns the checkpoints of the run that the words before name."""
    run = getattr(parsed_args, "run_folder", None) or getattr(parsed_args, "resume", None)
    found = [] if run is None else sorted(Path(run).glob(f"checkpoints/{_CHECKPOINT}*"))
    return ["best", *(str(int(path.name.removeprefix(_CHECKPOINT))) for path in found)] if found else []


def overrides(prefix: str, **_: Any) -> dict[str, str] | list[str]:
    """Returns the settings that begin with a prefix, each with its description; after the `=` its values."""
    known = settings()
    key, equals, value = prefix.partition("=")
    if not equals:
        return {f"{name}=": _first_sentence(entry) for name, entry in known.items()}
    if key in _PATHS:
        return [f"{key}={path}" for path in _paths(value, lambda _: True)]
    return [f"{key}={each}" for each in _choices(known.get(key, {}))]


def settings() -> dict[str, dict[str, Any]]:
    """Returns each setting with its entry in the schema."""
    schema = json.loads((_CONFIGS / "schema.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for section, entry in schema["properties"].items():
        kinds = [each["$ref"].rpartition("/")[2] for each in (entry, *entry.get("oneOf", ())) if "$ref" in each]
        if not kinds:
            found[section] = entry
        for kind in kinds:
            for name, of_kind in schema["$defs"][kind]["properties"].items():
                # Each kind of tokenizer has its own settings; a setting that several have is described by the first.
                known = found.setdefault(f"{section}.{name}", {**of_kind, "enum": []})
                known["enum"] = [*known["enum"], *_choices(of_kind)]
    return found


def _choices(entry: dict[str, Any]) -> list[str]:
    """Returns the values that a setting can have, if they are a few words."""
    if entry.get("type") == "boolean":
        return ["true", "false"]
    values = [*entry.get("enum", ()), *([entry["const"]] if "const" in entry else [])]
    within = [each for part in entry.get("anyOf", ()) for each in _choices(part)]
    return list(dict.fromkeys([*map(str, values), *within]))


def _first_sentence(entry: dict[str, Any]) -> str:
    return str(entry.get("description", "")).replace("\n", " ").partition(". ")[0].removesuffix(".")


def _entries(prefix: str) -> list[str]:
    """Returns the files and folders whose path begins with a prefix, written as the prefix is."""
    parent, name = os.path.split(prefix)
    folder = Path(parent).expanduser()  # "" is the working directory.
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
    shown = [each for each in names if each.startswith(name) and (name or not each.startswith("."))]
    return [os.path.join(parent, each) for each in shown]  # noqa: PTH118 (Path would drop "./")


def _paths(prefix: str, is_wanted: Callable[[Path], bool]) -> list[str]:
    """Returns the files that are wanted and the folders whose path begins with a prefix."""
    found = [(text, Path(text).expanduser()) for text in _entries(prefix)]
    return [f"{text}/" if path.is_dir() else text for text, path in found if path.is_dir() or is_wanted(path)]


def _is_run(path: str) -> bool:
    return (Path(path).expanduser() / "run.json").is_file()


def _words(*words: str) -> Callable[..., Iterable[str]]:
    return lambda **_: words


_COMPLETERS: dict[str, Callable[..., Any]] = {
    "config": configs,
    "overrides": overrides,
    "run_folder": runs,
    "run_folders": runs,
    "resume": runs,
    "step": steps,
    "to": _words("huggingface", "savedmodel", "keras", "kerashub"),
    "dtype": _words("float32", "bfloat16"),
    "sampler": _words("greedy", "beam", "random", "top-k", "top-p", "min-p"),
    # Texts and numbers: the names of files would only be in the way.
    **dict.fromkeys(("text", "prompt", "name", "text_field", "stop", "replicas", "target"), _words()),
}
