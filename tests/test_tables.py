"""Laws of tables and data sets in folders as sources of text: Parquet, Arrow, and the folders of Hugging Face."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc

from trainer.commands.generate import read_prompts
from trainer.config.file import make_config
from trainer.config.settings import DataConfig
from trainer.errors import UserError
from trainer.text import tables
from trainer.text.arrow import arrow_file
from trainer.text.files import parts_of
from trainer.text.find_files import find_files
from trainer.text.sources import open_source, read_texts

TEXTS = ["one\n\ntwo", "한\u2028글", " ", "", *(f"document {i}" for i in range(20))]
DOCUMENTS = [text for text in TEXTS if text.strip()]
STRING = pa.string()
KINDS = ["a.parquet", "A.PARQUET", "stream.arrow", "file.arrow"]


def write_table(path: Path, columns: dict, rows_in_group: int = 5, kind=STRING) -> Path:
    """Writes a table in the format that the name of the file tells; columns named text get a type of text."""
    table = pa.table({name: pa.array(values, kind if name == "text" else None) for name, values in columns.items()})
    if path.name.lower().endswith(".parquet"):
        pq.write_table(table, path, row_group_size=rows_in_group)
        return path
    new = ipc.new_file if path.name == "file.arrow" else ipc.new_stream
    with path.open("wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_in_group)
    return path


def documents(*sources, say=None, validation=True, **settings):
    names = tuple(map(str, sources))
    settings |= {"validation": names} if validation else {}
    found = {"train": [], "validation": []}
    for split, document in open_source(DataConfig(train=names, **settings)).documents(say):
        found[split].append("".join(parts_of(document)))
    return found


def refusal(*sources, **settings) -> str:
    with pytest.raises(UserError) as error:
        documents(*sources, **settings)
    return str(error.value)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()], ids=str)
def test_a_row_of_a_table_is_a_document_whatever_the_type_of_its_text(tmp_path, name, kind):
    path = write_table(tmp_path / name, {"id": list(range(len(TEXTS))), "text": TEXTS}, kind=kind)
    assert documents(path)["train"] == DOCUMENTS
    with pytest.raises(UserError, match=r"data\.documents='file' has no effect on records"):
        documents(path, documents="file")


def test_a_dictionary_of_texts_is_read_and_the_column_is_the_one_that_is_named(tmp_path):
    table = pa.table({"text": ["x", "y"], "body": pa.array(["b", "a"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    with (tmp_path / "a.arrow").open("wb") as file, ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        assert documents(tmp_path / name, text_field="body")["train"] == ["b", "a"]


@pytest.mark.parametrize("name", KINDS)
def test_rows_keep_their_order_whatever_the_row_groups_and_the_batches(tmp_path, name, monkeypatch):
    texts = [f"row {i} " + "x" * (i % 7) for i in range(100)]
    expected = None
    for group, batch_bytes, batch_rows in itertools.product((1, 7, 100), (1, 50, 1 << 20), (1, 3, 4096)):
        monkeypatch.setattr(tables, "_BATCH_BYTES", batch_bytes)
        monkeypatch.setattr(tables, "_MAX_BATCH_ROWS", batch_rows)
        found = documents(write_table(tmp_path / name, {"text": texts}, group), validation=False, held_out_fraction=0.2)
        assert sorted(found["train"] + found["validation"]) == sorted(texts)
        # A document is held out by its hash, so each split is in order and the same for all.
        assert found == (expected := expected or found)
        assert [text for text in texts if text in set(found["train"])] == found["train"]


@pytest.mark.parametrize("name", KINDS)
def test_a_row_without_a_text_is_left_out_or_named(tmp_path, name):
    values = [b"one", None, b"\xff\xfe", b"a\0b", b"two"]
    path = write_table(tmp_path / name, {"text": values}, kind=pa.binary())
    assert f"{path}: row 2 has no text in data.text_field='text': it is null; mend it, or set" in refusal(path)
    said = []
    assert documents(path, say=said.append, max_broken_fraction=0.7)["train"] == ["one", "two"]
    assert "row 3 is not UTF-8 in data.text_field='text'" in said[0]
    assert "row 4 has a NUL character in data.text_field='text'" in said[0]


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_column_and_one_of_another_type_are_refused_with_the_columns_there_are(tmp_path, name):
    path = write_table(tmp_path / name, {"id": [1], "body": ["b"], "score": [0.5]})
    there = (
        r"there are id \(int64\), body \(string\), score \(double\): name a column of text, such as data\.text_field="
    )
    assert re.fullmatch(rf"{path}: no column data\.text_field='text'; {there}'body'\.", refusal(path))
    message = refusal(path, text_field="id")
    assert re.fullmatch(rf"{path}: data\.text_field='id' is a column of int64; {there}'body'\.", message)
    with pytest.raises(UserError, match=r"no column --text-field='text'; .*, such as --text-field='body'\."):
        list(read_texts([path], "--data", "file", "text", "--text-field"))
    write_table(path, {"id": [1]})
    assert refusal(path).endswith("there are id (int64): none of them is a text.")
    assert refusal(write_table(path, {"text": []}), text_field="text").endswith(
        "only white space in it; give files with text."
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_table_is_named(tmp_path, name):
    path = write_table(tmp_path / name, {"text": TEXTS})
    whole = path.read_bytes()
    kind = "Parquet" if "parquet" in name.lower() else "Arrow"
    for part in (whole[: len(whole) // 2], b"", b"text\n", b"\0" * 500):
        path.write_bytes(part)
        assert refusal(path).startswith(f"{path}: a broken or cut-off {kind} file (")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7\n")
    assert (
        refusal(path)
        == f"{path}: a pointer of Git LFS, not the file itself; run git lfs pull in the folder that was cloned."
    )


def test_a_page_whose_checksum_is_wrong_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["the same words again"] * 50})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"same words", b"sane words", 3))
    assert "broken or cut-off Parquet file" in refusal(path)


def test_tables_in_a_store_are_read_as_on_a_disk(tmp_path):
    import tensorflow as tf

    for name in KINDS:
        path = write_table(tmp_path / name, {"text": TEXTS})
        with tf.io.gfile.GFile(f"ram://tables/{name}", "wb") as file:
            file.write(path.read_bytes())
        assert documents(f"ram://tables/{name}")["train"] == DOCUMENTS
    assert [path.name for path in find_files(["ram://tables/*.arrow"], "data.train")] == ["file.arrow", "stream.arrow"]


def test_a_prompt_may_be_in_a_column(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"prompt": ["one", "two\nlines"]})
    assert read_prompts(str(path)) == ["one", "two\nlines"]
    write_table(path, {"text": ["one"]})
    with pytest.raises(UserError, match=r"no column \"prompt\"; there are text \(string\)"):
        read_prompts(str(path))


def test_of_an_arrow_file_only_the_column_of_text_is_read(tmp_path, monkeypatch):
    class Counting:
        def __init__(self, file):
            self.file, self.seek, self.tell = file, file.seek, file.tell

        def read(self, size=-1):
            part = self.file.read(size)
            read.append(len(part))
            return part

    read = []
    monkeypatch.setattr(tables, "arrow_file", lambda file: arrow_file(Counting(file)))
    columns = {"before": ["x" * 1000] * 1000, "text": ["one", "two"] * 500, "after": ["y" * 1000] * 1000}
    path = write_table(tmp_path / "file.arrow", columns, rows_in_group=100)
    assert list(tables.read_table(path, "text")) == columns["text"]
    assert sum(read) < path.stat().st_size / 20


# Folders of Hugging Face.


def saved_by_datasets(folder: Path, *parts: list[str]) -> Path:
    """Writes what Dataset.save_to_disk of the library datasets 4.8 writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        write_table(folder / name, {"text": texts})
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "d41d8cd98f00b204",
        "_format_columns": None,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string", "_type": "Value"}}}')
    return folder


def test_a_folder_of_save_to_disk_is_its_files_in_order(tmp_path):
    folder = saved_by_datasets(tmp_path / "set", ["b", "a"], ["c"])
    assert documents(folder)["train"] == ["b", "a", "c"]
    (folder / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow is missing, which its state.json names" in refusal(folder)
    for broken in (
        "{",
        "[]",
        '{"_data_files": [{"filename": "../a"}]}',
        '{"_data_files": []}',
        '{"_data_files": 1}',
        '{"_data_files": {"0": "a"}}',
    ):
        (folder / "state.json").write_text(broken)
        assert "state.json: not as the library datasets writes it (" in refusal(folder)


def test_a_selection_of_rows_that_an_old_datasets_saved_is_refused_with_what_to_do(tmp_path):
    folder = saved_by_datasets(tmp_path / "set", ["a"])
    state = json.loads((folder / "state.json").read_text())
    for key in ("_indices_data_files", "_indices_files"):
        (folder / "state.json").write_text(json.dumps(state | {key: [{"filename": "indices.arrow"}]}))
        assert refusal(folder).startswith(f"{folder}: a selection of rows, saved by an old version of datasets; save ")


def test_files_without_a_pattern_of_their_own_are_named_one_by_one(tmp_path):
    for name in ("a-train.jsonl", "b-train.jsonl", "c-test.jsonl"):  # *.jsonl would match all.
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="name those of one: ") as error:
        find_files([str(tmp_path)], "data.train")
    found = [[path.name for path in find_files(each, "data.train")] for each in named_in(str(error.value))]
    assert sorted(found) == [["a-train.jsonl", "b-train.jsonl"], ["c-test.jsonl"]]


def named_in(message: str) -> list[tuple[str, ...]]:
    """Returns the data.train of each setting in a message, as a shell and trainer read it."""
    words = shlex.split(message.partition("of one: ")[2].removesuffix(".").replace(", or ", " "))
    settings = {"run_folder": "r", "train": {"precision": "float32", "total_steps": 1}}
    return [make_config(settings, [word]).data.train for word in words]


def test_a_folder_of_a_dictionary_names_its_splits(tmp_path):
    for split in ("train", "test"):
        saved_by_datasets(tmp_path / "set" / split, [split])
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    message = refusal(tmp_path / "set")
    assert "has the splits train, test; name one: " in message
    assert documents(message.split("data.train=")[2].rstrip("."))["train"] == ["train"]


@pytest.mark.parametrize("end", [".parquet", ".jsonl", ".jsonl.zst", ".json.gz"])
def test_a_clone_from_the_hub_is_its_files_if_they_are_of_one_split(tmp_path, end, monkeypatch):
    folder = tmp_path / "clone [1]"
    for name in ("README.md", ".gitattributes", "dataset_infos.json", ".git/a.parquet", "data/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not data")
    for i in range(2):
        (folder / f"data/train-{i:05}-of-00002{end}").write_text("")
    found = find_files([str(folder)], "data.train")
    assert [path.name for path in found] == [f"train-{i:05}-of-00002{end}" for i in range(2)]
    assert find_files([str(folder / "data")], "data.train") == found
    other = folder / f"data/test-00000-of-00001{end}"
    other.write_text("")
    with pytest.raises(UserError, match=r"has files of 2 splits or kinds; name those of one: ") as error:
        find_files([str(folder)], "data.train")
    assert [find_files(names, "data.train") for names in named_in(str(error.value))] == [[other], found]
    monkeypatch.chdir(tmp_path)
    (folder / "more").mkdir()
    (folder / "more/part.parquet").write_text("")
    with pytest.raises(UserError, match="3 splits or kinds"):
        find_files(["clone [1]"], "data.train")
