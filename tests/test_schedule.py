"""Laws of the learning-rate schedule."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from trainer.config.file import make_config
from trainer.config.schedule import can_extend, learning_rate
from trainer.config.settings import OptimizerConfig
from trainer.errors import UserError


def rates(total_steps, **settings):
    config = OptimizerConfig(**settings)
    return [float(learning_rate(config, step, total_steps)) for step in range(total_steps)]


def test_constant_rate_is_the_same_at_every_step():
    assert rates(5, learning_rate=0.5) == [0.5] * 5


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [1, 2, 4])
def test_warmup_rises_linearly_and_its_last_step_has_the_peak(schedule, warmup_steps):
    values = rates(20, learning_rate=1.0, schedule=schedule, warmup_steps=warmup_steps)
    expected = [(step + 1) / warmup_steps for step in range(warmup_steps)]
    assert values[:warmup_steps] == pytest.approx(expected, rel=1e-12)
    assert max(values) == values[warmup_steps - 1] == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_length_and_warm_up_that_a_config_allows_ends_at_the_final_rate(schedule):
    num_refused = 0
    for total_steps, warmup_steps in itertools.product(range(1, 6), range(7)):
        settings = {
            "run_folder": "unused",
            "train": {"precision": "float32", "total_steps": total_steps},
            "optimizer": {"schedule": schedule, "warmup_steps": warmup_steps, "final_learning_rate": 1e-4},
        }
        try:
            config = make_config(settings).optimizer
        except UserError:
            assert max(1, warmup_steps) >= total_steps
            num_refused += 1
            continue
        values = [float(learning_rate(config, step, total_steps)) for step in range(total_steps)]
        assert values[-1] == pytest.approx(1e-4, rel=1e-12)
        assert max(values) == values[max(1, warmup_steps) - 1] == config.learning_rate
    assert num_refused == 7 + 5 + 4 + 3 + 2


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_last_step_has_the_final_rate(schedule):
    values = rates(11, learning_rate=1.0, final_learning_rate=0.2, schedule=schedule)
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.6, rel=1e-12)
    assert values[-1] == pytest.approx(0.2, rel=1e-12)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("settings", "step", "allowed"),
    [
        ({"schedule": "constant"}, 20, True),
        ({"schedule": "constant", "warmup_steps": 15}, 20, True),
        ({"schedule": "linear", "warmup_steps": 15}, 15, True),
        ({"schedule": "linear", "warmup_steps": 15}, 16, False),
        ({"schedule": "cosine"}, 0, True),
        ({"schedule": "cosine"}, 1, True),
        ({"schedule": "cosine"}, 2, False),
    ],
)
def test_a_run_may_get_longer_as_long_as_all_its_rates_are_those_of_the_longer_run(settings, step, allowed):
    config = OptimizerConfig(**settings)
    assert can_extend(config, 20, 30, step) == can_extend(config, 30, 20, step) == allowed
    same = [float(learning_rate(config, i, 20)) == float(learning_rate(config, i, 30)) for i in range(step)]
    assert all(same) == allowed
    assert can_extend(config, 20, 20, step)


def test_the_rate_that_is_checked_is_the_rate_that_trains():
    for schedule in ("constant", "linear", "cosine"):
        config = OptimizerConfig(schedule=schedule, warmup_steps=7)
        steps = np.arange(50, dtype=np.float64)
        np.testing.assert_allclose(
            learning_rate(config, steps, 50), learning_rate(config, tf.constant(steps), 50, tf), rtol=1e-14
        )


def test_cosine_follows_its_formula():
    values = rates(5, learning_rate=1.0, schedule="cosine")
    assert values == pytest.approx([1.0, 0.853553390593, 0.5, 0.146446609407, 0.0], abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_has_a_rate(schedule):
    assert rates(1, learning_rate=1.0, schedule=schedule, warmup_steps=1) == [1.0]
