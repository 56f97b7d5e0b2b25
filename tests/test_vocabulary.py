"""Laws of how vocabularies are learned."""

import random
import re
import tomllib

import numpy as np
import pytest

from trainer.config.file import SHIPPED_CONFIGS, load_config, make_config
from trainer.config.settings import BpeConfig, WordPieceConfig
from trainer.errors import UserError
from trainer.tokenizers.tokenizer_files import train_tokenizer
from trainer.tokenizers.vocabulary import SPECIAL_TOKENS, _Sample, train_wordpiece


def test_the_vocabulary_has_the_size_that_is_set_if_the_text_offers_enough():
    draw = random.Random(0)
    words = ["".join(draw.choices("abcde", k=draw.randint(1, 8))) for _ in range(20_000)]
    for size in (13, 14, 1001):  # 13: the special tokens and each letter in two forms.
        config = WordPieceConfig(kind="wordpiece", vocabulary_size=size)
        assert len(train_wordpiece(config, [" ".join(words)])) == size
    with pytest.raises(UserError) as error:
        train_wordpiece(WordPieceConfig(kind="wordpiece", vocabulary_size=12), [" ".join(words)])
    assert "tokenizer.vocabulary_size=12 cannot hold the alphabet: the text needs at least 13," in str(error.value)
    bpe = "tokenizer.kind=bpe with tokenizer.vocabulary_size=none, which spells everything"
    assert f"Set tokenizer.vocabulary_size=26, or {bpe}, or tokenizer.kind=char." in str(error.value)


# The configs whose tokenizer learns from the text: with init.from it is the model's own.
LEARNING = [path for path in sorted(SHIPPED_CONFIGS.glob("*.toml")) if "[init]" not in path.read_text()]


@pytest.mark.parametrize("config_file", LEARNING, ids=lambda path: path.stem)
def test_each_way_out_of_a_vocabulary_that_is_too_small_works_with_any_shipped_config(config_file):
    overrides = ["tokenizer.kind=wordpiece", "tokenizer.vocabulary_size=300"]
    text = ["".join(map(chr, range(0xAC00, 0xAC00 + 200)))]
    config = load_config(config_file, overrides).tokenizer
    with pytest.raises(UserError) as error:
        train_tokenizer(config, text)
    advice = re.findall(r"tokenizer\.\w+=\w+", str(error.value).partition("Set ")[2])
    assert [each.split("=")[0] for each in advice] == ["tokenizer.vocabulary_size", "tokenizer.kind", "tokenizer.kind"]
    for override in advice:
        # As printed, added to the command; the file's own size stands in for the 300 here.
        settings = tomllib.loads(config_file.read_text())
        settings["tokenizer"] = {"kind": "wordpiece", "vocabulary_size": 300, "lowercase": True}
        settings.setdefault("run_folder", "r")
        tokenizer = train_tokenizer(make_config(settings, [override]).tokenizer, text)
        assert tokenizer.unknown_id not in tokenizer.encode(text[0])


def test_a_wordpiece_vocabulary_has_no_token_that_encoding_its_text_passes_over():
    draw = random.Random(0)
    endings = ["ation", "ations", "ational", "ing", "ingly", "est"]
    stems = ["".join(draw.choices("bcdfgklmnprst", k=4)) for _ in range(300)]
    text = " ".join(draw.choice(stems) + draw.choice(endings) for _ in range(20_000))
    tokenizer = train_tokenizer(WordPieceConfig(kind="wordpiece", vocabulary_size=200), [text])
    used = set(tokenizer.encode(text).tolist())
    unused = [token for i, token in enumerate(tokenizer.vocabulary) if i not in used]
    assert len(used) > 150
    # A letter has a token at the start of a word and another inside, whatever the text needs.
    assert max(len(token.removeprefix("##")) for token in unused if token not in SPECIAL_TOKENS) == 1


def test_a_bpe_vocabulary_has_the_size_that_is_set_if_the_text_offers_enough():
    draw = random.Random(0)
    text = " ".join("".join(draw.choices("abcde", k=draw.randint(1, 8))) for _ in range(40_000))
    for size in (258, 259, 1001):
        assert train_tokenizer(BpeConfig(kind="bpe", vocabulary_size=size), [text]).vocabulary_size == size


def test_a_small_text_makes_a_small_bpe_vocabulary():
    text = " ".join(["seldom"] * 9 + ["often"] * 10)
    tokenizer = train_tokenizer(BpeConfig(kind="bpe"), [text])
    assert len(tokenizer.encode(" often")) == 1  # MIN_BPE_COUNT times in the text, and with it all its parts.
    assert len(tokenizer.encode(" seldom")) > 1
    assert tokenizer.vocabulary_size < 270
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_sample_is_bounded_from_all_over_the_text_and_the_same_in_any_order():
    documents = [f"document number {i} " + "x" * (i % 100) for i in range(10_000)]

    def sampled(documents):
        sample = _Sample(max_bytes=50_000)
        for document in documents:
            sample.add(document)
        return [text.decode() for text in sample.texts()]

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


def test_a_word_of_any_length_is_learned_from_in_bounded_time_and_encoded():
    tokenizer = train_tokenizer(BpeConfig(kind="bpe", vocabulary_size=300), ["0123456789" * 100_000])
    text = "9876543210" * 30_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
