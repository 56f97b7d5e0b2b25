import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer

from trainer.config import CharConfig, UserError, WordPieceConfig
from trainer.data.text import read_documents
from trainer.data.tokenizer import CharTokenizer, WordPieceTokenizer, load_tokenizer, train_tokenizer
from trainer.data.vocabulary import SPECIAL_TOKENS, _Sample, cut, train_wordpiece

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


def plain_keras_tokens(tokenizer: WordPieceTokenizer, texts: list[str]) -> list[list[int]]:
    """What keras_nlp's own layer gives in a graph, as in the tutorial's tf.data pipeline."""
    import keras_nlp
    import tensorflow as tf

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


def test_the_vocabulary_has_the_size_asked_for_where_the_text_offers_enough():
    draw = random.Random(0)
    words = ["".join(draw.choices("abcde", k=draw.randint(1, 8))) for _ in range(20_000)]
    for size in (13, 14, 1001):  # 13: the special tokens and each letter in two forms.
        config = WordPieceConfig(kind="wordpiece", vocabulary_size=size)
        assert len(train_wordpiece(config, [" ".join(words)])) == size
    with pytest.raises(UserError) as error:
        train_wordpiece(WordPieceConfig(kind="wordpiece", vocabulary_size=12), [" ".join(words)])
    assert "tokenizer.vocabulary_size=12 cannot hold the alphabet: the text needs at least 13," in str(error.value)
    assert "Raise it, or use tokenizer.kind='char'." in str(error.value)


def test_the_vocabulary_is_the_same_in_another_process(every_kind):
    program = (
        "import sys; from trainer.config import WordPieceConfig; from trainer.data.tokenizer import train_tokenizer;"
        "config = WordPieceConfig(kind='wordpiece', vocabulary_size=1000);"
        "print(train_tokenizer(config, sys.stdin.buffer.read().decode().split('\\n')).fingerprint)"
    )
    for_child = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", program], input=EVERY_KIND.encode(), env=for_child, capture_output=True, check=True
    )
    assert child.stdout.decode().strip() == every_kind.fingerprint


def test_the_sample_is_bounded_from_all_over_the_text_and_the_same_in_any_order():
    documents = [f"document number {i} " + "x" * (i % 100) for i in range(10_000)]

    def sampled(documents):
        sample = _Sample(max_bytes=50_000)
        for document in documents:
            sample.add(document)
        return sorted(text.decode() for _, text in sample._pieces)

    found = sampled(documents)
    assert found == sampled(reversed(documents))
    assert 49_800 <= sum(map(len, found)) <= 50_000
    numbers = [int(document.split()[2]) for document in found]
    assert np.histogram(numbers, bins=5, range=(0, 10_000))[0] == pytest.approx(len(found) / 5, rel=0.3)


def test_a_token_is_never_longer_than_the_encoder_takes():
    for letters in ("0123456789" * 1000, "".join(map(chr, range(0x10400, 0x10428))) * 200):
        config = WordPieceConfig(kind="wordpiece", vocabulary_size=400)
        tokenizer = train_tokenizer(config, [letters] * 3)
        assert 40 <= max(len(token.removeprefix("##").encode()) for token in tokenizer.vocabulary) <= 256
        assert tokenizer.unknown_id not in tokenizer.encode(letters)


# Encoding.


def test_tokens_are_those_of_plain_keras_nlp_but_for_words_over_100_bytes(every_kind):
    texts = [*EVERY_KIND.split("\n"), "", " \t", "never seen: ж 漢 Ж\u0301"]
    ours, theirs = lists(every_kind.encode_batch(texts)), plain_keras_tokens(every_kind, texts)
    thai = next(i for i, text in enumerate(texts) if "มนุษย์" in text)
    assert [i for i in range(len(texts)) if ours[i] != theirs[i]] == [thai]
    assert theirs[thai][0] == every_kind.unknown_id


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
    pieces = list(cut(text, num_chars))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    tokens, lengths = tokenizer.encode_pieces(pieces)
    assert tokens.tolist() == tokenizer.encode(text).tolist()
    assert lengths.sum() == len(tokens)


def test_pieces_are_short_and_cut_in_a_word_only_where_it_is_very_long():
    assert list(cut("")) == [""]
    for length in (9, 10, 11, 19, 20, 21, 30, 31):
        pieces = list(cut("x" * length, 10))
        assert "".join(pieces) == "x" * length
        assert max(map(len, pieces)) <= 20
    assert list(cut("aaaa bbbb cccc dddd", 6)) == ["aaaa bbbb ", "cccc dddd"]
    assert list(cut("我能吞下玻璃而不傷", 4)) == ["我能吞下", "玻璃而不", "傷"]


# Decoding.


def test_hangul_comes_back_as_it_went_in(every_kind):
    for text in ("다람쥐 헌 쳇바퀴에 타고파", "영화 ㅋㅋㅋ ㅠㅠ 진짜 ㅎㅎ", "ㅋ 타ㅋㅋ"):
        assert every_kind.decode(every_kind.encode(text)) == text


def test_padding_and_bos_are_left_out_of_the_text(every_kind):
    tokens = every_kind.encode("the quick fox")
    assert every_kind.decode([2, *tokens, 0, 0]) == "the quick fox"
    assert every_kind.decode(np.array([2, 0], np.int32)) == every_kind.decode([]) == ""


# Files.


def test_a_saved_tokenizer_comes_back_the_same(tmp_path, every_kind):
    for tokenizer in (every_kind, CharTokenizer([*SPECIAL_TOKENS, "\n", "\r", '"', "a", "\u2028", "한", "🙂"])):
        tokenizer.save(tmp_path / tokenizer.kind)
        loaded = load_tokenizer(tmp_path / tokenizer.kind)
        assert (loaded.kind, loaded.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
        assert loaded.vocabulary == tokenizer.vocabulary
        assert loaded.encode(EVERY_KIND).tolist() == tokenizer.encode(EVERY_KIND).tolist()


def test_keras_nlp_reads_the_vocabulary_file(tmp_path):
    import keras_nlp
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


def test_a_changed_vocabulary_is_refused(tmp_path, every_kind):
    every_kind.save(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text("utf-8").replace("\nthe\n", "\nhte\n"), "utf-8")
    with pytest.raises(UserError, match=rf"{tmp_path}: the tokenizer has fingerprint .* a file was changed\. Restore"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["settings.json", "vocab.txt"])
@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\xff{"), lambda path: path.write_text("[]")]
)
def test_a_damaged_tokenizer_is_an_error_naming_the_folder(tmp_path, every_kind, name, damage):
    every_kind.save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UserError, match=rf"{tmp_path}: (not a whole tokenizer|the tokenizer has fingerprint)"):
        load_tokenizer(tmp_path)


def test_the_fingerprint_follows_kind_settings_and_vocabulary(every_kind):
    letters = [*SPECIAL_TOKENS, "a", "b"]
    tokenizers = [
        CharTokenizer(letters),
        CharTokenizer([*SPECIAL_TOKENS, "b", "a"]),
        WordPieceTokenizer(letters, True),
        WordPieceTokenizer(letters, False),
    ]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 4
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


# Larger text.


def test_532_languages_have_no_unknown_token(test_data, tmp_path):
    documents = list(read_documents([test_data / "udhr_all_languages.txt.gz"], "line"))
    config = WordPieceConfig(kind="wordpiece", vocabulary_size=12_000, sample_bytes=1_000_000)
    tokenizer = train_tokenizer(config, documents)
    assert tokenizer.vocabulary_size == 12_000
    tokens = tokenizer.encode_batch(documents)
    assert not sum(np.count_nonzero(of_document == tokenizer.unknown_id) for of_document in tokens)
    char = train_tokenizer(CharConfig(kind="char"), documents)
    assert [char.decode(of_document) for of_document in char.encode_batch(documents)] == documents


def test_korean_comes_back_as_it_went_in(test_data):
    documents = list(read_documents([test_data / "korean/paragraphs_valid.txt"], "line"))
    tokenizer = train_tokenizer(WordPieceConfig(kind="wordpiece", vocabulary_size=5000), documents)
    assert tokenizer.unknown_id not in np.concatenate(tokenizer.encode_batch(documents))
    hangul = [" ".join(re.findall("[가-힣]+", document)) for document in documents]
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode_batch(hangul)] == hangul


def test_english_books_have_the_tutorial_s_tokens_and_hugging_face_s(test_data, tmp_path):
    documents = list(read_documents([test_data / "books/simple_valid.txt"], "line"))[:4000]
    tokenizer = train_tokenizer(WordPieceConfig(kind="wordpiece", vocabulary_size=2000), documents)
    ours = lists(tokenizer.encode_batch(documents))
    assert ours == plain_keras_tokens(tokenizer, documents)
    tokenizer.save(tmp_path)
    twin = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = [encoding.ids for encoding in twin.encode_batch(documents)]
    # An ellipsis folds into three dots, which keras_nlp keeps together and Hugging Face takes apart.
    assert all("…" in document for document, a, b in zip(documents, ours, theirs, strict=True) if a != b)
