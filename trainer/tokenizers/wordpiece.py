"""WordPiece: words, normalized, as the longest tokens of the vocabulary that spell them.

Gives the tokens that keras_nlp's WordPieceTokenizer gives, with tensorflow_text's encoder.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_text
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from trainer.tokenizers.cutting import BOOK_MARKS, LONE_CHARACTER, WORDPIECE_BREAKS
from trainer.tokenizers.tokenizer import (
    BOS_NAMES,
    PAD_NAMES,
    Tokenizer,
    fingerprint_of,
    first_of,
    save_files,
    without_special,
)

# Folding turns the letter ㅋ (U+314B) into ᄏ (U+110F), the first part of a syllable. Without the other parts it can
# only have been that letter.
LETTER_OF_JAMO = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0x3131, 0x3164)}
_LONE_JAMO = re.compile(
    r"[\u1100-\u115f](?![\u1160-\u11a7])|(?<![\u1100-\u115f])[\u1160-\u11a7]"
    r"|(?<![\u1160-\u11a7\uac00-\ud7a3])[\u11a8-\u11ff]"
)
_PLAIN_TOKEN = re.compile(f"[!-~{BOOK_MARKS}]+")
_PLAIN = re.compile(f"[\t-\r -~{BOOK_MARKS}]*")  # Without control characters.

# In RE2's syntax: a character that is always a separate word, and white space, which is left out.
_LONE_WORD = rf"{LONE_CHARACTER}|\p{{P}}"
_SPACE = r"[\s\p{Cc}\p{Cf}]"


def split_into_words(texts: tf.Tensor | Sequence[bytes], lowercase: bool) -> tf.RaggedTensor:
    """Splits texts into words as keras_nlp does: at white space and control characters; a punctuation mark and an
    ideograph are separate words.

    Args:
        texts: string [texts].
        lowercase: whether to fold the case of the words, by Unicode's NFKC case folding; a word may become empty.

    Returns:
        The words of each text: string [texts, words].
    """
    texts = tf.convert_to_tensor(texts, tf.string)
    words = tensorflow_text.regex_split(texts, f"{_SPACE}|{_LONE_WORD}", _LONE_WORD)
    return tensorflow_text.case_fold_utf8(words) if lowercase else words


class WordPieceTokenizer(Tokenizer):
    """WordPiece with the tutorial's settings: words end at whitespace, punctuation and ideographs; case is folded.

    Differs from the tutorial's tokenizer in one point: a word of more than 100 bytes is split into tokens like any
    other word, while keras_nlp makes it one [UNK]. Scripts that put no spaces between words, such as Thai, are full of
    such words.

    A decoded text differs from the encoded one in spacing, case and form.

    Attributes:
        vocabulary: the tokens; a token's index is its id.
        lowercase: whether case is folded, by Unicode's NFKC case folding.
        continued: the text that each token adds to a decoded text, unless it is the first one.
        tokenize: a tf.function from string [texts] to their tokens, int32 [texts, tokens].

    Raises:
        ValueError: the vocabulary lacks a special token.
        RuntimeError: tensorflow_text refuses the vocabulary.
    """

    kind = "wordpiece"
    is_lossy = True
    breaks = WORDPIECE_BREAKS

    def __init__(self, vocabulary: Sequence[str], lowercase: bool):
        self.vocabulary, self.lowercase = list(vocabulary), lowercase
        self.vocabulary_size = len(self.vocabulary)
        self.fingerprint = fingerprint_of(self.settings(), self.vocabulary)
        ids = {token: id for id, token in enumerate(self.vocabulary)}
        names = [first_of(names, ids) for names in (PAD_NAMES, ("[UNK]",), BOS_NAMES)]
        self.pad_id, self.unknown_id, self.bos_id = (ids[name] for name in names)
        self.continued = [token[2:] if re.match("##.", token, re.DOTALL) else f" {token}" for token in self.vocabulary]
        texts = [tf.TensorSpec([None], tf.string)]
        self.tokenize = tf.function(self._encoder(), texts, autograph=False)
        self._tokenize_plain = tf.function(self._encoder_of_plain(), texts, autograph=False)

    def _encoder(self) -> Any:
        of_words = _fast_encoder(self.vocabulary, no_pretokenization=True)

        def encode(texts: tf.Tensor) -> tf.RaggedTensor:
            # Strings are on a CPU only. Without this, TensorFlow could place the lengths on a GPU.
            with tf.device("cpu"):
                return of_words.tokenize(split_into_words(texts, self.lowercase)).merge_dims(-2, -1)

        return encode

    def _encoder_of_plain(self) -> Any:
        """Returns an encoder of ASCII and the marks of books, which splits it into the same words in a third of the
        time."""
        # Tokens with other characters never occur in such texts, and a token with a space would mislead the encoder:
        # each is replaced by one that no text has.
        of_texts = _fast_encoder(
            [token if _PLAIN_TOKEN.fullmatch(token) else f"\uffff{id}" for id, token in enumerate(self.vocabulary)]
        )

        def encode(texts: tf.Tensor) -> tf.RaggedTensor:
            return of_texts.tokenize(tf.strings.lower(texts) if self.lowercase else texts)

        return encode

    def settings(self) -> dict[str, Any]:
        """Returns what, beside the vocabulary, decides how text becomes tokens."""
        return {"kind": self.kind, "lowercase": self.lowercase}

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts that `cut` has made short."""
        is_plain = np.array([_PLAIN.fullmatch(piece) is not None for piece in pieces])
        if is_plain.all():
            tokens = _traced(self._tokenize_plain)(list(pieces))
        else:
            plain, other = (
                tf.constant([pieces[i] for i in np.flatnonzero(chosen).tolist()], tf.string)
                for chosen in (is_plain, ~is_plain)
            )
            tokens = tf.concat([_traced(self._tokenize_plain)(plain), _traced(self.tokenize)(other)], axis=0)
            places = np.empty(len(pieces), np.int64)
            places[np.concatenate([np.flatnonzero(is_plain), np.flatnonzero(~is_plain)])] = np.arange(len(pieces))
            tokens = tf.gather(tokens, places)
        return tokens.values.numpy(), tokens.row_lengths().numpy()

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, words joined by single spaces, [PAD] and [BOS] left out."""
        kept = without_special(self, tokens)
        if not len(kept):
            return ""
        # The same text as from keras_nlp's layer, which takes a millisecond.
        text = self.vocabulary[kept[0]] + "".join(self.continued[id] for id in kept[1:].tolist())
        if self.lowercase:
            text = _LONE_JAMO.sub(lambda jamo: LETTER_OF_JAMO.get(jamo[0], jamo[0]), text)
        return text

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes each token adds to a decoded text: int32 [vocabulary_size]. A word's first token adds
        the space before it.
        """
        return np.array([len(text.encode()) for text in self.continued], np.int32)

    def save(self, folder: Path) -> None:
        """Writes vocab.txt, which keras_nlp and BERT's tools read, tokenizer.json and settings.json into a folder."""
        ids = {token: id for id, token in enumerate(self.vocabulary)}
        twin = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=2**30))
        if self.lowercase:
            # The letters of large languages that folding changes and lower-casing does not.
            folds = [normalizers.Replace("ß", "ss"), normalizers.Replace("ς", "σ")]
            twin.normalizer = normalizers.Sequence(
                [normalizers.NFKC(), normalizers.Lowercase(), *folds, normalizers.NFKC()]
            )
        twin.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(r"[ \t\n\r\f\p{Cc}\p{Cf}]+"), "removed"),
            pre_tokenizers.Split(tokenizers.Regex(_LONE_WORD), "isolated"),
        ])  # fmt: skip
        twin.decoder = decoders.WordPiece("##", cleanup=False)
        save_files(self, folder, twin.to_str(pretty=True))
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in self.vocabulary), "utf-8", newline="\n")


def _fast_encoder(vocabulary: list[str], no_pretokenization: bool = False) -> tensorflow_text.FastWordpieceTokenizer:
    return tensorflow_text.FastWordpieceTokenizer(
        vocabulary,
        max_bytes_per_word=2**30,
        token_out_type=tf.int32,
        unknown_token="[UNK]",
        no_pretokenization=no_pretokenization,
    )


def _traced(function: Any) -> Any:
    """Returns a tf.function that has been traced. If calls traced it, TensorFlow would warn, because the first call of
    each tokenizer traces the same code.
    """
    if not function.experimental_get_tracing_count():
        function.get_concrete_function()
    return function
