"""The model's operations in their textbook form. The other ways of computing override only what they do differently."""

import dataclasses
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from trainer.execution import LOGIT_ROWS, QUERY_BLOCK, Recompute
from trainer.model.activations import ACTIVATIONS, Activation
from trainer.model.attention import cached_attention, causal_attention, unforeseen_zero
from trainer.model.normalization import make_passes, normalize, with_axes_of


@dataclasses.dataclass(frozen=True)
class Ops:
    """Computes the model's operations one by one, on any device.

    A `layer` in the arguments is a Keras Dense layer, of which only the weights are read.

    Attributes:
        recompute: what gradients compute again instead of keeping it: "nothing"; "attention" for its probabilities and
            the activations of the feed-forward layer; or "blocks" for all of a block except its input.
        query_block: queries that attention takes at a time; see `trainer.execution.query_blocks`.
        logit_rows: tokens that the loss takes at a time, with one row of logits each.
        compute_dtype: the dtype of hidden states; None for the compute dtype of the model's own dtype policy.
    """

    recompute: Recompute = "nothing"
    query_block: int = QUERY_BLOCK
    logit_rows: int = LOGIT_ROWS
    compute_dtype: str | None = None

    def dense(self, x: tf.Tensor, layer: keras.layers.Dense) -> tf.Tensor:
        """Maps float [..., width] to [..., units]."""
        return with_axes_of(x, self._dense_rows(tf.reshape(x, [-1, x.shape[-1]]), layer))

    def norm(self, x: tf.Tensor, kind: str, epsilon: float, gamma: tf.Tensor, *beta: tf.Tensor) -> tf.Tensor:
        """Normalizes float [..., width]; see `make_passes` and `normalize`."""
        return normalize(make_passes(kind, epsilon), x, gamma, *beta)

    def split_heads(self, x: tf.Tensor, layer: keras.layers.Dense, heads: Sequence[int]) -> list[tf.Tensor]:
        """Maps float [batch, sequence, width] to one tensor [batch, n, sequence, head_dim] for each n of heads."""
        sequence = tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
        x = self.dense(x, layer)
        width = layer.units // sum(heads)
        if x.shape[1] == 1:
            # With a single position there is nothing to transpose.
            parts = tf.split(x, [each * width for each in heads], axis=-1)
            return [tf.reshape(part, [-1, each, 1, width]) for part, each in zip(parts, heads, strict=True)]
        if len(set(heads)) == 1:
            # Equal parts of one tensor, which TensorFlow does not copy.
            parts = tf.transpose(tf.reshape(x, [-1, sequence, len(heads), heads[0], width]), [2, 0, 3, 1, 4])
            return list(tf.unstack(parts))
        by_head = tf.transpose(tf.reshape(x, [-1, sequence, sum(heads), width]), [0, 2, 1, 3])
        return list(tf.split(by_head, heads, axis=1))

    def attention(
        self, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, starts: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Attends from each position to itself and the positions before it; see `causal_attention`."""
        return causal_attention(query, key, value, starts, self.query_block, self.recompute != "nothing")

    def join_heads(self, x: tf.Tensor, layer: keras.layers.Dense) -> tf.Tensor:
        """Maps float [batch, heads, sequence, head_dim] to [batch, sequence, units]."""
        sequence = tf.shape(x)[2] if x.shape[2] is None else x.shape[2]
        by_position = x if x.shape[2] == 1 else tf.transpose(x, [0, 2, 1, 3])
        return self.dense(tf.reshape(by_position, [-1, sequence, x.shape[1] * x.shape[3]]), layer)

    def feed_forward(
        self, x: tf.Tensor, first: keras.layers.Dense, activation: str, second: keras.layers.Dense
    ) -> tf.Tensor:
        """Maps float [batch, sequence, width] by two dense layers, with an activation between them."""
        # In rows, without a reshape before the activation: TensorFlow fuses product, bias and ReLU, and a product may
        # have any layout under XLA.
        rows = self._dense_rows(tf.reshape(x, [-1, x.shape[-1]]), first)
        activate = self.activation(activation)
        if self.recompute == "nothing":
            return with_axes_of(x, self._dense_rows(activate(rows), second))
        projected = _project_activated(rows, tf.cast(second.kernel, rows.dtype), activate)
        return with_axes_of(x, self._with_bias(projected, second))

    def activation(self, name: str) -> Activation:
        """Returns the activation of float [rows, units] that model.activation names."""
        return ACTIVATIONS[name]

    def add_bias(self, rows: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        """Adds bias [width] to float [rows, width]."""
        return tf.nn.bias_add(rows, bias)

    def compiles_blocks(self, x: tf.Tensor) -> bool:
        """Whether each block that decodes float [batch, new, width] is compiled with XLA as a whole."""
        return False

    def cached_attention(self, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
        """Attends from new positions to what a cache holds; see `trainer.model.attention.cached_attention`."""
        return cached_attention(query, key, value, allowed)

    def places(self, kept: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Returns where `write` writes numbers for positions int32 [new] into a tensor of the shape of kept [batch,
        heads, capacity, width].
        """
        heads, capacity = kept.shape[1:3]
        first = tf.range(tf.shape(kept)[0] * heads) * capacity
        return tf.reshape(first[:, tf.newaxis] + positions, [-1, 1])

    def write(self, kept: tf.Tensor, new: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """Writes new [batch, heads, new, width] into kept [batch, heads, capacity, width], at places of `places`, which
        have to be zero; in place if nothing reads kept any more.
        """
        heads, capacity, width = kept.shape[1:]
        # Among TensorFlow's operations that write some rows of a tensor, only this one, which adds, works in place.
        rows = tf.raw_ops.ScatterNdNonAliasingAdd(
            input=tf.reshape(kept, [-1, width]), indices=places, updates=tf.reshape(new, [-1, width])
        )
        return tf.reshape(rows, [-1, heads, capacity, width])

    def logits(self, hidden: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Maps float [batch, sequence, width] to [batch, sequence, num_logits] by kernel [num_logits, width]."""
        return tf.einsum("btd,vd->btv", hidden, kernel)

    def subtract_at(self, x: tf.Tensor, places: tf.Tensor, updates: tf.Tensor) -> tf.Tensor:
        """Subtracts updates [n] from x at places int32 [n, rank of x]."""
        return tf.tensor_scatter_nd_sub(x, places, updates)

    def keep_or_recompute(self, kept: tf.Tensor, make: Callable[[], tf.Tensor]) -> tf.Tensor:
        """Returns kept, which is what make returned before. A way of computing may call make again instead."""
        return kept

    def _dense_rows(self, rows: tf.Tensor, layer: keras.layers.Dense) -> tf.Tensor:
        return self._with_bias(tf.matmul(rows, tf.cast(layer.kernel, rows.dtype)), layer)

    def _with_bias(self, rows: tf.Tensor, layer: keras.layers.Dense) -> tf.Tensor:
        return rows if layer.bias is None else self.add_bias(rows, tf.cast(layer.bias, rows.dtype))


def _project_activated(rows: tf.Tensor, kernel: tf.Tensor, activation: Activation) -> tf.Tensor:
    """Returns activation(rows) times kernel. The gradient keeps only rows, and activates them again."""

    @tf.custom_gradient
    def project(rows: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, object]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            again = rows + unforeseen_zero(upstream, rows.dtype)
            with tf.GradientTape() as tape:
                tape.watch(again)
                activated = activation(again)
            d_rows = tape.gradient(activated, again, tf.matmul(upstream, kernel, transpose_b=True))
            return d_rows, tf.matmul(activated, upstream, transpose_a=True)

        return tf.matmul(activation(rows), kernel), gradient

    return project(rows, kernel)


# The default of every argument `ops`.
PLAIN = Ops()
