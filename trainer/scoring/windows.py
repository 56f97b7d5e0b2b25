"""How the tokens of texts become windows that a model can read, and windows become batches. NumPy, and no model.

A text is read as `[BOS] token token ...`: the token at place i predicts the one at place i + 1, its target. A text with
n targets has its tokens at places 0 to n. A model reads at most sequence_length tokens at once.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# The tokens that a replica reads at a time, padding included.
TOKENS_PER_BATCH = 1 << 13
# No batch is narrower: a graph is traced for each width.
_LEAST_WIDTH = 16


class Window(NamedTuple):
    """What a model reads of a text at once.

    Attributes:
        text: the number of the text.
        start: the place of the first token that is read.
        first: the place of the first token whose target is scored; the tokens before it are context.
        end: the place after the last token that is read.
    """

    text: int
    start: int
    first: int
    end: int

    @property
    def length(self) -> int:
        """The number of tokens that are read."""
        return self.end - self.start


def windows_of(text: int, first: int, num_targets: int, sequence_length: int, stride: int) -> Iterator[Window]:
    """Yields the windows that score each target of a text once, from a place on.

    The first window is as long as the model can read. Each window after it scores the next stride targets, or what is
    left of the text, and reads as many tokens before them as fit.

    Args:
        text: the number of the text.
        first: the place of the first token whose target is scored; 0 for the whole text.
        num_targets: the place of the text's last target.
        sequence_length: the most tokens that the model can read.
        stride: the most targets that a window after the first scores, at most sequence_length.

    Source: the windows of get_rolling_token_windows in the lm-evaluation-harness, whose context_len is
    sequence_length - stride + 1.
    """
    done = first
    while done < num_targets:
        end = min(max(done + stride, sequence_length), num_targets)
        yield Window(text, max(end - sequence_length, 0), done, end)
        done = end


class Batch(NamedTuple):
    """Windows that are computed together, a window in each row. Rows without a window are padding.

    Attributes:
        windows: the windows; there can be fewer than rows.
        inputs: the tokens that are read, int32 [rows, width].
        targets: the tokens that follow them, int32 [rows, width].
        weights: 1 if a target is scored, otherwise 0, float32 [rows, width].
    """

    windows: Sequence[Window]
    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def batches_of(
    windows: Sequence[Window],
    tokens: Sequence[np.ndarray],
    sequence_length: int,
    num_replicas: int,
    tokens_per_batch: int,
) -> Iterator[Batch]:
    """Yields batches that hold each window once, the longest windows first.

    Args:
        windows: the windows.
        tokens: the tokens of each text, [BOS] included, int32 [num_targets + 1].
        sequence_length: the most tokens that the model can read.
        num_replicas: the number of replicas that share a batch; the rows are a multiple of it.
        tokens_per_batch: the most tokens that a replica gets, padding included, unless one window is longer.
    """
    left = sorted(windows, key=lambda window: window.length, reverse=True)
    while left:
        width = _padded(left[0].length, sequence_length)
        # Equal batches, and no more rows than are needed: the fewer shapes, the fewer graphs are traced.
        rows = min(max(1, tokens_per_batch // width), -(-len(left) // num_replicas)) * num_replicas
        batch, left = left[:rows], left[rows:]
        inputs, targets = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
        weights = np.zeros((rows, width), np.float32)
        for row, window in enumerate(batch):
            read = tokens[window.text][window.start : window.end + 1]
            inputs[row, : window.length], targets[row, : window.length] = read[:-1], read[1:]
            weights[row, window.first - window.start : window.length] = 1
        yield Batch(batch, inputs, targets, weights)


def _padded(length: int, sequence_length: int) -> int:
    """Returns the width of a batch whose longest window has this length: a power of two, or one and a half."""
    width = _LEAST_WIDTH
    while width < length:
        width += width // 2 if width & (width - 1) == 0 else width // 3
    return min(width, sequence_length)
