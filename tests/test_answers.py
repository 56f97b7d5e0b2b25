"""Laws of what `trainer generate` reads and prints beyond a call of the library."""

import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from test_writing import make_generator  # type: ignore[import-not-found]

from trainer.commands.generate import answer_prompts, as_json, read_prompts, write_texts
from trainer.decoding.decoder import Decoder
from trainer.decoding.request import Request
from trainer.decoding.writing import Text
from trainer.errors import UserError

GREEDY, RANDOM = Request(Decoder("greedy"), 5), Request(Decoder("random"), 5)


def test_prompts_are_the_lines_of_a_file_or_the_prompts_of_its_records(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n\n two\u2028 \n{}".encode())
    assert read_prompts(str(tmp_path / "a.txt")) == ["one", " two\u2028 ", "{}"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": ""}\n')
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["a\nb", ""]


def test_a_file_without_usable_prompts_is_refused(tmp_path: Path):
    for name, content, message in (
        ("a.txt", " \n\n", r"a\.txt has no prompt: it is empty, a pipe, or all of its lines are blank"),
        ("a.jsonl", '{"prompt": "a"}\nb', r"a\.jsonl: record 2 is not JSON \(.*write a record on each line, or name"),
        ("a.jsonl", "[" * 100_000, r"record 1 is not JSON"),
        ("a.jsonl", '["a"]', r'record 1 has no text in "prompt"; write {"prompt": "\.\.\."} on each line'),
        ("a.jsonl", '{"prompt": 3}', r"record 1 has no text"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            read_prompts(str(tmp_path / name))


def test_json_gives_the_text_back_and_shows_control_characters():
    text = Text.of(
        '가 \x1b[31m\x85\u202e"\n', prompt="가", continuation="", num_tokens=3, finish="end", sample=0, score=None
    )
    line = as_json(text, RANDOM)
    assert "가" in line and line.isprintable()
    assert json.loads(line) == {**vars(text), "text": text, "sampler": "random", "seed": 0}
    assert json.loads(as_json(text, GREEDY))["seed"] is None


class Terminal(io.StringIO):
    """A terminal that keeps its parts."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_and_a_pipe_get_the_same_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    generator = make_generator()
    prompts = ["ab", "c"]
    texts = generator.texts(prompts, RANDOM)
    expected = "\n\n".join(texts) + "\n"
    write_texts(generator, prompts, RANDOM)
    assert capsys.readouterr().out == expected
    write_texts(generator, prompts, RANDOM, is_json=True)
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == expected.strip().split("\n\n")
    write_texts(generator, ["ab"], RANDOM)
    alone = capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    write_texts(generator, ["ab"], RANDOM)
    assert terminal.getvalue() == alone


class Stubborn:
    """A generator of control characters that gets a Ctrl-C when it is asked for "stop"."""

    def remarks(self, prompts: Sequence[str], request: Request) -> list[str]:
        if prompts == ["long"]:
            raise UserError("too long")
        return []

    def stream(self, prompt: str, request: Request) -> Iterator[str]:
        yield f"{prompt}\x1b[31m"
        if prompt == "stop":
            os.kill(os.getpid(), signal.SIGINT)
            while True:  # The signal arrives between two instructions.
                pass
        yield f"\x07 {request.seed}"


def test_the_prompt_loop_answers_until_ctrl_d_and_ctrl_c_ends_a_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given: list[str | BaseException] = ["a", KeyboardInterrupt(), "stop", "long", "b", EOFError()]

    def read(prompt: str) -> str:
        line = given.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    terminal = Terminal()
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdout", terminal)
    before = signal.getsignal(signal.SIGINT)
    answer_prompts(Stubborn(), RANDOM)  # type: ignore[arg-type]
    assert terminal.getvalue() == "a\\x1b[31m\\x07 0\n\nstop\\x1b[31m\nb\\x1b[31m\\x07 4\n\n"
    assert "trainer: too long" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_vocabulary_of_control_characters_cannot_reach_the_terminal(monkeypatch: pytest.MonkeyPatch):
    from trainer.tokenizers.characters import CharTokenizer
    from trainer.tokenizers.vocabulary import SPECIAL_TOKENS

    generator = make_generator(CharTokenizer([*SPECIAL_TOKENS, *"\x1b\x07\x9b\u202e"]))
    for stdout in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stdout)
        write_texts(generator, [""], RANDOM)
        assert "\\x" in stdout.getvalue() and stdout.getvalue().strip().isprintable()
