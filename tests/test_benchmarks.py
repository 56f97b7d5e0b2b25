"""Laws of the benchmarks in scripts/: what they count is right on both sides, and they end with all figures. How fast
anything was is no test.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROUNDS = 5


def run(script, folder, *arguments):
    """Runs a benchmark in quick mode on the storybook; returns what it wrote and what it printed."""
    out = folder / "figures.json"
    command = [sys.executable, str(ROOT / "scripts" / script), "--quick", "--json", str(out), *arguments]
    (folder / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "COLUMNS": "120"}
    environment.pop("TRAINER_TEST_DATA", None)
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert not any((folder / "tmp").iterdir())
    return json.loads(out.read_text()), process.stdout


def functions_of(script):
    return runpy.run_path(str(ROOT / "scripts" / script))


def write_lines(path, num_lines):
    path.write_text("".join(f"line {i} of a text to read\n" for i in range(num_lines)))


def test_a_text_is_read_from_one_shard_and_from_several_and_prepared_data_as_it_is(tmp_path):
    bench = functions_of("bench_input")
    write_lines(tmp_path / "text.txt", 300)
    options = argparse.Namespace(data=str(tmp_path / "text.txt"), shards=4)
    data = bench["find_data"](options, tmp_path)
    whole, parts = (prepared.split("train") for prepared in data)
    assert (len(whole.shards), len(parts.shards)) == (1, 4)
    assert whole.num_tokens == parts.num_tokens
    (found,) = bench["find_data"](argparse.Namespace(data=str(data[1].folder), shards=2), tmp_path)
    assert found == data[1]

    pipelines = [bench["Pipeline"](prepared, bench["Shape"](4, 8, 1.0), None, num_steps=10) for prepared in data]
    for pipeline in pipelines:
        assert pipeline.take() > 0
        # All of 10 batches, but for what fills up the last window of a shard, which comes once in hundreds.
        assert 10 * 4 * 8 - 4 * 8 < pipeline.num_tokens <= 10 * 4 * 8

    with pytest.raises(SystemExit, match=r"--window-mb 16 holds all of the data, 0\.0 MB of tokens; take more text"):
        bench["check_window"](data[0], 16)


def test_what_is_lost_of_a_text_is_a_fault(tmp_path):
    bench = functions_of("bench_prepare")
    exact = bench["Case"]("exact", write=None)
    stories = exact._replace(is_exact=False)
    counts = bench["Counts"](num_documents=3, num_tokens=20, num_bytes=60)
    more, fewer = counts._replace(num_tokens=21), counts._replace(num_tokens=19)
    assert [bench["find_fault"](case, counts, counts) for case in (exact, stories)] == ["", ""]
    # A word is a token, or of stories several.
    assert bench["find_fault"](stories, counts, more) == ""
    assert bench["find_fault"](exact, counts, more) == f"{more} instead of {counts}"
    assert bench["find_fault"](stories, counts, fewer) == f"{fewer} instead of {counts}"
    one_document_less = counts._replace(num_documents=2)
    assert bench["find_fault"](stories, counts, one_document_less) == f"{one_document_less} instead of {counts}"


def test_texts_grow_threefold_to_the_largest_and_hold_what_is_said_of_them(tmp_path):
    bench = functions_of("bench_prepare")
    options = argparse.Namespace(max_mb=150.0, documents=1500, long_mb=0.01)
    stories, nasty = [], []
    for case in bench["cases"](options):
        (nasty if case.is_exact else stories).append(case)
    assert [case.name for case in stories] == [f"{size} MB of stories" for size in (10, 30, 100, 150)]
    assert len(nasty) == 5
    for case in [*nasty, stories[0]._replace(write=lambda folder: bench["write_numbered"](folder, 5000))]:
        folder = tmp_path / case.name
        folder.mkdir()
        counts = case.write(folder)
        texts = [path.read_bytes().decode(errors="replace") for path in folder.iterdir()]
        lines = [line for text in texts for line in text.split("\n") if line.strip() and "\ufffd" not in line]
        words = sum(len(line.split()) for line in lines)
        assert counts == (len(lines), words, sum(map(len, lines))), case.name
    assert not (tmp_path / "no newline at the end" / "text.txt").read_bytes().endswith(b"\n")


@pytest.mark.slow
def test_input_benchmark_ends_with_all_figures(tmp_path):
    figures, printed = run("bench_input", tmp_path)
    rows = figures["pipelines"]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert len(row["each_tokens_per_sec"]) == ROUNDS
        assert row["tokens_per_sec"] == statistics.median(row["each_tokens_per_sec"]) > 0
        # What is missing is padding.
        assert 0.99 * 2**17 < row["num_tokens"] <= 2**17
        assert row["ratio"] > 0
        assert row["pipeline"] in printed
    assert [row["ratio"] for row in rows if row["pipeline"] == "1 shard, in full"] == [1.0, 1.0]
    training = figures["training"]
    assert len(training["each_input_share"]) == ROUNDS
    assert 0 < training["input_share"] < 1
    assert f"{training['input_share']:.2%}" in printed


@pytest.mark.slow
def test_tokenizers_of_the_speed_benchmark_make_the_same_number_of_tokens(tmp_path):
    figures, printed = run("bench_prepare", tmp_path, "--only", "speed")
    assert figures["text"] == "storybook"
    assert [comparison["kind"] for comparison in figures["speed"]] == ["wordpiece", "bpe"]
    for comparison in figures["speed"]:
        ours, *others = comparison["contestants"]
        assert (ours["name"], len(others)) == ("trainer", 2)
        # Of plain English; they differ on words of over 100 bytes.
        assert {each["num_tokens"] for each in others} == {ours["num_tokens"]}
        assert all(
            len(each["each_secs"]) == ROUNDS and each["tokens_per_sec"] > 0 for each in comparison["contestants"]
        )
        assert comparison["compared_with"] in {each["name"] for each in others}
        assert f"trainer is {comparison['ratio']:.2f} times as fast as {comparison['compared_with']}" in printed


@pytest.mark.slow
def test_vocabularies_of_one_text_are_compared_by_what_a_model_learns(tmp_path):
    figures, printed = run("bench_prepare", tmp_path, "--only", "vocabulary")
    ours, theirs = figures["vocabulary"]
    assert (ours["name"], theirs["name"]) == ("trainer", "TensorFlow Text")
    for row in (ours, theirs):
        assert 100 < row["vocabulary_size"] <= 5000
        assert row["secs"] > 0
        assert row["bytes_per_token"] > 1
        assert row["unknown_share"] == 0
        assert 0 < row["bits_per_byte"] < 8
        assert f"{row['bits_per_byte']:.3f}" in printed


@pytest.mark.slow
def test_nothing_is_lost_of_nasty_texts(tmp_path):
    figures, printed = run("bench_prepare", tmp_path, "--only", "scale", "--max-mb", "1", "--documents", "2000")
    rows = {row["text"]: row for row in figures["scale"]}
    assert len(rows) == 6
    for row in rows.values():
        assert row["fault"] == ""
        assert row["secs"] > 0
        assert row["peak_bytes"] > 50e6  # Of a Python with TensorFlow.
    stories = rows["1 MB of stories"]
    assert (
        1e6 <= stories["text_bytes"] == stories["num_bytes"] + stories["num_documents"] < 1.01e6
    )  # The ends of lines.
    # One document of words to validate on goes with each.
    tiny = rows["2,000 tiny documents"]
    assert (tiny["num_documents"], tiny["num_tokens"]) == (2001, 2000 + 26 * 26)
    assert rows["6 MB in one line"]["num_documents"] == 2
    assert rows["a file with invalid UTF-8"]["num_documents"] == 20 * 100 + 1
    assert "nothing lost" in printed
