"""Laws of files that are not text in UTF-8: each is refused for what it is, and the command in the message mends it."""

import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trainer.config.settings import DataConfig
from trainer.errors import UserError
from trainer.text.files import parts_of
from trainer.text.formats import _COMMON, encoding_of
from trainer.text.sources import open_source

TEXTS = {
    "Korean": "우리는 그 책을 읽고 있다.\n아이가 집에서 나와 학교로 간다.\n하지만 비가 오는 날에는 가지 않는다.\n",
    "Japanese": "わたしはその本を読んでいる。\n子どもは家を出て学校へ行く。\nしかし雨の日には行かない。\n",
    "Chinese": "我在看这本书，他也在看。\n孩子们从家里出来到学校去。\n可是下雨的时候就不去了。\n",
    "Chinese (old)": "我在看這本書，他也在看。\n孩子們從家裡出來到學校去。\n可是下雨的時候就不去了。\n",
    "Russian": "Мы читаем эту книгу.\nРебёнок выходит из дома и идёт в школу.\nНо когда идёт дождь, он не идёт.\n",
    "Greek": "Διαβάζουμε αυτό το βιβλίο.\nΤο παιδί βγαίνει από το σπίτι και πηγαίνει στο σχολείο.\n",
    "French": "Nous lisons ce livre à l'école.\nL'élève est allé chez lui où il fait très chaud.\n",
    "French (quoted)": "Nous lisons \u201cce livre\u201d \u2014 à l\u2019école.\nL\u2019élève est allé chez lui.\n",
    "English": "We read the book.\nThe child goes to school.\n",
}
ENCODINGS = [
    ("Korean", "cp949", "CP949"),
    ("Korean", "euc_kr", "CP949"),
    ("Korean", "utf-16", "UTF-16"),
    ("Korean", "utf-16-le", "UTF-16LE"),
    ("Korean", "utf-16-be", "UTF-16BE"),
    ("Korean", "utf-32", "UTF-32"),
    ("Korean", "utf-32-be", "UTF-32BE"),
    ("Japanese", "cp932", "CP932"),
    ("Japanese", "euc_jp", "EUC-JP"),
    ("Japanese", "utf-16-le", "UTF-16LE"),
    ("Chinese", "gb18030", "GB18030"),
    ("Chinese (old)", "big5", "BIG5"),
    ("Russian", "cp1251", "CP1251"),
    ("Russian", "koi8_r", "KOI8-R"),
    ("Greek", "cp1253", "CP1253"),
    ("French", "latin-1", "LATIN1"),
    ("French (quoted)", "cp1252", "CP1252"),
    ("English", "utf-16", "UTF-16"),
    ("English", "utf-16-le", "UTF-16LE"),
]


def train_documents(*sources: str | Path, **settings) -> list[str]:
    source = open_source(DataConfig(train=tuple(map(str, sources)), validation=tuple(map(str, sources)), **settings))
    return ["".join(parts_of(document)) for split, document in source.documents() if split == "train"]


def refusal(*sources: str | Path, **settings) -> str:
    with pytest.raises(UserError) as error:
        train_documents(*sources, **settings)
    return str(error.value)


def obey(message: str) -> None:
    """Runs the one command that a message has."""
    (command,) = [line[2:] for line in message.splitlines() if line.startswith("  ")]
    for tool in ("zstd", "xz", "bzip2", "iconv"):
        if tool in command.split() and shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)


@pytest.mark.parametrize(("language", "codec", "name"), ENCODINGS)
def test_text_in_another_encoding_is_refused_by_its_name_and_the_command_makes_it_right(
    tmp_path, language, codec, name
):
    text = TEXTS[language]
    path = tmp_path / "my [old] book's.txt"
    path.write_bytes(text.encode(codec))
    message = refusal(tmp_path / "*")
    assert message.startswith(f"{path}: ") and f"iconv -f {name} -t UTF-8" in message
    obey(message)
    assert train_documents(tmp_path / "*") == text.splitlines()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_whose_name_is_not_utf8_either_is_converted(tmp_path):
    path = tmp_path / os.fsdecode("책's 1.txt".encode("cp949"))
    path.write_bytes(TEXTS["Korean"].encode("cp949"))
    obey(refusal(tmp_path / "*"))
    assert train_documents(tmp_path / "*") == TEXTS["Korean"].splitlines()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.txt.gz", "A.TXT.GZ", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("codec", ["cp949", "utf-16"])
def test_packed_text_and_json_lines_in_another_encoding_keep_their_name_and_kind(tmp_path, name, codec):
    lines = TEXTS["Korean"].splitlines()
    if "json" in name:
        content = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines).encode(codec)
    else:
        content = TEXTS["Korean"].encode(codec)
    path = tmp_path / name
    packers = {".gz": gzip.compress, ".zst": packed_as_zstd}
    path.write_bytes(packers.get(path.suffix.lower(), bytes)(content))
    obey(refusal(tmp_path / "*"))
    assert train_documents(tmp_path / "*") == lines
    assert list(tmp_path.iterdir()) == [path]


def test_a_command_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    content = TEXTS["Korean"].encode("cp949") * 3000 + b"\xff"  # Which is nowhere near the first fault.
    path.write_bytes(content)
    with pytest.raises(subprocess.CalledProcessError):
        obey(refusal(path))
    assert path.read_bytes() == content


@pytest.mark.parametrize(("num_characters", "least"), [(30, 0.9), (100, 1.0), (1000, 1.0)])
def test_korean_is_told_from_few_characters_and_in_the_middle_of_a_text(test_data, num_characters, least):
    text = (test_data / "korean/paragraphs_valid.txt").read_text("utf-8")
    parts = [text[start : start + num_characters] for start in range(0, len(text) - num_characters, len(text) // 50)]
    found = [encoding_of(part.encode("cp949", "ignore")) for part in parts if not part.isascii()]
    assert sum(each is not None and each.name == "CP949" for each in found) >= least * len(found)


def packed_as_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inside.txt", content)
    return file.getvalue()


def packed_as_tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("inside.txt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def packed_as_zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


# What a program such as pzstd writes before a frame: a frame of four bytes that is to be skipped.
SKIPPED_FRAME = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"


@pytest.mark.parametrize(
    ("pack", "name", "then"),
    [
        (packed_as_zip, "it's [a].zip", "it's [a].zip.unpacked/*"),
        (packed_as_zip, "a.txt", "a.txt.unpacked/*"),
        (packed_as_zip, "a.txt.gz", "a.txt.gz.unpacked/*"),
        (packed_as_tar, "a.tar", "a.tar.unpacked/*"),
        (packed_as_tar, "a.txt", "a.txt.unpacked/*"),
        (lambda content: gzip.compress(packed_as_tar(content)), "a.tar.gz", "a.tar.gz.unpacked/*"),
        (lzma.compress, "a.txt.xz", "a.txt"),
        (lzma.compress, "it's.txt", "it's.txt"),
        (lzma.compress, "a.TXT.XZ", "a.TXT.XZ"),
        (bz2.compress, "a.txt.bz2", "a.txt"),
        (bz2.compress, "a.txt", "a.txt"),
        (lambda content: content, "a.txt.gz", "a.txt"),
        (lambda content: content, "a.txt.zst", "a.txt"),
    ],
)
@pytest.mark.parametrize("max_broken_fraction", [0.0, 0.9])
def test_what_is_packed_otherwise_is_told_by_its_first_bytes_and_the_command_unpacks_it(
    tmp_path, pack, name, then, max_broken_fraction
):
    (tmp_path / name).write_bytes(pack(TEXTS["Korean"].encode()))
    message = refusal(tmp_path / name, max_broken_fraction=max_broken_fraction)
    obey(message)
    assert train_documents(tmp_path / then) == TEXTS["Korean"].splitlines()


def test_json_lines_packed_by_another_tool_are_named_as_packed_whatever_the_field(tmp_path):
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'{"body": "one"}'))
    obey(refusal(tmp_path / "a.jsonl.xz", text_field="body"))
    assert train_documents(tmp_path / "a.jsonl", text_field="body") == ["one"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.txt", "A.TXT.GZ", "A.TXT.ZST", "a"])
@pytest.mark.parametrize("pack", [gzip.compress, packed_as_zstd, lambda text: SKIPPED_FRAME + packed_as_zstd(text)])
def test_packed_text_is_read_whatever_the_name_and_in_several_members(tmp_path, name, pack):
    lines = TEXTS["Korean"].splitlines(keepends=True)
    (tmp_path / name).write_bytes(b"".join(pack(line.encode()) for line in lines))
    assert train_documents(tmp_path / name) == TEXTS["Korean"].splitlines()


@pytest.mark.parametrize("name", ["a.jsonl.zst", "A.JSONL.ZST", "a.json.zst", "a.ndjson.zst"])
def test_json_lines_packed_with_zstd_are_records(tmp_path, name):
    (tmp_path / name).write_bytes(packed_as_zstd(b'{"text": "one\\ntwo"}\n{"text": "three"}\n'))
    assert train_documents(tmp_path / name) == ["one\ntwo", "three"]


def test_a_zstd_file_that_is_cut_off_or_damaged_is_named(tmp_path):
    path = tmp_path / "a.txt.zst"
    whole = packed_as_zstd(b"".join(b"line %d\n" % i for i in range(10_000)))
    for content in (whole[:-5], whole[: len(whole) // 2], whole[:5], whole + b"more"):
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: a broken or cut-off zstd file (")


def test_zstd_with_a_long_window_is_refused_with_the_command_that_unpacks_it(tmp_path):
    if shutil.which("zstd") is None:
        pytest.skip("needs zstd")
    text = b"".join(b"line %d\n" % i for i in range(10_000))
    # Without the size, the window of 2 GB is not made smaller.
    command = ["zstd", "--long=31", "--ultra", "-1", "-c"]
    packed = subprocess.run(command, input=text, capture_output=True, check=True).stdout
    (tmp_path / "a.txt.zst").write_bytes(packed)
    message = refusal(tmp_path / "a.txt.zst")
    assert f"{tmp_path / 'a.txt.zst'}: packed with zstd --long; unpack it with" in message
    obey(message)
    assert train_documents(tmp_path / "a.txt") == text.decode().splitlines()


def test_documents_of_other_programs_are_refused(tmp_path):
    office = io.BytesIO()
    with zipfile.ZipFile(office, "w") as archive:
        archive.writestr("[Content_Types].xml", "x")
    for name, content in (("a.docx", office.getvalue()), ("a.pdf", b"%PDF-1.7\n"), ("b.txt", b"7z\xbc\xaf\x27\x1cx")):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: a")


TABLE = [{"id": 1, "body": 'one, "two"\nthree'}, {"id": 2, "body": "넷"}]


def as_table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "body"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TABLE)
    return file.getvalue().encode("utf-8-sig")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("it's [a].csv", lambda: as_table(",")),
        ("a.CSV.gz", lambda: gzip.compress(as_table(","))),
        ("a.tsv", lambda: as_table("\t")),
        ("a.csv.zst", lambda: packed_as_zstd(as_table(","))),
        ("a.json", lambda: json.dumps(TABLE).encode("utf-8-sig")),
        ("a.json", lambda: json.dumps(TABLE, indent=2).encode()),
        ("a.json.gz", lambda: gzip.compress(json.dumps(TABLE).encode())),
        ("a.json", lambda: "\n".join(json.dumps(row | {"more": [{"a": "}"}]}, indent=2) for row in TABLE).encode()),
        ("a.json.gz", lambda: gzip.compress("\r\n".join(json.dumps(row, indent=1) for row in TABLE).encode())),
        ("a.jsonl", lambda: json.dumps(TABLE).encode()),
    ],
)
def test_a_table_is_refused_by_name_or_content_and_the_command_makes_it_json_lines(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content())
    message = refusal(path)
    target = Path(message.split("and name ")[1].split(", and in data.text_field")[0])
    obey(message)
    assert train_documents(target, text_field="body") == [row["body"] for row in TABLE]


@pytest.mark.parametrize("other", ["before", "after"])
def test_the_command_that_makes_json_lines_replaces_no_other_file(tmp_path, other):
    path, beside = tmp_path / "a.csv", tmp_path / "a.jsonl"
    path.write_bytes(as_table(","))
    if other == "before":
        beside.write_text("another")
    message = refusal(path)
    beside.write_text("another")
    with contextlib.suppress(subprocess.CalledProcessError):  # By its version, mv -n fails if it moves nothing.
        obey(message)
    assert beside.read_text() == "another"
    if other == "before":
        assert train_documents(tmp_path / "a-2.jsonl", text_field="body") == [row["body"] for row in TABLE]


def test_a_packed_table_that_is_cut_off_becomes_no_half_of_it(tmp_path):
    rows = "".join(f"{i},{hashlib.sha256(bytes([i % 256])).hexdigest()}\n" for i in range(20_000))
    packed = gzip.compress(f"id,body\n{rows}".encode())
    (tmp_path / "a.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(subprocess.CalledProcessError):
        obey(refusal(tmp_path / "a.csv.gz"))
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("pack", "name"),
    [
        (bytes, "it's a.txt"),
        (bytes, "a"),
        (gzip.compress, "a.parquet.gz"),
        (packed_as_zstd, "A.PARQUET.ZST"),
        (gzip.compress, "a.gz"),
    ],
)
def test_a_parquet_file_of_another_name_is_recognized_and_the_command_gives_it_its_own(tmp_path, pack, name):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), file)
    (tmp_path / name).write_bytes(pack(file.getvalue()))
    obey(refusal(tmp_path / name))
    (found,) = [path for path in tmp_path.iterdir() if path.suffix.lower() == ".parquet"]
    assert train_documents(found, text_field="body") == [row["body"] for row in TABLE]


def test_a_json_array_of_texts_becomes_json_lines_too(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["one", "two"]))
    obey(refusal(tmp_path / "a.json"))
    assert train_documents(tmp_path / "a.jsonl") == ["one", "two"]


@pytest.mark.parametrize(
    ("other", "mended", "said"),
    [
        (b"caf\xe9 noir", "café noir", "some lines look like LATIN1 (Western European)"),
        ("우리는 caf".encode() + b"\xe9", "우리는 caf", "most of it is UTF-8. Leave out such documents"),
        (
            TEXTS["Korean"].splitlines()[0].encode("cp949"),
            TEXTS["Korean"].splitlines()[0],
            "some lines look like CP949 (",
        ),
    ],
)
@pytest.mark.parametrize(("name", "place"), [("a.txt", 0), ("a.txt", 199), ("a.txt.gz", 100)])
def test_a_line_that_is_not_utf8_among_others_is_mended_and_the_others_stay(tmp_path, name, place, other, mended, said):
    path = tmp_path / name
    lines = [f"우리는 {i} 번째" for i in range(200)]
    encoded = [line.encode() for line in lines]
    content = b"\n".join([*encoded[:place], other, *encoded[place:]])
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    message = refusal(path)
    assert said in message and "iconv" not in message
    assert train_documents(path, max_broken_fraction=0.01) == lines
    obey(message)
    assert train_documents(path) == [*lines[:place], mended, *lines[place:]]


def test_a_file_that_ends_within_a_character_is_named_as_cut_off(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXTS["Korean"].encode()[:-3])
    message = refusal(path)
    assert "it ends within a character, as a file that was cut off does. Fetch it again, or leave out" in message
    obey(message)
    assert "\n".join(train_documents(path)) == TEXTS["Korean"][:-3]


def test_half_a_file_in_another_encoding_is_told_too(tmp_path):
    path = tmp_path / "a.txt"
    half = TEXTS["Korean"] * 50
    path.write_bytes(half.encode() + half.encode("cp949"))
    obey(refusal(path))
    assert train_documents(path) == 2 * half.splitlines()


def test_more_broken_documents_than_may_be_left_out_are_an_error_with_the_encoding(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXTS["Korean"].encode("cp949"))
    message = refusal(path, max_broken_fraction=0.1)
    assert "records, 100.00% of all, are broken" in message and "it looks like CP949 (Korean)" in message
    obey(message)
    assert train_documents(path, max_broken_fraction=0.1) == TEXTS["Korean"].splitlines()


def test_a_stray_nul_byte_can_be_left_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nt\0wo\n" + b"three\n" * 50)
    obey(refusal(path))
    assert train_documents(path)[:2] == ["one", "two"]


@pytest.mark.parametrize(
    "start",
    [
        "BZh9 is a name",
        "PAR1 of the book",
        "PAR1\nis a gene",
        "PAR1은 유전자이다",
        "%PDF-1.7 is how such a file begins",
        "PK is a name",
        "Rar! he said",
        "(x" + "ustar" * 100,
    ],
)
def test_text_that_begins_like_another_format_is_text(tmp_path, start):
    (tmp_path / "a.txt").write_text(f"{start}\nend")
    assert train_documents(tmp_path / "a.txt") == [*start.split("\n"), "end"]


def test_no_character_counts_twice_as_a_common_one():
    for characters in _COMMON.values():
        assert len(set(characters)) == len(characters)


def test_nul_bytes_only_are_not_an_encoding(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(1000))
    assert "NUL byte at byte offset 0; is it text?" in refusal(path)


def test_bytes_of_no_known_encoding_are_named_as_such(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("ประเทศไทย ภาษาไทย\n".encode("cp874"))
    message = refusal(path)
    assert "its encoding could not be recognized" in message and "for ENCODING" in message
    obey(message.replace("ENCODING -t", "CP874 -t"))
    assert train_documents(path) == ["ประเทศไทย ภาษาไทย"]
