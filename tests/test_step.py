"""Laws of the training step."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.config.settings import examples_per_replica
from trainer.distributed.strategy import make_strategy
from trainer.errors import UserError
from trainer.model.dropout import DropoutDraw
from trainer.model.gpt import GPT
from trainer.model.ops.plain import Ops
from trainer.training.loss_scale import LossScale
from trainer.training.step import TrainingStep, accumulate, forward_backward, mean_and_clip

VOCABULARY = 17


def config_of(**sections):
    train = {"precision": "float64", "total_steps": 100, "global_batch_size": 4, "sequence_length": 6}
    return tiny_config(train=train | sections.pop("train", {}), **sections)


def make_step(config, model=None):
    strategy = make_strategy(config.distribution)
    with strategy.scope():
        if model is None:
            train = config.train
            model = GPT(config.model, VOCABULARY, train.sequence_length, dtype=train.precision, bos_id=2)
        return TrainingStep(config, config.train.total_steps, model, strategy)


def values_of(step):
    """Copies: on a CPU numpy() can be the memory that the next step writes to."""
    return [np.array(variable.numpy()) for variable in variables_of(step)]


def variables_of(step):
    return [*step.named_variables.values(), *step.state().values(), step.step, step.stop_requested]


def set_values(step, values):
    for variable, value in zip(variables_of(step), values, strict=True):
        variable.assign(value)


@pytest.fixture(scope="module")
def new_step():
    """A function that gives a step as before its first batch; one for each precision, which is traced once."""
    made = {}

    def new(precision="float64"):
        if precision not in made:
            step = make_step(config_of(train={"precision": precision}, optimizer={"learning_rate": 0.01}))
            made[precision] = step, values_of(step)
        step, start = made[precision]
        set_values(step, start)
        return step

    return new


def batches(config, num_batches=100):
    """Random tokens, some of them padding, of another number in each batch."""
    random = np.random.default_rng(0)
    shape = (num_batches, config.train.global_batch_size, config.train.sequence_length)
    tokens = random.integers(0, VOCABULARY, shape).astype(np.int32)
    weights = (random.random(shape) < 0.8).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((tokens, np.roll(tokens, -1, axis=2), weights))


def take(step, data, num_steps):
    iterator = iter(step.strategy.experimental_distribute_dataset(data))
    return step.run_steps(iterator, tf.constant(num_steps, tf.int64))


def all_weights(step):
    return np.concatenate([np.ravel(v.numpy()) for v in step.model.variables])


def relative_difference(one, two):
    return np.linalg.norm(one - two) / np.linalg.norm(two)


def test_gradients_are_those_of_the_summed_loss():
    config = config_of()
    model = GPT(config.model, VOCABULARY, 6, dtype="float64")
    inputs, targets, weights = next(iter(batches(config)))
    plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum", dtype="float64")
    with tf.GradientTape() as tape:
        loss = plain(targets, model(inputs), sample_weight=tf.cast(weights, tf.float64))
    expected = tape.gradient(loss, [v.value for v in model.trainable_variables])
    values = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
    result = forward_backward(model, values, [], (inputs, targets, weights), None)
    np.testing.assert_allclose(result.loss_sum, loss, rtol=1e-12)
    assert result.num_targets == np.sum(weights)
    for gradient, reference in zip(result.by_weight, expected, strict=True):
        np.testing.assert_allclose(gradient, tf.convert_to_tensor(reference), atol=1e-12)


def test_z_loss_is_trained_for_and_not_reported():
    config = config_of(train={"z_loss": 0.1, "micro_batch_size": 2})
    batch = next(iter(batches(config)))
    foreign = keras.Sequential([keras.layers.Embedding(VOCABULARY, VOCABULARY, "ones", dtype="float64")])
    foreign.build((None, 6))
    for model in (GPT(config.model, VOCABULARY, 6, dtype="float64"), foreign):
        values = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
        plain, with_z_loss = (forward_backward(model, values, [], batch, None, z_loss=z_loss) for z_loss in (0.0, 0.1))
        step = make_step(config, model)
        # Adam's first moment after one step is the gradient times 1 - beta_1.
        assert_allclose = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
        assert_allclose(take(step, batches(config), 1).loss_sum, plain.loss_sum)
        for moment, gradient, without in zip(
            step.optimizer.first_moments, with_z_loss.by_weight, plain.by_weight, strict=True
        ):
            assert_allclose(moment, (1 - step.optimizer.config.beta_1) * gradient / plain.num_targets)
            assert relative_difference(gradient, without) > 1e-2


def test_tied_embeddings_get_the_gradient_of_both_their_uses():
    config = config_of(model={"tied_embeddings": True, "use_bias": False})
    model = GPT(config.model, VOCABULARY, 6, dtype="float64")
    batch = next(iter(batches(config)))
    values = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
    gradient = forward_backward(model, values, [], batch, None).by_weight[0]

    def loss_at(table):
        return float(forward_backward(model, [table, *values[1:]], [], batch, None).loss_sum)

    direction = np.random.default_rng(1).normal(size=(1, 8))
    nudge, place = 1e-6, tf.one_hot(3, VOCABULARY, dtype=tf.float64)[:, None] * direction
    slope = (loss_at(values[0] + nudge * place) - loss_at(values[0] - nudge * place)) / (2 * nudge)
    np.testing.assert_allclose(tf.reduce_sum(gradient * place), slope, rtol=1e-7)


def test_forward_backward_reads_the_weights_it_is_given_and_no_variable():
    config = config_of()
    model = GPT(config.model, VOCABULARY, 6, dtype="float64")
    batch = next(iter(batches(config)))
    values = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
    before = forward_backward(model, values, [], batch, None)
    for variable in model.variables:
        variable.assign(tf.zeros_like(variable.value))
    after = forward_backward(model, values, [], batch, None)
    np.testing.assert_array_equal(before.loss_sum, after.loss_sum)
    function = tf.function(lambda *given: forward_backward(model, given, [], batch, None).by_weight, autograph=False)
    captured = function.get_concrete_function(*values).captured_inputs
    assert not [tensor for tensor in captured if tensor.dtype == tf.resource]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("at_once", [1, 2])
def test_micro_batches_add_up_to_the_batch(micro_batch_size, at_once):
    config = config_of(model={"dropout": 0.3, "tied_embeddings": True, "use_bias": False})
    model = GPT(config.model, VOCABULARY, 6, dtype="float64")
    batch = next(iter(batches(config)))
    values = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]

    def gradients_of(weights, state, batch, first_example):
        draw = DropoutDraw(tf.constant(1, tf.int64), tf.constant(2, tf.int64), first_example)
        return forward_backward(model, weights, state, batch, draw)

    first_example = tf.constant(3, tf.int64)
    whole = gradients_of(values, [], batch, first_example)
    parts = accumulate(gradients_of, values, [], batch, first_example, micro_batch_size, at_once)
    np.testing.assert_allclose(parts.loss_sum, whole.loss_sum, rtol=1e-14)
    assert parts.num_targets == whole.num_targets
    for part, reference in zip(parts.by_weight, whole.by_weight, strict=True):
        np.testing.assert_allclose(part, reference, atol=1e-14)


def test_the_step_takes_micro_batches_of_the_size_asked_for():
    settings = {"model": {"dropout": 0.2}, "optimizer": {"clip_norm": 0.5}}
    whole = make_step(config_of(**settings))
    apart = make_step(config_of(**settings, train={"micro_batch_size": 1}))
    take(whole, batches(whole.config), 5)
    take(apart, batches(apart.config), 5)
    assert 0 < relative_difference(all_weights(apart), all_weights(whole)) < 1e-12


def test_gradients_of_two_micro_batches_at_once_are_summed_each_by_itself():
    config = config_of(
        model={"tied_embeddings": True}, train={"precision": "float32", "global_batch_size": 8, "sequence_length": 256}
    )
    step = make_step(config)
    assert step.execution.micro_batch_size == 4
    with context.collect_graphs(optimized=True) as graphs:
        take(step, batches(config), 2)
    nodes = [node for graph in graphs for function in graph.library.function for node in function.node_def]
    nodes += [node for graph in graphs for node in graph.node]
    sums = [len(node.input) for node in nodes if node.op == "AddN"]
    # The two gradients of the tied embedding, and not these with the sum over earlier micro-batches.
    assert sums and max(sums) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_scale_multiplies_the_gradients_and_not_the_loss(tied):
    config = config_of(model={"tied_embeddings": tied})
    gpt = GPT(config.model, VOCABULARY, 6, dtype="float64")
    foreign = keras.Sequential([keras.layers.Embedding(VOCABULARY, VOCABULARY, dtype="float64")])
    foreign.build((None, 6))
    for model in (gpt, foreign):
        values = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
        batch = next(iter(batches(config)))
        plain = forward_backward(model, values, [], batch, None)
        scaled = forward_backward(model, values, [], batch, None, tf.constant(8.0))
        assert scaled.loss_sum == plain.loss_sum
        for one, eight in zip(plain.by_weight, scaled.by_weight, strict=True):
            np.testing.assert_allclose(eight, 8 * one, rtol=1e-12)


def test_an_overflow_halves_the_loss_scale_and_skips_the_step(new_step):
    step = new_step("mixed_float16")
    config = step.config
    step.loss_scale.value.assign(2.0**40)
    before = all_weights(step)
    assert take(step, batches(config), 1).num_skipped == 1
    assert step.loss_scale.value.numpy() == 2.0**39
    np.testing.assert_array_equal(all_weights(step), before)
    step.loss_scale.value.assign(2.0**5)
    assert take(step, batches(config), 3).num_skipped == 0
    assert step.loss_scale.value.numpy() == 2.0**5
    assert step.loss_scale.good_steps.numpy() == 3


def test_skipped_steps_are_counted_across_calls_until_one_is_applied(new_step):
    step = new_step()
    good = step.model.variables[0].numpy().copy()
    step.model.variables[0].assign(np.full_like(good, np.inf))
    assert take(step, batches(step.config), 3).num_skipped == 3
    assert take(step, batches(step.config), 2).num_skipped == 2
    assert step.skipped_in_a_row.numpy() == 5
    step.model.variables[0].assign(good)
    take(step, batches(step.config), 1)
    assert step.skipped_in_a_row.numpy() == 0


def test_steps_that_lower_the_loss_scale_are_not_counted_as_skipped_until_it_is_as_small_as_it_gets(new_step):
    step = new_step("mixed_float16")
    smallest = step.loss_scale.smallest
    assert step.loss_scale.value.numpy() == smallest * 2**LossScale.NUM_HALVINGS
    good = step.model.variables[0].numpy().copy()
    step.model.variables[0].assign(np.full_like(good, np.inf))
    step.loss_scale.value.assign(smallest * 4)
    for expected in (0, 0, 1, 2):
        assert take(step, batches(step.config), 1).num_skipped == 1
        assert step.skipped_in_a_row.numpy() == expected
    assert step.loss_scale.value.numpy() == smallest
    step.model.variables[0].assign(good)
    take(step, batches(step.config), 1)
    assert step.skipped_in_a_row.numpy() == 0


def test_the_chain_of_hashes_depends_on_every_token_and_on_the_order(new_step):
    config = config_of()
    data = batches(config, 2)

    def change(number, batch):
        inputs, targets, weights = batch
        changed = tf.tensor_scatter_nd_add(targets, [[3, 5]], [1]) % VOCABULARY
        return inputs, tf.where(number == 0, changed, targets), weights

    hashes = set()
    for order in (data, data.skip(1).concatenate(data.take(1)), data.enumerate().map(change)):
        step = new_step()
        take(step, order, 2)
        hashes.add(int(step.batches_hash.numpy()))
    assert len(hashes) == 3


@pytest.mark.parametrize("model", [{}, {"document_mask": True}])
def test_xla_changes_nothing_but_the_rounding(model):
    settings = {"data": {"mode": "packed"}, "model": {"dropout": 0.2} | model}
    config = config_of(**settings, train={"xla": "on", "micro_batch_size": 2})
    plain = config_of(**settings, train={"xla": "off", "micro_batch_size": 2})
    compiled, interpreted = make_step(config), make_step(plain)
    take(compiled, batches(config), 3)
    take(interpreted, batches(config), 3)
    assert relative_difference(all_weights(compiled), all_weights(interpreted)) < 1e-12


def test_the_largest_seed_takes_a_step():
    step = make_step(config_of(model={"dropout": 0.2}, train={"seed": 2**63 - 1}))
    assert take(step, batches(step.config), 1).num_skipped == 0


@pytest.mark.parametrize("xla", [pytest.param("on", marks=pytest.mark.slow), "off"])
def test_what_is_computed_again_comes_out_the_same(xla):
    settings = {"data": {"mode": "packed"}, "model": {"dropout": 0.2, "document_mask": True}}
    steps = [
        make_step(config_of(**settings, train={"recompute": recompute, "xla": xla}))
        for recompute in ("nothing", "attention", "blocks")
    ]
    for step in steps:
        take(step, batches(step.config), 3)
    kept, *recomputed = (all_weights(step) for step in steps)
    for weights in recomputed:
        assert relative_difference(weights, kept) < 1e-12


def test_recomputed_blocks_run_twice():
    def attentions(recompute):
        config = config_of(train={"recompute": recompute})
        model = make_step(config).model
        weights = [tf.convert_to_tensor(variable) for variable in model.trainable_variables]

        @tf.function(autograph=False)
        def gradients(*batch):
            return forward_backward(model, weights, [], batch, None, ops=Ops(recompute)).by_weight

        graph = gradients.get_concrete_function(*next(iter(batches(config)))).graph
        return sum(op.type == "Softmax" for op in graph.get_operations())

    num_blocks = config_of().model.num_layers
    assert attentions("nothing") == num_blocks
    assert attentions("blocks") == 2 * num_blocks


def test_another_model_has_nothing_to_recompute():
    config = config_of(train={"recompute": "blocks"})
    with pytest.raises(UserError, match=r"train.recompute='blocks' works only with trainer's own GPT"):
        TrainingStep(
            config,
            10,
            keras.Sequential([keras.layers.Embedding(VOCABULARY, VOCABULARY)]),
            make_strategy(config.distribution),
        )


def test_a_batch_that_replicas_cannot_share_is_refused():
    config = config_of(train={"micro_batch_size": 2})
    assert examples_per_replica(config, 2) == 2
    with pytest.raises(
        UserError, match=r"train.global_batch_size=4 is not a multiple of 3 replicas x train.micro_batch"
    ):
        examples_per_replica(config, 3)
    config = config_of(train={"total_steps": 9, "batch_warmup": {5: 1}})
    with pytest.raises(UserError, match=r"train.batch_warmup.5=1 is not a multiple of 2 replicas; .*batch_warmup=none"):
        examples_per_replica(config, 2)


def test_a_weight_without_influence_is_an_error():
    class Idle(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = keras.layers.Embedding(VOCABULARY, VOCABULARY)
            self.idle = self.add_weight((3,), name="idle")

        def call(self, tokens):
            return self.used(tokens)

    model = Idle()
    batch = next(iter(batches(config_of())))
    model(batch[0])
    values = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
    with pytest.raises(ValueError, match="idle has no influence on the loss"):
        forward_backward(model, values, [], batch, None)


def test_many_steps_in_one_call_equal_one_step_per_call():
    step = make_step(config_of(model={"dropout": 0.2}, optimizer={"schedule": "cosine", "clip_norm": 0.5}))
    start = values_of(step)
    metrics = take(step, batches(step.config), 6)
    assert metrics.num_steps == step.step.numpy() == 6
    together = values_of(step)

    set_values(step, start)
    iterator = iter(step.strategy.experimental_distribute_dataset(batches(step.config)))
    for _ in range(6):
        step.run_steps(iterator, tf.constant(1, tf.int64))
    for one, other in zip(values_of(step), together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert step.run_steps.experimental_get_tracing_count() == 1


def test_the_step_divides_by_the_number_of_targets_and_follows_adam(new_step):
    step = new_step()
    config = step.config
    model = GPT(config.model, VOCABULARY, 6, dtype="float64")
    adam = keras.optimizers.Adam(config.optimizer.learning_rate)
    mean = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none", dtype="float64")
    for inputs, targets, weights in batches(config).take(5):
        with tf.GradientTape() as tape:
            losses = mean(targets, model(inputs)) * tf.cast(weights, tf.float64)
            loss = tf.reduce_sum(losses) / tf.reduce_sum(tf.cast(weights, tf.float64))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        # Dense, as Keras squares the slices of a token that stands twice in a batch before it adds them.
        adam.apply([tf.convert_to_tensor(gradient) for gradient in gradients], model.trainable_variables)
    take(step, batches(config), 5)
    reference = np.concatenate([np.ravel(v.numpy()) for v in model.variables])
    assert relative_difference(all_weights(step), reference) < 1e-6  # Keras keeps the powers of beta in float32


def test_clipping_scales_the_mean_to_the_norm_and_leaves_smaller_gradients_alone():
    sums = [tf.constant([6.0, 0.0], tf.float64), tf.constant([[8.0]], tf.float64)]
    count = tf.constant(2.0, tf.float64)
    for clip_norm, expected in ((None, 5.0), (5.0, 5.0), (6.0, 5.0), (1.0, 1.0)):
        clipped, norm = mean_and_clip(sums, count, clip_norm)
        assert norm == 5.0
        np.testing.assert_allclose(tf.linalg.global_norm(clipped), expected, rtol=1e-12)
    zero, _ = mean_and_clip([tf.zeros([2], tf.float64)], count, 1.0)
    np.testing.assert_array_equal(zero[0], [0.0, 0.0])


def test_clipped_steps_are_counted(new_step):
    config = config_of(optimizer={"clip_norm": 1e-6})
    metrics = take(make_step(config), batches(config), 3)
    assert metrics.num_clipped == 3
    assert take(new_step(), batches(config), 3).num_clipped == 0


def test_a_step_that_is_not_finite_changes_nothing_but_the_step(new_step):
    step = new_step()
    config = step.config
    good = step.model.variables[0].numpy()
    step.model.variables[0].assign(np.full_like(good, np.inf))
    before = {name: value.numpy() for name, value in step.optimizer.state().items()}
    metrics = take(step, batches(config), 3)
    assert (metrics.num_steps, metrics.num_skipped, metrics.loss_sum) == (3, 3, 0.0)
    assert step.step.numpy() == 3
    for name, value in step.optimizer.state().items():
        np.testing.assert_array_equal(value, before[name])
    step.model.variables[0].assign(good)
    assert take(step, batches(config), 2).num_skipped == 0
    assert step.optimizer.num_updates.numpy() == 2


def test_muon_goes_on_with_the_same_bits_and_ignores_what_is_not_finite():
    step = make_step(config_of(train={"precision": "float32"}, optimizer={"kind": "muon", "weight_decay": 0.1}))
    start, data = values_of(step), batches(step.config)
    take(step, data, 4)
    uninterrupted = values_of(step)
    set_values(step, start)
    take(step, data, 2)
    names = [*step.named_variables, *step.state(), "step", "stop_requested"]
    saved = dict(zip(names, values_of(step), strict=True))
    assert len(saved) == len(names)
    assert any(saved["gpt/block_0/query_key_value/kernel/momentum"].ravel())

    # A checkpoint has names: whatever was there before is gone, and a step without a finite gradient leaves no trace.
    set_values(step, [np.full_like(value, 7) for value in start])
    set_values(step, [saved[name] for name in names])
    step.model.variables[0].assign(np.full_like(start[0], np.inf))
    assert take(step, data, 1).num_skipped == 1
    for name, value in zip(names, values_of(step), strict=True):
        if name not in (names[0], "step", "skipped_in_a_row"):
            np.testing.assert_array_equal(value, saved[name], err_msg=name)
    set_values(step, [saved[name] for name in names])
    take(step, data.skip(2), 2)
    for one, other in zip(values_of(step), uninterrupted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_batch_of_padding_only_leaves_the_weights_finite(new_step):
    step = new_step()
    padding = batches(step.config, 1).map(lambda inputs, targets, weights: (inputs, targets, 0 * weights))
    metrics = take(step, padding, 1)
    assert (metrics.num_targets, metrics.num_skipped) == (0, 0)
    assert np.isfinite(all_weights(step)).all()


def test_the_stop_flag_ends_a_call_between_two_steps(new_step):
    step = new_step()
    stop_after = 3

    def maybe_stop(number, batch):
        flag = tf.cond(number >= stop_after, lambda: step.stop_requested.assign(True), lambda: tf.constant(False))
        with tf.control_dependencies([flag]):
            return tf.nest.map_structure(tf.identity, batch)

    metrics = take(step, batches(step.config).enumerate().map(maybe_stop, num_parallel_calls=1), 50)
    # The pipeline reads ahead, so the flag may come early; never late. The step under way is the last.
    assert 1 <= metrics.num_steps <= stop_after + 2
    assert metrics.stop_votes == 1
    assert step.step.numpy() == metrics.num_steps


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_weights_that_are_not_trained_are_updated_too(micro_batch_size):
    config = config_of(train={"precision": "float32", "micro_batch_size": micro_batch_size})
    model = keras.Sequential(
        [
            keras.layers.Embedding(VOCABULARY, 8),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(VOCABULARY),
        ]
    )
    model.build((None, 6))
    step = make_step(config, model)
    before = [v.numpy() for v in model.non_trainable_variables]
    metrics = take(step, batches(config), 3)
    assert metrics.num_skipped == 0
    assert len(before) == 3  # two statistics and the state of the dropout's generator
    for old, variable in zip(before, model.non_trainable_variables, strict=True):
        assert not np.array_equal(old, variable.numpy())


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16", "float64"])
def test_the_model_learns_under_every_precision(precision, new_step):
    step = new_step(precision)
    one = batches(step.config, 1).repeat()
    losses = []
    for _ in range(2):
        metrics = take(step, one, 40)
        losses.append(metrics.loss_sum / metrics.num_targets)
    assert losses[1] < 0.5 * losses[0]
    assert {v.dtype for v in step.model.variables} == {"float64" if precision == "float64" else "float32"}
