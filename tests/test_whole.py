import errno
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest

from trainer.system import storage, whole
from trainer.system.storage import Location, Url, locate
from trainer.system.whole import copy_whole_folder, rename_unless_there, write_whole, write_whole_folder

CONTENT = {"weights": b"\0\1" * 100, "manifest.json": b"{}"}
FILES = {"weights": [b"\0\1" * 60, b"", b"\0\1" * 40], "manifest.json": [b"{}"]}


@pytest.fixture(params=["disk", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return tmp_path if request.param == "disk" else locate(f"ram://{uuid.uuid4().hex[:8]}")


def content(folder: Location) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_and_a_folder_replace_existing_ones(place: Location):
    for each in ("one", "two"):
        write_whole_folder(place / "folders" / "step", {"weights": [each.encode()], "manifest.json": [b"{}"]})
        write_whole(place / "folders" / "step" / "note.txt", each)
    assert content(place / "folders" / "step") == {"weights": b"two", "manifest.json": b"{}", "note.txt": b"two"}
    write_whole_folder(place / "folders" / "step", FILES)
    assert content(place / "folders" / "step") == CONTENT
    assert [path.name for path in (place / "folders").iterdir()] == ["step"]


@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_an_error_leaves_what_was_there_and_nothing_half_written(
    failing_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_whole_folder(tmp_path / "step", FILES)
    (tmp_path / "note.txt").write_text("old")
    calls: list[int] = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) >= failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole_folder(tmp_path / "step", {name: [b"new"] for name in FILES})
    assert content(tmp_path / "step") == CONTENT and not (tmp_path / ".partial").exists()
    if failing_call == 1:
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            write_whole(tmp_path / "note.txt", "new")
        assert (tmp_path / "note.txt").read_text() == "old"


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "rubbish").write_bytes(b"x")
    write_whole_folder(tmp_path / "step", FILES)
    assert content(tmp_path / "step") == CONTENT and not (tmp_path / ".partial").exists()


def test_in_a_store_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Url(f"ram://{uuid.uuid4().hex[:8]}")
    order: list[str] = []
    write, copy = Url.write_parts, storage.copy_file

    def note_write(url: Url, parts: Iterable[bytes]) -> int:
        order.append(url.name)
        return write(url, parts)

    def note_copy(source: Location, target: Location) -> None:
        order.append(target.name)
        copy(source, target)

    monkeypatch.setattr(Url, "write_parts", note_write)
    monkeypatch.setattr(storage, "copy_file", note_copy)
    monkeypatch.setattr(whole, "copy_file", note_copy)
    write_whole_folder(store / "step", FILES)
    assert order == list(FILES)
    order.clear()
    source = tmp_path / "source"
    write_whole_folder(source, {"a.json": [b"a"], "manifest.json": [b"{}"], "z.tokens": [b"z"]})
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.txt").write_text("v")
    copy_whole_folder(source, store / "copy", "manifest.json")
    assert sorted(order) == ["a.json", "manifest.json", "vocab.txt", "z.tokens"] and order[-1] == "manifest.json"
    assert (store / "copy" / "tokenizer" / "vocab.txt").read_bytes() == b"v"


def test_of_two_processes_the_first_one_gives_the_folder_its_name(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "by").write_text(name)
    assert rename_unless_there(tmp_path / "one", tmp_path / "folder")
    assert not rename_unless_there(tmp_path / "two", tmp_path / "folder")
    assert (tmp_path / "folder" / "by").read_text() == "one"
    with pytest.raises(FileNotFoundError):
        rename_unless_there(tmp_path / "nothing", tmp_path / "other")
