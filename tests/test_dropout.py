"""Laws of dropout: a mask is a function of seed, step, layer and example."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.model.dropout import DropoutDraw, dropout


def draw(seed=0, step=0, first_example=0):
    return DropoutDraw(*(tf.cast(x, tf.int64) for x in (seed, step, first_example)))


# 15 is not a multiple of the four words that one count of the generator gives.
@pytest.mark.parametrize("row_size", [15, 16])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_example_is_masked_alike_however_the_batch_is_split(row_size, jit_compile):
    x = tf.ones([8, row_size])
    masked = tf.function(
        lambda rows, first: dropout(rows, 0.5, 3, draw(7, 11, first)), jit_compile=jit_compile, autograph=False
    )
    whole = dropout(x, 0.5, 3, draw(7, 11))
    parts = [masked(x[i : i + 2], tf.constant(i, tf.int64)) for i in range(0, 8, 2)]
    np.testing.assert_array_equal(whole, tf.concat(parts, axis=0))


def test_masks_differ_by_seed_step_layer_and_example_and_nothing_else():
    x = tf.ones([2, 64])
    masks = [
        dropout(x, 0.5, 0, draw()),
        dropout(x, 0.5, 1, draw()),
        dropout(x, 0.5, 0, draw(step=1)),
        dropout(x, 0.5, 0, draw(seed=1)),
        dropout(x, 0.5, 0, draw(first_example=2)),
    ]
    rows = [tuple(row) for mask in masks for row in mask.numpy()]
    assert len(set(rows)) == 10
    np.testing.assert_array_equal(masks[0], dropout(x, 0.5, 0, draw()))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean(rate):
    out = dropout(tf.ones([100, 1000]), rate, 0, draw()).numpy()
    # Five standard errors of the share that is dropped.
    assert abs((out == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / out.size)
    np.testing.assert_allclose(out[out > 0], 1 / (1 - rate), rtol=1e-6)
