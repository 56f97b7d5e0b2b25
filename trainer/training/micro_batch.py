"""Finds the micro-batch that fits the devices, by trying sizes on them before the first step."""

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

from trainer.config.settings import Config, micro_batch_sizes
from trainer.distributed.workers import Workers
from trainer.errors import UserError, quoted
from trainer.runs.run_folder import RunFolder
from trainer.training.step import TrainingStep


def settle_micro_batch(
    run: RunFolder, workers: Workers, training_step: TrainingStep, say: Callable[[str], None]
) -> Config:
    """Finds the micro-batch that fits, see `fit_micro_batch`, and sets it in the run's config, which the chief writes.

    Returns:
        The run's config with that micro-batch.

    Raises:
        UserError: one example at a time does not fit either.
    """
    fit_micro_batch(training_step, say)
    size = training_step.execution.micro_batch_size
    say(f"train.micro_batch_size='auto' comes to {size} of a replica's {training_step.execution.examples} examples.")
    run.config = run.config.with_micro_batch_size(size)
    if workers.is_chief:
        run.record_micro_batch_size(size)
    return run.config


@contextlib.contextmanager
def advising_on_memory(run: RunFolder) -> Iterator[None]:
    """Turns the error that a device has too little memory for a step into a UserError that advises what to do."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        size = run.config.train.micro_batch_size
        raise UserError(
            f"A step does not fit the device's memory with train.micro_batch_size={size}: "
            f"{error.message.splitlines()[0][:300]}. Go on with the largest that fits: "
            f"trainer train --resume {quoted(run.path)} train.micro_batch_size=auto"
        ) from error


def fit_micro_batch(training_step: TrainingStep, say: Callable[[str], None]) -> None:
    """Keeps a step's micro-batch if it fits every device of the run; otherwise lowers it to the largest that fits.

    All workers find the same size.

    Args:
        training_step: a step that is not traced yet. Its variables, which hold the optimizer's memory, keep their
            values.
        say: prints a line; called for each size that does not fit.

    Raises:
        UserError: one example at a time does not fit either.
    """
    examples = training_step.execution.examples
    allowed = micro_batch_sizes(training_step.config, training_step.strategy.num_replicas_in_sync)
    sizes = [size for size in reversed(allowed) if size <= training_step.execution.micro_batch_size]

    def fits(size: int) -> bool:
        training_step.set_micro_batch_size(size)
        is_enough = _has_memory(training_step)
        if not is_enough:
            say(f"train.micro_batch_size='auto': {size} of a replica's {examples} examples at a time do not fit.")
        return is_enough

    best = first_that_fits(sizes, fits)
    if best is None:
        raise UserError(
            "train.micro_batch_size='auto': not even one example at a time fits the device; lower "
            f"train.sequence_length={training_step.config.train.sequence_length}, make the model smaller, or use a "
            "device with more memory."
        )
    training_step.set_micro_batch_size(best)


def first_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Returns the first of falling sizes that fits, or None. All sizes below one that fits do fit.

    The first size mostly fits, so it is tried first. Then each trial, which compiles a step, halves what is left.
    """
    if fits(sizes[0]):
        return sizes[0]
    place = bisect.bisect_left(sizes, True, lo=1, key=fits)
    return sizes[place] if place < len(sizes) else None


def _has_memory(training_step: TrainingStep) -> bool:
    strategy = training_step.strategy
    shape = [training_step.execution.examples, training_step.config.train.sequence_length]

    # The batch is an argument: TensorFlow would compute what follows from a constant once, and keep it.
    @tf.function(autograph=False)
    def rehearse(*batch: tf.Tensor) -> tf.Tensor:
        return strategy.run(training_step.rehearse_on_replica, (batch,))

    def count_on_replica(failed: tf.Tensor) -> list[tf.Tensor]:
        own = tf.identity(failed)  # The sum is made on the devices of its terms, and an argument is on none of them.
        return training_step.sum_over_replicas(tf.distribute.get_replica_context(), [own])

    @tf.function(autograph=False)
    def count(failed: tf.Tensor) -> list[tf.Tensor]:
        return strategy.run(count_on_replica, (failed,))

    failed = 0.0
    batch = tf.zeros(shape, tf.int32), tf.zeros(shape, tf.int32), tf.ones(shape)
    try:
        # Traced by name: TensorFlow warns when call after call traces the same code.
        rehearse.get_concrete_function(*batch)
        done = rehearse(*batch)
        for each in strategy.experimental_local_results(done):
            each.numpy()  # Waits for the accelerator, which may still compute.
    except tf.errors.ResourceExhaustedError:
        failed = 1.0
    # If it is too much for the devices of one worker, all workers try a smaller size.
    count.get_concrete_function(tf.constant(failed))
    (total,) = count(tf.constant(failed))
    return float(strategy.experimental_local_results(total)[0]) == 0
