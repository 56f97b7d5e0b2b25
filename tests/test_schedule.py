"""Laws of the learning-rate schedule."""

import itertools

import pytest

from trainer.config.file import make_config
from trainer.config.settings import OptimizerConfig
from trainer.errors import UserError
from trainer.training.schedule import learning_rate


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


def test_cosine_follows_its_formula():
    values = rates(5, learning_rate=1.0, schedule="cosine")
    assert values == pytest.approx([1.0, 0.853553390593, 0.5, 0.146446609407, 0.0], abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_has_a_rate(schedule):
    assert rates(1, learning_rate=1.0, schedule=schedule, warmup_steps=1) == [1.0]
