"""Training WordPiece and byte-level BPE vocabularies, with all the knowledge of where words end.

Hugging Face's trainer does the counting. For WordPiece, where it is tens of times faster than keras_nlp's, it is fed
words that went through keras_nlp's own pretokenizer, because the two split and normalize differently.
"""

import hashlib
import heapq
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from trainer.config import MIN_BPE_TOKENS, BpeConfig, WordPieceConfig
from trainer.data.files import Document, parts_of
from trainer.errors import UserError

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
# How many times as many tokens are merged as are kept.
_CANDIDATES = 1.2
# BPE makes no token that the text has less often: a model could not learn it, and others spell what it stands for.
# By this the vocabulary follows the amount of text: 20 kB of a play make 528 tokens, 1.1 MB of it 4,700.
MIN_BPE_COUNT = 10
# So many different ones are held at a time.
_MAX_CHUNKS = 200_000
# keras_nlp refuses tokens of over 256 bytes.
_MAX_TOKEN_CHARS = 64
# Longer words are learned from in parts: the time that takes grows with the square of their length.
_MAX_WORD_CHARS = 100

# Splits texts into normalized words: all of them, some empty, and how many each text has.
Pretokenize = Callable[[list[bytes]], tuple[list[str], np.ndarray]]


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
        UserError: the vocabulary is too small for the characters of the text, or none of these can be seen.
    """
    pretokenize = _pretokenizer(config.lowercase)
    sample, alphabet = _Sample(config.sample_bytes), _Alphabet(pretokenize, config.lowercase)
    for document in documents:
        for piece in cut_document(document, WORDPIECE_BREAKS):
            sample.add(piece)
            alphabet.add(piece)
    forms = alphabet.forms()
    if not forms:
        raise UserError(
            "data.train has no token, because tokenizer.kind='wordpiece' keeps neither spaces nor control characters; "
            "give other text, or set \"tokenizer={kind='bpe'}\", which keeps everything."
        )
    num_needed = len(SPECIAL_TOKENS) + len(forms)
    if config.vocabulary_size < num_needed:
        # What the file sets for WordPiece goes on to be read for BPE.
        bpe = "tokenizer.kind=bpe"
        if config.vocabulary_size < MIN_BPE_TOKENS:
            bpe = f"{bpe} with tokenizer.vocabulary_size=none"
        raise UserError(
            f"tokenizer.vocabulary_size={config.vocabulary_size} cannot hold the alphabet: the text needs at least "
            f"{num_needed}, as a letter is one token at the start of a word and another inside. "
            f"Set tokenizer.vocabulary_size={2 * num_needed}, or {bpe}, which spells everything, or "
            "tokenizer.kind=char."
        )
    return _merge(config.vocabulary_size, forms, _counted_words(sample, pretokenize))


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
        min_frequency=MIN_BPE_COUNT,
        special_tokens=list(BYTE_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in sample.texts() for piece in cut(text.decode(), BPE_BREAKS, _MAX_WORD_CHARS))
    model.train_from_iterator(pieces, trainer)
    settings = json.loads(model.to_str())
    # Unlisted, special tokens are never looked for in a text.
    settings["added_tokens"] = []
    return json.dumps(settings, ensure_ascii=False, indent=2) + "\n"


def _merge(size: int, forms: list[str], counts: Mapping[str, int]) -> list[str]:
    """Returns the special tokens, the forms, and of the candidates that merging finds those that encoding uses most.

    Many a merge is but a step to a longer token, and WordPiece, which takes the longest token there is, passes over it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    # A WordPiece trainer is a BPE trainer with ##, but does not let us bound a token's length.
    model = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    model.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
    # The alphabet goes in as special tokens because those are numbered in this order. Other characters would be in the
    # order of a hash table, and numbers decide between pairs of equal count.
    always = [*SPECIAL_TOKENS, *forms]
    trainer = trainers.BpeTrainer(
        vocab_size=len(always) + int(_CANDIDATES * (size - len(always))),
        min_frequency=2,
        special_tokens=always,
        continuing_subword_prefix="##",
        max_token_length=_MAX_TOKEN_CHARS,
        show_progress=False,
    )
    model.train_from_iterator(_repeated(counts), trainer)
    ids = model.get_vocab()
    encoder = models.WordPiece(ids, unk_token=SPECIAL_TOKENS[1], max_input_chars_per_word=_MAX_WORD_CHARS)
    num_uses = [0] * len(ids)
    for word, count in counts.items():
        for token in encoder.tokenize(word):
            num_uses[token.id] += count
    candidates = sorted(range(len(always), len(ids)), key=lambda token: -num_uses[token])
    kept = {*range(len(always)), *candidates[: size - len(always)]}
    return [token for token in sorted(ids, key=ids.__getitem__) if ids[token] in kept]


def _pretokenizer(lowercase: bool) -> Pretokenize:
    """Returns keras_nlp's own splitting of texts into normalized words."""
    import tensorflow as tf
    from keras_hub.src.tokenizers import word_piece_tokenizer

    def pretokenize(texts: list[bytes]) -> tuple[list[str], np.ndarray]:
        texts = tf.constant(texts, tf.string)
        words = word_piece_tokenizer.pretokenize(texts, lowercase=lowercase, strip_accents=False)
        return [word.decode() for word in words.values.numpy()], words.row_lengths().numpy()

    return pretokenize


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


def _counted_words(sample: _Sample, pretokenize: Pretokenize) -> Counter[str]:
    """Returns how often a sample has each word."""
    counts: Counter[str] = Counter()
    # Each chunk once, because the pretokenizer is slow; it, too, ends a word wherever bytes.split() does.
    chunks: Counter[bytes] = Counter()

    def count_words_of_chunks() -> None:
        for batch in _batches(chunks):
            words, num_words = pretokenize(batch)
            word_counts = np.repeat([chunks[chunk] for chunk in batch], num_words)
            for word, count in zip(words, word_counts.tolist(), strict=True):
                for start in range(0, len(word), _MAX_WORD_CHARS):
                    counts[word[start : start + _MAX_WORD_CHARS]] += count
        chunks.clear()

    for text in sample.texts():
        chunks.update(text.split())
        if len(chunks) > _MAX_CHUNKS:
            count_words_of_chunks()
    count_words_of_chunks()
    return counts


def _batches(chunks: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    num_bytes = 0
    for chunk in chunks:
        batch.append(chunk)
        num_bytes += len(chunk)
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _repeated(counts: Mapping[str, int]) -> Iterator[str]:
    """Yields each word as often as it is counted, in strings of about a thousand: the trainer holds many at a time."""
    lines, num_lines = [], 0
    for word, count in counts.items():
        for start in range(0, count, 1000):
            num_times = min(1000, count - start)
            lines.append(f"{word}\n" * num_times)
            num_lines += num_times
            if num_lines >= 1000:
                yield "".join(lines)
                lines, num_lines = [], 0
    yield "".join(lines)


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
        # Only what is not ASCII, and each such chunk once, goes through the slow pretokenizer.
        chunks = {chunk for chunk in piece.encode().split() if not chunk.isascii()} - self._known - self._waiting
        self._waiting |= chunks
        self._num_waiting_bytes += sum(map(len, chunks))
        if self._num_waiting_bytes >= _BATCH_BYTES:
            self._read_waiting()

    def _read_waiting(self) -> None:
        words, _ = self._pretokenize(sorted(self._waiting))
        self._characters.update(*words)
        self._inner.update(*(word[1:] for word in words))
        if len(self._known) > _MAX_CHUNKS:
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
