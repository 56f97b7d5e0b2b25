"""Laws of how weights are cut into pieces."""

import math

import numpy as np
import pytest
import tensorflow as tf

from trainer.model.pieces import BYTES_AT_ONCE, Cut, cut_all, numbers_of_pieces, travel_together

SHAPES = [(), (1,), (7,), (8,), (9,), (7, 3), (8, 3), (2, 3, 5), (1, 1, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_pieces", [1, 2, 4, 8])
def test_pieces_are_all_rows_in_turn_and_then_rows_of_zeros(shape, num_pieces):
    cut, whole = Cut(shape, num_pieces), 1 + np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    padded = cut.padded(whole)
    assert padded.shape == cut.padded_shape == (num_pieces * cut.piece_shape[0], *cut.piece_shape[1:])
    np.testing.assert_array_equal(np.ravel(padded)[: whole.size], np.ravel(whole))
    assert not np.ravel(padded)[whole.size :].any()
    # Fewer rows of zeros than there are pieces.
    assert 0 <= cut.padded_shape[0] - cut.num_rows < num_pieces
    np.testing.assert_array_equal(cut.whole(padded), whole)
    assert cut.whole(padded).shape == shape
    np.testing.assert_array_equal(cut.padded(tf.constant(whole), tf), padded)
    np.testing.assert_array_equal(cut.whole(tf.constant(padded), tf), whole)


def test_vectors_stay_vectors_and_all_else_becomes_matrices():
    # An optimizer decays weights by their number of axes.
    assert [len(Cut(shape, 2).piece_shape) for shape in SHAPES] == [1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert Cut((2, 3, 5), 4).piece_shape == (2, 5)


def test_a_replica_counts_its_padding():
    assert numbers_of_pieces({"a": (7, 3), "b": (9,), "c": (8,)}, 4) == 2 * 3 + 3 + 2
    assert list(cut_all({"a": (7, 3)}, 4)) == ["a"]


def test_pieces_travel_together_up_to_a_size_and_in_their_order():
    quarter = Cut((BYTES_AT_ONCE // 16, 1), 1)
    assert list(travel_together([quarter] * 6, 4)) == [[0, 1, 2, 3], [4, 5]]
    # A weight that is larger travels by itself.
    large = Cut((BYTES_AT_ONCE, 1), 1)
    assert list(travel_together([quarter, large, quarter, quarter], 4)) == [[0], [1], [2, 3]]
    assert list(travel_together([], 4)) == []
