"""The learning rate and the batches as functions of the step, and when a run may become longer or shorter."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.config.settings import OptimizerConfig, TrainConfig

_STEPS_AT_A_TIME = 1_000_000


def learning_rate(config: OptimizerConfig, step: Any, total_steps: int, xp: Any = np) -> Any:
    """Returns the learning rate of a step, float64 of the shape of step.

    It rises linearly during the warm-up: step warmup_steps - 1 is the first with the full rate. Then it follows the
    schedule. A rate that ends at final_learning_rate has it at step total_steps - 1.

    Args:
        config: the rate's peak, end, warm-up and shape.
        step: float64, of any shape; the first step is 0.
        total_steps: the number of steps of the whole run.
        xp: the module that computes: numpy, or tensorflow if step is a tensor.

    Sources: Loshchilov and Hutter 2017, equation 5, without restarts, for cosine. Hu et al. 2024 (MiniCPM) and Hägele
    et al. 2024, for wsd and its shapes. Vaswani et al. 2017, equation 3, for inverse_sqrt; Zhai et al. 2022, for its
    decay at the end.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    warmup = xp.minimum((step + 1) / max(1, config.warmup_steps), 1.0)
    if config.schedule == "inverse_sqrt":
        peak *= xp.sqrt(config.warmup_steps / xp.maximum(step + 1, float(config.warmup_steps)))
    decay_begin = first_decay_step(config, total_steps)
    if decay_begin is None and config.schedule in ("constant", "inverse_sqrt"):
        return warmup * peak
    # The last step with the full rate, and the part of the way from there to the last step.
    first = max(0, config.warmup_steps - 1) if decay_begin is None else decay_begin - 1
    progress = xp.maximum(xp.minimum((step - first) / max(1, total_steps - 1 - first), 1.0), 0.0)
    if config.schedule == "cosine":
        share = (1 + xp.cos(math.pi * progress)) / 2
    elif config.decay_shape == "sqrt":
        share = 1 - xp.sqrt(progress)
    else:
        share = 1 - progress
    return warmup * (final + (peak - final) * share)


def first_decay_step(config: OptimizerConfig, total_steps: int) -> int | None:
    """Returns the first step of optimizer.decay_steps, which is also the number of steps before the decay; None if the
    schedule has no decay.
    """
    return None if config.decay_steps is None else total_steps - config.decay_steps


def can_extend(config: OptimizerConfig, old_total: int, new_total: int, step: int) -> bool:
    """Returns whether a run can go on as if it had had another length from the start: the rates of all steps that it
    has taken are the same with both.

    Args:
        config: the schedule.
        old_total: the number of steps of the run so far.
        new_total: the number of steps that it is to have.
        step: the steps taken so far, at most as many as each of the two.
    """
    if old_total == new_total:
        return True
    for first in range(0, step, _STEPS_AT_A_TIME):
        steps = np.arange(first, min(step, first + _STEPS_AT_A_TIME), dtype=np.float64)
        if not np.array_equal(learning_rate(config, steps, old_total), learning_rate(config, steps, new_total)):
            return False
    return True


def examples_before(train: TrainConfig, step: Any, minimum: Callable[[Any, Any], Any] = min) -> Any:
    """Returns the number of examples in all batches before a step, which is the place of the step's first example.

    Args:
        train: the batch size and its warm-up.
        step: the step; a number, or an int64 tensor of any shape.
        minimum: returns the smaller of two numbers: min, or tf.minimum if step is a tensor.
    """
    examples = step * train.global_batch_size
    sizes = train.batch_sizes()
    for end, size, next_size in zip(train.batch_warmup, sizes, sizes[1:], strict=False):
        examples -= minimum(step, end) * (next_size - size)
    return examples


def batch_size_at(train: TrainConfig, step: Any, minimum: Callable[[Any, Any], Any] = min) -> Any:
    """Returns the number of examples in the batch of a step; see `examples_before` for the arguments."""
    return examples_before(train, step + 1, minimum) - examples_before(train, step, minimum)


def full_steps_between(train: TrainConfig, step: float, later: float) -> float:
    """Returns how many steps of the full batch have the examples of the steps between two steps."""
    return float(examples_before(train, later) - examples_before(train, step)) / train.global_batch_size


def describe_batch_warmup(train: TrainConfig) -> str:
    """Returns the batch sizes before the full one for the end of a sentence; empty if there are none."""
    parts = [f"{size} examples up to step {step:,}" for step, size in train.batch_warmup.items()]
    return f", but {', '.join(parts)}" if parts else ""


def steps_for(train: TrainConfig, num_examples: int, data_offset: int = 0) -> int:
    """Returns the steps of a run: total_steps, or the fewest whose batches hold num_epochs times all examples.

    Args:
        train: the length, the batch size and its warm-up.
        num_examples: the examples of the data.
        data_offset: the place in the data at which step 0 begins; see `training_batches`.
    """
    if train.total_steps is not None:
        return train.total_steps
    assert train.num_epochs is not None  # A config has one of the two.
    steps, left = 0, num_examples * train.num_epochs - data_offset
    for end, size in train.batch_warmup.items():
        steps_of_size = min(-(-left // size), end - steps)
        steps, left = steps + steps_of_size, left - steps_of_size * size
    return steps - (-left // train.global_batch_size)
