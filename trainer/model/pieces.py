"""How weights are cut into pieces, one for each replica that holds a part of every weight. No other module cuts
weights.

A weight is read as a matrix: all axes before the last one are joined. Its rows are padded with rows of zeros to a
multiple of the number of pieces, and piece i is the i-th run of consecutive rows. A vector is cut like a matrix of one
column. Rows, because collective operations join and scatter the first axis: TPUs turn a flat vector into an all-reduce
of twice the traffic. A weight wastes fewer rows than there are pieces.

Arithmetic without TensorFlow, so that `trainer plan` answers fast. What computes takes `xp`, NumPy or TensorFlow.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]

# Pieces of several weights travel in one operation, of at most this many bytes of whole weights, or of one weight. More
# bytes need more memory for the copies that are joined; fewer make more operations.
BYTES_AT_ONCE = 1 << 23


class Cut(NamedTuple):
    """How one weight is cut.

    Attributes:
        shape: the shape of the whole weight.
        num_pieces: the number of pieces, of equal shapes.
    """

    shape: Shape
    num_pieces: int

    @property
    def num_rows(self) -> int:
        """The rows of the whole weight: of a vector its numbers, of a scalar 1."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def piece_shape(self) -> Shape:
        """The shape of each piece: [rows], or [rows, width]."""
        return (-(-self.num_rows // self.num_pieces), *self.shape[1:][-1:])

    @property
    def padded_shape(self) -> Shape:
        """The shape of all pieces one below the other."""
        rows, *width = self.piece_shape
        return (rows * self.num_pieces, *width)

    def padded(self, whole: Any, xp: Any = np) -> Any:
        """Returns a whole weight with its rows of zeros, of padded_shape."""
        matrix = xp.reshape(whole, (self.num_rows, *self.padded_shape[1:]))
        num_missing = self.padded_shape[0] - self.num_rows
        return xp.pad(matrix, [[0, num_missing], [0, 0]][: len(self.padded_shape)]) if num_missing else matrix

    def whole(self, padded: Any, xp: Any = np) -> Any:
        """Returns the whole weight of what `padded` returned, or of all pieces one below the other."""
        return xp.reshape(padded[: self.num_rows], self.shape)


def cut_all(shapes: Mapping[str, Sequence[int]], num_pieces: int) -> dict[str, Cut]:
    """Returns how each weight is cut, by its name."""
    return {name: Cut(tuple(shape), num_pieces) for name, shape in shapes.items()}


def numbers_of_pieces(shapes: Mapping[str, Sequence[int]], num_pieces: int) -> int:
    """Returns how many numbers a replica holds of all weights, with its padding."""
    return sum(math.prod(cut.piece_shape) for cut in cut_all(shapes, num_pieces).values())


def most_bytes_at_once(shapes: Mapping[str, Sequence[int]], num_pieces: int, bytes_of_number: int) -> int:
    """Returns the bytes of whole weights, with their padding, that the largest operation exchanges: more than
    BYTES_AT_ONCE if one weight has more.
    """
    cuts = list(cut_all(shapes, num_pieces).values())
    groups = travel_together(cuts, bytes_of_number)
    return max(sum(math.prod(cuts[i].padded_shape) for i in group) * bytes_of_number for group in groups)


def travel_together(cuts: Sequence[Cut], bytes_of_number: int) -> Iterator[list[int]]:
    """Yields the places of consecutive weights whose pieces travel in one operation; see BYTES_AT_ONCE."""
    group: list[int] = []
    num_bytes = 0
    for place, cut in enumerate(cuts):
        own = math.prod(cut.padded_shape) * bytes_of_number
        if group and num_bytes + own > BYTES_AT_ONCE:
            yield group
            group, num_bytes = [], 0
        group.append(place)
        num_bytes += own
    if group:
        yield group
