"""A layer whose gradient computes it again from its input instead of keeping what is between."""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from trainer.model.attention import unforeseen_zero


def recomputed(layer: keras.layers.Layer, call: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor) -> tf.Tensor:
    """Returns call(x). Gradients keep only x, and call again.

    Args:
        layer: holds all the weights that call reads.
        call: a function of one tensor.
        x: its argument.

    Source: Chen et al. 2016, section 4.
    """
    variables = layer.trainable_variables

    def run(x: tf.Tensor, weights: Sequence[tf.Tensor]) -> tf.Tensor:
        with keras.StatelessScope(state_mapping=zip(variables, weights, strict=True)):
            return call(x)

    @tf.custom_gradient
    def transform(x: tf.Tensor, *weights: tf.Tensor) -> tuple[tf.Tensor, object]:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            # Without the added zero XLA finds that the forward pass has computed all of it, and keeps that; it does so
            # with tf.recompute_grad.
            again = x + unforeseen_zero(upstream, x.dtype)
            with tf.GradientTape() as tape:
                tape.watch([again, *weights])
                out = run(again, weights)
            return tape.gradient(out, [again, *weights], upstream)

        return run(x, weights), gradient

    return transform(x, *(tf.convert_to_tensor(variable) for variable in variables))
