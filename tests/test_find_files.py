"""Laws of finding files: names, globs and links give each file once, and an error names the setting and a way out."""

import os
import shlex
from pathlib import Path

import pytest
from serving import served, zip_like_simplebooks  # type: ignore[import-not-found]  # this folder is on the path

from trainer.config.file import load_config, make_config
from trainer.errors import UserError
from trainer.parser import parse
from trainer.text.downloads import download_of
from trainer.text.find_files import find_files


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_globs_are_sorted_reach_any_depth_and_keep_the_order_of_the_sources(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    names = ["b.txt", "a.txt", "deep/er/c.txt"]
    for name in names:
        written(tmp_path / name, name)
    assert find_files([f"{tmp_path}/*.txt"], "data.train") == [tmp_path / "a.txt", tmp_path / "b.txt"]
    found = find_files([f"{tmp_path}/b.txt", f"{tmp_path}/**/*.txt"], "data.train")
    assert found == [tmp_path / "b.txt", tmp_path / "a.txt", tmp_path / "deep/er/c.txt"]  # Each once.


def test_a_name_that_exists_is_not_a_glob(tmp_path):
    path = written(tmp_path / "book[1].txt", "a")
    written(tmp_path / "book1.txt", "b")
    assert find_files([str(path)], "data.train") == [path]


@pytest.mark.parametrize("end", [".txt", ".json", ".txt.gz", ".txt.zst", ".TXT", ""])
@pytest.mark.parametrize("below", [".", "deep/er"])
@pytest.mark.parametrize("name", ["data", "data[1]", "it's [a]*? set", "[x]"])
def test_a_directory_is_refused_with_a_glob_that_finds_its_files(tmp_path, monkeypatch, name, below, end):
    folder = tmp_path / name / below
    folder.mkdir(parents=True)
    paths = [written(folder / f"{stem}{end}", stem) for stem in "ab"]
    written(folder / ".hidden", "h")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r" is a directory; name its files, for example .*data\.train=") as error:
        find_files([name], "data.train")
    (word,) = shlex.split(str(error.value).partition("for example ")[2].removesuffix("."))
    config = make_config({"run_folder": "r", "train": {"precision": "float32", "total_steps": 1}}, [word])
    assert [path.resolve() for path in find_files(config.data.train, "data.train")] == paths


def test_only_the_end_of_a_pattern_below_a_folder_with_brackets_is_a_glob(tmp_path):
    (tmp_path / "data[1]").mkdir()
    path = written(tmp_path / "data[1]" / "a.txt", "a")
    (tmp_path / "data1").mkdir()
    written(tmp_path / "data1" / "a.txt", "b")
    assert find_files([f"{tmp_path}/data[1]/*.txt"], "data.train") == [path]
    assert find_files([f"{tmp_path}/data[0-9]/*.txt"], "data.train") == [tmp_path / "data1" / "a.txt"]


def test_links_give_each_file_once_and_loops_of_them_end(tmp_path):
    (tmp_path / "deep").mkdir()
    path, other = written(tmp_path / "a.txt", "a"), written(tmp_path / "deep" / "b.txt", "b")
    for i in range(6):
        (tmp_path / f"loop{i}").symlink_to(tmp_path)
        (tmp_path / "deep" / f"loop{i}").symlink_to(tmp_path / "deep")
    (tmp_path / "z.txt").symlink_to(path)
    assert find_files([f"{tmp_path}/**/*.txt", f"{tmp_path}/deep/../a.txt"], "data.train") == [path, other]
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "gone.text").symlink_to("nowhere")
    for name in ("self.txt", "gone.text", "*.text"):
        with pytest.raises(UserError, match=r"data\.train=.*: .*(self|gone)\.te?xt cannot be read: "):
            find_files([f"{tmp_path}/{name}"], "data.train")


def test_a_folder_that_is_linked_is_searched(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    written(tmp_path / "elsewhere" / "a.txt", "a")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert find_files([f"{tmp_path}/data/**/*.txt"], "data.train") == [tmp_path / "data/link/a.txt"]


def test_what_can_be_read_only_once_or_without_end_is_refused_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for name in (str(tmp_path / "pipe.txt"), f"{tmp_path}/*", "/dev/zero", "/dev/null"):
        with pytest.raises(
            UserError, match=r"data\.train=.* is a pipe, a device or a socket; text is read several times"
        ):
            find_files([name], "data.train")


@pytest.mark.parametrize("names", ["{0}/a.txt,{0}/b.txt", "[{0}/a.txt, {0}/b.txt"])
def test_several_names_in_one_are_an_error_that_shows_how_to_write_them(tmp_path, names):
    paths = [written(tmp_path / name, name) for name in ("a.txt", "b.txt")]
    with pytest.raises(UserError) as error:
        find_files([names.format(tmp_path)], "data.train")
    (word,) = shlex.split(str(error.value).partition("Name several files so: ")[2])
    config = make_config({"run_folder": "r", "train": {"precision": "float32", "total_steps": 1}}, [word])
    assert find_files(config.data.train, "data.train") == paths


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = written(tmp_path / "a.txt", "a")
    assert find_files(["~/a.txt"], "data.train") == [path]


@pytest.mark.parametrize("name", ["gone.txt", "*.text", "**/*.text"])
def test_a_source_without_a_file_is_an_error_naming_the_setting(tmp_path, name):
    with pytest.raises(
        UserError, match=r"data\.validation='.*': no (such file|file matches), seen from .*\. Check the path, or give"
    ):
        find_files([str(tmp_path / name)], "data.validation")


def test_a_directory_is_an_error_suggesting_a_glob(tmp_path):
    with pytest.raises(UserError, match=r"data\.train=.* is a directory; name files; there are none in it"):
        find_files([str(tmp_path)], "data.train")


def found_simplebooks() -> list[str]:
    data = load_config("minigpt").data
    names = [*data.train, *(data.validation or ())]
    return [path.read_text() for path in find_files(names, "data.train")]


@pytest.mark.parametrize("name", [None, "simplebooks.zip", "simplebooks", "books"])
def test_simplebooks_is_found_wherever_get_file_puts_it(tmp_path, monkeypatch, name):
    import keras

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".keras").mkdir()
    (tmp_path / "served").mkdir()
    zip_like_simplebooks(tmp_path / "served/simplebooks.zip")
    with served(tmp_path / "served") as address:
        keras.utils.get_file(name, f"{address}/simplebooks.zip", extract=True, cache_dir="~/.keras")
    assert found_simplebooks() == ["train of 92", "valid of 92"]


@pytest.mark.parametrize("folder", ["simplebooks", "simplebooks/simplebooks", "."])
def test_simplebooks_is_found_in_the_folders_of_older_versions(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".keras/datasets" / folder / "simplebooks-92-raw"
    path.mkdir(parents=True)
    for split in ("train", "valid"):
        written(path / f"{split}.txt", f"{split} of 92")
    assert found_simplebooks() == ["train of 92", "valid of 92"]


def test_a_missing_text_of_a_shipped_config_is_an_error_that_shows_how_to_fetch_it():
    for source, words in (
        ("~/.keras/datasets/no/**/simplebooks-92-raw/train.txt", "prepare minigpt --download"),
        ("no/tinyshakespeare.txt", "prepare shakespeare_char --download"),
    ):
        with pytest.raises(
            UserError, match=r"(?s)no such file, seen from .*or train on your own text: data.train=PATH"
        ) as error:
            find_files([source], "data.train")
        (command,) = [line[2:] for line in str(error.value).splitlines() if line.startswith("  ")]
        assert command == f"trainer {words}"
        options = parse(words.split())
        assert options.download and download_of(source) == download_of(load_config(options.config).data.train[0])
