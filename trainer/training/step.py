"""The training step: batch -> gradients -> one all-reduce -> clip -> AdamW, and many steps in one call."""

from collections.abc import Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.config import Config
from trainer.model.gpt import GPT, DropoutDraw
from trainer.model.loss import accumulation_dtype, next_token_loss_from_logits
from trainer.training.checkpoint import named_variables
from trainer.training.distribution import micro_batches
from trainer.training.optimizer import AdamW
from trainer.training.schedule import learning_rate

Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


class Gradients(NamedTuple):
    """What one replica contributes to a step; sums, not means.

    weights: one dense gradient of loss_sum per trainable variable. loss_sum: nats. num_targets: tokens that were
    predicted. state: new values of the variables that are not trained, of a foreign model; the GPT has none.
    """

    weights: list[tf.Tensor]
    loss_sum: tf.Tensor
    num_targets: tf.Tensor
    state: list[tf.Tensor]


class CallMetrics(NamedTuple):
    """What a call of `run_steps` reports, summed over its steps.

    num_steps and num_skipped: int64. loss_sum (nats) and num_targets: of the accumulation dtype. grad_norm_sum and
    num_clipped: of the norms before clipping, of applied steps. input_secs: float64, time spent waiting for batches.
    """

    num_steps: tf.Tensor
    num_skipped: tf.Tensor
    loss_sum: tf.Tensor
    num_targets: tf.Tensor
    grad_norm_sum: tf.Tensor
    num_clipped: tf.Tensor
    input_secs: tf.Tensor


def forward_backward(
    model: keras.Model,
    weights: Sequence[tf.Tensor],
    state: Sequence[tf.Tensor],
    batch: Batch,
    draw: DropoutDraw | None,
) -> Gradients:
    """Computes the loss sum of a batch and its gradient: a function of tensors, that reads no variable.

    Args:
        model: a GPT, or any Keras model from int32 [batch, sequence] to logits [batch, sequence, vocabulary].
        weights: values for model.trainable_variables.
        state: values for model.non_trainable_variables.
        batch: inputs int32, targets int32 and weights float32, each [batch, sequence].
        draw: of the dropout masks.

    Raises:
        ValueError: a weight has no influence on the loss.
    """
    inputs, targets, target_weights = batch
    values = [*zip(model.trainable_variables, weights, strict=True)]
    values += zip(model.non_trainable_variables, state, strict=True)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        with keras.StatelessScope(state_mapping=values) as scope:
            if isinstance(model, GPT):
                loss_sum, num_targets = model.training_loss(inputs, targets, target_weights, draw)
            else:
                logits = model(inputs, training=True)
                loss_sum, num_targets = next_token_loss_from_logits(logits, targets, target_weights)
    gradients = tape.gradient(loss_sum, weights)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"{variable.path} has no influence on the loss: the model never uses it.")
    # An embedding's gradient comes as slices; everything after this adds and scales dense tensors.
    dense = [tf.convert_to_tensor(gradient) for gradient in gradients]
    new_state = [scope.get_current_value(variable) for variable in model.non_trainable_variables]
    return Gradients(dense, loss_sum, num_targets, new_state)


def accumulate(
    model: keras.Model,
    weights: Sequence[tf.Tensor],
    state: Sequence[tf.Tensor],
    batch: Batch,
    draw: DropoutDraw,
    micro_batch_size: int,
    at_once: int = 1,
) -> Gradients:
    """Does what `forward_backward` does, some rows of the batch after others, and adds up the gradients.

    Args:
        model: as there.
        weights: as there.
        state: as there; each micro-batch begins with what the one before left.
        batch: as there, of a static shape.
        draw: of the dropout masks of the whole batch.
        micro_batch_size: rows at a time; divides those of the batch.
        at_once: micro-batches that may be under way at the same time. The sums are made in order all the same.
    """
    rows = batch[0].shape[0]
    if micro_batch_size == rows:
        return forward_backward(model, weights, state, batch, draw)
    parts = [tf.reshape(part, [-1, micro_batch_size, *part.shape[1:]]) for part in batch]

    def add(i: tf.Tensor, sums: Gradients) -> tuple[tf.Tensor, Gradients]:
        inputs, targets, target_weights = (tf.gather(part, i) for part in parts)
        first_row = draw.first_row + tf.cast(i * micro_batch_size, tf.int64)
        new = forward_backward(
            model, weights, sums.state, (inputs, targets, target_weights), draw._replace(first_row=first_row)
        )
        gradients = [total + gradient for total, gradient in zip(sums.weights, new.weights, strict=True)]
        return i + 1, Gradients(gradients, sums.loss_sum + new.loss_sum, sums.num_targets + new.num_targets, new.state)

    none = tf.zeros([], accumulation_dtype(weights[0].dtype))
    nothing = Gradients([tf.zeros_like(weight) for weight in weights], none, none, list(state))
    _, sums = tf.while_loop(lambda i, _: i < rows // micro_batch_size, add, (0, nothing), parallel_iterations=at_once)
    return sums


def mean_and_clip(
    gradients: Sequence[tf.Tensor], num_targets: tf.Tensor, clip_norm: float | None
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Divides summed gradients by the number of targets and scales them down to a global norm of at most clip_norm.

    Returns:
        (gradients, the global norm of the mean before clipping). Each gradient is scaled once, by one number.
    """
    count = tf.maximum(num_targets, 1)
    norm = tf.linalg.global_norm(gradients) / tf.cast(count, gradients[0].dtype)
    scale = 1 / tf.cast(count, norm.dtype)
    if clip_norm is not None:
        scale *= tf.minimum(tf.ones([], norm.dtype), tf.constant(clip_norm, norm.dtype) / norm)
    return [gradient * tf.cast(scale, gradient.dtype) for gradient in gradients], norm


class TrainingStep:
    """A model, its optimizer and the step counter, and the compiled function that advances them.

    Args:
        config: of the run.
        total_steps: of the run; the schedule ends there.
        model: built under the strategy's scope.
        strategy: whose scope this is created in.
    """

    def __init__(self, config: Config, total_steps: int, model: keras.Model, strategy: tf.distribute.Strategy) -> None:
        self.config = config
        self.total_steps = total_steps
        self.model = model
        self.strategy = strategy
        self.named_variables = named_variables(model)
        names = {id(variable): name for name, variable in self.named_variables.items()}
        trainable = {names[id(variable)]: variable for variable in model.trainable_variables}
        self.optimizer = AdamW(config.optimizer, trainable)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
        # Read by the compiled loop before each step and set by another thread: how a signal stops a long call.
        with tf.device("/cpu:0"):
            self.stop_requested = tf.Variable(False, trainable=False, name="stop_requested")
        self.run_steps = tf.function(self._run_steps, autograph=False)

    def _run_steps(self, batches: tf.data.Iterator, num_steps: tf.Tensor) -> CallMetrics:
        """Takes num_steps steps, fewer where stop_requested is set meanwhile.

        Args:
            batches: of a distributed data set.
            num_steps: int64 scalar; a tensor, as a Python number would trace the loop anew for each value.
        """

        def goes_on(i: tf.Tensor, _: CallMetrics) -> tf.Tensor:
            return (i < num_steps) & ~self.stop_requested.read_value()

        def take_step(i: tf.Tensor, metrics: CallMetrics) -> tuple[tf.Tensor, CallMetrics]:
            asked = tf.timestamp()
            with tf.control_dependencies([asked]):
                batch = next(batches)
            with tf.control_dependencies(tf.nest.flatten(batch)):
                input_secs = tf.timestamp() - asked
            step = CallMetrics._make((*self.strategy.run(self._replica_step, (batch,)), input_secs))
            return i + 1, CallMetrics(*(total + new for total, new in zip(metrics, step, strict=True)))

        first = tf.zeros([], tf.int64)
        _, metrics = tf.while_loop(goes_on, take_step, (first, self._no_metrics()), parallel_iterations=1)
        return metrics

    def _replica_step(self, batch: Batch) -> tuple[tf.Tensor, ...]:
        config = self.config
        draw = DropoutDraw(tf.constant(config.train.seed, tf.int64), self.step, tf.zeros([], tf.int64))
        weights = [tf.convert_to_tensor(variable.value) for variable in self.model.trainable_variables]
        state = [tf.convert_to_tensor(variable.value) for variable in self.model.non_trainable_variables]
        rows, sequence = batch[0].shape
        micro_batch_size, at_once = micro_batches(config.train.micro_batch_size, rows, sequence, self.strategy)
        local = accumulate(self.model, weights, state, batch, draw, micro_batch_size, at_once)

        # Sum over replicas before clipping: clipping each replica's share would make the result depend on how many
        # there are.
        summed = _all_reduce([*local.weights, local.loss_sum, local.num_targets])
        *gradients, loss_sum, num_targets = summed
        clipped, grad_norm = mean_and_clip(gradients, num_targets, config.optimizer.clip_norm)
        finite = tf.math.is_finite(grad_norm) & tf.math.is_finite(loss_sum)
        rate = learning_rate(config.optimizer, self.step, self.total_steps)

        def update() -> None:
            self.optimizer.apply(clipped, rate)
            for variable, value in zip(self.model.non_trainable_variables, local.state, strict=True):
                variable.value.assign(value)

        tf.cond(finite, update, lambda: None)
        self.step.assign_add(1)

        one, zero = tf.ones([], tf.int64), tf.zeros([], tf.int64)
        limit = config.optimizer.clip_norm or float("inf")
        is_clipped = finite & (grad_norm > tf.constant(limit, grad_norm.dtype))
        dtype = loss_sum.dtype
        return (
            one,
            tf.where(finite, zero, one),
            tf.where(finite, loss_sum, tf.zeros([], dtype)),
            tf.where(finite, num_targets, tf.zeros([], dtype)),
            tf.where(finite, tf.cast(grad_norm, tf.float64), tf.zeros([], tf.float64)),
            tf.where(is_clipped, one, zero),
        )

    def _no_metrics(self) -> CallMetrics:
        dtype = tf.float64 if self.config.train.precision == "float64" else tf.float32
        zero, none = tf.zeros([], tf.int64), tf.zeros([], dtype)
        secs = tf.zeros([], tf.float64)
        return CallMetrics(zero, zero, none, none, secs, zero, secs)


def _all_reduce(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    replica = tf.distribute.get_replica_context()
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, tensors)
