"""Laws of `trainer prepare --download`: a text is fetched whole and checked, or nothing is left."""

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from serving import served, zip_like_simplebooks  # type: ignore[import-not-found]  # this folder is on the path

from trainer import verbs
from trainer.cli import main
from trainer.config.file import load_config
from trainer.config.settings import DataConfig
from trainer.errors import UserError
from trainer.text import downloads
from trainer.text.downloads import KNOWN, fetch, fetch_texts
from trainer.text.find_files import find_files

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 500


@pytest.fixture
def address(tmp_path, monkeypatch):
    """The address of a server with small texts in place of the known ones; HOME and the working folder are empty."""
    folder = tmp_path / "served"
    folder.mkdir()
    archive = zip_like_simplebooks(folder / "simplebooks.zip")
    (folder / "input.txt").write_bytes(PLAY)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    with served(folder) as url:
        books = KNOWN[0]._replace(url=f"{url}/simplebooks.zip", num_bytes=archive.stat().st_size)
        play = {"url": f"{url}/input.txt", "num_bytes": len(PLAY), "sha256": hashlib.sha256(PLAY).hexdigest()}
        monkeypatch.setattr(downloads, "KNOWN", (books, KNOWN[1]._replace(**play)))
        yield url


def files_in(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "keras.json")
    return sorted(str(path.relative_to(folder)) for path in paths)


def test_the_verb_fetches_what_its_config_is_for_and_finds_it_there_the_next_time(
    address, tmp_path, monkeypatch, capsys
):
    prepared = []
    monkeypatch.setattr(verbs, "prepare_text", lambda config, say: prepared.append(config.data))
    for name in ("minigpt", "shakespeare_char"):
        data = load_config(name).data
        for _ in range(2):
            assert main(["prepare", name, "--download"]) == 0
            texts = [path.read_bytes() for path in find_files([*data.train, *(data.validation or ())], "data.train")]
            assert texts == [PLAY] if name == "shakespeare_char" else [b"train of 92", b"valid of 92"]
    out = capsys.readouterr().out
    assert len(prepared) == 4 and out.count("SimpleBooks: fetching 0.0 MB from http://127.0.0.1:") == 1
    assert out.count("SimpleBooks is already there") == out.count("tiny Shakespeare is already there") == 1
    folder = ".keras/datasets/simplebooks/simplebooks-92-raw"
    assert files_in(tmp_path / "home") == [f"{folder}/train.txt", f"{folder}/valid.txt", "tinyshakespeare.txt"]


def test_a_text_is_put_where_its_config_names_it(address, tmp_path):
    fetch_texts(DataConfig(train=("texts/tinyshakespeare.txt",)), lambda line: None)
    assert files_in(tmp_path / "home") == ["texts/tinyshakespeare.txt"]


@pytest.mark.parametrize("train", ["storybook", "mine.txt", "gs://bucket/tinyshakespeare.txt", "tfds:lm1b:train"])
def test_a_text_that_is_not_known_is_refused_with_those_that_are(train):
    with pytest.raises(
        UserError, match=r"--download: data\.train=.* names no text that .*minigpt \(SimpleBooks\), shakes"
    ):
        fetch_texts(DataConfig(train=(train,)), lambda line: None)


def refusal(tmp_path: Path, number: int = 0) -> str:
    """Returns the error of a download that leaves nothing behind."""
    with pytest.raises(UserError) as error:
        fetch(downloads.KNOWN[number], lambda line: None)
    assert files_in(tmp_path / "home") == []
    return str(error.value)


def test_what_is_not_what_it_should_be_is_refused_and_leaves_nothing(address, tmp_path):
    archive = tmp_path / "served/simplebooks.zip"
    whole = archive.read_bytes()
    place = whole.index(b"92-raw/train.txt") + len(b"92-raw/train.txt")
    archive.write_bytes(whole[:-9])
    assert f"{len(whole) - 9} bytes came from {address}/simplebooks.zip, and not {len(whole)}" in refusal(tmp_path)
    for damaged in (
        whole.replace(b"PK\1\2", b"PK\1\3"),
        whole[:place] + b"\0\0\0" + whole[place + 3 :],
        bytes(len(whole)),
    ):
        archive.write_bytes(damaged)
        assert "SimpleBooks could not be fetched: " in refusal(tmp_path)
    archive.write_bytes(whole.replace(b"simplebooks-92-raw", b"simplebooks-93-raw"))
    assert "has not the files of simplebooks/simplebooks-92-raw/" in refusal(tmp_path)
    (tmp_path / "served/input.txt").write_bytes(PLAY.replace(b"hear", b"fear"))
    assert "has another SHA-256 than it should have" in refusal(tmp_path, 1)
    (tmp_path / "served/input.txt").unlink()
    assert "tiny Shakespeare could not be fetched: HTTP Error 404" in refusal(tmp_path, 1)


def test_without_a_network_the_error_has_the_commands_that_do_it_by_hand(address, tmp_path, monkeypatch):
    right = downloads.KNOWN
    # Port 9 of this machine, and a name that no server has.
    for url, reason in (("http://127.0.0.1:9/", "Connection refused"), ("http://no.invalid/", "[Nn]ame")):
        monkeypatch.setattr(
            downloads, "KNOWN", [each._replace(url=url + each.url.rpartition("/")[2]) for each in right]
        )
        for number, each in enumerate(right):
            message = refusal(tmp_path, number)
            assert message.startswith(f"{each.name} could not be fetched: ") and reason.strip("[Nn]") in message
    commands = [line for line in refusal(tmp_path).splitlines() if line.startswith("  ")]
    program = "\n".join(commands).replace("http://no.invalid", address)
    subprocess.run(["bash", "-ec", program], check=True, capture_output=True)
    (tmp_path / "home/simplebooks.zip").unlink()
    data = load_config("minigpt").data
    found = find_files([*data.train, *(data.validation or ())], "data.train")
    assert [path.read_text() for path in found] == ["train of 92", "valid of 92"]


def test_the_command_that_fetches_a_single_file_makes_its_folder_in_the_home(address, tmp_path):
    play = downloads.KNOWN[1]._replace(place="~/it's new/tinyshakespeare.txt")
    subprocess.run(["bash", "-ec", downloads.by_hand(play)], check=True, capture_output=True)
    assert (tmp_path / "home/it's new/tinyshakespeare.txt").read_bytes() == PLAY


def test_a_part_of_a_text_is_not_replaced(address, tmp_path):
    (tmp_path / "home/.keras/datasets/simplebooks/simplebooks-92-raw").mkdir(parents=True)
    with pytest.raises(UserError, match=r"simplebooks-92-raw is there, but not all of SimpleBooks; delete it, and"):
        fetch_texts(load_config("minigpt").data, lambda line: None)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_is_stopped_leaves_no_half_of_a_text_and_the_next_one_is_whole(address, tmp_path, how):
    class Half(http.server.BaseHTTPRequestHandler):
        """Sends the first half of the archive, and nothing more until the client has gone."""

        def do_GET(self) -> None:
            whole = (tmp_path / "served/simplebooks.zip").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 2])
            is_over.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    is_over = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Half) as server:
        threading.Thread(target=server.serve_forever).start()
        program = (
            "from trainer.text import downloads\n"
            f"known = downloads.KNOWN[0]._replace(url='http://127.0.0.1:{server.server_address[1]}/simplebooks.zip')\n"
            "downloads._READ_BYTES = 10\ndownloads.fetch(known, print)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, env={**os.environ})
        home = tmp_path / "home"
        deadline = time.monotonic() + 60
        while not any(path.endswith(".zip") for path in files_in(home)) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(how)
        process.communicate()
        is_over.set()
        server.shutdown()
    data = load_config("minigpt").data
    with pytest.raises(UserError, match="no such file"):
        find_files(data.train, "data.train")
    assert len(files_in(home)) == (how == signal.SIGKILL)
    fetch_texts(data, lambda line: None)
    assert [path.read_text() for path in find_files(data.train, "data.train")] == ["train of 92"]
    assert len(files_in(home)) == 2
