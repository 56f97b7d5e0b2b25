"""Scores texts with a model: windows in batches on one or several replicas, sums in float64.

The first token of a text is scored given [BOS], and each other token given the tokens before it. The end of a text, a
[BOS] after its last token, is scored only if that is asked for: it is not a part of the text, and other programs do not
score it.
"""

import itertools
import numbers
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.errors import UserError
from trainer.model.held import WHOLE, Held
from trainer.model.language_model import adapt
from trainer.model.ops.plain import Ops
from trainer.scoring.score import Score, total
from trainer.scoring.windows import TOKENS_PER_BATCH, Batch, batches_of, windows_of
from trainer.system.progress import ignore
from trainer.tokenizers.tokenizer import Tokenizer

# This many texts are tokenized at a time, and texts of this many tokens are scored before the next are tokenized.
_TEXTS_AT_A_TIME = 256
_TOKENS_AT_A_TIME = 1 << 21


class ScoredText(NamedTuple):
    """A text to score, as tokens.

    Attributes:
        tokens: [BOS] and the text's tokens, int32 [n + 1]; then a [BOS] if the text's end is scored.
        first: the place of the first token whose target is scored; 0 for the whole text.
        num_bytes: the bytes of UTF-8 of the original text, or of the part that is scored.
        num_words: the words of the same.
    """

    tokens: np.ndarray
    first: int
    num_bytes: int
    num_words: int


def tokenized(tokenizer: Tokenizer, texts: Iterable[str], with_ends: bool = False) -> Iterator[ScoredText]:
    """Yields texts as tokens, to be scored whole.

    Args:
        tokenizer: the model's tokenizer.
        texts: the texts.
        with_ends: whether the end of each text is scored, too.
    """
    bos = np.array([tokenizer.bos_id], np.int32)
    texts = iter(texts)
    while some := list(itertools.islice(texts, _TEXTS_AT_A_TIME)):
        for text, tokens in zip(some, tokenizer.encode_batch(some), strict=True):
            parts = [bos, tokens, bos] if with_ends else [bos, tokens]
            yield ScoredText(np.concatenate(parts), 0, len(text.encode()), len(text.split()))


class Scorer:
    """Scores texts with a model. Scoring does not change the model.

    Args:
        model: a GPT, or any Keras model that returns logits.
        tokenizer: the model's tokenizer.
        sequence_length: the most tokens that the model can read at once.
        strategy: the strategy under whose scope the model was built; None: it was built under none.
        note: takes the number of tokens that are scored so far, after each batch.
        held: returns, in a replica function, how the layers of a GPT get their weights.
    """

    def __init__(
        self,
        model: keras.Model,
        tokenizer: Tokenizer,
        sequence_length: int,
        strategy: tf.distribute.Strategy | None = None,
        note: Callable[[int], None] = ignore,
        held: Callable[[], Held] = lambda: WHOLE,
        ops: Ops | None = None,
    ) -> None:
        self._note, self._num_scored = note, 0
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.strategy = strategy or tf.distribute.get_strategy()
        self._model, self._held = adapt(model), held
        self._ops = ops or self._model.scoring_ops()
        self._score_batch = tf.function(self._score_shares, autograph=False)
        self._traced_shapes: set[tuple[int, ...]] = set()
        # A foreign model returns the logits of all its tokens at once.
        self._tokens_per_batch = TOKENS_PER_BATCH if self._model.is_gpt else TOKENS_PER_BATCH // 8

    def scores(self, texts: Iterable[str], stride: int | None = None, with_ends: bool = False) -> Iterator[Score]:
        """Yields the score of each text, in order.

        Args:
            texts: the texts. Only some of them are in memory at a time.
            stride: see `results`.
            with_ends: whether the end of each text is scored, too.

        Raises:
            UserError: the stride is not from 1 to sequence_length.
        """
        return (score for score, _ in self.results(tokenized(self.tokenizer, texts, with_ends), stride))

    def results(self, texts: Iterable[ScoredText], stride: int | None = None) -> Iterator[tuple[Score, bool]]:
        """Yields for each text, in order, its score, and whether each scored token is the likeliest one: whether greedy
        decoding would write it.

        Args:
            texts: the texts as tokens.
            stride: how a text is read that is longer than sequence_length: each window after the first scores only
                the next stride tokens, with the tokens before them as context. None: sequence_length, so that only
                the last window has context that was scored before.

        Raises:
            UserError: the stride is not from 1 to sequence_length.
        """
        stride = checked_stride(stride, self.sequence_length)
        for part in _in_parts(texts):
            nats, num_wrong = np.zeros(len(part)), np.zeros(len(part), np.int64)
            for found in self._scores_of_windows(part, stride):
                np.add.at(nats, found.texts, found.losses.sum(axis=1))
                np.add.at(num_wrong, found.texts, (found.are_scored & ~found.are_likeliest).sum(axis=1))
            for text, nats_of_text, wrong in zip(part, nats.tolist(), num_wrong.tolist(), strict=True):
                yield self._score_of(text, nats_of_text), wrong == 0

    def total(self, texts: Sequence[ScoredText], stop_requested: Callable[[], bool] = lambda: False) -> Score | None:
        """Returns the score of all texts. Of several workers each scores its share; all call this with the same texts.

        Args:
            texts: the texts as tokens.
            stop_requested: called after each batch; if it returns True, the texts are not scored to the end.

        Returns:
            The score; None if a stop was requested.

        Raises:
            UserError: the workers have different texts.
        """
        self._check_same(texts)
        nats = num_tokens = 0.0
        for found in self._scores_of_windows(texts, self.sequence_length):
            nats += found.losses.sum()
            num_tokens += found.are_scored.sum()
            if stop_requested():
                return None
        nats, num_tokens = self._over_workers([nats, num_tokens])
        score = total(self._score_of(text, 0.0) for text in texts)
        assert num_tokens == score.num_tokens, (num_tokens, score.num_tokens)
        return score._replace(nats=nats)

    def _check_same(self, texts: Sequence[ScoredText]) -> None:
        """Raises UserError if the workers have different texts. Before any batch is scored: with split weights a batch
        is a collective operation, and a worker with other batches would leave the others waiting.
        """
        digest = 0
        for text in texts:
            digest = zlib.crc32(np.array([text.first, *text.tokens], np.int64).tobytes(), digest)
        own = float(digest % 65521)  # Few enough digits for exact sums of squares.
        summed, squares, count = self._over_workers([own, own * own, 1.0])
        if abs(count * squares - summed * summed) > 0.5:  # It is 0 for equal numbers.
            num_tokens = sum(len(text.tokens) for text in texts)
            raise UserError(
                f"the workers have different texts to score, and this one has {len(texts):,} texts of {num_tokens:,} "
                "tokens; give all workers the same files."
            )

    def _score_of(self, text: ScoredText, nats: float) -> Score:
        scored = text.tokens[text.first + 1 :]
        num_unknown = int((scored == self.tokenizer.unknown_id).sum())
        return Score(nats, len(scored), text.num_bytes, text.num_words, num_unknown, is_lossy=self.tokenizer.is_lossy)

    def _scores_of_windows(self, texts: Sequence[ScoredText], stride: int) -> Iterator["_Scores"]:
        """Yields the scores of all windows that this worker computes, batch by batch."""
        windows = [
            window
            for i, text in enumerate(texts)
            for window in windows_of(i, text.first, len(text.tokens) - 1, self.sequence_length, stride)
        ]
        tokens = [text.tokens for text in texts]
        num_replicas = self.strategy.num_replicas_in_sync
        for batch in batches_of(windows, tokens, self.sequence_length, num_replicas, self._tokens_per_batch):
            rows, values = self._shares_of(batch)
            if batch.inputs.shape not in self._traced_shapes:
                # Trace it here: TensorFlow warns if many calls trace the same code, as texts of many lengths do.
                self._score_batch.get_concrete_function(values)
                self._traced_shapes.add(batch.inputs.shape)
            scores = [self.strategy.experimental_local_results(each) for each in self._score_batch(values)]
            for of_replica, losses, are_likeliest in zip(rows, *scores, strict=True):
                numbers = np.array([window.text for window in batch.windows[of_replica]], np.int64)
                are_scored = batch.weights[of_replica][: len(numbers)] > 0
                self._num_scored += int(are_scored.sum())
                wide = losses.numpy()[: len(numbers)].astype(np.float64)
                yield _Scores(numbers, are_scored, np.where(are_scored, wide, 0), are_likeliest.numpy()[: len(numbers)])
            self._note(self._num_scored)

    def _shares_of(self, batch: Batch) -> tuple[list[slice], Any]:
        """Returns the rows of each replica of this worker, and what `strategy.run` gives these replicas."""
        num_replicas = self.strategy.num_replicas_in_sync
        per_replica = len(batch.inputs) // num_replicas
        rows: list[slice] = []

        def share_of(context: tf.distribute.experimental.ValueContext) -> tuple[tf.Tensor, ...]:
            first = context.replica_id_in_sync_group * per_replica
            rows.append(slice(first, first + per_replica))
            return tuple(tf.constant(part[rows[-1]]) for part in batch[1:])

        if num_replicas == 1:
            return [slice(None)], tuple(map(tf.constant, batch[1:]))
        return rows, self.strategy.experimental_distribute_values_from_function(share_of)

    def _score_shares(self, shares: tuple[Any, ...]) -> tuple[Any, Any]:
        def score(tokens: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return adapt(self._model.model, self._held()).token_scores(tokens, targets, weights, self._ops)

        scores: tuple[Any, Any] = self.strategy.run(score, shares)
        return scores

    def _over_workers(self, amounts: list[float]) -> list[float]:
        """Returns the sums of each worker's amounts over all workers."""
        num_replicas = self.strategy.num_replicas_in_sync
        num_local = 1 if num_replicas == 1 else len(self.strategy.extended.worker_devices)
        if num_local == num_replicas:
            return amounts

        def add() -> tf.Tensor:
            share = tf.constant(amounts, tf.float64) / num_local
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, share)

        sums = self.strategy.experimental_local_results(self.strategy.run(tf.function(add, autograph=False)))[0]
        return [float(each) for each in sums]


class _Scores(NamedTuple):
    """The scores of some windows, a window in each row.

    Attributes:
        texts: the number of the text of each window, int64 [windows].
        are_scored: which tokens are scored, bool [windows, width].
        losses: the nats of each of them, and 0 for the others, float64 [windows, width].
        are_likeliest: which of them are the likeliest token, bool [windows, width].
    """

    texts: np.ndarray
    are_scored: np.ndarray
    losses: np.ndarray
    are_likeliest: np.ndarray


def checked_stride(stride: int | None, sequence_length: int) -> int:
    """Returns the stride, or sequence_length if it is None.

    Raises:
        UserError: it is not from 1 to sequence_length.
    """
    if stride is not None and not (isinstance(stride, numbers.Integral) and 1 <= stride <= sequence_length):
        raise UserError(
            f"a stride of {stride!r} must be from 1 to {sequence_length}, the most tokens the model can read."
        )
    return stride or sequence_length


def _in_parts(texts: Iterable[ScoredText]) -> Iterator[list[ScoredText]]:
    """Yields texts in lists that each hold at most _TOKENS_AT_A_TIME tokens, or one text."""
    part: list[ScoredText] = []
    num_tokens = 0
    for text in texts:
        if part and num_tokens + len(text.tokens) > _TOKENS_AT_A_TIME:
            yield part
            part, num_tokens = [], 0
        part.append(text)
        num_tokens += len(text.tokens)
    if part:
        yield part
