"""Scores a model on the validation text, every token of it once and with the same weight."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.config import Config, DataConfig, rows_per_replica
from trainer.data.batches import evaluation_batches
from trainer.data.shards import PreparedData, Split
from trainer.model.cpu import operations_on_cpu
from trainer.model.gpt import GPT
from trainer.model.loss import next_token_loss_from_logits
from trainer.training.distribution import device_kind, distributed, micro_batches


class Evaluation(NamedTuple):
    """How well a model predicts the validation text.

    loss: nats per token. num_tokens: how many tokens that is the mean of. bits_per_byte: of the original text, with the
    number of tokens per byte of the whole validation text. is_lossy: whether the tokenizer loses some of that text, so
    that bits_per_byte is of less than the text. excess: nats per scored token, the ends of
    stories included, above the text's own entropy, where that is known: of the storybook, when every story was scored
    whole. losses: of each source that data.weights mixes.
    """

    loss: float
    num_tokens: int
    bits_per_byte: float
    is_lossy: bool
    excess: float | None
    losses: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss."""
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        lossy = " (of what the tokenizer keeps)" if self.is_lossy else ""
        parts = [
            f"loss {self.loss:.4f} nats per token",
            f"perplexity {self.perplexity:.2f}",
            f"{self.bits_per_byte:.3f} bits per byte{lossy}",
        ]
        if self.excess is not None:
            parts.append(f"{self.excess:+.4f} nats per token above the text's own entropy")
        if self.losses:
            parts.append("of each source " + ", ".join(f"{loss:.4f}" for loss in self.losses))
        return ", ".join(parts) + f" ({self.num_tokens:,} tokens)"


class Evaluator:
    """Scores the model of a run, at any time, without touching it.

    Args:
        model: a GPT, or any Keras model that returns logits.
        strategy: the model was built under its scope.
        prepared: the data, whose validation split is scored.
        config: of the run.
    """

    def __init__(
        self, model: keras.Model, strategy: tf.distribute.Strategy, prepared: PreparedData, config: Config
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.prepared = prepared
        self.config = config
        self._rows = rows_per_replica(config, strategy.num_replicas_in_sync)
        self._is_lossy = prepared.tokenizer().is_lossy
        self._sum_batch = tf.function(self._score_batch, autograph=False)

    def __call__(self, num_batches: int | None = None) -> Evaluation:
        """Scores num_batches batches of each source, or all."""
        evaluation = self.unless_stopped(lambda: False, num_batches)
        assert evaluation is not None
        return evaluation

    def unless_stopped(self, should_stop: Callable[[], bool], num_batches: int | None) -> Evaluation | None:
        """Scores num_batches batches of each source, or all; gives up and returns None once should_stop, asked after
        each batch, says so.
        """
        splits = self.prepared.parts("validation")
        sums = [(0.0, 0)] * len(splits)
        for i, split in enumerate(splits):
            for batch in self._batches(split, num_batches):
                batch_loss, batch_tokens = self._sum_batch(batch)
                sums[i] = sums[i][0] + float(batch_loss), sums[i][1] + int(batch_tokens)
                if should_stop():
                    return None
        loss_sum, num_tokens = (sum(each) for each in zip(*sums, strict=True))
        evaluation = summarize(loss_sum, int(num_tokens), self.prepared, self.config.data, self._is_lossy)
        losses = tuple(loss / tokens for loss, tokens in sums) if len(splits) > 1 else ()
        return evaluation._replace(losses=losses)

    def _batches(self, split: Split, num_batches: int | None) -> Iterable[tuple[tf.Tensor, ...]]:
        return distributed(
            self.strategy, lambda share: evaluation_batches(self.prepared, self.config, num_batches, share, split)
        )

    def _score_batch(self, batch: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, tf.Tensor]:
        def score(batch: tuple[tf.Tensor, ...]) -> list[tf.Tensor]:
            # Across hosts TensorFlow forgets how many rows there are.
            shape = [self._rows, self.config.train.sequence_length]
            inputs, targets, weights = (tf.ensure_shape(part, shape) for part in batch)
            size, at_once = micro_batches(None, shape[0], shape[1], self.strategy)
            if size == self._rows:
                sums = self._score_part((inputs, targets, weights))
            else:
                # As in a step: a CPU works through two halves at once, and shares its cores between them.
                parts = [tf.reshape(part, [-1, size, shape[1]]) for part in (inputs, targets, weights)]
                # In float64, as nothing says what dtype the logits of a foreign model have.
                of_parts = tf.map_fn(
                    lambda part: tf.stack([tf.cast(each, tf.float64) for each in self._score_part(part)]),
                    parts,
                    parallel_iterations=at_once,
                    fn_output_signature=tf.TensorSpec([2], tf.float64),
                )
                sums = tuple(tf.unstack(tf.reduce_sum(of_parts, axis=0)))
            replica = tf.distribute.get_replica_context()
            return replica.all_reduce(tf.distribute.ReduceOp.SUM, list(sums))

        # Sums over all replicas, so that any one's will do.
        loss_sum, num_tokens = (
            self.strategy.experimental_local_results(s)[0] for s in self.strategy.run(score, (batch,))
        )
        return loss_sum, num_tokens

    def _score_part(self, part: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        inputs, targets, weights = part
        with operations_on_cpu(device_kind(self.strategy) == "CPU"):
            if isinstance(self.model, GPT):
                return self.model.evaluation_loss(inputs, targets, weights)
            return next_token_loss_from_logits(self.model(inputs, training=False), targets, weights)


def summarize(
    loss_sum: float, num_tokens: int, prepared: PreparedData, data: DataConfig, is_lossy: bool
) -> Evaluation:
    """Turns a sum of losses in nats over num_tokens tokens of the validation split into an `Evaluation`."""
    split = prepared.split("validation")
    loss = loss_sum / num_tokens
    bits_per_byte = loss / math.log(2) * split.num_tokens / split.num_bytes
    excess = None
    # A story's end is certain after its closing sentence, so that source_nats is of the story and its end alike. Fewer
    # tokens mean that a story was cut; packed windows begin in the middle of a story, which source_nats is not of.
    num_whole = split.num_tokens + (split.num_documents if data.predict_end else 0)
    if split.source_nats is not None and data.mode == "lines" and num_tokens == num_whole:
        excess = (loss_sum - split.source_nats) / num_tokens
    return Evaluation(loss, num_tokens, bits_per_byte, is_lossy, excess)
