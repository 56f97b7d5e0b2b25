"""Histograms of the weights, and of the gradients that the next step will have, without a change to either."""

from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf

from trainer.data.batches import Batch
from trainer.model.language_model import adapt
from trainer.monitoring import tags
from trainer.monitoring.events import Histogram
from trainer.training.step import TrainingStep, mean_and_clip

BUCKETS = 30


class Histograms:
    """Computes histograms between two steps. The compiled loop has no part in it, so it takes the same steps as without
    histograms, bit for bit: the gradients of the next batch are computed once more, by a function of their own.

    Args:
        training_step: the model and its devices.
        batches_from: returns the batches from a step on, for `strategy.run`.
    """

    def __init__(self, training_step: TrainingStep, batches_from: Callable[[int], Iterable[Batch]]) -> None:
        self._training_step = training_step
        self._batches_from = batches_from
        self._compute = tf.function(self._on_all_replicas, autograph=False)
        name_of = {id(variable): name for name, variable in adapt(training_step.model).named_variables().items()}
        self._names = [name_of[id(variable)] for variable in training_step.model.trainable_variables]

    def at(self, step: int) -> dict[str, Histogram]:
        """Returns the histograms by tag, after step steps; without those of values that are not all finite.

        The gradients are the mean over the targets of the whole next batch, before clipping, divided by the loss scale.
        Every worker calls this; all get the same histograms.
        """
        lows, highs, belows = (each.numpy() for each in self._compute(next(iter(self._batches_from(step)))))
        names = [tags.gradients_of(name) for name in self._names] + [tags.weights_of(name) for name in self._names]
        return {
            name: Histogram(float(low), float(high), np.diff(below))
            for name, low, high, below in zip(names, lows, highs, belows, strict=True)
            if np.isfinite(low) and np.isfinite(high)
        }

    def _on_all_replicas(self, batch: Batch) -> tuple[tf.Tensor, ...]:
        replicas = self._training_step.strategy.run(self._on_replica, (batch,))
        # Every replica has the same sums, so the first is taken.
        return tuple(self._training_step.strategy.experimental_local_results(each)[0] for each in replicas)

    def _on_replica(self, batch: Batch) -> tuple[tf.Tensor, ...]:
        """Returns the lowest value, the highest value and the counts below the edges, each with a row per histogram."""
        step = self._training_step
        local, scale = step.local_sums(batch)
        replica = tf.distribute.get_replica_context()
        *sums, num_targets = step.sum_over_replicas(replica, [*local.by_weight, local.num_targets])
        gradients, _ = mean_and_clip(sums, num_targets, None, scale)
        weights = [tf.convert_to_tensor(variable.value) for variable in step.model.trainable_variables]
        return _counts([tf.cast(values, tf.float32) for values in (*gradients, *weights)])


def _counts(tensors: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Counts the values of each tensor below the edges of equally wide buckets.

    Returns:
        (lows, highs, belows): the lowest and the highest value of each tensor, float32 [tensors], and the counts, int32
        [tensors, BUCKETS + 1], each from 0 to the number of values.
    """
    lows = tf.stack([tf.reduce_min(values) for values in tensors])
    highs = tf.stack([tf.reduce_max(values) for values in tensors])

    def below(share: tf.Tensor) -> tf.Tensor:
        edges = tf.unstack(lows + (highs - lows) * share)
        counts = [tf.reduce_sum(tf.cast(v < edge, tf.int32)) for v, edge in zip(tensors, edges, strict=True)]
        return tf.stack(counts)

    # One edge at a time, by comparing and adding only: every kind of device has these, and none needs more memory than
    # the values themselves.
    shares = tf.range(1, BUCKETS, dtype=tf.float32) / BUCKETS
    inner = tf.map_fn(below, shares, fn_output_signature=tf.int32, parallel_iterations=1)
    sizes = [tf.size(values) for values in tensors]
    belows = tf.concat([tf.zeros_like(inner[:1]), inner, [sizes]], axis=0)
    return lows, highs, tf.transpose(belows)
