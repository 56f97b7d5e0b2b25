"""Mutations of bytes, texts, and the trees that JSON and TOML hold."""

import json
import math
import random
import tomllib
from collections.abc import Iterator
from typing import Any

import tomli_w

ENGLISH = "The cat sat on the mat, and the dog looked on.\n\nOnce upon a time there was a fox's 12 feet.\n"
KOREAN = "고양이가 매트 위에 앉았다.\n\n옛날 옛적에 여우가 살았다. 한글은 쉽다!\n"
OTHERS = (
    "Ёжик в тумане.\nقطة على السجادة\n我家有一只猫。\n🙂 na\u00efve n\u0303 \u2028 \u200b end\r\nΣίσυφος straße ÅÉ\n"
)
TEXTS = (ENGLISH, KOREAN, OTHERS, ENGLISH + KOREAN + OTHERS)

NUMBERS = (
    -1, 0, 1, 2, 3, 7, 63, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**47, 2**53 + 1, 2**62, 2**63 - 1, 2**63,
    2**64, 10**30, 10**400, -(2**63), -0.0, 0.5, 1.0, 1e-320, 1e-9, 1e38, 1e39, 1e300, 1.7e308, math.inf, -math.inf,
    math.nan,
)  # fmt: skip
STRINGS = (
    "", " ", "\n", "\0", "a\0b", "none", "null", "true", "nan", "1e400", "0x10", "-", "--", ".", "..", "../..", "[",
    "]", "[a]", "*", "?", "**", "%s%n", "{}", "{0}", "$HOME", "'", '"', "\\", "\\n", "a" * 300, "가" * 120,
    "\ufeff", "\u202e", "\x1b[31m", "\x07", "\x85", "\u2028", "\ud800", "\udcff", "\U0010ffff", "e\u0301", "ﬁ",
    "İ", "a/", "[UNK]", "[PAD]", "[BOS]", "train", "text", "config.toml", "storybook", "byte", "char",
    "wordpiece", "bpe", "2024-01-01", "12:00:00", "1_000", "auto", "9" * 5_000, "٣", "²",
)  # fmt: skip
PIECES = (
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\r\n", b"\n\n", b"\t", b" ", b'"',
    b"'", b"\\", b"\\u0000", b"\\ud83d", b"{", b"}", b"[", b"]", b",", b":", b"=", b"#", b"\x1b[2J", b"\x7f",
    b"\xe2\x80\xa8", b"\xf0\x9f\x99\x82", b"999999999999999999999999", b"-1", b"1e999", b"NaN", b"null",
    b"\x1f\x8b\x08", b"PK\x03\x04", b"A" * 5_000, b"9" * 5_000, b"[" * 20_000, b'{"a":' * 5_000, b"\n" * 2_000,
)  # fmt: skip
DEEP = "\U000f0000deep"  # Is replaced by deeply nested brackets, which no JSON library would write.


def nasty(rng: random.Random) -> Any:
    """Returns a value of any type, as a user may write it by mistake."""
    of = rng.randrange(8)
    if of <= 2:
        return rng.choice(NUMBERS)
    if of <= 5:
        return rng.choice(STRINGS)
    return rng.choice((True, False, None, [], {}, [[]], [None], [1, "a"], {"": 0}, {"a": {"b": []}}, [""], DEEP))


def mutated_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Returns data with parts flipped, removed, doubled, cut off, inserted, or replaced by parts of `other`."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        first, second = sorted((rng.randrange(len(changed) + 1), rng.randrange(len(changed) + 1)))
        second = min(second, first + rng.choice((1, 4, 64, 4_096, len(changed))))
        what = rng.randrange(9)
        if what <= 1 and changed:
            changed[min(first, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif what == 2 and changed:
            changed[min(first, len(changed) - 1)] = rng.randrange(256)
        elif what == 3:
            del changed[first:second]
        elif what == 4:
            changed[first:first] = changed[first:second] * rng.choice((1, 1, 2, 50))
        elif what == 5:
            del changed[first if rng.random() < 0.7 else 0 :]
        elif what == 6 or what == 7:
            changed[first:first] = rng.choice(PIECES)
        else:
            start = rng.randrange(len(other) + 1)
            changed[first:second] = other[start : start + rng.choice((8, 200, len(other)))]
    return bytes(changed[: 1 << 20])


def mutated_text(rng: random.Random, text: str, other: str = ENGLISH) -> str:
    """Returns a mutated text. Mutated as bytes it may have surrogates, as an argument that is not UTF-8 has."""
    if rng.random() < 0.5:
        changed = mutated_bytes(rng, text.encode(errors="surrogatepass"), other.encode(errors="surrogatepass"))
        return changed.decode(errors="surrogateescape")
    place = rng.randrange(len(text) + 1)
    end = place + rng.choice((0, 0, 1, 5, len(text)))
    return text[:place] + rng.choice((*STRINGS, *map(str, NUMBERS[:-5]))) + text[end:]


SPECIAL_NAMES = (
    "[BOS]", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<pad>", "<unk>", "<|endoftext|>", "<|pad|>",
    "<|begin_of_text|>", "##", "##a", " ##the", "Ġ", "Ġthe", "\u2581", "<0x0A>", "[bos]", "[ BOS ]", "[BOS", "BOS]",
)  # fmt: skip
ESCAPES = (
    "\x1b[2J", "\x1b[31m", "\x1b]0;title\x07", "\x1bP+q\x1b\\", "\x1bc", "\x9b31m", "\x90", "\b" * 9, "\r", "\v", "\f",
    "\0", "\x7f", "\x85", "\u2028", "\u202e", "\u2066", "\ufeff", "\u200b", "\U000e0041",
)  # fmt: skip
SCRIPTS = (
    "안녕 세상", "ㅋㅋㅠ", "שלום", "مرحبا بالعالم", "हिन्दी में", "ไม่มีช่องว่าง", "我能吞下玻璃", "ﬁ½℀", "İ ß",
    "👩\u200d👩\u200d👧\u200d👦", "🇰🇷🇰", "👍🏽",
    "e\u0301" * 5, "Z" + "\u0335\u0489" * 40, "\U0001d400", "\ufffd", "\ufffe", "\u3000",
)  # fmt: skip
LONE_SURROGATES = ("\ud800", "\udbff", "\udc00", "\udfff", "\udc80\udcff", "\ude00\ud83d")


def prompt_text(rng: random.Random) -> str:
    """Returns a text that somebody may give as a prompt, by mistake or to do harm; it may be empty or very long."""

    def any_character() -> str:
        plane = rng.choice((0x80, 0x100, 0x3000, 0x10000, 0x20000, 0x110000))
        return chr(rng.randrange(plane))

    def piece() -> str:
        of = rng.randrange(10)
        if of == 0:
            return "".join(any_character() for _ in range(rng.choice((1, 3, 20))))
        if of == 1:
            return rng.choice(LONE_SURROGATES) if rng.random() < 0.2 else rng.choice(("", " ", "\n", "\t", "   "))
        kinds = (SPECIAL_NAMES, SPECIAL_NAMES, ESCAPES, SCRIPTS, STRINGS, ENGLISH.split(" "))
        return rng.choice(rng.choice(kinds))

    text = "".join(piece() for _ in range(rng.choice((0, 1, 1, 2, 3, 6))))
    return text * rng.choice((1,) * 12 + (50, 5_000)) if len(text) < 100 else text


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """Returns the contents of a JSON or TOML file with values replaced, removed, renamed, swapped or wrapped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = [place for place in _places(tree) if place is not None]
        if not places or rng.random() < 0.02:
            return nasty(rng)
        parent, key = rng.choice(places)
        other_parent, other_key = rng.choice(places)
        what = rng.randrange(8)
        if what <= 2:
            parent[key] = nasty(rng)
        elif what == 3:
            del parent[key]
        elif what == 4 and isinstance(parent, dict):
            parent[mutated_text(rng, str(key)) if rng.random() < 0.5 else str(rng.choice(STRINGS))] = parent.pop(key)
        elif what == 5:
            parent[key] = json.loads(json.dumps(other_parent[other_key]))
        elif what == 6:
            parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, str(parent[key]), [parent[key]] * 2))
        elif isinstance(parent[key], str):
            parent[key] = mutated_text(rng, parent[key])
        elif isinstance(parent[key], int | float):
            parent[key] = rng.choice((-parent[key], parent[key] + 1, parent[key] // 2, parent[key] * 1000))
        else:
            parent[key] = nasty(rng)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (dict or list, key or index) for every value in a tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def as_json(rng: random.Random, tree: Any, indent: int | None = None) -> bytes:
    """Returns a tree as JSON, with NaN and infinities as Python's json module writes and reads them."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5, indent=indent)
    for deep in (json.dumps(DEEP), json.dumps(DEEP, ensure_ascii=False)):
        number = rng.choice((100, 2_000, 100_000))
        text = text.replace(deep, "[" * number + "]" * number)
    return text.encode(errors="surrogatepass")


def as_toml(rng: random.Random, tree: Any) -> bytes | None:
    """Returns a tree as TOML, or None if TOML cannot express it."""

    try:
        text = tomli_w.dumps(tree)
    except (TypeError, ValueError, AttributeError):
        return None
    number = rng.choice((100, 2_000, 100_000))
    return text.replace(f'"{DEEP}"', "[" * number + "]" * number).encode(errors="surrogatepass")


def mutated_json(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Returns a JSON file mutated as bytes or as a tree."""
    if rng.random() < 0.5:
        return mutated_bytes(rng, data, other)
    return as_json(rng, mutated_tree(rng, json.loads(data)), rng.choice((None, 2)))


def mutated_toml(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Returns a TOML file mutated as bytes or as a tree."""
    if rng.random() < 0.5:
        return mutated_bytes(rng, data, other)
    changed = as_toml(rng, mutated_tree(rng, tomllib.loads(data.decode())))
    return mutated_bytes(rng, data, other) if changed is None else changed
