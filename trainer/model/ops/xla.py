"""The operations that have another form in a function that XLA compiles as a whole, as for TPUs and GPUs."""

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from trainer.model.ops.plain import Ops


@dataclasses.dataclass(frozen=True)
class XlaOps(Ops):
    """Leaves the layout of products to XLA: it may choose any, which a reshape or a transpose would spoil."""

    def split_heads(self, x: tf.Tensor, layer: keras.layers.Dense, heads: Sequence[int]) -> list[tf.Tensor]:
        """Maps float [batch, sequence, width] to one tensor [batch, n, sequence, head_dim] for each n of heads."""
        kernel = tf.reshape(tf.cast(layer.kernel, x.dtype), [x.shape[-1], sum(heads), -1])
        parts = [tf.einsum("btc,chd->bhtd", x, part) for part in tf.split(kernel, heads, axis=1)]
        if layer.bias is None:
            return parts
        bias = tf.reshape(tf.cast(layer.bias, x.dtype), [sum(heads), 1, -1])
        return [part + of_part for part, of_part in zip(parts, tf.split(bias, heads), strict=True)]

    def join_heads(self, x: tf.Tensor, layer: keras.layers.Dense) -> tf.Tensor:
        """Maps float [batch, heads, sequence, head_dim] to [batch, sequence, units]."""
        kernel = tf.reshape(tf.cast(layer.kernel, x.dtype), [x.shape[1], x.shape[3], layer.units])
        return self._with_bias(tf.einsum("bhtd,hdc->btc", x, kernel), layer)

    def places(self, kept: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Returns the first of the positions, from which `write` writes."""
        return positions[0]

    def write(self, kept: tf.Tensor, new: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """Writes new [batch, heads, new, width] into kept [batch, heads, capacity, width], from `places` on."""
        # For a caller that compiles `GPT.decode` as a whole with XLA, which lacks the operation that the plain way
        # writes with. Outside of such a function this operation would be compiled by itself for each shape, and copy
        # all of kept: trainer itself decodes the plain way, on a TPU too (see `ops_of`).
        return keras.ops.slice_update(kept, (0, 0, places, 0), new)
