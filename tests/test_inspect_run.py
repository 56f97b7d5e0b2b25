"""Laws of what `trainer inspect` shows, and of the faults it finds."""

import random
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import quiet, tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.cli import main
from trainer.commands.inspect_run import document
from trainer.config.settings import Config
from trainer.data.coverage import Lengths, lengths_of
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData
from trainer.runs.run_folder import RunFolder

RNG = random.Random(1)
LINES = [f"{i} " + "한글 [bold]text[/] \x1b[31m" * int(RNG.expovariate(0.3)) for i in range(400)]
CHAR = {"kind": "char"}
WORDPIECE = {"kind": "wordpiece", "vocabulary_size": 60}


def config_for(home: str | Path, text: Path, tokenizer: dict) -> Config:
    return tiny_config(home, data={"train": str(text), "held_out_fraction": 0.2}, tokenizer=tokenizer)


def prepared_lines(home: Path, tokenizer: dict = CHAR) -> PreparedData:
    """The lines, in several shards."""
    (home / "text.txt").write_text("\n".join(LINES), encoding="utf-8")
    return prepare(config_for(home, home / "text.txt", tokenizer), quiet, shard_tokens=4000)


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepared_lines(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def prepared(pristine: PreparedData, tmp_path: Path) -> Path:
    """A prepared folder to damage."""
    return Path(shutil.copytree(pristine.folder, tmp_path / "prepared" / pristine.folder.name))


def texts(prepared: PreparedData, split: str) -> list[str]:
    kept = {line for line in LINES if line.strip()}
    tokenizer, found = prepared.tokenizer(), prepared.split(split)
    decoded = [tokenizer.decode(document(prepared, found, i, 10**9)[1]) for i in range(found.num_documents)]
    assert set(decoded) <= kept
    return decoded


# What is shown.


def test_every_document_is_found_in_its_shard_whole_or_shortened(pristine):
    train, validation = texts(pristine, "train"), texts(pristine, "validation")
    assert sorted(train + validation) == sorted(LINES)
    split = pristine.split("train")
    assert len(split.shards) > 3
    for i, text in enumerate(train):
        length, tokens = document(pristine, split, i, 5)
        assert length == len(text)
        assert pristine.tokenizer().decode(tokens) == text[:5]


@pytest.mark.parametrize("offsets_per_read", [1, 2, 7, 1 << 20])
def test_the_lengths_of_documents_do_not_depend_on_how_many_are_read_at_once(pristine, monkeypatch, offsets_per_read):
    monkeypatch.setattr("trainer.data.coverage._OFFSETS_PER_READ", offsets_per_read)
    expected = sorted(len(text) for text in texts(pristine, "train"))
    lengths = lengths_of(pristine.split("train"), pristine.folder)
    assert np.repeat(lengths.values, lengths.counts).tolist() == expected
    assert lengths.values[-1] == pristine.split("train").max_tokens
    assert lengths.percentile(50) == expected[-(-len(expected) // 2) - 1]
    assert lengths.percentile(90) == expected[-(-len(expected) * 9 // 10) - 1]
    for at in (1, 30, expected[-1] - 1, expected[-1], 10**30):
        beyond = [length - at for length in expected if length > at]
        assert lengths.cut_at(at) == (len(beyond), sum(beyond))


def test_a_percentile_is_the_smallest_length_that_this_share_does_not_exceed():
    lengths = Lengths(np.array([3, 5, 9]), np.array([5, 4, 1]))
    assert [lengths.percentile(percent) for percent in (1, 50, 51, 90, 91, 100)] == [3, 3, 5, 5, 9, 9]


def test_bins_are_between_powers_of_two_without_a_gap():
    lengths = Lengths(np.array([0, 1, 2, 3, 4, 7, 8, 33]), np.array([1, 2, 3, 4, 5, 6, 7, 8]))
    assert list(lengths.bins()) == [(0, 0, 1), (1, 1, 2), (2, 3, 7), (4, 7, 11), (8, 15, 7), (16, 31, 0), (32, 63, 8)]
    longest = Lengths(np.array([2**40 - 1, 2**40]), np.array([1, 1]))
    assert list(longest.bins()) == [(2**39, 2**40 - 1, 1), (2**40, 2**41 - 1, 1)]


def test_the_counts_of_the_manifest_are_shown_and_all_files_are_verified(pristine, capsys):
    assert main(["inspect", str(pristine.folder), "--sequence-length", "30"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    shown = captured.out
    split = pristine.split("train")
    for text in (
        pristine.fingerprint,
        pristine.tokenizer_fingerprint,
        pristine.source_fingerprint,
        f"char, {pristine.vocabulary_size} tokens, stored as uint16",
        f" {split.num_documents:,} ",
        f" {split.num_tokens:,} ",
        f" {split.num_bytes:,} ",
        f" {split.num_bytes / split.num_tokens:.2f} ",
        f" {len(split.shards)} ",
        "validation: held out of train",
        f"max {split.max_tokens:,} tokens",
        "█",
    ):
        assert text in shown, text
    for shard in split.shards:
        sizes = [(pristine.folder / name).stat().st_size for name in (shard.tokens_file, shard.offsets_file)]
        (line,) = [line for line in shown.splitlines() if line.split()[:1] == [Path(shard.tokens_file).stem]]
        assert line.split()[1:] == [f"{shard.num_documents:,}", f"{shard.num_tokens:,}", f"{sum(sizes):,}"]
    num_files = sum(path.is_file() for path in pristine.folder.rglob("*"))
    assert f"Verified: all {num_files} files are unchanged, to the last bit.\n" in shown
    num_documents, num_tokens = lengths_of(split, pristine.folder).cut_at(30)
    assert 0 < num_documents < split.num_documents
    words = " ".join(shown.split())
    assert f" lines mode cuts {num_documents / split.num_documents:.2%} of the documents " in words
    assert f" leaves out {num_tokens / split.num_tokens:.2%} of the tokens" in words
    assert max(map(len, shown.splitlines())) <= 80


def test_examples_are_spread_over_the_split_and_always_the_same(pristine, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    shown = []
    for _ in range(2):
        assert main(["inspect", str(pristine.folder), "--split", "validation", "--examples", "4"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    validation = texts(pristine, "validation")
    lines = shown[0].split("some documents of validation")[1].splitlines()[4:8]
    for i, line in enumerate(lines):
        number, length, text = line.strip().split(maxsplit=2)
        assert int(number) == (2 * i + 1) * len(validation) // 8
        expected = validation[int(number)]
        assert int(length) == len(expected)
        # Neither markup nor an escape sequence of the text does anything.
        assert repr(expected)[1:-1].strip().startswith(text.strip().removesuffix("…"))
        assert len(line) <= 60
    assert any("[bold]text[/] \\x1b[31m" in line and line.strip().endswith("…") for line in lines)


def test_more_examples_than_documents_are_all_documents(pristine, capsys):
    num_documents = pristine.split("validation").num_documents
    assert main(["inspect", str(pristine.folder), "--split", "validation", "--examples", "1000"]) == 0
    lines = capsys.readouterr().out.split("some documents of validation")[1].splitlines()[4:]
    assert [int(line.split()[0]) for line in lines if line.strip()] == list(range(num_documents))


def test_a_document_of_a_rich_script_is_shown_as_far_as_the_screen_goes(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("가" * 500 + "\n" + "나" * 10, encoding="utf-8")
    config = config_for(tmp_path, tmp_path / "text.txt", CHAR)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"validation": (str(tmp_path / "text.txt"),)})}
    )
    assert main(["inspect", str(prepare(config, quiet).folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("가" * 25 in line and line.strip().endswith("…") for line in lines)
    assert any(line.strip().endswith(" " + "나" * 10) for line in lines)


def test_tensorflow_is_loaded_only_if_it_is_needed(pristine):
    program = "import sys; from trainer.cli import main; print(main(), 'tensorflow' in sys.modules)"
    command = [sys.executable, "-c", program, "inspect", str(pristine.folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


# What may be inspected.


def test_a_run_shows_the_data_it_was_started_on(pristine, tmp_path, capsys):
    config = config_for(tmp_path, tmp_path, CHAR)
    run = RunFolder.create(config, pristine)
    assert main(["inspect", str(run.path)]) == 0
    assert pristine.fingerprint in capsys.readouterr().out
    # So does one of its checkpoints: its manifest.json is not taken for a damaged one of prepared data.
    checkpoint = run.path / "checkpoints" / "step_000000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"format": 1}')
    assert main(["inspect", str(checkpoint)]) == 0
    assert pristine.fingerprint in capsys.readouterr().out


def test_a_run_whose_data_is_gone_or_replaced_is_an_error(prepared, pristine, tmp_path, capsys):
    config = config_for(tmp_path, tmp_path, CHAR)
    run = RunFolder.create(config, pristine)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/text.txt").write_text("\n".join(LINES[:100]), encoding="utf-8")
    other = prepare(config_for(tmp_path / "other", tmp_path / "other/text.txt", CHAR), quiet)
    run.record(prepared_folder=str(other.folder), data_fingerprint="of another")
    assert main(["inspect", str(run.path)]) == 1
    assert capsys.readouterr().err == f"trainer: {other.folder} is not the data that {run.path} was started on.\n"
    shutil.rmtree(other.folder)
    assert main(["inspect", str(run.path)]) == 2
    assert f"{run.path} was started on the prepared data {other.folder}, which is gone." in capsys.readouterr().err


def test_data_in_a_store_is_verified_there(pristine, tmp_path, capsys, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = f"ram://{secrets.token_hex(4)}"
    prepared = prepare(config_for(store, Path(pristine.sources["train"][0]), CHAR), quiet)
    url = str(prepared.stored_in)
    assert main(["inspect", url]) == 0
    shown = capsys.readouterr().out
    assert (
        url in shown and prepared.fingerprint in shown and str(tmp_path) not in shown.replace(str(prepared.folder), "")
    )
    for name in ("tokenizer/settings.json", "train-00000.offsets"):
        with tf.io.gfile.GFile(f"{url}/{name}", "ab") as file:
            file.write(b"!")
    assert main(["inspect", url]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"trainer: {url} is damaged; delete it and prepare again:\n  train-00000.offsets has ")
    assert error.endswith("\n  tokenizer/settings.json was changed: its SHA-256 does not match\n")


def test_a_folder_that_is_not_prepared_data_is_refused_with_the_data_near_it(prepared, capsys):
    for path in (prepared.parent, prepared.parent / "nothing"):
        assert main(["inspect", str(path)]) == 2
        assert capsys.readouterr().err == (
            f"trainer: {path} is neither prepared data, which has a manifest.json, nor a run folder, which has a "
            f"run.json. Prepared data near it: {prepared}.\n"
        )


@pytest.mark.parametrize(
    ("option", "error"),
    [
        (["--examples", "-1"], "--examples -1 must be at least 0."),
        (["--sequence-length", "0"], "--sequence-length 0 must be at least 1."),
    ],
)
def test_impossible_numbers_are_refused(pristine, capsys, option, error):
    assert main(["inspect", str(pristine.folder), *option]) == 2
    assert capsys.readouterr().err == f"trainer: {error}\n"


# What is damaged.


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Changes a byte: one bit of it, or to any other."""
    place = rng.randrange(len(content))
    change = 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    return content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]


def test_200_of_200_random_flips_are_found_and_the_file_named(tmp_path, capsys):
    folder = prepared_lines(tmp_path, WORDPIECE).folder
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)) for path in files}
    assert {"manifest.json", "tokenizer/vocab.txt", "tokenizer/tokenizer.json", "train-00001.tokens"} <= names
    rng = random.Random(0)
    found: list[str] = []
    for _ in range(200):
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(flipped(content, rng))
        status = main(["inspect", str(folder), "--examples", "0"])
        path.write_bytes(content)
        error = capsys.readouterr().err
        named = [name for name in names if f"{name} " in error]
        if status == 1 and named == [str(path.relative_to(folder))]:
            found += named
    assert len(found) == 200
    assert set(found) == names
    assert main(["inspect", str(folder), "--examples", "0"]) == 0


def test_every_damaged_file_is_named_and_nothing_is_read_from_them(prepared, capsys):
    for name in ("train-00001.tokens", "validation-00000.offsets"):
        content = (prepared / name).read_bytes()
        (prepared / name).write_bytes(content[:-1])
    (prepared / "train-00000.tokens").unlink()
    assert main(["inspect", str(prepared)]) == 1
    captured = capsys.readouterr()
    assert "Verified" not in captured.out and "median" not in captured.out
    first, *faults = captured.err.splitlines()
    assert first == f"trainer: {prepared} is damaged; delete it and prepare again:"
    assert [fault.strip().split(" ")[:2] for fault in faults] == [
        ["train-00000.tokens", "is"],
        ["train-00001.tokens", "has"],
        ["validation-00000.offsets", "has"],
    ]


def test_a_missing_manifest_is_damage(prepared, capsys):
    (prepared / "manifest.json").unlink()
    assert main(["inspect", str(prepared)]) == 1
    assert f"{prepared}: manifest.json is missing; delete the folder and prepare again." in capsys.readouterr().err
