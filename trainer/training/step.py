"""The training step: batch -> gradients -> one all-reduce -> clip -> AdamW, and many steps in one call."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.config import Config
from trainer.distributed.strategy import processor_of
from trainer.errors import UserError
from trainer.execution import Execution, resolve
from trainer.model.dropout import DropoutDraw
from trainer.model.gpt import GPT
from trainer.model.loss import next_token_loss_from_logits
from trainer.model.ops import make_ops
from trainer.model.ops.plain import PLAIN, Ops
from trainer.model.precision import accumulation_dtype
from trainer.training.batch_hash import batch_hash, hash_from_floats, hash_to_floats
from trainer.training.checkpoint import named_variables
from trainer.training.loss_scale import LossScale
from trainer.training.optimizer import AdamW, counter
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
    num_clipped: of the norms before clipping, of applied steps. stop_votes: of the accumulation dtype, how many
    replicas' hosts want to stop. input_secs: float64, time spent waiting for batches.
    """

    num_steps: tf.Tensor
    num_skipped: tf.Tensor
    loss_sum: tf.Tensor
    num_targets: tf.Tensor
    grad_norm_sum: tf.Tensor
    num_clipped: tf.Tensor
    stop_votes: tf.Tensor
    input_secs: tf.Tensor


# forward_backward as a function of weights, state, batch and the number of the batch's first row.
GradientsOf = Callable[[Sequence[tf.Tensor], Sequence[tf.Tensor], Batch, tf.Tensor], Gradients]


def forward_backward(
    model: keras.Model,
    weights: Sequence[tf.Tensor],
    state: Sequence[tf.Tensor],
    batch: Batch,
    draw: DropoutDraw | None,
    loss_scale: tf.Tensor | None = None,
    z_loss: float = 0.0,
    ops: Ops = PLAIN,
) -> Gradients:
    """Computes the loss sum of a batch and its gradient: a function of tensors, that reads no variable.

    Args:
        model: a GPT, or any Keras model from int32 [batch, sequence] to logits [batch, sequence, vocabulary].
        weights: values for model.trainable_variables.
        state: values for model.non_trainable_variables.
        batch: inputs int32, targets int32 and weights float32, each [batch, sequence].
        draw: of the dropout masks.
        loss_scale: scalar, multiplies the gradients.
        z_loss: see `next_token_loss`.
        ops: the GPT's way of computing.

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
                loss_sum, num_targets = model.training_loss(
                    inputs, targets, target_weights, draw, loss_scale, z_loss, ops
                )
            else:
                logits = model(inputs, training=True)
                loss_sum, num_targets = next_token_loss_from_logits(logits, targets, target_weights, loss_scale, z_loss)
    gradients = tape.gradient(loss_sum, weights)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"{variable.path} has no influence on the loss: the model never uses it.")
    # An embedding's gradient comes as slices; everything after this adds and scales dense tensors.
    dense = [tf.convert_to_tensor(gradient) for gradient in gradients]
    new_state = [scope.get_current_value(variable) for variable in model.non_trainable_variables]
    return Gradients(dense, loss_sum, num_targets, new_state)


def accumulate(
    gradients_of: GradientsOf,
    weights: Sequence[tf.Tensor],
    state: Sequence[tf.Tensor],
    batch: Batch,
    first_row: tf.Tensor,
    micro_batch_size: int,
    at_once: int = 1,
    sum_dtype: tf.DType | None = None,
) -> Gradients:
    """Adds up the gradients of a batch, some of its rows after others.

    Args:
        gradients_of: computes those of some rows.
        weights: values for model.trainable_variables.
        state: values for model.non_trainable_variables; each micro-batch begins with what the one before left.
        batch: as of `forward_backward`, of a static shape.
        first_row: int64 scalar, where the batch begins in the global batch.
        micro_batch_size: rows at a time; divides those of the batch.
        at_once: micro-batches that may be under way at the same time. The sums are made in order all the same.
        sum_dtype: of the result; None: the accumulation dtype.
    """
    rows, dtype = batch[0].shape[0], sum_dtype or accumulation_dtype(weights[0].dtype)
    if micro_batch_size == rows:
        return _cast_sums(gradients_of(weights, state, batch, first_row), dtype)
    parts = [tf.reshape(part, [-1, micro_batch_size, *part.shape[1:]]) for part in batch]

    def add(i: tf.Tensor, sums: Gradients) -> tuple[tf.Tensor, Gradients]:
        inputs, targets, target_weights = (tf.gather(part, i) for part in parts)
        row = first_row + tf.cast(i * micro_batch_size, tf.int64)
        new = _cast_sums(gradients_of(weights, sums.state, (inputs, targets, target_weights), row), dtype)
        # Else TensorFlow makes one sum of this and those in a gradient, in a buffer that it takes for a variable and
        # creates twice where two micro-batches are under way.
        apart = [tf.ensure_shape(gradient, gradient.shape) for gradient in new.weights]
        gradients = [total + gradient for total, gradient in zip(sums.weights, apart, strict=True)]
        return i + 1, Gradients(gradients, sums.loss_sum + new.loss_sum, sums.num_targets + new.num_targets, new.state)

    none = tf.zeros([], dtype)
    nothing = Gradients([tf.zeros_like(weight, dtype) for weight in weights], none, none, list(state))
    _, sums = tf.while_loop(lambda i, _: i < rows // micro_batch_size, add, (0, nothing), parallel_iterations=at_once)
    return sums


def _cast_sums(sums: Gradients, dtype: tf.DType) -> Gradients:
    weights = [tf.cast(gradient, dtype) for gradient in sums.weights]
    return Gradients(weights, tf.cast(sums.loss_sum, dtype), tf.cast(sums.num_targets, dtype), sums.state)


def mean_and_clip(
    gradients: Sequence[tf.Tensor],
    num_targets: tf.Tensor,
    clip_norm: float | None,
    loss_scale: tf.Tensor | None = None,
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Divides summed gradients by the number of targets, and by the loss scale where there is one, and scales them down
    to a global norm of at most clip_norm.

    Returns:
        (gradients, the global norm of the mean before clipping). Each gradient is scaled once, by one number.
    """
    count = tf.maximum(num_targets, 1) * (1 if loss_scale is None else tf.cast(loss_scale, num_targets.dtype))
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
        strategy: of the run.
        execution: how to compute; None: as the config says for the strategy's devices.

    Attributes:
        execution: lowered by `fit_micro_batch` if the devices have no memory for its micro-batch.

    Raises:
        UserError: the batch cannot be spread evenly over the replicas, the model cannot be trained by several, or it is
            no GPT and train.recompute asks for what only that has.
    """

    def __init__(
        self,
        config: Config,
        total_steps: int,
        model: keras.Model,
        strategy: tf.distribute.Strategy,
        execution: Execution | None = None,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.model = model
        self.strategy = strategy
        self.execution = execution or resolve(config, processor_of(strategy), strategy.num_replicas_in_sync)
        if model.non_trainable_variables and strategy.num_replicas_in_sync > 1:
            names = ", ".join(variable.path for variable in model.non_trainable_variables[:3])
            raise UserError(
                f"The model has variables that are not trained ({names}), and every replica would have its own. Leave "
                "out layers such as BatchNormalization and Dropout, or use one device."
            )
        if config.train.recompute in ("attention", "blocks") and not isinstance(model, GPT):
            raise UserError(
                f"train.recompute={config.train.recompute!r} is of trainer's own GPT, and this is another model; leave "
                "it out."
            )
        self.named_variables = named_variables(model)
        name_of = {id(variable): name for name, variable in self.named_variables.items()}
        trainable = {name_of[id(variable)]: variable for variable in model.trainable_variables}
        with strategy.scope():
            self.optimizer = AdamW(config.optimizer, trainable)
            self.step = counter("step")
            self.batches_hash = counter("batches_hash")
            self.skipped_in_a_row = counter("skipped_in_a_row")
            num_targets = config.train.global_batch_size * config.train.sequence_length
            self.loss_scale = LossScale(num_targets) if config.train.precision == "mixed_float16" else None
        # Read by the compiled loop before each step and set by another thread: how a signal stops a long call.
        with tf.device("/cpu:0"):
            self.stop_requested = tf.Variable(False, trainable=False, name="stop_requested")
        self.run_steps = tf.function(self._run_steps, autograph=False)
        self._forward_backward: Callable[..., Gradients] = functools.partial(
            forward_backward, model, z_loss=config.train.z_loss, ops=make_ops(self.execution)
        )
        if self.execution.is_compiled:
            self._forward_backward = tf.function(self._forward_backward, autograph=False, jit_compile=True)

    def state(self) -> dict[str, tf.Variable]:
        """Returns every variable that a step changes, but for the model's and the step itself, by name."""
        scale = {} if self.loss_scale is None else self.loss_scale.state()
        counters = {"batches_hash": self.batches_hash, "skipped_in_a_row": self.skipped_in_a_row}
        return self.optimizer.state() | counters | scale

    def _run_steps(self, batches: tf.data.Iterator, num_steps: tf.Tensor) -> CallMetrics:
        """Takes num_steps steps; fewer where stop_requested is set meanwhile, on any host: the step under way is the
        last.

        Args:
            batches: of a distributed data set.
            num_steps: int64 scalar; a tensor, as a Python number would trace the loop anew for each value.
        """

        def goes_on(i: tf.Tensor, metrics: CallMetrics) -> tf.Tensor:
            return (i < num_steps) & tf.equal(metrics.stop_votes, 0)

        def take_step(i: tf.Tensor, metrics: CallMetrics) -> tuple[tf.Tensor, CallMetrics]:
            stop = self.stop_requested.read_value()
            asked = tf.timestamp()
            with tf.control_dependencies([asked]):
                batch = next(batches)
            with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
                input_secs = tf.timestamp() - asked
            # Else what the step can do without a batch, such as to clear its sums, is counted as waiting for one.
            with tf.control_dependencies([input_secs]):
                replicas = self.strategy.run(self.take_on_replica, (batch, stop))
            # Sums over all replicas, so that any one's will do.
            own = (self.strategy.experimental_local_results(metric)[0] for metric in replicas)
            step = CallMetrics._make((*own, input_secs))
            return i + 1, CallMetrics(*(total + new for total, new in zip(metrics, step, strict=True)))

        first = tf.zeros([], tf.int64)
        _, metrics = tf.while_loop(goes_on, take_step, (first, self._no_metrics()), parallel_iterations=1)
        return metrics

    def take_on_replica(self, batch: Batch, stop: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Takes a step, on every replica at once: to be called through `strategy.run`.

        Args:
            batch: this replica's rows.
            stop: bool scalar, whether this host wants to stop.

        Returns:
            `CallMetrics` of this step but for input_secs; the same on every replica.
        """
        config, model = self.config, self.model
        # Across workers TensorFlow forgets how many examples there are.
        shape = [self.execution.examples, config.train.sequence_length]
        inputs, targets, target_weights = (tf.ensure_shape(part, shape) for part in batch)
        batch = (inputs, targets, target_weights)
        replica = tf.distribute.get_replica_context()
        first_row = tf.cast(replica.replica_id_in_sync_group, tf.int64) * self.execution.examples
        sum_dtype = tf.as_dtype(self.execution.sum_dtype)
        scale = None if self.loss_scale is None else tf.convert_to_tensor(self.loss_scale.value)
        local = self._sums_on_replica(batch, first_row, scale)

        # Sum over replicas before clipping: clipping each replica's share would make the result depend on how many
        # there are. One list of one dtype, so that one operation sums it all.
        local_hash = tf.cast(hash_to_floats(batch_hash(batch, first_row)), sum_dtype)
        summands = [*local.weights, local.loss_sum, local.num_targets, local_hash, tf.cast(stop, sum_dtype)]
        sums = self.sum_over_replicas(replica, summands)
        dtype = tf.as_dtype(self.execution.weight_dtype)
        *gradients, loss_sum, num_targets, hash_sum, stop_votes = (tf.cast(total, dtype) for total in sums)
        clipped, grad_norm = mean_and_clip(gradients, num_targets, config.optimizer.clip_norm, scale)
        finite = tf.math.is_finite(grad_norm) & tf.math.is_finite(loss_sum)
        rate = learning_rate(config.optimizer, self.step, self.total_steps)

        def update() -> None:
            self.optimizer.apply(clipped, rate)
            for variable, value in zip(model.non_trainable_variables, local.state, strict=True):
                variable.value.assign(value)
            # A chain, modulo 2**64: it tells which batches shaped the weights, and in which order.
            self.batches_hash.assign(self.batches_hash * 1_000_003 + hash_from_floats(hash_sum))

        tf.cond(finite, update, lambda: None)
        self.step.assign_add(1)
        one, zero = tf.ones([], tf.int64), tf.zeros([], tf.int64)
        # A skip that lowers the loss scale is how the scale is found, and is not counted.
        is_routine = tf.constant(False) if self.loss_scale is None else self.loss_scale.adapt(finite)
        self.skipped_in_a_row.assign(tf.where(finite, zero, self.skipped_in_a_row + tf.where(is_routine, zero, one)))
        limit = config.optimizer.clip_norm or float("inf")
        is_clipped = finite & (grad_norm > tf.constant(limit, grad_norm.dtype))
        return (
            one,
            tf.where(finite, zero, one),
            tf.where(finite, loss_sum, tf.zeros([], dtype)),
            tf.where(finite, num_targets, tf.zeros([], dtype)),
            tf.where(finite, tf.cast(grad_norm, tf.float64), tf.zeros([], tf.float64)),
            tf.where(is_clipped, one, zero),
            stop_votes,
        )

    def rehearse_on_replica(self, batch: Batch) -> tf.Tensor:
        """Holds all the memory that `take_on_replica` needs, and changes nothing.

        Without the sum over replicas: where memory runs out on one host, the others would wait in that sum for ever.
        And without the update, which AdamW makes in place.

        Args:
            batch: of this replica's size.

        Returns:
            A scalar, for which all had to be computed.
        """
        scale = None if self.loss_scale is None else tf.convert_to_tensor(self.loss_scale.value)
        local = self._sums_on_replica(batch, tf.zeros([], tf.int64), scale)
        # In place of that sum, for which they are joined into one tensor.
        summands = [*local.weights, local.loss_sum, local.num_targets]
        joined = tf.concat([tf.reshape(summand, [-1]) for summand in summands], axis=0)
        parts = tf.split(joined, [summand.shape.num_elements() for summand in summands])
        sums = [tf.reshape(part, summand.shape) for part, summand in zip(parts, summands, strict=True)]
        *gradients, loss_sum, num_targets = (tf.cast(total, self.execution.weight_dtype) for total in sums)
        clipped, _ = mean_and_clip(gradients, num_targets, self.config.optimizer.clip_norm, scale)
        return tf.linalg.global_norm([*clipped, loss_sum])

    def _sums_on_replica(self, batch: Batch, first_row: tf.Tensor, scale: tf.Tensor | None) -> Gradients:
        """Computes what this replica contributes to a step; `accumulate` says how."""
        model = self.model
        weights = [tf.convert_to_tensor(variable.value) for variable in model.trainable_variables]
        state = [tf.convert_to_tensor(variable.value) for variable in model.non_trainable_variables]
        seed, number = tf.constant(self.config.train.seed, tf.int64), tf.convert_to_tensor(self.step)

        def gradients_of(
            weights: Sequence[tf.Tensor], state: Sequence[tf.Tensor], batch: Batch, first_row: tf.Tensor
        ) -> Gradients:
            return self._forward_backward(weights, state, batch, DropoutDraw(seed, number, first_row), scale)

        execution = self.execution
        how = (execution.micro_batch_size, execution.at_once, tf.as_dtype(execution.sum_dtype))
        return accumulate(gradients_of, weights, state, batch, first_row, *how)

    def sum_over_replicas(self, replica: tf.distribute.ReplicaContext, summands: list[tf.Tensor]) -> list[tf.Tensor]:
        """Sums tensors of one dtype over all replicas, in one operation."""
        sums: list[tf.Tensor] = replica.all_reduce(tf.distribute.ReduceOp.SUM, summands)
        return sums

    def _no_metrics(self) -> CallMetrics:
        zero, none = tf.zeros([], tf.int64), tf.zeros([], self.execution.weight_dtype)
        secs = tf.zeros([], tf.float64)
        return CallMetrics(zero, zero, none, none, secs, zero, none, secs)
