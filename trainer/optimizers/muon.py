"""Muon for the matrices inside a model, beside AdamW for everything else."""

import math
from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from trainer.config.settings import OptimizerConfig
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.newton_schulz import orthogonalize
from trainer.optimizers.replicas import Replicas, map_in_shares, map_pieces_in_shares
from trainer.optimizers.variables import Piece, slot

# The root mean square of the numbers in one of AdamW's updates, which those of Muon get too: so both optimizers take
# the same learning rate and weight decay. Source: Liu et al. 2025, section 2.2.
RMS_OF_UPDATE = 0.2

Shape = tuple[int, int]


class Muon(tf.Module):
    """Momentum whose matrices are orthogonalized, with decoupled weight decay; equal to Keras Muon for these matrices.

    An update turns every direction of a matrix by about the same amount, where AdamW's is mostly made of a few.

    Args:
        config: momentum and weight decay, and the settings of AdamW.
        variables: the model's trainable variables, or this replica's pieces of them, by name. Create the optimizer
            under the strategy scope of these.
        matrices: the variables [rows, columns] that Muon trains, by name, each with the widths of its parts, matrices
            that are side by side: their sum is columns, and each part is orthogonalized by itself.
        dtype: the dtype in which matrices are orthogonalized.
        direction_dtype: the dtype in which replicas exchange the orthogonalized matrices.
        stacks: whether matrices of one shape are multiplied as a stack, and not one by one.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", with the Nesterov momentum
    that they use; Liu et al. 2025, "Muon is scalable for LLM training", algorithm 1 and equation 4 for scale and decay.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        variables: Mapping[str, keras.Variable | Piece],
        matrices: Mapping[str, Sequence[int]],
        dtype: str,
        direction_dtype: str,
        stacks: bool = True,
    ) -> None:
        super().__init__(name="muon")
        self.config = config
        self.dtype, self.direction_dtype = tf.as_dtype(dtype), tf.as_dtype(direction_dtype)
        self.stacks = stacks
        self.is_matrix = [name in matrices for name in variables]
        self.names = [name for name in variables if name in matrices]
        self.variables_to_train = [variables[name] for name in self.names]
        wholes = [each.whole_shape if isinstance(each, Piece) else each.shape for each in self.variables_to_train]
        self.rows = [shape[0] for shape in wholes]
        self.widths = [list(matrices[name]) for name in self.names]
        self.momenta = [slot(variable) for variable in self.variables_to_train]
        self.adamw = AdamW(config, {name: each for name, each in variables.items() if name not in matrices})

    @property
    def num_updates(self) -> tf.Variable:
        """Updates so far, int64."""
        return self.adamw.num_updates

    def state(self) -> dict[str, tf.Variable]:
        """Returns every variable of the optimizer by a name that begins with its weight's name."""
        named = self.adamw.state()
        return named | {f"{name}/momentum": each for name, each in zip(self.names, self.momenta, strict=True)}

    def updates(self, gradients: Sequence[tf.Tensor], replicas: Replicas) -> list[tf.Tensor]:
        """Returns what `apply` needs: the gradients, and after them the orthogonalized momenta. Changes nothing.

        It is apart from `apply` because replicas share this work: no collective operation may be inside a condition.

        Args:
            gradients: gradients of the mean loss, one per variable, dense, of the variable's shape and dtype.
            replicas: who shares the work.
        """
        ahead = []  # Nesterov: the momentum after this step, a step further.
        for gradient, momentum in zip(self._of_matrices(gradients), self.momenta, strict=True):
            ahead.append(gradient + self.config.momentum * self._next_momentum(momentum, gradient))
        parts = [tf.split(each, widths, axis=1) for each, widths in zip(ahead, self.widths, strict=True)]
        flat = iter(self._directions([part for each in parts for part in each], replicas))
        return [*gradients, *(tf.concat([next(flat) for _ in each], axis=1) for each in parts)]

    def apply(self, updates: Sequence[tf.Tensor], learning_rate: tf.Tensor) -> None:
        """Updates all weights, momenta and moments once.

        Args:
            updates: what `updates` returned.
            learning_rate: scalar.
        """
        gradients, directions = updates[: len(self.is_matrix)], updates[len(self.is_matrix) :]
        others = [each for each, is_matrix in zip(gradients, self.is_matrix, strict=True) if not is_matrix]
        self.adamw.apply(others, learning_rate)
        for variable, momentum, gradient, direction in zip(
            self.variables_to_train, self.momenta, self._of_matrices(gradients), directions, strict=True
        ):
            change = tf.cast(learning_rate, gradient.dtype) * direction
            if self.config.weight_decay:
                decay = tf.cast(learning_rate * self.config.weight_decay, gradient.dtype)
                change += decay * tf.convert_to_tensor(variable.value)
            # Raw operations, for the reason that AdamW has.
            tf.raw_ops.AssignVariableOp(resource=momentum.handle, value=self._next_momentum(momentum, gradient))
            tf.raw_ops.AssignSubVariableOp(resource=variable.value.handle, value=change)

    def _of_matrices(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [each for each, is_matrix in zip(gradients, self.is_matrix, strict=True) if is_matrix]

    def _next_momentum(self, momentum: tf.Variable, gradient: tf.Tensor) -> tf.Tensor:
        return self.config.momentum * momentum.read_value() + gradient

    def _directions(self, matrices: Sequence[tf.Tensor], replicas: Replicas) -> list[tf.Tensor]:
        """Returns matrices like these with singular values near 1, times the factor that makes the root mean square of
        their numbers RMS_OF_UPDATE. If the matrices are pieces, returns this replica's rows of these results.
        """
        rows = [rows for rows, widths in zip(self.rows, self.widths, strict=True) for _ in widths]
        shapes = [(number, matrix.shape[1]) for number, matrix in zip(rows, matrices, strict=True)]
        find = self._orthogonalized if replicas.all_to_all is None else self._orthogonalized_pieces
        return [
            tf.cast(found, matrix.dtype) * (RMS_OF_UPDATE * math.sqrt(max(shape)))
            for found, matrix, shape in zip(find(matrices, shapes, replicas), matrices, shapes, strict=True)
        ]

    def _orthogonalized(
        self, matrices: Sequence[tf.Tensor], shapes: Sequence[Shape], replicas: Replicas
    ) -> list[tf.Tensor]:
        # Matrices of one shape are one stack, of which each replica takes its share.
        places = _places([(min(shape), max(shape)) for shape in shapes])
        stacks = [tf.stack([_lying(tf.cast(matrices[i], self.dtype)) for i in each]) for each in places.values()]
        results = map_in_shares(self._orthogonalized_stack, stacks, replicas)
        found = _unstacked(places, results)
        return [
            tf.transpose(each) if rows > columns else each for each, (rows, columns) in zip(found, shapes, strict=True)
        ]

    def _orthogonalized_pieces(
        self, pieces: Sequence[tf.Tensor], shapes: Sequence[Shape], replicas: Replicas
    ) -> list[tf.Tensor]:
        places = _places(shapes)
        stacks = [tf.stack([tf.cast(pieces[i], self.dtype) for i in each]) for each in places.values()]

        def orthogonalized(stack: tf.Tensor) -> tf.Tensor:
            if stack.shape[1] <= stack.shape[2]:
                return self._orthogonalized_stack(stack)
            return tf.transpose(self._orthogonalized_stack(tf.transpose(stack, [0, 2, 1])), [0, 2, 1])

        return _unstacked(places, map_pieces_in_shares(orthogonalized, stacks, [rows for rows, _ in places], replicas))

    def _orthogonalized_stack(self, stack: tf.Tensor) -> tf.Tensor:
        done = orthogonalize(stack) if self.stacks else tf.stack([*map(orthogonalize, tf.unstack(stack))])
        return tf.cast(done, self.direction_dtype)


def _places(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Returns the places of each shape."""
    places: dict[Shape, list[int]] = {}
    for place, shape in enumerate(shapes):
        places.setdefault(shape, []).append(place)
    return places


def _unstacked(places: Mapping[Shape, Sequence[int]], stacks: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns the matrices of stacks, each at its place."""
    found: dict[int, tf.Tensor] = {}
    for each, stack in zip(places.values(), stacks, strict=True):
        found |= zip(each, tf.unstack(stack), strict=True)
    return [found[place] for place in range(len(found))]


def _lying(matrix: tf.Tensor) -> tf.Tensor:
    """Returns a matrix with its longer axis last."""
    return tf.transpose(matrix) if matrix.shape[0] > matrix.shape[1] else matrix
