"""The GPT: embeddings, transformer blocks and output projection, as a Keras model.

How each operation is computed on a device is chosen by one argument, `ops`. Weights are ordinary Keras variables; run
the model inside `keras.StatelessScope` to give it tensors instead.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import keras
import tensorflow as tf

from trainer.config.settings import ModelConfig
from trainer.model.attention import Cache, attention_beside_cache, filled_up_to
from trainer.model.block import Block
from trainer.model.documents import document_starts
from trainer.model.dropout import DropoutDraw, dropout
from trainer.model.held import WHOLE, Held
from trainer.model.initial import Initializers
from trainer.model.layers import Unembedding, make_norm
from trainer.model.loss import next_token_loss, next_token_loss_without_gradient, next_token_scores
from trainer.model.ops.plain import PLAIN, Ops
from trainer.model.precision import accumulation_dtype


@keras.saving.register_keras_serializable("trainer")
class GPT(keras.Model):
    """A decoder-only transformer that predicts the next token at every position.

    Args:
        config: the model's shape.
        vocabulary_size: number of tokens. The embedding and the logits have `config.num_logits` rows; those beyond the
            vocabulary stand for no token.
        sequence_length: number of positions that the model can tell apart, and that its cache has room for.
        seed: seed of the initial weights.
        dtype: a Keras dtype policy.
        bos_id: token before each document; a document_mask finds the documents by it.

    Attributes:
        files: the content of the files that belong to the model, by their names, such as its tokenizer's; Keras saves
            them with it.

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
            raise ValueError("model.document_mask=true finds documents by their [BOS]; give bos_id, its number.")
        super().__init__(name="gpt", dtype=dtype)
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.sequence_length = sequence_length
        self.bos_id = bos_id
        self.files: dict[str, bytes] = {}
        initial = Initializers(seed, config)
        num_logits = config.num_logits(vocabulary_size)

        def embedding(num_rows: int, name: str) -> keras.layers.Embedding:
            return keras.layers.Embedding(num_rows, config.hidden_dim, initial.embedding(), name=name, dtype=dtype)

        self.token_embedding = embedding(num_logits, "token_embedding")
        is_learned = config.positions == "learned"
        self.position_embedding = embedding(sequence_length, "position_embedding") if is_learned else None
        self.blocks = [Block(config, i, initial, dtype) for i in range(config.num_layers)]
        self.final_norm = make_norm(config, "final_norm", dtype, initial.last_scales()) if config.pre_norm else None
        self.unembedding = None if config.tied_embeddings else Unembedding(num_logits, config, initial, dtype)
        self.build()

    def build(self, input_shape: object = None) -> None:
        """Creates all variables now: a model is built under its strategy's scope, before it sees any batch."""
        width = (None, None, self.config.hidden_dim)
        self.token_embedding.build((None, None))
        if self.position_embedding is not None:
            self.position_embedding.build((None,))
        for layer in [*self.blocks, self.final_norm, self.unembedding]:
            if layer is not None:
                layer.build(width)
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor as Keras saves them. Weights are saved too, so a seed is not."""
        return {
            "config": self.config.model_dump(mode="json", exclude_none=True),
            "vocabulary_size": self.vocabulary_size,
            "sequence_length": self.sequence_length,
            "dtype": self.dtype_policy.name,
            "bos_id": self.bos_id,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Builds the model that `get_config` describes."""
        return cls(**{**config, "config": ModelConfig(**config["config"])})

    def save_assets(self, folder: str) -> None:
        """Writes `files` into a folder, for Keras."""
        for name, content in self.files.items():
            file = Path(folder) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def load_assets(self, folder: str) -> None:
        """Reads the files that `save_assets` wrote."""
        found = [file for file in Path(folder).rglob("*") if file.is_file()]
        self.files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}

    def call(self, tokens: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns the logits of the next token: int32 [batch, sequence] to float [batch, sequence, num_logits]."""
        if training and self.config.dropout:
            raise ValueError(
                f"model.dropout={self.config.dropout} needs trainer.train: the masks depend on the step, which the "
                "model does not get from Keras fit. Set model.dropout=0."
            )
        return self.logits(self.hidden_states(tokens))

    def hidden_states(self, tokens: tf.Tensor, draw: DropoutDraw | None = None, ops: Ops = PLAIN) -> tf.Tensor:
        """Returns what the output projection reads, float [batch, sequence, hidden_dim].

        Args:
            tokens: int32 [batch, sequence], sequence at most sequence_length.
            draw: what the dropout masks depend on; None drops nothing.
            ops: the way of computing. The hidden states are of its compute_dtype.
        """
        return self._normalized(self._read(tokens, draw, ops), ops)

    def _read(
        self, tokens: tf.Tensor, draw: DropoutDraw | None = None, ops: Ops = PLAIN, held: Held = WHOLE
    ) -> tf.Tensor:
        """Returns what the last block makes of tokens; see `hidden_states`. The argument held is how layers get their
        weights.
        """
        positions, starts = tf.range(tf.shape(tokens)[1]), None
        if self.config.document_mask:
            assert self.bos_id is not None  # The constructor checks it.
            starts = document_starts(tokens, self.bos_id)
            positions -= starts  # [batch, sequence]
        embed = functools.partial(self._embed, positions=positions, ops=ops)
        x = held.keeping(self._first_layers(), embed, tokens)
        if self.config.pre_norm:
            x = dropout(x, self.config.dropout, 0, draw)
        attend = functools.partial(ops.attention, starts=starts)

        def run(block: Block, place: int | tf.Tensor, x: tf.Tensor) -> tf.Tensor:
            return block(x, positions=positions, attend=attend, draw=draw, ops=ops, place=place)

        return held.blocks(self.blocks, run, x, ops.recompute == "blocks")

    def logits(self, hidden: tf.Tensor, ops: Ops = PLAIN) -> tf.Tensor:
        """Returns float [batch, sequence, num_logits] for hidden states [batch, sequence, hidden_dim]."""
        kernel, bias = self._output_projection()
        logits = ops.logits(hidden, tf.cast(kernel, hidden.dtype))
        return logits if bias is None else logits + tf.cast(bias, hidden.dtype)

    def training_loss(
        self,
        tokens: tf.Tensor,
        targets: tf.Tensor,
        weights: tf.Tensor,
        draw: DropoutDraw | None = None,
        loss_scale: tf.Tensor | None = None,
        z_loss: float = 0.0,
        ops: Ops = PLAIN,
        held: Held = WHOLE,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (loss_sum, num_targets); loss_sum can be differentiated. See `next_token_loss`, `hidden_states`."""

        def loss(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            hidden, projection = self._normalized(x, ops), self._output_projection()
            return next_token_loss(hidden, *projection, targets, weights, loss_scale, z_loss, ops)

        return held.loss(self._last_layers(), loss, self._read(tokens, draw, ops, held))

    def evaluation_loss(
        self, tokens: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, ops: Ops = PLAIN, held: Held = WHOLE
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (loss_sum, num_targets) for evaluation."""

        def loss(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            hidden, projection = self._normalized(x, ops), self._output_projection()
            return next_token_loss_without_gradient(hidden, *projection, targets, weights, ops)

        sums: tuple[tf.Tensor, tf.Tensor] = held.keeping(
            self._last_layers(), loss, self._read(tokens, ops=ops, held=held)
        )
        return sums

    def token_scores(
        self, tokens: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, ops: Ops = PLAIN, held: Held = WHOLE
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (losses, are_likeliest) of each target; see `next_token_scores`."""

        def score(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            hidden, (kernel, bias) = self._normalized(x, ops), self._output_projection()
            kernel = tf.cast(kernel, hidden.dtype)

            def logits_of(rows: tf.Tensor) -> tf.Tensor:
                # As in the loss: the bias is added in the dtype of the sums.
                logits = tf.cast(tf.matmul(rows, kernel, transpose_b=True), accumulation_dtype(rows.dtype))
                return logits if bias is None else logits + tf.cast(bias, logits.dtype)

            return next_token_scores(hidden, logits_of, targets, weights, self.vocabulary_size, ops)

        scores: tuple[tf.Tensor, tf.Tensor] = held.keeping(
            self._last_layers(), score, self._read(tokens, ops=ops, held=held)
        )
        return scores

    def empty_cache(self, batch: int | tf.Tensor, ops: Ops = PLAIN) -> list[Cache]:
        """Returns zeros for `decode` to fill: for each block its keys and its values, each
        [batch, key_heads, sequence_length, head_dim].
        """
        shape = [batch, self.config.key_value_heads(), self.sequence_length, self.config.head_width()]
        dtype = ops.compute_dtype or self.compute_dtype
        return [(tf.zeros(shape, dtype), tf.zeros(shape, dtype)) for _ in self.blocks]

    def decode(
        self, tokens: tf.Tensor, cache: Sequence[Cache], index: tf.Tensor, ops: Ops = PLAIN, held: Held = WHOLE
    ) -> tuple[tf.Tensor, list[Cache]]:
        """Reads some more tokens, given what a cache remembers of the tokens before them.

        Args:
            tokens: int32 [batch, new], at the positions from index on. Each row is one document, which begins at 0: a
                second [BOS] does not start another one here, even with a document_mask.
            cache: what `empty_cache` or an earlier call returned. Never write a position twice: `ops.write` adds to
                zeros.
            index: int32 scalar; index + new is at most sequence_length.
            ops: the way of computing, the same that made the cache.
            held: how layers get their weights.

        Returns:
            (logits float [batch, new, num_logits], cache).
        """
        positions = index + tf.range(tokens.shape[1] or tf.shape(tokens)[1])
        embed = functools.partial(self._embed, positions=positions, ops=ops)
        x = held.read(self._first_layers(), embed, tokens)
        places = ops.places(cache[0][0], positions)  # Once for all blocks.
        if held is WHOLE and ops.compiles_blocks(x):
            x, new = self._next_in_compiled_blocks(x, cache, index)
            filled = [
                (ops.write(keys, key, places), ops.write(values, value, places))
                for (keys, values), (key, value) in zip(cache, new, strict=True)
            ]
        else:
            filled, allowed = [], filled_up_to(positions, self.sequence_length)

            def attend(cache: Cache, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
                keys, values = ops.write(cache[0], key, places), ops.write(cache[1], value, places)
                filled.append((keys, values))
                return ops.cached_attention(query, keys, values, allowed)

            for block, cache_of_block in zip(self.blocks, cache, strict=True):
                # block.__call__, because mypy does not accept a Keras layer as an argument of partial.
                run = functools.partial(
                    block.__call__, positions=positions, attend=functools.partial(attend, cache_of_block), ops=ops
                )
                x = held.read([block], run, x)
        return held.read(self._last_layers(), lambda x: self.logits(self._normalized(x, ops), ops), x), filled

    def _next_in_compiled_blocks(
        self, x: tf.Tensor, cache: Sequence[Cache], index: tf.Tensor
    ) -> tuple[tf.Tensor, list[Cache]]:
        """Returns what the blocks make of x [batch, 1, hidden_dim], at position index, and the new keys and values of
        each. The cache is only read: XLA would copy all of it to write to it.
        """
        new: list[Cache] = []
        for block, of_block in zip(self.blocks, cache, strict=True):
            weights = [tf.convert_to_tensor(variable) for variable in block.variables]
            x, key, value = self._compiled_block(weights, x, *of_block, index)
            new.append((key, value))
        return x, new

    @functools.cached_property
    def _compiled_block(self) -> Callable[..., tuple[tf.Tensor, ...]]:
        """A block at one new position, compiled by XLA once for all blocks: their weights are arguments."""
        block = self.blocks[0]

        def run(
            weights: Sequence[tf.Tensor], x: tf.Tensor, keys: tf.Tensor, values: tf.Tensor, index: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            new: list[tf.Tensor] = []

            def attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
                new.extend((key, value))
                return attention_beside_cache(query, key, value, keys, values, index)

            with keras.StatelessScope(list(zip(block.variables, weights, strict=True))):
                x = block(x, positions=index[tf.newaxis], attend=attend)
            return x, *new

        return tf.function(run, autograph=False, jit_compile=True)

    def _embed(self, tokens: tf.Tensor, positions: tf.Tensor, ops: Ops) -> tf.Tensor:
        x = self.token_embedding(tokens)
        x = tf.cast(x, ops.compute_dtype or x.dtype)
        return x if self.position_embedding is None else x + tf.cast(self.position_embedding(positions), x.dtype)

    def _normalized(self, x: tf.Tensor, ops: Ops) -> tf.Tensor:
        return x if self.final_norm is None else self.final_norm(x, ops=ops)

    def _first_layers(self) -> list[keras.layers.Layer]:
        """Returns the layers whose weights `_embed` reads."""
        return [layer for layer in (self.token_embedding, self.position_embedding) if layer is not None]

    def _last_layers(self) -> list[keras.layers.Layer]:
        """Returns the layers whose weights `_normalized` and `_output_projection` read."""
        projection = self.token_embedding if self.unembedding is None else self.unembedding
        return [layer for layer in (self.final_norm, projection) if layer is not None]

    def _output_projection(self) -> tuple[tf.Tensor, tf.Tensor | None]:
        if self.unembedding is None:
            return tf.convert_to_tensor(self.token_embedding.embeddings), None
        bias = self.unembedding.bias
        return tf.convert_to_tensor(self.unembedding.kernel), None if bias is None else tf.convert_to_tensor(bias)
