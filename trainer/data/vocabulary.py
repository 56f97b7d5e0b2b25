"""Training WordPiece and byte-level BPE vocabularies, with all the knowledge of where words end.

Hugging Face's trainer does the counting. For WordPiece, where it is tens of times faster than keras_nlp's, it is fed
words that went through keras_nlp's own pretokenizer, because the two split and normalize differently.
"""

import functools
import hashlib
import heapq
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

from trainer.config import BpeConfig, UserError, WordPieceConfig
from trainer.data.files import Document, parts_of

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[BOS]")
# Bytes can spell everything.
BYTE_SPECIAL_TOKENS = ("[PAD]", "[BOS]")

# keras_nlp makes each of these, and all other Unicode punctuation, a word of its own.
LONE_CHARACTER = (
    "[!-/:-@\\[-`{-~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)
# A match ends where a word ends whatever surrounds it, so that a cut there changes no token.
WORDPIECE_BREAKS = re.compile(r"[ \t\n\r\f!-/:-@\[-`{-~\u3400-\u4dbf\u4e00-\u9fff]")
# Spaces belong to the word after them. Letters are spelled out, and few, because what is one changes with Unicode's
# version, which Python and the encoder need not share.
BPE_BREAKS = re.compile(
    r"\S(?= )|[A-Za-z\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3](?=[\n,.!?、。，！？])"
)
ANYWHERE = re.compile(r"[\s\S]")
# Longer texts are handled in pieces of about this many characters, which bounds memory.
_PIECE_CHARS = 1 << 16
_BATCH_BYTES = 1 << 20
# keras_nlp refuses tokens of over 256 bytes.
_MAX_TOKEN_CHARS = 64
_MAX_WORD_CHARS = 500

Pretokenize = Callable[[list[bytes]], list[str]]


def cut(text: str, breaks: re.Pattern[str], num_chars: int = _PIECE_CHARS) -> Iterator[str]:
    """Yields a text in pieces whose tokens, joined, are the tokens of the whole; at least one piece.

    Only where nothing breaks a word for num_chars characters is the word itself cut, as if it ended there.

    Args:
        text: the text.
        breaks: matches of at least one character, at whose ends the text may be cut: a tokenizer's.
        num_chars: a piece has this many characters or a few more, and at most twice as many.
    """
    start = 0
    while len(text) - start > num_chars:
        found = breaks.search(text, start + num_chars - 1, start + 2 * num_chars)
        end = found.end() if found else start + 2 * num_chars
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def cut_document(document: Document, breaks: re.Pattern[str], num_chars: int = _PIECE_CHARS) -> Iterable[str]:
    """Returns the pieces that `cut` makes of a whole document, of which no more than a part is there at a time."""
    if isinstance(document, str) and len(document) <= num_chars:
        return (document,)
    return _cut_parts(document, breaks, num_chars)


def _cut_parts(document: Document, breaks: re.Pattern[str], num_chars: int) -> Iterator[str]:
    rest, is_cut = "", False
    for part in parts_of(document):
        rest = rest + part if rest else part
        start = 0
        # What follows the next 2 * num_chars characters has no say in where the next cut is.
        while len(rest) - start >= 2 * num_chars:
            found = breaks.search(rest, start + num_chars - 1, start + 2 * num_chars)
            end = found.end() if found else start + 2 * num_chars
            yield rest[start:end]
            start, is_cut = end, True
        rest = rest[start:] if start else rest
    if rest or not is_cut:
        yield from cut(rest, breaks, num_chars)


def train_wordpiece(config: WordPieceConfig, documents: Iterable[Document]) -> list[str]:
    """Trains a vocabulary on documents, read once: special tokens, every character of the text, then the trained ones.

    Raises:
        UserError: the vocabulary is too small for the characters of the text.
    """
    pretokenize = _pretokenizer(config.lowercase)
    sample, alphabet = _Sample(config.sample_bytes), _Alphabet(pretokenize, config.lowercase)
    for document in documents:
        for piece in cut_document(document, WORDPIECE_BREAKS):
            sample.add(piece)
            alphabet.add(piece)
    forms = alphabet.forms()
    num_needed = len(SPECIAL_TOKENS) + len(forms)
    if config.vocabulary_size < num_needed:
        raise UserError(
            f"tokenizer.vocabulary_size={config.vocabulary_size} cannot hold the alphabet: the text needs at least "
            f"{num_needed}, as a letter is one token at the start of a word and another inside. "
            "Raise it, or use tokenizer.kind='char'."
        )
    return _count_and_merge(config.vocabulary_size, forms, _words(sample, pretokenize))


def train_bpe(config: BpeConfig, documents: Iterable[Document]) -> str:
    """Trains a byte-level BPE vocabulary on documents, read once; returns it as Hugging Face's tokenizer.json.

    The special tokens come first, then the bytes, then the trained tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    sample = _Sample(config.sample_bytes)
    for document in documents:
        for piece in cut_document(document, BPE_BREAKS):
            sample.add(piece)
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary_size,
        min_frequency=2,
        special_tokens=list(BYTE_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # In small pieces, because the trainer's time grows with the square of a word's length.
    pieces = (piece for text in sample.texts() for piece in cut(text.decode(), BPE_BREAKS, _MAX_WORD_CHARS // 2))
    model.train_from_iterator(pieces, trainer)
    settings = json.loads(model.to_str())
    # Unlisted, special tokens are never looked for in a text.
    settings["added_tokens"] = []
    return json.dumps(settings, ensure_ascii=False, indent=2) + "\n"


def _count_and_merge(size: int, forms: list[str], words: Iterable[str]) -> list[str]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    # A WordPiece trainer is a BPE trainer with ##, but does not let us bound a token's length.
    model = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    model.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    # The alphabet goes in as special tokens because those are numbered in this order. Other characters would be in the
    # order of a hash table, and numbers decide between pairs of equal count.
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *forms],
        continuing_subword_prefix="##",
        max_token_length=_MAX_TOKEN_CHARS,
        show_progress=False,
    )
    model.train_from_iterator(words, trainer)
    ids = model.get_vocab()
    return sorted(ids, key=ids.__getitem__)


@functools.cache
def _pretokenizer(lowercase: bool) -> Pretokenize:
    """Returns keras_nlp's own splitting of texts into normalized words."""
    import tensorflow as tf
    from keras_hub.src.tokenizers import word_piece_tokenizer

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def joined_words(texts: tf.Tensor) -> tf.Tensor:
        words = word_piece_tokenizer.pretokenize(texts, lowercase=lowercase, strip_accents=False)
        return tf.strings.reduce_join(words.values, separator="\n")

    # A line feed is whitespace, so no word has one.
    return lambda texts: [word for word in joined_words(texts).numpy().decode().split("\n") if word]


class _Sample:
    """Pieces of text from all over a corpus of unknown size: those of the smallest hashes, up to a number of bytes."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._pieces: list[tuple[int, bytes]] = []  # A heap of (-hash, text).
        self._bound = 1 << 64

    def add(self, piece: str) -> None:
        text = piece.encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"sample").digest(), "little")
        if key >= self._bound:
            return
        heapq.heappush(self._pieces, (-key, text))
        self._num_bytes += len(text)
        while self._num_bytes > self._max_bytes:
            negative_key, dropped = heapq.heappop(self._pieces)
            self._bound, self._num_bytes = -negative_key, self._num_bytes - len(dropped)

    def texts(self) -> Iterator[bytes]:
        """Yields the pieces, in an order that depends on nothing but them."""
        for _, text in sorted(self._pieces):
            yield text


def _words(sample: _Sample, pretokenize: Pretokenize) -> Iterator[str]:
    """Yields the words, joined by line feeds in short strings: the trainer holds many strings at a time."""
    batch: list[bytes] = []
    num_bytes = 0
    for text in sample.texts():
        batch.append(text)
        num_bytes += len(text)
        if num_bytes >= _BATCH_BYTES:
            yield from _joined(pretokenize(batch))
            batch, num_bytes = [], 0
    if batch:
        yield from _joined(pretokenize(batch))


def _joined(words: list[str]) -> Iterator[str]:
    # The trainer's time grows with the square of a word's length.
    words = [word[i : i + _MAX_WORD_CHARS] for word in words for i in range(0, len(word), _MAX_WORD_CHARS)]
    for start in range(0, len(words), 1000):
        yield "\n".join(words[start : start + 1000])


class _Alphabet:
    """All characters of a text after normalization, in the forms in which a word of such characters may need them."""

    def __init__(self, pretokenize: Pretokenize, lowercase: bool):
        self._pretokenize, self._lowercase = pretokenize, lowercase
        self._characters: set[str] = set()
        self._inner: set[str] = set()  # Those seen after the first character of a word.
        self._ascii: set[str] = set()
        self._seen = b""  # The same, as bytes.
        self._known: set[bytes] = set()
        self._waiting: set[bytes] = set()
        self._num_waiting_bytes = 0

    def add(self, piece: str) -> None:
        if piece.isascii():
            # What is left without the characters that were seen: found ten times as fast as all its characters are.
            if new := piece.encode().translate(None, self._seen):
                self._ascii.update(new.decode())
                self._seen = "".join(self._ascii).encode()
            return
        self._ascii.update(filter(str.isascii, piece))
        # Only what is not ASCII, and each such chunk once, goes through the slow pretokenizer; it, too, ends a word
        # wherever bytes.split() does.
        chunks = {chunk for chunk in piece.encode().split() if not chunk.isascii()} - self._known - self._waiting
        self._waiting |= chunks
        self._num_waiting_bytes += sum(map(len, chunks))
        if self._num_waiting_bytes >= _BATCH_BYTES:
            self._read_waiting()

    def _read_waiting(self) -> None:
        words = self._pretokenize(sorted(self._waiting)) if self._waiting else []
        self._characters.update(*words)
        self._inner.update(*(word[1:] for word in words))
        if len(self._known) > 200_000:
            self._known = set()
        self._known |= {chunk for chunk in self._waiting if len(chunk) <= 100}
        self._waiting, self._num_waiting_bytes = set(), 0

    def forms(self) -> list[str]:
        """Returns each character as a token, and with ## where it can follow another one in a word, sorted.

        A letter gets both even where the text has it in one place only: for one missing form WordPiece makes a whole
        word [UNK].
        """
        self._read_waiting()
        seen = {character for character in self._ascii if "!" <= character <= "~"}
        characters = self._characters | ({character.lower() for character in seen} if self._lowercase else seen)
        inner = {character for character in characters if not _is_lone(character)} | self._inner
        return sorted(characters) + sorted(f"##{character}" for character in inner)


def _is_lone(character: str) -> bool:
    return bool(re.match(LONE_CHARACTER, character)) or unicodedata.category(character).startswith("P")
