"""Takes a few steps of a tiny GPT on the replicas of DISTRIBUTION, and saves the results. test_replicas.py runs it.

    python tests/replica_steps.py OUT.npz DISTRIBUTION CASE...

DISTRIBUTION is the section of the config as JSON, and a CASE the other sections and, for the controls, what to break.
One process makes one strategy: two could collide on the keys of their collective operations.
"""

import contextlib
import functools
import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import trainer.training.split as split_module
import trainer.training.step as step_module
from trainer.config.file import make_config
from trainer.data.batches import places_of_slots
from trainer.distributed.collectives import TensorFlowCollectives, _number
from trainer.distributed.strategy import distributed, make_strategy
from trainer.model.dropout import DropoutDraw
from trainer.model.gpt import GPT
from trainer.model.held import without_values
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.variables import Piece

VOCABULARY, NUM_STEPS, GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH = 29, 5, 96, 8


def config_of(distribution, case, num_replicas=1):
    """The config of a case: clipped in every step, and with masks that a replica could get wrong."""
    train = {"global_batch_size": GLOBAL_BATCH_SIZE, **case.get("train", {})}
    rows = train["global_batch_size"] // num_replicas // case.get("micro_batches", 1)
    settings = {
        "run_folder": "unused",
        "model": {
            "num_layers": 1,
            "num_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 16,
            "dropout": 0.2,
            **case.get("model", {}),
        },
        "train": {
            "precision": case.get("precision", "float64"),
            "micro_batch_size": rows,
            "total_steps": NUM_STEPS,
            "sequence_length": SEQUENCE_LENGTH,
            **train,
        },
        "optimizer": {"learning_rate": 1e-2, "clip_norm": 0.1, "weight_decay": 0.1, **case.get("optimizer", {})},
        "distribution": {**distribution, **case.get("distribution", {})},
    }
    return make_config(settings)


def global_batches(batch_size=GLOBAL_BATCH_SIZE):
    """Random examples whose ends are padding: of other lengths in each, so that replicas hold unequal counts."""
    random = np.random.default_rng(0)
    shape = (NUM_STEPS, batch_size, SEQUENCE_LENGTH)
    tokens = random.integers(0, VOCABULARY, shape).astype(np.int32)
    lengths = random.integers(1, SEQUENCE_LENGTH + 1, shape[:2])
    lengths[:, -7:] = 0  # The last replica has next to nothing to learn from.
    lengths[:, -1] = SEQUENCE_LENGTH
    weights = (np.arange(SEQUENCE_LENGTH) < lengths[..., np.newaxis]).astype(np.float32)
    return tokens, np.roll(tokens, -1, axis=2), weights


def elements(train, share):
    """The part of the batches that a worker feeds to its replicas."""
    size = train.global_batch_size
    parts = [tf.reshape(part, [-1, SEQUENCE_LENGTH]) for part in global_batches(size)]

    def element(number):
        batch, slots = share.of_element(number, size)
        places, is_used = places_of_slots(batch * size + slots, train, share.total_replicas)
        shape = [size // share.total_replicas, SEQUENCE_LENGTH]
        inputs, targets, weights = (tf.ensure_shape(tf.gather(part, places), shape) for part in parts)
        return inputs, targets, weights * tf.cast(is_used, tf.float32)[:, tf.newaxis]

    return tf.data.Dataset.range(NUM_STEPS * share.num_replicas).map(element).repeat()


def break_on_purpose(what):
    """Makes a mistake that a trainer could make; returns what undoes it."""
    if what in SPLIT_MISTAKES:
        return break_split(what)
    if what == "place_is_number":
        place = TensorFlowCollectives._place
        TensorFlowCollectives._place = lambda self: _number()
        return lambda: setattr(TensorFlowCollectives, "_place", place)
    accumulate = step_module.accumulate

    def clip_before_reduce(*arguments, **options):
        local = accumulate(*arguments, **options)
        clipped, _ = tf.clip_by_global_norm(local.by_weight, 0.1 * tf.maximum(local.num_targets, 1))
        return local._replace(by_weight=clipped)

    def mean_of_means(*arguments, **options):
        local = accumulate(*arguments, **options)
        count = tf.maximum(local.num_targets, 1)
        return local._replace(by_weight=[g / count for g in local.by_weight], num_targets=tf.ones_like(count))

    def dropped_last_example(gradients_of, weights, state, batch, first_example, **options):
        inputs, targets, target_weights = batch
        last = tf.range(target_weights.shape[0]) == target_weights.shape[0] - 1
        kept = tf.where(last[:, tf.newaxis], 0.0, target_weights)
        return accumulate(gradients_of, weights, state, (inputs, targets, kept), first_example, **options)

    def one_mask_for_all(seed, step, first_example):
        return DropoutDraw(seed, step, tf.zeros_like(first_example))

    if what == "one_mask_for_all":
        step_module.DropoutDraw = one_mask_for_all
    elif what is not None:
        mistakes = (clip_before_reduce, mean_of_means, dropped_last_example)
        step_module.accumulate = {mistake.__name__: mistake for mistake in mistakes}[what]
    return lambda: [setattr(step_module, "accumulate", accumulate), setattr(step_module, "DropoutDraw", DropoutDraw)]


SPLIT_MISTAKES = ["piece_updated_twice", "gather_of_the_step_before", "moments_of_another_piece"]


def break_split(what):
    """Makes a mistake that only a trainer that splits something could make; returns what undoes it."""
    split, weights, array = split_module.SplitOptimizer, split_module.SplitWeights, split_module.SplitArray
    good = [(AdamW, "apply"), (split, "begin"), (split, "finish"), (array, "assign")]
    good += [(weights, "__init__"), (weights, "begin"), (weights, "held"), (step_module, "forward_backward")]
    good = [(owner, name, getattr(owner, name)) for owner, name in good]
    apply, begin, _, assign, make, _, held, forward_backward = (value for *_, value in good)
    before = []

    def apply_twice(self, gradients, rate):
        apply(self, gradients, rate)
        apply(self, gradients, rate)

    def begin_with_a_gather(self):
        begin(self)
        before[:] = self.gathered()

    def finish_with_it(self, finite):
        for variable, whole in zip(self._variables, before, strict=True):
            tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=whole)

    def make_and_remember(self, collectives, variables):
        make(self, collectives, variables)
        self.before = [Piece(piece.name, piece.shape, piece.dtype, piece.whole_shape) for piece in self.pieces.values()]
        for piece, (variable, _, cut) in zip(self.before, self._together(), strict=True):
            self.write(piece.value, cut, variable.numpy())

    def remember(self):
        for old, piece in zip(self.before, self.pieces.values(), strict=True):
            value = tf.convert_to_tensor(piece.value)
            tf.raw_ops.AssignVariableOp(resource=old.value.handle, value=value)

    def held_before(self, dtype, values=None, is_compiled=False):
        return held(self, dtype, [tf.convert_to_tensor(piece.value) for piece in self.before], is_compiled)

    def with_those_values(model, weights, *arguments, held=None, **options):
        values = weights if held is None else [piece.value for piece in held._pieces.values()]
        return forward_backward(model, values, *arguments, held=held, **options)

    def assign_the_next(self, array):
        moved = np.roll(self._cut.padded(array), self._cut.piece_shape[0], axis=0)
        assign(self, moved[: self._cut.num_rows].reshape(self._cut.shape))

    if what == "piece_updated_twice":
        AdamW.apply = apply_twice
    elif what == "gather_of_the_step_before":
        split.begin, split.finish = begin_with_a_gather, finish_with_it
        weights.__init__, weights.begin, weights.held = make_and_remember, remember, held_before
        step_module.forward_backward = with_those_values
    else:
        array.assign = assign_the_next

    def mend():
        for owner, name, value in good:
            setattr(owner, name, value)

    return mend


def count_reductions(function):
    """How many collective reductions a traced function holds, in all the functions it calls."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for called in graph.library.function for node in called.node_def)]
    return sum(node.op == "CollectiveReduceV2" for node in nodes)


def foreign_model(dtype):
    """A model of Keras's own layers, of odd sizes; on many replicas some pieces of its vectors are only padding."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Embedding(VOCABULARY, 7, dtype=dtype),
        keras.layers.LayerNormalization(dtype=dtype),
        keras.layers.Dense(VOCABULARY, dtype=dtype),
    ]
    return keras.Sequential([keras.Input([SEQUENCE_LENGTH], dtype="int32"), *layers])


def take_steps(strategy, config, is_foreign=False):
    """Returns the weights after all steps, each clipped gradient of the first step, and what the step reported."""
    in_pieces, dtype = config.distribution.shard == "weights", config.train.precision
    with strategy.scope(), without_values() if in_pieces else contextlib.nullcontext():
        model = foreign_model(dtype) if is_foreign else GPT(config.model, VOCABULARY, SEQUENCE_LENGTH, dtype=dtype)
    step = step_module.TrainingStep(config, NUM_STEPS, model, strategy)
    batches = iter(distributed(strategy, functools.partial(elements, config.train)))
    run_steps = step.run_steps.get_concrete_function(batches, tf.constant(0, tf.int64))
    run_steps(batches, tf.constant(1, tf.int64))
    # Adam's first moment after one step is the gradient times 1 - beta_1, and Muon's momentum is the gradient.
    first = ("first_moment", "momentum")
    gradients = {name: value.numpy() for name, value in step.state().items() if name.endswith(first)}
    if step.split is not None:  # As if it were saved and restored here.
        for name, array in gradients.items():
            step.state()[name].assign(array)
    metrics = run_steps(batches, tf.constant(NUM_STEPS - 1, tf.int64))
    assert int(metrics.num_steps) == NUM_STEPS - 1
    averages = {} if step.average is None else step.average_state()
    return {
        **{f"averages/{name}": value.numpy() for name, value in averages.items()},
        **{f"weights/{name}": value.numpy() for name, value in step.named_variables.items()},
        **{f"gradients/{name}": value for name, value in gradients.items()},
        "num_clipped": metrics.num_clipped.numpy(),
        "loss": (metrics.loss_sum / metrics.num_targets).numpy(),
        "batches_hash": step.batches_hash.numpy(),
        "num_reductions": count_reductions(run_steps),
    }


def main():
    out, distribution, *cases = sys.argv[1:]
    strategy = make_strategy(config_of(json.loads(distribution), {}).distribution)
    results = {}
    for number, case in enumerate(map(json.loads, cases)):
        mend = break_on_purpose(case.get("mistake"))
        config = config_of(json.loads(distribution), case, strategy.num_replicas_in_sync)
        results |= {
            f"{number}/{name}": value for name, value in take_steps(strategy, config, "foreign" in case).items()
        }
        mend()
    np.savez(out, num_replicas=strategy.num_replicas_in_sync, **results)


if __name__ == "__main__":
    main()
