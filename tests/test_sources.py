"""Laws of sources: text is read, filtered and held out to the character."""

import gzip
from pathlib import Path

import pytest

from trainer.config.file import SHIPPED_CONFIGS, load_config
from trainer.config.settings import DataConfig
from trainer.errors import UserError
from trainer.text import files
from trainer.text.files import parts_of
from trainer.text.held_out import is_held_out
from trainer.text.sources import open_source

CHUNK = files._READ_BYTES


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, documents="line") -> list[str]:
    return ["".join(parts_of(document)) for document in files.read_documents(path, documents)]


def splits(**settings) -> dict[str, list[str]]:
    settings = {key: (value,) if isinstance(value, str | Path) else value for key, value in settings.items()}
    documents = settings.pop("documents", ("line",))[0]
    paths = {key: tuple(map(str, settings.pop(key))) for key in ("train", "validation") if key in settings}
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for split, document in open_source(DataConfig(documents=documents, **paths, **settings)).documents():
        found[split].append("".join(parts_of(document)))
    return found


def test_files_that_hold_the_same_text_are_named(tmp_path):
    for name, content in (("a", "x"), ("b", "y"), ("c", "x"), ("d", ""), ("e", ""), ("f", "x")):
        written(tmp_path / name, content)
    said = []
    (tmp_path / "link").symlink_to(tmp_path / "b")
    data = DataConfig(train=(f"{tmp_path}/[a-f]",), validation=(f"{tmp_path}/a", f"{tmp_path}/link"))
    source = open_source(data)
    assert source.fingerprint(said.append) == source.fingerprint()
    assert len(said) == 2
    assert said[1] == (f"warning: {tmp_path}/link of data.validation holds the same text as {tmp_path}/b of data.train")
    assert f"files that hold the same text are all used: {tmp_path}/c as {tmp_path}/a, and 1 more;" in said[0]


def test_lines_end_only_at_line_feeds(tmp_path):
    odd = "one\x0b\x0c\x1c\x85\u2028\u2029\rstill one"
    assert read(written(tmp_path / "a", f"{odd}\ntwo\r\n\n \t\n  three")) == [odd, "two", "  three"]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("ann\nbob\n" * 30, "line"),
        ("ann\nbob\n" * 30 + "\n\n", "line"),  # Blank lines at the end divide nothing.
        ("\n\n" + "ann\n" * 30, "line"),
        ("one line only", "line"),
        ("", "line"),
        ("a line\n" * 20 + "\n" + "a line\n" * 20, "line"),  # A section.
        (("a line\n" * 20 + " \n") * 20, "line"),  # 19 gaps for 400 lines.
        (("a line\n" * 19 + " \t\n") * 20 + "a\n", "paragraph"),  # 20 gaps for 381 lines.
        ("First:\r\nSpeak.\r\n\r\n\r\nAll:\r\nSpeak!\r\n", "paragraph"),
    ],
)
def test_auto_takes_paragraphs_if_blank_lines_divide_the_first_file(tmp_path, content, documents):
    first, second = written(tmp_path / "b.txt", content), written(tmp_path / "a.txt", "x\n\ny\n" * 99)
    auto, explicit = (
        open_source(DataConfig(train=(str(first), str(second)), documents=kind, held_out_fraction=0.3))
        for kind in ("auto", documents)
    )
    assert auto.data.documents == documents
    assert auto == explicit
    if documents == "paragraph":
        assert list(auto.documents()) == list(explicit.documents())


def test_auto_looks_at_the_text_files_and_names_the_one_that_decided(tmp_path):
    records = written(tmp_path / "a.jsonl", '{"text": "one"}\n' * 9)
    play = written(tmp_path / "play.txt", "one\ntwo\n\nthree\n")
    source = open_source(DataConfig(train=(str(records),), validation=(str(play),), documents="auto"))
    assert source.documents_found() == (
        f"data.documents='auto': a paragraph of a text file is a document, as {play} has blank lines"
    )
    assert [text for split, text in source.documents() if split == "validation"] == ["one\ntwo", "three"]


def test_auto_does_not_change_records(tmp_path):
    path = written(tmp_path / "a.jsonl", '{"text": "a\\n\\nb"}\n' * 9)
    assert splits(train=path, validation=path, documents="auto")["train"] == ["a\n\nb"] * 9


def test_paragraphs_end_at_blank_lines(tmp_path):
    path = written(tmp_path / "a", "\n\na\r\nb\n \r\nc\n\n\n\nd\n")
    assert read(path, "paragraph") == ["a\nb", "c", "d"]


def test_a_file_is_one_document_to_the_character(tmp_path):
    assert read(written(tmp_path / "a", "\ufeff\r\n a\n\nb \n"), "file") == ["\n a\n\nb \n"]


@pytest.mark.parametrize("length", [CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("end", ["한", "\r\n", "\r", "🙂\n"])
def test_chunks_of_reading_leave_no_trace(tmp_path, length, end):
    path = written(tmp_path / "a", "a" * length + end + "b")
    assert read(path, "file") == ["a" * length + end.replace("\r\n", "\n") + "b"]


def test_a_byte_order_mark_is_dropped_at_the_start_and_kept_inside(tmp_path):
    assert read(written(tmp_path / "a", "\ufeffa\n\ufeffb")) == ["a", "\ufeffb"]
    assert read(written(tmp_path / "b", "\ufeff")) == []


def test_each_file_of_a_glob_may_begin_with_a_byte_order_mark_and_end_its_lines_as_it_will(tmp_path):
    for name, content in (
        ("a.txt", "\ufeff가\n"),
        ("b.txt", "\ufeff나\r\n다"),
        ("c.txt", ""),
        ("d.txt.gz", "\ufeff라\rx"),
    ):
        packed = gzip.compress(content.encode()) if name.endswith(".gz") else content
        written(tmp_path / name, packed)
    assert splits(train=tmp_path / "*", validation=tmp_path / "a.txt")["train"] == ["가", "나", "다", "라\rx"]


def test_gzip_is_read_as_the_text_in_it(tmp_path):
    assert read(written(tmp_path / "a.gz", gzip.compress("가\n나".encode()))) == ["가", "나"]


def test_a_line_of_50_megabytes_is_a_document(tmp_path):
    line = "0123456789" * 5_000_000
    assert read(written(tmp_path / "a", f"a\n{line}\nb")) == ["a", line, "b"]


@pytest.mark.parametrize("start", [0, 5, CHUNK - 1, CHUNK, CHUNK + 1])
def test_what_is_not_utf8_is_an_error_with_path_offset_and_fix(tmp_path, start):
    path = written(tmp_path / "latin.txt", b"a" * start + b"\xe9t\xe9")
    with pytest.raises(UserError, match=rf"latin\.txt: not UTF-8 at byte offset {start}; .*\n.*iconv -f .*latin"):
        splits(train=path, validation=path)
    path = written(tmp_path / "cut.txt", b"a" * start + "한".encode()[:2])
    with pytest.raises(UserError, match=rf"cut\.txt: not UTF-8 at byte offset {start};"):
        splits(train=path, validation=path)


@pytest.mark.parametrize("start", [0, CHUNK - 1, CHUNK])
def test_a_nul_byte_is_an_error_with_its_offset(tmp_path, start):
    path = written(tmp_path / "a.bin", b"a" * start + b"\0b")
    with pytest.raises(UserError, match=rf"a\.bin: NUL byte at byte offset {start}; is it text\?"):
        splits(train=path, validation=path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: b"text" + data, lambda data: data[:200] + data]
)
def test_a_broken_gzip_is_an_error_naming_it(tmp_path, damage):
    data = gzip.compress("".join(chr(0xAC00 + i * i % 11172) for i in range(5000)).encode())
    with pytest.raises(UserError, match=r"a\.gz: a broken or cut-off gzip file"):
        read(written(tmp_path / "a.gz", damage(data)))


def test_a_file_that_cannot_be_opened_is_an_error_naming_it(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read: No such file"):
        read(tmp_path / "gone.txt")


# Filtering.


def test_min_bytes_counts_bytes_strictly_as_the_tutorial_does(tmp_path):
    path = written(tmp_path / "a", "aaaa\naaaaa\naaaaaa\n한\n한한\r\n")
    assert splits(train=path, validation=path, min_bytes=5)["train"] == ["aaaaaa", "한한"]
    assert splits(train=path, validation=path, min_bytes=2)["train"] == ["aaaa", "aaaaa", "aaaaaa", "한", "한한"]


@pytest.mark.parametrize(("documents", "count", "longest"), [("line", 3, 9), ("paragraph", 2, 10), ("file", 1, 22)])
def test_nothing_longer_than_min_bytes_is_an_error_with_the_numbers(tmp_path, documents, count, longest):
    path = written(tmp_path / "a", "한\n한한\n\n한한한\n")
    with pytest.raises(UserError) as error:
        splits(train=path, documents=documents, min_bytes=450)
    assert f"0 of {count} {documents}s are longer than data.min_bytes=450; the longest has {longest}. Lower" in str(
        error.value
    )


def test_an_empty_file_is_fine_among_others_but_not_as_the_only_one(tmp_path):
    empty, full = written(tmp_path / "empty", ""), written(tmp_path / "full", "a\nb")
    assert splits(train=[empty, full], validation=full) == {"train": ["a", "b"], "validation": ["a", "b"]}
    with pytest.raises(UserError, match=r"data\.train=\['.*empty'\]: only white space in it"):
        splits(train=empty, validation=full)
    with pytest.raises(UserError, match=r"data\.validation=\['.*blank'\]: only white space in it"):
        splits(train=full, validation=written(tmp_path / "blank", "\n \r\n\t"))


# Holding out.


def test_held_out_documents_are_that_share_and_depend_on_their_text_only(tmp_path):
    lines = [f"line {i}" for i in range(20_000)]
    path = written(tmp_path / "a", "\n".join([*lines, *reversed(lines)]))
    found = splits(train=path, held_out_fraction=0.05)
    held_out = set(found["validation"])
    assert len(held_out) == pytest.approx(1000, rel=0.1)
    assert not held_out & set(found["train"])
    assert len(found["validation"]) == 2 * len(held_out)
    assert [line for line in lines if is_held_out(line, 0.05)] == found["validation"][: len(held_out)]


def test_a_larger_fraction_holds_out_the_same_documents_and_more():
    lines = [f"line {i}" for i in range(2000)]
    small, large = ({line for line in lines if is_held_out(line, fraction)} for fraction in (0.1, 0.3))
    assert small < large


def test_the_end_of_each_file_is_held_out_if_a_document_is_a_file(tmp_path):
    for name, content in (("a", "가" * 90 + "b" * 10), ("c", "c" * 95 + "\n" * 4 + "d")):
        written(tmp_path / name, content)
    found = splits(train=[tmp_path / "a", tmp_path / "c"], documents="file", held_out_fraction=0.1)
    assert found == {"train": ["가" * 90, "c" * 90], "validation": ["b" * 10, "c" * 5 + "\n" * 4 + "d"]}


def test_tiny_shakespeare_is_split_as_nanogpt_splits_it(test_data):
    path = test_data / "tinyshakespeare.txt"
    found = splits(train=path, documents="file", held_out_fraction=0.1)
    content = path.read_text("utf-8")
    assert [len(found[split][0]) for split in found] == [1003854, 111540]
    assert found["train"][0] + found["validation"][0] == content


@pytest.mark.parametrize(
    ("fraction", "empty", "size"), [(1e-9, "validation", "larger"), (1 - 1e-9, "training", "smaller")]
)
def test_a_split_left_empty_is_an_error_with_the_ways_out(tmp_path, fraction, empty, size):
    path = written(tmp_path / "a", "one\ntwo")
    with pytest.raises(UserError) as error:
        splits(train=path, held_out_fraction=fraction)
    assert str(error.value) == (
        f"data.held_out_fraction={fraction} of 2 lines leaves nothing for {empty}; give more text, data.validation, "
        f"a {size} fraction or data.documents='file', which holds out the end of each file."
    )


@pytest.mark.parametrize(
    ("name", "content", "documents", "ways"),
    [
        ("a.txt", "one", "line", "data.documents='file', which holds out the end of each file."),
        ("a.txt", "one\n", "file", "a larger fraction."),
        ("a.jsonl", '{"text": "one"}', "line", "data.validation."),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}', "line", "a larger fraction."),
    ],
)
def test_the_advice_about_an_empty_split_can_be_followed(tmp_path, name, content, documents, ways):
    path = written(tmp_path / name, content)
    fraction = 1e-9 if documents == "line" else 0.01
    with pytest.raises(UserError, match="leaves nothing for validation; give more text") as error:
        splits(train=path, documents=documents, held_out_fraction=fraction)
    assert str(error.value).endswith(f" or {ways}")
    if "fraction" in ways:
        assert splits(train=path, documents=documents, held_out_fraction=0.5)["validation"]
    if "data.documents='file'" in ways:
        assert splits(train=path, documents="file", held_out_fraction=0.5)["validation"]


# Fingerprint.


def test_the_fingerprint_follows_content_and_order_but_not_names(tmp_path):
    a, b, c = written(tmp_path / "a", "x"), written(tmp_path / "b", "y"), written(tmp_path / "c", "x")

    def fingerprint(train, validation=None):
        return open_source(
            DataConfig(train=tuple(map(str, train)), validation=validation and tuple(map(str, validation)))
        ).fingerprint()

    assert fingerprint([a, b]) == fingerprint([c, b])
    different = [
        fingerprint([a, b]),
        fingerprint([b, a]),
        fingerprint([a]),
        fingerprint([a], [b]),
        fingerprint([b], [a]),
    ]
    different.append(fingerprint([written(tmp_path / "xy", "xy")]))
    assert len(set(different)) == len(different)


def test_the_storybook_s_fingerprint_follows_seed_and_count():
    recipes = [{}, {"storybook_seed": 1}, {"storybook_stories": 7}]
    fingerprints = [open_source(DataConfig(**recipe)).fingerprint() for recipe in recipes]
    assert len(set(fingerprints)) == 3
    assert fingerprints[0] == open_source(DataConfig()).fingerprint()


def test_the_storybook_is_a_source_of_stories():
    source = open_source(DataConfig(storybook_stories=200, held_out_fraction=0.1))
    found = list(source.documents())
    assert len(found) == 200
    assert 5 <= sum(split == "validation" for split, _ in found) <= 40
    assert source.names() == {"train": [], "validation": []}


@pytest.mark.parametrize("path", sorted(SHIPPED_CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_config_without_its_text_is_an_error_that_shows_how_to_give_one(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(path)
    if config.data.is_storybook():
        return
    with pytest.raises(UserError, match=r"data\.train=PATH") as error:
        open_source(config.data)
    if "get_file" in str(error.value) or "curl" in str(error.value):
        assert "https://" in str(error.value)
    # The advice is followed as printed, and so is the advice about the validation text next.
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("a text\n")
    given = ["data.train=texts/*.txt"]
    if config.data.validation is not None:
        with pytest.raises(UserError, match=r"data\.validation=") as error:
            open_source(load_config(path, given).data)
        given.append("data.validation=none")
    assert [file.name for file in open_source(load_config(path, given).data).train_inputs] == ["a.txt"]
