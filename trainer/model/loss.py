"""Next-token cross-entropy as a sum and a count, from hidden states or from logits.

The step divides by the count, after it has summed both over micro-batches and replicas.
"""

import functools
from collections.abc import Callable

import tensorflow as tf

from trainer.model.ops.plain import PLAIN, Ops
from trainer.model.precision import accumulation_dtype


def next_token_loss(
    hidden: tf.Tensor,
    unembedding: tf.Tensor,
    bias: tf.Tensor | None,
    targets: tf.Tensor,
    weights: tf.Tensor,
    loss_scale: tf.Tensor | None = None,
    z_loss: float = 0.0,
    ops: Ops = PLAIN,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums the cross-entropy of each target token given its hidden state, a chunk of rows at a time.

    The gradient is computed along with the loss, from the same logits, so no chunk of logits outlives its turn.

    Args:
        hidden: float [batch, sequence, hidden_dim].
        unembedding: float [vocabulary, hidden_dim]; its gradient is added up in its own dtype.
        bias: float [vocabulary], or None.
        targets: int32 [batch, sequence].
        weights: float [batch, sequence], 0 if the target is padding.
        loss_scale: scalar that multiplies the gradient, and not the loss, before the gradient is rounded to the dtype
            of hidden: it keeps the gradient from vanishing in float16.
        z_loss: adds the gradient of z_loss * log(sum(exp(logits)))**2 of each target, and nothing to the loss.
        ops: the way of computing; its logit_rows are the rows of a chunk.

    Returns:
        (loss_sum, num_targets), scalars of the accumulation dtype, loss_sum in nats. A sum and not a mean: replicas can
        hold different numbers of targets, so only the caller that sees all of them may divide.

    Source of z_loss: Chowdhery et al. 2022, section 5.
    """
    dtype = accumulation_dtype(hidden.dtype)
    weights = tf.cast(weights, dtype)

    @tf.custom_gradient
    def loss_sum_of(hidden: tf.Tensor, unembedding: tf.Tensor, *bias: tf.Tensor) -> tuple[tf.Tensor, object]:
        value, *gradients = _loss_and_gradients(hidden, unembedding, bias, targets, weights, loss_scale, z_loss, ops)
        return value, lambda upstream: [tf.cast(upstream, g.dtype) * g for g in gradients]

    operands = (hidden, unembedding) if bias is None else (hidden, unembedding, bias)
    return loss_sum_of(*operands), tf.reduce_sum(weights)


def next_token_loss_from_logits(
    logits: tf.Tensor,
    targets: tf.Tensor,
    weights: tf.Tensor,
    loss_scale: tf.Tensor | None = None,
    z_loss: float = 0.0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums the cross-entropy of each target token given its logits, for models that offer nothing but logits.

    Args:
        logits: float [batch, sequence, vocabulary].
        targets: int32 [batch, sequence].
        weights: float [batch, sequence], 0 if the target is padding.
        loss_scale: see `next_token_loss`.
        z_loss: see `next_token_loss`.

    Returns:
        (loss_sum, num_targets), as `next_token_loss` returns them.
    """
    dtype = accumulation_dtype(logits.dtype)
    weights = tf.cast(weights, dtype)
    logits = tf.cast(logits, dtype)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    loss_sum = tf.reduce_sum(losses * weights)
    if z_loss:
        log_sum_exp = losses + tf.gather(logits, targets, batch_dims=2)
        z_sum = z_loss * tf.reduce_sum(tf.square(log_sum_exp) * weights)
        loss_sum += z_sum - tf.stop_gradient(z_sum)
    return loss_sum if loss_scale is None else _scale_gradient(loss_sum, loss_scale), tf.reduce_sum(weights)


def next_token_loss_without_gradient(
    hidden: tf.Tensor,
    unembedding: tf.Tensor,
    bias: tf.Tensor | None,
    targets: tf.Tensor,
    weights: tf.Tensor,
    ops: Ops = PLAIN,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns what `next_token_loss` returns at a third of its cost, for evaluation."""
    dtype = accumulation_dtype(hidden.dtype)
    chunks = _Chunks(hidden, targets, tf.cast(weights, dtype), ops.logit_rows)
    kernel = tf.cast(unembedding, hidden.dtype)

    def add_chunk(i: tf.Tensor, loss_sum: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        rows, row_targets, row_weights = chunks.at(i)
        logits_of = functools.partial(_logits, rows, kernel, bias, dtype)
        losses, *_ = _losses_and_softmax(logits_of, row_targets, ops)
        return i + 1, loss_sum + tf.reduce_sum(losses * row_weights)

    _, loss_sum = tf.while_loop(
        lambda i, _: i < chunks.count, add_chunk, (0, tf.zeros([], dtype)), parallel_iterations=1
    )
    return loss_sum, tf.reduce_sum(tf.cast(weights, dtype))


def next_token_scores(
    states: tf.Tensor,
    logits_of: Callable[[tf.Tensor], tf.Tensor],
    targets: tf.Tensor,
    weights: tf.Tensor,
    vocabulary_size: int,
    ops: Ops = PLAIN,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Scores each target token, a chunk of rows at a time. The sums over texts are the caller's.

    Args:
        states: float [batch, sequence, width], what the logits are made of: hidden states, or the logits themselves.
        logits_of: makes float logits [rows, num_logits] of states [rows, width].
        targets: int32 [batch, sequence].
        weights: float [batch, sequence], 0 if the target is not scored.
        vocabulary_size: the logits beyond it stand for no token.
        ops: the way of computing; its logit_rows are the rows of a chunk.

    Returns:
        (losses, are_likeliest), each [batch, sequence]: the cross-entropy of the target in nats, of the accumulation
        dtype, and whether no token is likelier, bool. 0 and False, or anything, if the target is not scored.
    """
    dtype = accumulation_dtype(states.dtype)
    chunks = _Chunks(states, targets, tf.cast(weights, dtype), ops.logit_rows)

    def write_chunk(i: tf.Tensor, scores: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        rows, row_targets, _ = chunks.at(i)
        logits = tf.cast(logits_of(rows), dtype)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(row_targets, logits)
        likeliest = tf.argmax(logits[:, :vocabulary_size], axis=-1, output_type=tf.int32)
        return i + 1, scores.write(i, tf.stack([losses, tf.cast(likeliest == row_targets, dtype)], axis=-1))

    scores = tf.TensorArray(dtype, chunks.capacity, element_shape=[chunks.chunk_rows, 2])
    _, scores = tf.while_loop(lambda i, _: i < chunks.count, write_chunk, (0, scores), parallel_iterations=1)
    joined = tf.reshape(chunks.unsorted(scores.stack()), [*targets.shape, 2])
    return joined[..., 0], joined[..., 1] > 0


@tf.custom_gradient
def _scale_gradient(x: tf.Tensor, scale: tf.Tensor) -> tuple[tf.Tensor, object]:
    return tf.identity(x), lambda upstream: (upstream * tf.cast(scale, upstream.dtype), None)


class _Chunks:
    """The rows of a batch in equal chunks. Rows with a weight come first, and only chunks that hold some are counted.

    So padding costs no matrix products, while all shapes stay fixed.

    Attributes:
        chunk_rows: rows of a chunk.
        capacity: number of chunks.
        count: int32 scalar, the number of chunks that hold rows with a weight.
    """

    def __init__(self, hidden: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, chunk_rows: int) -> None:
        self._shape = tf.shape(hidden)
        num_rows, hidden_dim = hidden.shape[0] * hidden.shape[1], hidden.shape[2]
        self.chunk_rows = min(chunk_rows, num_rows)
        self.capacity = -(-num_rows // self.chunk_rows)
        padding = self.capacity * self.chunk_rows - num_rows
        weights, targets = tf.reshape(weights, [-1]), tf.reshape(targets, [-1])
        self._order = tf.argsort(tf.cast(tf.equal(weights, 0), tf.int32), stable=True)

        def split(rows: tf.Tensor, *row_shape: int) -> tf.Tensor:
            padded = tf.pad(tf.gather(rows, self._order), [[0, padding]] + [[0, 0]] * len(row_shape))
            return tf.reshape(padded, [self.capacity, self.chunk_rows, *row_shape])

        self._rows = split(tf.reshape(hidden, [-1, hidden_dim]), hidden_dim)
        self._targets, self._weights = split(targets), split(weights)
        num_used = tf.math.count_nonzero(weights, dtype=tf.int32)
        self.count = (num_used + self.chunk_rows - 1) // self.chunk_rows

    def at(self, i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns hidden states, targets and weights of chunk i."""
        return tf.gather(self._rows, i), tf.gather(self._targets, i), tf.gather(self._weights, i)

    def joined(self, chunks: tf.Tensor) -> tf.Tensor:
        """Returns [capacity, chunk_rows, hidden_dim] in the shape and order of the hidden states."""
        return tf.reshape(self.unsorted(chunks), self._shape)

    def unsorted(self, chunks: tf.Tensor) -> tf.Tensor:
        """Returns [capacity, chunk_rows, width] as [rows, width], in the order of the hidden states."""
        return tf.gather(tf.reshape(chunks, [-1, chunks.shape[-1]]), tf.math.invert_permutation(self._order))


def _logits(rows: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None, dtype: tf.DType) -> tf.Tensor:
    logits = tf.cast(tf.matmul(rows, kernel, transpose_b=True), dtype)
    return logits if bias is None else logits + tf.cast(bias, dtype)


def _losses_and_softmax(
    logits_of: Callable[[], tf.Tensor], targets: tf.Tensor, ops: Ops
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the cross-entropy of each row [rows], the logits and their softmax, both [rows, vocabulary].

    TensorFlow writes the softmax over the logits if nothing else reads them; see `Ops.keep_or_recompute`.
    """
    logits = logits_of()
    softmax = tf.nn.softmax(logits)
    places = _places(targets)
    probability = tf.gather_nd(softmax, places)

    def from_largest() -> tf.Tensor:
        logits_again = ops.keep_or_recompute(logits, logits_of)
        # With m the largest logit and p its probability, log(sum(exp(logits))) = m - log(p). The probability p is at
        # least 1 / vocabulary and cannot underflow, as the target's own probability can.
        log_sum_exp = tf.reduce_max(logits_again, axis=-1) - tf.math.log(tf.reduce_max(softmax, axis=-1))
        return log_sum_exp - tf.gather_nd(logits_again, places)

    is_vanishing = tf.reduce_min(probability) < 1e-30
    return tf.cond(is_vanishing, from_largest, lambda: -tf.math.log(probability)), logits, softmax


def _places(targets: tf.Tensor) -> tf.Tensor:
    return tf.stack([tf.range(targets.shape[0]), targets], axis=1)


def _loss_and_gradients(
    hidden: tf.Tensor,
    unembedding: tf.Tensor,
    bias: tuple[tf.Tensor, ...],
    targets: tf.Tensor,
    weights: tf.Tensor,
    loss_scale: tf.Tensor | None,
    z_loss: float,
    ops: Ops,
) -> tuple[tf.Tensor, ...]:
    """Returns the loss sum and its gradients by hidden, unembedding and, if there is one, bias."""
    dtype = weights.dtype
    chunks = _Chunks(hidden, targets, weights, ops.logit_rows)
    kernel = tf.cast(unembedding, hidden.dtype)

    def add_chunk(i: tf.Tensor, loss_sum: tf.Tensor, d_hidden: tf.TensorArray, *sums: tf.Tensor) -> tuple:
        rows, row_targets, row_weights = chunks.at(i)
        logits_of = functools.partial(_logits, rows, kernel, bias[0] if bias else None, dtype)
        losses, logits, softmax = _losses_and_softmax(logits_of, row_targets, ops)
        # In the wide dtype: in bfloat16 the difference of two numbers near 1 would be noise.
        # Only after the losses have read the softmax may it be overwritten in place.
        with tf.control_dependencies([losses]):
            if z_loss:
                log_sum_exp = losses + tf.gather_nd(logits, _places(row_targets))
                softmax *= (1 + 2 * z_loss * log_sum_exp)[:, tf.newaxis]
            d_logits = ops.subtract_at(softmax, _places(row_targets), tf.ones_like(losses))
        if loss_scale is not None:
            d_logits *= tf.cast(loss_scale, dtype)
        narrow = tf.cast(d_logits, hidden.dtype)
        # A row's weight multiplies hidden_dim numbers here, and not the vocabulary_size of d_logits.
        narrow_weights = tf.cast(row_weights, hidden.dtype)[:, tf.newaxis]
        d_hidden = d_hidden.write(i, tf.matmul(narrow, kernel) * narrow_weights)
        d_kernel = tf.matmul(narrow, rows * narrow_weights, transpose_a=True)
        new_sums = [sums[0] + tf.cast(d_kernel, unembedding.dtype)]
        if bias:
            d_bias = tf.matmul(d_logits, row_weights[:, tf.newaxis], transpose_a=True)[:, 0]
            new_sums.append(sums[1] + tf.cast(d_bias, bias[0].dtype))
        return i + 1, loss_sum + tf.reduce_sum(losses * row_weights), d_hidden, *new_sums

    # Chunks that are never written stay zero, which is the gradient of padding.
    d_hidden = tf.TensorArray(hidden.dtype, chunks.capacity, element_shape=[chunks.chunk_rows, hidden.shape[-1]])
    sums = [tf.zeros_like(unembedding), *(tf.zeros_like(b) for b in bias)]
    _, loss_sum, d_hidden, *sums = tf.while_loop(
        lambda i, *_: i < chunks.count,
        add_chunk,
        (0, tf.zeros([], dtype), d_hidden, *sums),
        # One after the other: chunks side by side would each hold their logits.
        parallel_iterations=1,
    )
    return loss_sum, chunks.joined(d_hidden.stack()), *sums
