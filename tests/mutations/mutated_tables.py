"""Mutated tables, and folders of data sets as Hugging Face has them."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from mutated_texts import documents_in
from mutated_values import TEXTS, mutated_bytes, mutated_json
from mutation_lab import Lab, expect, expect_no_leftovers, is_next_tried, write_inputs

_LINES = [line for line in TEXTS[-1].split("\n") if line.strip()]


def table(lab: Lab, rng: random.Random) -> bool:
    """A Parquet or Arrow file: its bytes, or its columns and values, are mutated."""
    write_inputs()
    name = rng.choice(("a.parquet", "A.PARQUET", "a.arrow"))
    values: list[Any] = list(_LINES)
    if is_mutated := rng.random() < 0.7:
        data = mutated_bytes(rng, _written(rng, name, values, pyarrow.string(), "text"), TEXTS[-1].encode())
    else:
        for _ in range(rng.choice((0, 1, 5))):
            values[rng.randrange(len(values))] = rng.choice(
                (None, b"\xff", b"a\0b", b"", b" ", b"\xed\xa0\x80", "한\u2028글")
            )
        kinds = (pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view())
        column = rng.choice(("text",) * 6 + ("Text", "text.a", "", "text\0", "x" * 5000))
        data = _written(rng, name, values, rng.choice(kinds), column)
    lab.write(name, data)
    words = [f"data.train={json.dumps(name)}", "tokenizer.kind=byte", "data.documents=none"]
    words += ["data.max_broken_fraction=0.9"] * (rng.random() < 0.4)
    words += ["data.text_field=id"] * (rng.random() < 0.1)
    answer = lab.trainer("prepare", "config.toml", *words)
    expect_no_leftovers(Path())
    if not answer.status and not is_mutated:
        found = documents_in(next(Path("prepared").iterdir()), "train")
        expected = [text for value in values if (text := _text_of(value)) is not None and text and not text.isspace()]
        expect(found == expected, f"prepared is {found} and not {expected}"[:2_000])
    if is_next_tried(rng, answer):
        lab.write(name, _written(rng, name, _LINES, pyarrow.string(), "text"))
        lab.trainer("prepare", "config.toml", *words[: 4 if "max_broken" in words[-1] else 3], statuses=(0,))
    return not answer.status


def _written(rng: random.Random, name: str, values: list[Any], kind: Any, column: str) -> bytes:
    values = [value.encode() if isinstance(value, str) and kind != pyarrow.string() else value for value in values]
    array = pyarrow.array(values, kind)
    if rng.random() < 0.2 and kind == pyarrow.string():
        array = array.dictionary_encode()
    content = pyarrow.table({"id": list(range(len(values))), column: array})
    file = io.BytesIO()
    if name.lower().endswith(".parquet"):
        codec = rng.choice(("none", "snappy", "zstd", "gzip"))
        pyarrow.parquet.write_table(
            content, file, row_group_size=rng.choice((1, 7, 1000)), compression=codec,
            use_dictionary=rng.random() < 0.5, write_page_checksum=rng.random() < 0.3,
        )  # fmt: skip
        return file.getvalue()
    new = rng.choice((pyarrow.ipc.new_file, pyarrow.ipc.new_stream))
    with new(file, content.schema) as writer:
        writer.write_table(content, max_chunksize=rng.choice((1, 7, 1000)))
    return file.getvalue()


def _text_of(value: Any) -> str | None:
    """Returns the text of a value; None if it is broken."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return None
    return None if text is None or "\0" in text else text


def dataset_folder(lab: Lab, rng: random.Random) -> bool:
    """The folder of a data set of Hugging Face: its JSON is mutated, or its files have other names."""
    write_inputs()
    Path("set").mkdir()
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (_LINES[:3], _LINES[3:]), strict=True):
        lab.write(f"set/{name}", _written(rng, name, part, pyarrow.string(), "text"))
    state = json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}).encode()
    lab.write(
        "set/state.json", mutated_json(rng, state, b'"../a" "/" {"_indices_data_files": [{"filename": "i.arrow"}]}')
    )
    if rng.random() < 0.2:
        lab.write(
            "set/dataset_dict.json", mutated_json(rng, b'{"splits": ["train", "test"]}', b'"../x" [] "" {"train": 1}')
        )
    for _ in range(rng.choice((0, 0, 1, 2))):
        Path("set/state.json").unlink(missing_ok=True)
        end = rng.choice((".parquet", ".arrow", ".jsonl", ".JSON.GZ", ""))
        stem = rng.choice(("train", "test", "x[", "é", "-"))
        lab.write(f"set/{stem}{rng.randrange(3)}{end}", b'{"text": "one"}')
    answer = lab.trainer("prepare", "config.toml", "data.train=set", "tokenizer.kind=byte", "data.documents=none")
    expect_no_leftovers(Path())
    if not answer.status and Path("set/state.json").exists():
        found = documents_in(next(Path("prepared").iterdir()), "train")
        expect(set(found) <= set(_LINES), f"prepared is {found}"[:2_000])
    return not answer.status
