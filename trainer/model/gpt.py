"""The GPT: embeddings, transformer blocks and output projection, as a Keras model.

Weights are ordinary Keras variables; run the model inside `keras.StatelessScope` to give it tensors instead.
"""

from collections.abc import Sequence
from typing import Literal

import keras
import tensorflow as tf

from trainer.config import ModelConfig
from trainer.model.activations import Activation, gelu, swiglu
from trainer.model.attention import Cache, cached_attention, causal_attention, rotate, unforeseen_zero
from trainer.model.cpu import fast_dtype, write_at
from trainer.model.dropout import DropoutDraw, dropout
from trainer.model.initial import Initializers
from trainer.model.layers import Dense, Norm, Unembedding
from trainer.model.loss import next_token_loss, next_token_loss_without_gradient
from trainer.model.normalization import with_axes_of

Recompute = Literal["nothing", "attention", "blocks"]


def document_starts(tokens: tf.Tensor, bos_id: int) -> tf.Tensor:
    """Returns, for each token, the position where its document starts: at its [BOS], or at 0 where that is not there.

    Args:
        tokens: int32 [batch, sequence], documents one after the other.
        bos_id: token before each document.

    Returns:
        int32 [batch, sequence].
    """
    documents = tf.cumsum(tf.cast(tokens == bos_id, tf.int32), axis=1)  # Their numbers: sorted, so to be searched.
    return tf.searchsorted(documents, documents, side="left")


class GPT(keras.Model):
    """A decoder-only transformer that predicts the next token at every position.

    Args:
        config: its shape.
        vocabulary_size: number of tokens. The embedding and the logits have `config.num_logits` of it, and what is more
            than the tokens stands for none.
        sequence_length: number of positions it can tell apart, and its cache has room for.
        seed: of the initial weights.
        dtype: a Keras dtype policy.
        bos_id: token before each document, by which a document_mask finds them.

    Raises:
        ValueError: there is a document_mask and no bos_id.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_size: int,
        sequence_length: int,
        seed: int = 0,
        dtype: str = "float32",
        bos_id: int | None = None,
    ) -> None:
        if config.document_mask and bos_id is None:
            raise ValueError(
                "model.document_mask=true finds documents by their [BOS]; give bos_id, the token's number."
            )
        super().__init__(name="gpt", dtype=dtype)
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.sequence_length = sequence_length
        self.bos_id = bos_id
        initial = Initializers(seed, config)
        num_logits = config.num_logits(vocabulary_size)
        self.token_embedding = keras.layers.Embedding(
            num_logits, config.hidden_dim, initial.embedding(), name="token_embedding", dtype=dtype
        )
        self.position_embedding = None
        if config.positions == "learned":
            self.position_embedding = keras.layers.Embedding(
                sequence_length, config.hidden_dim, initial.embedding(), name="position_embedding", dtype=dtype
            )
        self.blocks = [Block(config, i, initial, dtype=dtype, name=f"block_{i}") for i in range(config.num_layers)]
        self.final_norm = _norm(config, "final_norm", dtype, initial.last_scales()) if config.pre_norm else None
        self.unembedding = None
        if not config.tied_embeddings:
            self.unembedding = Unembedding(num_logits, config.use_bias, initial.unembedding(num_logits), dtype=dtype)
        self.build()

    def build(self, input_shape: object = None) -> None:
        """Creates all variables now: a model is built under its strategy's scope, before any batch is seen."""
        width = (None, None, self.config.hidden_dim)
        self.token_embedding.build((None, None))
        if self.position_embedding is not None:
            self.position_embedding.build((None,))
        for layer in [*self.blocks, self.final_norm, self.unembedding]:
            if layer is not None:
                layer.build(width)
        self.built = True

    def call(self, tokens: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns the logits of the next token: int32 [batch, sequence] to float [batch, sequence, num_logits]."""
        if training and self.config.dropout:
            raise ValueError(
                f"model.dropout={self.config.dropout} needs trainer.train: its masks follow the step, which Keras fit "
                "does not tell the model. Set model.dropout=0."
            )
        return self.logits(self.hidden_states(tokens))

    def hidden_states(
        self, tokens: tf.Tensor, draw: DropoutDraw | None = None, recompute: Recompute = "nothing"
    ) -> tf.Tensor:
        """Returns what the output projection reads, float [batch, sequence, hidden_dim].

        Args:
            tokens: int32 [batch, sequence], sequence at most sequence_length.
            draw: of the dropout masks; None drops nothing.
            recompute: what gradients compute again, see train.recompute.
        """
        positions, starts = tf.range(tf.shape(tokens)[1]), None
        if self.config.document_mask:
            assert self.bos_id is not None  # The constructor sees to it.
            starts = document_starts(tokens, self.bos_id)
            positions -= starts  # [batch, sequence]
        x = self._embed(tokens, positions)
        if self.config.pre_norm:
            x = dropout(x, self.config.dropout, 0, draw)
        for block in self.blocks:
            if recompute == "blocks":
                x = block.recomputed(x, draw, starts)
            else:
                x, _ = block(x, draw=draw, starts=starts, recompute=recompute == "attention")
        return x if self.final_norm is None else self.final_norm(x)

    def logits(self, hidden: tf.Tensor) -> tf.Tensor:
        """Returns float [batch, sequence, num_logits] for hidden states [batch, sequence, hidden_dim]."""
        kernel, bias = self._output_projection()
        logits = tf.einsum("btd,vd->btv", hidden, tf.cast(kernel, hidden.dtype))
        return logits if bias is None else logits + tf.cast(bias, hidden.dtype)

    def training_loss(
        self,
        tokens: tf.Tensor,
        targets: tf.Tensor,
        weights: tf.Tensor,
        draw: DropoutDraw | None = None,
        loss_scale: tf.Tensor | None = None,
        recompute: Recompute = "nothing",
        z_loss: float = 0.0,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (loss_sum, num_targets) with gradients; see `next_token_loss`, and `hidden_states`."""
        kernel, bias = self._output_projection()
        hidden = self.hidden_states(tokens, draw, recompute)
        return next_token_loss(hidden, kernel, bias, targets, weights, loss_scale, z_loss=z_loss)

    def evaluation_loss(self, tokens: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (loss_sum, num_targets) for evaluation."""
        kernel, bias = self._output_projection()
        return next_token_loss_without_gradient(self.hidden_states(tokens), kernel, bias, targets, weights)

    def empty_cache(self, batch: int | tf.Tensor) -> list[Cache]:
        """Returns zeros for `decode` to fill: of each block for keys and for values, each
        [batch, key_heads, sequence_length, head_dim].
        """
        shape = [batch, self.config.key_value_heads(), self.sequence_length, self.config.head_dim()]
        dtype = fast_dtype(tf.as_dtype(self.compute_dtype))
        return [(tf.zeros(shape, dtype), tf.zeros(shape, dtype)) for _ in self.blocks]

    def decode(self, tokens: tf.Tensor, cache: Sequence[Cache], index: tf.Tensor) -> tuple[tf.Tensor, list[Cache]]:
        """Reads some more tokens, given what a cache remembers of those before.

        Args:
            tokens: int32 [batch, new], at the positions from index on. A row is one document, which begins at 0:
                a second [BOS] starts none here, with a document_mask neither.
            cache: as `empty_cache` or an earlier call returned it. No position is written twice.
            index: int32 scalar; index + new is at most sequence_length.

        Returns:
            (logits float [batch, new, num_logits], cache).
        """
        x = self._embed(tokens, index + tf.range(tf.shape(tokens)[1]))
        filled = []
        for block, of_block in zip(self.blocks, cache, strict=True):
            x, of_block = block(x, cache=of_block, index=index)
            filled.append(of_block)
        x = x if self.final_norm is None else self.final_norm(x)
        return self.logits(x), filled

    def _embed(self, tokens: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        x = self.token_embedding(tokens)
        x = tf.cast(x, fast_dtype(x.dtype))
        return x if self.position_embedding is None else x + tf.cast(self.position_embedding(positions), x.dtype)

    def _output_projection(self) -> tuple[tf.Tensor, tf.Tensor | None]:
        if self.unembedding is None:
            return tf.convert_to_tensor(self.token_embedding.embeddings), None
        bias = self.unembedding.bias
        return tf.convert_to_tensor(self.unembedding.kernel), None if bias is None else tf.convert_to_tensor(bias)


class Block(keras.layers.Layer):
    """A transformer block: causal self-attention and a feed-forward layer, each with a residual and a normalization.

    It and its parts compute in the dtype of what goes in, without Keras's casts.

    Args:
        config: the model's shape.
        index: place of the block in the model.
        initial: makers of initial weights.
    """

    def __init__(self, config: ModelConfig, index: int, initial: Initializers, dtype: str, name: str) -> None:
        # Of a mixed policy Keras would cast what is read of a part but not by its call, without autocast too.
        dtype = keras.DTypePolicy(dtype).variable_dtype
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.config = config
        self.index = index

        def dense(
            units: int, initializer: keras.Initializer, name: str, activation: Activation | None = None
        ) -> keras.layers.Layer:
            return Dense(
                units,
                activation,
                config.use_bias,
                kernel_initializer=initializer,
                dtype=dtype,
                name=name,
                autocast=False,
            )

        # One product for queries, keys and values: a third of the reads of x.
        self.query_key_value = dense(config.query_key_value_dim(), initial.query_key_value(), "query_key_value")
        self.attention_output = dense(config.hidden_dim, initial.attention_output(), "attention_output")
        self.attention_norm = _norm(config, "attention_norm", dtype)
        self.intermediate = dense(
            config.intermediate_projection_dim(),
            initial.intermediate(),
            "intermediate",
            {"relu": tf.nn.relu, "gelu": gelu, "swiglu": swiglu}[config.activation],
        )
        self.output_dense = dense(config.hidden_dim, initial.output(), "output")
        is_last = index == config.num_layers - 1 and not config.pre_norm
        scales = initial.last_scales() if is_last else "ones"
        self.feedforward_norm = _norm(config, "feedforward_norm", dtype, scales)

    def build(self, input_shape: tuple) -> None:
        """Creates the variables of all parts."""
        attention_shape = (*input_shape[:-1], self.config.num_heads * self.config.head_dim())
        for layer in (self.query_key_value, self.attention_norm, self.intermediate, self.feedforward_norm):
            layer.build(input_shape)
        self.attention_output.build(attention_shape)
        self.output_dense.build((*input_shape[:-1], self.config.intermediate_dim))
        self.built = True

    def call(
        self,
        x: tf.Tensor,
        draw: DropoutDraw | None = None,
        starts: tf.Tensor | None = None,
        cache: Cache | None = None,
        index: tf.Tensor | None = None,
        recompute: bool = False,
    ) -> tuple[tf.Tensor, Cache | None]:
        """Transforms a sequence, or new positions of one that a cache remembers.

        Args:
            x: float [batch, sequence, hidden_dim].
            draw: of the dropout masks.
            starts: int32 [batch, sequence] of `document_starts`, where there is no cache; None for a single document.
            cache: keys and values of the positions before index.
            index: int32 scalar, position of x[:, 0] where there is a cache.
            recompute: whether gradients compute the probabilities of attention and the activation again, and products
                are left for XLA to lay out: what an accelerator wants.

        Returns:
            (float [batch, sequence, hidden_dim], the cache with these positions filled in, or None).
        """
        pre_norm, rate = self.config.pre_norm, self.config.dropout
        residual = x
        x, cache = self._attention(self.attention_norm(x) if pre_norm else x, starts, cache, index, recompute)
        x = residual + dropout(x, rate, 2 * self.index + 1, draw)
        if not pre_norm:
            x = self.attention_norm(x)
        residual = x
        x = self._feed_forward(self.feedforward_norm(x) if pre_norm else x, recompute)
        x = residual + dropout(x, rate, 2 * self.index + 2, draw)
        return x if pre_norm else self.feedforward_norm(x), cache

    def recomputed(self, x: tf.Tensor, draw: DropoutDraw | None, starts: tf.Tensor | None) -> tf.Tensor:
        """Transforms a sequence as a call does; gradients compute all of it again, from x alone.

        Source: Chen et al. 2016, section 4.
        """
        variables = self.trainable_variables

        def run(x: tf.Tensor, weights: Sequence[tf.Tensor]) -> tf.Tensor:
            with keras.StatelessScope(state_mapping=zip(variables, weights, strict=True)):
                return self(x, draw=draw, starts=starts, recompute=True)[0]

        @tf.custom_gradient
        def transform(x: tf.Tensor, *weights: tf.Tensor) -> tuple[tf.Tensor, object]:
            def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
                # Else XLA finds that all of it was there before, and keeps it; as it does with tf.recompute_grad.
                again = x + unforeseen_zero(upstream, x.dtype)
                with tf.GradientTape() as tape:
                    tape.watch([again, *weights])
                    out = run(again, weights)
                return tape.gradient(out, [again, *weights], upstream)

            return run(x, weights), gradient

        return transform(x, *(tf.convert_to_tensor(variable) for variable in variables))

    def _attention(
        self,
        x: tf.Tensor,
        starts: tf.Tensor | None,
        cache: Cache | None,
        index: tf.Tensor | None,
        recompute: bool,
    ) -> tuple[tf.Tensor, Cache | None]:
        sequence = tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
        query, key, value = self._query_key_value(x, sequence, recompute)
        if self.config.positions == "rope":
            positions = tf.range(sequence) - (0 if starts is None else starts) + (0 if index is None else index)
            query, key = (rotate(part, positions, self.config.rope_theta) for part in (query, key))
        if cache is None:
            x = causal_attention(query, key, value, starts, recompute)
        else:
            cache = (write_at(cache[0], key, index), write_at(cache[1], value, index))
            x = cached_attention(query, *cache, index)
        if recompute:
            return self.attention_output.join_heads(x), cache
        x = tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [-1, sequence, self.config.num_heads * self.config.head_dim()])
        return self.attention_output(x), cache

    def _query_key_value(
        self, x: tf.Tensor, sequence: int | tf.Tensor, recompute: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the three as float [batch, heads or key_heads, sequence, head_dim]."""
        heads, key_heads, width = self.config.num_heads, self.config.key_value_heads(), self.config.head_dim()
        if recompute:
            query, key, value = self.query_key_value.split_heads(x, [heads, key_heads, key_heads])
            return query, key, value
        x = self.query_key_value(x)
        if heads == key_heads:
            # Thirds of one tensor, which TensorFlow does not copy.
            thirds = tf.transpose(tf.reshape(x, [-1, sequence, 3, heads, width]), [2, 0, 3, 1, 4])
            query, key, value = tf.unstack(thirds)
        else:
            by_head = tf.transpose(tf.reshape(x, [-1, sequence, heads + 2 * key_heads, width]), [0, 2, 1, 3])
            query, key, value = tf.split(by_head, [heads, key_heads, key_heads], axis=1)
        return query, key, value

    def _feed_forward(self, x: tf.Tensor, recompute: bool) -> tf.Tensor:
        if recompute:
            rows = self.output_dense.project_activated(self.intermediate.affine(x), self.intermediate.activation)
            return with_axes_of(x, rows)
        return self.output_dense(self.intermediate(x))


def _norm(config: ModelConfig, name: str, dtype: str, scales: keras.Initializer | str = "ones") -> keras.layers.Layer:
    return Norm(config.norm, center=config.use_bias, gamma_initializer=scales, dtype=dtype, name=name, autocast=False)
