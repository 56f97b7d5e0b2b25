"""Laws of the average of the weights: NumPy is the reference."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.optimizers.average import ETA, WeightAverage

DECAY = 0.9


def average_of(weights: list[np.ndarray], decay: float) -> np.ndarray:
    """The average of the weights after the updates 1, 2, ...: the docstring of WeightAverage, in their dtype."""
    average = np.zeros_like(weights[0])
    for t, newest in enumerate(weights, 1):
        average = average + np.asarray(max(1 - decay, (ETA + 1) / (t + ETA)), newest.dtype) * (newest - average)
    return average


@pytest.fixture
def weights() -> dict[str, keras.Variable]:
    return {"a/kernel": keras.Variable(np.full([2, 3], 100.0), dtype="float64", name="kernel")}


@pytest.mark.parametrize("jit_compile", [False, True])
def test_equals_numpy_and_forgets_the_initial_weights(weights: dict[str, keras.Variable], jit_compile: bool):
    average = WeightAverage(DECAY, weights)
    average.begin()
    np.testing.assert_array_equal(average.averages[0].numpy(), np.full([2, 3], 100.0))
    update = tf.function(average.update, jit_compile=jit_compile, autograph=False)
    random, seen = np.random.default_rng(0), []
    # After 82 updates the decay is the smaller limit.
    for t in range(1, 100):
        seen.append(random.normal(size=[2, 3]))
        weights["a/kernel"].assign(seen[-1])
        update()
        if t in (1, 2, 10, 99):
            np.testing.assert_allclose(average.averages[0].numpy(), average_of(seen, DECAY), rtol=0, atol=1e-14)
    assert {name: variable.shape for name, variable in average.state().items()} == {
        "num_averaged": [],
        "a/kernel/average": [2, 3],
    }


def test_the_model_has_the_average_for_a_while_and_then_its_own_bits_again(weights: dict[str, keras.Variable]):
    average = WeightAverage(DECAY, weights)
    own, other = np.pi * np.arange(6.0).reshape(2, 3), np.e * np.arange(6.0).reshape(2, 3)
    weights["a/kernel"].assign(own)
    average.averages[0].assign(other)
    with pytest.raises(KeyError), average.in_the_model():
        np.testing.assert_array_equal(weights["a/kernel"].numpy(), other)
        raise KeyError
    assert weights["a/kernel"].numpy().tobytes() == own.tobytes()
    assert average.averages[0].numpy().tobytes() == other.tobytes()
