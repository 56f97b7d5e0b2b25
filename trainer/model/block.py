"""A transformer block, of which a GPT is a stack."""

import functools
from collections.abc import Callable

import keras
import tensorflow as tf

from trainer.config.settings import BiasedPart, ModelConfig
from trainer.model.attention import rotate
from trainer.model.dropout import DropoutDraw, dropout
from trainer.model.initial import Initializers
from trainer.model.layers import make_head_norm, make_norm
from trainer.model.ops.plain import PLAIN, Ops

# How queries attend to keys and values: over a whole sequence, or over a cache.
Attend = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


class Block(keras.layers.Layer):
    """A transformer block: causal self-attention and a feed-forward layer, each with a residual and a normalization.

    It and its parts compute in the dtype of their input, without Keras's casts.

    Args:
        config: the model's shape.
        index: place of the block in the model.
        initial: makes the initializers of the weights.
        dtype: the model's Keras dtype policy.
    """

    def __init__(self, config: ModelConfig, index: int, initial: Initializers, dtype: str) -> None:
        # With a mixed policy Keras would round the weights of a part that is read and not called, even with
        # autocast=False.
        dtype = keras.DTypePolicy(dtype).variable_dtype
        super().__init__(name=f"block_{index}", dtype=dtype, autocast=False)
        self.config = config
        self.index = index

        def dense(name: str, units: int, initializer: keras.Initializer, part: BiasedPart) -> keras.layers.Dense:
            settings = {"use_bias": part in config.biases(), "kernel_initializer": initializer, "name": name}
            return keras.layers.Dense(units, dtype=dtype, autocast=False, **settings)

        # One product for queries, keys and values: a third of the reads of x.
        self.query_key_value = dense(
            "query_key_value", config.query_key_value_dim(), initial.query_key_value(), "query_key_value"
        )
        self.query_norm = make_head_norm(config, "query_norm", dtype) if config.qk_norm else None
        self.key_norm = make_head_norm(config, "key_norm", dtype) if config.qk_norm else None
        self.attention_output = dense(
            "attention_output", config.hidden_dim, initial.attention_output(), "attention_output"
        )
        self.attention_norm = make_norm(config, "attention_norm", dtype)
        self.intermediate = dense(
            "intermediate", config.intermediate_projection_dim(), initial.intermediate(), "feedforward"
        )
        self.output_dense = dense("output", config.hidden_dim, initial.output(), "feedforward")
        is_last = index == config.num_layers - 1 and not config.pre_norm
        scales = initial.last_scales() if is_last else "ones"
        self.feedforward_norm = make_norm(config, "feedforward_norm", dtype, scales)

    def build(self, input_shape: tuple) -> None:
        """Creates the variables of all parts."""
        attention_shape = (*input_shape[:-1], self.config.num_heads * self.config.head_width())
        for layer in (self.query_key_value, self.attention_norm, self.intermediate, self.feedforward_norm):
            layer.build(input_shape)
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.build((*input_shape[:-1], self.config.head_width()))
        self.attention_output.build(attention_shape)
        self.output_dense.build((*input_shape[:-1], self.config.intermediate_dim))
        self.built = True

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """Returns the shape of what `call` returns, which `summary` prints."""
        return input_shape

    def call(
        self,
        x: tf.Tensor,
        positions: tf.Tensor,
        attend: Attend,
        draw: DropoutDraw | None = None,
        ops: Ops = PLAIN,
        place: int | tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Transforms a sequence, or the new positions of one that a cache remembers.

        Args:
            x: float [batch, sequence, hidden_dim].
            positions: int32 [sequence] or [batch, sequence], counted from the start of each document.
            attend: a function of queries, keys and values, each [batch, heads, sequence, head_dim], that lets the
                queries attend and returns a tensor like them.
            draw: what the dropout masks depend on.
            ops: the way of computing.
            place: the place in the model, on which the dropout masks depend, too: int, or an int32 scalar; None: the
                block's own.
        """
        place = self.index if place is None else place
        attention = functools.partial(self._attention, positions=positions, attend=attend, ops=ops)
        feed_forward = functools.partial(self._feed_forward, ops=ops)
        parts = (attention, self.attention_norm), (feed_forward, self.feedforward_norm)
        for i, (part, norm) in enumerate(parts, start=1):
            layer = 2 * place + i
            if self.config.pre_norm:
                x += dropout(part(norm(x, ops=ops)), self.config.dropout, layer, draw)
            else:
                x = norm(x + dropout(part(x), self.config.dropout, layer, draw), ops=ops)
        return x

    def _attention(self, x: tf.Tensor, positions: tf.Tensor, attend: Attend, ops: Ops) -> tf.Tensor:
        heads, key_heads = self.config.num_heads, self.config.key_value_heads()
        query, key, value = ops.split_heads(x, self.query_key_value, [heads, key_heads, key_heads])
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query, ops=ops), self.key_norm(key, ops=ops)
        if self.config.positions == "rope":
            query, key = (rotate(part, positions, self.config.rope_theta) for part in (query, key))
        return ops.join_heads(attend(query, key, value), self.attention_output)

    def _feed_forward(self, x: tf.Tensor, ops: Ops) -> tf.Tensor:
        return ops.feed_forward(x, self.intermediate, self.config.activation, self.output_dense)
