"""What a training run reports, and `Sink`, the form of everything that receives it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from trainer.runs.results import Evaluation


class Place(NamedTuple):
    """How far a run has come.

    Attributes:
        step: the steps that were taken.
        total_steps: the number of steps of the run.
        epochs: the epochs that are done; None if the run has no epochs.
        num_epochs: the number of epochs of the run.
    """

    step: int
    total_steps: int
    epochs: float | None
    num_epochs: float

    def __str__(self) -> str:
        return f"step {self.step}/{self.total_steps}  {self.epoch()}".rstrip()

    def epoch(self) -> str:
        """Returns the epoch as the beginning of a line; empty if the run has no epochs."""
        return "" if self.epochs is None else f"epoch {self.epochs:.2f}/{self.num_epochs:g}  "


class Interval(NamedTuple):
    """The steps since the last report.

    Skipped steps count only in num_steps, in num_skipped and in all times.

    Attributes:
        num_steps: the steps that were taken.
        num_skipped: how many of them were skipped.
        loss: nats per token; None if no applied step has predicted a token.
        grad_norm: the mean norm of the gradients before clipping; None if no step was applied.
        clip_rate: the share of the steps whose gradients were clipped; None if no step was applied.
        input_share: the share of the steps' time that was spent waiting for batches.
        tokens_per_sec_in_steps: the predicted tokens, without padding, by the time of the steps.
        tokens_per_sec_overall: the same tokens by all the time since the last report, with saving, scoring and samples.
        learning_rate: the learning rate of the last step.
        loss_scale: the loss scale after the last step; None if train.precision is not "mixed_float16".
    """

    num_steps: int
    num_skipped: int
    loss: float | None
    grad_norm: float | None
    clip_rate: float | None
    input_share: float
    tokens_per_sec_in_steps: float
    tokens_per_sec_overall: float
    learning_rate: float
    loss_scale: float | None = None


class Histogram(NamedTuple):
    """How often values are in buckets of the same width.

    Attributes:
        low: the lowest value.
        high: the highest value.
        counts: int [buckets], the values in each bucket from low to high.
    """

    low: float
    high: float
    counts: np.ndarray


class Sink:
    """Receives what a run reports. A method does nothing unless a subclass overrides it.

    `values` are the figures of a report by the name of their curve (tags.py), without those that are unknown.
    """

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Is entered when the run begins to train, and left when it ends, also by an error."""
        yield

    @contextlib.contextmanager
    def doing(self, place: Place, what: str) -> Iterator[None]:
        """Is entered while the run does something other than train: what is "saving", "evaluating" or "sampling"."""
        yield

    def part(self, what: str, done: int, total: int | None) -> None:
        """Receives how much of what `doing` names is done, and of how much; None: unknown. Called often."""

    def advance(self, place: Place) -> None:
        """Receives the place after each call of the compiled loop."""

    def interval(self, place: Place, interval: Interval, values: Mapping[str, float]) -> None:
        """Receives the steps since the last report."""

    def evaluation(self, place: Place, evaluation: Evaluation, values: Mapping[str, float]) -> None:
        """Receives a score on the validation text."""

    def checkpoint(self, place: Place, folder: str) -> None:
        """Receives the folder of a checkpoint that is whole; place is that of the checkpoint."""

    def histograms(self, place: Place, histograms: Mapping[str, Histogram]) -> None:
        """Receives the histograms of weights and gradients, by their tags."""

    def samples(self, place: Place, samples: Mapping[str, str]) -> None:
        """Receives the samples, by the decoder that wrote them."""
