"""Lowers a config's training step to the program that a TPU's or GPU's compiler reads, on any machine."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from trainer.config.file import load_config
from trainer.config.settings import Config, check_shard, divisor_of_shares, num_pieces
from trainer.distributed.collectives import XlaCollectives
from trainer.distributed.strategy import make_strategy
from trainer.errors import UserError
from trainer.execution import resolve
from trainer.hardware.devices import Target, parse_target
from trainer.model.build import build_gpt
from trainer.model.held import without_values
from trainer.optimizers.replicas import Replicas
from trainer.training.step import TrainingStep


class TracedStep(NamedTuple):
    """One replica's whole step, traced for several replicas.

    Attributes:
        training_step: the model, its optimizer and the counters, whose variables the program takes and changes.
        take_step: the step as a function of inputs, targets and weights, compiled as a whole.
        specs: the shapes and dtypes of these three.
    """

    training_step: TrainingStep
    take_step: tf.types.experimental.PolymorphicFunction
    specs: list[tf.TensorSpec]


def lower_step(config: Config, vocabulary_size: int, target: Target) -> bytes:
    """Returns one replica's whole step (forward, backward, clip and update) as a serialized XLA HloModuleProto.

    The program sums over all replicas of the target, and exchanges with them what distribution.shard splits.

    Args:
        config: the run's configuration.
        vocabulary_size: number of tokens.
        target: the devices to lower for, with one replica on each.

    Raises:
        UserError: the batch cannot be spread over that many replicas, there is only one to split over, or
            train.micro_batch_size is not a number.
    """
    in_pieces = config.distribution.shard == "weights"
    with tf.variable_creator_scope(_unwritten) if in_pieces else contextlib.nullcontext():
        step = trace_step(config, vocabulary_size, target)
    hlo: bytes = step.take_step.experimental_get_compiler_ir(*step.specs)(stage="hlo_serialized")
    return hlo


def _unwritten(next_creator: Callable[..., tf.Variable], **options: Any) -> tf.Variable:
    """Creates a variable whose memory nobody has written, so that the system gives it none: a step that is only lowered
    reads no values, and the pieces of a large model would fill this machine.
    """
    value = options["initial_value"]
    shape_and_dtype = tf.convert_to_tensor(value() if callable(value) else value, options.get("dtype"))
    options["initial_value"] = tf.raw_ops.Empty(shape=shape_and_dtype.shape, dtype=shape_and_dtype.dtype)
    return next_creator(**options)


def trace_step(config: Config, vocabulary_size: int, target: Target) -> TracedStep:
    """Returns the step that `lower_step` lowers; see there."""
    train = config.train
    in_pieces = config.distribution.shard == "weights"
    # XLA compiles the whole step here, whatever train.xla is.
    compiled = config.model_copy(update={"train": train.model_copy(update={"xla": "on"})})
    execution = resolve(compiled, target.processor(), target.num_devices)
    if train.micro_batch_size == "auto":
        raise UserError(
            "train.micro_batch_size='auto' is found on the device itself; give the number to compile for, such as "
            f"train.micro_batch_size={divisor_of_shares(config, target.num_devices)}."
        )
    check_shard(config, target.num_devices)
    strategy = make_strategy(config.distribution.model_copy(update={"kind": "cpu", "gpus": None}))
    with strategy.scope(), without_values() if in_pieces else contextlib.nullcontext():
        # The number of the [BOS] token makes no difference to what the program costs.
        model = build_gpt(config, vocabulary_size, bos_id=0)
    collectives = _CollectivesOfMany(target.num_devices, num_pieces(config, target.num_devices))
    training_step = _StepOfMany(config, train.total_steps or 1, model, strategy, execution, collectives)
    training_step.num_replicas = target.num_devices

    @tf.function(autograph=False, jit_compile=True)
    def take_step(inputs: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return training_step.take_step_on_replica((inputs, targets, weights), tf.constant(False))

    shape = [execution.examples, train.sequence_length]
    specs = [tf.TensorSpec(shape, dtype) for dtype in (tf.int32, tf.int32, tf.float32)]
    return TracedStep(training_step, take_step, specs)


class _CollectivesOfMany(XlaCollectives):
    """Those of one of several replicas, none of which is here to be asked for its place."""

    def places_of_this_process(self, strategy: tf.distribute.Strategy) -> list[int]:
        return []


class _StepOfMany(TrainingStep):
    """The step of one of several replicas, although the strategy that lowers it has only one replica.

    Every replica takes its examples for the first ones of the batch. That changes dropout masks and the batch's hash,
    but nothing that a compiler reports.
    """

    num_replicas = 1

    def replicas(self, replica: tf.distribute.ReplicaContext) -> Replicas:
        own = super().replicas(replica)
        return (
            own
            if self.num_replicas == 1
            else own._replace(num_replicas=self.num_replicas, number=gen_xla_ops.xla_replica_id())
        )

    def sum_over_replicas(self, replica: tf.distribute.ReplicaContext, summands: list[tf.Tensor]) -> list[tf.Tensor]:
        if self.num_replicas == 1:
            return summands
        if summands[0].dtype == tf.float64:  # XlaAllReduce refuses it.
            return [XlaCollectives(self.num_replicas, self.num_replicas).all_reduce(x) for x in summands]
        groups = tf.constant([[*range(self.num_replicas)]], tf.int32)
        return [gen_xla_ops.xla_all_reduce(x, groups, "Add", "CrossReplica") for x in summands]


def main() -> None:
    """Writes what `lower_step` returns: python -m trainer.planning.lower CONFIG VOCABULARY_SIZE TARGET OUT."""
    path, vocabulary_size, target, out = sys.argv[1:]
    try:
        hlo = lower_step(load_config(path), int(vocabulary_size), parse_target(target))
    except UserError as error:
        sys.exit(f"trainer: {error}")
    Path(out).write_bytes(hlo)


if __name__ == "__main__":
    main()
