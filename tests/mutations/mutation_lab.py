"""The folder in which the mutated inputs are tried, and the checks that all kinds of input share."""

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest import mock

from mutated_values import DEEP, ENGLISH, TEXTS

# A case takes milliseconds, or a few seconds if it trains; on a busy machine many times as long.
HANG_SECS = 120.0
MAX_MESSAGE_CHARS = 3_000
LOG = "log.txt"
# A library's log lines, and Python's warnings.
NOISE = re.compile(r"^(Traceback|WARNING|ERROR|[WEF]\d{4} ).*|^.*\.py:\d+: \w*Warning.*", re.MULTILINE)
# TensorFlow warns of retracing in each process that loads many models, and prints a line when it is imported.
# Characters that control a terminal, or that change the direction of its text.
_CONTROL = re.compile(r"[^\n\t -~\u00a0-\u2027\u202f-\u2065\u206a-\U0010ffff]")
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
        self._loaded: dict[str, Any] = {}

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

    def loaded(self, kind: str) -> Any:
        """Returns a run as `trainer.load` loads it, once: it compiles each of its decoders only once."""
        if kind not in self._loaded:
            import trainer

            self._loaded[kind] = trainer.load(str(self.seed(kind) / "run"))
        return self._loaded[kind]

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
        judge(answer, statuses)
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


def judge(answer: Answer, statuses: Sequence[int]) -> None:
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
    for stream in (answer.out, answer.err):
        if found := _CONTROL.search(stream):
            raise Fault(f"it prints the control character {found[0]!r}: {stream[:300]!r}")


def expect(is_right: bool, what: str) -> None:
    if not is_right:
        raise Fault(what)


def expect_no_leftovers(folder: Path) -> None:
    left = [
        str(path) for path in folder.rglob("*") if path.name.startswith(".partial") or path.name.endswith(".partial")
    ]
    expect(not left, f"left behind: {left}")


TOKENIZERS = ("byte", "char", "bpe", "wordpiece")
# WordPiece is slow to load.
ANY_TOKENIZER = ("byte",) * 8 + ("char",) * 6 + ("bpe",) * 4 + ("wordpiece",)


def settings_of(kind: str) -> list[str]:
    """Returns the overrides that make the config's tokenizer one of that kind."""
    sizes = {"bpe": 300, "wordpiece": 200}
    return [f"tokenizer.kind={kind}", *([f"tokenizer.vocabulary_size={sizes[kind]}"] if kind in sizes else [])]


def is_next_tried(rng: random.Random, answer: Answer) -> bool:
    """Returns whether to try again with the original input: sometimes, and always if a refusal left files behind."""
    is_left = answer.status != 0 and Path("prepared").exists() and any(Path("prepared").iterdir())
    return rng.random() < 0.1 or is_left


def _plant(lab: Lab, kind: str) -> None:
    """Makes the inputs for one kind of tokenizer: prepared data, a run on that data with two checkpoints, and the
    folder that a stopped preparation leaves.
    """
    from trainer.config.file import load_config
    from trainer.data.prepare import prepare
    from trainer.model.build import build_gpt
    from trainer.runs.run_checkpoints import open_checkpoints
    from trainer.runs.run_data import load_tokenizer_of
    from trainer.runs.run_folder import RunFolder

    def silent(_: str) -> None:
        pass

    write_inputs()
    config = load_config("config.toml", [*settings_of(kind), "run_folder=run"])
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


def write_inputs() -> None:
    """Writes the texts and the config into the case's folder."""
    for name, content in zip(GIVEN, (CONFIG, TEXTS[-1], ENGLISH), strict=True):
        Path(name).write_text(content, encoding="utf-8")


def as_argument(text: str) -> str:
    """Returns a text as an operating system passes it on: without NUL, and only surrogates that stand for bytes."""
    return re.sub("[\0\ud800-\udc7f\udd00-\udfff]", "", text.replace(DEEP, "[[["))[:100_000]


def expect_message(lab: Lab, error: Exception) -> None:
    """Checks the message of a UserError, as the command line would print it."""
    from trainer.parser import shortened

    lab.note("UserError", str(error))
    judge(Answer(2, "", f"trainer: {shortened(str(error))}\n"), (2,))
