"""What is split over the replicas: the optimizer's state, or the weights too (`distribution.shard`).

"optimizer": every replica keeps all weights, computes with them, and updates its piece of each. Its optimizer has slots
for these pieces only. In a step

    SplitOptimizer.sums      gradients -> this replica's pieces of their sums, and the norm of the whole sums
    SplitOptimizer.begin     the pieces of the weights -> variables, which the optimizer updates
    SplitOptimizer.finish    these variables -> the weights, whole on every replica

"weights": these variables are the weights, and the model has no others. SplitWeights.held gathers them layer by layer
(gathered.py), where their gradients become pieces of sums as well.

Source: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models", stages 1 and 3.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Self

import keras
import numpy as np
import tensorflow as tf

from trainer.distributed.collectives import Collectives, RehearsedCollectives, XlaCollectives
from trainer.model.held import Held
from trainer.model.pieces import Cut, cut_all, travel_together
from trainer.optimizers.variables import Piece
from trainer.training.gathered import PieceOfWeight, gathered


class SplitOptimizer:
    """What the replicas exchange so that each updates its piece of every weight.

    Args:
        collectives: how they exchange.
        variables: the model's trainable variables by name. Create it under the strategy scope of these.

    Attributes:
        pieces: what the optimizer trains, by the name of its weight. Between steps these variables hold nothing of
            value: each step begins with the weights.
    """

    def __init__(self, collectives: Collectives, variables: Mapping[str, keras.Variable]) -> None:
        self._collectives = collectives
        self._strategy = tf.distribute.get_strategy()
        self._variables = list(variables.values())
        shapes = {name: variable.shape for name, variable in variables.items()}
        self._cuts = cut_all(shapes, collectives.num_pieces)
        self.pieces = {
            name: Piece(variables[name].name, cut.piece_shape, variables[name].dtype, cut.shape)
            for name, cut in self._cuts.items()
        }

        self._gathers: dict[tuple[tuple[int, ...], tf.DType], tf.types.experimental.ConcreteFunction] = {}

    def rehearsing(self) -> Self:
        """Returns the same with collectives that wait for nobody."""
        other = copy.copy(self)
        in_xla = isinstance(self._collectives, XlaCollectives)
        other._collectives = RehearsedCollectives(self._collectives.num_pieces, in_xla)
        return other

    def sums(
        self, gradients: Sequence[tf.Tensor], counts: Sequence[tf.Tensor]
    ) -> tuple[list[tf.Tensor], list[tf.Tensor], tf.Tensor]:
        """Sums gradients and counts over all replicas.

        Args:
            gradients: this replica's gradient of each whole weight, all of one dtype.
            counts: scalars and vectors of that dtype.

        Returns:
            (pieces, counts, norm): this replica's piece of each gradient's sum, the sum of each count, and the global
            norm of the sums of all gradients, the same on all replicas. All have the dtype of the arguments.
        """
        pieces = self._scattered(gradients)
        # Rows of zeros, which pad the last pieces, add nothing.
        squares = 2 * tf.add_n([tf.nn.l2_loss(piece) for piece in pieces])
        if self._collectives.num_groups > 1:  # Each of which has all pieces.
            squares /= self._collectives.num_groups
        summands = [tf.reshape(each, [-1]) for each in (*counts, squares)]
        total = self._collectives.all_reduce(tf.concat(summands, axis=0))
        *sums, squares = tf.split(total, [each.shape[0] for each in summands])
        shaped = [tf.reshape(each, count.shape) for each, count in zip(sums, counts, strict=True)]
        return pieces, shaped, tf.sqrt(squares[0])

    @property
    def num_pieces(self) -> int:
        """The replicas that hold everything together."""
        return self._collectives.num_pieces

    def all_to_all(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Exchanges parts of tensors [num_pieces, ...]; see `Collectives.all_to_all`."""
        return self._collectives.all_to_all(tensors)

    def _scattered(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        cuts = list(self._cuts.values())
        pieces: list[tf.Tensor] = []
        for places in travel_together(cuts, gradients[0].dtype.size):
            pieces += self._collectives.reduce_scatter([cuts[i].padded(gradients[i], tf) for i in places])
        return pieces

    def begin(self) -> None:
        """Gives the pieces the newest weights, whoever has changed these since the last step."""
        for variable, piece, cut in self._together():
            own = self._collectives.own(cut.padded(tf.convert_to_tensor(variable.value), tf))
            tf.raw_ops.AssignVariableOp(resource=piece.value.handle, value=tf.ensure_shape(own, piece.shape))

    def finish(self, finite: tf.Tensor) -> None:
        """Gives the weights the values of all replicas' pieces.

        Args:
            finite: bool scalar, whether the pieces were updated. Otherwise they are those of the weights.
        """
        for variable, whole in zip(self._variables, self.gathered(), strict=True):
            if self._collectives.is_one_program:
                # XLA writes the result of a choice over the old weights. It gathers nothing in place: without the
                # choice its program for a TPU copies all weights at its beginning, and keeps the copy in the step.
                whole = tf.where(finite, whole, tf.convert_to_tensor(variable.value))
            # The raw operation, as `assign` would aggregate over replicas, which all have the same.
            tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=whole)

    def gathered(self) -> list[tf.Tensor]:
        """Returns whole weights, made of the values of all replicas' pieces."""
        cuts, pieces = list(self._cuts.values()), list(self.pieces.values())
        wholes: list[tf.Tensor] = []
        for places in travel_together(cuts, pieces[0].value.dtype.size):
            padded = self._collectives.gather([tf.convert_to_tensor(pieces[i].value) for i in places])
            wholes += [cuts[i].whole(each, tf) for i, each in zip(places, padded, strict=True)]
        return wholes

    def whole(self, name: str, variable: tf.Variable) -> "tf.Variable | SplitArray":
        """Returns a variable of the optimizer as checkpoints have it: of a slot, which is split, the whole array.

        Args:
            name: its name, which begins with its weight's name if it is a slot.
            variable: the variable.
        """
        cut = self._cuts.get(name.rpartition("/")[0])
        return variable if cut is None else SplitArray(variable, cut, self)

    def read(self, variable: tf.Variable, cut: Cut) -> np.ndarray:
        """Returns the whole array that replicas hold pieces of. Every worker calls this or `send`, for the same arrays
        in turn.
        """
        return np.asarray(cut.whole(self.send(variable, cut).numpy()))

    def send(self, variable: tf.Variable, cut: Cut) -> tf.Tensor:
        """Sends the pieces of this process to all workers. Returns all pieces one below the other, on a device."""
        own = iter([tf.convert_to_tensor(each) for each in self._strategy.experimental_local_results(variable)])
        pieces = self._strategy.experimental_distribute_values_from_function(lambda context: next(own))
        return self._strategy.experimental_local_results(self._gather(pieces))[0]

    def write(self, variable: tf.Variable, cut: Cut, array: np.ndarray) -> None:
        """Gives each replica of this process its piece of a whole array."""
        pieces = np.reshape(cut.padded(array), (cut.num_pieces, *cut.piece_shape))
        own = self._strategy.experimental_local_results(variable)
        for component, place in zip(own, self._places, strict=True):
            component.assign(pieces[place])

    def _together(self) -> list[tuple[keras.Variable, Piece, Cut]]:
        return list(zip(self._variables, self.pieces.values(), self._cuts.values(), strict=True))

    @functools.cached_property
    def _places(self) -> list[int]:
        return self._collectives.places_of_this_process(self._strategy)

    def _gather(self, pieces: tf.Tensor) -> tf.Tensor:
        """Returns all pieces of an array one below the other, on each replica, of each replica's piece."""
        own = self._strategy.experimental_local_results(pieces)[0]
        key = (tuple(own.shape), own.dtype)
        # A model has few shapes and many arrays. TensorFlow takes functions that were made on one line for one function
        # that is traced again and again, and warns, unless they are traced by get_concrete_function.
        if key not in self._gathers:

            def gather(piece: tf.Tensor) -> tf.Tensor:
                return self._collectives.gather([piece])[0]

            function = tf.function(lambda piece: self._strategy.run(gather, (piece,)), autograph=False)
            self._gathers[key] = function.get_concrete_function(pieces)
        return self._gathers[key](pieces)


class SplitWeights(SplitOptimizer):
    """What the replicas exchange if each holds only its piece of every weight.

    Args:
        collectives: how they exchange.
        variables: the GPT's variables by name, which need no values: each initial value is made by itself, cut and
            dropped. Create it under the strategy scope.
        begins: whether the pieces begin with the initial values; otherwise they are zeros until a checkpoint is read.

    Attributes:
        pieces: the weights. The model's own variables hold no values and are not read.
    """

    def __init__(self, collectives: Collectives, variables: Mapping[str, keras.Variable], begins: bool = True) -> None:
        super().__init__(collectives, variables)
        # A step that is only lowered is of no process, and needs no values.
        for variable, piece, cut in self._together() if begins and self._places else ():
            self.write(piece.value, cut, variable.numpy())

    def held(self, dtype: str, values: Sequence[tf.Tensor] | None = None, is_compiled: bool = False) -> Held:
        """Returns what gives layers their weights. Call it in a replica function.

        Args:
            dtype: the dtype that blocks compute in.
            values: this replica's pieces, for which gradients follow; None: what the pieces are now, without gradients.
            is_compiled: whether XLA compiles what is computed between the exchanges.
        """
        now = [tf.convert_to_tensor(piece.value) for piece in self.pieces.values()] if values is None else values
        of_weights = [PieceOfWeight(cut, value) for cut, value in zip(self._cuts.values(), now, strict=True)]
        ids = map(id, self._variables)
        pieces = dict(zip(ids, of_weights, strict=True))
        return gathered(self._collectives, pieces, dtype, is_compiled, is_differentiated=values is not None)

    def arrays(self) -> dict[str, "SplitArray"]:
        """Returns the whole weights by name, as checkpoints have them."""
        names = zip(self.pieces.items(), self._cuts.values(), strict=True)
        return {name: SplitArray(piece.value, cut, self) for (name, piece), cut in names}

    def begin(self) -> None:
        """Does nothing: the pieces are the weights."""

    def finish(self, finite: tf.Tensor) -> None:
        """Does nothing: the pieces are the weights."""

    def gathered(self) -> list[tf.Tensor]:
        """Returns nothing: a step ends without whole weights."""
        return []

    def _scattered(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the gradients, which are pieces of sums since they were made."""
        return list(gradients)


class SplitArray:
    """An array of which each replica holds a piece, as what reads and writes checkpoints sees it.

    Args:
        variable: the variable that every replica has for itself.
        cut: how the array is cut.
        split: the replicas that hold it.

    Attributes:
        shape: the shape of the whole array.
        dtype: its dtype.
    """

    def __init__(self, variable: tf.Variable, cut: Cut, split: SplitOptimizer) -> None:
        self.shape, self.dtype = tf.TensorShape(cut.shape), variable.dtype
        self._variable, self._cut, self._split = variable, cut, split

    def numpy(self) -> np.ndarray:
        """Returns the whole array. Every worker calls it, or `send`, for the same arrays in the same order."""
        return self._split.read(self._variable, self._cut)

    def send(self) -> None:
        """Takes part in the other workers' `numpy`, and copies nothing to the host."""
        self._split.send(self._variable, self._cut)

    def assign(self, array: np.ndarray) -> None:
        """Gives each replica of this process its piece of a whole array."""
        self._split.write(self._variable, self._cut, np.asarray(array))
