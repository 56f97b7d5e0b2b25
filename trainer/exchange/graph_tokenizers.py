"""The tokenizers as TensorFlow operations, for programs that do not have this package.

They give the tokens and the texts of trainer/tokenizers. Texts are UTF-8; text that is not is an error. Operations on
strings run on a CPU.
"""

import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf
import tokenizers
from tokenizers import pre_tokenizers

from trainer.tokenizers.bpe import BpeTokenizer
from trainer.tokenizers.characters import ByteTokenizer, CharTokenizer
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.tokenizers.vocabulary import BYTE_SPECIAL_TOKENS
from trainer.tokenizers.wordpiece import LETTER_OF_JAMO, WordPieceTokenizer

# What GPT-2's pattern of words distinguishes.
_OTHER, _SPACE, _LETTER, _NUMBER = range(4)
# All letters, numbers and blanks of Unicode are in its first four planes.
_NUM_CODE_POINTS = 0x40000
# The library needs quadratic time for a long text.
_CODES_AT_A_TIME = 4096
_NO_MERGE = np.iinfo(np.int32).max


class GraphTokenizer(Protocol):
    """A tokenizer as TensorFlow operations. It is a tf.Module if it has tables.

    Attributes:
        needs_text: whether a program that loads the operations has to import tensorflow_text before.
    """

    needs_text: bool

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns the tokens of string [texts], without [BOS]: int32 [texts, tokens]."""
        ...

    def decode(self, tokens: tf.RaggedTensor) -> tf.Tensor:
        """Returns the texts of int32 [texts, tokens], [PAD] and [BOS] left out: string [texts]."""
        ...


def in_graph(tokenizer: Tokenizer) -> GraphTokenizer:
    """Returns a tokenizer as TensorFlow operations. BPE has to be `is_as_gpt2`."""
    if isinstance(tokenizer, BpeTokenizer):
        return _GraphBpe(tokenizer)
    if isinstance(tokenizer, WordPieceTokenizer):
        return _GraphWordPiece(tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        return _GraphChar(tokenizer)
    assert isinstance(tokenizer, ByteTokenizer), tokenizer
    return _GraphByte(tokenizer)


class _GraphByte(GraphTokenizer):
    needs_text = False

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._pieces = [b""] * len(BYTE_SPECIAL_TOKENS) + [bytes([byte]) for byte in range(256)]

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        return texts_bytes(texts).with_flat_values(texts_bytes(texts).flat_values + len(BYTE_SPECIAL_TOKENS))

    def decode(self, tokens: tf.RaggedTensor) -> tf.Tensor:
        return _valid(_joined(self._pieces, tokens))


class _GraphChar(GraphTokenizer):
    needs_text = False

    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._pieces = _without(tokenizer.vocabulary, tokenizer.pad_id, tokenizer.bos_id)
        codes = {ord(each): id for id, each in enumerate(tokenizer.vocabulary) if len(each) == 1}
        # One more than the vocabulary needs: all later code points are unknown.
        self._ids = np.full(max(codes, default=0) + 2, tokenizer.unknown_id, np.int32)
        self._ids[list(codes)] = list(codes.values())

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        codes = _code_points(texts)
        return codes.with_flat_values(tf.gather(self._ids, tf.minimum(codes.flat_values, len(self._ids) - 1)))

    def decode(self, tokens: tf.RaggedTensor) -> tf.Tensor:
        return _joined(self._pieces, tokens)


class _GraphWordPiece(GraphTokenizer):
    needs_text = True

    def __init__(self, tokenizer: WordPieceTokenizer) -> None:
        self._tokenize = tokenizer.tokenize
        self._lowercase = tokenizer.lowercase
        self._special = [tokenizer.pad_id, tokenizer.bos_id]
        self._first, self._others = tokenizer.vocabulary, tokenizer.continued
        self._letters = np.array([ord(LETTER_OF_JAMO.get(chr(code), chr(code))) for code in range(0x1100, 0x1200)])

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        return self._tokenize(texts)

    def decode(self, tokens: tf.RaggedTensor) -> tf.Tensor:
        is_kept = tf.reduce_all(tokens.flat_values[:, tf.newaxis] != self._special, axis=1)
        tokens = tf.ragged.boolean_mask(tokens, tokens.with_flat_values(is_kept))
        texts = tf.strings.join([_joined(self._first, tokens[:, :1]), _joined(self._others, tokens[:, 1:])])
        return self._with_letters(texts) if self._lowercase else texts

    def _with_letters(self, texts: tf.Tensor) -> tf.Tensor:
        """Returns texts in which a part of a Korean syllable that stands by itself is a letter; see wordpiece.py."""
        codes = _code_points(texts)
        here = codes.flat_values
        before, after = _shifted(codes, 1), _shifted(codes, -1)

        def within(codes: tf.Tensor, first: int, last: int) -> tf.Tensor:
            return (codes >= first) & (codes <= last)

        is_lone = within(here, 0x1100, 0x115F) & ~within(after, 0x1160, 0x11A7)
        is_lone |= within(here, 0x1160, 0x11A7) & ~within(before, 0x1100, 0x115F)
        has_vowel = within(before, 0x1160, 0x11A7) | within(before, 0xAC00, 0xD7A3)
        is_lone |= within(here, 0x11A8, 0x11FF) & ~has_vowel
        letters = tf.gather(tf.constant(self._letters, tf.int32), tf.clip_by_value(here - 0x1100, 0, 0xFF))
        return tf.strings.unicode_encode(codes.with_flat_values(tf.where(is_lone, letters, here)), "UTF-8")


class _GraphBpe(tf.Module, GraphTokenizer):
    needs_text = False

    def __init__(self, tokenizer: BpeTokenizer) -> None:
        super().__init__()
        settings = json.loads(tokenizer.encoder.to_str())
        model = settings["model"]
        assert tokenizer.is_as_gpt2  # export.py refuses it otherwise.
        ids, self._size = model["vocab"], tokenizer.vocabulary_size
        pairs = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
        ranks = {ids[first] * self._size + ids[second]: rank for rank, (first, second) in enumerate(pairs)}
        keys = np.array(list(ranks) or [-1], np.int64)
        values = np.array(list(ranks.values()) or [_NO_MERGE], np.int32)
        self._ranks = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), _NO_MERGE)
        self._merged = np.array([ids[first + second] for first, second in pairs] or [0], np.int32)
        letters = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
        self._of_byte = np.array([ids[letter] for letter in letters], np.int32)
        self._kinds = _kinds_of_code_points()
        self._pieces = [b""] * self._size
        for token, id in ids.items():
            spelled = all(letter in letters for letter in token)
            self._pieces[id] = bytes(map(letters.__getitem__, token)) if spelled else token.encode()
        added = [each["id"] for each in settings["added_tokens"]]
        for id in (*added, tokenizer.pad_id, tokenizer.bos_id):
            self._pieces[id] = b""

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        codes = _code_points(texts)
        is_start = self._starts_of_words(codes)
        characters = tf.strings.unicode_split(texts, "UTF-8", errors="strict").flat_values
        starts = tf.reshape(tf.where(is_start), [-1])
        words = tf.strings.reduce_join(tf.RaggedTensor.from_row_starts(characters, starts), axis=1)
        words, places = tf.unique(words)
        per_text = tf.reduce_sum(codes.with_flat_values(tf.cast(is_start, tf.int64)), axis=1)
        tokens = tf.RaggedTensor.from_row_lengths(tf.gather(self._tokens_of_words(words), places), per_text)
        return tokens.merge_dims(1, 2)

    def decode(self, tokens: tf.RaggedTensor) -> tf.Tensor:
        return _valid(_joined(self._pieces, tokens))

    def _starts_of_words(self, codes: tf.RaggedTensor) -> tf.Tensor:
        r"""Returns whether a word of GPT-2 starts at each code point: bool [code points].

        GPT-2's pattern is 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
        """
        here, before, after = codes.flat_values, _shifted(codes, 1), _shifted(codes, -1)
        second = _shifted(codes, -2)
        kind, kind_before, kind_after = (
            tf.where(each < 0, -1, tf.gather(self._kinds, tf.clip_by_value(each, 0, _NUM_CODE_POINTS - 1)))
            for each in (here, before, after)
        )
        can_be = (here == ord("'")) & (before != ord(" ")) & (kind_before != _OTHER)
        is_short = can_be & tf.reduce_any(after[:, tf.newaxis] == [ord(each) for each in "stmd"], axis=1)
        pairs = [(after == ord(first)) & (second == ord(last)) for first, last in ("re", "ve", "ll")]
        is_long = can_be & (pairs[0] | pairs[1] | pairs[2])
        is_apostrophe = is_short | is_long
        is_inside = _later(is_apostrophe, 1) | _later(is_long, 2)
        is_after = _later(is_short, 2) | _later(is_long, 3)
        # The last blank before a word belongs to the word if it is a space, and is otherwise a word by itself.
        is_blank = kind == _SPACE
        blank_starts = (kind_before != _SPACE) | ((kind_after >= 0) & (kind_after != _SPACE))
        other_starts = ((before != ord(" ")) & (kind != kind_before) & ~is_inside) | is_apostrophe | is_after
        return (before < 0) | tf.where(is_blank, blank_starts, other_starts)

    def _tokens_of_words(self, words: tf.Tensor) -> tf.RaggedTensor:
        """Returns the tokens of string [words]: int32 [words, tokens]. The pair with the lowest rank is merged first,
        and of equal pairs the first one.
        """
        of_bytes = texts_bytes(words)
        num_words = tf.size(words)
        size = tf.constant(self._size, tf.int64)

        def merge(tokens: tf.Tensor, rows: tf.Tensor, is_done: tf.Tensor) -> tuple[tf.Tensor, ...]:
            wide = tf.cast(tokens, tf.int64)
            ranks = tf.where(rows[:-1] == rows[1:], self._ranks.lookup(wide[:-1] * size + wide[1:]), _NO_MERGE)
            lowest = tf.math.unsorted_segment_min(ranks, rows[:-1], num_words)
            is_lowest = (ranks == tf.gather(lowest, rows[:-1])) & (ranks != _NO_MERGE)
            places = tf.range(tf.size(ranks))
            first = tf.math.unsorted_segment_min(tf.where(is_lowest, places, _NO_MERGE), rows[:-1], num_words)
            is_merged = is_lowest & (places == tf.gather(first, rows[:-1]))
            merged = tf.gather(self._merged, tf.where(is_merged, ranks, 0))
            tokens = tf.concat([tf.where(is_merged, merged, tokens[:-1]), tokens[-1:]], axis=0)
            is_kept = ~_later(tf.concat([is_merged, [False]], axis=0), 1)
            return tf.boolean_mask(tokens, is_kept), tf.boolean_mask(rows, is_kept), ~tf.reduce_any(is_merged)

        rows = tf.cast(of_bytes.value_rowids(), tf.int32)
        state = (tf.gather(self._of_byte, of_bytes.flat_values), rows, tf.size(rows) == 0)
        shapes = (tf.TensorShape([None]), tf.TensorShape([None]), tf.TensorShape([]))
        tokens, rows, _ = tf.while_loop(lambda *state: ~state[2], merge, state, shapes)
        return tf.RaggedTensor.from_value_rowids(tokens, tf.cast(rows, tf.int64), tf.cast(num_words, tf.int64))


def texts_bytes(texts: tf.Tensor) -> tf.RaggedTensor:
    """Returns the bytes of string [texts]: int32 [texts, bytes]."""
    split = tf.strings.bytes_split(texts)
    values = tf.reshape(tf.io.decode_raw(split.flat_values, tf.uint8), [-1])
    return split.with_flat_values(tf.cast(values, tf.int32))


def _code_points(texts: tf.Tensor) -> tf.RaggedTensor:
    return tf.strings.unicode_decode(texts, "UTF-8", errors="strict")


def _shifted(rows: tf.RaggedTensor, distance: int) -> tf.Tensor:
    """Returns for each value of int32 [rows, any] the one distance before it in its row; -1 if there is none."""
    values, number = rows.flat_values, rows.value_rowids()
    places = tf.range(tf.size(values)) - distance
    inside = tf.clip_by_value(places, 0, tf.maximum(tf.size(values) - 1, 0))
    is_same = (places == inside) & (tf.gather(number, inside) == number)
    return tf.where(is_same, tf.gather(values, inside), -1)


def _later(marks: tf.Tensor, distance: int) -> tf.Tensor:
    """Returns bool [n] moved to later places."""
    return tf.concat([tf.zeros([distance], tf.bool), marks], axis=0)[: tf.size(marks)]


def _joined(pieces: Sequence[str | bytes], tokens: tf.RaggedTensor) -> tf.Tensor:
    return tf.strings.reduce_join(tokens.with_flat_values(tf.gather(tf.constant(pieces), tokens.flat_values)), axis=1)


def _valid(texts: tf.Tensor) -> tf.Tensor:
    """Returns texts with U+FFFD for bytes that are not UTF-8."""
    return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")


def _without(vocabulary: Sequence[str], *ids: int) -> list[str]:
    return ["" if id in ids else token for id, token in enumerate(vocabulary)]


def _letters_of_bytes() -> list[str]:
    """Returns the letter by which byte-level BPE writes each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The visible letters of Latin-1 stand for themselves, and the letters from U+0100 on for the other bytes, in order.
    others = iter([letter for letter in alphabet if ord(letter) >= 0x100])
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]


def _kinds_of_code_points() -> np.ndarray:
    """Returns the kind of each code point for the pattern of words, by the tables of the library that encodes: int32
    [code points].
    """
    # A surrogate is not a character; no text has one.
    codes = np.array([code for code in range(_NUM_CODE_POINTS) if not 0xD800 <= code < 0xE000])
    kinds = np.full(_NUM_CODE_POINTS, _OTHER, np.int32)
    for kind, pattern in ((_SPACE, r"\s+"), (_LETTER, r"\p{L}+"), (_NUMBER, r"\p{N}+")):
        without = pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
        for first in range(0, len(codes), _CODES_AT_A_TIME):
            part = codes[first : first + _CODES_AT_A_TIME]
            is_kind = np.ones(len(part), bool)
            for _, (start, end) in without.pre_tokenize_str("".join(map(chr, part))):
                is_kind[start:end] = False
            kinds[part[is_kind]] = kind
    return kinds
