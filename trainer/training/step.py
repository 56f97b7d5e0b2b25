"""The training step, from the top down.

run_steps              many steps in one compiled call: the next batch, then
take_step_on_replica   a step on every replica: the replica's gradients -> one all-reduce -> clip -> optimizer; if the
                       optimizer is split: -> reduce-scatter -> clip -> optimizer -> all-gather (split.py)
accumulate             a replica's gradients: the sums of its micro-batches, in order; on a CPU two are computed at
                       once; if the weights are split: its pieces of sums over replicas (gathered.py)
forward_backward       the loss and the gradients of a micro-batch
mean_and_clip          sums -> means, scaled down to a largest norm
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.config.schedule import batch_size_at, learning_rate
from trainer.config.settings import Config, check_can_shard, check_shard, num_pieces
from trainer.distributed.collectives import Collectives, in_a_function, make_collectives
from trainer.distributed.strategy import processor_of
from trainer.errors import UserError
from trainer.execution import Execution, resolve
from trainer.model.dropout import DropoutDraw
from trainer.model.held import WHOLE, Held
from trainer.model.language_model import adapt
from trainer.model.ops import make_ops
from trainer.model.ops.plain import PLAIN, Ops
from trainer.model.precision import accumulation_dtype
from trainer.optimizers.average import WeightAverage
from trainer.optimizers.optimizer import make_optimizer
from trainer.optimizers.replicas import Replicas
from trainer.optimizers.variables import counter
from trainer.training.batch_hash import batch_hash, hash_from_floats, hash_to_floats
from trainer.training.loss_scale import LossScale
from trainer.training.split import SplitArray, SplitOptimizer, SplitWeights

# Inputs int32, targets int32 and weights float32, each [batch, sequence]. The weight is 0 if the target is padding.
Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


class StepMetrics(NamedTuple):
    """What a step reports, the same on every replica: `CallMetrics` of one step, without input_secs."""

    num_steps: tf.Tensor
    num_skipped: tf.Tensor
    loss_sum: tf.Tensor
    num_targets: tf.Tensor
    grad_norm_sum: tf.Tensor
    num_clipped: tf.Tensor
    stop_votes: tf.Tensor


class CallMetrics(NamedTuple):
    """What a call of `run_steps` reports, summed over its steps.

    Attributes:
        num_steps: steps taken, int64.
        num_skipped: steps whose gradients or loss were not finite, int64.
        loss_sum: losses of the applied steps in nats, in the weights' dtype.
        num_targets: predicted tokens of the applied steps, in the weights' dtype.
        grad_norm_sum: norms of the applied steps' gradients before clipping, float64.
        num_clipped: applied steps whose gradients were clipped, int64.
        stop_votes: replicas whose worker received a stop signal, in the weights' dtype.
        input_secs: time spent waiting for batches, float64.
    """

    num_steps: tf.Tensor
    num_skipped: tf.Tensor
    loss_sum: tf.Tensor
    num_targets: tf.Tensor
    grad_norm_sum: tf.Tensor
    num_clipped: tf.Tensor
    stop_votes: tf.Tensor
    input_secs: tf.Tensor


class Gradients(NamedTuple):
    """The gradients of some examples; sums, not means.

    Attributes:
        by_weight: the dense gradient of loss_sum for each trainable variable.
        loss_sum: scalar, nats.
        num_targets: scalar, tokens that were predicted.
        state: new values of the variables that are not trained. A foreign model can have some, the GPT has none.
    """

    by_weight: list[tf.Tensor]
    loss_sum: tf.Tensor
    num_targets: tf.Tensor
    state: list[tf.Tensor]


# forward_backward as a function of weights, state, batch and the place of its first example in the global batch.
GradientsOf = Callable[[Sequence[tf.Tensor], Sequence[tf.Tensor], Batch, tf.Tensor], Gradients]


class TrainingStep:
    """A model, its optimizer and the step counter, and the compiled function that advances them.

    Args:
        config: the run's configuration.
        total_steps: steps of the run; the learning-rate schedule ends there.
        model: a model that was built under the strategy's scope.
        strategy: the run's strategy.
        execution: how each replica computes; None: what `resolve` returns for the config and the strategy's devices.
        collectives: how replicas exchange pieces, if distribution.shard splits something; None: as the strategy's
            devices do it.

    Attributes:
        run_steps: the compiled `_run_steps`.
        execution: how each replica computes.
        named_variables: the model's variables by name. If distribution.shard splits the weights: the weights as whole
            arrays (SplitArray); the model's own variables then hold no values.
        average: the average of the weights; None: the config has no optimizer.ema_decay.
        split: splits the optimizer, or the weights too, over the replicas; None: every replica has all of it.
        stop_requested: bool variable, read at the start of each step. Set it, from any thread, to end a call of
            run_steps after the next step, which sees it.

    Raises:
        UserError: the batch cannot be spread evenly over the replicas, several replicas cannot train the model, or
            train.recompute needs trainer's own GPT and the model is another one.
    """

    def __init__(
        self,
        config: Config,
        total_steps: int,
        model: keras.Model,
        strategy: tf.distribute.Strategy,
        execution: Execution | None = None,
        collectives: Collectives | None = None,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.model = model
        self.strategy = strategy
        self.execution = execution or resolve(config, processor_of(strategy), strategy.num_replicas_in_sync)
        _check_model(config, model, strategy)
        named = adapt(model).named_variables()
        self.named_variables: Mapping[str, keras.Variable | SplitArray] = named
        name_of = {id(variable): name for name, variable in named.items()}
        trainable = {name_of[id(variable)]: variable for variable in model.trainable_variables}
        self.split: SplitOptimizer | None = None
        if config.distribution.shard != "nothing":
            if collectives is None:
                check_shard(config, strategy.num_replicas_in_sync)
                collectives = make_collectives(strategy, num_pieces(config, strategy.num_replicas_in_sync))
            with strategy.scope():
                is_optimizer = config.distribution.shard == "optimizer"
                self.split = (SplitOptimizer if is_optimizer else SplitWeights)(collectives, trainable)
        if isinstance(self.split, SplitWeights):
            self.named_variables = self.split.arrays()
        with strategy.scope():
            length = config.train.sequence_length
            trained = trainable if self.split is None else self.split.pieces
            self.optimizer = make_optimizer(config.optimizer, trained, model, length, self.execution)
            decay = config.optimizer.ema_decay
            averaged = self.split.pieces if isinstance(self.split, SplitWeights) else trainable
            self.average = None if decay is None else WeightAverage(decay, averaged)
            self.step = counter("step")
            self.batches_hash = counter("batches_hash")
            self.skipped_in_a_row = counter("skipped_in_a_row")
            num_targets = config.train.global_batch_size * config.train.sequence_length
            self.loss_scale = LossScale(num_targets) if config.train.precision == "mixed_float16" else None
        # On the CPU: the compiled loop reads it before each step, and a signal sets it meanwhile.
        with tf.device("/cpu:0"):
            self.stop_requested = tf.Variable(False, trainable=False, name="stop_requested")
        self.run_steps = tf.function(self._run_steps, autograph=False)
        self._forward_backward: Callable[..., Gradients] = functools.partial(
            forward_backward, model, z_loss=config.train.z_loss, ops=make_ops(self.execution)
        )
        # With split weights XLA compiles less at a time: what is between the exchanges; see gathered.py.
        if self.execution.is_compiled and not isinstance(self.split, SplitWeights):
            self._forward_backward = tf.function(self._forward_backward, autograph=False, jit_compile=True)

    def set_micro_batch_size(self, size: int) -> None:
        """Changes the examples that a replica computes at a time. Call it before run_steps is traced."""
        kind, num_replicas = processor_of(self.strategy), self.strategy.num_replicas_in_sync
        self.execution = resolve(self.config, kind, num_replicas, size)

    def state(self) -> dict[str, tf.Variable | SplitArray]:
        """Returns every variable that a step changes by name, except the model's variables, their average and the step
        itself. If distribution.shard splits some of them, every worker reads these, in the same order.
        """
        scale = {} if self.loss_scale is None else self.loss_scale.state()
        counters = {"batches_hash": self.batches_hash, "skipped_in_a_row": self.skipped_in_a_row}
        of_optimizer: dict[str, tf.Variable | SplitArray] = dict(self.optimizer.state())
        if self.split is not None:
            of_optimizer = {name: self.split.whole(name, each) for name, each in of_optimizer.items()}
        return of_optimizer | counters | scale

    def average_state(self) -> dict[str, tf.Variable | SplitArray]:
        """Returns every variable of the average by name, as `state` does. Call it if there is an average."""
        assert self.average is not None
        if not isinstance(self.split, SplitWeights):
            return dict(self.average.state())
        return {name: self.split.whole(name, each) for name, each in self.average.state().items()}

    def held(self) -> Held:
        """Returns how the model's layers get their weights for an evaluation or samples. Call it in a replica
        function.
        """
        if not isinstance(self.split, SplitWeights):
            return WHOLE
        kind, num_replicas = processor_of(self.strategy), self.strategy.num_replicas_in_sync
        return self.split.held(resolve(self.config, kind, num_replicas, use="evaluation").compute_dtype)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Lets the model have the average as its weights in a block. Without an average the weights stay."""
        return contextlib.nullcontext() if self.average is None else self.average.in_the_model()

    def hand_over_average(self) -> None:
        """Gives the model the average as its weights for good, if there is one: no step may follow."""
        if self.average is not None:
            self.average.exchange()

    def _run_steps(self, batches: tf.data.Iterator, num_steps: tf.Tensor) -> CallMetrics:
        """Takes num_steps steps, or fewer: a step that finds stop_requested set on any worker is the last.

        Args:
            batches: an iterator of a distributed data set.
            num_steps: int64 scalar; a tensor, because every new Python number would trace the loop again.
        """

        def goes_on(i: tf.Tensor, metrics: CallMetrics) -> tf.Tensor:
            return (i < num_steps) & tf.equal(metrics.stop_votes, 0)

        def take_step(i: tf.Tensor, metrics: CallMetrics) -> tuple[tf.Tensor, CallMetrics]:
            stop = self.stop_requested.read_value()
            batch, input_secs = _timed_next(batches)
            # The step starts only after the wait is measured. Otherwise the work that needs no batch, such as clearing
            # the sums, counts as input time.
            with tf.control_dependencies([input_secs]):
                replicas = self.strategy.run(self.take_step_on_replica, (batch, stop))
            # Every replica has the same sums, so the first is taken.
            metrics_of_step = StepMetrics(*(self.strategy.experimental_local_results(each)[0] for each in replicas))
            step = CallMetrics(**metrics_of_step._asdict(), input_secs=input_secs)
            return i + 1, CallMetrics(*(total + new for total, new in zip(metrics, step, strict=True)))

        first = tf.zeros([], tf.int64)
        _, metrics = tf.while_loop(goes_on, take_step, (first, self._no_metrics()), parallel_iterations=1)
        return metrics

    def take_step_on_replica(self, batch: Batch, stop: tf.Tensor) -> StepMetrics:
        """Takes a step on every replica at once; call it through `strategy.run`.

        Args:
            batch: this replica's share.
            stop: bool scalar, whether this worker received a stop signal.
        """
        batch, first_example, num_examples = self._place_on_replica(batch)
        replica = tf.distribute.get_replica_context()
        scale = None if self.loss_scale is None else tf.convert_to_tensor(self.loss_scale.value)
        local = self._sums_on_replica(batch, first_example, scale, num_examples)

        # Sum over replicas before clipping: clipping each replica's share would make the result depend on how many
        # there are. The summands are one list of one dtype, so that one operation sums all of them.
        sum_dtype, dtype = tf.as_dtype(self.execution.sum_dtype), tf.as_dtype(self.execution.weight_dtype)
        local_hash = tf.cast(hash_to_floats(batch_hash(batch, first_example, num_examples)), sum_dtype)
        counts = [local.loss_sum, local.num_targets, local_hash, tf.cast(stop, sum_dtype)]
        norm = None
        if self.split is None:
            sums = self.sum_over_replicas(replica, [*local.by_weight, *counts])
        else:  # This replica has only its piece of each sum.
            pieces, counts, norm = self.split.sums(local.by_weight, counts)
            sums = [*pieces, *counts]
        *gradients, loss_sum, num_targets, hash_sum, stop_votes = (tf.cast(total, dtype) for total in sums)

        clip_norm = self.config.optimizer.clip_norm
        clipped, grad_norm = mean_and_clip(gradients, num_targets, clip_norm, scale, norm)
        finite = tf.math.is_finite(grad_norm) & tf.math.is_finite(loss_sum)
        updates = self.optimizer.updates(clipped, self.replicas(replica))
        self._update_if(finite, updates, local.state, hash_sum)
        one, zero = tf.ones([], tf.int64), tf.zeros([], tf.int64)
        is_clipped = finite & (grad_norm > tf.constant(clip_norm or float("inf"), grad_norm.dtype))
        return StepMetrics(
            num_steps=one,
            num_skipped=tf.where(finite, zero, one),
            loss_sum=tf.where(finite, loss_sum, tf.zeros([], dtype)),
            num_targets=tf.where(finite, num_targets, tf.zeros([], dtype)),
            grad_norm_sum=tf.where(finite, tf.cast(grad_norm, tf.float64), tf.zeros([], tf.float64)),
            num_clipped=tf.where(is_clipped, one, zero),
            stop_votes=stop_votes,
        )

    def local_sums(self, batch: Batch) -> tuple[Gradients, tf.Tensor | None]:
        """Computes what this replica would contribute to the next step, and changes nothing; call it through
        `strategy.run`.

        Args:
            batch: this replica's share.

        Returns:
            (sums, the loss scale that multiplies the gradients; None if there is none).
        """
        batch, first_example, num_examples = self._place_on_replica(batch)
        scale = None if self.loss_scale is None else tf.convert_to_tensor(self.loss_scale.value)
        return self._sums_on_replica(batch, first_example, scale, num_examples), scale

    def _place_on_replica(self, batch: Batch) -> tuple[Batch, tf.Tensor, tf.Tensor | None]:
        """Returns this replica's share with its static shape, the place of its first example in the global batch, and
        the number of its examples that the step uses, int64; None: all, since there is no batch warm-up.
        """
        # With several workers the number of examples is not in the batch's static shape.
        shape = [self.execution.examples, self.config.train.sequence_length]
        inputs, targets, target_weights = (tf.ensure_shape(part, shape) for part in batch)
        replica = tf.distribute.get_replica_context()
        num_examples = None
        if self.config.train.batch_warmup:
            batch_size = batch_size_at(self.config.train, tf.convert_to_tensor(self.step), tf.minimum)
            num_examples = batch_size // self.strategy.num_replicas_in_sync
        share = self.execution.examples if num_examples is None else num_examples
        first_example = tf.cast(replica.replica_id_in_sync_group, tf.int64) * share
        return (inputs, targets, target_weights), first_example, num_examples

    def _sums_on_replica(
        self,
        batch: Batch,
        first_example: tf.Tensor,
        scale: tf.Tensor | None,
        num_examples: tf.Tensor | None = None,
        split: SplitOptimizer | None = None,
    ) -> Gradients:
        """Computes what this replica contributes to a step: see `accumulate`. If the weights are split, these are
        pieces of sums over all replicas; split is what exchanges them, None: `self.split`.
        """
        model, execution, split = self.model, self.execution, split or self.split
        in_pieces = isinstance(split, SplitWeights)
        trained = split.pieces.values() if isinstance(split, SplitWeights) else model.trainable_variables
        weights = [tf.convert_to_tensor(variable.value) for variable in trained]
        state = [tf.convert_to_tensor(variable.value) for variable in model.non_trainable_variables]
        seed, number = tf.constant(self.config.train.seed, tf.int64), tf.convert_to_tensor(self.step)

        def gradients_of(
            weights: Sequence[tf.Tensor], state: Sequence[tf.Tensor], batch: Batch, first_example: tf.Tensor
        ) -> Gradients:
            draw = DropoutDraw(seed, number, first_example)
            if not isinstance(split, SplitWeights):
                return self._forward_backward(weights, state, batch, draw, scale)
            held = split.held(execution.compute_dtype, weights, execution.is_compiled)
            return self._forward_backward(weights, state, batch, draw, scale, held=held)

        return accumulate(
            in_a_function(gradients_of) if in_pieces else gradients_of,
            weights,
            state,
            batch,
            first_example,
            micro_batch_size=execution.micro_batch_size,
            at_once=execution.at_once,
            sum_dtype=tf.as_dtype(execution.sum_dtype),
            num_examples=num_examples,
        )

    def sum_over_replicas(self, replica: tf.distribute.ReplicaContext, summands: list[tf.Tensor]) -> list[tf.Tensor]:
        """Sums tensors of one dtype over all replicas, in one operation."""
        sums: list[tf.Tensor] = replica.all_reduce(tf.distribute.ReduceOp.SUM, summands)
        return sums

    def replicas(self, replica: tf.distribute.ReplicaContext) -> Replicas:
        """Returns the replicas as the one of this context sees them, for the optimizer."""
        total = functools.partial(self.sum_over_replicas, replica)
        own = Replicas(self.strategy.num_replicas_in_sync, replica.replica_id_in_sync_group, total)
        split = self.split
        return own if split is None else own._replace(all_to_all=split.all_to_all, num_pieces=split.num_pieces)

    def _update_if(
        self, finite: tf.Tensor, updates: list[tf.Tensor], state: list[tf.Tensor], hash_sum: tf.Tensor
    ) -> None:
        """Applies the optimizer's updates if the gradients are finite, and counts the step either way."""
        rate = learning_rate(self.config.optimizer, tf.cast(self.step, tf.float64), self.total_steps, tf)
        # Whether a step ends with a gather of the whole weights, which are then averaged.
        gathers = self.split is not None and not isinstance(self.split, SplitWeights)
        if self.split is not None:
            self.split.begin()

        def update() -> None:
            self.optimizer.apply(updates, rate)
            if self.average is not None and not gathers:
                self.average.update()
            for variable, value in zip(self.model.non_trainable_variables, state, strict=True):
                variable.value.assign(value)
            # A chain, modulo 2**64: it depends on which batches shaped the weights, and in which order.
            self.batches_hash.assign(self.batches_hash * 1_000_003 + hash_from_floats(hash_sum))

        tf.cond(finite, update, lambda: None)
        if self.split is not None:
            # Not in the condition: no collective operation may be there. A step that is skipped gets the same weights
            # back.
            self.split.finish(finite)
            if self.average is not None and gathers:
                tf.cond(finite, self.average.update, lambda: None)
        self.step.assign_add(1)
        one, zero = tf.ones([], tf.int64), tf.zeros([], tf.int64)
        # The loss scale is found by overflowing. Such a skip is normal, so it is not counted.
        is_routine = tf.constant(False) if self.loss_scale is None else self.loss_scale.adapt(finite)
        self.skipped_in_a_row.assign(tf.where(finite, zero, self.skipped_in_a_row + tf.where(is_routine, zero, one)))

    def rehearse_on_replica(self, batch: Batch) -> tf.Tensor:
        """Allocates all the memory that `take_step_on_replica` needs, and changes nothing.

        It leaves out the sums over replicas: if one worker ran out of memory, the others would wait in them forever. It
        also leaves out the update of the weights, which is made in place.

        Args:
            batch: a batch of the size of this replica's share.

        Returns:
            A scalar that depends on every tensor that was computed.
        """
        scale = None if self.loss_scale is None else tf.convert_to_tensor(self.loss_scale.value)
        split = None if self.split is None else self.split.rehearsing()
        local = self._sums_on_replica(batch, tf.zeros([], tf.int64), scale, split=split)
        if split is not None:
            pieces, (num_targets, loss_sum), norm = split.sums(local.by_weight, [local.num_targets, local.loss_sum])
            clipped, _ = mean_and_clip(pieces, num_targets, self.config.optimizer.clip_norm, scale, norm)
            replicas = self.replicas(tf.distribute.get_replica_context())._replace(all_to_all=split.all_to_all)
            updates = self.optimizer.updates(clipped, replicas)
            # As in a step, the weights are gathered when the gradients are no longer needed.
            with tf.control_dependencies(updates):
                norms = [tf.cast(tf.linalg.global_norm([whole]), loss_sum.dtype) for whole in split.gathered()]
            return tf.linalg.global_norm([*updates, *norms])
        # This stands for the sum over replicas, which joins its summands into one tensor.
        summands = [*local.by_weight, local.loss_sum, local.num_targets]
        joined = tf.concat([tf.reshape(summand, [-1]) for summand in summands], axis=0)
        parts = tf.split(joined, [summand.shape.num_elements() for summand in summands])
        sums = [tf.reshape(part, summand.shape) for part, summand in zip(parts, summands, strict=True)]
        *gradients, loss_sum, num_targets = (tf.cast(total, self.execution.weight_dtype) for total in sums)
        clipped, _ = mean_and_clip(gradients, num_targets, self.config.optimizer.clip_norm, scale)
        replicas = self.replicas(tf.distribute.get_replica_context())._replace(sum=lambda summands: summands)
        return tf.linalg.global_norm([*self.optimizer.updates(clipped, replicas), loss_sum])

    def _no_metrics(self) -> CallMetrics:
        zero, none = tf.zeros([], tf.int64), tf.zeros([], self.execution.weight_dtype)
        secs = tf.zeros([], tf.float64)
        return CallMetrics(zero, zero, none, none, secs, zero, none, secs)


def accumulate(
    gradients_of: GradientsOf,
    weights: Sequence[tf.Tensor],
    state: Sequence[tf.Tensor],
    batch: Batch,
    first_example: tf.Tensor,
    micro_batch_size: int,
    at_once: int = 1,
    sum_dtype: tf.DType | None = None,
    num_examples: tf.Tensor | None = None,
) -> Gradients:
    """Adds up the gradients of a batch's micro-batches, in order.

    Args:
        gradients_of: computes the gradients of a micro-batch.
        weights: values for model.trainable_variables.
        state: values for model.non_trainable_variables; each micro-batch begins with the values that the one before
            returned.
        batch: tensors of static shape.
        first_example: int64 scalar, the place of the batch's first example in the global batch.
        micro_batch_size: examples at a time; divides the examples of the batch.
        at_once: micro-batches that may be computed at the same time. Their gradients are added in order even so.
        sum_dtype: the dtype of the result; None: the accumulation dtype.
        num_examples: int64 scalar; only this many examples, from the first on, are computed: a number of whole
            micro-batches. None: all.
    """
    examples, dtype = batch[0].shape[0], sum_dtype or accumulation_dtype(weights[0].dtype)
    if micro_batch_size == examples and num_examples is None:
        return _cast_sums(gradients_of(weights, state, batch, first_example), dtype)
    parts = [tf.reshape(part, [-1, micro_batch_size, *part.shape[1:]]) for part in batch]

    def add(i: tf.Tensor, sums: Gradients) -> tuple[tf.Tensor, Gradients]:
        inputs, targets, target_weights = (tf.gather(part, i) for part in parts)
        first = first_example + tf.cast(i * micro_batch_size, tf.int64)
        new = _cast_sums(gradients_of(weights, sums.state, (inputs, targets, target_weights), first), dtype)
        # The shapes are known. ensure_shape keeps grappler, TensorFlow's graph optimizer, from merging this addition
        # with the additions inside a gradient into one AddN. The AddN uses a temporary variable, which would be created
        # twice if two micro-batches are computed at once.
        apart = [tf.ensure_shape(gradient, gradient.shape) for gradient in new.by_weight]
        gradients = [total + gradient for total, gradient in zip(sums.by_weight, apart, strict=True)]
        return i + 1, Gradients(gradients, sums.loss_sum + new.loss_sum, sums.num_targets + new.num_targets, new.state)

    none = tf.zeros([], dtype)
    nothing = Gradients([tf.zeros_like(weight, dtype) for weight in weights], none, none, list(state))
    num_micro_batches: int | tf.Tensor = examples // micro_batch_size
    if num_examples is not None:
        num_micro_batches = tf.cast(num_examples // micro_batch_size, tf.int32)
    _, sums = tf.while_loop(lambda i, _: i < num_micro_batches, add, (0, nothing), parallel_iterations=at_once)
    return sums


def forward_backward(
    model: keras.Model,
    weights: Sequence[tf.Tensor],
    state: Sequence[tf.Tensor],
    batch: Batch,
    draw: DropoutDraw | None,
    loss_scale: tf.Tensor | None = None,
    z_loss: float = 0.0,
    ops: Ops = PLAIN,
    held: Held | None = None,
) -> Gradients:
    """Computes the loss sum of a batch and its gradients: a function of tensors, which reads no variable.

    Args:
        model: a GPT, or any Keras model from int32 [batch, sequence] to logits [batch, sequence, vocabulary].
        weights: values for model.trainable_variables; or what held makes these of.
        state: values for model.non_trainable_variables.
        batch: inputs int32, targets int32 and weights float32, each [batch, sequence].
        draw: what the dropout masks depend on; None drops nothing.
        loss_scale: scalar that multiplies the gradients.
        z_loss: see `next_token_loss`.
        ops: the GPT's way of computing.
        held: how the GPT's layers get their weights, made of weights; None: weights are whole.

    Raises:
        ValueError: a weight has no influence on the loss.
    """
    inputs, targets, target_weights = batch
    values = [] if held is not None else [*zip(model.trainable_variables, weights, strict=True)]
    values += zip(model.non_trainable_variables, state, strict=True)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        with keras.StatelessScope(state_mapping=values) as scope:
            loss_sum, num_targets = adapt(model, held or WHOLE).training_loss(
                inputs, targets, target_weights, draw, loss_scale, z_loss, ops
            )
    gradients = tape.gradient(loss_sum, weights)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"{variable.path} has no influence on the loss: the model never uses it.")
    # The gradient of an embedding comes as slices. Everything after this adds and scales dense tensors.
    dense = [tf.convert_to_tensor(gradient) for gradient in gradients]
    new_state = [scope.get_current_value(variable) for variable in model.non_trainable_variables]
    return Gradients(dense, loss_sum, num_targets, new_state)


def mean_and_clip(
    gradients: Sequence[tf.Tensor],
    num_targets: tf.Tensor,
    clip_norm: float | None,
    loss_scale: tf.Tensor | None = None,
    norm_of_sums: tf.Tensor | None = None,
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Divides summed gradients by the number of targets, and by the loss scale if there is one, and scales them down to
    a global norm of at most clip_norm.

    Args:
        gradients: sums, all of one dtype.
        num_targets: scalar.
        clip_norm: None: they are not scaled down.
        loss_scale: scalar.
        norm_of_sums: the global norm of the sums, if gradients are only pieces of them; None: that of gradients.

    Returns:
        (gradients, the global norm of the mean before clipping). Each gradient is scaled once, by one number.
    """
    count = tf.maximum(num_targets, 1) * (1 if loss_scale is None else tf.cast(loss_scale, num_targets.dtype))
    norm = tf.linalg.global_norm(gradients) if norm_of_sums is None else tf.cast(norm_of_sums, gradients[0].dtype)
    norm /= tf.cast(count, gradients[0].dtype)
    scale = 1 / tf.cast(count, norm.dtype)
    if clip_norm is not None:
        scale *= tf.minimum(tf.ones([], norm.dtype), tf.constant(clip_norm, norm.dtype) / norm)
    return [gradient * tf.cast(scale, gradient.dtype) for gradient in gradients], norm


def _check_model(config: Config, model: keras.Model, strategy: tf.distribute.Strategy) -> None:
    if model.non_trainable_variables and strategy.num_replicas_in_sync > 1:
        names = ", ".join(variable.path for variable in model.non_trainable_variables[:3])
        raise UserError(
            f"The model has variables that are not trained ({names}), and every replica would have its own. Leave out "
            "layers such as BatchNormalization and Dropout, or use one device."
        )
    check_can_shard(config, adapt(model).is_gpt)
    if config.train.recompute in ("attention", "blocks") and not adapt(model).is_gpt:
        raise UserError(
            f"train.recompute={config.train.recompute!r} works only with trainer's own GPT, and this is another model; "
            "leave it out."
        )


def _timed_next(batches: tf.data.Iterator) -> tuple[Batch, tf.Tensor]:
    """Returns the next batch, and the seconds spent waiting for it."""
    wait_started = tf.timestamp()
    with tf.control_dependencies([wait_started]):
        batch = next(batches)
    with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
        return batch, tf.timestamp() - wait_started


def _cast_sums(sums: Gradients, dtype: tf.DType) -> Gradients:
    weights = [tf.cast(gradient, dtype) for gradient in sums.by_weight]
    return Gradients(weights, tf.cast(sums.loss_sum, dtype), tf.cast(sums.num_targets, dtype), sums.state)
