"""A text with every kind of character, and tokenizers learned from it."""

import functools
import json
import random
from pathlib import Path

from trainer.config.settings import BpeConfig, WordPieceConfig
from trainer.tokenizers.bpe import BpeTokenizer
from trainer.tokenizers.tokenizer_files import train_tokenizer
from trainer.tokenizers.vocabulary import BYTE_SPECIAL_TOKENS
from trainer.tokenizers.wordpiece import WordPieceTokenizer

# A little of everything that is split into words in its own way: ideographs, half and full width, signs that fold into
# several characters, combining marks, no-break and ideographic spaces, format characters, emoji, text without spaces.
EVERY_KIND = """The quick brown fox, "jumps" over the lazy dog's back -- 1,234.50 times!? (naïve café ÅNGSTRÖM straße)
다람쥐 헌 쳇바퀴에 타고파. 영화 ㅋㅋㅋ ㅠㅠ 진짜 재밌다!! ㅎㅎ
我能吞下玻璃而不傷身體。私はガラスを食べられます。ｱｲｳ ＡＢＣ＋１２３
Ωμέγα ΣΊΣΥΦΟΣ съешь ещё этих мягких французских булок, שלום עולם مرحبا بالعالم हिन्दी में परीक्षण
เป็นมนุษย์สุดประเสริฐเลิศคุณค่ากว่าบรรดาฝูงสัตว์เดรัจฉาน … ½ ℀ ﬁn ⅷ ´ ¨ ™ x℀y a\u00a0b\u3000c a\u200bb\u00adc e\u0301 n\u0303
[BOS] [UNK] ## #hash ##tag _under_score e-mail@host.example 🙂🇰🇷👩‍👩‍👧 ᎣᏏᏲ ꭣꮟꮂ \u2028 ㆍ ＃ ﹟ ︵ … "a"…b"""


@functools.cache
def wordpiece_of_every_kind() -> WordPieceTokenizer:
    """Returns a tokenizer learned from EVERY_KIND."""
    tokenizer = train_tokenizer(WordPieceConfig(kind="wordpiece", vocabulary_size=1000), EVERY_KIND.split("\n"))
    assert isinstance(tokenizer, WordPieceTokenizer)
    return tokenizer


@functools.cache
def bpe_of_every_kind() -> BpeTokenizer:
    """Returns a tokenizer learned from EVERY_KIND."""
    tokenizer = train_tokenizer(BpeConfig(kind="bpe", vocabulary_size=1000), EVERY_KIND.split("\n") * 3)
    assert isinstance(tokenizer, BpeTokenizer)
    return tokenizer


def write_as_gpt2(tokenizer: BpeTokenizer, path: Path) -> Path:
    """Writes a tokenizer.json laid out as GPT-2's: the bytes, the merges, and <|endoftext|> at the end; no padding."""
    file = json.loads(tokenizer.file)
    tokens = sorted(file["model"]["vocab"], key=file["model"]["vocab"].get)[len(BYTE_SPECIAL_TOKENS) :]
    file["model"]["vocab"] = {token: id for id, token in enumerate([*tokens, "<|endoftext|>"])}
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    file["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    file["added_tokens"] = [{"id": len(tokens), "content": "<|endoftext|>", **flags}]
    file["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
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
