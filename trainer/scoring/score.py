"""A score: what a model's predictions of texts cost, as sums, and the figures that follow from the sums."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple


class Score(NamedTuple):
    """What it costs to predict some texts. The sums of several scores are the score of all their texts.

    Attributes:
        nats: the sum of the losses of the scored tokens.
        num_tokens: the scored tokens.
        num_bytes: the bytes of UTF-8 of the original texts, whatever the tokenizer keeps of them.
        num_words: the words of the original texts, which white space separates.
        num_unknown: how many of the scored tokens are [UNK].
        num_texts: the texts.
        is_lossy: whether the tokenizer may lose some of a text, even if no token is [UNK].
    """

    nats: float
    num_tokens: int
    num_bytes: int
    num_words: int
    num_unknown: int = 0
    num_texts: int = 1
    is_lossy: bool = False

    @property
    def loss(self) -> float:
        """Nats per token."""
        return _ratio(self.nats, self.num_tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per token."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """The exponential of the nats per word of the original texts."""
        return _exp(_ratio(self.nats, self.num_words))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the original texts."""
        return _ratio(self.nats / math.log(2), self.num_bytes)

    @property
    def loses_text(self) -> bool:
        """Whether the nats are about less than all bytes: the tokenizer is lossy, or a token is [UNK]."""
        return self.is_lossy or self.num_unknown > 0

    def figures(self) -> dict[str, Any]:
        """Returns the figures and the sums, by name; None if a figure is not a number."""
        names = ("loss", "perplexity", "word_perplexity", "bits_per_byte")
        values = {name: getattr(self, name) for name in names} | self._asdict()
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def __str__(self) -> str:
        lossy = ""
        if self.loses_text:
            unknown = f", with {self.num_unknown:,} [UNK]" if self.num_unknown else ""
            lossy = f" (of what the tokenizer keeps{unknown})"
        return (
            f"loss {self.loss:.4f} nats per token, perplexity {self.perplexity:.2f} per token and "
            f"{self.word_perplexity:.2f} per word, {self.bits_per_byte:.3f} bits per byte{lossy} "
            f"({self.num_texts:,} texts, {self.num_words:,} words, {self.num_tokens:,} tokens, "
            f"{self.num_bytes:,} bytes)"
        )


def total(scores: Iterable[Score]) -> Score:
    """Returns the score of all texts of some scores."""
    *sums, is_lossy = Score(0.0, 0, 0, 0, num_texts=0)
    for score in scores:
        sums = [before + more for before, more in zip(sums, score[:-1], strict=True)]
        is_lossy = is_lossy or score.is_lossy
    return Score._make([*sums, is_lossy])


def _ratio(amount: float, count: float) -> float:
    """Returns amount / count; NaN if the count is 0."""
    return amount / count if count else math.nan


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
