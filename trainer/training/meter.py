"""Turns the sums that calls of the compiled loop return into rates and means."""

import time
from collections.abc import Callable

from trainer.monitoring.events import Interval
from trainer.training.step import CallMetrics


class Meter:
    """Adds up the metrics of calls until they are reported.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sums = [0.0] * len(CallMetrics._fields)
        self._secs = 0.0
        self._reported = clock()

    def add(self, metrics: CallMetrics, secs: float) -> None:
        """Adds a call that took secs seconds."""
        self._sums = [total + float(value) for total, value in zip(self._sums, metrics, strict=True)]
        self._secs += secs

    def report(self, learning_rate: float, loss_scale: float | None = None) -> Interval:
        """Returns the sums as rates and means, and starts again."""
        sums, secs = CallMetrics(*self._sums), self._secs
        self._sums, self._secs = [0.0] * len(sums), 0.0
        # The steps and the time since the last report are measured by two clocks, which may differ a little.
        overall_secs, self._reported = max(secs, self._clock() - self._reported), self._clock()
        applied = sums.num_steps - sums.num_skipped
        return Interval(
            num_steps=int(sums.num_steps),
            num_skipped=int(sums.num_skipped),
            loss=sums.loss_sum / sums.num_targets if sums.num_targets else None,
            grad_norm=sums.grad_norm_sum / applied if applied else None,
            clip_rate=sums.num_clipped / applied if applied else None,
            input_share=sums.input_secs / secs,
            tokens_per_sec_in_steps=sums.num_targets / secs,
            tokens_per_sec_overall=sums.num_targets / overall_secs,
            learning_rate=learning_rate,
            loss_scale=loss_scale,
        )
