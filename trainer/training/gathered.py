"""Weights that a replica holds only pieces of, and gathers layer by layer (`distribution.shard = "weights"`).

    forward    gather a block's weights -> compute the block -> drop them
    backward   gather them again -> compute the block again, and its gradients -> reduce-scatter these

so that a replica holds one or two blocks of whole weights at a time, and gradients only of the block that it computes.
The embeddings, and the last normalization with the output projection and the loss, are each gathered once: the gradient
of a look-up does not read the table, and the loss makes its gradients along with itself. Matrices travel in the dtype
that the model computes in, gradients in the dtype of the weights.

Source: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models", stage 3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.distributed.collectives import Collectives, in_a_function
from trainer.model.held import Held
from trainer.model.pieces import Cut, travel_together


class PieceOfWeight(NamedTuple):
    """What a replica holds of a weight.

    Attributes:
        cut: how the weight is cut.
        value: this replica's piece, a tensor of the weight's dtype.
    """

    cut: Cut
    value: tf.Tensor


def gathered(collectives: Collectives, pieces: Mapping[int, PieceOfWeight], dtype: str) -> Held:
    """Returns what gives layers weights that are gathered when they are needed. Call it in a replica function, on every
    replica.

    Args:
        collectives: how replicas exchange.
        pieces: this replica's pieces, by the id of the Keras variable of their weight.
        dtype: the dtype that blocks compute in.
    """
    return _Gathered(collectives, pieces, tf.as_dtype(dtype))


class _Gathered(Held):
    def __init__(self, collectives: Collectives, pieces: Mapping[int, PieceOfWeight], dtype: tf.DType) -> None:
        self._collectives, self._pieces, self._dtype = collectives, pieces, dtype

    def keeping(self, layers: Sequence[keras.layers.Layer], call: Callable[[tf.Tensor], Any], x: tf.Tensor) -> Any:
        variables, cuts, pieces = self._of(layers)

        @tf.custom_gradient
        def run(*pieces: tf.Tensor) -> tuple[Any, object]:
            with tf.GradientTape() as tape:
                whole = self._gather(cuts, pieces, x)
                tape.watch(whole)
                result = _called(call, variables, whole, x)

            def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
                return self._scatter(cuts, pieces, tape.gradient(result, whole, *upstream))

            return result, gradient

        return run(*pieces)

    def block(
        self, block: keras.layers.Layer, call: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, recomputes: bool
    ) -> tf.Tensor:
        variables, cuts, pieces = self._of([block])

        @tf.custom_gradient
        def run(x: tf.Tensor, *pieces: tf.Tensor) -> tuple[tf.Tensor, object]:
            def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
                again = self._collectives.after(upstream, [x])[0]
                whole = self._gather(cuts, pieces, upstream)
                with tf.GradientTape() as tape:
                    tape.watch([again, *whole])
                    result = _called(call, variables, whole, again)
                of_x, *of_weights = tape.gradient(result, [again, *whole], upstream)
                return [of_x, *self._scatter(cuts, pieces, of_weights)]

            return _called(call, variables, self._gather(cuts, pieces, x), x), gradient

        return run(x, *pieces)

    def loss(
        self,
        layers: Sequence[keras.layers.Layer],
        call: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
        hidden: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        variables, cuts, pieces = self._of(layers)

        @tf.custom_gradient
        def run(hidden: tf.Tensor, *pieces: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], object]:
            # The gradients are made here. If the tape around this one recorded how, the loop over the chunks of logits
            # would keep all of them for a second derivative.
            hidden = tf.stop_gradient(hidden)
            gathered = self._gather(cuts, [tf.stop_gradient(piece) for piece in pieces], hidden)
            # The loss adds up the gradient of the output projection, chunk by chunk, in the dtype that it gets it in.
            whole = [tf.cast(each, piece.dtype) for each, piece in zip(gathered, pieces, strict=True)]
            with tf.GradientTape() as tape:
                tape.watch([hidden, *whole])
                loss_sum, num_targets = _called(call, variables, whole, hidden)
            of_hidden, *of_weights = tape.gradient(loss_sum, [hidden, *whole])
            scattered = self._scatter(cuts, pieces, of_weights)

            def gradient(upstream: tf.Tensor, _: tf.Tensor) -> list[tf.Tensor]:
                return [each * tf.cast(upstream, each.dtype) for each in (of_hidden, *scattered)]

            return (loss_sum, num_targets), gradient

        return run(hidden, *pieces)

    def read(self, layers: Sequence[keras.layers.Layer], call: Callable[[tf.Tensor], Any], x: tf.Tensor) -> Any:
        variables, cuts, pieces = self._of(layers)
        return _called(call, variables, self._gather(cuts, pieces, x), x)

    def loop_body(self, body: Callable) -> Callable:
        return in_a_function(body)

    def of_first(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return self._collectives.of_first(tensors)

    def _of(self, layers: Sequence[keras.layers.Layer]) -> tuple[list[keras.Variable], list[Cut], list[tf.Tensor]]:
        """Returns the weights of layers, how each is cut, and this replica's piece of each."""
        variables = [variable for layer in layers for variable in layer.trainable_variables]
        pieces = [self._pieces[id(variable)] for variable in variables]
        return variables, [piece.cut for piece in pieces], [piece.value for piece in pieces]

    def _gather(self, cuts: Sequence[Cut], pieces: Sequence[tf.Tensor], after: tf.Tensor) -> list[tf.Tensor]:
        """Returns whole weights. Matrices have the dtype that blocks compute in, and vectors, some of which
        normalizations read in the accumulation dtype, their own.

        Args:
            cuts: how each weight is cut.
            pieces: this replica's piece of each.
            after: a tensor to wait for. Nothing else keeps TensorFlow from gathering all weights of the model at once.
        """
        narrow = [tf.cast(piece, self._dtype) if len(piece.shape) > 1 else piece for piece in pieces]
        whole: list[tf.Tensor] = []
        for places in travel_together(cuts, self._dtype.size):
            held_back = self._collectives.after(after, [narrow[i] for i in places])
            padded = self._collectives.gather(held_back)
            whole += [cuts[i].whole(each, tf) for i, each in zip(places, padded, strict=True)]
        return whole

    def _scatter(
        self, cuts: Sequence[Cut], pieces: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor]
    ) -> list[tf.Tensor]:
        """Returns this replica's piece of the sum over replicas of each gradient."""
        # The gradient of an embedding comes as slices, which are added up in the dtype of the weights.
        dense = [
            tf.convert_to_tensor(tf.cast(gradient, piece.dtype))
            for gradient, piece in zip(gradients, pieces, strict=True)
        ]
        scattered: list[tf.Tensor] = []
        for places in travel_together(cuts, pieces[0].dtype.size):
            scattered += self._collectives.reduce_scatter([cuts[i].padded(dense[i], tf) for i in places])
        return scattered


def _called(
    call: Callable[[tf.Tensor], Any], variables: Sequence[keras.Variable], values: Sequence[tf.Tensor], x: tf.Tensor
) -> Any:
    """Returns call(x), in which variables have these values."""
    with keras.StatelessScope(initialize_variables=False) as scope:
        for variable, value in zip(variables, values, strict=True):
            # An update, because a mapping would cast the value to the dtype of the variable.
            scope.add_update((variable, value))
        return call(x)
