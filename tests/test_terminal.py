import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.system import terminal
from trainer.system.terminal import is_greeting, lasting_errors, lasting_output, printable, say

ROOT = Path(__file__).parent.parent


def test_a_character_that_controls_a_terminal_is_printed_as_its_escape():
    assert printable("a\x1b[2Jb\rc\x07\x7f\x9b") == "a\\x1b[2Jb\\rc\\x07\\x7f\\x9b"
    assert printable("\u202eabc\u2066\u2028\ud83d\0") == "\\u202eabc\\u2066\\u2028\\ud83d\\x00"
    plain = "line\n\tindented  twice, 한글 नमस्ते 👩\u200d👧 می\u200cخواهم \u00a0 \\x1b"
    assert printable(plain) == plain


def test_a_file_gets_whole_lines(capsys: pytest.CaptureFixture[str]):
    say("word " * 100 + "\x1b[31m :smile: [bold]x[/bold]")
    assert capsys.readouterr().out == "word " * 100 + "\\x1b[31m :smile: [bold]x[/bold]\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_breaks_lines_between_words(monkeypatch: pytest.MonkeyPatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "80")
    text = "validation: loss 0.6086 nats per token, perplexity 1.84, 0.199 bits per byte (of what the tokenizer keeps)"
    say(f"{text}\n{'한국어 문장 ' * 20}")
    lines = stream.getvalue().splitlines()
    assert " ".join(line.strip() for line in lines[:2]) == text
    assert set(" ".join(lines[2:]).split()) == {"한국어", "문장"}


def test_errors_are_broken_between_words_too(monkeypatch: pytest.MonkeyPatch):
    from trainer.cli import main

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "minigpt", "model.num_head=3", "train.batch=3"]) == 2
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and lines[0] == (
        "trainer: model.num_head is not a setting. Did you mean model.num_heads?"
    )


class Broken(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_output_without_a_reader_is_dropped_after_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdout", Broken())
    with lasting_output():
        for _ in range(3):
            say("a line")
    assert capsys.readouterr().err == (
        "trainer: standard output cannot be written (its reader has gone away); training continues without it.\n"
    )
    monkeypatch.setattr(sys, "stderr", Broken())
    with lasting_output():  # In a script nothing else guards standard error.
        say("a line")
    with lasting_errors(), lasting_output():
        say("a line")


def run_with(stdout: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )


def test_a_verb_whose_reader_went_away_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    # argparse itself passes over a help that nobody reads.
    for arguments, status in ((["plan", "minigpt"], 141), (["plan", "--help"], 0), (["train", "--help"], 0)):
        done = run_with(writer, *arguments)
        assert (done.returncode, done.stderr) == (status, "")
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_verb_whose_output_fills_the_disk_says_so():
    with Path("/dev/full").open("w") as full:
        done = run_with(full.fileno(), "plan", "minigpt")
    assert (done.returncode, done.stderr) == (2, "trainer: No space left on device. Make room.\n")


SAY = """
import sys
from trainer.system.terminal import open_streams, say
open_streams()
say("한글 é x")
"""


def test_a_character_that_the_encoding_lacks_is_printed_as_an_escape():
    program = [sys.executable, "-c", SAY]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"\\ud55c\\uae00 \\xe9 x\n"), done.stderr


def test_a_character_that_the_encoding_of_a_script_lacks_does_not_end_its_training(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with lasting_output():
        say("한글 é x")
    assert written.getvalue() == b"\\ud55c\\uae00 \\xe9 x\n"


CLOSED = """
import os
from trainer.system.terminal import open_streams
open_streams()
with open(os.devnull, "w") as file:
    assert file.fileno() > 2, "a file has the number of standard output"
print("nowhere")
"""


def test_the_numbers_of_streams_closed_at_the_start_are_not_given_to_files(tmp_path: Path):
    command = f'exec "{sys.executable}" -c "$PROGRAM" >&- 2>&- <&-'
    assert subprocess.run(command, shell=True, cwd=ROOT, env=os.environ | {"PROGRAM": CLOSED}).returncode == 0


def test_terminal_and_signals_load_nothing_but_the_standard_library():
    heavy = {"pydantic", "numpy", "rich", "trainer.config.settings"}
    program = f"import sys; import trainer.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert terminal.__doc__ is not None


def test_tensorflow_s_notes_about_gpus_are_printed_on_a_machine_that_has_one():
    no_drivers = "I0000 00:00:1 1 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU will not be used."
    assert is_greeting(no_drivers, has_gpu=False) and not is_greeting(no_drivers, has_gpu=True)
    for greeting in ("I0000 00:00:1 1 port.cc:153] oneDNN custom operations are on.", "To enable the following in"):
        assert is_greeting(greeting, has_gpu=True)
    for warning in ("W0000 00:00:1 1 gpu_device.cc:2431] Cannot dlopen some GPU libraries.", "a traceback"):
        assert not is_greeting(warning, has_gpu=False)
