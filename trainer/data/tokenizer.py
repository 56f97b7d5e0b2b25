"""Tokenizers: text to tokens and back, and the files that keep one.

keras_nlp's WordPieceTokenizer is the one WordPiece encoder, and Hugging Face's the one BPE encoder. Each kind also
writes a tokenizer.json for other tools: exact but for WordPiece, where it is equal on plain text and near on the rest,
because Hugging Face folds the case of a text before it splits words, and keras_nlp the other way round.
"""

import collections
import hashlib
import itertools
import json
import re
import stat
import unicodedata
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from trainer.config import (
    BpeConfig,
    BpeFileConfig,
    ByteConfig,
    CharConfig,
    TokenizerConfig,
    WordPieceConfig,
    WordPieceFileConfig,
)
from trainer.data.files import Document, parts_of
from trainer.data.formats import SAMPLE_BYTES, START_BYTES, fault_of_bytes, fault_of_start
from trainer.data.vocabulary import (
    ANYWHERE,
    BPE_BREAKS,
    BYTE_SPECIAL_TOKENS,
    LONE_CHARACTER,
    SPECIAL_TOKENS,
    WORDPIECE_BREAKS,
    cut,
    train_bpe,
    train_wordpiece,
)
from trainer.errors import UserError
from trainer.system.storage import locate

# What vocabularies call padding, and the token before a document; the end of one text is the start of the next.
_PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")
_BOS_NAMES = ("[BOS]", "[CLS]", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")

# Folding turns the letter ㅋ (U+314B) into ᄏ (U+110F), the first part of a syllable, which without the other parts can
# only have been that letter.
_LETTER_OF_JAMO = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0x3131, 0x3164)}
_PLAIN_TOKEN = re.compile("[!-~]+")
_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f]")
_LONE_JAMO = re.compile(
    r"[\u1100-\u115f](?![\u1160-\u11a7])|(?<![\u1100-\u115f])[\u1160-\u11a7]"
    r"|(?<![\u1160-\u11a7\uac00-\ud7a3])[\u11a8-\u11ff]"
)


class Tokenizer(Protocol):
    """What all kinds have.

    Attributes:
        kind: as in tokenizer.kind.
        is_lossy: whether decoding may give another text than was encoded, even where no token is unknown.
        breaks: where a text may be cut without a change to its tokens; see `cut`.
        vocabulary_size: number of tokens, the special ones included.
        pad_id: token of padding; where the vocabulary has none, bos_id.
        unknown_id: token of what the vocabulary cannot spell; -1 where it can spell everything.
        bos_id: token before each document. No text has it, even one that holds its name.
        fingerprint: SHA-256 of all that decides how text becomes tokens.
    """

    kind: ClassVar[str]
    is_lossy: ClassVar[bool]
    breaks: ClassVar[re.Pattern[str]]
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
            (tokens, lengths): the tokens of all pieces, int32 [tokens], and how many each has, int64 [pieces].
        """
        ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, [PAD] and [BOS] left out."""
        ...

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes of UTF-8 each token adds to a decoded text: int32 [vocabulary_size]. Of special tokens
        it says nothing; a token that the vocabulary cannot spell is one byte, or its name.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Returns what, beside the vocabulary, decides how text becomes tokens."""
        return {"kind": self.kind}

    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer` reads, and tokenizer.json, into a folder."""
        ...


class WordPieceTokenizer(Tokenizer):
    """WordPiece with the tutorial's settings: words end at whitespace, punctuation and ideographs; case is folded.

    Differs from the tutorial's in one point: a word of more than 100 bytes is split into tokens like any other, where
    keras_nlp makes it one [UNK]. Scripts that put no spaces between words, such as Thai, are full of them.

    What comes back differs from the text in spacing, case and form.

    Attributes:
        vocabulary: the tokens; a token's index is its id.
        lowercase: whether case is folded, by Unicode's NFKC case folding.
        keras_tokenizer: the keras_nlp layer.

    Raises:
        ValueError: the vocabulary lacks a special token.
    """

    kind = "wordpiece"
    is_lossy = True
    breaks = WORDPIECE_BREAKS

    def __init__(self, vocabulary: Sequence[str], lowercase: bool):
        # Here, like every import of TensorFlow in this module: a misspelt path should not wait for it to load.
        import keras_nlp
        import tensorflow as tf
        import tensorflow_text

        self.vocabulary, self.lowercase = list(vocabulary), lowercase
        self.vocabulary_size = len(self.vocabulary)
        self.fingerprint = _fingerprint(self.settings(), self.vocabulary)
        ids = {token: id for id, token in enumerate(self.vocabulary)}
        names = [_first_of(names, ids) for names in (_PAD_NAMES, ("[UNK]",), _BOS_NAMES)]
        self.pad_id, self.unknown_id, self.bos_id = (ids[name] for name in names)
        # Without _allow_python_workflow, eager calls would take keras_nlp's second encoder, written in Python.
        self.keras_tokenizer = keras_nlp.tokenizers.WordPieceTokenizer(
            self.vocabulary, lowercase=lowercase, special_tokens=names, _allow_python_workflow=False
        )
        self._continued = [token[2:] if re.match("##.", token, re.DOTALL) else f" {token}" for token in self.vocabulary]
        settings: dict[str, Any] = {
            "max_bytes_per_word": 2**30, "token_out_type": tf.int32, "unknown_token": "[UNK]",
        }  # fmt: skip
        self.keras_tokenizer._fast_word_piece = tensorflow_text.FastWordpieceTokenizer(
            self.vocabulary, no_pretokenization=True, support_detokenization=True, **settings
        )
        # Plain ASCII it splits into the same words as keras_nlp by itself, in a third of the time. Tokens that hold
        # other characters cannot come there, and one with a space would mislead it.
        ascii_vocabulary = [
            token if _PLAIN_TOKEN.fullmatch(token) else f"\uffff{id}" for id, token in enumerate(self.vocabulary)
        ]
        of_ascii = tensorflow_text.FastWordpieceTokenizer(ascii_vocabulary, **settings)

        def tokenize_ascii(texts: tf.Tensor) -> tf.RaggedTensor:
            return of_ascii.tokenize(tf.strings.lower(texts) if lowercase else texts)

        texts = [tf.TensorSpec([None], tf.string)]
        self._tokenize = tf.function(self.keras_tokenizer.tokenize, texts, autograph=False)
        self._tokenize_ascii = tf.function(tokenize_ascii, texts, autograph=False)

    def settings(self) -> dict[str, Any]:
        """Returns what, beside the vocabulary, decides how text becomes tokens."""
        return {"kind": self.kind, "lowercase": self.lowercase}

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts that `cut` has made short."""
        is_plain = np.array([piece.isascii() and not _CONTROL.search(piece) for piece in pieces])
        if is_plain.all():
            tokens = _traced(self._tokenize_ascii)(list(pieces))
        else:
            import tensorflow as tf

            plain, other = (
                tf.constant([pieces[i] for i in np.flatnonzero(chosen).tolist()], tf.string)
                for chosen in (is_plain, ~is_plain)
            )
            tokens = tf.concat([_traced(self._tokenize_ascii)(plain), _traced(self._tokenize)(other)], axis=0)
            places = np.empty(len(pieces), np.int64)
            places[np.concatenate([np.flatnonzero(is_plain), np.flatnonzero(~is_plain)])] = np.arange(len(pieces))
            tokens = tf.gather(tokens, places)
        return tokens.values.numpy(), tokens.row_lengths().numpy()

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, words joined by single spaces, [PAD] and [BOS] left out."""
        kept = _without_special(self, tokens)
        if not len(kept):
            return ""
        # As keras_nlp does it, which takes a millisecond.
        text = self.vocabulary[kept[0]] + "".join(self._continued[id] for id in kept[1:].tolist())
        if self.lowercase:
            text = _LONE_JAMO.sub(lambda jamo: _LETTER_OF_JAMO.get(jamo[0], jamo[0]), text)
        return text

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes each token adds to a decoded text: int32 [vocabulary_size]. A word's first token adds
        the space before it.
        """
        return np.array([len(text.encode()) for text in self._continued], np.int32)

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
        _save(self, folder, twin.to_str(pretty=True))
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in self.vocabulary), "utf-8", newline="\n")


def _traced(function: Any) -> Any:
    """Returns a tf.function with its trace: TensorFlow warns when call after call traces the same code, as the first
    call of each tokenizer does.
    """
    if not function.experimental_get_tracing_count():
        function.get_concrete_function()
    return function


class BpeTokenizer(Tokenizer):
    """Byte-level BPE: text is split into words as GPT-2's, and every text comes back exactly.

    Args:
        file: a tokenizer.json of Hugging Face, its whole text.

    Raises:
        ValueError: it is none, or of another kind, or lacks the token before a document.
    """

    kind = "bpe"
    is_lossy = False
    breaks = BPE_BREAKS
    unknown_id = -1

    def __init__(self, file: str):
        self.file = file
        self.fingerprint = _fingerprint(self.settings(), [file])
        self.encoder = _parsed(file, "BPE")
        # What a file may ask for where a model is trained: texts cut and filled up, and other tokens each time.
        self.encoder.no_truncation()
        self.encoder.no_padding()
        self.encoder.model.dropout = None
        # The name of a special token in a text is text.
        self.encoder.encode_special_tokens = True
        ids = self.encoder.get_vocab()
        self.vocabulary_size = max(ids.values()) + 1
        if len(set(ids.values())) < len(ids):
            raise ValueError("two tokens have the same number")
        # Gaps that files have are small: each costs a row of the model's embedding, and the library goes through all of
        # them whenever it writes the file.
        if self.vocabulary_size > 2 * len(ids):
            raise ValueError(f"token numbers up to {self.vocabulary_size - 1}, for {len(ids)} tokens; count from 0 on")
        self._tokens_of_word = _TokensOfWord(self.encoder) if _splits_as_gpt2(self.encoder) else None
        self.bos_id = ids[_first_of(_BOS_NAMES, ids)]
        self.pad_id = next((ids[name] for name in _PAD_NAMES if name in ids), self.bos_id)

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts that `cut` has made short."""
        words = self._tokens_of_word
        is_plain = [words is not None and piece.isascii() for piece in pieces]
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
        """Returns the text of tokens, [PAD] and [BOS] left out; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.encoder.decode(_without_special(self, tokens).tolist())
        return text

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes each token adds to a decoded text: int32 [vocabulary_size]. A vocabulary of bytes
        writes each as one character.
        """
        lengths = np.zeros(self.vocabulary_size, np.int32)
        for token, id in self.encoder.get_vocab().items():
            lengths[id] = len(token)
        # Those that a file adds to the vocabulary are written as they are in a text.
        for id, added in self.encoder.get_added_tokens_decoder().items():
            lengths[id] = len(added.content.encode())
        return lengths

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and settings.json into a folder."""
        _save(self, folder, self.file)


# The words of GPT-2 in plain ASCII (Radford et al. 2019, in the code of their encoder).
_WORDS = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)


class _TokensOfWord(dict[str, bytes]):
    """The tokens of words as bytes of int32, each word encoded once: most of a text is words that were there before."""

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
    """Whether words are GPT-2's, and nothing else happens to a text before it is split or looks across words."""
    asked = json.loads(encoder.to_str())
    splits = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    is_alike = splits.items() <= (asked["pre_tokenizer"] or {}).items()
    return is_alike and asked["normalizer"] is None and all(token["special"] for token in asked["added_tokens"])


class CharTokenizer(Tokenizer):
    """One token for each Unicode code point of the text it was made from; decoding gives those back exactly.

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
        self.fingerprint = _fingerprint(self.settings(), self.vocabulary)
        self._ids = np.full(0x110000, self.unknown_id, np.int32)  # Every code point there can be: 4 MB.
        characters = self.vocabulary[len(SPECIAL_TOKENS) :]
        self._ids[[ord(character) for character in characters]] = np.arange(len(characters)) + len(SPECIAL_TOKENS)

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts."""
        tokens = self._ids[np.frombuffer("".join(pieces).encode("utf-32-le"), "<u4")]
        return tokens, np.array([len(piece) for piece in pieces], np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, [PAD] and [BOS] left out."""
        return "".join(self.vocabulary[token] for token in _without_special(self, tokens))

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes each token adds to a decoded text: int32 [vocabulary_size]. [UNK], which stands for
        one character, counts as one byte.
        """
        lengths = np.array([len(character.encode()) for character in self.vocabulary], np.int32)
        lengths[self.unknown_id] = 1
        return lengths

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and settings.json into a folder."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        ids = {token: id for id, token in enumerate(self.vocabulary)}
        twin = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        twin.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        twin.decoder = decoders.Fuse()
        _save(self, folder, twin.to_str(pretty=True))


class ByteTokenizer(Tokenizer):
    """One token for each UTF-8 byte; every text comes back exactly."""

    kind = "byte"
    is_lossy = False
    breaks = ANYWHERE
    vocabulary_size = ByteConfig.vocabulary_size
    pad_id, bos_id = range(2)
    unknown_id = -1

    def __init__(self) -> None:
        self.fingerprint = _fingerprint(self.settings(), [])

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts."""
        encoded = [piece.encode() for piece in pieces]
        tokens = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32) + len(BYTE_SPECIAL_TOKENS)
        return tokens, np.array([len(of_piece) for of_piece in encoded], np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, [PAD] and [BOS] left out; bytes that are no UTF-8 become U+FFFD."""
        values = _without_special(self, tokens) - len(BYTE_SPECIAL_TOKENS)
        return values.astype(np.uint8).tobytes().decode(errors="replace")

    def decoded_bytes(self) -> np.ndarray:
        """Returns how many bytes each token adds to a decoded text: int32 [vocabulary_size]."""
        return np.ones(self.vocabulary_size, np.int32)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and settings.json into a folder."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        # BPE writes a byte as a letter: those of Latin-1 that can be seen as themselves, the others from U+0100 on.
        seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        unseen = sorted(set(range(0x100)) - set(seen))
        letters = {**{byte: chr(byte) for byte in seen}, **{byte: chr(0x100 + i) for i, byte in enumerate(unseen)}}
        tokens = [*BYTE_SPECIAL_TOKENS, *(letters[byte] for byte in range(0x100))]
        twin = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, []))
        twin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        twin.decoder = decoders.ByteLevel()
        _save(self, folder, twin.to_str(pretty=True))


def _without_special(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(tokens, np.int32)
    return array[(array != tokenizer.pad_id) & (array != tokenizer.bos_id)]


def _first_of(names: Sequence[str], ids: Container[str]) -> str:
    found = [name for name in names if name in ids]
    if not found:
        raise ValueError(f"no token named {' or '.join(names)}")
    return found[0]


def _fingerprint(settings: dict[str, Any], vocabulary: list[str]) -> str:
    return hashlib.sha256(json.dumps([settings, vocabulary], sort_keys=True).encode()).hexdigest()


def _parsed(file: str, kind: str) -> Any:
    """Returns Hugging Face's tokenizer of a tokenizer.json; raises ValueError where it is none, or of another kind."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(file)
    except Exception as error:  # The library raises nothing more precise.
        raise ValueError(f"not a tokenizer.json of Hugging Face ({error})") from None
    if (found := type(tokenizer.model).__name__) != kind:
        raise ValueError(f"a {found} vocabulary, and not {kind}")
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path, file: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(file.encode())
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
            lines = (folder / "vocab.txt").read_bytes().decode().split("\n")[:-1]  # A token may hold \r.
            tokenizer = WordPieceTokenizer(lines, settings["lowercase"])
        elif settings["kind"] == "bpe":
            tokenizer = BpeTokenizer((folder / "tokenizer.json").read_bytes().decode())
        elif settings["kind"] == "byte":
            tokenizer = ByteTokenizer()
        else:
            ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
            tokenizer = CharTokenizer(sorted(ids, key=ids.get))
        saved = str(settings["fingerprint"])
    except Exception as error:  # A damaged file can make these libraries raise anything.
        raise UserError(
            f"{folder}: not a whole tokenizer ({error!r:.300}); delete what holds it and prepare again."
        ) from None
    if tokenizer.fingerprint != saved:
        raise UserError(
            f"{folder}: the tokenizer has fingerprint {tokenizer.fingerprint[:10]}, but {saved:.10} was saved, so a "
            "file was changed. Restore it, or delete what holds it and prepare again."
        )
    return tokenizer


def train_tokenizer(config: TokenizerConfig, documents: Iterable[Document]) -> Tokenizer:
    """Makes the tokenizer a config asks for: from documents, read once, or from a file.

    Raises:
        UserError: the vocabulary is too small for the characters of the text, or tokenizer.path cannot be used.
    """
    if isinstance(config, WordPieceFileConfig | BpeFileConfig):
        return _from_file(config)
    if isinstance(config, WordPieceConfig):
        return WordPieceTokenizer(train_wordpiece(config, documents), config.lowercase)
    if isinstance(config, BpeConfig):
        return BpeTokenizer(train_bpe(config, documents))
    if isinstance(config, CharConfig):
        characters: set[str] = set()
        for part in itertools.chain.from_iterable(map(parts_of, documents)):
            characters.update(part)
        return CharTokenizer([*SPECIAL_TOKENS, *sorted(characters)])
    return ByteTokenizer()


def read_tokenizer_file(config: TokenizerConfig) -> bytes | None:
    """Returns what is in the file that tokenizer.path names; None where the config names none.

    Raises:
        UserError: it cannot be read.
    """
    if not isinstance(config, WordPieceFileConfig | BpeFileConfig):
        return None
    path = locate(config.path)
    try:
        # A pipe would have to be read more than once, and a device may have no end.
        if isinstance(path, Path) and stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"tokenizer.path={config.path!r} is no file; write what it holds into one, and name that.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer.path={config.path!r}: cannot be read: {error.strerror or error}.") from None


def _from_file(config: WordPieceFileConfig | BpeFileConfig) -> Tokenizer:
    content, needed = read_tokenizer_file(config), "a tokenizer.json of byte-level BPE, such as GPT-2's"
    assert content is not None
    text = _text_of(content, config)
    try:
        if isinstance(config, BpeFileConfig):
            return _checked(BpeTokenizer(text))
        needed = "a vocab.txt or tokenizer.json of WordPiece, such as BERT's"
        return WordPieceTokenizer(_wordpiece_vocabulary(text, config), config.lowercase)
    except (ValueError, RuntimeError) as error:  # tensorflow_text's is the latter.
        raise UserError(f"tokenizer.path={config.path!r}: {error}; give {needed}.") from None


def _text_of(content: bytes, config: WordPieceFileConfig | BpeFileConfig) -> str:
    """Returns the text of a file that tokenizer.path names."""
    path, place = locate(config.path), content.find(0)
    if (fault := fault_of_start(path, content[:START_BYTES], is_packed=False)) is None:
        what = "NUL byte"
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            what, place = "not UTF-8", error.start
        if place < 0:
            return text
        advice = fault_of_bytes(path, content[:SAMPLE_BYTES], is_cut_off=False, is_packed=False)
        fault = f"{path}: {what} at byte offset {place}; {advice}"
    raise UserError(f"tokenizer.path={config.path!r}: {fault.removeprefix(f'{path}: ')}")


def _wordpiece_vocabulary(file: str, config: WordPieceFileConfig) -> list[str]:
    if Path(config.path).suffix.lower() == ".json":
        ids = _parsed(file, "WordPiece").get_vocab()
        vocabulary = sorted(ids, key=ids.get)
    else:
        vocabulary = _listed(file)
    counts = collections.Counter(vocabulary)
    if twice := next((token for token, count in counts.items() if count > 1), None):
        raise ValueError(f"{twice!r} is in it twice")
    capitals = [token for token in vocabulary if re.search("[A-Z]", token) and not re.fullmatch(r"\[.*\]", token)]
    if config.lowercase and capitals:
        raise ValueError(
            f"{len(capitals)} tokens have capitals, such as {capitals[0]!r}, which no text has with "
            "tokenizer.lowercase=true; set that to false"
        )
    return vocabulary


def _listed(file: str) -> list[str]:
    """Returns the tokens of a vocab.txt: one on each line, or each with its id after a blank or tab."""
    lines = [line.strip("\t\r\f") for line in file.rstrip("\n").split("\n")]
    while lines and not lines[-1].strip(" "):
        del lines[-1]
    numbered = [re.fullmatch(r"([^ \t]+)[ \t]+([^ \t]+) *", line) for line in lines]
    if all(numbered):
        ids = {each[2]: each[1] for each in numbered if each}
        wanted = [str(id) for id in range(len(lines))]
        if ids.keys() != set(wanted):
            raise ValueError(f"what follows its {len(lines)} tokens is not the ids 0 to {len(lines) - 1}, each once")
        return [ids[id] for id in wanted]
    for number, line in enumerate(lines, start=1):
        if not line or re.search("[\t\r\f]", line):
            raise ValueError(
                f"line {number}, {line[:80]!r}, is no token: it is empty or has a tab or a line's end in it"
            )
    # A word may hold a blank, which folding makes of a no-break space. Other blanks at a token's end are none of it.
    tokens = set(lines)
    bare = [line.rstrip(" ") for line in lines]
    return [
        line if token.removeprefix("##") == "" or token in tokens else token
        for line, token in zip(lines, bare, strict=True)
    ]


# Blanks of all kinds, what a normalizer would change, and places to cut at.
_PROBE = "The  quick\n\n fox's\t 12 feet.\r\n  n\u0303 \u1112\u1161\u11ab 한, ① ﬁ\u00a0 、我。\u200b 🙂 \u2028 "


def _checked(tokenizer: BpeTokenizer) -> BpeTokenizer:
    """Raises ValueError where some text does not come back, or words do not end where `cut` takes them to."""
    from tokenizers import pre_tokenizers

    ids = tokenizer.encoder.get_vocab()
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys():
        raise ValueError(f"no token for {len(missing)} of the 256 bytes")
    special = [name for name, id in ids.items() if id in (tokenizer.pad_id, tokenizer.bos_id)]
    text = _PROBE.join(["", *special, ""])
    whole = tokenizer.encode(text)
    if tokenizer.decode(whole) != text:
        raise ValueError("a text does not come back from its tokens")
    # A token beside the vocabulary is taken whole, and what is decoded of one such as "é" is a byte of that number.
    for id, added in tokenizer.encoder.get_added_tokens_decoder().items():
        name = f"a {added.content} b"
        if id not in (tokenizer.pad_id, tokenizer.bos_id) and tokenizer.decode(tokenizer.encode(name)) != name:
            raise ValueError(f"a text with the added token {added.content!r} does not come back from its tokens")
    ends = [0, *(found.end() for found in BPE_BREAKS.finditer(text)), len(text)]
    tokens, _ = tokenizer.encode_pieces([text[start:end] for start, end in itertools.pairwise(ends)])
    if tokens.tolist() != whole.tolist():
        raise ValueError("words do not end before spaces")
    return tokenizer
