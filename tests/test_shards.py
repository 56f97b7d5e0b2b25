"""Laws of prepared data on disk: a file that is not what was written is found and named."""

import dataclasses
import errno
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.data.shards import (
    PreparedData,
    faults_of_files,
    load_prepared,
    read_manifest,
    token_dtype,
)
from trainer.errors import UserError
from trainer.tokenizers.characters import CharTokenizer


def prepared_lines(folder: Path, name: str = "text.txt") -> PreparedData:
    """500 lines of a file in a folder, prepared there."""
    (folder / name).write_text("\n".join(f"line {i}" + " of text" * (i % 7) for i in range(500)))
    data = {"train": str(folder / name), "held_out_fraction": 0.1}
    return tiny_prepared(tiny_config(folder, data=data, tokenizer={"kind": "char"}))


@pytest.mark.parametrize(("size", "dtype"), [(65535, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_a_token_takes_two_bytes_as_long_as_it_fits(size, dtype):
    assert token_dtype(size) == dtype
    assert size - 1 <= np.iinfo(dtype).max


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> PreparedData:
    return prepared_lines(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def prepared(pristine, tmp_path) -> PreparedData:
    """A copy to damage."""
    return dataclasses.replace(pristine, folder=Path(shutil.copytree(pristine.folder, tmp_path / "prepared")))


def test_what_was_prepared_is_loaded(pristine):
    assert load_prepared(pristine.folder) == load_prepared(str(pristine.folder), check_hashes=False) == pristine


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"has \d+ bytes instead of \d+"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"a"), r"has \d+ bytes instead of \d+"),
    "changed": (changed, "was changed: its SHA-256 does not match"),
}


@pytest.mark.parametrize(
    "name", ["train-00000.tokens", "train-00000.offsets", "validation-00000.tokens", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_an_error_naming_file_and_fix(prepared, name, fault):
    damage, message = FAULTS[fault]
    damage(prepared.folder / name)
    if name.startswith("tokenizer/") and fault != "missing":  # The manifest does not say how long those are.
        message = FAULTS["changed"][1]
    with pytest.raises(UserError, match=rf"{prepared.folder}: {name} {message}; delete the folder and prepare again\."):
        load_prepared(prepared.folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: None, "manifest.json is missing"),
        (lambda text: text[:-10], "manifest.json is damaged"),
        (lambda text: "[1]", "manifest.json is damaged"),
        (lambda text: "[" * 100_000, "manifest.json is damaged"),
        (lambda text: '[["a", 1], [2, 3]]', "manifest.json is damaged"),
        (lambda text: "{}", "manifest.json is not of version 2 of the format"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 1'), "manifest.json is not of version 2"),
        (
            lambda text: text.replace('"num_unknown": 0', '"num_unknown": 1'),
            "manifest.json is damaged: its SHA",
        ),
        (lambda text: text.replace('"bos_id": 2,', ""), "manifest.json is damaged: its SHA"),
        # What the fingerprint leaves out, and what JSON does not see.
        (lambda text: text.replace("text.txt", "test.txt"), "manifest.json is damaged: its SHA"),
        (lambda text: text.replace('": 2,', '":\t2,'), "manifest.json is damaged: its SHA"),
        (lambda text: text.removesuffix("\n"), "manifest.json is damaged: its SHA"),
    ],
)
def test_a_damaged_manifest_is_an_error_naming_it(prepared, damage, message):
    path = prepared.folder / "manifest.json"
    text = damage(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=rf"{prepared.folder}: {message}.*; delete the folder and prepare again\."):
        load_prepared(prepared.folder)


def test_a_change_of_any_byte_of_the_manifest_is_found(tmp_path):
    # A letter that JSON writes as an escape, whose case does not matter to JSON.
    folder = prepared_lines(tmp_path, "ö.txt").folder
    content = (folder / "manifest.json").read_bytes()
    assert b"\\u00f6.txt" in content
    rng = random.Random(0)
    # In place: a disk is slow to take a file that is written anew.
    with (folder / "manifest.json").open("r+b", buffering=0) as file:
        for place, byte in enumerate(content):
            for change in (1 << place % 8, 0x20, rng.randrange(1, 256)):
                os.pwrite(file.fileno(), bytes([byte ^ change]), place)
                with pytest.raises(UserError, match=r"manifest\.json is (damaged|not of version)"):
                    read_manifest(folder)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert read_manifest(folder)["format_version"]


def test_a_file_that_its_disk_cannot_read_is_an_error_naming_it(prepared, monkeypatch):
    def fail(file, algorithm):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)
    with pytest.raises(UserError, match=r": train-00000.tokens cannot be read: Input/output error; delete the folder"):
        load_prepared(prepared.folder)


def test_every_damaged_file_is_found(prepared):
    for name in ("train-00000.offsets", "validation-00000.tokens", "tokenizer/settings.json"):
        changed(prepared.folder / name)
    (prepared.folder / "tokenizer/tokenizer.json").unlink()
    assert list(faults_of_files(prepared)) == [
        "train-00000.offsets was changed: its SHA-256 does not match",
        "validation-00000.tokens was changed: its SHA-256 does not match",
        "tokenizer/settings.json was changed: its SHA-256 does not match",
        "tokenizer/tokenizer.json is missing",
    ]
    assert list(faults_of_files(prepared, check_hashes=False)) == ["tokenizer/tokenizer.json is missing"]


def test_another_tokenizer_is_refused(prepared):
    CharTokenizer(["[PAD]", "[UNK]", "[BOS]", "a"]).save(prepared.folder / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer/settings.json was changed: its SHA-256 does not match; delete"):
        load_prepared(prepared.folder)
    with pytest.raises(
        UserError, match=r"tokenizer/ is not the tokenizer the text was prepared with; delete the folder"
    ):
        prepared.tokenizer()
