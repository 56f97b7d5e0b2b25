"""The learning rate as a function of the step, and when a run may become longer or shorter."""

import math
from typing import Any

import numpy as np

from trainer.config.settings import OptimizerConfig

_STEPS_AT_A_TIME = 1_000_000


def learning_rate(config: OptimizerConfig, step: Any, total_steps: int, xp: Any = np) -> Any:
    """Returns the learning rate of a step, float64 of the shape of step.

    It rises linearly during the warm-up: step warmup_steps - 1 is the first with the full rate. Then it follows the
    schedule down to final_learning_rate, which is the rate of step total_steps - 1.

    Args:
        config: the rate's peak, end, warm-up and shape.
        step: float64, of any shape; the first step is 0.
        total_steps: the number of steps of the whole run.
        xp: the module that computes: numpy, or tensorflow if step is a tensor.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    warmup = xp.minimum((step + 1) / max(1, config.warmup_steps), 1.0)
    first = max(0, config.warmup_steps - 1)
    progress = xp.maximum(xp.minimum((step - first) / max(1, total_steps - 1 - first), 1.0), 0.0)
    if config.schedule == "constant":
        return warmup * peak
    if config.schedule == "linear":
        share = 1 - progress
    else:
        # Loshchilov and Hutter 2017, equation 5, without restarts.
        share = (1 + xp.cos(math.pi * progress)) / 2
    return warmup * (final + (peak - final) * share)


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
