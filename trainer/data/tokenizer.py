"""Tokenizers: text to tokens and back, and the files that keep one.

keras_nlp's WordPieceTokenizer is the one WordPiece encoder. The tokenizer.json written beside its vocabulary is for
other tools: exact for char; for WordPiece equal on plain text and near on the rest, because Hugging Face folds the case
of a text before it splits words, and keras_nlp the other way round.
"""

import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import CharConfig, UserError, WordPieceConfig
from trainer.data.vocabulary import LONE_CHARACTER, SPECIAL_TOKENS, cut, train_wordpiece

# Folding turns the letter ㅋ (U+314B) into ᄏ (U+110F), the first part of a syllable, which without the other parts can
# only have been that letter.
_LETTER_OF_JAMO = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0x3131, 0x3164)}
_LONE_JAMO = re.compile(
    r"[\u1100-\u115f](?![\u1160-\u11a7])|(?<![\u1100-\u115f])[\u1160-\u11a7]"
    r"|(?<![\u1160-\u11a7\uac00-\ud7a3])[\u11a8-\u11ff]"
)


class WordPieceTokenizer:
    """WordPiece with the tutorial's settings: words end at whitespace, punctuation and ideographs; case is folded.

    Differs from the tutorial's in one point: a word of more than 100 bytes is split into tokens like any other, where
    keras_nlp makes it one [UNK]. Scripts that put no spaces between words, such as Thai, are full of them.

    Attributes:
        vocabulary: the tokens; a token's index is its id.
        lowercase: whether case is folded, by Unicode's NFKC case folding.
        keras_tokenizer: the keras_nlp layer.
        fingerprint: SHA-256 of all that decides how text becomes tokens.
    """

    kind = "wordpiece"
    pad_id, unknown_id, bos_id = range(3)
    is_lossy = True
    """Whether decoding may give another text, in spacing, case or form, than was encoded."""

    def __init__(self, vocabulary: Sequence[str], lowercase: bool):
        # Here, like every import of TensorFlow in this module: a misspelt path should not wait for it to load.
        import keras_nlp
        import tensorflow as tf
        import tensorflow_text

        self.vocabulary, self.lowercase = list(vocabulary), lowercase
        self.fingerprint = _fingerprint(self.settings(), self.vocabulary)
        # Without _allow_python_workflow, eager calls would take keras_nlp's second encoder, written in Python.
        self.keras_tokenizer = keras_nlp.tokenizers.WordPieceTokenizer(
            self.vocabulary, lowercase=lowercase, special_tokens=list(SPECIAL_TOKENS), _allow_python_workflow=False
        )
        self.keras_tokenizer._fast_word_piece = tensorflow_text.FastWordpieceTokenizer(
            self.vocabulary, max_bytes_per_word=2**30, token_out_type=tf.int32, unknown_token="[UNK]",
            no_pretokenization=True, support_detokenization=True,
        )  # fmt: skip
        self._tokenize = tf.function(self.keras_tokenizer.tokenize, [tf.TensorSpec([None], tf.string)], autograph=False)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, the special ones included."""
        return len(self.vocabulary)

    def settings(self) -> dict[str, Any]:
        """Returns what, beside the vocabulary, decides how text becomes tokens."""
        return {"kind": self.kind, "lowercase": self.lowercase}

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of one text, without [BOS]: int32 [tokens]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, without [BOS]: int32 [tokens]."""
        return _encode_whole(self, texts)

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts that `cut` has made short; may be called from several threads.

        Returns:
            (tokens, lengths): the tokens of all pieces, int32 [tokens], and how many each has, int64 [pieces].
        """
        tokens = self._tokenize(list(pieces))
        return tokens.values.numpy(), tokens.row_lengths().numpy()

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, words joined by single spaces, [PAD] and [BOS] left out."""
        kept = _without_padding(tokens)
        if not len(kept):
            return ""
        text: str = self.keras_tokenizer.detokenize(kept)
        if self.lowercase:
            text = _LONE_JAMO.sub(lambda jamo: _LETTER_OF_JAMO.get(jamo[0], jamo[0]), text)
        return text

    def save(self, folder: Path) -> None:
        """Writes vocab.txt, which keras_nlp and BERT's tools read, tokenizer.json and settings.json into a folder."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        ids = {token: id for id, token in enumerate(self.vocabulary)}
        twin = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=2**30))
        if self.lowercase:
            # The letters of large languages that folding changes and lower-casing does not.
            folds = [normalizers.Replace("ß", "ss"), normalizers.Replace("ς", "σ")]
            twin.normalizer = normalizers.Sequence(
                [normalizers.NFKC(), normalizers.Lowercase(), *folds, normalizers.NFKC()]
            )
        twin.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"[ \t\n\r\f\p{Cc}\p{Cf}]+"), "removed"),
            pre_tokenizers.Split(Regex(rf"{LONE_CHARACTER}|\p{{P}}"), "isolated"),
        ])  # fmt: skip
        twin.decoder = decoders.WordPiece("##", cleanup=False)
        _save(self, folder, twin)
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in self.vocabulary), "utf-8", newline="\n")


class CharTokenizer:
    """One token for each Unicode code point of the text it was made from; decoding gives those back exactly.

    Attributes:
        vocabulary: the tokens; a token's index is its id.
        fingerprint: SHA-256 of all that decides how text becomes tokens.
    """

    kind = "char"
    pad_id, unknown_id, bos_id = range(3)
    is_lossy = False
    """Whether decoding may give another text than was encoded; here only where a character is unknown."""

    def __init__(self, vocabulary: Sequence[str]):
        self.vocabulary = list(vocabulary)
        self.fingerprint = _fingerprint(self.settings(), self.vocabulary)
        self._ids = np.full(0x110000, self.unknown_id, np.int32)  # Every code point there can be: 4 MB.
        characters = self.vocabulary[len(SPECIAL_TOKENS) :]
        self._ids[[ord(character) for character in characters]] = np.arange(len(characters)) + len(SPECIAL_TOKENS)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, the special ones included."""
        return len(self.vocabulary)

    def settings(self) -> dict[str, Any]:
        """Returns what, beside the vocabulary, decides how text becomes tokens."""
        return {"kind": self.kind}

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of one text, without [BOS]: int32 [tokens]."""
        return self._ids[np.frombuffer(text.encode("utf-32-le"), "<u4")]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, without [BOS]: int32 [tokens]."""
        return [self.encode(text) for text in texts]

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts together; returns (tokens int32 [tokens], lengths int64 [pieces])."""
        return self.encode("".join(pieces)), np.array([len(piece) for piece in pieces], np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, [PAD] and [BOS] left out."""
        return "".join(self.vocabulary[token] for token in _without_padding(tokens))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and settings.json into a folder."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        ids = {token: id for id, token in enumerate(self.vocabulary)}
        twin = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        twin.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        twin.decoder = decoders.Fuse()
        _save(self, folder, twin)


Tokenizer = WordPieceTokenizer | CharTokenizer


def _encode_whole(tokenizer: WordPieceTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    if not texts:
        return []
    pieces = [list(cut(text)) for text in texts]
    tokens, lengths = tokenizer.encode_pieces(list(itertools.chain.from_iterable(pieces)))
    last_pieces = np.cumsum([len(of_text) for of_text in pieces]) - 1
    return np.split(tokens, np.cumsum(lengths)[last_pieces][:-1])


def _without_padding(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(tokens, np.int32)
    return array[(array != WordPieceTokenizer.pad_id) & (array != WordPieceTokenizer.bos_id)]


def _fingerprint(settings: dict[str, Any], vocabulary: list[str]) -> str:
    return hashlib.sha256(json.dumps([settings, vocabulary], sort_keys=True).encode()).hexdigest()


def _save(tokenizer: Tokenizer, folder: Path, twin: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(twin.to_str(pretty=True), "utf-8")
    settings = {**tokenizer.settings(), "fingerprint": tokenizer.fingerprint}
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads what `save` wrote.

    Raises:
        UserError: a file is missing or damaged, or the vocabulary is not the one that was saved.
    """
    folder = Path(folder)
    tokenizer: Tokenizer
    try:
        settings = json.loads((folder / "settings.json").read_text("utf-8"))
        if settings["kind"] == "wordpiece":
            lines = (folder / "vocab.txt").read_text("utf-8").split("\n")[:-1]
            tokenizer = WordPieceTokenizer(lines, settings["lowercase"])
        else:
            ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
            tokenizer = CharTokenizer(sorted(ids, key=ids.get))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: not a whole tokenizer ({error!r}); delete what holds it and prepare again."
        ) from None
    if tokenizer.fingerprint != settings["fingerprint"]:
        raise UserError(
            f"{folder}: the tokenizer has fingerprint {tokenizer.fingerprint[:10]}, but {settings['fingerprint']!s:.10}"
            " was saved, so a file was changed. Restore it, or delete what holds it and prepare again."
        )
    return tokenizer


def train_tokenizer(config: WordPieceConfig | CharConfig, documents: Iterable[str]) -> Tokenizer:
    """Makes the tokenizer a config asks for from documents, read once.

    Raises:
        UserError: the vocabulary is too small for the characters of the text.
    """
    if isinstance(config, CharConfig):
        characters: set[str] = set()
        for document in documents:
            characters.update(document)
        return CharTokenizer([*SPECIAL_TOKENS, *sorted(characters)])
    return WordPieceTokenizer(train_wordpiece(config, documents), config.lowercase)
