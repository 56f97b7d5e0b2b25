"""Tokenizers without a trained vocabulary: a token for each character of a text, or for each byte."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from trainer.config.settings import ByteConfig
from trainer.tokenizers.cutting import ANYWHERE
from trainer.tokenizers.tokenizer import Tokenizer, fingerprint_of, save_files, without_special
from trainer.tokenizers.vocabulary import BYTE_SPECIAL_TOKENS, SPECIAL_TOKENS


class CharTokenizer(Tokenizer):
    """One token for each Unicode code point of the text it was made from; these come back exactly.

    Attributes:
        vocabulary: the tokens; a token's index is its id.
    """

    kind = "char"
    is_lossy = False
    breaks = ANYWHERE
    pad_id, unknown_id, bos_id = range(3)

    def __init__(self, vocabulary: Sequence[str]):
        self.vocabulary = list(vocabulary)
        self.vocabulary_size = len(self.vocabulary)
        self.fingerprint = fingerprint_of(self.settings(), self.vocabulary)
        self._ids = np.full(0x110000, self.unknown_id, np.int32)  # Every code point there can be: 4 MB.
        characters = self.vocabulary[len(SPECIAL_TOKENS) :]
        self._ids[[ord(character) for character in characters]] = np.arange(len(characters)) + len(SPECIAL_TOKENS)

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts."""
        tokens = self._ids[np.frombuffer("".join(pieces).encode("utf-32-le"), "<u4")]
        return tokens, np.array([len(piece) for piece in pieces], np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, [PAD] and [BOS] left out."""
        return "".join(self.vocabulary[token] for token in without_special(self, tokens))

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes each token adds to a decoded text: int32 [vocabulary_size]. [UNK], which stands for
        one character, counts as one byte.
        """
        lengths = np.array([len(character.encode()) for character in self.vocabulary], np.int32)
        lengths[self.unknown_id] = 1
        return lengths

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and settings.json into a folder."""
        ids = {token: id for id, token in enumerate(self.vocabulary)}
        twin = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        twin.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        twin.decoder = decoders.Fuse()
        save_files(self, folder, twin.to_str(pretty=True))


class ByteTokenizer(Tokenizer):
    """One token for each UTF-8 byte; every text comes back exactly."""

    kind = "byte"
    is_lossy = False
    breaks = ANYWHERE
    vocabulary_size = ByteConfig.vocabulary_size
    pad_id, bos_id = range(2)
    unknown_id = -1

    def __init__(self) -> None:
        self.fingerprint = fingerprint_of(self.settings(), [])
        # BPE writes a byte as a letter: the visible ones of Latin-1 as themselves, the others from U+0100 on.
        seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        unseen = sorted(set(range(0x100)) - set(seen))
        letters = {**{byte: chr(byte) for byte in seen}, **{byte: chr(0x100 + i) for i, byte in enumerate(unseen)}}
        self.vocabulary = [*BYTE_SPECIAL_TOKENS, *(letters[byte] for byte in range(0x100))]

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts."""
        encoded = [piece.encode() for piece in pieces]
        tokens = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32) + len(BYTE_SPECIAL_TOKENS)
        return tokens, np.array([len(of_piece) for of_piece in encoded], np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, [PAD] and [BOS] left out; bytes that are not UTF-8 become U+FFFD."""
        values = without_special(self, tokens) - len(BYTE_SPECIAL_TOKENS)
        return values.astype(np.uint8).tobytes().decode(errors="replace")

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes each token adds to a decoded text: int32 [vocabulary_size]."""
        return np.ones(self.vocabulary_size, np.int32)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and settings.json into a folder."""
        twin = tokenizers.Tokenizer(models.BPE({token: id for id, token in enumerate(self.vocabulary)}, []))
        twin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        twin.decoder = decoders.ByteLevel()
        save_files(self, folder, twin.to_str(pretty=True))
