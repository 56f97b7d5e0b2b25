"""Laws of tokenizers: text comes back, and other tools' libraries give the same tokens."""

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
from every_kind import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    EVERY_KIND,
    bpe_of_every_kind,
    nasty_texts,
    wordpiece_of_every_kind,
    write_as_gpt2,
)
from tokenizers import Tokenizer as HuggingFaceTokenizer

from trainer.config.settings import BpeConfig, BpeFileConfig, ByteConfig, CharConfig, WordPieceConfig
from trainer.text.files import read_documents
from trainer.tokenizers.bpe import _WORDS, BpeTokenizer
from trainer.tokenizers.characters import ByteTokenizer, CharTokenizer
from trainer.tokenizers.cutting import BOOK_MARKS, BPE_BREAKS, WORDPIECE_BREAKS, cut
from trainer.tokenizers.tokenizer_files import load_tokenizer, train_tokenizer
from trainer.tokenizers.vocabulary import BYTE_SPECIAL_TOKENS, SPECIAL_TOKENS
from trainer.tokenizers.wordpiece import WordPieceTokenizer

# The first and last characters of the ranges that are words of their own.
IDEOGRAPHS = (
    0x3400, 0x4DBF, 0x4E00, 0x9FFF, 0xF900, 0xFAFF,
    0x20000, 0x2A6DF, 0x2A700, 0x2B73F, 0x2B740, 0x2B81F, 0x2B820, 0x2CEAF, 0x2F800, 0x2FA1F,
)  # fmt: skip


@pytest.fixture
def every_kind():
    return wordpiece_of_every_kind()


@pytest.fixture
def every_kind_cased():
    return WordPieceTokenizer(wordpiece_of_every_kind().vocabulary, lowercase=False)


@pytest.fixture
def bpe():
    return bpe_of_every_kind()


@pytest.fixture
def gpt2_file(tmp_path):
    return write_as_gpt2(bpe_of_every_kind(), tmp_path / "gpt2.json")


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
    # Normalized, without marks and parts of Hangul syllables, which would compose to characters not seen.
    letters = [token for token in every_kind.vocabulary[3:] if len(token) == 1 and token.isalnum() and token < "\uffff"]
    letters = [letter for letter in letters if not "\u1100" <= letter <= "\u11ff"]
    words = ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(5000)]
    assert every_kind.unknown_id not in np.concatenate(every_kind.encode_batch(words))


@pytest.mark.slow
def test_the_vocabulary_is_the_same_in_another_process(every_kind, bpe):
    program = (
        "import sys; from trainer.config.settings import *;"
        "from trainer.tokenizers.tokenizer_files import train_tokenizer;"
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


def test_tokens_equal_plain_keras_nlp_s_except_for_words_over_100_bytes(every_kind):
    texts = [*EVERY_KIND.split("\n"), "", " \t", "never seen: ж 漢 Ж\u0301"]
    ours, theirs = lists(every_kind.encode_batch(texts)), plain_keras_tokens(every_kind, texts)
    thai = next(i for i, text in enumerate(texts) if "มนุษย์" in text)
    assert [i for i in range(len(texts)) if ours[i] != theirs[i]] == [thai]
    assert theirs[thai][0] == every_kind.unknown_id


@pytest.mark.parametrize("lowercase", [True, False])
def test_words_end_at_the_characters_at_which_they_end_for_keras_nlp(lowercase):
    # All characters of most scripts, and the edges of the ranges of ideographs.
    codes = [*range(1, 0x3400), *(code + i for code in IDEOGRAPHS for i in (-1, 0, 1)), *range(0xFE00, 0xFFF0)]
    texts = [f"a{chr(code)}b" for code in codes]
    config = WordPieceConfig(kind="wordpiece", vocabulary_size=30_000, lowercase=lowercase)
    tokenizer = train_tokenizer(config, texts)
    assert lists(tokenizer.encode_batch(texts)) == plain_keras_tokens(tokenizer, texts)


@pytest.mark.parametrize("lowercase", [True, False])
def test_ascii_and_the_marks_of_books_get_the_tokens_of_keras_nlp_in_another_way(lowercase):
    draw = random.Random(0)
    of_ascii = [chr(code) for code in range(128)]
    alphabets = [
        [*of_ascii[32:127], *3 * BOOK_MARKS],
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
    characters = [*map(chr, range(128)), *f" '\n\tste{BOOK_MARKS}한é\u2028" * 10]
    texts = ["".join(draw.choice(characters, length)) for length in draw.integers(0, 30, 2000)]
    is_plain = [set(text) <= set(characters) - set("한é\u2028") for text in texts]
    assert any(is_plain) and not all(is_plain)
    tokens, lengths = bpe.encode_pieces(texts)
    expected = [each.ids for each in bpe.encoder.encode_batch_fast(texts, add_special_tokens=False)]
    assert [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])] == expected


def test_plain_text_has_the_words_that_the_library_finds(bpe):
    draw = np.random.default_rng(0)
    characters = [*map(chr, range(128)), *f" ''\n\tstmdrevl{BOOK_MARKS}" * 10]
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
    assert 6_000 < bpe.vocabulary_size <= 12_000  # A quarter of the text has fewer tokens that occur ten times each.
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
