"""Mutated texts and tokenizer files."""

import functools
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow

from mutated_values import TEXTS, as_json, mutated_bytes, mutated_json, mutated_tree
from mutation_lab import ANY_TOKENIZER, TOKENIZERS, Lab, expect, expect_no_leftovers, is_next_tried, write_inputs


def text(lab: Lab, rng: random.Random) -> bool:
    """A file of text."""
    write_inputs()
    name = rng.choice(("a.txt", "a.txt", "a", "A.TXT", "a.txt.gz", "a.txt.zst", "a[1].txt", "a.md"))
    seed = rng.choice(TEXTS).encode(rng.choice(("utf-8",) * 6 + ("utf-16", "utf-8-sig")))
    data = mutated_bytes(rng, seed, rng.choice(TEXTS).encode())
    data = packed(name, data) if rng.random() < 0.5 else mutated_bytes(rng, packed(name, seed), data)
    how = rng.choice(("line", "paragraph", "file"))
    return _try_text(lab, rng, name, data, how, functools.partial(_documents_of, how=how))


def jsonl(lab: Lab, rng: random.Random) -> bool:
    """A file of JSON Lines."""
    write_inputs()
    records: list[Any] = [{"text": line, "id": i} for i, line in enumerate(TEXTS[-1].split("\n")) if line]
    seed = b"\n".join(as_json(rng, record) for record in records) + b"\n"
    if rng.random() < 0.5:
        data = mutated_bytes(rng, seed, TEXTS[-1].encode())
    else:
        records = mutated_tree(rng, records)
        data = b"\n".join(as_json(rng, record) for record in (records if isinstance(records, list) else [records]))
    name = rng.choice(("a.jsonl", "a.jsonl", "a.ndjson", "A.JSONL", "a.jsonl.gz", "a.jsonl.zst"))
    return _try_text(lab, rng, name, packed(name, data), "line", _records_of)


def zstd(lab: Lab, rng: random.Random) -> bool:
    """A file packed with zstd, whose packed bytes are mutated."""
    write_inputs()
    name = rng.choice(("a.txt.zst", "a.jsonl.zst"))
    lines = TEXTS[-1].split("\n")
    seed = "\n".join(json.dumps({"text": line}) for line in lines) if "json" in name else "\n".join(lines)
    frames = [packed(name, seed.encode()) for _ in range(rng.choice((1, 1, 2)))]
    frames.insert(rng.randrange(2), b"\x5a\x2a\x4d\x18\x02\0\0\0ab" * (rng.random() < 0.3))
    data = mutated_bytes(rng, b"".join(frames), seed.encode())
    documents_of = _records_of if "json" in name else functools.partial(_documents_of, how="line")
    return _try_text(lab, rng, name, data, "line", documents_of)


def packed(name: str, data: bytes) -> bytes:
    """Returns the content of a file of this name."""
    if name.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    return pyarrow.compress(data, codec="zstd", asbytes=True) if name.endswith(".zst") else data


def _unpacked(name: str, data: bytes) -> bytes:
    if name.endswith(".zst"):
        return bytes(pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read())
    return gzip.decompress(data) if name.endswith(".gz") else data


def _try_text(
    lab: Lab, rng: random.Random, name: str, data: bytes, how: str, documents_of: Callable[[bytes], list[str] | None]
) -> bool:
    lab.write(name, data)
    kind = rng.choice(ANY_TOKENIZER)
    words = [f"data.train={json.dumps(name)}", f"tokenizer.kind={kind}", f"data.documents={how}"]
    words += ["data.max_broken_fraction=0.9"] * (rng.random() < 0.2)
    words += ["data.validation=none", "data.held_out_fraction=0.3"] * (rng.random() < 0.3)
    words += ["tokenizer.vocabulary_size=400"] * (kind in ("bpe", "wordpiece"))
    answer = lab.trainer("prepare", "config.toml", *words)
    expect_no_leftovers(Path())
    if not answer.status:
        prepared = next(Path("prepared").iterdir())
        if rng.random() < 0.2:
            lab.trainer("inspect", str(prepared), statuses=(0,))
        if len(words) == 3 and kind == "byte":
            expected = documents_of(_unpacked(name, data))
            found = documents_in(prepared, "train")
            expect(found == expected, f"prepared is {found} and not {expected}"[:2_000])
    if not is_next_tried(rng, answer):
        return not answer.status
    good = TEXTS[-1]
    if documents_of is _records_of:
        good = "\n".join(json.dumps({"text": line}) for line in TEXTS[-1].split("\n"))
    lab.write(name, packed(name, good.encode()))
    lab.trainer("prepare", "config.toml", *words, statuses=(0,))
    return not answer.status


def _documents_of(data: bytes, how: str) -> list[str]:
    """Returns the documents of a text, as the documentation defines them."""
    whole = data.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    documents = whole.split("\n") if how == "line" else [whole]
    if how == "paragraph":
        documents = [""]
        for line in whole.split("\n"):
            if not line or line.isspace():
                documents.append("")
            else:
                documents[-1] += ("\n" if documents[-1] else "") + line
    return [document for document in documents if document and not document.isspace()]


def _records_of(data: bytes) -> list[str]:
    lines = data.decode().removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line and not line.isspace()]
    return [each for each in texts if each and not each.isspace()]


def documents_in(folder: Path, split_name: str) -> list[str]:
    """Returns the documents of a split of prepared data."""
    from trainer.commands.inspect_run import document
    from trainer.data.shards import load_prepared

    prepared = load_prepared(folder)
    tokenizer, split = prepared.tokenizer(), prepared.split(split_name)
    return [
        tokenizer.decode(document(prepared, split, number, split.max_tokens)[1])
        for number in range(split.num_documents)
    ]


def vocabulary(lab: Lab, rng: random.Random) -> bool:
    """A vocab.txt."""
    write_inputs()
    seed = (lab.seed("wordpiece") / "run/tokenizer/vocab.txt").read_bytes()
    data = mutated_bytes(rng, seed, TEXTS[-1].encode())
    if rng.random() < 0.3:  # Lines are swapped, doubled, or get a suffix.
        lines = seed.split(b"\n")
        for _ in range(rng.choice((1, 3))):
            i = rng.randrange(len(lines))
            lines[i] += rng.choice((b" ", b"\t7", b"\r", b"\0", b"#", "é".encode(), b"\xff", b"A" * 300, b""))
            lines[i], lines[0] = (lines[0], lines[i]) if rng.random() < 0.3 else (lines[i], lines[0])
        data = b"\n".join(lines)
    return _try_tokenizer(lab, rng, "vocab.txt", "wordpiece", seed, data)


def tokenizer_json(lab: Lab, rng: random.Random) -> bool:
    """A tokenizer.json."""
    write_inputs()
    kind = rng.choice(("bpe", "bpe", "wordpiece"))
    files = [(lab.seed(each) / "run/tokenizer/tokenizer.json").read_bytes() for each in (kind, rng.choice(TOKENIZERS))]
    data = mutated_json(rng, rng.choice((files[0],) * 9 + (files[1],)), files[1])
    return _try_tokenizer(lab, rng, "tokenizer.json", kind, files[0], data)


def _try_tokenizer(lab: Lab, rng: random.Random, name: str, kind: str, seed: bytes, data: bytes) -> bool:
    lab.write(name, data)
    words = [f"tokenizer={{kind = '{kind}', path = '{name}'}}"]
    answer = lab.trainer("prepare", "config.toml", *words)
    expect_no_leftovers(Path())
    if not answer.status and (kind == "bpe" or rng.random() < 0.5):
        from trainer.data.shards import load_prepared

        prepared = load_prepared(next(Path("prepared").iterdir()))
        if rng.random() < 0.1:
            lab.trainer("inspect", str(prepared.folder), statuses=(0,))
        tokenizer = prepared.tokenizer()
        for each in TEXTS:
            tokens = tokenizer.encode(each)
            expect(tokens.min() >= 0 and tokens.max() < prepared.vocabulary_size, "a token beyond the vocabulary")
            back = tokenizer.decode(tokens)
            expect(tokenizer.is_lossy or back == each, f"{each!r} comes back as {back!r}")
        if name == "vocab.txt":
            lines = data.decode("utf-8-sig").rstrip("\n").split("\n")
            while not lines[-1].strip(" \t\r\f"):
                del lines[-1]
            words_of: list[str] = tokenizer.vocabulary
            expect(len(words_of) == len(lines), f"{len(words_of)} tokens of {len(lines)} lines")
            # Blanks around a token do not belong to it, unless they distinguish it from another token.
            wrong = [pair for pair in zip(words_of, lines, strict=True) if pair[0].strip() != pair[1].strip()]
            expect(not wrong, f"tokens and their lines: {wrong[:5]}")
    if is_next_tried(rng, answer):
        lab.write(name, seed)
        lab.trainer("prepare", "config.toml", *words, statuses=(0,))
    return not answer.status
