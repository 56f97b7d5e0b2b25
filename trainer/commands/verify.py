"""Verifies on this machine that a config gives the same model on any number of replicas."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.config.settings import (
    Config,
    DistributionConfig,
    check_shard,
    divisor_of_shares,
    examples_per_replica,
)
from trainer.data.batches import total_steps, training_batches
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData
from trainer.distributed.strategy import distributed, make_strategy
from trainer.errors import UserError
from trainer.model.build import build_gpt
from trainer.model.held import without_values
from trainer.system.process import call_in_new_process
from trainer.training.step import TrainingStep

# The largest |a - b| / |a| that rounding explains: with other numbers of replicas, sums are made in another order.
TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "mixed_bfloat16": 1e-2, "mixed_float16": 1e-2}


class Trace(NamedTuple):
    """The results of some steps.

    Attributes:
        losses: the loss of each step that was not skipped.
        grad_norms: the gradient norm of each of these steps.
        weights: all weights after the last step, as one vector.
    """

    losses: np.ndarray
    grad_norms: np.ndarray
    weights: np.ndarray


class Difference(NamedTuple):
    """The largest relative differences between two traces.

    Attributes:
        loss: the difference between their losses.
        grad_norm: the difference between their gradient norms.
        weights: the difference between their weights.
    """

    loss: float
    grad_norm: float
    weights: float


def verify(config: Config, replicas: Sequence[int], num_steps: int = 5, say: Callable[[str], None] = print) -> bool:
    """Trains the first steps of a config on each number of replicas, and compares the results.

    The replicas are GPUs if distribution.kind is "gpu" or distribution.gpus names some, otherwise parts of the CPU.
    Each number is trained in a new process. All use the same micro-batches, so on a CPU they make the same bits after
    any number of steps; with distribution.shard, which splits the norm of the gradients over them, up to rounding.

    train.micro_batch_size="auto" is treated like no setting.

    Args:
        config: the configuration, whose data, model and precision are used.
        replicas: the numbers of replicas; the first is compared with each of the others.
        num_steps: the number of steps to train.
        say: prints a line.

    Returns:
        Whether rounding explains all differences.

    Raises:
        UserError: fewer than two numbers are given, a batch cannot be spread over that many replicas,
            distribution.shard_over does not divide them, too few GPUs are named, or the text cannot be used.
    """
    if len(replicas) < 2:
        raise UserError(f"verify compares numbers of replicas, and {list(replicas)} names fewer than two; give more.")
    distributions = [distribution_of(config.distribution, num_replicas) for num_replicas in replicas]
    for num_replicas in replicas:
        examples_per_replica(config, num_replicas)
        if num_replicas > 1:  # One splits nothing.
            check_shard(config, num_replicas)
    divisors = [divisor_of_shares(config, num_replicas) for num_replicas in replicas]
    micro_batch_size = config.train.fixed_micro_batch_size() or math.gcd(*divisors)
    config = config.with_micro_batch_size(micro_batch_size)
    prepared = prepare(config, say)
    say(
        f"{num_steps} steps of {config.train.global_batch_size} examples, {micro_batch_size} at a time, "
        f"{config.train.precision}:"
    )
    reference: Trace | None = None
    worst, tolerance = 0.0, TOLERANCE[config.train.precision]
    for num_replicas, distribution in zip(replicas, distributions, strict=True):
        trace = call_in_new_process(take_steps, config, prepared, distribution, num_steps)
        reference = reference or trace
        found = difference(trace, reference)
        worst = max(worst, *found)
        say(_describe(num_replicas, trace, found))
    say(_verdict(worst, tolerance))
    return worst <= tolerance


def _describe(num_replicas: int, trace: Trace, found: Difference) -> str:
    not_finite = ", ".join(names_not_finite(trace))
    return (
        f"  {num_replicas} replica{'s' if num_replicas > 1 else ''}: loss {trace.losses[-1]:.6f}; differs by "
        f"{found.loss:.1e} in loss, {found.grad_norm:.1e} in gradient norm, {found.weights:.1e} in all weights"
        f"{f'; NOT FINITE: {not_finite}' if not_finite else ''}"
    )


def _verdict(worst: float, tolerance: float) -> str:
    verdict = "the same model" if worst <= tolerance else "NOT the same model"
    if worst == 0:
        return f"{verdict}, to the last bit."
    if math.isinf(worst):
        return f"{verdict}: the lines above have numbers that are not finite, or different steps were skipped."
    return f"{verdict}: the largest relative difference is {worst:.1e}, and rounding explains {tolerance:.0e}."


def distribution_of(config: DistributionConfig, num_replicas: int) -> DistributionConfig:
    """Returns the settings for this many replicas: the first GPUs that config uses, or parts of the CPU. Several
    replicas split what config splits.

    Raises:
        UserError: the config names fewer GPUs.
    """
    split = {"shard": config.shard, "shard_over": config.shard_over} if num_replicas > 1 else {}
    if config.kind != "gpu" and config.gpus is None:
        return DistributionConfig(kind="cpu", logical_devices=num_replicas, **split)
    gpus = config.gpus or tuple(range(num_replicas))
    if num_replicas > len(gpus):
        raise UserError(
            f"--replicas {num_replicas} is more than the GPUs of distribution.gpus={list(gpus)}; name more, or leave "
            "it out to use the first GPUs of the machine."
        )
    return DistributionConfig(kind="gpu", gpus=gpus[:num_replicas], **split)


def take_steps(config: Config, prepared: PreparedData, distribution: DistributionConfig, num_steps: int) -> Trace:
    """Takes the first steps of a config on these devices, in this process."""
    strategy = make_strategy(distribution)
    config = config.model_copy(update={"distribution": distribution})
    in_pieces = distribution.shard == "weights"
    with strategy.scope(), without_values() if in_pieces else contextlib.nullcontext():
        model = build_gpt(config, prepared.vocabulary_size, prepared.bos_id)
    # The rates of the run's own first steps: a decay over the last ones would make these few steps change nothing.
    length = max(num_steps, total_steps(prepared, config))
    training_step = TrainingStep(config, length, model, strategy)
    data = distributed(strategy, lambda share: training_batches(prepared, config, 0, num_steps, share))
    batches, one = iter(data), tf.constant(1, tf.int64)
    metrics = [training_step.run_steps(batches, one) for _ in range(num_steps)]
    # The first steps of a float16 run overflow and are skipped, until the loss scale is low enough.
    metrics = [each for each in metrics if not int(each.num_skipped)]
    if not metrics:
        raise UserError(f"--steps {num_steps}: the loss or gradient of every step was not finite; take more steps.")
    return Trace(
        np.array([float(m.loss_sum) / max(1.0, float(m.num_targets)) for m in metrics]),
        np.array([float(m.grad_norm_sum) for m in metrics]),
        np.concatenate([np.ravel(variable.numpy()) for variable in training_step.named_variables.values()]),
    )


def names_not_finite(trace: Trace) -> list[str]:
    """Returns the fields of a trace that hold a number that is NaN or infinite."""
    return [name for name, values in trace._asdict().items() if not np.isfinite(values).all()]


def difference(trace: Trace, reference: Trace) -> Difference:
    """Compares two traces. A difference is infinite if a number that it depends on is NaN or infinite, or if the two
    have skipped different numbers of steps: such traces are never equal.
    """
    if trace.losses.shape != reference.losses.shape:
        return Difference(math.inf, math.inf, math.inf)
    return Difference(
        _relative(np.abs, trace.losses, reference.losses),
        _relative(np.abs, trace.grad_norms, reference.grad_norms),
        _relative(np.linalg.norm, trace.weights, reference.weights),
    )


def _relative(size: Callable[[np.ndarray], Any], found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest of size(found - expected) / size(expected)."""
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return math.inf
    # In float64, so that the squares of float32 weights do not overflow.
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        apart = size(found - expected)
        # If both numbers are 0 they differ by 0; a division would return NaN.
        relative = np.divide(apart, size(expected), out=np.zeros_like(apart), where=apart != 0)
    largest = float(np.max(relative))
    return math.inf if math.isnan(largest) else largest
