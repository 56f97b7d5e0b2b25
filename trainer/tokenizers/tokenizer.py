"""The interface of all tokenizers: text to tokens and back, a fingerprint, and the files of a tokenizer's folder.

wordpiece.py, bpe.py and characters.py hold the kinds; tokenizer_files.py makes, loads and reads them. Each kind also
writes a tokenizer.json for other tools, which gives the same tokens. Only WordPiece's file gives slightly different
tokens for text that is not plain: Hugging Face folds the case of a text before it splits words, keras_nlp afterwards.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import tokenizers

from trainer.tokenizers.cutting import cut

# The names that vocabularies give to padding, and to the token before a document; GPT-2's is named after the end of a
# document.
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")
BOS_NAMES = ("[BOS]", "[CLS]", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")


class Tokenizer(Protocol):
    """The methods and attributes of all kinds of tokenizers.

    Attributes:
        kind: the value of tokenizer.kind.
        is_lossy: whether a decoded text may differ from the encoded one, even if no token is unknown.
        breaks: matches the places at which a text may be cut without a change to its tokens; see `cut`.
        vocabulary: the tokens; a token's index is its id. BPE and byte write each byte as a letter, as tokenizer.json
            does; "" stands for an id that a file has left out.
        vocabulary_size: number of tokens, the special ones included.
        pad_id: token of padding; bos_id if the vocabulary has none.
        unknown_id: token for words or characters that the vocabulary cannot spell; -1 if it can spell everything.
        bos_id: token before each document. The tokens of a text never hold it, even if the text holds its name.
        fingerprint: SHA-256 of all that decides how text becomes tokens.
    """

    kind: ClassVar[str]
    is_lossy: ClassVar[bool]
    breaks: ClassVar[re.Pattern[str]]
    vocabulary: list[str]
    vocabulary_size: int
    pad_id: int
    unknown_id: int
    bos_id: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of one text, without [BOS]: int32 [tokens]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, without [BOS]: int32 [tokens]."""
        if not texts:
            return []
        pieces = [list(cut(text, self.breaks)) for text in texts]
        tokens, lengths = self.encode_pieces(list(itertools.chain.from_iterable(pieces)))
        last_pieces = np.cumsum([len(of_text) for of_text in pieces]) - 1
        return np.split(tokens, np.cumsum(lengths)[last_pieces][:-1])

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts that `cut` has made short; may be called from several threads.

        Returns:
            (tokens, lengths): the tokens of all pieces, int32 [tokens], and how many each piece has, int64 [pieces].
        """
        ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, [PAD] and [BOS] left out."""
        ...

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes of UTF-8 each token adds to a decoded text: int32 [vocabulary_size]. The figures of
        special tokens have no meaning; unknown_id counts as one byte, or as the bytes of its name.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Returns what, beside the vocabulary, decides how text becomes tokens."""
        return {"kind": self.kind}

    def save(self, folder: Path) -> None:
        """Writes the files that `load_tokenizer` reads, and tokenizer.json, into a folder."""
        ...


def without_special(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns tokens without [PAD] and [BOS]: int32 [tokens]."""
    array = np.asarray(tokens, np.int32)
    return array[(array != tokenizer.pad_id) & (array != tokenizer.bos_id)]


def first_of(names: Sequence[str], ids: Container[str]) -> str:
    """Returns the first of some names that a vocabulary has.

    Raises:
        ValueError: it has none of them.
    """
    found = [name for name in names if name in ids]
    if not found:
        raise ValueError(f"no token named {' or '.join(names)}")
    return found[0]


def fingerprint_of(settings: dict[str, Any], vocabulary: list[str]) -> str:
    """Returns a SHA-256 of all that decides how text becomes tokens."""
    return hashlib.sha256(json.dumps([settings, vocabulary], sort_keys=True).encode()).hexdigest()


def parse_tokenizer_json(file: str, kind: str) -> tokenizers.Tokenizer:
    """Returns Hugging Face's tokenizer of a tokenizer.json.

    Args:
        file: the text of the file.
        kind: the kind of model that the file must have: BPE or WordPiece.

    Raises:
        ValueError: it is not a tokenizer.json, or of another kind.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file)
    except Exception as error:  # The library raises nothing more precise.
        raise ValueError(f"not a tokenizer.json of Hugging Face ({error})") from None
    if (found := type(tokenizer.model).__name__) != kind:
        raise ValueError(f"a {found} vocabulary, and not {kind}")
    return tokenizer


def save_files(tokenizer: Tokenizer, folder: Path, file: str) -> None:
    """Writes tokenizer.json, whose text is file, and settings.json into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(file.encode())
    settings = {**tokenizer.settings(), "fingerprint": tokenizer.fingerprint}
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
