"""Weights that a replica holds only pieces of, and gathers layer by layer (`distribution.shard = "weights"`).

    forward    gather a block's weights -> compute the block -> drop them
    backward   gather them again -> compute the block's gradients -> reduce-scatter these

so that a replica holds one or two blocks of whole weights at a time, and gradients only of the block that it computes.
The embeddings, and the last normalization with the output projection and the loss, are each gathered once: the gradient
of a look-up does not read the table, and the loss makes its gradients along with itself. Matrices travel in the dtype
that the model computes in, gradients in the dtype of the weights.

The first block stands for all: its forward pass and its backward pass are two programs that get the weights and the
place of a block. On CPUs and GPUs these are two functions, called for block after block, which XLA compiles on GPUs;
replicas exchange between the calls, where TensorFlow has operations for it. In a program of XLA, as on TPUs, they are
the bodies of two loops over the blocks, so the whole program is as long for one block as for a hundred.

Source: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models", stage 3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.distributed.collectives import Collectives, in_a_function
from trainer.model.block import Block
from trainer.model.held import Held, RunBlock
from trainer.model.pieces import Cut, travel_together
from trainer.training.passes import BlockPasses, called, passes_that_compute_again, passes_that_keep


class PieceOfWeight(NamedTuple):
    """What a replica holds of a weight.

    Attributes:
        cut: how the weight is cut.
        value: this replica's piece, a tensor of the weight's dtype.
    """

    cut: Cut
    value: tf.Tensor


def gathered(
    collectives: Collectives,
    pieces: Mapping[int, PieceOfWeight],
    dtype: str,
    is_compiled: bool = False,
    is_differentiated: bool = True,
) -> Held:
    """Returns what gives layers weights that are gathered when they are needed. Call it in a replica function, on every
    replica.

    Args:
        collectives: how replicas exchange.
        pieces: this replica's pieces, by the id of the Keras variable of their weight.
        dtype: the dtype that blocks compute in.
        is_compiled: whether XLA compiles what is computed between the exchanges. In a program of XLA it does anyway.
        is_differentiated: whether gradients follow; otherwise nothing is kept for them.
    """
    way = _GatheredInOneProgram if collectives.is_one_program else _Gathered
    return way(collectives, pieces, tf.as_dtype(dtype), is_compiled, is_differentiated)


class _Gathered(Held):
    """What replicas exchange is between calls of functions."""

    def __init__(
        self,
        collectives: Collectives,
        pieces: Mapping[int, PieceOfWeight],
        dtype: tf.DType,
        is_compiled: bool,
        is_differentiated: bool,
    ) -> None:
        self._collectives, self._pieces, self._dtype = collectives, pieces, dtype
        self._is_compiled, self._is_differentiated = is_compiled, is_differentiated

    def keeping(self, layers: Sequence[keras.layers.Layer], call: Callable[[tf.Tensor], Any], x: tf.Tensor) -> Any:
        variables, cuts, pieces = self._of(layers)

        @tf.custom_gradient
        def run(*pieces: tf.Tensor) -> tuple[Any, object]:
            with tf.GradientTape() as tape:
                whole = self._gather(cuts, pieces, x)
                tape.watch(whole)
                result = called(call, variables, whole, x)

            def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
                return self._scatter(cuts, pieces, tape.gradient(result, whole, *upstream))

            return result, gradient

        return run(*pieces)

    def blocks(self, blocks: Sequence[Block], run: RunBlock, x: tf.Tensor, recomputes: bool) -> tf.Tensor:
        passes = self._passes(blocks[0], run, x, recomputes, self._is_compiled)
        passes = passes._replace(
            forward=in_a_function(passes.forward, self._is_compiled),
            backward=in_a_function(passes.backward, self._is_compiled),
        )
        for i, block in enumerate(blocks):
            x = self._block(block, passes, tf.constant(i), x)
        return x

    def _passes(self, block: Block, run: RunBlock, x: tf.Tensor, recomputes: bool, is_compiled: bool) -> BlockPasses:
        """Returns the passes of a block that stands for all."""
        if recomputes or not self._is_differentiated:
            return passes_that_compute_again(block, run)
        _, cuts, pieces = self._of([block])
        weights = [
            tf.TensorSpec(cut.shape, self._dtype if self._travels_in_compute_dtype(piece) else piece.dtype)
            for cut, piece in zip(cuts, pieces, strict=True)
        ]
        return passes_that_keep(block, run, tf.TensorSpec(x.shape, x.dtype), weights, is_compiled)

    def _block(self, block: Block, passes: BlockPasses, place: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        _, cuts, pieces = self._of([block])

        @tf.custom_gradient
        def run(x: tf.Tensor, *pieces: tf.Tensor) -> tuple[tf.Tensor, object]:
            # If the tape around this one recorded the call, it would keep what is computed within.
            whole = self._gather(cuts, [tf.stop_gradient(piece) for piece in pieces], x)
            result, *handed_over = passes.forward(place, tf.stop_gradient(x), *whole)

            def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
                again = self._collectives.after(upstream, [x])[0]
                whole = self._gather(cuts, pieces, upstream)
                of_x, *of_weights = passes.backward(place, upstream, again, *handed_over, *whole)
                return [of_x, *self._scatter(cuts, pieces, of_weights)]

            return result, gradient

        return run(x, *pieces)

    def loss(
        self,
        layers: Sequence[keras.layers.Layer],
        call: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
        hidden: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        variables, cuts, pieces = self._of(layers)

        def with_gradients(hidden: tf.Tensor, *whole: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch([hidden, *whole])
                loss_sum, num_targets = called(call, variables, whole, hidden)
            return [loss_sum, num_targets, *tape.gradient(loss_sum, [hidden, *whole])]

        differentiated = in_a_function(with_gradients, True) if self._is_compiled else with_gradients

        @tf.custom_gradient
        def run(hidden: tf.Tensor, *pieces: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], object]:
            # The gradients are made here. If the tape around this one recorded how, the loop over the chunks of logits
            # would keep all of them for a second derivative.
            hidden = tf.stop_gradient(hidden)
            gathered = self._gather(cuts, [tf.stop_gradient(piece) for piece in pieces], hidden)
            # The loss adds up the gradient of the output projection, chunk by chunk, in the dtype that it gets it in.
            whole = [tf.cast(each, piece.dtype) for each, piece in zip(gathered, pieces, strict=True)]
            loss_sum, num_targets, of_hidden, *of_weights = differentiated(hidden, *whole)
            scattered = self._scatter(cuts, pieces, of_weights)

            def gradient(upstream: tf.Tensor, _: tf.Tensor) -> list[tf.Tensor]:
                return [each * tf.cast(upstream, each.dtype) for each in (of_hidden, *scattered)]

            return (loss_sum, num_targets), gradient

        return run(hidden, *pieces)

    def read(self, layers: Sequence[keras.layers.Layer], call: Callable[[tf.Tensor], Any], x: tf.Tensor) -> Any:
        variables, cuts, pieces = self._of(layers)
        return called(call, variables, self._gather(cuts, pieces, x), x)

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
        whole: list[tf.Tensor] = []
        for places in travel_together(cuts, self._dtype.size):
            held_back = self._collectives.after(after, [pieces[i] for i in places])
            # Cast once they may travel: TensorFlow would cast all pieces of the model at once, and keep the results.
            padded = self._collectives.gather([self._narrow(piece) for piece in held_back])
            whole += [cuts[i].whole(each, tf) for i, each in zip(places, padded, strict=True)]
        return whole

    def _narrow(self, piece: tf.Tensor) -> tf.Tensor:
        """Returns a piece in the dtype that it travels in."""
        return tf.cast(piece, self._dtype) if self._travels_in_compute_dtype(piece) else piece

    def _travels_in_compute_dtype(self, piece: tf.Tensor) -> bool:
        """Whether a piece travels in the dtype that blocks compute in."""
        return len(piece.shape) > 1

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


class _GatheredInOneProgram(_Gathered):
    """XLA compiles what replicas exchange with all of the step."""

    def blocks(self, blocks: Sequence[Block], run: RunBlock, x: tf.Tensor, recomputes: bool) -> tf.Tensor:
        forward, backward, handed_over = self._passes(blocks[0], run, x, recomputes, is_compiled=True)
        of_blocks = [self._of([block]) for block in blocks]
        cuts, num_blocks, num_weights = of_blocks[0][1], len(blocks), len(of_blocks[0][1])

        def in_turn(body: Callable[..., tuple[Any, ...]], *first: Any) -> tuple[Any, ...]:
            loop = tf.while_loop(lambda turn, *_: turn < num_blocks, body, (0, *first), parallel_iterations=1)
            return tuple(loop)

        @tf.custom_gradient
        def run_all(x: tf.Tensor, *pieces: tf.Tensor) -> tuple[tf.Tensor, object]:
            # All pieces of the first weight of a block, in one tensor, then those of the second one.
            stacked = [tf.stack([self._narrow(each) for each in pieces[i::num_weights]]) for i in range(num_weights)]

            def gathered(place: tf.Tensor, after: tf.Tensor) -> list[tf.Tensor]:
                return self._gather(cuts, [tf.gather(each, place) for each in stacked], after)

            def next_block(place: tf.Tensor, x: tf.Tensor, *kept: tf.TensorArray) -> tuple[Any, ...]:
                result, *of_block = forward(place, x, *gathered(place, x))
                written = [each.write(place, one) for each, one in zip(kept, [x, *of_block], strict=True)]
                return place + 1, result, *written

            def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
                def block_before(turn: tf.Tensor, upstream: tf.Tensor, *of_pieces: tf.TensorArray) -> tuple[Any, ...]:
                    place = num_blocks - 1 - turn
                    of_x, *of_weights = backward(
                        place, upstream, *(each.read(place) for each in kept), *gathered(place, upstream)
                    )
                    scattered = self._scatter(cuts, pieces[:num_weights], of_weights)
                    written = [each.write(place, own) for each, own in zip(of_pieces, scattered, strict=True)]
                    return turn + 1, of_x, *written

                of_pieces = [tf.TensorArray(each.dtype, num_blocks) for each in pieces[:num_weights]]
                _, of_x, *of_pieces = in_turn(block_before, upstream, *of_pieces)
                by_weight = [tf.unstack(each.stack(), num_blocks) for each in of_pieces]
                return [of_x, *(each for of_block in zip(*by_weight, strict=True) for each in of_block)]

            first = [tf.TensorArray(each.dtype, num_blocks, element_shape=each.shape) for each in [x, *handed_over]]
            _, x, *kept = in_turn(next_block, x, *first)
            return x, gradient

        return run_all(x, *(piece for _, _, pieces in of_blocks for piece in pieces))
