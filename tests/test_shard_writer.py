"""Laws of the writer of shards: parts that are joined give the bytes that one writer would have written."""

from pathlib import Path

import pytest

from trainer.data.shard_writer import SplitWriter
from trainer.data.shards import Split
from trainer.errors import UserError
from trainer.tokenizers.characters import CharTokenizer


def written_in_parts(folder: Path, splits: dict[str, list[str]]) -> tuple[SplitWriter, Split]:
    """A writer to join parts with, and the first of them; each part has the documents of its name."""
    tokenizer = CharTokenizer(["[PAD]", "[UNK]", "[BOS]", *"abc"])
    found = {}
    for name, texts in splits.items():
        (folder / name).mkdir(parents=True)
        writer = SplitWriter(folder / name, "train", tokenizer, 7)
        for text in texts:
            tokens, lengths = tokenizer.encode_pieces([text])
            writer.write(tokens, lengths, [True], len(text))
        found[name] = writer.close()
    joiner = SplitWriter(folder, "train", tokenizer, 7)
    for name in splits:
        joiner.write_part(folder / name, found[name])
    return joiner, found[next(iter(splits))]


@pytest.mark.parametrize("part_tokens", [1, 2, 3, 5, 1000])
def test_joined_parts_are_what_one_writer_would_have_written(tmp_path, monkeypatch, part_tokens):
    monkeypatch.setattr("trainer.data.shard_writer._PART_TOKENS", part_tokens)
    texts = ["a", "", "bb?", "ccccccccccc", "ab", "c", "?"]
    whole, _ = written_in_parts(tmp_path / "one", {"all": texts})
    parts, _ = written_in_parts(tmp_path / "two", {"1": [], "2": texts[:3], "3": texts[3:4], "4": [], "5": texts[4:]})
    assert parts.close() == whole.close() == written_in_parts(tmp_path / "three", {"all": texts})[1]
    names = [path.name for path in (tmp_path / "one").glob("train-*")]
    assert len(names) > 4
    for name in names:
        content = (tmp_path / "one" / "all" / name).read_bytes()
        assert content == (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_damaged_part_is_not_joined(tmp_path):
    writer, part = written_in_parts(tmp_path, {"all": ["a", "b"]})
    (tmp_path / "all" / "train-00000.offsets").write_bytes(bytes(24))
    with pytest.raises(UserError, match=r"all: train-00000\.offsets was changed: its SHA-256 does not match; prepare"):
        writer.write_part(tmp_path / "all", part)
