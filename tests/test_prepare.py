import dataclasses
import errno
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf
from tiny import quiet, tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.config.file import load_config, make_config
from trainer.config.settings import Config
from trainer.data.batches import total_steps
from trainer.data.prepare import prepare
from trainer.data.shard_writer import SplitWriter
from trainer.data.shards import (
    PreparedData,
    Split,
    load_prepared,
)
from trainer.errors import UserError
from trainer.text.held_out import is_held_out
from trainer.tokenizers.characters import CharTokenizer

LINES = [f"line {i}" + " of text" * (i % 7) for i in range(500)]


def config_for(folder: Path, text: str | None = None, **settings) -> Config:
    """A config whose text is text.txt in a folder, and whose prepared data go into prepared/ there."""
    if text is not None:
        (folder / "text.txt").write_bytes(text.encode())
    data = {"train": str(folder / "text.txt"), "held_out_fraction": 0.1} | settings.pop("data", {})
    train = {"sequence_length": 2} | settings.pop("train", {})
    return tiny_config(folder, data=data, train=train, **{"tokenizer": {"kind": "char"}, **settings})


def documents(prepared: PreparedData, split: str) -> list[str]:
    """Reads a split back through nothing but the documented form of its files."""
    tokenizer, found = prepared.tokenizer(), []
    for shard in prepared.split(split).shards:
        tokens = np.fromfile(prepared.folder / shard.tokens_file, np.dtype(prepared.dtype).newbyteorder("<"))
        offsets = np.fromfile(prepared.folder / shard.offsets_file, "<i8")
        assert offsets[0] == 0
        assert offsets[-1] == len(tokens) - 1 == shard.stream_length() - 1
        assert len(offsets) == shard.num_documents + 1
        assert np.flatnonzero(tokens == prepared.bos_id).tolist() == offsets.tolist()
        found += [tokenizer.decode(tokens[start + 1 : end]) for start, end in itertools.pairwise(offsets)]
    return found


def file_contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    return subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)


# What is written.


def test_every_document_is_in_the_shards_in_order(tmp_path):
    prepared = prepare(config_for(tmp_path, "\n".join(LINES)), quiet)
    train, validation = documents(prepared, "train"), documents(prepared, "validation")
    assert sorted(train + validation) == sorted(LINES)
    assert [line for line in LINES if line in set(train)] == train
    assert 20 <= len(validation) <= 80


def test_the_counts_are_those_of_the_text(tmp_path):
    (tmp_path / "validation.txt").write_text("abx\nyb\n")
    text = "ab 한\n\na\n"
    prepared = prepare(config_for(tmp_path, text, data={"validation": str(tmp_path / "validation.txt")}), quiet)
    counts = {name: dataclasses.replace(split, shards=()) for name, split in prepared.splits.items()}
    assert counts == {
        "train": Split(2, 5, 7, 0, 4, None, ()),
        "validation": Split(2, 5, 5, 2, 3, None, ()),
    }
    assert (prepared.dtype, prepared.vocabulary_size, prepared.tokenizer_kind) == ("uint16", 7, "char")
    assert prepared.sources == {"train": [f"{tmp_path}/text.txt"], "validation": [f"{tmp_path}/validation.txt"]}


@pytest.mark.parametrize("shard_tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21, 22, 1000])
def test_documents_do_not_cross_shards_and_a_full_shard_gets_no_more(tmp_path, shard_tokens):
    (tmp_path / "validation.txt").write_text("a")
    text = "aaa\nbb\nc\ndddd\neeeeeeeeee"
    config = config_for(tmp_path, text, data={"validation": str(tmp_path / "validation.txt")})
    prepared = prepare(config, quiet, shard_tokens)
    split = prepared.split("train")
    assert documents(prepared, "train") == text.split("\n")
    assert (split.num_documents, split.num_tokens, split.max_tokens) == (5, 20, 10)
    for shard in split.shards[:-1]:
        # With its last document it is full, and without it was not.
        offsets = np.fromfile(prepared.folder / shard.offsets_file, "<i8")
        assert offsets[-1] >= shard_tokens > offsets[-2]
    assert [shard.tokens_file for shard in split.shards] == [f"train-{i:05}.tokens" for i in range(len(split.shards))]


def test_many_threads_and_batches_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.encoding._BATCH_BYTES", 50)
    prepared = prepare(config_for(tmp_path, "\n".join(LINES)), quiet, shard_tokens=2000)
    train = documents(prepared, "train")
    assert [line for line in LINES if line in set(train)] == train
    assert len(prepared.split("train").shards) > 3


def test_a_huge_document_is_one_document(tmp_path):
    text = "".join(f"{i} words and 한글, " for i in range(100_000))
    config = config_for(tmp_path, text, data={"documents": "file"})
    prepared = prepare(config, quiet)
    cut_at = int(len(text) * 0.9)
    assert documents(prepared, "train") == [text[:cut_at]]
    assert documents(prepared, "validation") == [text[cut_at:]]
    assert prepared.split("train").max_tokens == cut_at


def test_a_huge_document_has_the_wordpiece_tokens_of_the_whole(tmp_path):
    text = "".join(f"{i} Words, 한글 我能吞下玻璃 naïve… " for i in range(5_000))
    config = config_for(
        tmp_path, text, data={"documents": "file"}, tokenizer={"kind": "wordpiece", "vocabulary_size": 200}
    )
    prepared = prepare(config, quiet)
    vocabulary = (prepared.folder / "tokenizer" / "vocab.txt").read_text("utf-8").split("\n")[:-1]
    layer = keras_nlp.tokenizers.WordPieceTokenizer(vocabulary, lowercase=True)
    whole = tf.function(layer.tokenize, autograph=False)(tf.constant([text[: int(len(text) * 0.9)]])).values.numpy()
    shard = prepared.split("train").shards[0]
    assert np.fromfile(prepared.folder / shard.tokens_file, "<u2").tolist() == [2, *whole, 2]
    assert prepared.split("train").num_unknown == 0


def test_a_huge_document_has_the_bpe_tokens_of_the_whole(tmp_path):
    text = "".join(f"{i} Words,  한글\n\n我能吞下玻璃 naïve… " for i in range(5_000))
    config = config_for(tmp_path, text, data={"documents": "file"}, tokenizer={"kind": "bpe", "vocabulary_size": 600})
    prepared = prepare(config, quiet)
    train = text[: int(len(text) * 0.9)]
    whole = prepared.tokenizer().encoder.encode(train).ids
    shard = prepared.split("train").shards[0]
    assert np.fromfile(prepared.folder / shard.tokens_file, "<u2").tolist() == [1, *whole, 1]
    assert documents(prepared, "train") == [train]
    assert (prepared.pad_id, prepared.bos_id, prepared.unknown_id) == (0, 1, -1)
    assert prepared.split("train").num_unknown == prepared.split("validation").num_unknown == 0


def test_a_document_without_tokens_keeps_its_place(tmp_path):
    (tmp_path / "validation.txt").write_text("b")
    tokenizer = {"kind": "wordpiece", "vocabulary_size": 10}
    data = {"validation": str(tmp_path / "validation.txt")}
    prepared = prepare(config_for(tmp_path, "ab\n\u200b\u00ad\nba", data=data, tokenizer=tokenizer), quiet)
    assert documents(prepared, "train") == ["ab", "", "ba"]


def test_a_vocabulary_beyond_two_bytes_is_written_in_four(tmp_path):
    (tmp_path / "validation.txt").write_text("\U00021fff")
    text = "".join(map(chr, range(0x10000, 0x22000)))
    prepared = prepare(config_for(tmp_path, text, data={"validation": str(tmp_path / "validation.txt")}), quiet)
    assert prepared.dtype == "uint32"
    assert (documents(prepared, "train"), documents(prepared, "validation")) == ([text], ["\U00021fff"])


def test_the_storybook_brings_the_exact_probability_of_its_validation_stories(tmp_path):
    from trainer.storybook import storybook

    data = {"train": "storybook", "storybook_stories": 100, "held_out_fraction": 0.2}
    prepared = prepare(config_for(tmp_path, data=data), quiet)
    held_out = documents(prepared, "validation")
    expected = -sum(map(storybook.log_probability, held_out))
    assert prepared.split("validation").source_nats == pytest.approx(expected, rel=1e-12)
    assert prepared.split("train").source_nats is None
    assert prepared.folder.name.startswith("storybook-")


# Once, and always the same.


def test_preparing_again_changes_no_file(tmp_path):
    config, said = config_for(tmp_path, "\n".join(LINES)), []
    first = prepare(config, quiet)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert prepare(config, said.append) == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    assert len(said) == 1
    assert said[0].startswith(f"{first.folder}: already prepared; ")


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"kind": "char"},
        {"kind": "byte"},
        {"kind": "wordpiece", "vocabulary_size": 60},
        {"kind": "bpe", "vocabulary_size": 300},
    ],
)
def test_the_same_text_gives_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        if name == "two":
            monkeypatch.setattr("trainer.data.encoding._BATCH_BYTES", 50)
        prepared = prepare(config_for(tmp_path / name, "\n".join(LINES), tokenizer=tokenizer), quiet)
        contents.append(file_contents(prepared.folder))
        manifest = json.loads(contents[-1].pop("manifest.json"))
        del manifest["sources"], manifest["sha256"]  # The files lie elsewhere, and the fingerprint does not mind.
        contents[-1]["manifest.json"] = manifest
    assert contents[0] == contents[1]


def test_changed_text_is_noticed_and_the_old_folder_stays(tmp_path):
    config, said = config_for(tmp_path, "\n".join(LINES)), []
    old = prepare(config, quiet)
    new = prepare(config_for(tmp_path, "\n".join([*LINES, "more"])), said.append)
    assert said[0] == f"the text is not the one of {old.folder}; preparing it anew (that folder stays)"
    assert new.folder != old.folder
    assert new.fingerprint != old.fingerprint
    assert load_prepared(old.folder) == old
    assert prepare(config_for(tmp_path, "\n".join(LINES)), quiet) == old


def test_a_changed_tokenizer_file_is_noticed_and_the_old_folder_stays(tmp_path):
    vocabulary, said = tmp_path / "vocab.txt", []
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\nline\ntext\n")
    tokenizer = {"kind": "wordpiece", "path": str(vocabulary)}
    old = prepare(config_for(tmp_path, "\n".join(LINES), tokenizer=tokenizer), quiet)
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\nline\nof\ntext\n")
    new = prepare(config_for(tmp_path, "\n".join(LINES), tokenizer=tokenizer), said.append)
    assert said[0] == (
        f"the text or the file of tokenizer.path is not the one of {old.folder}; preparing it anew (that folder stays)"
    )
    assert new.split("train").num_unknown < old.split("train").num_unknown
    assert load_prepared(old.folder) == old
    vocabulary.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.path='.*vocab\.txt': cannot be read: No such file or directory\."):
        prepare(config_for(tmp_path, tokenizer=tokenizer), quiet)


def test_a_summary_is_printed_at_the_end(tmp_path):
    said: list[str] = []
    (tmp_path / "validation.txt").write_text("ax\nab\nxx yx\nba")
    prepare(config_for(tmp_path, "ab\n한", data={"validation": str(tmp_path / "validation.txt")}), said.append)
    assert len(said) == 3
    assert said[0].endswith(
        ": prepared in 0 s; 2 documents to train on and 4 to validate on, 14 tokens of 1.14 bytes, 42.86% of them "
        "[UNK], char vocabulary of 6"
    )
    assert said[1:] == [
        "50.0% of 4 validation documents come back exactly from their tokens; the others hold characters that the "
        "vocabulary has no token for",
        "3 characters have no token; how often the commonest occur: 'x' 4, ' ' 1, 'y' 1",
    ]


def test_the_ten_commonest_unknown_characters_are_printed_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.encoding._SAMPLE_DOCUMENTS", 3)
    said: list[str] = []
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[BOS]\na\n##a\nb\n")
    text = "".join(f"a{chr(0x3B1 + i)}a " * (i + 1) for i in range(12)) + "\n" + "a a aa " * 9
    (tmp_path / "validation.txt").write_text("aa\naa a\nA\nab ab\n")
    data = {"validation": str(tmp_path / "validation.txt")}
    config = config_for(tmp_path, text, data=data, tokenizer={"kind": "wordpiece", "path": str(tmp_path / "vocab.txt")})
    prepare(config, said.append)
    assert said[1] == (
        "66.7% of 3 validation documents come back exactly from their tokens, and 100.0% except for case, spaces and "
        "forms of characters: tokenizer.kind='wordpiece' does not keep those (tokenizer.lowercase=false keeps case, "
        "\"tokenizer={kind='bpe'}\" everything)"
    )
    listed = ", ".join(f"{chr(0x3B1 + i)!r} {i + 1}" for i in reversed(range(2, 12)))
    # The b has a token only at the start of a word.
    assert said[2] == f"13 characters have no token; how often the commonest occur: {listed}"


def test_what_does_not_come_back_exactly_is_told_apart_from_what_is_lost(tmp_path):
    said: list[str] = []
    text = "the cat , it is said .\n"
    (tmp_path / "validation.txt").write_text("The CAT, it  is said.\nthe\u200b cat\nﬁ Straße\nthe cat\nthe xat\n")
    data = {"validation": str(tmp_path / "validation.txt")}
    config = config_for(tmp_path, 9 * text + "fi strasse\n", data=data, tokenizer={"kind": "wordpiece"})
    prepare(config, said.append)
    assert said[1].startswith(
        "20.0% of 5 validation documents come back exactly from their tokens, and 80.0% except for case, spaces and "
    )


# What is warned of and refused.


def test_the_ways_out_of_too_small_a_vocabulary_lead_out(tmp_path):
    settings = config_for(tmp_path, "".join(chr(0xAC00 + i) + "\n" for i in range(300))).model_dump()
    settings["tokenizer"] = {"kind": "wordpiece", "vocabulary_size": 100, "lowercase": True}
    with pytest.raises(UserError, match="cannot hold the alphabet") as refused:
        prepare(make_config(settings), quiet)
    advice = re.search(r"Set (\S+), or (\S+) with (\S+), which spells everything, or (\S+)\.$", str(refused.value))
    size, bpe, no_size, char = advice.groups()
    for overrides in ([size], [bpe, no_size], [char]):
        prepare(make_config(settings, overrides), quiet)


def examples_of(tmp_path, documents, length=10, **data):
    """The lines that prepare prints about documents of these numbers of characters, each a token."""
    (tmp_path / "validation.txt").write_text("ab\n")
    said: list[str] = []
    text = "".join("ab"[i % 2] * n + "\n" for i, n in enumerate(documents))
    data = {"validation": str(tmp_path / "validation.txt"), "mode": "lines"} | data
    prepare(config_for(tmp_path, text, data=data, train={"sequence_length": length}), said.append)
    return [line for line in said if line.startswith("warning")]


def test_lines_mode_prints_what_it_leaves_out(tmp_path):
    cut = "of the documents, at train.sequence_length=10; data.mode='packed' uses all of them."
    assert examples_of(tmp_path, [10] * 9 + [9]) == []  # An end that does not fit is not a token of the text.
    assert examples_of(tmp_path, [10] * 9 + [40]) == [
        f"warning: lines mode leaves out 23% of the tokens, the ends of 10% {cut}"
    ]
    assert examples_of(tmp_path, [10] * 2000 + [11]) == [
        f"warning: lines mode leaves out less than 0.1% of the tokens, the ends of less than 0.1% {cut}"
    ]
    # The same lines are printed if the data is prepared already; packed, nothing is left out.
    assert len(examples_of(tmp_path, [10] * 2000 + [11])) == 1
    assert examples_of(tmp_path, [10] * 2000 + [11], mode="packed") == []


def test_leaving_out_more_than_half_of_the_text_is_an_error_with_both_ways_out(tmp_path):
    assert examples_of(tmp_path, [20] * 10) == [
        "warning: lines mode leaves out 50% of the tokens, the ends of 100% of the documents, at "
        "train.sequence_length=10; data.mode='packed' uses all of them."
    ]
    with pytest.raises(UserError) as refused:
        examples_of(tmp_path, [20] * 9 + [21])
    assert str(refused.value) == (
        "lines mode leaves out 50% of the tokens, the ends of 100% of the documents, at train.sequence_length=10; "
        "data.mode='packed' uses all of them. That is too much to leave out: set data.mode='packed', or raise "
        "train.sequence_length (the longest document has 21 tokens)."
    )
    assert examples_of(tmp_path, [20] * 9 + [21], mode="packed") == []
    assert examples_of(tmp_path, [20] * 9 + [21], length=21) == []


@pytest.mark.parametrize("predict_end", [True, False])
@pytest.mark.parametrize("documents", [[20] * 9 + [21], [1] * 10, [10] * 9 + [11]])
def test_the_way_out_of_lines_mode_leads_out(tmp_path, documents, predict_end):
    data = {"mode": "lines", "predict_end": predict_end}
    try:
        (advice,) = examples_of(tmp_path, documents, **data)
    except UserError as error:
        advice = str(error)
    settings = config_for(tmp_path, data={**data, "validation": str(tmp_path / "validation.txt")}).model_dump()
    overrides = re.search(r"(data\.mode='packed')(?: with (data\.predict_end=true))? (?:uses|has)", advice).groups()
    said: list[str] = []
    prepare(make_config(settings, filter(None, overrides)), said.append)
    assert not [line for line in said if line.startswith("warning")]


def prepared_by_own_text(tmp_path, name, content):
    """A text as configs/own_text.toml prepares it, and the line about its documents."""
    said: list[str] = []
    (tmp_path / name).write_bytes(content.encode())
    overrides = [f"data.train={tmp_path / name}", f"data.prepared_folder={tmp_path / 'prepared'}"]
    config = load_config("own_text", overrides)
    prepared = prepare(config, said.append)
    assert total_steps(prepared, config) > config.optimizer.warmup_steps
    assert not [line for line in said if line.startswith("warning")]
    assert any(line.startswith("100.0% of ") for line in said)
    return prepared, [line for line in said if "documents='auto'" in line]


def test_the_config_for_own_text_suits_a_list_a_play_and_records(tmp_path):
    names = "".join(f"{a}{b}{c}\n" for a in ("Ka", "Lo", "Mi") for b in "aeiou" for c in ("ra", "li", "son", "한"))
    prepared, said = prepared_by_own_text(tmp_path, "names.txt", names * 10)
    why = f"as {tmp_path}/names.txt has hardly any blank lines"
    assert said == [f"data.documents='auto': a line of a text file is a document, {why}"]
    assert prepared.split("train").num_documents + prepared.split("validation").num_documents == 600
    speeches = [f"NAME {i}:\nSir, I have {i} things\nto say." for i in range(120)]
    prepared, said = prepared_by_own_text(tmp_path, "play.txt", "\n\n".join(speeches))
    why = f"as {tmp_path}/play.txt has blank lines"
    assert said == [f"data.documents='auto': a paragraph of a text file is a document, {why}"]
    assert sorted(documents(prepared, "train") + documents(prepared, "validation")) == sorted(speeches)
    assert prepared.vocabulary_size < 400
    records = "".join(json.dumps({"text": f"Line {i}\n\nand more"}) + "\n" for i in range(200))
    prepared, said = prepared_by_own_text(tmp_path, "records.jsonl", records)
    assert said == []
    assert documents(prepared, "train")[0] == "Line 0\n\nand more"


@pytest.mark.slow
def test_the_config_for_own_text_makes_a_vocabulary_of_the_text_s_size(tmp_path, test_data):
    play = (test_data / "tinyshakespeare.txt").read_text("utf-8")
    reviews = gzip.decompress((test_data / "korean/paragraphs_train.txt.gz").read_bytes()).decode()
    sizes = [
        prepared_by_own_text(tmp_path, f"{i}.txt", text)[0].vocabulary_size
        for i, text in enumerate((play[:20_000], play, reviews))
    ]
    assert 300 < sizes[0] < 800 < 3000 < sizes[1] < 6000 < 12_000 < sizes[2] <= 16_384


def test_padding_is_warned_of_with_the_setting_that_mends_it(tmp_path):
    assert examples_of(tmp_path, [4] * 10) == []
    assert examples_of(tmp_path, [1] * 10) == [
        "warning: 80% of each batch is padding, as documents have 1 tokens on average and train.sequence_length=10; "
        "data.mode='packed' has no padding, a smaller train.sequence_length has less."
    ]
    assert examples_of(tmp_path, [1] * 10, mode="packed") == []
    assert examples_of(tmp_path, [1] * 10, mode="packed", length=128) == [
        "warning: 84% of an epoch is padding, as the text to train on has 20 tokens and train.sequence_length=128; "
        "lower it, or give more text."
    ]


def test_the_share_that_min_bytes_leaves_out_is_printed(tmp_path):
    said: list[str] = []
    data = {"validation": str(tmp_path / "text.txt"), "min_bytes": 4}
    prepare(config_for(tmp_path, "가\nabcd\nabcde\n가나다라\n", data=data), said.append)
    for setting in ("train", "validation"):
        assert f"data.{setting}: data.min_bytes=4 leaves out 50.0% of 4 lines, with 29.2% of the text" in said
    said.clear()
    data["min_bytes"] = 2
    prepare(config_for(tmp_path, data=data), said.append)
    assert not any("data.min_bytes" in line for line in said)


@pytest.mark.parametrize("mode", ["packed", "lines"])
def test_text_without_a_token_is_refused_before_any_training(tmp_path, mode):
    why = (
        "no token, because tokenizer.kind='wordpiece' keeps neither spaces nor control characters; give other text, or "
        "set \"tokenizer={kind='bpe'}\", which keeps everything."
    )
    (tmp_path / "empty.txt").write_text("\u200b\n\u200b\u200b\n")
    (tmp_path / "full.txt").write_text("ab\n")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[BOS]\na\n##b\n")
    trained, from_file = {"kind": "wordpiece"}, {"kind": "wordpiece", "path": str(tmp_path / "vocab.txt")}
    listed = f"=['{tmp_path}/empty.txt']: its 2 documents have"
    for setting, other, tokenizer, where in (
        ("train", "validation", trained, "data.train has"),
        ("train", "validation", from_file, f"data.train{listed}"),
        ("validation", "train", trained, f"data.validation{listed}"),
    ):
        data = {setting: str(tmp_path / "empty.txt"), other: str(tmp_path / "full.txt"), "mode": mode}
        train = {"sequence_length": 6}
        for _ in range(2):  # Prepared already, too.
            with pytest.raises(UserError) as refused:
                prepare(config_for(tmp_path, data=data, tokenizer=tokenizer, train=train), quiet)
            assert str(refused.value) == f"{where} {why}"
        settings = config_for(tmp_path, data=data, tokenizer=tokenizer, train=train).model_dump()
        prepare(make_config(settings, ["tokenizer={kind='bpe'}"]), quiet)
    full, empty = str(tmp_path / "full.txt"), str(tmp_path / "empty.txt")
    data = {"train": [full, full], "validation": [full, empty], "weights": [1, 1], "mode": mode}
    with pytest.raises(UserError, match=f"^data.validation=\\['{empty}'\\]: its 2 documents have no token"):
        prepare(config_for(tmp_path, data=data, tokenizer=trained, train=train), quiet)
    (tmp_path / "both.txt").write_text("ab\nab\n\u200b\n" * 2)
    fractions = (fraction / 100 for fraction in range(1, 100))
    only_the_empty_one = next(each for each in fractions if [is_held_out(t, each) for t in ("ab", "\u200b")] == [0, 1])
    data = {"train": str(tmp_path / "both.txt"), "held_out_fraction": only_the_empty_one, "mode": mode}
    with pytest.raises(UserError, match=r"^data.held_out_fraction=0.\d+ of data.train=.*its 2 documents have no token"):
        prepare(config_for(tmp_path, data=data, tokenizer=trained, train=train), quiet)


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_a_vocabulary_of_bytes_loses_nothing(tmp_path, kind):
    said: list[str] = []
    (tmp_path / "validation.txt").write_text("never seen: 한글\tЖ\u2028[BOS]  \n" * 3)
    data = {"validation": str(tmp_path / "validation.txt")}
    prepared = prepare(config_for(tmp_path, "ab\nba", data=data, tokenizer={"kind": kind}), said.append)
    assert documents(prepared, "validation") == ["never seen: 한글\tЖ\u2028[BOS]  "] * 3
    assert said[1:] == ["100.0% of 3 validation documents come back exactly from their tokens"]


def test_progress_is_printed_every_few_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.prepare._PROGRESS_SECS", 0.0)
    said: list[str] = []
    prepare(config_for(tmp_path, "ab\ncd", data={"held_out_fraction": 0.5, "documents": "file"}), said.append)
    assert re.fullmatch(
        r"reading for the vocabulary: 0 documents, 0.0 of 0.0 MB, \d+\.\d MB a second, 0:00:00 left", said[0]
    )
    assert said[-4].startswith("encoding: 1 documents, 0.0 of 0.0 MB, ")


def test_text_that_is_trained_and_validated_on_is_warned_of(tmp_path):
    said: list[str] = []
    prepare(config_for(tmp_path, "ab", data={"validation": str(tmp_path / "text.txt")}), said.append)
    assert said[0] == f"warning: {tmp_path}/text.txt is in data.train and in data.validation"


# Interrupted.


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("prepared/*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", [0, 1, 5])
def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch, error, when):
    monkeypatch.setattr("trainer.data.prepare._PROGRESS_SECS", 0.0)
    config, calls = config_for(tmp_path, "\n".join(LINES)), iter(range(when + 1))

    def interrupt(line: str) -> None:
        if next(calls) == when:
            raise error

    with pytest.raises(error):
        prepare(config, interrupt)
    assert left_behind(tmp_path) == []


KILLED = (
    "import os, signal, sys; from pathlib import Path; from test_prepare import *;"
    "from trainer.data import encoding, prepare as p; p._SAVE_SECS = 0.0; encoding._BATCH_BYTES = 100;"
    "left = int(sys.argv[2]); write = SplitWriter.write;\n"
    "def write_some(self, *arguments):\n"
    "    global left\n"
    "    left -= 1\n"
    "    if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
    "    write(self, *arguments)\n"
    "SplitWriter.write = write_some\n"
    "prepare(config_for(Path(sys.argv[1])), quiet, shard_tokens=1000)"
)


@pytest.mark.parametrize("num_writes", [0, 1, 7, 30])
def test_a_killed_preparation_leaves_nothing_usable_and_the_next_one_goes_on(tmp_path, monkeypatch, num_writes):
    texts = [f"{line} {i} 한글" for i, line in enumerate(LINES)]
    config = config_for(tmp_path, "\n".join(texts))
    whole = prepare(config, quiet, shard_tokens=1000)
    contents = file_contents(whole.folder)
    shutil.rmtree(whole.folder)

    assert run_python(KILLED, str(tmp_path), str(num_writes)).returncode == -signal.SIGKILL
    (partial,) = left_behind(tmp_path)
    assert partial.startswith(".partial-")
    said: list[str] = []
    encoded = pieces_encoded(monkeypatch)
    assert prepare(config, said.append, shard_tokens=1000) == whole
    assert file_contents(whole.folder) == contents
    assert left_behind(tmp_path) == [whole.folder.name]
    goes_on = "going on where another preparation was stopped"
    assert (goes_on in said) == (num_writes > 0)
    assert (texts[0] not in encoded) == (num_writes > 0)


def pieces_encoded(monkeypatch) -> list[str]:
    """A list that gets every piece that is encoded."""
    pieces: list[str] = []
    encode = CharTokenizer.encode_pieces

    def encode_and_count(self, new):
        pieces.extend(new)
        return encode(self, new)

    monkeypatch.setattr(CharTokenizer, "encode_pieces", encode_and_count)
    return pieces


def test_what_a_killed_preparation_left_damaged_is_begun_anew(tmp_path):
    config = config_for(tmp_path, "\n".join(LINES))
    whole = prepare(config, quiet, shard_tokens=1000)
    contents = file_contents(whole.folder)
    shutil.rmtree(whole.folder)
    run_python(KILLED, str(tmp_path), "30")
    (partial,) = left_behind(tmp_path)
    left = Path(shutil.copytree(tmp_path / "prepared" / partial, tmp_path / "left"))
    damages = {
        "train-00000.tokens": lambda data: b"?" + data[1:],
        "train-00001.offsets": lambda data: b"?" + data[1:],
        "tokenizer/settings.json": lambda data: b"?" + data[1:],
        "tokenizer/tokenizer.json": lambda data: b'{"model": {"vocab": []}}',
        # Which no shard would tell of, and the manifest would repeat.
        "progress.json": lambda data: data.replace(b'"_num_bytes": ', b'"_num_bytes": 1'),
    }
    for name, damage in [*damages.items(), ("progress.json", lambda data: b"[" * 100_000)]:
        shutil.rmtree(tmp_path / "prepared")
        path = Path(shutil.copytree(left, tmp_path / "prepared" / partial)) / name
        path.write_bytes(damage(path.read_bytes()))
        said: list[str] = []
        prepare(config, said.append, shard_tokens=1000)
        assert not any(line.startswith("going on") for line in said)
        assert file_contents(whole.folder) == contents


def test_ctrl_c_keeps_a_folder_that_the_next_preparation_goes_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.prepare._SAVE_SECS", 0.0)
    monkeypatch.setattr("trainer.data.encoding._BATCH_BYTES", 100)
    config = config_for(tmp_path, "\n".join(LINES))
    write, left = SplitWriter.write, iter(range(9))

    def interrupted(self, *arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(SplitWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, quiet)
    monkeypatch.setattr(SplitWriter, "write", write)
    said: list[str] = []
    prepare(config, said.append)
    assert said[0].startswith("going on where")


def test_another_process_at_work_is_not_disturbed_and_the_first_to_finish_wins(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.prepare._PROGRESS_SECS", 0.0)
    config, inner = config_for(tmp_path, "\n".join(LINES)), []

    def prepare_meanwhile(line: str) -> None:
        if not inner:
            assert len(left_behind(tmp_path)) == 1
            inner.append(None)
            inner.append(prepare(config, quiet))

    outer = prepare(config, prepare_meanwhile)
    assert outer == inner[1]
    assert left_behind(tmp_path) == [outer.folder.name]


def test_a_full_disk_is_an_error_naming_the_folder_and_leaves_nothing(tmp_path):
    program = (
        "import resource, sys; from test_prepare import *;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "prepare(config_for(Path(sys.argv[1])), quiet)"
    )
    config_for(tmp_path, "some text\n" * 30_000 + "\n".join(LINES))
    child = run_python(program, str(tmp_path))
    assert child.stderr.strip().split("\n")[-1] == (
        f"trainer.errors.UserError: data.prepared_folder='{tmp_path}/prepared': cannot be written: File too large. "
        "Raise the limit on a file's size (ulimit -f), or use a file system that allows larger files, or name another "
        "folder; nothing half-written is left."
    )
    assert left_behind(tmp_path) == []


def test_a_sync_that_fails_after_the_rename_reports_that_the_data_is_whole(tmp_path, monkeypatch):
    def fail(path):
        if path == tmp_path / "prepared":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("trainer.data.partial_folder.sync", fail)
    config = config_for(tmp_path, "\n".join(LINES))
    with pytest.raises(UserError, match=r"Input/output error\. The disk.* is whole, but a loss of power could still"):
        prepare(config, quiet)
    monkeypatch.undo()
    lines = []
    prepare(config, lines.append)
    assert "already prepared" in " ".join(lines)


def test_a_prepared_folder_that_cannot_be_is_an_error_naming_it(tmp_path):
    (tmp_path / "prepared").write_text("a file")
    with pytest.raises(UserError, match=r"data\.prepared_folder='.*prepared': cannot be written: "):
        prepare(config_for(tmp_path, "a\nb\nc\nd\ne"), quiet)


@pytest.mark.parametrize("text", ["", "\n \n", "a\0b", "just one line"])
def test_text_that_cannot_be_used_leaves_nothing(tmp_path, text):
    with pytest.raises(UserError):
        prepare(config_for(tmp_path, text, data={"held_out_fraction": 1e-9}), quiet)
    assert left_behind(tmp_path) == []


def test_a_line_of_50_megabytes_is_prepared(tmp_path):
    (tmp_path / "validation.txt").write_text("a")
    config = config_for(tmp_path, "0123456789" * 5_000_000, data={"validation": str(tmp_path / "validation.txt")})
    assert prepare(config, quiet).split("train").max_tokens == 50_000_000


# At size.


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak memory of one process")
def test_books_are_prepared_in_bounded_memory_and_time(test_data, tmp_path):
    program = (
        "import re, sys, time; from test_prepare import *;"
        "data = {'train': sys.argv[2], 'held_out_fraction': 0.01};"
        "prepare(config_for(Path(sys.argv[1]), data=data, tokenizer={'kind': 'wordpiece'}));"
        # Not getrusage: there a process starts with the peak of the one that started it.
        "status = Path('/proc/self/status').read_text();"
        "print(int(re.search(r'VmHWM:\\s*(\\d+) kB', status).group(1)) * 1024 / 1e9, time.process_time())"
    )
    child = run_python(program, str(tmp_path), str(test_data / "books/simple_train.txt.gz"))
    gigabytes, cpu_secs = map(float, child.stdout.strip().split("\n")[-1].split())
    assert gigabytes < 1.2
    assert cpu_secs < 80  # The CPU time of all threads: the clock would also measure other programs.


@pytest.mark.slow
def test_megabytes_without_a_space_are_one_document_of_known_tokens(tmp_path):
    (tmp_path / "validation.txt").write_text("a")
    config = config_for(
        tmp_path,
        "0123456789" * 1_000_000,
        data={"validation": str(tmp_path / "validation.txt")},
        tokenizer={"kind": "wordpiece", "vocabulary_size": 100},
    )
    split = prepare(config, quiet).split("train")
    assert (split.num_documents, split.num_unknown) == (1, 0)


# Hidden folders, and who may take them up.


@pytest.fixture
def left_by_a_killed_one(tmp_path) -> Path:
    """What a killed preparation left that has something to go on with; the text is in text.txt beside."""
    config_for(tmp_path, "\n".join(LINES))
    run_python(KILLED, str(tmp_path), "30")
    (partial,) = (tmp_path / "prepared").iterdir()
    return partial


def test_a_link_in_place_of_a_hidden_folder_is_neither_followed_nor_emptied(tmp_path, left_by_a_killed_one):
    victim = left_by_a_killed_one.rename(tmp_path / "victim")
    (victim / "diary").write_text("mine")
    before = file_contents(victim)
    left_by_a_killed_one.symlink_to(victim)
    prepared = prepare(config_for(tmp_path), quiet, shard_tokens=1000)
    assert file_contents(victim) == before
    assert left_behind(tmp_path) == sorted([left_by_a_killed_one.name, prepared.folder.name])


def test_a_link_in_a_hidden_folder_is_removed_and_not_followed(tmp_path, left_by_a_killed_one):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/diary").write_text("mine")
    (left_by_a_killed_one / "progress.json").unlink()
    shutil.rmtree(left_by_a_killed_one / "tokenizer")
    (left_by_a_killed_one / "tokenizer").symlink_to(tmp_path / "victim")
    prepared = prepare(config_for(tmp_path), quiet, shard_tokens=1000)
    assert file_contents(tmp_path / "victim") == {"diary": b"mine"}
    assert left_behind(tmp_path) == [prepared.folder.name]


def test_a_hidden_folder_of_another_user_is_not_touched(tmp_path, left_by_a_killed_one, monkeypatch):
    before = file_contents(left_by_a_killed_one)
    owner = left_by_a_killed_one.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    said: list[str] = []
    prepared = prepare(config_for(tmp_path), said.append, shard_tokens=1000)
    assert not any(line.startswith("going on") for line in said)
    assert file_contents(left_by_a_killed_one) == before
    assert left_behind(tmp_path) == sorted([left_by_a_killed_one.name, prepared.folder.name])


def test_hosts_whose_flock_is_only_their_own_do_not_take_each_others_folder(tmp_path, monkeypatch):
    """On NFS a flock of a folder is granted on each host; another host is a process here that is granted each."""
    monkeypatch.setattr("trainer.data.prepare._PROGRESS_SECS", 0.0)
    config, outputs = config_for(tmp_path, "\n".join(LINES)), []
    on_another_host = (
        "import fcntl, sys; fcntl.flock = lambda *_: None; from pathlib import Path; from test_prepare import *;"
        "print(prepare(config_for(Path(sys.argv[1])), quiet).fingerprint)"
    )

    def prepare_elsewhere_meanwhile(line: str) -> None:
        if not outputs:
            (partial,) = left_behind(tmp_path)
            outputs.append(run_python(on_another_host, str(tmp_path)).stdout.strip())
            assert partial in left_behind(tmp_path)

    prepared = prepare(config, prepare_elsewhere_meanwhile)
    assert outputs == [prepared.fingerprint]
    assert left_behind(tmp_path) == [prepared.folder.name]
    assert load_prepared(prepared.folder) == prepared


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_takes_only_one_folder(tmp_path, left_by_a_killed_one, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr("fcntl.lockf", no_locks)
    before, said = file_contents(left_by_a_killed_one), []
    handles = len(list(Path("/dev/fd").iterdir()))
    prepared = prepare(config_for(tmp_path), said.append, shard_tokens=1000)
    assert len(list(Path("/dev/fd").iterdir())) == handles
    assert left_behind(tmp_path) == sorted([left_by_a_killed_one.name, prepared.folder.name])
    assert file_contents(left_by_a_killed_one) == before
    assert said[0] == (
        f"warning: {left_by_a_killed_one} stays, as it cannot be locked: {os.strerror(number)}; "
        "if no process prepares, delete it"
    )
