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


# Every schedule, with the settings that it needs.
SCHEDULES = {
    "constant": {"schedule": "constant"},
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
    "wsd": {"schedule": "wsd", "decay_steps": 3},
    "wsd with sqrt": {"schedule": "wsd", "decay_steps": 3, "decay_shape": "sqrt"},
    "inverse_sqrt": {"schedule": "inverse_sqrt"},
    "inverse_sqrt with a decay": {"schedule": "inverse_sqrt", "decay_steps": 3},
}
every_schedule = pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)


@every_schedule
@pytest.mark.parametrize("warmup_steps", [1, 2, 4])
def test_warmup_rises_linearly_and_its_last_step_has_the_peak(settings, warmup_steps):
    values = rates(20, learning_rate=1.0, warmup_steps=warmup_steps, **settings)
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


def test_wsd_stays_at_its_peak_up_to_the_last_decay_steps():
    values = rates(12, learning_rate=1.0, schedule="wsd", warmup_steps=3, decay_steps=4, final_learning_rate=0.2)
    assert values[2:8] == [1.0] * 6
    assert values[8:] == pytest.approx([0.8, 0.6, 0.4, 0.2], rel=1e-12)
    sqrt = rates(12, learning_rate=1.0, schedule="wsd", warmup_steps=3, decay_steps=4, decay_shape="sqrt")
    assert sqrt[2:8] == [1.0] * 6
    assert sqrt[8:] == pytest.approx([0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0], abs=1e-12)


@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_wsd_without_a_stable_part_is_linear_to_the_bit(warmup_steps):
    shared = {"learning_rate": 0.3, "warmup_steps": warmup_steps, "final_learning_rate": 0.01}
    decay_steps = 20 - max(1, warmup_steps)
    assert rates(20, schedule="wsd", decay_steps=decay_steps, **shared) == rates(20, schedule="linear", **shared)


def test_inverse_sqrt_is_the_formula_of_its_paper_and_can_end_with_a_decay():
    number, warmup_steps = np.arange(1, 31), 6
    # Vaswani et al. 2017, equation 3, scaled to the peak.
    expected = 0.3 * warmup_steps**0.5 * np.minimum(number**-0.5, number * warmup_steps**-1.5)
    settings = {"learning_rate": 0.3, "schedule": "inverse_sqrt", "warmup_steps": warmup_steps}
    assert rates(30, **settings) == pytest.approx(expected, rel=1e-12)
    ended = expected * np.minimum(1, (29 - np.arange(30)) / 10)
    assert rates(30, **settings, decay_steps=10) == pytest.approx(ended, rel=1e-12)


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
        ({"schedule": "wsd", "decay_steps": 4}, 16, True),
        ({"schedule": "wsd", "decay_steps": 4}, 17, False),
        ({"schedule": "wsd", "decay_steps": 4, "decay_shape": "sqrt", "final_learning_rate": 3e-4}, 16, True),
        ({"schedule": "inverse_sqrt", "warmup_steps": 3}, 20, True),
        ({"schedule": "inverse_sqrt", "warmup_steps": 3, "decay_steps": 4}, 16, True),
        ({"schedule": "inverse_sqrt", "warmup_steps": 3, "decay_steps": 4}, 17, False),
    ],
)
def test_a_run_may_get_longer_as_long_as_all_its_rates_are_those_of_the_longer_run(settings, step, allowed):
    config = OptimizerConfig(**settings)
    assert can_extend(config, 20, 30, step) == can_extend(config, 30, 20, step) == allowed
    same = [float(learning_rate(config, i, 20)) == float(learning_rate(config, i, 30)) for i in range(step)]
    assert all(same) == allowed
    assert can_extend(config, 20, 20, step)


@every_schedule
def test_the_rate_that_is_checked_is_the_rate_that_trains(settings):
    config = OptimizerConfig(warmup_steps=7, **settings)
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
