"""The learning rate as a function of the step, and when a run may become longer or shorter."""

import math
from typing import Any

import numpy as np

from trainer.config.settings import OptimizerConfig

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
