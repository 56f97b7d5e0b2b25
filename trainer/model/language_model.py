"""What trainer reads of a model: one interface to its own GPT, and to any Keras model that returns logits.

Only this module treats the two differently.
"""

import keras
import tensorflow as tf

from trainer.hardware.processor import processor
from trainer.model.attention import Cache
from trainer.model.dropout import DropoutDraw
from trainer.model.gpt import GPT
from trainer.model.held import WHOLE, Held
from trainer.model.loss import next_token_loss_from_logits, next_token_scores
from trainer.model.ops import decoding_ops, scoring_ops
from trainer.model.ops.plain import PLAIN, Ops
from trainer.model.size import matrix_widths


class LanguageModel:
    """A causal Keras model from int32 [batch, sequence] to logits [batch, sequence, vocabulary], and no more than that.

    Args:
        model: the Keras model.
        held: how the layers of trainer's own GPT get their weights; other models have theirs whole.

    Attributes:
        is_gpt: whether it is the GPT of trainer/model/gpt.py: it has a way of computing, `ops`, can recompute, and its
            operations are counted by trainer/model/size.py.
    """

    is_gpt = False

    def __init__(self, model: keras.Model, held: Held = WHOLE) -> None:
        self.model = model
        self._held = held

    def named_variables(self) -> dict[str, keras.Variable]:
        """Returns every variable by the name it is saved under: its place in the model.

        Keras numbers the layers of a model by what was built before in the process, so their paths cannot be names.
        """
        return {f"{i:04d}/{variable.name}": variable for i, variable in enumerate(self.model.variables)}

    def matrices(self, sequence_length: int) -> dict[str, tuple[int, ...]]:
        """Returns the matrices [rows, columns] inside the model, which map hidden states to hidden states, by the names
        of `named_variables`. Each comes with the widths of its parts: several matrices that are side by side in one
        product. Their sum is columns.

        These are the kernels with two axes, of which none is as long as the vocabulary. So they include no embedding,
        and not the output projection.

        Args:
            sequence_length: tokens of an example.
        """
        num_logits = self.model(keras.Input([sequence_length], dtype="int32")).shape[-1]
        return {
            name: (variable.shape[1],)
            for name, variable in self.named_variables().items()
            if variable.name.endswith("kernel") and len(variable.shape) == 2 and num_logits not in variable.shape
        }

    def training_loss(
        self,
        tokens: tf.Tensor,
        targets: tf.Tensor,
        weights: tf.Tensor,
        draw: DropoutDraw | None = None,
        loss_scale: tf.Tensor | None = None,
        z_loss: float = 0.0,
        ops: Ops = PLAIN,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (loss_sum, num_targets); loss_sum can be differentiated. See `next_token_loss`."""
        logits = self.model(tokens, training=True)
        return next_token_loss_from_logits(logits, targets, weights, loss_scale, z_loss)

    def evaluation_loss(
        self, tokens: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, ops: Ops = PLAIN
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (loss_sum, num_targets) for evaluation."""
        return next_token_loss_from_logits(self.model(tokens, training=False), targets, weights)

    def token_scores(
        self, tokens: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, ops: Ops = PLAIN
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (losses, are_likeliest) of each target; see `next_token_scores`."""
        logits = self.model(tokens, training=False)
        return next_token_scores(logits, lambda rows: rows, targets, weights, self.num_tokens(logits), ops)

    def max_length(self) -> int | None:
        """Returns the number of positions it can tell apart; None if that is not known."""
        return None

    def num_tokens(self, logits: tf.Tensor) -> int:
        """Returns the number of tokens that its logits [..., num_logits] stand for."""
        return int(logits.shape[-1])

    def scoring_ops(self) -> Ops:
        """Returns the way of computing that is the fastest for scores on the device that holds the model."""
        return PLAIN

    def decoding_ops(self) -> Ops:
        """Returns the way of computing that is the fastest for decoding on the device that holds the model."""
        return PLAIN

    def read(self, tokens: tf.Tensor, length: tf.Tensor, ops: Ops) -> list[Cache]:
        """Returns a cache that remembers tokens[:, :length], for `next_logits`.

        Args:
            tokens: int32 [batch, sequence].
            length: int32 scalar.
            ops: the way of computing.
        """
        return []

    def next_logits(
        self, texts: tf.Tensor, index: tf.Tensor, cache: list[Cache], ops: Ops
    ) -> tuple[tf.Tensor, list[Cache]]:
        """Returns the logits of the tokens at position index, and the cache with what was read for them.

        Args:
            texts: int32 [batch, sequence], read up to position index - 1.
            index: int32 scalar, at least 1.
            cache: remembers the positions before index - 1.
            ops: the way of computing.

        Returns:
            (float [batch, num_logits], cache).
        """
        return self.model(texts, training=False)[:, index - 1], cache


class _GptModel(LanguageModel):
    """Trainer's own GPT: its loss holds a chunk of logits at a time, and a cache remembers what it has read."""

    is_gpt = True
    model: GPT

    def named_variables(self) -> dict[str, keras.Variable]:
        return {variable.path: variable for variable in self.model.variables}

    def matrices(self, sequence_length: int) -> dict[str, tuple[int, ...]]:
        return matrix_widths(self.model.config)

    def training_loss(
        self,
        tokens: tf.Tensor,
        targets: tf.Tensor,
        weights: tf.Tensor,
        draw: DropoutDraw | None = None,
        loss_scale: tf.Tensor | None = None,
        z_loss: float = 0.0,
        ops: Ops = PLAIN,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return self.model.training_loss(tokens, targets, weights, draw, loss_scale, z_loss, ops, self._held)

    def evaluation_loss(
        self, tokens: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, ops: Ops = PLAIN
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return self.model.evaluation_loss(tokens, targets, weights, ops, self._held)

    def token_scores(
        self, tokens: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, ops: Ops = PLAIN
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return self.model.token_scores(tokens, targets, weights, ops, self._held)

    def max_length(self) -> int | None:
        return self.model.sequence_length

    def num_tokens(self, logits: tf.Tensor) -> int:
        return self.model.vocabulary_size

    def scoring_ops(self) -> Ops:
        device = tf.DeviceSpec.from_string(self.model.variables[0].value.device)
        return scoring_ops(self.model.dtype_policy.name, processor(device.device_type))

    def decoding_ops(self) -> Ops:
        device = tf.DeviceSpec.from_string(self.model.variables[0].value.device)
        return decoding_ops(self.model.dtype_policy.name, processor(device.device_type))

    def read(self, tokens: tf.Tensor, length: tf.Tensor, ops: Ops) -> list[Cache]:
        empty = self.model.empty_cache(tokens.shape[0] or tf.shape(tokens)[0], ops)

        def read() -> list[Cache]:
            return self.model.decode(tokens[:, :length], empty, tf.constant(0), ops, self._held)[1]

        cache: list[Cache] = tf.cond(length > 0, read, lambda: empty)
        return cache

    def next_logits(
        self, texts: tf.Tensor, index: tf.Tensor, cache: list[Cache], ops: Ops
    ) -> tuple[tf.Tensor, list[Cache]]:
        newest = texts[:, index - 1][:, tf.newaxis]
        logits, cache = self.model.decode(newest, cache, index - 1, ops, self._held)
        return logits[:, 0], cache


def adapt(model: keras.Model, held: Held = WHOLE) -> LanguageModel:
    """Returns the interface to a model; see `LanguageModel`."""
    return _GptModel(model, held) if isinstance(model, GPT) else LanguageModel(model)
