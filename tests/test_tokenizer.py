import itertools
import json
import os
import random
import re
import subprocess
import sys

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf
import tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from trainer.config import BpeConfig, BpeFileConfig, ByteConfig, CharConfig, WordPieceConfig, WordPieceFileConfig
from trainer.data.bpe import _WORDS, BpeTokenizer
from trainer.data.characters import ByteTokenizer, CharTokenizer
from trainer.data.cutting import BPE_BREAKS, WORDPIECE_BREAKS, cut
from trainer.data.files import read_documents
from trainer.data.tokenizer_files import load_tokenizer, train_tokenizer
from trainer.data.vocabulary import BYTE_SPECIAL_TOKENS, SPECIAL_TOKENS
from trainer.data.wordpiece import WordPieceTokenizer
from trainer.errors import UserError

# A little of everything the pretokenizer treats in its own way: ideographs, half and full width, signs that fold into
# several characters, combining marks, no-break and ideographic spaces, format characters, emoji, text without spaces.
EVERY_KIND = """The quick brown fox, "jumps" over the lazy dog's back -- 1,234.50 times!? (naïve café ÅNGSTRÖM straße)
다람쥐 헌 쳇바퀴에 타고파. 영화 ㅋㅋㅋ ㅠㅠ 진짜 재밌다!! ㅎㅎ
我能吞下玻璃而不傷身體。私はガラスを食べられます。ｱｲｳ ＡＢＣ＋１２３
Ωμέγα ΣΊΣΥΦΟΣ съешь ещё этих мягких французских булок, שלום עולם مرحبا بالعالم हिन्दी में परीक्षण
เป็นมนุษย์สุดประเสริฐเลิศคุณค่ากว่าบรรดาฝูงสัตว์เดรัจฉาน … ½ ℀ ﬁn ⅷ ´ ¨ ™ x℀y a\u00a0b\u3000c a\u200bb\u00adc e\u0301 n\u0303
[BOS] [UNK] ## #hash ##tag _under_score e-mail@host.example 🙂🇰🇷👩‍👩‍👧 ᎣᏏᏲ ꭣꮟꮂ \u2028 ㆍ ＃ ﹟ ︵ … "a"…b"""


@pytest.fixture(scope="module")
def every_kind():
    return train_tokenizer(WordPieceConfig(kind="wordpiece", vocabulary_size=1000), EVERY_KIND.split("\n"))


@pytest.fixture(scope="module")
def every_kind_cased(every_kind):
    return WordPieceTokenizer(every_kind.vocabulary, lowercase=False)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(BpeConfig(kind="bpe", vocabulary_size=1000), EVERY_KIND.split("\n") * 3)


@pytest.fixture
def gpt2_file(tmp_path, bpe):
    """A tokenizer.json laid out as GPT-2's: the bytes, the merges, and <|endoftext|> at the end; no padding."""
    file = json.loads(bpe.file)
    tokens = sorted(file["model"]["vocab"], key=file["model"]["vocab"].get)[len(BYTE_SPECIAL_TOKENS) :]
    file["model"]["vocab"] = {token: id for id, token in enumerate([*tokens, "<|endoftext|>"])}
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    file["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    file["added_tokens"] = [{"id": len(tokens), "content": "<|endoftext|>", **flags}]
    file["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(file), "utf-8")
    return path


def nasty_texts(count: int) -> list[str]:
    """Random texts of what tokenizers get wrong: runs of blanks of all kinds, marks, contractions, special tokens."""
    draw = random.Random(0)
    parts = [
        *" \t\n\r\u00a0\u3000\u2028\x0b\x1c\u200b\u0303\u1161_'\"", "  ", "    ", "\r\n", "\n\n", " \n ", "'s", "'ll",
        "n't", "ab", "A", "1", "234", "½", "한글", "ㅋㅋ", "我能", "。", "、", ",", ".", "...", "!?", "🙂", "ไม่",
        "é", "e\u0301", "ﬁ", "\U0010ffff", "[BOS]", "[PAD]", "[UNK]", "<|endoftext|>", "<s>", "Ġ", "##a",
    ]  # fmt: skip
    return ["".join(draw.choices(parts, k=draw.randint(0, 40))) for _ in range(count)]


def plain_keras_tokens(tokenizer: WordPieceTokenizer, texts: list[str]) -> list[list[int]]:
    """What keras_nlp's own layer gives in a graph, as in the tutorial's tf.data pipeline."""
    layer = keras_nlp.tokenizers.WordPieceTokenizer(tokenizer.vocabulary, lowercase=tokenizer.lowercase)
    return tf.function(layer.tokenize, autograph=False)(tf.constant(texts)).to_list()


def lists(arrays: list[np.ndarray]) -> list[list[int]]:
    return [array.tolist() for array in arrays]


# The vocabulary.


def test_special_tokens_come_first_then_every_character(every_kind):
    vocabulary = every_kind.vocabulary
    assert tuple(vocabulary[:3]) == SPECIAL_TOKENS == ("[PAD]", "[UNK]", "[BOS]")
    assert (every_kind.pad_id, every_kind.unknown_id, every_kind.bos_id) == (0, 1, 2)
    assert len(set(vocabulary)) == len(vocabulary) == every_kind.vocabulary_size
    single = [len(token.removeprefix("##")) == 1 for token in vocabulary[3:]]
    assert single == sorted(single, reverse=True)


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_text_a_vocabulary_was_trained_on_has_no_unknown_token(lowercase):
    config = WordPieceConfig(kind="wordpiece", vocabulary_size=1000, lowercase=lowercase, sample_bytes=10)
    tokenizer = train_tokenizer(config, EVERY_KIND.split("\n"))  # However little of it the sample holds.
    assert tokenizer.unknown_id not in np.concatenate(tokenizer.encode_batch(EVERY_KIND.split("\n")))


def test_any_word_of_seen_characters_has_tokens(every_kind):
    draw = random.Random(0)
    # As normalized; but for marks and parts of Hangul syllables, which would compose to characters not seen.
    letters = [token for token in every_kind.vocabulary[3:] if len(token) == 1 and token.isalnum() and token < "\uffff"]
    letters = [letter for letter in letters if not "\u1100" <= letter <= "\u11ff"]
    words = ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(5000)]
    assert every_kind.unknown_id not in np.concatenate(every_kind.encode_batch(words))


@pytest.mark.slow
def test_the_vocabulary_is_the_same_in_another_process(every_kind, bpe):
    program = (
        "import sys; from trainer.config import *;"
        "from trainer.data.tokenizer_files import train_tokenizer;"
        "text = sys.stdin.buffer.read().decode().split('\\n');"
        "wordpiece = train_tokenizer(WordPieceConfig(kind='wordpiece', vocabulary_size=1000), text);"
        "bpe = train_tokenizer(BpeConfig(kind='bpe', vocabulary_size=1000), text * 3);"
        "print(wordpiece.fingerprint, bpe.fingerprint)"
    )
    for_child = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", program], input=EVERY_KIND.encode(), env=for_child, capture_output=True, check=True
    )
    assert child.stdout.decode().split() == [every_kind.fingerprint, bpe.fingerprint]


# Encoding.


def test_tokens_are_those_of_plain_keras_nlp_but_for_words_over_100_bytes(every_kind):
    texts = [*EVERY_KIND.split("\n"), "", " \t", "never seen: ж 漢 Ж\u0301"]
    ours, theirs = lists(every_kind.encode_batch(texts)), plain_keras_tokens(every_kind, texts)
    thai = next(i for i, text in enumerate(texts) if "มนุษย์" in text)
    assert [i for i in range(len(texts)) if ours[i] != theirs[i]] == [thai]
    assert theirs[thai][0] == every_kind.unknown_id


@pytest.mark.parametrize("lowercase", [True, False])
def test_plain_ascii_goes_another_way_to_the_tokens_of_keras_nlp(lowercase):
    draw = random.Random(0)
    of_ascii = [chr(code) for code in range(128)]
    alphabets = [
        of_ascii[32:127],
        [*of_ascii[32:127], *" \t\n\r\x0b\f"],
        [*of_ascii, "\u00a0", "é", "한", "##", "[UNK]"],
    ]
    texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 60))) for alphabet in alphabets for _ in range(3000)]
    # A blank that folds into a space makes one a token; and some characters have none.
    config = WordPieceConfig(kind="wordpiece", vocabulary_size=700, lowercase=lowercase)
    tokenizer = train_tokenizer(config, [text.replace("~", "") for text in texts])
    assert not lowercase or {" ", "## "} & set(tokenizer.vocabulary)
    expected = plain_keras_tokens(tokenizer, texts)
    assert lists(tokenizer.encode_batch(texts)) == expected
    assert lists(tokenizer.encode_batch(texts[:3000])) == expected[:3000]  # Plain all of them.
    assert any(tokenizer.unknown_id in tokens for tokens in expected[:3000])


def test_a_word_of_any_length_has_tokens(every_kind):
    for length in (99, 100, 101, 5000):
        tokens = every_kind.encode("q" * length)
        assert every_kind.unknown_id not in tokens
        assert every_kind.decode(tokens) == "q" * length


def test_special_tokens_written_in_a_text_are_ordinary_text(every_kind):
    tokens = every_kind.encode("[PAD] [UNK] [BOS]")
    assert not set(tokens.tolist()) & {0, 1, 2}
    assert every_kind.decode(tokens) == "[ pad ] [ unk ] [ bos ]"


def test_lowercase_false_keeps_case():
    config = WordPieceConfig(kind="wordpiece", vocabulary_size=50, lowercase=False)
    tokenizer = train_tokenizer(config, ["Ab aB"])
    assert tokenizer.decode(tokenizer.encode("Ab bA")) == "Ab bA"


def test_a_batch_is_encoded_like_its_texts_one_by_one(every_kind):
    texts = ["", *EVERY_KIND.split("\n"), "", "a " * 40_000, ""]
    batch = every_kind.encode_batch(texts)
    assert lists(batch) == [every_kind.encode(text).tolist() for text in texts]
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}
    assert every_kind.encode_batch([]) == []


@pytest.mark.parametrize("num_chars", [1, 2, 7, 64])
@pytest.mark.parametrize("lowercase", [True, False])
def test_the_tokens_of_pieces_are_the_tokens_of_the_whole(num_chars, lowercase, every_kind, every_kind_cased):
    tokenizer = every_kind if lowercase else every_kind_cased
    # Words longer than twice num_chars would be cut themselves.
    text = " ".join(word for word in EVERY_KIND.split(" ") if num_chars > 60 or len(word) < 2)
    pieces = list(cut(text, WORDPIECE_BREAKS, num_chars))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    tokens, lengths = tokenizer.encode_pieces(pieces)
    assert tokens.tolist() == tokenizer.encode(text).tolist()
    assert lengths.sum() == len(tokens)


# Decoding.


def test_hangul_comes_back_as_it_went_in(every_kind):
    for text in ("다람쥐 헌 쳇바퀴에 타고파", "영화 ㅋㅋㅋ ㅠㅠ 진짜 ㅎㅎ", "ㅋ 타ㅋㅋ"):
        assert every_kind.decode(every_kind.encode(text)) == text


def test_words_are_put_together_as_by_keras_nlp():
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[BOS]",
        "##",
        "#",
        "##a",
        "a",
        "b",
        "##b",
        "##'",
        "'",
        "##한",
        "a##b",
        "####",
        "###",
    ]
    tokenizer = WordPieceTokenizer(vocabulary, lowercase=False)
    layer = keras_nlp.tokenizers.WordPieceTokenizer(vocabulary)
    draw = np.random.default_rng(0)
    for length in draw.integers(1, 6, 300):
        tokens = draw.choice([1, *range(3, len(vocabulary))], length).astype(np.int32)
        assert tokenizer.decode(tokens) == layer.detokenize(tokens)


def test_padding_and_bos_are_left_out_of_the_text(every_kind):
    tokens = every_kind.encode("the quick fox")
    assert every_kind.decode([2, *tokens, 0, 0]) == "the quick fox"
    assert every_kind.decode(np.array([2, 0], np.int32)) == every_kind.decode([]) == ""


# Files.


def test_a_saved_tokenizer_comes_back_the_same(tmp_path, every_kind, bpe):
    char = CharTokenizer([*SPECIAL_TOKENS, "\n", "\r", '"', "a", "\u2028", "한", "🙂"])
    for tokenizer in (every_kind, char, bpe, ByteTokenizer()):
        tokenizer.save(tmp_path / tokenizer.kind)
        loaded = load_tokenizer(tmp_path / tokenizer.kind)
        for name in ("kind", "fingerprint", "vocabulary_size", "pad_id", "unknown_id", "bos_id"):
            assert getattr(loaded, name) == getattr(tokenizer, name)
        assert loaded.encode(EVERY_KIND).tolist() == tokenizer.encode(EVERY_KIND).tolist()


def test_a_token_of_blanks_comes_back(tmp_path):
    tokenizer = WordPieceTokenizer([*SPECIAL_TOKENS, "a\rb", "c ", "d"], lowercase=True)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_keras_nlp_reads_the_vocabulary_file(tmp_path):
    from keras.src.saving import serialization_lib

    text = "The quick café, 다람쥐 ´ ㅋㅋ"
    tokenizer = train_tokenizer(WordPieceConfig(kind="wordpiece", vocabulary_size=100), [text])
    tokenizer.save(tmp_path)
    with serialization_lib.SafeModeScope(False):  # It takes any file name for a risk.
        layer = keras_nlp.tokenizers.WordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=True)
    text = text.replace("´", "")  # Folds into a blank and a mark; keras_nlp strips the blank when it reads the file.
    assert np.asarray(layer(text)).tolist() == tokenizer.encode(text).tolist()


def test_hugging_face_reads_the_file_and_gives_the_same_tokens_on_plain_text(tmp_path, every_kind):
    every_kind.save(tmp_path)
    twin = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*EVERY_KIND.split("\n")[:2], "ΣΊΣΥΦΟΣ Οδυσσεύς съешь ещё"]:
        assert twin.encode(text).ids == every_kind.encode(text).tolist()
    assert twin.decode(every_kind.encode("the quick brown fox").tolist()) == "the quick brown fox"
    assert twin.encode("[BOS]").ids == every_kind.encode("[BOS]").tolist()


def test_hugging_face_gives_the_same_characters(tmp_path):
    tokenizer = train_tokenizer(CharConfig(kind="char"), [EVERY_KIND, "\r\n \t"])
    tokenizer.save(tmp_path)
    twin = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = EVERY_KIND + " \r\n\n\t[PAD]§"
    assert twin.encode(text).ids == tokenizer.encode(text).tolist()
    assert twin.decode(tokenizer.encode(EVERY_KIND).tolist()) == EVERY_KIND


def test_hugging_face_gives_the_same_tokens_for_bytes_and_their_pairs(tmp_path, bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        tokenizer.save(tmp_path)
        twin = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert twin.get_vocab_size() == tokenizer.vocabulary_size
        assert twin.token_to_id("[BOS]") == tokenizer.bos_id
        for text in [EVERY_KIND, "".join(map(chr, range(0x900))), *nasty_texts(100)]:
            tokens = tokenizer.encode(text).tolist()
            assert twin.encode(text).ids == tokens
            assert twin.decode(tokens) == text


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


def test_the_fingerprint_follows_kind_settings_and_vocabulary(every_kind, bpe):
    letters = [*SPECIAL_TOKENS, "a", "b"]
    tokenizers = [
        CharTokenizer(letters),
        CharTokenizer([*SPECIAL_TOKENS, "b", "a"]),
        WordPieceTokenizer(letters, True),
        WordPieceTokenizer(letters, False),
        bpe,
        BpeTokenizer(bpe.file + " "),
        ByteTokenizer(),
    ]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 7
    assert CharTokenizer(letters).fingerprint == tokenizers[0].fingerprint
    assert re.fullmatch("[0-9a-f]{64}", every_kind.fingerprint)


# Characters.


def test_characters_are_numbered_by_code_point_and_come_back_exactly():
    tokenizer = train_tokenizer(CharConfig(kind="char"), ["ba", EVERY_KIND, "\x07\r\n\U0010ffff"])
    characters = tokenizer.vocabulary[3:]
    assert characters == sorted(set(EVERY_KIND) | set("ab\x07\r\n\U0010ffff"))
    assert tokenizer.decode(tokenizer.encode(EVERY_KIND)) == EVERY_KIND
    assert len(tokenizer.encode(EVERY_KIND)) == len(EVERY_KIND)
    assert not tokenizer.is_lossy


def test_an_unseen_character_is_unknown():
    tokenizer = train_tokenizer(CharConfig(kind="char"), ["ab"])
    assert tokenizer.encode("aZ한b").tolist() == [3, 1, 1, 4]
    assert tokenizer.decode([2, 3, 1, 0]) == "a[UNK]"
    assert lists(tokenizer.encode_batch(["", "ba"])) == [[], [4, 3]]
    tokens, lengths = tokenizer.encode_pieces(["a", "", "ba"])
    assert (tokens.tolist(), lengths.tolist()) == ([3, 4, 3], [1, 0, 2])


# Bytes and their pairs.


def test_bytes_have_the_first_ids_and_no_text_is_unknown(bpe):
    assert (bpe.pad_id, bpe.bos_id, bpe.unknown_id) == (0, 1, -1)
    assert [bpe.encoder.id_to_token(id) for id in (0, 1)] == list(BYTE_SPECIAL_TOKENS)
    assert 258 < bpe.vocabulary_size <= 1000
    assert sorted(len(bpe.encoder.id_to_token(id)) for id in range(2, 258)) == [1] * 256
    tokenizer = ByteTokenizer()
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.unknown_id, tokenizer.vocabulary_size) == (0, 1, -1, 258)
    assert tokenizer.encode("a한").tolist() == [byte + 2 for byte in "a한".encode()]


def test_every_text_comes_back_and_none_has_a_special_token(bpe, gpt2_file):
    from_file = train_tokenizer(BpeFileConfig(kind="bpe", path=str(gpt2_file)), [])
    texts = ["", " ", "\n", "".join(map(chr, [*range(0x3000), *range(0xFF00, 0x10400)])), EVERY_KIND, *nasty_texts(300)]
    for tokenizer in (bpe, from_file, ByteTokenizer()):
        assert not tokenizer.is_lossy
        for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert tokenizer.decode(tokens) == text
            assert not {tokenizer.pad_id, tokenizer.bos_id} & set(tokens.tolist())
            assert tokens.dtype == np.int32
        assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.pad_id]) == "a b"


def test_plain_text_has_the_tokens_that_the_library_gives_it(bpe, monkeypatch):
    monkeypatch.setattr(type(bpe._tokens_of_word), "MAX_WORDS", 50)  # So that words are forgotten on the way.
    draw = np.random.default_rng(0)
    characters = [*map(chr, range(128)), *" '\n\tste한’\u2028" * 10]
    texts = ["".join(draw.choice(characters, length)) for length in draw.integers(0, 30, 2000)]
    assert any(text.isascii() for text in texts) and not all(text.isascii() for text in texts)
    tokens, lengths = bpe.encode_pieces(texts)
    expected = [each.ids for each in bpe.encoder.encode_batch_fast(texts, add_special_tokens=False)]
    assert [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])] == expected


def test_plain_text_has_the_words_that_the_library_finds(bpe):
    draw = np.random.default_rng(0)
    characters = [*map(chr, range(128)), *" ''\n\tstmdrevl" * 10]
    for length in draw.integers(1, 30, 2000):
        text = "".join(draw.choice(characters, length))
        found = [text[start:end] for _, (start, end) in bpe.encoder.pre_tokenizer.pre_tokenize_str(text)]
        assert _WORDS.findall(text) == found


def test_a_file_that_splits_words_its_own_way_is_left_to_the_library(bpe):
    asked = json.loads(bpe.file)
    digits = {"type": "Digits", "individual_digits": True}
    asked["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, asked["pre_tokenizer"]]}
    tokenizer = BpeTokenizer(json.dumps(asked))
    text = "in 1234 years"
    assert tokenizer.encode(text).tolist() == tokenizer.encoder.encode(text, add_special_tokens=False).ids


def test_half_a_character_is_decoded_to_a_replacement(bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        tokens = tokenizer.encode("a\U0010ffff")  # Seen nowhere, so in bytes.
        assert tokenizer.decode(tokens[:-1]) == "a\ufffd"


def test_a_text_cut_at_any_break_has_the_bpe_tokens_of_the_whole():
    texts = nasty_texts(2000)
    # Learned from these, it has tokens for what a wrong cut would divide.
    tokenizer = train_tokenizer(BpeConfig(kind="bpe", vocabulary_size=2000), texts)
    num_pieces = 0
    for text in texts:
        ends = [0, *(found.end() for found in BPE_BREAKS.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(ends)]
        tokens, lengths = tokenizer.encode_pieces(pieces)
        assert tokens.tolist() == tokenizer.encode(text).tolist()
        assert len(lengths) == len(pieces) and lengths.sum() == len(tokens)
        num_pieces += len(pieces)
    assert num_pieces > 2 * len(texts)


# Vocabularies that are there already.


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


def test_what_a_file_says_of_training_is_left_out(gpt2_file):
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


def test_a_bpe_file_is_no_wordpiece_file(gpt2_file):
    with pytest.raises(UserError, match=r"a BPE vocabulary, and not WordPiece; give a vocab.txt or tokenizer.json of"):
        train_tokenizer(WordPieceFileConfig(kind="wordpiece", path=str(gpt2_file)), [])


def test_capitals_are_kept_where_a_cased_file_is_asked_for(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT, "The"]), "utf-8")
    config = WordPieceFileConfig(kind="wordpiece", path=str(tmp_path / "vocab.txt"), lowercase=False)
    assert train_tokenizer(config, []).encode("The the").tolist() == [len(BERT), 7]


# Larger text.


@pytest.fixture(scope="module", params=[4, pytest.param(1, marks=pytest.mark.slow)], ids=["a quarter", "all"])
def languages(test_data, request):
    """The Universal Declaration of Human Rights in 532 languages, or every fourth of its lines."""
    return list(read_documents(test_data / "udhr_all_languages.txt.gz", "line"))[:: request.param]


def test_532_languages_have_no_unknown_token(languages):
    config = WordPieceConfig(kind="wordpiece", vocabulary_size=12_000, sample_bytes=1_000_000)
    tokenizer = train_tokenizer(config, languages)
    assert tokenizer.vocabulary_size == 12_000
    tokens = tokenizer.encode_batch(languages)
    assert not sum(np.count_nonzero(of_document == tokenizer.unknown_id) for of_document in tokens)


def test_532_languages_come_back_exactly(languages):
    char = train_tokenizer(CharConfig(kind="char"), languages)
    bpe = train_tokenizer(BpeConfig(kind="bpe", vocabulary_size=12_000, sample_bytes=1_000_000), languages)
    assert 6_000 < bpe.vocabulary_size <= 12_000  # A quarter of the text has not so many tokens ten times each.
    for exact in (char, bpe, ByteTokenizer()):
        assert [exact.decode(of_document) for of_document in exact.encode_batch(languages)] == languages


def test_korean_comes_back_as_it_went_in(test_data):
    documents = list(read_documents(test_data / "korean/paragraphs_valid.txt", "line"))
    tokenizer = train_tokenizer(WordPieceConfig(kind="wordpiece", vocabulary_size=5000), documents)
    assert tokenizer.unknown_id not in np.concatenate(tokenizer.encode_batch(documents))
    hangul = [" ".join(re.findall("[가-힣]+", document)) for document in documents]
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode_batch(hangul)] == hangul
    num_tokens = []
    for config in (BpeConfig(kind="bpe", vocabulary_size=5000), CharConfig(kind="char"), ByteConfig(kind="byte")):
        exact = train_tokenizer(config, documents)
        encoded = exact.encode_batch(documents)
        assert [exact.decode(tokens) for tokens in encoded] == documents
        num_tokens.append(sum(map(len, encoded)))
    assert num_tokens == sorted(num_tokens)


def test_english_books_have_the_tutorial_s_tokens_and_hugging_face_s(test_data, tmp_path):
    documents = list(read_documents(test_data / "books/simple_valid.txt", "line"))[:4000]
    tokenizer = train_tokenizer(WordPieceConfig(kind="wordpiece", vocabulary_size=2000), documents)
    ours = lists(tokenizer.encode_batch(documents))
    assert ours == plain_keras_tokens(tokenizer, documents)
    tokenizer.save(tmp_path)
    twin = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = [encoding.ids for encoding in twin.encode_batch(documents)]
    # An ellipsis folds into three dots, which keras_nlp keeps together and Hugging Face takes apart.
    assert all("…" in document for document, a, b in zip(documents, ours, theirs, strict=True) if a != b)
