"""Laws of JSON Lines and long documents as sources of text."""

import gzip
import json
import secrets

import pytest

from trainer.config.settings import DataConfig
from trainer.errors import UserError
from trainer.system.storage import locate
from trainer.text import files, held_out, source
from trainer.text.files import parts_of, read_documents
from trainer.text.formats import is_json_lines
from trainer.text.sources import open_source


def records(path, *lines):
    content = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix.lower() == ".gz" else content.encode())
    return str(path)


def documents(say=None, **settings):
    """The documents of each split; there is a file of one line to validate on."""
    source = open_source(
        DataConfig(**{key: (value,) if key in ("train", "validation") else value for key, value in settings.items()})
    )
    found = {"train": [], "validation": []}
    for split, document in source.documents(say):
        found[split].append("".join(parts_of(document)))
    return found


# JSON Lines.


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "A.JSONL", "a.json", "a.json.gz", "a.jsonlines", "a.JsonL.Gz"]
)
def test_a_record_of_json_lines_is_a_document_whatever_its_lines(tmp_path, name):
    assert is_json_lines(tmp_path / name)
    path = records(
        tmp_path / name, {"text": "one\n\ntwo", "id": 1}, "\n", {"text": " "}, {"id": 2, "text": "한\u2028글"}
    )
    assert documents(train=path, validation=path)["train"] == ["one\n\ntwo", "한\u2028글"]
    for kind in ("paragraph", "file"):
        with pytest.raises(UserError, match=rf"data\.documents='{kind}' has no effect on records, each of which is a"):
            documents(train=path, validation=path, documents=kind)


def test_the_text_is_in_the_field_that_is_named(tmp_path):
    path = records(tmp_path / "a.jsonl", {"body": "b", "text": "t"})
    assert documents(train=path, validation=path, text_field="body")["train"] == ["b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"\n', r"line 2 is not JSON: .*; mend it, or set data\.max_broken_fraction"),
        (
            '{"by": "a", "body": "a b", "id": 1}\n',
            r"line 2 has no text in data\.text_field='text'; it has \['body', 'by', 'id'\]; if it is in another one, "
            r"name that, such as data\.text_field='body'",
        ),
        (
            '{"text": 7, "by": "a"}\n',
            r"line 2 has no text in data\.text_field='text'; it has \['by', 'text'\]; mend it",
        ),
        ('["a"]\n', r"line 2 has no text in data\.text_field='text'; it is a list"),
    ],
)
def test_a_broken_record_is_an_error_naming_its_line(tmp_path, line, message):
    path = records(tmp_path / "a.jsonl", {"text": "a"}, line)
    with pytest.raises(UserError, match=rf"a\.jsonl: {message}"):
        documents(train=path, validation=path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"text": "\\ud83d"}',
            r"line 4 has half of a character in data\.text_field='text': one of \\ud800 to \\udfff",
        ),
        (b'{"text": "\\ude00\\ud83d"}', r"line 4 has half of a character in data\.text_field='text'"),
        (b'{"text": "a\\u0000"}', r"line 4 has a NUL character in data\.text_field='text'"),
        (b'{"text": "a", "x": ' + b"[" * 100_000, r"line 4 is not JSON: "),
        (b'{"text": "a"', r"line 4 is not JSON: "),
    ],
)
def test_a_line_of_json_without_a_usable_text_is_named_by_the_number_that_an_editor_shows(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": " "}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl: {message}"):
        documents(train=str(path), validation=str(path))
    said = []
    found = documents(said.append, train=str(path), validation=str(path), max_broken_fraction=0.5)
    assert found["train"] == ["one", "two"]
    assert "a.jsonl: line 4 " in said[0]


def test_a_line_of_json_that_is_not_utf8_is_named_with_its_place_and_encoding(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "우리는 그 책을 읽고 있다. 아이가 집에서 나와 학교로 간다."
    path.write_bytes(b'{"text": "one"}\n' + f'{{"text": "{text}"}}\n'.encode("cp949"))
    with pytest.raises(UserError, match=r"a\.jsonl: not UTF-8 at byte offset 26; it looks like CP949 \(Korean\)"):
        documents(train=str(path), validation=str(path))
    said = []
    assert documents(said.append, train=str(path), validation=str(path), max_broken_fraction=0.5)["train"] == ["one"]
    assert "a.jsonl: line 2 is not UTF-8" in said[0]


def test_json_lines_take_marks_pairs_and_numbers_of_any_length(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['\ufeff{"text": "one"}', '\ufeff{"text": "\\ud83d\\ude00", "n": ' + "9" * 5000 + "}", '{"text": "two"}\r']
    path.write_text("\n".join(lines), "utf-8", newline="")
    assert documents(train=str(path), validation=str(path))["train"] == ["one", "😀", "two"]


@pytest.mark.parametrize("kind", ["text", "storybook"])
def test_a_field_without_json_lines_is_refused(tmp_path, kind):
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = {"text": str(path), "storybook": "storybook"}[kind]
    with pytest.raises(UserError, match=r"data\.text_field='body' has no effect, as no source is JSON Lines \(\.jsonl"):
        open_source(DataConfig(train=(source,), text_field="body"))
    with_json = records(tmp_path / "b.jsonl", {"body": "two"})
    if kind == "text":
        assert documents(train=str(path), validation=with_json, text_field="body")["validation"] == ["two"]


def test_a_field_of_one_source_of_a_mixture_has_an_effect(tmp_path):
    (tmp_path / "a.txt").write_text("one\n" * 3)
    data = {"train": (str(tmp_path / "a.txt"), records(tmp_path / "b.jsonl", {"body": "two"})), "weights": (1.0, 1.0)}
    open_source(DataConfig(**data, text_field="body"))
    with pytest.raises(UserError, match=r"data\.text_field='body' has no effect"):
        open_source(DataConfig(**data | {"train": (str(tmp_path / "a.txt"),) * 2}, text_field="body"))


# Broken records.


def test_broken_records_are_left_out_and_named_up_to_the_share_that_is_set(tmp_path):
    good = [{"text": f"t{i}"} for i in range(8)]
    path = records(tmp_path / "a.jsonl", *good[:5], "oops\n", *good[5:], '{"text": null}\n')
    (tmp_path / "b.txt").write_bytes(b"valid\nlatin \xe9\nnul \0\nlast")
    (tmp_path / "valid").write_text("v")
    said = []
    settings = {"train": (path, str(tmp_path / "b.txt")), "validation": (str(tmp_path / "valid"),)}
    source = open_source(DataConfig(**settings, max_broken_fraction=0.3))
    found = [document for split, document in source.documents(said.append) if split == "train"]
    assert found == [*(each["text"] for each in good), "valid", "last"]
    assert len(said) == 1
    assert said[0].startswith("4 broken records (26.67%) are left out: ")
    for name in (
        "a.jsonl: line 6 is not JSON",
        "a.jsonl: line 10 has no text",
        "b.txt: document 2",
        "b.txt: document 3",
    ):
        assert name in said[0]
    with pytest.raises(
        UserError, match=r"data\.max_broken_fraction=0\.2: 4 records, 26\.67% of all, are broken: .*a\.jsonl"
    ):
        list(open_source(DataConfig(**settings, max_broken_fraction=0.2)).documents())


# An object store.


def test_text_in_an_object_store_is_found_and_read(tmp_path):
    bucket = f"ram://{secrets.token_hex(4)}"
    records(tmp_path / "x.jsonl.gz", {"text": "packed"})
    for name, content in (
        ("b.txt", b"two\nthree"),
        ("a.txt", b"one"),
        ("x.jsonl.gz", (tmp_path / "x.jsonl.gz").read_bytes()),
    ):
        locate(f"{bucket}/text/{name}").write_bytes(content)
    found = documents(train=f"{bucket}/text/*.txt", validation=f"{bucket}/text/x.jsonl.gz")
    assert found == {"train": ["one", "two", "three"], "validation": ["packed"]}
    source = open_source(DataConfig(train=(f"{bucket}/text/a.txt",), validation=(f"{bucket}/text/x.jsonl.gz",)))
    (tmp_path / "a.txt").write_text("one")
    copy = DataConfig(train=(str(tmp_path / "a.txt"),), validation=(str(tmp_path / "x.jsonl.gz"),))
    assert source.fingerprint() == open_source(copy).fingerprint()
    list(source.documents())
    assert source.progress.done == source.progress.total == 3 + (tmp_path / "x.jsonl.gz").stat().st_size
    with pytest.raises(UserError, match=r"data\.train='ram://.*/none\*': no file matches"):
        open_source(DataConfig(train=(f"{bucket}/none*",)))


# Long documents.


@pytest.fixture
def short_is_10(monkeypatch):
    monkeypatch.setattr(files, "LONG_CHARS", 10)
    monkeypatch.setattr(source, "LONG_CHARS", 10)
    monkeypatch.setattr(held_out, "LONG_CHARS", 10)
    monkeypatch.setattr(files, "_READ_BYTES", 7)


@pytest.mark.parametrize("kind", ["line", "paragraph", "file"])
def test_a_long_document_comes_in_parts_and_whole(tmp_path, short_is_10, kind):
    content = (
        "short\n\nparagraph one, which is long\nand has a second line\n \nb\n"
        + "x" * 50
        + "\n\n"
        + " " * 30
        + "\nend\n"
    )
    path = tmp_path / "a.txt"
    path.write_text(content)
    found = []
    num_long = 0
    for document in read_documents(path, kind):
        num_long += not isinstance(document, str)
        found.append("".join(parts_of(document)))
    lines = content.split("\n")
    expected = {
        "line": [line for line in lines if line.strip()],
        "paragraph": ["short", "\n".join(lines[2:4]), "b\n" + "x" * 50, "end"],
        "file": [content],
    }
    assert found == expected[kind]
    assert num_long == {"line": 3, "paragraph": 2, "file": 1}[kind]


def test_the_unread_rest_of_a_long_document_is_skipped(tmp_path, short_is_10):
    path = tmp_path / "a.txt"
    path.write_text("a" * 100 + "\nnext\n" + "b" * 100)
    starts = [document if isinstance(document, str) else next(document) for document in read_documents(path, "line")]
    assert [start[:1] for start in starts] == ["a", "n", "b"]


def test_the_end_of_a_long_file_is_held_out_to_the_character(tmp_path, short_is_10):
    content = "".join(chr(0x61 + i % 26) for i in range(95)) + "한글한글한"
    (tmp_path / "a.txt").write_text(content)
    found = documents(train=str(tmp_path / "a.txt"), documents="file", held_out_fraction=0.1)
    assert found == {"train": [content[:90]], "validation": [content[90:]]}


def test_what_is_broken_late_in_a_long_document_is_an_error(tmp_path, short_is_10):
    (tmp_path / "a.txt").write_bytes(b"a" * 100 + b"\xff" + b"\nb\n")
    for share in (0.0, 0.5):
        with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte offset 100"):
            documents(train=str(tmp_path / "a.txt"), validation=str(tmp_path / "a.txt"), max_broken_fraction=share)
