"""How well a model predicts the last word of each text, as in the LAMBADA benchmark."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from trainer.scoring.score import Score, total
from trainer.scoring.scorer import ScoredText, Scorer
from trainer.tokenizers.tokenizer import Tokenizer


class LastWords(NamedTuple):
    """How well the last words of some texts were predicted.

    Attributes:
        score: the score of the last words.
        num_right: the texts whose last word greedy decoding writes.
    """

    score: Score
    num_right: int

    @property
    def accuracy(self) -> float:
        """The share of the texts whose last word greedy decoding writes."""
        return self.num_right / self.score.num_texts

    def figures(self) -> dict[str, Any]:
        """Returns the figures and the sums, by name."""
        return {"accuracy": self.accuracy, **self.score.figures(), "num_right": self.num_right}

    def __str__(self) -> str:
        score = self.score
        return (
            f"last word right in {self.accuracy:.2%} of {score.num_texts:,} texts, perplexity "
            f"{score.word_perplexity:.2f} per last word ({score.num_tokens:,} tokens)"
        )


def score_last_words(scorer: Scorer, texts: Iterable[str]) -> LastWords:
    """Scores the last word of each text, given the text before it.

    A word is right if each of its tokens is the likeliest one. If the text is longer than the model can read, the start
    of the text is left out.

    Args:
        scorer: the scorer of the model.
        texts: the texts.

    Source: the task lambada_openai of the lm-evaluation-harness. Its perplexity is per last word, too.
    """
    num_right, scores = 0, list[Score]()
    for score, is_right in scorer.results(_last_words(scorer.tokenizer, texts)):
        scores.append(score)
        num_right += is_right and score.num_tokens > 0
    return LastWords(total(scores), num_right)


def _last_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[ScoredText]:
    for text in texts:
        *context, word = text.rsplit(maxsplit=1)
        before, whole = tokenizer.encode_batch(["".join(context), f"{''.join(context)} {word}"])
        tokens = np.concatenate([[tokenizer.bos_id], whole]).astype(np.int32)
        yield ScoredText(tokens, min(len(before), len(whole)), len(f" {word}".encode()), 1)
