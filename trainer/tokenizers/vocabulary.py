"""Training WordPiece and byte-level BPE vocabularies.

Hugging Face's trainer does the counting. For WordPiece it is tens of times faster than keras_nlp's. There it gets words
that `split_into_words` has already split and normalized, because its own way differs.
"""

import hashlib
import heapq
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.config.settings import MIN_BPE_TOKENS, BpeConfig, WordPieceConfig
from trainer.errors import UserError
from trainer.text.files import Document
from trainer.tokenizers.cutting import BPE_BREAKS, LONE_CHARACTER, WORDPIECE_BREAKS, cut, cut_document

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[BOS]")
# Without [UNK]: bytes can spell everything.
BYTE_SPECIAL_TOKENS = ("[PAD]", "[BOS]")

_BATCH_BYTES = 1 << 20
# The number of tokens that are merged, divided by the number that are kept.
_CANDIDATES = 1.2
# BPE makes no token that the text has less often: a model could not learn it, and other tokens spell the same text.
# So the vocabulary grows with the text: 20 kB of a play make 528 tokens, 1.1 MB of it 4,700.
MIN_BPE_COUNT = 10
# The most different chunks that are held at a time.
_MAX_CHUNKS = 200_000
# tensorflow_text refuses tokens of over 256 bytes.
_MAX_TOKEN_CHARS = 64
# Longer words are cut into parts for the training, whose time grows with the square of a word's length.
_MAX_WORD_CHARS = 100

# Splits texts into normalized words: returns the words of all texts, some empty, and how many each text has.
SplitIntoWords = Callable[[list[bytes]], tuple[list[str], np.ndarray]]


def train_wordpiece(config: WordPieceConfig, documents: Iterable[Document]) -> list[str]:
    """Trains a vocabulary on documents, read once: special tokens, all characters of the text, then the trained tokens.

    Raises:
        UserError: the vocabulary is too small for the characters of the text, or the text has only characters that
            cannot be seen.
    """
    split = _word_splitter(config.lowercase)
    sample, alphabet = _Sample(config.sample_bytes), _Alphabet(split, config.lowercase)
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
        # The vocabulary_size of the config file would be BPE's, too.
        bpe = "tokenizer.kind=bpe"
        if config.vocabulary_size < MIN_BPE_TOKENS:
            bpe = f"{bpe} with tokenizer.vocabulary_size=none"
        raise UserError(
            f"tokenizer.vocabulary_size={config.vocabulary_size} cannot hold the alphabet: the text needs at least "
            f"{num_needed}, as a letter is one token at the start of a word and another inside. "
            f"Set tokenizer.vocabulary_size={2 * num_needed}, or {bpe}, which spells everything, or "
            "tokenizer.kind=char."
        )
    return _merge(config.vocabulary_size, forms, _counted_words(sample, split))


def train_bpe(config: BpeConfig, documents: Iterable[Document]) -> str:
    """Trains a byte-level BPE vocabulary on documents, read once, and returns it as Hugging Face's tokenizer.json.

    The special tokens come first, then the bytes, then the trained tokens.
    """
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
    # If special tokens are not listed here, the encoder does not look for them in a text.
    settings["added_tokens"] = []
    return json.dumps(settings, ensure_ascii=False, indent=2) + "\n"


def _merge(size: int, forms: list[str], counts: Mapping[str, int]) -> list[str]:
    """Returns the special tokens, the forms, and the merged tokens that encoding uses most.

    Many merges are only steps to a longer token. WordPiece, which takes the longest token that fits, passes over them.
    """
    # A WordPiece trainer is a BPE trainer with ##, but does not let us bound a token's length.
    model = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    model.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
    # The alphabet is passed as special tokens because they are numbered in this order. Other characters would be
    # numbered in the order of a hash table, and the numbers decide between pairs of equal count.
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


def _word_splitter(lowercase: bool) -> SplitIntoWords:
    # Here and not at the top: only WordPiece needs TensorFlow, which takes seconds to load.
    from trainer.tokenizers.wordpiece import split_into_words

    def split(texts: list[bytes]) -> tuple[list[str], np.ndarray]:
        words = split_into_words(texts, lowercase)
        return [word.decode() for word in words.values.numpy()], words.row_lengths().numpy()

    return split


class _Sample:
    """A sample of a text of unknown size: the pieces with the smallest hashes, up to a number of bytes."""

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
        """Yields the pieces in the order of their hashes, whatever the order in which they were added."""
        for _, text in sorted(self._pieces):
            yield text


def _counted_words(sample: _Sample, split: SplitIntoWords) -> Counter[str]:
    """Returns how often a sample has each word."""
    counts: Counter[str] = Counter()
    # Each chunk is split once, because that is slow. Words end wherever bytes.split() splits.
    chunks: Counter[bytes] = Counter()

    def count_words_of_chunks() -> None:
        for batch in _batches(chunks):
            words, num_words = split(batch)
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
    """Yields each word as often as it is counted, about 1,000 in a string: the trainer holds many strings at a time."""
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
    """The characters of a text after normalization, in the forms in which a word may need them."""

    def __init__(self, split: SplitIntoWords, lowercase: bool):
        self._split, self._lowercase = split, lowercase
        self._characters: set[str] = set()
        self._inner: set[str] = set()  # Characters seen after the first one of a word.
        self._ascii: set[str] = set()
        self._seen = b""  # The ASCII characters as bytes.
        self._known: set[bytes] = set()
        self._waiting: set[bytes] = set()
        self._num_waiting_bytes = 0

    def add(self, piece: str) -> None:
        if piece.isascii():
            # Deleting the characters that were seen is ten times as fast as collecting all of them.
            if new := piece.encode().translate(None, self._seen):
                self._ascii.update(new.decode())
                self._seen = "".join(self._ascii).encode()
            return
        self._ascii.update(filter(str.isascii, piece))
        # Splitting is slow: only chunks that are not ASCII are split, and each once.
        chunks = {chunk for chunk in piece.encode().split() if not chunk.isascii()} - self._known - self._waiting
        self._waiting |= chunks
        self._num_waiting_bytes += sum(map(len, chunks))
        if self._num_waiting_bytes >= _BATCH_BYTES:
            self._read_waiting()

    def _read_waiting(self) -> None:
        words, _ = self._split(sorted(self._waiting))
        self._characters.update(*words)
        self._inner.update(*(word[1:] for word in words))
        if len(self._known) > _MAX_CHUNKS:
            self._known = set()
        self._known |= {chunk for chunk in self._waiting if len(chunk) <= 100}
        self._waiting, self._num_waiting_bytes = set(), 0

    def forms(self) -> list[str]:
        """Returns each character as a token, and with ## if it can follow another character in a word, sorted.

        A letter gets both forms even if the text has it in one place only: WordPiece makes a whole word [UNK] if one
        form is missing.
        """
        self._read_waiting()
        seen = {character for character in self._ascii if "!" <= character <= "~"}
        characters = self._characters | ({character.lower() for character in seen} if self._lowercase else seen)
        inner = {character for character in characters if not _is_lone(character)} | self._inner
        return sorted(characters) + sorted(f"##{character}" for character in inner)


def _is_lone(character: str) -> bool:
    return bool(re.match(LONE_CHARACTER, character)) or unicodedata.category(character).startswith("P")
