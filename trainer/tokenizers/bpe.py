"""Byte-level BPE: text in words as GPT-2 splits them, each as merged bytes. Hugging Face's encoder encodes."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from trainer.tokenizers.cutting import BOOK_MARKS, BPE_BREAKS
from trainer.tokenizers.tokenizer import (
    BOS_NAMES,
    PAD_NAMES,
    Tokenizer,
    fingerprint_of,
    first_of,
    parse_tokenizer_json,
    save_files,
    without_special,
)

# GPT-2's words in plain ASCII and the marks of books (Radford et al. 2019, in the code of their encoder).
_WORDS = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
_PLAIN = re.compile(f"[\0-\x7f{BOOK_MARKS}]*")
# Blanks of all kinds, characters that a normalizer would change, and places to cut at.
_PROBE = "The  quick\n\n fox's\t 12 feet.\r\n  n\u0303 \u1112\u1161\u11ab 한, ① ﬁ\u00a0 、我。\u200b 🙂 \u2028 "


class BpeTokenizer(Tokenizer):
    """Byte-level BPE: text is split into GPT-2's words, and every text comes back exactly.

    Args:
        file: the whole text of a tokenizer.json of Hugging Face.

    Attributes:
        encoder: Hugging Face's tokenizer.
        is_as_gpt2: whether text becomes tokens as with GPT-2's tokenizer, except for the vocabulary.

    Raises:
        ValueError: it is not a tokenizer.json, is of another kind, or lacks the token before a document.
    """

    kind = "bpe"
    is_lossy = False
    breaks = BPE_BREAKS
    unknown_id = -1

    def __init__(self, file: str):
        self.file = file
        self.fingerprint = fingerprint_of(self.settings(), [file])
        self.encoder = parse_tokenizer_json(file, "BPE")
        # A file may turn on truncation, padding, and BPE dropout, which gives other tokens each time.
        self.encoder.no_truncation()
        self.encoder.no_padding()
        self.encoder.model.dropout = None
        # If a text holds the name of a special token, the name is encoded like any other text.
        self.encoder.encode_special_tokens = True
        ids = self.encoder.get_vocab()
        self.vocabulary_size = max(ids.values()) + 1
        if len(set(ids.values())) < len(ids):
            raise ValueError("two tokens have the same number")
        # Files have only small gaps between token numbers: each gap costs a row of the model's embedding, and the
        # library goes through all of them whenever it writes the file.
        if self.vocabulary_size > 2 * len(ids):
            raise ValueError(f"token numbers up to {self.vocabulary_size - 1}, for {len(ids)} tokens; count from 0 on")
        splits_as_gpt2 = _splits_as_gpt2(self.encoder)
        self.is_as_gpt2 = splits_as_gpt2 and _merges_as_gpt2(self.encoder)
        self._tokens_of_word = _TokensOfWord(self.encoder) if splits_as_gpt2 else None
        names = {id: token for token, id in ids.items()}
        self.vocabulary = [names.get(id, "") for id in range(self.vocabulary_size)]
        self.bos_id = ids[first_of(BOS_NAMES, ids)]
        self.pad_id = next((ids[name] for name in PAD_NAMES if name in ids), self.bos_id)

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts that `cut` has made short."""
        words = self._tokens_of_word
        is_plain = [words is not None and _PLAIN.fullmatch(piece) is not None for piece in pieces]
        others = [piece for piece, plain in zip(pieces, is_plain, strict=True) if not plain]
        encodings = iter(self.encoder.encode_batch_fast(others, add_special_tokens=False))
        encoded = [
            b"".join(map(words.__getitem__, _WORDS.findall(piece)))
            if words is not None and plain
            else np.array(next(encodings).ids, np.int32).tobytes()
            for piece, plain in zip(pieces, is_plain, strict=True)
        ]
        return np.frombuffer(b"".join(encoded), np.int32), np.array([len(tokens) for tokens in encoded]) // 4

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, [PAD] and [BOS] left out; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.encoder.decode(without_special(self, tokens).tolist())
        return text

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes each token adds to a decoded text: int32 [vocabulary_size]. A vocabulary of bytes
        writes each byte as one character.
        """
        lengths = np.zeros(self.vocabulary_size, np.int32)
        for token, id in self.encoder.get_vocab().items():
            lengths[id] = len(token)
        # A token that the file adds to the vocabulary decodes to its own characters.
        for id, added in self.encoder.get_added_tokens_decoder().items():
            lengths[id] = len(added.content.encode())
        return lengths

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and settings.json into a folder."""
        save_files(self, folder, self.file)


def check_round_trip(tokenizer: BpeTokenizer) -> None:
    """Checks a tokenizer whose file trainer did not write.

    Raises:
        ValueError: a byte has no token, some text does not come back, or words do not end where `cut` expects it.
    """
    ids = tokenizer.encoder.get_vocab()
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys():
        raise ValueError(f"no token for {len(missing)} of the 256 bytes")
    special = [name for name, id in ids.items() if id in (tokenizer.pad_id, tokenizer.bos_id)]
    text = _PROBE.join(["", *special, ""])
    whole = tokenizer.encode(text)
    if tokenizer.decode(whole) != text:
        raise ValueError("a text does not come back from its tokens")
    # An added token is encoded whole, but decoded as the bytes that its characters stand for: "é" as a single byte.
    for id, added in tokenizer.encoder.get_added_tokens_decoder().items():
        name = f"a {added.content} b"
        if id not in (tokenizer.pad_id, tokenizer.bos_id) and tokenizer.decode(tokenizer.encode(name)) != name:
            raise ValueError(f"a text with the added token {added.content!r} does not come back from its tokens")
    ends = [0, *(found.end() for found in BPE_BREAKS.finditer(text)), len(text)]
    tokens, _ = tokenizer.encode_pieces([text[start:end] for start, end in itertools.pairwise(ends)])
    if tokens.tolist() != whole.tolist():
        raise ValueError("words do not end before spaces")


class _TokensOfWord(dict[str, bytes]):
    """The tokens of words as bytes of int32. Each word is encoded once: most words of a text occur many times."""

    MAX_WORDS = 1 << 18

    def __init__(self, encoder: Any):
        super().__init__()
        self._encoder = encoder

    def __missing__(self, word: str) -> bytes:
        if len(self) >= self.MAX_WORDS:
            self.clear()
        tokens = np.array(self._encoder.encode(word, add_special_tokens=False).ids, np.int32).tobytes()
        self[word] = tokens
        return tokens


def _splits_as_gpt2(encoder: Any) -> bool:
    """Whether words are split as GPT-2 splits them, no text is changed before, and no added token crosses words."""
    settings = json.loads(encoder.to_str())
    splits = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    is_alike = splits.items() <= (settings["pre_tokenizer"] or {}).items()
    return is_alike and settings["normalizer"] is None and all(token["special"] for token in settings["added_tokens"])


def _merges_as_gpt2(encoder: Any) -> bool:
    """Whether a word's bytes are merged by the ranks of pairs, and by nothing else."""
    model = json.loads(encoder.to_str())["model"]
    return not any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
