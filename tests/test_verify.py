"""Laws of trainer verify."""

import numpy as np
import pytest
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer import verbs
from trainer.commands import verify as verify_module
from trainer.commands.verify import Trace, difference, distribution_of, names_not_finite, verify
from trainer.config.file import load_config
from trainer.config.settings import DistributionConfig
from trainer.errors import UserError
from trainer.exit_status import ExitStatus
from trainer.parser import parse


def config_of(tmp_path, **train):
    train = {"precision": "float64", "total_steps": 9, "global_batch_size": 4, "sequence_length": 16, **train}
    return tiny_config(tmp_path, data={"storybook_stories": 200}, train=train)


def trace(losses=(2.0, 1.0), norms=(0.5, 0.5), weights=(3.0, 4.0)):
    return Trace(np.array(losses), np.array(norms), np.array(weights))


def test_a_difference_is_relative_and_the_largest():
    found = difference(trace(losses=(2.0, 1.5), norms=(0.25, 0.5), weights=(3.0, 4.5)), trace())
    assert found == pytest.approx((0.5, 0.5, 0.1))
    assert difference(trace(), trace()) == (0.0, 0.0, 0.0)
    assert difference(trace(losses=(1.0,)), trace()) == (np.inf, np.inf, np.inf)


def test_what_is_not_finite_equals_nothing_not_even_itself():
    for value in (np.nan, np.inf, -np.inf):
        for field, number in (("losses", 0), ("norms", 1), ("weights", 2)):
            broken = trace(**{field: (1.0, value)})
            for one, other in ((broken, broken), (broken, trace()), (trace(), broken)):
                assert difference(one, other)[number] == np.inf
            assert names_not_finite(broken) == [Trace._fields[number]]
    assert names_not_finite(trace()) == []


def test_zeros_and_huge_numbers_have_a_difference_too():
    nothing = trace(losses=(0.0, 0.0), norms=(0.0, 0.0), weights=(0.0, 0.0))
    assert difference(nothing, nothing) == (0.0, 0.0, 0.0)
    assert difference(trace(), nothing) == (np.inf, np.inf, np.inf)
    huge = np.array([3e38, 3e38], np.float32)
    assert difference(trace(weights=-huge), trace(weights=huge)).weights == pytest.approx(2)
    assert difference(trace(weights=(1e308, 1e308)), trace(weights=(-1e308, 1e308))).weights == np.inf


def test_a_few_steps_have_the_rates_of_the_whole_run(tmp_path, monkeypatch):
    lengths = []

    def training_step(_config, total_steps, *_):
        lengths.append(total_steps)
        raise InterruptedError

    monkeypatch.setattr(verify_module, "TrainingStep", training_step)
    config = config_of(tmp_path)
    prepared = tiny_prepared(config)
    for num_steps in (2, 12):
        with pytest.raises(InterruptedError):
            verify_module.take_steps(config, prepared, DistributionConfig(kind="cpu"), num_steps)
    assert lengths == [config.train.total_steps, 12]


def test_weights_that_are_nan_are_not_the_same_model(tmp_path, monkeypatch):
    # A stand-in for the steps, which skip what is not finite: this is what reaches the comparison from a device.
    monkeypatch.setattr(verify_module, "call_in_new_process", nan_weights)
    lines = []
    assert not verify(config_of(tmp_path), [1, 2], say=lines.append)
    assert lines[-2].endswith("inf in all weights; NOT FINITE: weights")
    assert lines[-1].startswith("NOT the same model: the lines above have numbers that are not finite")


def test_an_override_of_the_command_splits_over_several_replicas_and_not_on_one(tmp_path, monkeypatch):
    splits = []

    def noted(_take_steps, config, _prepared, distribution, _num_steps):
        splits.append((distribution.logical_devices, distribution.shard, config.distribution.shard))
        return trace()

    # A stand-in for the steps, in processes of their own.
    monkeypatch.setattr(verify_module, "call_in_new_process", noted)
    path = tmp_path / "config.toml"
    path.write_text(config_of(tmp_path).to_toml())
    command = ["verify", str(path), "distribution.shard=optimizer", "--replicas", "1,2,4"]
    assert verbs.verify(parse(command)) == ExitStatus.DONE
    assert splits == [(1, "nothing", "optimizer"), (2, "optimizer", "optimizer"), (4, "optimizer", "optimizer")]


def nan_weights(*_):
    return trace(weights=(np.nan, 1.0))


def test_one_number_of_replicas_has_nothing_to_be_compared_with(tmp_path):
    with pytest.raises(UserError, match=r"verify compares numbers of replicas, and \[2\] names fewer than two"):
        verify(config_of(tmp_path), [2])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float64", "mixed_float16"])
def test_replicas_of_a_split_cpu_make_the_same_model(tmp_path, precision):
    lines = []
    assert verify(config_of(tmp_path, precision=precision), [1, 2], num_steps=8, say=lines.append)
    assert lines[-1] == "the same model, to the last bit."
    assert [line.split(":")[0].strip() for line in lines[-3:-1]] == ["1 replica", "2 replicas"]


@pytest.mark.slow
def test_what_a_config_splits_is_split_over_several_replicas(tmp_path):
    lines, config = [], config_of(tmp_path)
    split = DistributionConfig(shard="optimizer")
    assert verify(config.model_copy(update={"distribution": split}), [1, 2], num_steps=3, say=lines.append)
    # The replicas add up the gradients' norm in pieces: without a split the bits would be the same.
    assert lines[-1].startswith("the same model: ") and "0.0e+00 in gradient norm" not in lines[-2]


@pytest.mark.slow
def test_the_quickstart_has_the_same_losses_on_four_devices_for_60_steps(tmp_path):
    # Rounding would grow by the step: only equal bits stay equal.
    overrides = ["data.storybook_stories=7000", f"data.prepared_folder={tmp_path / 'prepared'}"]
    lines = []
    assert verify(load_config("configs/quickstart.toml", overrides), [1, 4], num_steps=60, say=lines.append)
    assert lines[-1] == "the same model, to the last bit."


def test_replicas_are_the_first_gpus_named_or_parts_of_the_cpu(tmp_path):
    assert distribution_of(DistributionConfig(), 2) == DistributionConfig(kind="cpu", logical_devices=2)
    assert distribution_of(DistributionConfig(kind="gpu"), 2) == DistributionConfig(kind="gpu", gpus=(0, 1))
    assert distribution_of(DistributionConfig(gpus=(3, 1, 2)), 2) == DistributionConfig(kind="gpu", gpus=(3, 1))
    split = DistributionConfig(shard="optimizer")
    assert distribution_of(split, 2) == DistributionConfig(kind="cpu", logical_devices=2, shard="optimizer")
    assert distribution_of(split, 1) == DistributionConfig(kind="cpu")
    in_pairs = split.model_copy(update={"shard_over": 2})
    assert distribution_of(in_pairs, 4).shard_over == 2 and distribution_of(in_pairs, 1).shard_over is None
    with pytest.raises(UserError, match=r"distribution.shard_over=2 does not divide 3 replicas"):
        verify(
            tiny_config(distribution={"shard": "optimizer", "shard_over": 2}, train={"global_batch_size": 3}), [1, 3]
        )
    config = config_of(tmp_path).model_copy(update={"distribution": DistributionConfig(gpus=(3, 1))})
    with pytest.raises(
        UserError, match=r"--replicas 4 is more than the GPUs of distribution\.gpus=\[3, 1\]; name more"
    ):
        verify(config, [1, 4])
    assert not (tmp_path / "prepared").exists()


def test_a_batch_that_replicas_cannot_share_is_refused_before_the_text_is_prepared(tmp_path):
    with pytest.raises(UserError, match=r"train.global_batch_size=4 is not a multiple of 3 replicas"):
        verify(config_of(tmp_path), [1, 3])
    assert not (tmp_path / "prepared").exists()
