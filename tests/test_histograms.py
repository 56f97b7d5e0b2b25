"""Histograms of weights and gradients: what they count, and that they change nothing."""

import numpy as np
import pytest
import tensorflow as tf
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.distributed.strategy import make_strategy
from trainer.model.gpt import GPT
from trainer.training.histograms import BUCKETS, Histograms, _counts
from trainer.training.step import TrainingStep

VOCABULARY = 17


def make_step(precision):
    config = tiny_config(
        model={"dropout": 0.1},
        train={"precision": precision, "total_steps": 9, "global_batch_size": 4, "sequence_length": 6},
    )
    strategy = make_strategy(config.distribution)
    with strategy.scope():
        model = GPT(config.model, VOCABULARY, 6, dtype=precision, bos_id=2)
    for i, variable in enumerate(model.trainable_variables):  # The same in each precision.
        variable.assign(np.random.default_rng(i).normal(0, 0.3, variable.shape))
    return TrainingStep(config, 9, model, strategy)


def batches_from(first):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (9, 4, 6)).astype(np.int32)
    weights = (tokens % 5 > 0).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((tokens, np.roll(tokens, -1, axis=2), weights)).skip(first)


def take(step, first, num_steps):
    step.run_steps(iter(batches_from(first)), tf.constant(num_steps, tf.int64))


def bits(step):
    variables = [*step.named_variables.values(), *step.state().values(), step.step]
    return [np.array(variable.numpy()).tobytes() for variable in variables]


@pytest.fixture(scope="module")
def watched():
    """The histograms after two steps, and the step, which took two more after them."""
    step = make_step("float32")
    histograms = Histograms(step, batches_from)
    take(step, 0, 2)
    before = bits(step)
    weights = {name: np.array(variable.numpy()) for name, variable in step.named_variables.items()}
    found = histograms.at(2)
    assert bits(step) == before
    moments = [np.array(each.numpy()) for each in step.optimizer.first_moments]
    take(step, 2, 1)
    beta = step.optimizer.config.beta_1
    after = [np.array(each.numpy()) for each in step.optimizer.first_moments]
    gradients = {
        name: (new - beta * old) / (1 - beta)
        for name, new, old in zip(step.named_variables, after, moments, strict=True)
    }
    take(step, 3, 1)
    return step, found, weights, gradients


def test_a_run_with_histograms_has_the_bits_of_one_without(watched):
    plain = make_step("float32")
    take(plain, 0, 4)
    assert bits(plain) == bits(watched[0])


def test_histograms_count_the_weights_and_the_gradients_of_the_next_step(watched):
    _, found, weights, gradients = watched
    values = {f"weights/{n}": v for n, v in weights.items()} | {
        f"weight_gradients/{n}": v for n, v in gradients.items()
    }
    assert found.keys() == values.keys()
    for name, value in values.items():
        # The gradients come from the change of Adam's first moment: float32 leaves about six digits of them.
        np.testing.assert_allclose(
            [found[name].low, found[name].high], [value.min(), value.max()], rtol=1e-4, atol=1e-8
        )
        ends = (found[name].low, found[name].high)
        counts, _ = np.histogram(np.clip(value, *ends), BUCKETS, ends)
        assert found[name].counts.sum() == value.size
        assert np.abs(found[name].counts.cumsum() - counts.cumsum()).max() <= max(1, 0.01 * value.size), name


def test_gradients_are_those_without_the_loss_scale(watched):
    half = make_step("mixed_float16")
    take(half, 0, 2)
    found = Histograms(half, batches_from).at(2)
    for name, histogram in found.items():
        if name.endswith("kernel"):
            expected = watched[1][name]
            assert histogram.high - histogram.low == pytest.approx(expected.high - expected.low, rel=0.05), name


def test_values_that_are_not_finite_have_no_histogram():
    step = make_step("float32")
    step.model.trainable_variables[0].assign(np.full(step.model.trainable_variables[0].shape, np.inf))
    found = Histograms(step, batches_from).at(0)
    broken = next(iter(step.named_variables))
    assert f"weights/{broken}" not in found and not any(name.startswith("weight_gradients/") for name in found)
    assert len(found) == len(step.model.trainable_variables) - 1


@pytest.mark.parametrize("values", [[3.0], [1.0] * 5, [0.0, 1.0], list(range(300))])
def test_every_value_is_counted_once(values):
    lows, highs, belows = _counts([tf.constant(values, tf.float32)])
    counts = np.diff(belows.numpy()[0])
    assert (lows[0], highs[0], counts.sum(), len(counts)) == (min(values), max(values), len(values), BUCKETS)
    if len(values) == 300:
        assert counts.tolist() == [10] * BUCKETS
