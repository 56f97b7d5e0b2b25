"""Laws of tokenizers from files: a saved one is checked, another tool's is used unchanged, or refused by name."""

import json
import os
import subprocess

import pytest
import tokenizers
from every_kind import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    EVERY_KIND,
    bpe_of_every_kind,
    wordpiece_of_every_kind,
    write_as_gpt2,
)
from tokenizers import Tokenizer as HuggingFaceTokenizer

from trainer.config.settings import BpeFileConfig, WordPieceFileConfig
from trainer.errors import UserError
from trainer.tokenizers.characters import CharTokenizer
from trainer.tokenizers.tokenizer_files import load_tokenizer, train_tokenizer
from trainer.tokenizers.vocabulary import SPECIAL_TOKENS
from trainer.tokenizers.wordpiece import WordPieceTokenizer


@pytest.fixture
def every_kind():
    return wordpiece_of_every_kind()


@pytest.fixture
def bpe():
    return bpe_of_every_kind()


@pytest.fixture
def gpt2_file(tmp_path):
    return write_as_gpt2(bpe_of_every_kind(), tmp_path / "gpt2.json")


def test_a_changed_vocabulary_is_refused(tmp_path, every_kind):
    every_kind.save(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text("utf-8").replace("\nthe\n", "\nhte\n"), "utf-8")
    with pytest.raises(UserError, match=rf"{tmp_path}: the tokenizer has fingerprint .* a file was changed\. Restore"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["settings.json", "vocab.txt"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"\xff{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("[" * 100_000),
        # Settings without a fingerprint, and a vocabulary with a token of no characters, which tensorflow_text refuses.
        lambda path: path.write_text(
            path.read_text("utf-8").replace('"fingerprint"', '"print"').replace("\nthe\n", "\n\n")
        ),
    ],
)
def test_a_damaged_tokenizer_is_an_error_naming_the_folder(tmp_path, every_kind, name, damage):
    every_kind.save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UserError, match=rf"{tmp_path}: (not a whole tokenizer|the tokenizer has fingerprint)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text(path.read_text("utf-8").replace("[BOS]", "[EOS]"), "utf-8"),
        lambda path: path.write_text(path.read_text("utf-8").replace('"dropout": null', '"dropout": 0.1'), "utf-8"),
        lambda path: path.write_text("[" * 100_000),
    ],
)
def test_a_damaged_bpe_tokenizer_is_an_error_naming_the_folder(tmp_path, bpe, damage):
    bpe.save(tmp_path)
    damage(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=rf"{tmp_path}: (not a whole tokenizer|the tokenizer has fingerprint)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("vocabulary", ["[]", "{}", '{"a": 1, "bc": 2}', '{"a": "x", "b": 1}', "7", "[" * 100_000])
def test_a_damaged_char_tokenizer_is_an_error_naming_the_folder(tmp_path, vocabulary):
    CharTokenizer([*SPECIAL_TOKENS, "a"]).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(f'{{"model": {{"vocab": {vocabulary}}}}}')
    with pytest.raises(UserError, match=rf"{tmp_path}: (not a whole tokenizer|the tokenizer has fingerprint)"):
        load_tokenizer(tmp_path)


def test_gpt_2_s_layout_begins_documents_and_pads_with_its_end_of_text(gpt2_file, bpe, tmp_path):
    tokenizer = train_tokenizer(BpeFileConfig(kind="bpe", path=str(gpt2_file)), [])
    assert tokenizer.vocabulary_size == bpe.vocabulary_size - 1
    assert tokenizer.bos_id == tokenizer.pad_id == tokenizer.vocabulary_size - 1
    assert tokenizer.encode(EVERY_KIND).tolist() == (bpe.encode(EVERY_KIND) - 2).tolist()
    theirs = HuggingFaceTokenizer.from_file(str(gpt2_file))
    assert tokenizer.encode(EVERY_KIND).tolist() == theirs.encode(EVERY_KIND).ids
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.json").read_bytes() == gpt2_file.read_bytes()
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.fingerprint, loaded.bos_id) == (tokenizer.fingerprint, tokenizer.bos_id)


def test_settings_for_training_in_a_file_are_left_out(gpt2_file):
    file = json.loads(gpt2_file.read_text("utf-8"))
    plain = train_tokenizer(BpeFileConfig(kind="bpe", path=str(gpt2_file)), [])
    file["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file["model"]["dropout"] = 0.9
    gpt2_file.write_text(json.dumps(file), "utf-8")
    tokenizer = train_tokenizer(BpeFileConfig(kind="bpe", path=str(gpt2_file)), [])
    assert tokenizer.encode(EVERY_KIND).tolist() == plain.encode(EVERY_KIND).tolist()


BERT = [
    "[PAD]",
    "[unused0]",
    "[unused1]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "fox",
    "a",
    "##b",
    "b",
    "!",
    "cafe",
]


@pytest.mark.parametrize("name", ["vocab.txt", "windows.txt", "cut_short.txt", "tokenizer.json"])
def test_bert_s_special_tokens_are_found_by_name(tmp_path, name):
    content = "\n".join(BERT) + "\n"
    if name == "windows.txt":
        content = content.replace("\n", "\r\n")
    if name == "cut_short.txt":
        content = content.removesuffix("\n")
    if name == "tokenizer.json":
        from tokenizers import models

        content = HuggingFaceTokenizer(
            models.WordPiece({t: id for id, t in enumerate(BERT)}, unk_token="[UNK]")
        ).to_str()
    (tmp_path / name).write_bytes(content.encode())
    tokenizer = train_tokenizer(WordPieceFileConfig(kind="wordpiece", path=str(tmp_path / name)), [])
    assert (tokenizer.pad_id, tokenizer.unknown_id, tokenizer.bos_id) == (0, 3, 4)
    assert tokenizer.vocabulary_size == len(BERT)
    assert tokenizer.encode("The fox! AB zebra [CLS]").tolist() == [7, 8, 12, 9, 10, 3, 3, 3, 3]
    assert tokenizer.decode([4, 7, 8, 0, 0]) == "the fox"
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.fingerprint, loaded.bos_id, loaded.vocabulary) == (tokenizer.fingerprint, 4, BERT)


def test_a_saved_vocabulary_can_be_used_for_other_text(tmp_path, every_kind, bpe):
    every_kind.save(tmp_path / "wordpiece")
    bpe.save(tmp_path / "bpe")
    for name in ("vocab.txt", "tokenizer.json"):
        config = WordPieceFileConfig(kind="wordpiece", path=str(tmp_path / "wordpiece" / name))
        assert train_tokenizer(config, []).fingerprint == every_kind.fingerprint
    config = BpeFileConfig(kind="bpe", path=str(tmp_path / "bpe/tokenizer.json"))
    assert train_tokenizer(config, []).fingerprint == bpe.fingerprint


def changed_json(**changes):
    """A damage to a tokenizer.json: settings replaced, of the model where their names begin with model_."""

    def change(content: bytes) -> bytes:
        file = json.loads(content)
        for key, value in changes.items():
            (file["model"] if key.startswith("model_") else file)[key.removeprefix("model_")] = value
        return json.dumps(file).encode()

    return change


def with_added_token(content: bytes, name: str) -> bytes:
    encoder = tokenizers.Tokenizer.from_str(content.decode())
    encoder.add_tokens([name])
    return encoder.to_str().encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: None, "cannot be read: No such file or directory"),
        (lambda content: b"[PAD]\n[UNK]\n[BOS]\n", "not a tokenizer.json of Hugging Face"),
        (lambda content: b"{}", "not a tokenizer.json of Hugging Face"),
        (lambda content: content.replace(b"<|endoftext|>", b"<|other|>"), "no token named [BOS] or [CLS] or <s> or"),
        (changed_json(model_merges=[], model_vocab={"a": 0, "<|endoftext|>": 1}), "no token for 255 of the 256 bytes"),
        (lambda content: content.replace(b'"!": 0,', b'"!": 1,'), "two tokens have the same number; give"),
        (
            lambda content: content.replace(b'"!": 0,', b'"!": 4294967290,'),
            "token numbers up to 4294967290, for ",
        ),
        (changed_json(normalizer={"type": "NFC"}), "a text does not come back from its tokens"),
        (changed_json(normalizer={"type": "Lowercase"}), "a text does not come back from its tokens"),
        (changed_json(decoder=None), "a text does not come back from its tokens"),
        (
            changed_json(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
            "a text does not come back from its tokens",
        ),
        (lambda content: with_added_token(content, "é"), "a text with the added token 'é' does not come back from its"),
        (
            changed_json(
                model_type="WordPiece", model_unk_token="<|endoftext|>", model_max_input_chars_per_word=100,
                model_continuing_subword_prefix="##",
            ),
            "a WordPiece vocabulary, and not BPE",
        ),
    ],
)  # fmt: skip
def test_a_bpe_file_that_cannot_be_used_is_an_error_naming_it(gpt2_file, damage, message):
    content = damage(gpt2_file.read_bytes())
    gpt2_file.unlink() if content is None else gpt2_file.write_bytes(content)
    with pytest.raises(UserError) as error:
        train_tokenizer(BpeFileConfig(kind="bpe", path=str(gpt2_file)), [])
    assert str(error.value).startswith(f"tokenizer.path={str(gpt2_file)!r}: {message}")
    if content is not None:
        assert str(error.value).endswith("; give a tokenizer.json of byte-level BPE, such as GPT-2's.")


def test_tokens_of_a_text_decode_to_its_bytes_those_added_to_a_bpe_file_too(gpt2_file):
    gpt2_file.write_bytes(with_added_token(gpt2_file.read_bytes(), "한국"))
    tokenizer = train_tokenizer(BpeFileConfig(kind="bpe", path=str(gpt2_file)), [])
    text = "그 한국, e\u0301 🙂"
    tokens = tokenizer.encode(text)
    assert tokenizer.encoder.token_to_id("한국") in tokens
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decoded_bytes()[tokens].sum() == len(text.encode())


@pytest.mark.parametrize(
    "as_file",
    [
        lambda tokens: "\ufeff" + "\n".join(tokens),
        lambda tokens: "".join(f"{token} \n" for token in tokens) + "\n \n\n",
        lambda tokens: "".join(f"{token}\t\r\n" for token in tokens),
        lambda tokens: "\n".join([*tokens[:-1], f"{tokens[-1]}  "]),
        lambda tokens: "".join(f"{token}\t{id}\n" for id, token in enumerate(tokens)),
        lambda tokens: "\ufeff" + "".join(f"{token} {id}\r\n" for id, token in [*enumerate(tokens)][::-1]),
    ],
)
def test_a_vocabulary_has_all_its_tokens_with_a_mark_blanks_and_numbers(tmp_path, as_file):
    path = tmp_path / "vocab.txt"
    path.write_text(as_file(BERT), "utf-8", newline="")
    assert train_tokenizer(WordPieceFileConfig(kind="wordpiece", path=str(path)), []).vocabulary == BERT


def test_a_tokenizer_json_may_begin_with_a_mark_and_have_capitals_in_its_suffix(gpt2_file, tmp_path):
    plain = train_tokenizer(BpeFileConfig(kind="bpe", path=str(gpt2_file)), [])
    marked = tmp_path / "GPT2.JSON"
    marked.write_bytes(b"\xef\xbb\xbf" + gpt2_file.read_bytes())
    tokenizer = train_tokenizer(BpeFileConfig(kind="bpe", path=str(marked)), [])
    assert tokenizer.fingerprint == plain.fingerprint
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == plain.fingerprint
    WordPieceTokenizer(BERT, lowercase=True).save(tmp_path / "wordpiece")
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "wordpiece/tokenizer.json").read_bytes())
    assert train_tokenizer(WordPieceFileConfig(kind="wordpiece", path=str(marked)), []).vocabulary == BERT


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_vocabulary_in_another_encoding_is_refused_with_the_command_that_mends_it(tmp_path, encoding):
    path = tmp_path / "vocab's.txt"
    path.write_text("\n".join([*BERT, "한"]), encoding)
    config = WordPieceFileConfig(kind="wordpiece", path=str(path))
    with pytest.raises(
        UserError, match=r"tokenizer\.path=.*: (UTF-16, by its|not UTF-8 at byte offset 149; it looks like UTF-16LE)"
    ) as error:
        train_tokenizer(config, [])
    (command,) = [line[2:] for line in str(error.value).splitlines() if line.startswith("  ")]
    subprocess.run(["bash", "-c", command], check=True)
    assert train_tokenizer(config, []).vocabulary == [*BERT, "한"]


def test_a_vocabulary_that_can_be_read_only_once_or_without_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(UserError, match=r"tokenizer\.path=.* is not a file; write its content into one"):
            train_tokenizer(WordPieceFileConfig(kind="wordpiece", path=path), [])


def test_words_that_go_on_after_a_space_are_refused(gpt2_file):
    file = json.loads(gpt2_file.read_text("utf-8"))
    file["pre_tokenizer"]["use_regex"] = False
    vocabulary = file["model"]["vocab"]
    vocabulary["eĠ"] = len(vocabulary)
    file["model"]["merges"].insert(0, "e Ġ")
    gpt2_file.write_text(json.dumps(file), "utf-8")
    with pytest.raises(UserError, match=r"gpt2\.json': words do not end before spaces; give a tokenizer\.json"):
        train_tokenizer(BpeFileConfig(kind="bpe", path=str(gpt2_file)), [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: Is a directory"),
        ("\n".join(BERT).replace("[UNK]", "<unk>"), "no token named [UNK]"),
        ("\n".join(BERT).replace("[PAD]", "pad"), "no token named [PAD] or <pad>"),
        ("\n".join(BERT).replace("[CLS]", "cls"), "no token named [BOS] or [CLS]"),
        ("\n".join([*BERT, "the"]), "the token 'the' is there twice"),
        ("\n".join([*BERT, "", "x"]), f"line {len(BERT) + 1}, '', is not a token: it is empty, or holds a tab"),
        ("a text of\nsomething", "no token named [PAD]"),
        ("\n".join([*BERT, "x\ty"]), f"line {len(BERT) + 1}, 'x\\ty', is not a token: it is empty, or holds a tab"),
        ("\r".join(BERT), "line 1, '"),
        (
            "\n".join(f"{token}\t{-id / 3}" for id, token in enumerate(BERT)),
            f"the numbers after its {len(BERT)} tokens",
        ),
        (
            "\n".join(f"{token}\t{id + 1}" for id, token in enumerate(BERT)),
            f"the numbers after its {len(BERT)} tokens",
        ),
        ("\n".join(f"{token} 0" for token in BERT), f"the numbers after its {len(BERT)} tokens are not 0"),
        ("\n".join([*BERT, "x" * 257]), "Vocab token utf8 length (excluding suffix indicator) exceeds the max"),
        (
            "\n".join([*BERT, "The", "US"]),
            "2 tokens have capitals, such as 'The', which no text has with tokenizer.lowercase=true; set that to false",
        ),
    ],
)
def test_a_wordpiece_file_that_cannot_be_used_is_an_error_naming_it(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.mkdir() if content is None else path.write_text(content, "utf-8")
    with pytest.raises(UserError) as error:
        train_tokenizer(WordPieceFileConfig(kind="wordpiece", path=str(path)), [])
    assert str(error.value).startswith(f"tokenizer.path={str(path)!r}: {message}")


def test_a_bpe_file_is_not_a_wordpiece_file(gpt2_file):
    with pytest.raises(UserError, match=r"a BPE vocabulary, and not WordPiece; give a vocab.txt or tokenizer.json of"):
        train_tokenizer(WordPieceFileConfig(kind="wordpiece", path=str(gpt2_file)), [])


def test_capitals_are_kept_with_a_cased_file(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT, "The"]), "utf-8")
    config = WordPieceFileConfig(kind="wordpiece", path=str(tmp_path / "vocab.txt"), lowercase=False)
    assert train_tokenizer(config, []).encode("The the").tolist() == [len(BERT), 7]
