"""Laws of a step whose optimizer, or whose weights are split, on one device: the only piece of a weight is the whole.
test_replicas.py has several devices.
"""

import contextlib
import logging
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.distributed.collectives import RehearsedCollectives
from trainer.distributed.strategy import make_strategy
from trainer.errors import UserError
from trainer.model.gpt import GPT
from trainer.model.held import without_values
from trainer.training import snapshot
from trainer.training.snapshot import _snapshot, restore
from trainer.training.step import TrainingStep

VOCABULARY, NUM_STEPS = 17, 3


def make_step(shard, precision="float64", model_of=None, num_layers=1, **train):
    config = tiny_config(
        model={"num_layers": num_layers},
        train={"precision": precision, "total_steps": 9, "global_batch_size": 4, "sequence_length": 6, **train},
        optimizer={"learning_rate": 0.01, "clip_norm": 0.1, "weight_decay": 0.1, "ema_decay": 0.9},
        distribution={"kind": "cpu", "shard": shard},
    )
    strategy = make_strategy(config.distribution)
    with strategy.scope(), without_values() if shard == "weights" else contextlib.nullcontext():
        model = GPT(config.model, VOCABULARY, 6, dtype=precision) if model_of is None else model_of()
    # With one replica they exchange with nobody, and what each returns is right.
    return TrainingStep(config, 9, model, strategy, collectives=RehearsedCollectives(1))


def batches():
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (NUM_STEPS, 4, 6)).astype(np.int32)
    weights = np.ones(tokens.shape, np.float32)
    return iter(tf.data.Dataset.from_tensor_slices((tokens, np.roll(tokens, -1, axis=2), weights)).repeat())


def values_of(step):
    variables = {**step.named_variables, **step.state(), **step.average_state()}
    return {name: np.array(variable.numpy()) for name, variable in variables.items()}


@pytest.fixture(scope="module", params=["optimizer", "weights", "weights in blocks that XLA compiles"])
def split(request):
    shard, *compiled = request.param.split(maxsplit=1)
    return make_step(shard, xla="on" if compiled else "auto")


def test_a_step_on_the_only_piece_is_the_step_on_the_whole(split):
    results = []
    for step in (make_step("nothing"), split):
        metrics = step.run_steps(batches(), tf.constant(NUM_STEPS, tf.int64))
        results.append(values_of(step) | {"clipped": metrics.num_clipped.numpy(), "norm": metrics.grad_norm_sum})
    whole, pieces = results
    assert whole.keys() == pieces.keys() and whole["clipped"] == NUM_STEPS
    for name, value in whole.items():
        np.testing.assert_allclose(pieces[name], value, rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.parametrize(("xla", "num_programs"), [("off", 0), ("on", 3)])
def test_xla_compiles_two_passes_for_all_blocks_and_the_loss(xla, num_programs):
    step = make_step("weights", xla=xla, num_layers=3)
    run_steps = step.run_steps.get_concrete_function(batches(), tf.constant(1, tf.int64))
    functions = run_steps.graph.as_graph_def().library.function
    is_large = [len(function.node_def) > 50 and function.attr["_XlaMustCompile"].b for function in functions]
    assert sum(is_large) == num_programs


def test_a_loss_scale_and_a_batch_warmup_give_the_only_piece_the_same_steps():
    results = []
    for shard in ("nothing", "optimizer", "weights"):
        step = make_step(shard, "mixed_float16", batch_warmup={2: 2})
        step.run_steps(batches(), tf.constant(NUM_STEPS, tf.int64))
        results.append(values_of(step))
    whole, *others = results
    assert int(whole["num_updates"]) > 0
    for pieces in others:
        assert whole.keys() == pieces.keys()
        for name, value in whole.items():
            np.testing.assert_allclose(pieces[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_weights_that_are_set_between_two_steps_are_those_that_the_next_step_changes(split):
    before = {name: np.array(variable.numpy()) for name, variable in split.named_variables.items()}
    for name, variable in split.named_variables.items():
        variable.assign(before[name] + 1)
    split.run_steps(batches(), tf.constant(1, tf.int64))
    for name, variable in split.named_variables.items():
        # An update of Adam changes a number by about the learning rate, and the decay by a thousandth of it.
        np.testing.assert_allclose(variable.numpy(), before[name] + 1, atol=0.05, err_msg=name)


def test_a_step_that_is_not_finite_changes_nothing_even_if_it_is_the_first(split):
    for step in (make_step("optimizer", "float32"), split):
        good = values_of(step)
        first = next(iter(step.named_variables))
        step.named_variables[first].assign(np.full_like(good[first], np.inf))
        metrics = step.run_steps(batches(), tf.constant(1, tf.int64))
        assert int(metrics.num_skipped) == 1
        skipped = values_of(step)
        step.named_variables[first].assign(good[first])
        for name in good.keys() - {first, "skipped_in_a_row"}:
            np.testing.assert_array_equal(skipped[name], good[name], err_msg=name)


def test_what_is_split_is_restored_from_whole_arrays(split):
    before = values_of(split)
    for name, variable in split.state().items():
        variable.assign(before[name] + np.asarray(1, before[name].dtype))
        np.testing.assert_array_equal(variable.numpy(), before[name] + np.asarray(1, before[name].dtype))
        variable.assign(before[name])


@pytest.mark.parametrize("group", ["weights", "optimizer"])
def test_a_checkpoint_that_lacks_an_array_is_refused_with_its_name(split, group):
    arrays = {"weights": split.named_variables, "optimizer": split.state(), "average": split.average_state()}
    groups = {name: {key: np.array(each.numpy()) for key, each in some.items()} for name, some in arrays.items()}
    lacking = next(name for name in groups[group] if name.startswith("gpt/block_0/"))
    del groups[group][lacking]
    checkpoint = SimpleNamespace(arrays=groups.get, has=groups.__contains__, folder="here", step=1)
    with pytest.raises(UserError) as error:
        restore(split, checkpoint)
    assert str(error.value).startswith(f"here does not hold this model: it lacks ['{lacking}'] and has nothing in add")


def test_a_worker_that_writes_no_checkpoint_keeps_nothing_of_it(split):
    arrays = {**split.named_variables, **split.state()}
    assert _snapshot(arrays, keeps=False) == {}
    assert _snapshot(arrays, keeps=True).keys() == arrays.keys()


def test_the_chief_drops_the_checkpoint_before_it_takes_the_next(monkeypatch):
    done = []
    checkpoints = SimpleNamespace(make_way=lambda: done.append("drop"), save=lambda *_: done.append("save"))
    array = SimpleNamespace(numpy=lambda: done.append("take") or np.zeros(1))
    step = SimpleNamespace(named_variables={"a": array}, state=dict, average=None, step=tf.Variable(1))
    monkeypatch.setattr(snapshot, "facts_of", lambda run: {})
    snapshot.save(checkpoints, step, run=None)
    assert done == ["drop", "take", "save"]


def test_a_first_checkpoint_prints_no_warning_of_tensorflow():
    step, printed = make_step("optimizer"), []
    handler = logging.Handler()
    handler.emit = printed.append
    tf.get_logger().addHandler(handler)
    try:
        assert len({np.shape(array) for array in values_of(step).values()}) > 5  # Each shape has a function of its own.
    finally:
        tf.get_logger().removeHandler(handler)
    assert not [record.getMessage() for record in printed]


def foreign_model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input([6], dtype="int32"),
            layers.Embedding(VOCABULARY, 5),
            layers.LayerNormalization(),
            layers.Dense(17),
        ]
    )


def test_the_optimizer_of_any_keras_model_is_split_and_its_weights_are_not():
    results = []
    for shard in ("nothing", "optimizer"):
        keras.utils.set_random_seed(0)
        step = make_step(shard, "float32", foreign_model)
        step.run_steps(batches(), tf.constant(NUM_STEPS, tf.int64))
        results.append(values_of(step))
    whole, pieces = results
    assert whole.keys() == pieces.keys() and int(whole["num_updates"]) == NUM_STEPS
    for name, value in whole.items():
        np.testing.assert_allclose(pieces[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    with pytest.raises(
        UserError, match=r"distribution.shard='weights' works only with trainer's own GPT.*; choose 'opt"
    ):
        make_step("weights", "float32", foreign_model)


def test_a_model_without_values_begins_with_the_same_bits_and_nothing_gives_it_values():
    config = tiny_config(model={"tied_embeddings": True, "pre_norm": True}).model
    whole = GPT(config, VOCABULARY, 6, seed=3)
    with without_values():
        empty = GPT(config, VOCABULARY, 6, seed=3)
    with keras.StatelessScope():  # At its end Keras makes the values that it was told to make.
        pass
    for one, other in zip(empty.variables, whole.variables, strict=True):
        assert one._value is None and one.path == other.path
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)


def test_a_rehearsal_changes_nothing(split):
    split.run_steps(batches(), tf.constant(1, tf.int64))
    before = values_of(split)
    inputs, targets, weights = next(batches())

    @tf.function(autograph=False)
    def rehearse():
        return split.strategy.run(split.rehearse_on_replica, ((inputs, targets, weights),))

    assert np.isfinite(float(rehearse()))
    for name, value in values_of(split).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
