"""The layers that hold weights: Keras's own, each computed as the GPT needs it."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from trainer.model.activations import Activation
from trainer.model.attention import unforeseen_zero
from trainer.model.cpu import add_bias
from trainer.model.normalization import NORM_EPSILON, normalize, normalize_rms, with_axes_of
from trainer.model.precision import accumulation_dtype


class Dense(keras.layers.Dense):
    """Keras's dense layer, as one product of matrices: TensorFlow fuses that with the bias and the activation.

    Where XLA compiles it other forms cost less: a product may have any layout there, which a reshape would spoil.
    """

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Maps float [..., width] to [..., units], or to half as many by swiglu."""
        return with_axes_of(x, self.activation(self.affine(x)))

    def affine(self, x: tf.Tensor) -> tf.Tensor:
        """Maps float [..., width] to [rows, units], without the activation."""
        return self._with_bias(tf.matmul(tf.reshape(x, [-1, x.shape[-1]]), tf.cast(self.kernel, x.dtype)))

    def project_activated(self, rows: tf.Tensor, activation: Activation) -> tf.Tensor:
        """Maps activation([rows, ...]) to [rows, units]; the gradient keeps but the rows, and activates them again."""

        @tf.custom_gradient
        def project(rows: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, object]:
            def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                again = rows + unforeseen_zero(upstream, rows.dtype)
                with tf.GradientTape() as tape:
                    tape.watch(again)
                    activated = activation(again)
                d_x = tape.gradient(activated, again, tf.matmul(upstream, kernel, transpose_b=True))
                return d_x, tf.matmul(activated, upstream, transpose_a=True)

            return tf.matmul(activation(rows), kernel), gradient

        return self._with_bias(project(rows, tf.cast(self.kernel, rows.dtype)))

    def split_heads(self, x: tf.Tensor, heads: Sequence[int]) -> list[tf.Tensor]:
        """Maps float [batch, sequence, width] to parts of so many heads each, [batch, heads, sequence, head_dim]."""
        kernel = tf.reshape(tf.cast(self.kernel, x.dtype), [x.shape[-1], sum(heads), -1])
        parts = [tf.einsum("btc,chd->bhtd", x, part) for part in tf.split(kernel, heads, axis=1)]
        if self.bias is None:
            return parts
        bias = tf.reshape(tf.cast(self.bias, x.dtype), [sum(heads), 1, -1])
        return [part + of_part for part, of_part in zip(parts, tf.split(bias, heads), strict=True)]

    def join_heads(self, x: tf.Tensor) -> tf.Tensor:
        """Maps float [batch, heads, sequence, head_dim] to [batch, sequence, units]."""
        kernel = tf.reshape(tf.cast(self.kernel, x.dtype), [x.shape[1], x.shape[3], self.units])
        return self._with_bias(tf.einsum("bhtd,hdc->btc", x, kernel))

    def _with_bias(self, x: tf.Tensor) -> tf.Tensor:
        return x if self.bias is None else add_bias(x, tf.cast(self.bias, x.dtype))


class Unembedding(keras.layers.Layer):
    """Weights of the output projection: kernel [num_logits, hidden_dim] and, unless left out, bias [num_logits].

    It holds them and does not apply them: the loss reads them a chunk of rows at a time.
    """

    def __init__(self, num_logits: int, use_bias: bool, initializer: keras.Initializer, dtype: str) -> None:
        super().__init__(name="unembedding", dtype=dtype)
        self.num_logits = num_logits
        self.use_bias = use_bias
        self.initializer = initializer
        self.bias = None

    def build(self, input_shape: tuple) -> None:
        """Creates the variables for hidden states of shape [..., hidden_dim]."""
        self.kernel = self.add_weight((self.num_logits, input_shape[-1]), self.initializer, name="kernel")
        if self.use_bias:
            self.bias = self.add_weight((self.num_logits,), "zeros", name="bias")


class Norm(keras.layers.LayerNormalization):
    """Keras's layer normalization over the last axis, in the accumulation dtype.

    Args:
        kind: "layer", or "rms" for the root mean square in place of mean and variance.
        settings: of Keras's layer.
    """

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__(epsilon=NORM_EPSILON, **settings)
        self.kind = kind

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Normalizes float [..., width]."""
        dtype = accumulation_dtype(x.dtype)
        scales = (tf.cast(scale, dtype) for scale in (self.gamma, self.beta) if scale is not None)
        return normalize(x, *scales) if self.kind == "layer" else normalize_rms(x, *scales)
