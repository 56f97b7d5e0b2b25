"""Laws of `trainer evaluate RUN --data FILE`."""

import gzip
import json
import math
from pathlib import Path

import pytest
from tiny_run import prepared_text, save_checkpoint, tiny  # type: ignore[import-not-found]

from trainer.cli import main
from trainer.exchange.open import open_model
from trainer.runs.run_folder import RunFolder
from trainer.scoring.score import total
from trainer.scoring.scorer import Scorer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("texts")
    run = RunFolder.create(tiny(folder), prepared_text(folder))
    save_checkpoint(run, 2)
    return run


def score_of(run: RunFolder, *texts: str, stride: int | None = None, with_ends: bool = False):
    opened = open_model(str(run.path))
    return total(Scorer(opened.model, opened.tokenizer, 8).scores(texts, stride, with_ends))


def evaluated(run: RunFolder, capsys: pytest.CaptureFixture[str], *words: str):
    assert main(["evaluate", str(run.path), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(run: RunFolder, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["evaluate", str(run.path), *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ([], ["the cat\n\nsat on\n the mat\n"]),
        (["--documents", "line"], ["the cat", "sat on", " the mat"]),
        (["--documents", "auto"], ["the cat", "sat on\n the mat"]),
        (["--documents", "paragraph", "--with-ends"], ["the cat", "sat on\n the mat"]),
        (["--stride", "3"], ["the cat\n\nsat on\n the mat\n"]),
    ],
)
def test_files_are_scored_as_the_texts_in_them(run, tmp_path: Path, capsys, words, texts):
    (tmp_path / "a.txt").write_text("the cat\n\nsat on\n the mat\n", "utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "mats"}\n\n{"text": "cats"}\n'))
    figures = evaluated(run, capsys, "--data", f"{tmp_path}/*.txt", f"{tmp_path}/b.jsonl.gz", *words)
    stride = 3 if "--stride" in words else None
    expected = score_of(run, *texts, "mats", "cats", stride=stride, with_ends="--with-ends" in words)
    assert {name: figures[name] for name in expected.figures()} == pytest.approx(expected.figures(), rel=1e-6)
    assert figures["num_bytes"] == sum(len(text.encode()) for text in [*texts, "mats", "cats"])
    assert (figures["step"], figures["sequence_length"], figures["stride"]) == (2, 8, stride or 8)


def test_the_line_names_the_texts_and_devices_may_follow_the_files(run, tmp_path: Path, capsys):
    (tmp_path / "a.jsonl").write_text('{"story": "the cat"}', "utf-8")
    words = ["--name", "cats", "--text-field", "story", "--data", f"{tmp_path}/a.jsonl", "distribution.kind=cpu"]
    assert main(["evaluate", str(run.path), *words]) == 0
    assert f"step 2: cats: {score_of(run, 'the cat')}\n" == capsys.readouterr().out


def test_the_validation_text_is_scored_as_json_too(run, capsys):
    figures = evaluated(run, capsys)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["step"] == 2 and figures["excess"] is None


def test_what_cannot_be_scored_is_refused(run, tmp_path: Path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"story": "b"}\n', "utf-8")
    blank, broken = tmp_path / "blank.txt", tmp_path / "broken.txt"
    blank.write_text(" \n\n")
    broken.write_bytes(b"caf\xe9 au lait, caf\xe9")
    for words, message in [
        (["--stride", "3"], "--stride goes with --data FILE; leave it out."),
        (["--with-ends"], "--with-ends goes with --data FILE; leave it out."),
        (["--data", "distribution.kind=cpu"], "--data distribution.kind=cpu names no file; name one first."),
        (["--data", f"{tmp_path}/nothing"], "no such file, seen from"),
        (["--data", str(blank)], "only white space in it; give files with text."),
        (["--data", str(broken)], "not UTF-8 at byte offset 3; it looks like LATIN1"),
        (["--data", str(file)], "line 2 has no text in --text-field='text'"),
        (["--data", str(file), "--last-word", "--stride", "3"], "--last-word and --stride 3: a last word has neither"),
        (["--data", str(file), "--stride", "9"], "a stride of 9 must be from 1 to 8"),
        (["data.prepared_folder=x", "--data", str(file)], "which --data does not read; leave it out."),
    ]:
        assert message in refused(run, capsys, *words)


def test_another_program_s_model_has_no_validation_text(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "which has no validation text; name a text with --data FILE." in capsys.readouterr().err


def test_last_words_are_scored_after_the_text_before_them(run, tmp_path: Path, capsys):
    lines = ["the cat sat on the mat ", "mat", "the cat"]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    figures = evaluated(run, capsys, "--data", f"{tmp_path}/words.jsonl", "--last-word")
    assert (figures["num_texts"], figures["num_tokens"], figures["num_words"], figures["num_bytes"]) == (3, 12, 3, 12)
    assert figures["word_perplexity"] == pytest.approx(math.exp(figures["nats"] / 3))
    assert figures["accuracy"] == figures["num_right"] / 3
