"""How a model's layers get their weights: whole, as here, or made of pieces when they are needed
(trainer/training/gathered.py).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state

from trainer.model.block import Block
from trainer.model.recompute import recomputed

# Computes a block, as the block at a place in the model, of float [batch, sequence, hidden_dim].
RunBlock = Callable[[Block, int | tf.Tensor, tf.Tensor], tf.Tensor]


class Held:
    """Every replica holds every weight: each layer reads its own variables."""

    def keeping(self, layers: Sequence[keras.layers.Layer], call: Callable[[tf.Tensor], Any], x: tf.Tensor) -> Any:
        """Returns call(x). Gradients keep what call needs for them.

        Args:
            layers: hold all the weights that call reads.
            call: a function of one tensor.
            x: its argument, which gets no gradient if the weights are in pieces: it is the tokens, or nothing asks for
                gradients.
        """
        return call(x)

    def blocks(self, blocks: Sequence[Block], run: RunBlock, x: tf.Tensor, recomputes: bool) -> tf.Tensor:
        """Runs blocks one after the other. Gradients keep only the input of each, and run it again, if recomputes.

        Args:
            blocks: blocks of the same shapes.
            run: computes a block, and reads no other weights than those of the block. One block may stand for another,
                whose weights and place it then has.
            x: the input of the first block.
            recomputes: whether gradients run a block again.

        Returns:
            The output of the last block.
        """
        for place, block in enumerate(blocks):
            call = functools.partial(run, block, place)
            x = recomputed(block, call, x) if recomputes else call(x)
        return x

    def loss(
        self,
        layers: Sequence[keras.layers.Layer],
        call: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
        hidden: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns call(hidden), which is (loss_sum, num_targets).

        Args:
            layers: hold all the weights that call reads.
            call: makes the gradients of loss_sum along with it; see `trainer.model.loss.next_token_loss`.
            hidden: float [batch, sequence, hidden_dim].
        """
        return call(hidden)

    def read(self, layers: Sequence[keras.layers.Layer], call: Callable[[tf.Tensor], Any], x: tf.Tensor) -> Any:
        """Returns call(x), for which there are no gradients.

        Args:
            layers: hold all the weights that call reads.
            call: a function of one tensor.
            x: its argument.
        """
        return call(x)

    def loop_body(self, body: Callable) -> Callable:
        """Returns body, a function of tensors, in a form that a tf.while_loop can run if it reads weights."""
        return body

    def of_first(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the tensors of the first replica, on all replicas.

        Replicas that read the same weights for the same tokens can round differently, and so differ in what they
        decide. A loop that reads weights must end after the same iteration on all of them.

        Args:
            tensors: numbers that float32 holds, of the same shapes on all replicas and in all calls.
        """
        return list(tensors)


WHOLE = Held()

# What Keras calls the list of the variables that have no value yet.
_WAITING = "uninitialized_variables"


@contextmanager
def without_values() -> Iterator[None]:
    """Lets layers make variables that hold no value: nothing is allocated. What reads such a variable gets its initial
    value, made anew; in a `keras.StatelessScope` that has a value for it, that value.
    """
    waiting = list(global_state.get_global_attribute(_WAITING, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Keras makes the values of all variables that wait for them when the next StatelessScope ends, whatever it is
        # for.
        global_state.set_global_attribute(_WAITING, waiting)
