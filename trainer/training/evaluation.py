"""Scores a model on the validation text: every token counts once and with the same weight."""

import math
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from trainer.config.settings import Config
from trainer.data.batches import evaluation_batches, num_evaluation_batches
from trainer.data.coverage import TextBytes, coverage_of
from trainer.data.shards import PreparedData, Split
from trainer.distributed.strategy import distributed, processor_of
from trainer.execution import resolve
from trainer.model.held import WHOLE, Held
from trainer.model.language_model import adapt
from trainer.model.ops import make_ops
from trainer.optimizers.average import WeightAverage
from trainer.runs.results import Evaluation
from trainer.system.progress import Note, ignore


class Evaluator:
    """Scores the model of a run at any time. Scoring does not change the model.

    If there is an average of the weights, it is what counts, and the loss of the weights is only `raw_loss`.

    Args:
        model: a GPT, or any Keras model that returns logits.
        strategy: the strategy under whose scope the model was built.
        prepared: the data whose validation split is scored.
        config: the run's configuration.
        average: the average of the model's weights; None: there is none, or the model already has it as its weights.
        held: returns, in a replica function, how the layers of a GPT get their weights.
    """

    def __init__(
        self,
        model: keras.Model,
        strategy: tf.distribute.Strategy,
        prepared: PreparedData,
        config: Config,
        average: WeightAverage | None = None,
        held: Callable[[], Held] = lambda: WHOLE,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.prepared = prepared
        self.config = config
        self._average = average
        self._held = held
        self._execution = resolve(config, processor_of(strategy), strategy.num_replicas_in_sync, use="evaluation")
        text_bytes = TextBytes(prepared)
        parts = prepared.parts("validation")
        self._bytes_of_token = text_bytes.of_token
        self._scales = [text_bytes.scale(part) for part in parts]
        cover = [coverage_of(part, prepared.folder, config) for part in parts]
        self._cut_share = sum(each.num_left_out_tokens for each in cover) / max(
            1, sum(each.num_tokens for each in cover)
        )
        self._is_lossy = any(map(text_bytes.is_lossy, parts)) or self._cut_share > 0
        self._sum_batch = tf.function(self._score_batch, autograph=False)

    def __call__(self, num_batches: int | None = None, note: Note = ignore) -> Evaluation:
        """Scores num_batches batches of each source; None: all batches. `note` takes how many batches are scored."""
        evaluation = self.until_stopped(lambda: False, num_batches, note)
        assert evaluation is not None
        return evaluation

    def until_stopped(
        self, stop_requested: Callable[[], bool], num_batches: int | None, note: Note = ignore
    ) -> Evaluation | None:
        """Scores num_batches batches of each source, until a stop is requested; None: all batches. `note` takes how
        many batches are scored.

        Returns:
            The score. None if stop_requested, which is called after each batch, has returned True.
        """
        if self._average is None:
            return self._score(stop_requested, num_batches, note)
        with self._average.in_the_model():
            score = self._score(stop_requested, num_batches, note)
        raw = None if score is None else self._score(stop_requested, num_batches, note)
        return None if score is None or raw is None else score._replace(raw_loss=raw.loss)

    def _score(self, stop_requested: Callable[[], bool], num_batches: int | None, note: Note) -> Evaluation | None:
        """Scores the weights that the model has now; see `until_stopped`."""
        splits = self.prepared.parts("validation")
        sums, done = np.zeros([len(splits), 3]), 0
        num_of_all = sum(num_evaluation_batches(split, self.config, num_batches) for split in splits)
        for i, split in enumerate(splits):
            for batch in self._batches(split, num_batches):
                if not self._sum_batch.experimental_get_tracing_count():
                    # Trace it here: TensorFlow warns if many calls trace the same code, as runs in one process do.
                    self._sum_batch.get_concrete_function(batch)
                sums[i] += [float(each) for each in self._sum_batch(batch)]
                done += 1
                note(done, num_of_all)
                if stop_requested():
                    return None
        loss_sum, num_tokens, _ = sums.sum(axis=0)
        num_bytes = float(sums[:, 2] @ self._scales)
        return Evaluation(
            loss=_ratio(loss_sum, num_tokens),
            num_tokens=int(num_tokens),
            bits_per_byte=_ratio(loss_sum / math.log(2), num_bytes),
            is_lossy=self._is_lossy,
            excess=self._excess(loss_sum, int(num_tokens)),
            losses=tuple(_ratio(loss, tokens) for loss, tokens, _ in sums) if len(splits) > 1 else (),
            cut_share=self._cut_share,
        )

    def _excess(self, loss_sum: float, num_tokens: int) -> float | None:
        split, data = self.prepared.split("validation"), self.config.data
        # source_nats counts whole stories with their ends: after the closing sentence the end is certain. If fewer
        # tokens were scored, a story was cut. In packed mode windows begin in the middle of a story.
        num_whole = split.num_tokens + (split.num_documents if data.predict_end else 0)
        if split.source_nats is None or data.mode != "lines" or num_tokens != num_whole:
            return None
        return (loss_sum - split.source_nats) / num_tokens

    def _batches(self, split: Split, num_batches: int | None) -> Iterable[tuple[tf.Tensor, ...]]:
        return distributed(
            self.strategy, lambda share: evaluation_batches(self.prepared, self.config, num_batches, share, split)
        )

    def _score_batch(self, batch: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
        """Returns the sum of the losses, the number of scored tokens, and the bytes that these tokens decode to."""

        def score(batch: tuple[tf.Tensor, ...]) -> list[tf.Tensor]:
            # With several workers the static batch size is unknown.
            shape = [self._execution.examples, self.config.train.sequence_length]
            inputs, targets, weights = (tf.ensure_shape(part, shape) for part in batch)
            size = self._execution.micro_batch_size
            if size == self._execution.examples:
                sums = self._score_part((inputs, targets, weights))
            else:
                # As in a step: a CPU computes two micro-batches at a time, and its cores are shared between them.
                parts = [tf.reshape(part, [-1, size, shape[1]]) for part in (inputs, targets, weights)]
                # In float64: the logits of a foreign model can have any dtype.
                of_parts = tf.map_fn(
                    lambda part: tf.stack([tf.cast(each, tf.float64) for each in self._score_part(part)]),
                    parts,
                    parallel_iterations=self._execution.at_once,
                    fn_output_signature=tf.TensorSpec([3], tf.float64),
                )
                sums = tuple(tf.unstack(tf.reduce_sum(of_parts, axis=0)))
            replica = tf.distribute.get_replica_context()
            return replica.all_reduce(tf.distribute.ReduceOp.SUM, list(sums))

        # Already summed over replicas: read any one of them.
        return tuple(self.strategy.experimental_local_results(each)[0] for each in self.strategy.run(score, (batch,)))

    def _score_part(self, part: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, ...]:
        inputs, targets, weights = part
        model = adapt(self.model, self._held())
        loss_sum, num_tokens = model.evaluation_loss(inputs, targets, weights, make_ops(self._execution))
        num_bytes = tf.gather(self._bytes_of_token, targets) * tf.cast(weights, tf.int32)
        return loss_sum, num_tokens, tf.cast(tf.reduce_sum(num_bytes), loss_sum.dtype)


def _ratio(total: float, count: float) -> float:
    """Returns total / count; NaN if the count is 0: a sample of the text can have no token to score."""
    return float(total / count) if count else math.nan
