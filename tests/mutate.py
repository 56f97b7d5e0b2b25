#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../scripts/venv_python" "$0" "$@"'
"""Mutates the inputs of trainer, thousands of times, and checks that each mutation is accepted or refused properly.

    tests/mutate.py [KIND ...] [--number 2000] [--seed 0] [--secs SECS]
    tests/mutate.py --case KIND/NUMBER [--seed 0]

A mutation is refused properly with exit status 2 (or 1 if a verification failed) and a short message: no traceback, no
warning of a library, no hang, no killed process. It is accepted properly if the result agrees with the mutated input;
each kind of input has a cheap check of that. Neither may leave files behind that make the next try with the original
input fail. The program prints for each kind how many mutations were tried, accepted and refused, and each fault with
its case. --case runs such a case again, and prints its input and traceback. --secs ends the program after that many
seconds. The exit status is 1 if there are faults.

The mutations run in another process, which is started again if a mutation kills it or hangs.
"""

import argparse
import collections
import contextlib
import decimal
import functools
import gzip
import itertools
import json
import math
import os
import random
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn
from unittest import mock

import trainer

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# A case takes milliseconds, or a few seconds if it trains; on a busy machine many times as long. The watching process
# waits longer, in case no signal ends the hang.
HANG_SECS = 120.0
DEAD_SECS = 600.0
# The limit of a process's memory. Without it a mutated size could use up the machine's memory.
MAX_MEMORY_BYTES = 6 << 30
MAX_MESSAGE_CHARS = 3_000
MAX_NAMED_FAULTS = 200
LOG = "log.txt"
# A library's log lines, and Python's warnings.
NOISE = re.compile(r"^(Traceback|WARNING|ERROR|[WEF]\d{4} ).*|^.*\.py:\d+: \w*Warning.*", re.MULTILINE)
# TensorFlow warns of retracing in each process that loads many models, and prints a line when it is imported.
HARMLESS = ("out of the last", "All log messages before absl")

CONFIG = """\
run_folder = "run"

[data]
train = "text.txt"
validation = "validation.txt"
documents = "line"
prepared_folder = "prepared"

[tokenizer]
kind = "byte"

[model]
num_layers = 1
num_heads = 1
hidden_dim = 4
intermediate_dim = 4

[train]
precision = "float32"
total_steps = 2
global_batch_size = 2
sequence_length = 16

[checkpoint]
every_steps = 1

[samples]
num_tokens = 4
"""
ENGLISH = "The cat sat on the mat, and the dog looked on.\n\nOnce upon a time there was a fox's 12 feet.\n"
KOREAN = "고양이가 매트 위에 앉았다.\n\n옛날 옛적에 여우가 살았다. 한글은 쉽다!\n"
OTHERS = (
    "Ёжик в тумане.\nقطة على السجادة\n我家有一只猫。\n🙂 na\u00efve n\u0303 \u2028 \u200b end\r\nΣίσυφος straße ÅÉ\n"
)
TEXTS = (ENGLISH, KOREAN, OTHERS, ENGLISH + KOREAN + OTHERS)


class Fault(Exception):
    """Trainer did something that it should not do; the message describes it."""


class Hang(BaseException):
    """A case took too long. It is a BaseException, so that no `except Exception` in trainer or a library catches it."""


class Answer(NamedTuple):
    """The outcome of a command of trainer.

    Attributes:
        status: the exit status.
        out: the text on stdout.
        err: the text on stderr.
    """

    status: int
    out: str
    err: str


# Mutations.

NUMBERS = (
    -1, 0, 1, 2, 3, 7, 63, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**47, 2**53 + 1, 2**62, 2**63 - 1, 2**63,
    2**64, 10**30, 10**400, -(2**63), -0.0, 0.5, 1.0, 1e-320, 1e-9, 1e38, 1e39, 1e300, 1.7e308, math.inf, -math.inf,
    math.nan,
)  # fmt: skip
STRINGS = (
    "", " ", "\n", "\0", "a\0b", "none", "null", "true", "nan", "1e400", "0x10", "-", "--", ".", "..", "../..", "[",
    "]", "[a]", "*", "?", "**", "%s%n", "{}", "{0}", "$HOME", "'", '"', "\\", "\\n", "a" * 300, "가" * 120,
    "\ufeff", "\u202e", "\x1b[31m", "\x07", "\x85", "\u2028", "\ud800", "\udcff", "\U0010ffff", "e\u0301", "ﬁ",
    "İ", "a/", "[UNK]", "[PAD]", "[BOS]", "train", "text", "config.toml", "storybook", "byte", "char",
    "wordpiece", "bpe", "2024-01-01", "12:00:00", "1_000", "auto", "9" * 5_000, "٣", "²",
)  # fmt: skip
PIECES = (
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\r\n", b"\n\n", b"\t", b" ", b'"',
    b"'", b"\\", b"\\u0000", b"\\ud83d", b"{", b"}", b"[", b"]", b",", b":", b"=", b"#", b"\x1b[2J", b"\x7f",
    b"\xe2\x80\xa8", b"\xf0\x9f\x99\x82", b"999999999999999999999999", b"-1", b"1e999", b"NaN", b"null",
    b"\x1f\x8b\x08", b"PK\x03\x04", b"A" * 5_000, b"9" * 5_000, b"[" * 20_000, b'{"a":' * 5_000, b"\n" * 2_000,
)  # fmt: skip
_DEEP = "\U000f0000deep"  # Is replaced by deeply nested brackets, which no JSON library would write.


def nasty(rng: random.Random) -> Any:
    """Returns a value of any type, as a user may write it by mistake."""
    of = rng.randrange(8)
    if of <= 2:
        return rng.choice(NUMBERS)
    if of <= 5:
        return rng.choice(STRINGS)
    return rng.choice((True, False, None, [], {}, [[]], [None], [1, "a"], {"": 0}, {"a": {"b": []}}, [""], _DEEP))


def mutated_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Returns data with parts flipped, removed, doubled, cut off, inserted, or replaced by parts of `other`."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        first, second = sorted((rng.randrange(len(changed) + 1), rng.randrange(len(changed) + 1)))
        second = min(second, first + rng.choice((1, 4, 64, 4_096, len(changed))))
        what = rng.randrange(9)
        if what <= 1 and changed:
            changed[min(first, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif what == 2 and changed:
            changed[min(first, len(changed) - 1)] = rng.randrange(256)
        elif what == 3:
            del changed[first:second]
        elif what == 4:
            changed[first:first] = changed[first:second] * rng.choice((1, 1, 2, 50))
        elif what == 5:
            del changed[first if rng.random() < 0.7 else 0 :]
        elif what == 6 or what == 7:
            changed[first:first] = rng.choice(PIECES)
        else:
            start = rng.randrange(len(other) + 1)
            changed[first:second] = other[start : start + rng.choice((8, 200, len(other)))]
    return bytes(changed[: 1 << 20])


def mutated_text(rng: random.Random, text: str, other: str = ENGLISH) -> str:
    """Returns a mutated text. Mutated as bytes it may have surrogates, as an argument that is not UTF-8 has."""
    if rng.random() < 0.5:
        changed = mutated_bytes(rng, text.encode(errors="surrogatepass"), other.encode(errors="surrogatepass"))
        return changed.decode(errors="surrogateescape")
    place = rng.randrange(len(text) + 1)
    end = place + rng.choice((0, 0, 1, 5, len(text)))
    return text[:place] + rng.choice((*STRINGS, *map(str, NUMBERS[:-5]))) + text[end:]


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """Returns the contents of a JSON or TOML file with values replaced, removed, renamed, swapped or wrapped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = [place for place in _places(tree) if place is not None]
        if not places or rng.random() < 0.02:
            return nasty(rng)
        parent, key = rng.choice(places)
        other_parent, other_key = rng.choice(places)
        what = rng.randrange(8)
        if what <= 2:
            parent[key] = nasty(rng)
        elif what == 3:
            del parent[key]
        elif what == 4 and isinstance(parent, dict):
            parent[mutated_text(rng, str(key)) if rng.random() < 0.5 else str(rng.choice(STRINGS))] = parent.pop(key)
        elif what == 5:
            parent[key] = json.loads(json.dumps(other_parent[other_key]))
        elif what == 6:
            parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, str(parent[key]), [parent[key]] * 2))
        elif isinstance(parent[key], str):
            parent[key] = mutated_text(rng, parent[key])
        elif isinstance(parent[key], int | float):
            parent[key] = rng.choice((-parent[key], parent[key] + 1, parent[key] // 2, parent[key] * 1000))
        else:
            parent[key] = nasty(rng)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (dict or list, key or index) for every value in a tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def as_json(rng: random.Random, tree: Any, indent: int | None = None) -> bytes:
    """Returns a tree as JSON, with NaN and infinities as Python's json module writes and reads them."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5, indent=indent)
    for deep in (json.dumps(_DEEP), json.dumps(_DEEP, ensure_ascii=False)):
        number = rng.choice((100, 2_000, 100_000))
        text = text.replace(deep, "[" * number + "]" * number)
    return text.encode(errors="surrogatepass")


def as_toml(rng: random.Random, tree: Any) -> bytes | None:
    """Returns a tree as TOML, or None if TOML cannot express it."""
    import tomli_w

    try:
        text = tomli_w.dumps(tree)
    except (TypeError, ValueError, AttributeError):
        return None
    number = rng.choice((100, 2_000, 100_000))
    return text.replace(f'"{_DEEP}"', "[" * number + "]" * number).encode(errors="surrogatepass")


def mutated_json(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Returns a JSON file mutated as bytes or as a tree."""
    if rng.random() < 0.5:
        return mutated_bytes(rng, data, other)
    return as_json(rng, mutated_tree(rng, json.loads(data)), rng.choice((None, 2)))


def mutated_toml(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Returns a TOML file mutated as bytes or as a tree."""
    if rng.random() < 0.5:
        return mutated_bytes(rng, data, other)
    changed = as_toml(rng, mutated_tree(rng, tomllib.loads(data.decode())))
    return mutated_bytes(rng, data, other) if changed is None else changed


# The laboratory.


class Lab:
    """The folder in which the cases of a process run. Each case gets a new, empty folder as its working folder.

    Args:
        folder: the folder to work in; the inputs that all cases share are made there once.

    Attributes:
        seeds: the folder of the inputs to mutate: tokenizers, prepared data and runs.
        notes: the inputs that the present case gives to trainer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.seeds = folder, folder / "seeds"
        self.notes: list[str] = []
        self._generators: dict[str, Any] = {}

    def seed(self, kind: str) -> Path:
        """Returns a folder with prepared/, stopped/ and run/ for a kind of tokenizer; the first call makes it."""
        folder = self.seeds / kind
        if not (folder / "whole").exists():
            before, secs_left = Path.cwd(), signal.setitimer(signal.ITIMER_REAL, 0)[0]
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.chdir(folder)
            try:
                _plant(self, kind)
            finally:
                os.chdir(before)
                signal.setitimer(signal.ITIMER_REAL, secs_left)
            (folder / "whole").touch()
        return folder

    def generator(self, kind: str) -> Any:
        """Returns the Generator of a run; it compiles its decoders only once."""
        if kind not in self._generators:
            from trainer.decoding.generate import Generator
            from trainer.training.run_checkpoints import load_model
            from trainer.training.run_data import load_tokenizer_of
            from trainer.training.run_folder import RunFolder

            run = RunFolder(str(self.seed(kind) / "run"))
            model, _ = load_model(run)
            self._generators[kind] = Generator(model, load_tokenizer_of(run), run.config.train.sequence_length)
        return self._generators[kind]

    @contextlib.contextmanager
    def case(self) -> Iterator[None]:
        """Gives a case its folder, and ends the case if it hangs."""
        folder = Path(tempfile.mkdtemp(prefix="case-", dir=self.folder))
        before, environment = Path.cwd(), dict(os.environ)
        self.notes.clear()
        os.chdir(folder)
        signal.signal(signal.SIGALRM, _hang)
        signal.setitimer(signal.ITIMER_REAL, HANG_SECS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.chdir(before)
            os.environ.clear()
            os.environ.update(environment)
            shutil.rmtree(folder, ignore_errors=True)

    def note(self, what: str, value: Any) -> None:
        """Keeps an input of the case, to be printed with a fault."""
        self.notes.append(f"{what}: {value!r}")

    def write(self, name: str, data: bytes) -> Path:
        """Writes a file of the case."""
        self.note(name, data)
        path = Path(name)
        path.write_bytes(data)
        return path

    def trainer(self, *words: str, statuses: Sequence[int] = (0, 2)) -> Answer:
        """Runs a command of trainer in this process.

        Raises:
            Fault: the command raised, returned a status that is not among `statuses`, or refused without a proper
                message.
        """
        from trainer.cli import main

        self.note("trainer", words)
        with self.heard() as heard:
            try:
                status = main(list(words))
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
        answer = Answer(status, *heard)
        self.notes += [f"stderr: {answer.err}"] if answer.err else []
        _judge(answer, statuses)
        return answer

    @contextlib.contextmanager
    def heard(self) -> Iterator[list[str]]:
        """Collects the output of Python and of libraries: [stdout, stderr], filled when the context is left."""
        heard: list[str] = []
        # The file for stderr stays: it has the last lines of a case that kills this process.
        with tempfile.TemporaryFile() as out, (self.folder / LOG).open("w+b") as err:
            kept = [os.dup(1), os.dup(2)]
            for descriptor, file in enumerate((out, err), start=1):
                os.dup2(file.fileno(), descriptor)
            try:
                yield heard
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                for descriptor, (file, before) in enumerate(zip((out, err), kept, strict=True), start=1):
                    os.dup2(before, descriptor)
                    os.close(before)
                    file.seek(0)
                    heard.append(file.read().decode(errors="replace"))


def _hang(*_: Any) -> NoReturn:
    raise Hang(f"not done after {HANG_SECS:.0f} s")


def _judge(answer: Answer, statuses: Sequence[int]) -> None:
    if answer.status not in statuses:
        raise Fault(f"exit status {answer.status}: {answer.err[-300:]!r}")
    for stream in (answer.out, answer.err):
        noise = [line[0] for line in NOISE.finditer(stream) if not any(word in line[0] for word in HARMLESS)]
        if noise:
            raise Fault(f"noise: {noise[0][:300]}")
    if answer.status == 2 and not re.search(r"^(trainer: |usage: )\S", answer.err, re.MULTILINE):
        raise Fault(f"refused without a message: {answer.err[:300]!r}")
    if answer.status and len(answer.err) > MAX_MESSAGE_CHARS:
        raise Fault(f"a message of {len(answer.err)} characters: {answer.err[:200]!r}")
    if found := re.search(r"[^\n\t -~\u00a0-\U0010ffff]", answer.err):
        raise Fault(f"a message with the control character {found[0]!r}: {answer.err[:300]!r}")


def _expect(is_right: bool, what: str) -> None:
    if not is_right:
        raise Fault(what)


def _expect_no_leftovers(folder: Path) -> None:
    left = [
        str(path) for path in folder.rglob("*") if path.name.startswith(".partial") or path.name.endswith(".partial")
    ]
    _expect(not left, f"left behind: {left}")


TOKENIZERS = ("byte", "char", "bpe", "wordpiece")
# WordPiece is slow to load.
ANY_TOKENIZER = ("byte",) * 8 + ("char",) * 6 + ("bpe",) * 4 + ("wordpiece",)


def _settings_of(kind: str) -> list[str]:
    """Returns the overrides that make the config's tokenizer one of that kind."""
    sizes = {"bpe": 300, "wordpiece": 200}
    return [f"tokenizer.kind={kind}", *([f"tokenizer.vocabulary_size={sizes[kind]}"] if kind in sizes else [])]


def _is_next_tried(rng: random.Random, answer: Answer) -> bool:
    """Returns whether to try again with the original input: sometimes, and always if a refusal left files behind."""
    is_left = answer.status != 0 and Path("prepared").exists() and any(Path("prepared").iterdir())
    return rng.random() < 0.1 or is_left


def _plant(lab: Lab, kind: str) -> None:
    """Makes the inputs for one kind of tokenizer: prepared data, a run on that data with two checkpoints, and the
    folder that a stopped preparation leaves.
    """
    from trainer.config_file import load_config
    from trainer.data.prepare import prepare
    from trainer.model.build import build_gpt
    from trainer.training.run_checkpoints import open_checkpoints
    from trainer.training.run_data import load_tokenizer_of
    from trainer.training.run_folder import RunFolder

    def silent(_: str) -> None:
        pass

    _start()
    config = load_config("config.toml", [*_settings_of(kind), "run_folder=run"])
    _stop_preparing(config)
    Path("prepared").rename("stopped")
    prepared = prepare(config, silent)
    if kind == "byte":  # This run was trained, and has the state of an optimizer.
        lab.trainer("train", "config.toml", statuses=(0,))
        shutil.rmtree("run/logs")
    else:
        run = RunFolder.create(config, prepared)
        tokenizer = load_tokenizer_of(run)
        model = build_gpt(config, tokenizer.vocabulary_size, tokenizer.bos_id)
        checkpoints = open_checkpoints(run, silent)
        for step in (1, 2):
            arrays = {variable.path: variable.numpy() + step for variable in model.variables}
            checkpoints.save(step, {"weights": arrays}, {})
        checkpoints.wait()


def _stop_preparing(config: Any) -> None:
    """Prepares a config's text up to its second batch, and stops there by KeyboardInterrupt."""
    from trainer.data import encoding
    from trainer.data import prepare as preparing

    write, num_writes = preparing.SplitWriter.write, itertools.count()

    def write_or_stop(writer: Any, *arguments: Any) -> None:
        if next(num_writes) == 2:
            raise KeyboardInterrupt
        write(writer, *arguments)

    with (
        mock.patch.object(preparing, "_SAVE_SECS", 0.0),
        mock.patch.object(encoding, "_BATCH_BYTES", 50),
        mock.patch.object(preparing.SplitWriter, "write", write_or_stop),
        contextlib.suppress(KeyboardInterrupt),
    ):
        preparing.prepare(config, lambda _: None)


GIVEN = ("config.toml", "text.txt", "validation.txt")


def _start() -> None:
    """Writes the texts and the config into the case's folder."""
    for name, content in zip(GIVEN, (CONFIG, TEXTS[-1], ENGLISH), strict=True):
        Path(name).write_text(content, encoding="utf-8")


def _as_argument(text: str) -> str:
    """Returns a text as an operating system passes it on: without NUL, and only surrogates that stand for bytes."""
    return re.sub("[\0\ud800-\udc7f\udd00-\udfff]", "", text.replace(_DEEP, "[[["))[:100_000]


def _expect_message(lab: Lab, error: Exception) -> None:
    """Checks the message of a UserError, as the command line would print it."""
    from trainer.cli import _message

    lab.note("UserError", str(error))
    _judge(Answer(2, "", f"trainer: {_message(str(error))}\n"), (2,))


# The kinds of input. Each function takes the laboratory and a random number generator, tries one mutation, and returns
# whether trainer accepted it.


def config(lab: Lab, rng: random.Random) -> bool:
    """A config file."""
    _start()
    shipped = (path.read_bytes() for path in sorted((Path(trainer.__file__).parent / "configs").glob("*.toml")))
    resolved = trainer.make_config(tomllib.loads(CONFIG)).to_toml().encode()
    seeds = [*[CONFIG.encode()] * 4, resolved, *shipped]
    data = mutated_toml(rng, rng.choice(seeds), rng.choice(seeds))
    lab.write("config.toml", data)
    return _try_settings(lab, rng, [], data)


def overrides(lab: Lab, rng: random.Random) -> bool:
    """Settings on the command line."""
    from trainer.config import Config
    from trainer.config_refusals import setting_names

    _start()
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
        word = f"{key}={written.replace(_DEEP, '[' * rng.choice((100, 100_000)))}"
        words.append(mutated_text(rng, word) if rng.random() < 0.3 else word)
    return _try_settings(lab, rng, [_as_argument(word) for word in words], CONFIG.encode())


def _try_settings(lab: Lab, rng: random.Random, words: Sequence[str], data: bytes) -> bool:
    from trainer.config_file import load_config, parse_config
    from trainer.errors import UserError

    words = [word for word in words if not word.startswith("-")]
    lab.note("overrides", words)
    try:
        config = load_config("config.toml", words)
    except UserError as error:
        answer = lab.trainer("prepare", "config.toml", *words, statuses=(2,))
        shown = str(error).encode(errors="backslashreplace").decode()
        _expect(
            shown[:30] in answer.err or "usage: " in answer.err, f"prepare says {answer.err!r}, load_config {error}"
        )
        left = {path.name for path in Path().iterdir()} - set(GIVEN)
        _expect(not left, f"left behind: {left}")
        return False
    # A run keeps its config as a file, which has to be read as the same config.
    _expect(parse_config(config.to_toml(), "again") == config, "to_toml is not read back as it was written")
    if not words:
        _expect_values(tomllib.loads(data.decode("utf-8-sig")), config.model_dump(mode="json"))
    for key, _, written in (word.partition("=") for word in words):
        # An override that another one may replace is not checked.
        if sum(word.split(".")[0].split("=")[0].strip() == key.split(".")[0].strip() for word in words) == 1:
            _expect_override(config.model_dump(mode="json"), key.strip(), written)
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
            _expect(again.err == trained.err, f"the second refusal has another reason: {again.err[:300]!r}")
    _expect_no_leftovers(Path())
    if not answer.status:
        lab.trainer("prepare", "config.toml", *words, statuses=(0,))
    return not answer.status


def _expect_values(given: Any, taken: Any, key: str = "") -> None:
    """Checks that a config has the values of its file."""
    for name, value in given.items():
        if isinstance(value, dict):
            _expect_values(value, taken[name], f"{key}{name}.")
            continue
        found = taken[name]
        listed = [value] if isinstance(found, list) and not isinstance(value, list) else value
        if isinstance(found, float) and type(value) is int:
            listed = float(value)
        _expect(
            found == listed and not isinstance(value, bool) ^ isinstance(found, bool),
            f"{key}{name}={value!r} is read as {found!r}",
        )


def _expect_override(taken: Any, key: str, written: str) -> None:
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
    _expect(
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


def text(lab: Lab, rng: random.Random) -> bool:
    """A file of text."""
    _start()
    name = rng.choice(("a.txt", "a.txt", "a", "A.TXT", "a.txt.gz", "a[1].txt", "a.md"))
    seed = rng.choice(TEXTS).encode(rng.choice(("utf-8",) * 6 + ("utf-16", "utf-8-sig")))
    data = mutated_bytes(rng, seed, rng.choice(TEXTS).encode())
    if name.endswith(".gz"):
        seed = gzip.compress(seed, mtime=0)
        data = gzip.compress(data, mtime=0) if rng.random() < 0.5 else mutated_bytes(rng, seed, data)
    how = rng.choice(("line", "paragraph", "file"))
    return _try_text(lab, rng, name, data, how, functools.partial(_documents_of, how=how))


def jsonl(lab: Lab, rng: random.Random) -> bool:
    """A file of JSON Lines."""
    _start()
    records: list[Any] = [{"text": line, "id": i} for i, line in enumerate(TEXTS[-1].split("\n")) if line]
    seed = b"\n".join(as_json(rng, record) for record in records) + b"\n"
    if rng.random() < 0.5:
        data = mutated_bytes(rng, seed, TEXTS[-1].encode())
    else:
        records = mutated_tree(rng, records)
        data = b"\n".join(as_json(rng, record) for record in (records if isinstance(records, list) else [records]))
    name = rng.choice(("a.jsonl", "a.jsonl", "a.ndjson", "A.JSONL", "a.jsonl.gz"))
    return _try_text(lab, rng, name, gzip.compress(data, mtime=0) if name.endswith("gz") else data, "line", _records_of)


def _try_text(
    lab: Lab, rng: random.Random, name: str, data: bytes, how: str, documents_of: Callable[[bytes], list[str] | None]
) -> bool:
    lab.write(name, data)
    kind = rng.choice(ANY_TOKENIZER)
    words = [f"data.train={json.dumps(name)}", f"tokenizer.kind={kind}", f"data.documents={how}"]
    words += ["data.max_broken_fraction=0.9"] * (rng.random() < 0.2)
    words += ["data.validation=none", "data.held_out_fraction=0.3"] * (rng.random() < 0.3)
    words += ["tokenizer.vocabulary_size=400"] * (kind in ("bpe", "wordpiece"))
    answer = lab.trainer("prepare", "config.toml", *words)
    _expect_no_leftovers(Path())
    if not answer.status:
        prepared = next(Path("prepared").iterdir())
        if rng.random() < 0.2:
            lab.trainer("inspect", str(prepared), statuses=(0,))
        if len(words) == 3 and kind == "byte":
            expected = documents_of(gzip.decompress(data) if name.endswith(".gz") else data)
            found = _documents_in(prepared, "train")
            _expect(found == expected, f"prepared is {found} and not {expected}"[:2_000])
    if not _is_next_tried(rng, answer):
        return not answer.status
    good = gzip.compress(TEXTS[-1].encode()) if name.endswith(".gz") else TEXTS[-1].encode()
    if documents_of is _records_of:
        good = b"\n".join(json.dumps({"text": line}).encode() for line in TEXTS[-1].split("\n"))
        good = gzip.compress(good) if name.endswith(".gz") else good
    lab.write(name, good)
    lab.trainer("prepare", "config.toml", *words, statuses=(0,))
    return not answer.status


def _documents_of(data: bytes, how: str) -> list[str]:
    """Returns the documents of a text, as the documentation defines them."""
    whole = data.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    documents = whole.split("\n") if how == "line" else [whole]
    if how == "paragraph":
        documents = [""]
        for line in whole.split("\n"):
            if not line or line.isspace():
                documents.append("")
            else:
                documents[-1] += ("\n" if documents[-1] else "") + line
    return [document for document in documents if document and not document.isspace()]


def _records_of(data: bytes) -> list[str]:
    lines = data.decode().removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line and not line.isspace()]
    return [each for each in texts if each and not each.isspace()]


def _documents_in(folder: Path, split_name: str) -> list[str]:
    """Returns the documents of a split of prepared data."""
    from trainer.commands.inspect_run import document
    from trainer.data.shards import load_prepared

    prepared = load_prepared(folder)
    tokenizer, split = prepared.tokenizer(), prepared.split(split_name)
    return [
        tokenizer.decode(document(prepared, split, number, split.max_tokens)[1])
        for number in range(split.num_documents)
    ]


def vocabulary(lab: Lab, rng: random.Random) -> bool:
    """A vocab.txt."""
    _start()
    seed = (lab.seed("wordpiece") / "run/tokenizer/vocab.txt").read_bytes()
    data = mutated_bytes(rng, seed, TEXTS[-1].encode())
    if rng.random() < 0.3:  # Lines are swapped, doubled, or get a suffix.
        lines = seed.split(b"\n")
        for _ in range(rng.choice((1, 3))):
            i = rng.randrange(len(lines))
            lines[i] += rng.choice((b" ", b"\t7", b"\r", b"\0", b"#", "é".encode(), b"\xff", b"A" * 300, b""))
            lines[i], lines[0] = (lines[0], lines[i]) if rng.random() < 0.3 else (lines[i], lines[0])
        data = b"\n".join(lines)
    return _try_tokenizer(lab, rng, "vocab.txt", "wordpiece", seed, data)


def tokenizer_json(lab: Lab, rng: random.Random) -> bool:
    """A tokenizer.json."""
    _start()
    kind = rng.choice(("bpe", "bpe", "wordpiece"))
    files = [(lab.seed(each) / "run/tokenizer/tokenizer.json").read_bytes() for each in (kind, rng.choice(TOKENIZERS))]
    data = mutated_json(rng, rng.choice((files[0],) * 9 + (files[1],)), files[1])
    return _try_tokenizer(lab, rng, "tokenizer.json", kind, files[0], data)


def _try_tokenizer(lab: Lab, rng: random.Random, name: str, kind: str, seed: bytes, data: bytes) -> bool:
    lab.write(name, data)
    words = [f"tokenizer={{kind = '{kind}', path = '{name}'}}"]
    answer = lab.trainer("prepare", "config.toml", *words)
    _expect_no_leftovers(Path())
    if not answer.status and (kind == "bpe" or rng.random() < 0.5):
        from trainer.data.shards import load_prepared

        prepared = load_prepared(next(Path("prepared").iterdir()))
        if rng.random() < 0.1:
            lab.trainer("inspect", str(prepared.folder), statuses=(0,))
        tokenizer = prepared.tokenizer()
        for each in TEXTS:
            tokens = tokenizer.encode(each)
            _expect(tokens.min() >= 0 and tokens.max() < prepared.vocabulary_size, "a token beyond the vocabulary")
            back = tokenizer.decode(tokens)
            _expect(tokenizer.is_lossy or back == each, f"{each!r} comes back as {back!r}")
        if name == "vocab.txt":
            lines = data.decode("utf-8-sig").rstrip("\n").split("\n")
            while not lines[-1].strip(" \t\r\f"):
                del lines[-1]
            words_of: list[str] = tokenizer.vocabulary  # type: ignore[attr-defined]
            _expect(len(words_of) == len(lines), f"{len(words_of)} tokens of {len(lines)} lines")
            # Blanks around a token do not belong to it, unless they distinguish it from another token.
            wrong = [pair for pair in zip(words_of, lines, strict=True) if pair[0].strip() != pair[1].strip()]
            _expect(not wrong, f"tokens and their lines: {wrong[:5]}")
    if _is_next_tried(rng, answer):
        lab.write(name, seed)
        lab.trainer("prepare", "config.toml", *words, statuses=(0,))
    return not answer.status


def prepared_folder(lab: Lab, rng: random.Random) -> bool:
    """A folder of prepared data."""
    _start()
    kind = rng.choice(ANY_TOKENIZER)
    shutil.copytree(lab.seed(kind) / "prepared", "prepared")
    folder = next(Path("prepared").iterdir())
    is_changed = _damage(lab, rng, folder)
    inspected = lab.trainer("inspect", str(folder), statuses=(0, 1, 2))
    _expect(bool(inspected.status) or not is_changed, "inspect did not notice the change")
    words = _settings_of(kind)
    answer = lab.trainer("prepare", "config.toml", *words)
    _expect(answer.status == 2 or not is_changed or not folder.is_dir(), "prepare did not notice the change")
    _expect_no_leftovers(Path())
    shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)
    if _is_next_tried(rng, answer):
        lab.trainer("prepare", "config.toml", *words, statuses=(0,))
    return not inspected.status


def stopped_folder(lab: Lab, rng: random.Random) -> bool:
    """The folder that a stopped preparation left."""
    from trainer.data.shards import load_prepared

    _start()
    kind = rng.choice(ANY_TOKENIZER)
    (whole,) = (lab.seed(kind) / "prepared").iterdir()
    shutil.copytree(lab.seed(kind) / "stopped", "prepared")
    (left,) = Path("prepared").iterdir()
    _damage(lab, rng, left, may_be_folder=False)
    answer = lab.trainer("prepare", "config.toml", *_settings_of(kind), statuses=(0,))
    _expect([path.name for path in Path("prepared").iterdir()] == [whole.name], "other files are left")
    found, expected = (load_prepared(path / whole.name).fingerprint for path in (Path("prepared"), whole.parent))
    _expect(found == expected, "the data differs from an uninterrupted preparation's")
    return "going on where another" in answer.out


def run_folder(lab: Lab, rng: random.Random) -> bool:
    """A run's folder."""
    from trainer.errors import UserError

    _start()
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
        _expect_message(lab, error)
        opened = None
    if opened is not None:
        for key in {**before["config"], **opened["config"]}:
            now, was = opened["config"].get(key), before["config"].get(key)
            _expect(now == was or key.startswith(_resumable()), f"{key}={was!r} became {now!r}")
        _expect(opened["tokenizer"] == before["tokenizer"], "another tokenizer")
        step = opened["step"]
        _expect(opened["weights"] == _weights_of(str(lab.seed(kind) / "run"), step), "other weights")
    shutil.rmtree("run") if Path("run").is_dir() else Path("run").unlink(missing_ok=True)
    return opened is not None


def _resumable() -> tuple[str, ...]:
    from trainer.config_file import RESUMABLE

    return RESUMABLE


def _opened(path: Path) -> dict[str, Any]:
    """Opens a run's config, data, tokenizer and checkpoint; returns what was read."""
    from trainer.training.run_checkpoints import load_model
    from trainer.training.run_data import find_prepared, load_tokenizer_of
    from trainer.training.run_folder import RunFolder

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


def prompt(lab: Lab, rng: random.Random) -> bool:
    """A prompt, and the other options of generate."""
    kind = rng.choice(ANY_TOKENIZER)
    text = _as_argument(mutated_text(rng, rng.choice(("The cat", "고양이", "", "🙂", ENGLISH))))
    if rng.random() < 0.8:
        from trainer.decoding.decoder import Decoder
        from trainer.errors import UserError

        stop = None if rng.random() < 0.7 else _as_argument(mutated_text(rng, rng.choice(TEXTS)[:5]))
        number, seed = (rng.choice((3, nasty(rng))) for _ in range(2))
        number, seed = (value if isinstance(value, int) else 1 for value in (number, seed))
        lab.note("generate", (kind, text, number, seed, stop))
        try:
            with lab.heard() as heard:
                (written,) = lab.generator(kind).generate([text], Decoder("top-p"), number, seed, stop)
        except UserError as error:
            _expect_message(lab, error)
            return False
        _judge(Answer(0, *heard), (0,))
        tokenizer = lab.generator(kind).tokenizer
        _expect(tokenizer.is_lossy or kind == "char" or written.startswith(text), f"{text!r} became {written!r}")
        return True
    words = ["generate", str(lab.seed(kind) / "run"), "--prompt", text]
    words += ["--sampler", rng.choice(("greedy", "top-p", "top-k", "beam"))] if rng.random() < 0.5 else []
    names = ["k", "p", "temperature", "num-tokens", "stop", "seed", "num-samples", "num-beams", "sampler"]
    for name in rng.sample(names, rng.choice((0, 1, 1, 2))):
        value = nasty(rng)
        if isinstance(value, int) and value > 64 and name in ("num-samples", "num-beams"):
            value = 3  # More samples would rightly take much time and memory.
        words += [f"--{name}", mutated_text(rng, str(value)) if rng.random() < 0.2 else str(value)]
    words += ["--num-tokens", "3"] if "--num-tokens" not in words else []
    answer = lab.trainer(*map(_as_argument, words))
    return not answer.status


def tf_config(lab: Lab, rng: random.Random) -> bool:
    """TF_CONFIG, and the variables of SLURM."""
    from trainer.config import DistributionConfig
    from trainer.distributed import rendezvous as meeting
    from trainer.distributed import workers
    from trainer.errors import UserError

    _start()
    tree: dict[str, Any] = {
        "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2", "localhost:3"][: rng.choice((1, 2, 3))]},
        "task": {"type": "worker", "index": rng.choice((0, 1))},
    }
    if rng.random() < 0.2:
        tree["cluster"]["chief"] = ["[::1]:4"]
    variables = {"TF_CONFIG": mutated_json(rng, json.dumps(tree).encode(), b"[::1]:99999 chief ps x")}
    if rng.random() < 0.1:
        name = rng.choice(
            ("TRAINER_MEETING_SECS", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_LOCALID", "SLURM_PROCID")
        )
        variables[name] = mutated_bytes(rng, b"2", b"node[1-3]")
    if rng.random() < 0.05:
        variables |= {"SLURM_STEP_NODELIST": b"n[1-2]", "SLURM_STEP_TASKS_PER_NODE": b"1(x2)", "SLURMD_NODENAME": b"n1"}
        variables |= {"SLURM_STEP_NUM_TASKS": b"2", "SLURM_JOB_ID": b"7", "SLURM_LOCALID": b"0", "SLURM_PROCID": b"0"}
        del variables["TF_CONFIG"]
        name = rng.choice(sorted(variables))
        variables[name] = mutated_bytes(rng, variables[name], b"n[1-999999999999]")
    for name, value in variables.items():
        lab.note(name, value)
        os.environb[name.encode()] = value.replace(b"\0", b"")[:100_000]
    settings = DistributionConfig(kind=rng.choice(("auto", "multi_worker")))
    try:
        with lab.heard():
            found = workers.find_workers(settings)
            if found.are_several:
                meeting.meeting_secs()
    except UserError as error:
        _expect_message(lab, error)
        lab.trainer("train", "config.toml", f"distribution.kind={settings.kind}", statuses=(2,))
        return False
    if "TF_CONFIG" in variables:
        given = json.loads(os.environ["TF_CONFIG"] or "{}")
    else:
        given = {}
    if given.get("cluster"):
        _expect(list(found.addresses) == given["cluster"]["worker"], f"workers {found.addresses}")
        _expect(found.number is not True and found.number == given["task"]["index"], f"index {found.number}")
    if found.are_several and all(re.match(r"(127\.0\.0\.1|localhost|\[::1\]|):", each) for each in found.addresses):
        with contextlib.suppress(UserError), meeting.Meeting(found, 0.05) as together:
            together.agree({})
    return True


def options(lab: Lab, rng: random.Random) -> bool:
    """The command line of the other verbs."""
    _start()
    shutil.copytree(lab.seed("byte") / "prepared", "prepared")
    prepared = str(next(Path("prepared").iterdir()))
    lines = [
        f"inspect {prepared} --examples 2 --split train --sequence-length 8",
        f"inspect {prepared}",
        "inspect config.toml",
        f"evaluate {prepared}",
        f"generate {prepared}",
        "plan config.toml --target gpu:H100x8 --utilisation 0.5",
        "plan config.toml --target tpu:v5e-8",
        "plan config.toml --target cpu --weights --vocabulary-size 300",
        "prepare config.toml --runner local",
        "prepare config.toml -- --runner=X",
        "verify config.toml --replicas x,y",
        "verify config.toml --replicas 1,3 --steps 1",
        f"train --resume {prepared}",
        "train --or-resume text.txt",
        "train",
    ]
    words = rng.choice(lines).split()
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(1, len(words)) if len(words) > 1 and rng.random() < 0.95 else 0
        values = [place for place in range(2, len(words)) if words[place - 1].startswith("--")]
        what = rng.randrange(8)
        if what == 0:
            del words[i]
        elif what == 1:
            words.insert(i, words[i])
        elif what == 2:
            words[i] = mutated_text(rng, words[i])
        elif what <= 6 and values:
            words[rng.choice(values)] = str(rng.choice((nasty(rng), rng.choice(NUMBERS), rng.randrange(9))))
        else:
            words[i] = str(nasty(rng))
        if not words:
            break
    words = list(map(_as_argument, words))
    if words[:1] == ["verify"] and re.search(r"\b[124],[124]\b", " ".join(words)):
        return True  # This would start processes that train.
    answer = lab.trainer(*words, statuses=(0, 1, 2))
    _expect_no_leftovers(Path())
    return not answer.status


KINDS: dict[str, Callable[[Lab, random.Random], bool]] = {
    "config": config,
    "overrides": overrides,
    "text": text,
    "jsonl": jsonl,
    "vocabulary": vocabulary,
    "tokenizer.json": tokenizer_json,
    "prompt": prompt,
    "run": run_folder,
    "prepared": prepared_folder,
    "stopped": stopped_folder,
    "tf_config": tf_config,
    "options": options,
}


class Verdict(NamedTuple):
    """The outcome of a case.

    Attributes:
        result: "accepted", "refused" or "fault".
        secs: the CPU time.
        fault: a description of the fault.
        details: the case's inputs and the fault's traceback.
    """

    result: str
    secs: float = 0.0
    fault: str = ""
    details: str = ""


def attempt(lab: Lab, kind: str, number: int, seed: int) -> Verdict:
    """Runs one case."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    start = time.process_time()
    try:
        with lab.case():
            result = "accepted" if KINDS[kind](lab, rng) else "refused"
        return Verdict(result, time.process_time() - start)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A panic in a Rust library is not an Exception.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/trainer/" in frame.filename]
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        name = "" if isinstance(error, Fault) else f"{type(error).__name__}{place}: "
        return Verdict(
            "fault",
            time.process_time() - start,
            f"{name}{str(error)[:600]}",
            "\n".join([*lab.notes, traceback.format_exc()]),
        )


# One process runs the cases, and writes a line before and after each; the other process reads these lines.


def work(folder: Path, seed: int, kinds: Sequence[str], first: int, last: int) -> None:
    """Runs the cases at places first to last, and writes a line before and after each: its place, its verdict."""
    channel = os.fdopen(os.dup(1), "w")
    # The output of libraries while they are imported does not belong to a case.
    os.dup2(os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    lab = Lab(folder)
    for place in range(first, last):
        print(json.dumps([place]), file=channel, flush=True)
        verdict = attempt(lab, kinds[place % len(kinds)], place // len(kinds), seed)
        print(json.dumps([place, *verdict[:3]]), file=channel, flush=True)


def watch(folder: Path, options: argparse.Namespace, deadline: float) -> Iterator[tuple[str, int, Verdict]]:
    """Yields (kind, number, verdict) for each case, and starts the working process again if a case killed it.

    A case that has begun by the deadline may still end, because it may be one that hangs.
    """
    place, last = 0, options.number * len(options.kinds)
    while place < last and time.monotonic() < deadline:
        # Libraries leak memory, so a process runs only this many cases.
        words = f"--work {folder} --from {place} --to {min(last, place + 3_000)} --seed {options.seed}".split()
        with subprocess.Popen(
            [sys.executable, __file__, *options.kinds, *words],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            bufsize=0,
        ) as process:
            assert process.stdout is not None
            is_under_way = False
            for place, *found in _messages(process.stdout, deadline):
                is_under_way = not found
                if found:
                    yield options.kinds[place % len(options.kinds)], place // len(options.kinds), Verdict(*found)
                    if time.monotonic() >= deadline:
                        break
            place += not is_under_way
            process.kill()
            status = process.wait()
        if is_under_way:
            log = (folder / LOG).read_text("utf-8", "replace").splitlines()
            how = f"the process ended with status {status}: {' / '.join(log[-5:])}"
            yield options.kinds[place % len(options.kinds)], place // len(options.kinds), Verdict("fault", 0.0, how)
            place += 1
        elif status not in (0, -signal.SIGKILL):
            raise SystemExit((folder / LOG).read_text("utf-8", "replace"))


def _messages(stream: IO[bytes], deadline: float) -> Iterator[list[Any]]:
    """Yields a process's lines until it ends, or until the deadline if no case is running."""
    rest, is_under_way = b"", False
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(DEAD_SECS if is_under_way else min(DEAD_SECS, max(0.0, deadline - time.monotonic()))):
            read = os.read(stream.fileno(), 1 << 16)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            for message in map(json.loads, lines):
                is_under_way = len(message) == 1
                yield message


def report(kinds: Sequence[str], verdicts: dict[str, list[tuple[int, Verdict]]], seed: int) -> int:
    """Prints the outcomes of all cases; returns the number of faults."""
    for kind in kinds:
        results = collections.Counter(verdict.result for _, verdict in verdicts[kind])
        counts = ", ".join(f"{results[result]} {result}" for result in ("accepted", "refused"))
        secs = sum(verdict.secs for _, verdict in verdicts[kind]) / max(results.total(), 1)
        print(f"{kind:15} {results.total()} tried, {counts}, {results['fault']} faults, {1000 * secs:.0f} ms each")
        for number, verdict in [case for case in verdicts[kind] if case[1].result == "fault"][:MAX_NAMED_FAULTS]:
            print(f"  --case {kind}/{number} --seed {seed}: {verdict.fault}")
    return sum(verdict.result == "fault" for cases in verdicts.values() for _, verdict in cases)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases that the command line names; returns the exit status."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"kinds of input: {', '.join(KINDS)} (all)")
    parser.add_argument("--number", type=int, default=2_000, help="mutations of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default: %(default)s)")
    parser.add_argument("--secs", type=float, default=math.inf, help="end after this many seconds")
    parser.add_argument("--case", metavar="KIND/NUMBER", help="run one case again, and print its details")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--to", dest="last", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"{', '.join(unknown)}: not a kind of input; choose among {', '.join(KINDS)}")
    options.kinds = options.kinds or list(KINDS)
    if options.work:
        work(options.work, options.seed, options.kinds, options.first, options.last)
        return 0
    deadline = time.monotonic() + options.secs
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        if options.case:
            kind, _, number = options.case.rpartition("/")
            verdict = attempt(Lab(Path(folder)), kind, int(number), options.seed)
            print(verdict.result, verdict.fault, verdict.details, sep="\n")
            return int(verdict.result == "fault")
        verdicts: dict[str, list[tuple[int, Verdict]]] = collections.defaultdict(list)
        for kind, number, verdict in watch(Path(folder), options, deadline):
            verdicts[kind].append((number, verdict))
    return int(report(options.kinds, verdicts, options.seed) > 0)


if __name__ == "__main__":
    sys.exit(main())
