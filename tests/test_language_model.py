"""Laws of the interface to a model: a GPT that is read as logits only does what it does as a GPT."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainer
from trainer.config.settings import ModelConfig
from trainer.hardware.processor import Processor, processor
from trainer.model.gpt import GPT
from trainer.model.language_model import adapt
from trainer.model.ops import decoding_ops
from trainer.model.ops.plain import PLAIN

VOCABULARY, SEQUENCE = 20, 8


class Foreign(keras.Model):
    """Hides that a model is a GPT."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def call(self, tokens):
        return self.gpt(tokens)


@pytest.fixture(scope="module")
def gpt():
    config = ModelConfig(num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8, pre_norm=True)
    model = GPT(config, VOCABULARY, SEQUENCE, dtype="float64")
    random = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(random.normal(0, 0.5, variable.shape))
    return model


@pytest.fixture(scope="module")
def foreign(gpt):
    model = Foreign(gpt)
    model(np.zeros([1, SEQUENCE], np.int32))
    return model


def tokens(*shape):
    return tf.constant(np.random.default_rng(1).integers(0, VOCABULARY, shape), tf.int32)


def test_only_the_adapter_asks_whether_a_model_is_the_gpt():
    places = []
    for path in Path(trainer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "type"):
                places += [path.name] if "GPT" in ast.unparse(node) else []
    assert places == ["language_model.py"]


def test_losses_and_their_gradients_are_the_same_behind_logits(gpt, foreign):
    text, weights = tokens(2, SEQUENCE + 1), tf.constant(np.tile([1.0, 0.0], [2, SEQUENCE // 2]))
    batch = (text[:, :-1], text[:, 1:], weights)
    results = []
    for model in (gpt, foreign):
        with tf.GradientTape() as tape:
            loss_sum, num_targets = adapt(model).training_loss(*batch, None, tf.constant(2.0), 0.1, PLAIN)
        variables = [variable.value for variable in gpt.trainable_variables]
        gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss_sum, variables)]
        results.append([loss_sum, num_targets, *adapt(model).evaluation_loss(*batch), *gradients])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("length", [0, 3])
def test_the_next_logits_are_the_same_with_a_cache_and_without(gpt, foreign, length):
    texts = tokens(2, SEQUENCE)
    caches = [adapt(model).read(texts, tf.constant(length), PLAIN) for model in (gpt, foreign)]
    assert len(caches[0]) == 1 and caches[1] == []
    for index in range(length + 1, SEQUENCE):
        (ours, caches[0]), (theirs, caches[1]) = (
            adapt(model).next_logits(texts, tf.constant(index), cache, PLAIN)
            for model, cache in zip((gpt, foreign), caches, strict=True)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_weights_are_named_by_path_or_in_a_foreign_model_by_place(gpt, foreign):
    assert "gpt/block_0/query_key_value/kernel" in adapt(gpt).named_variables()
    names = list(adapt(foreign).named_variables())
    assert names[0] == "0000/embeddings" and len(names) == len(foreign.variables)


def test_what_is_known_of_a_gpt_is_not_known_of_another_model(gpt, foreign):
    logits = tf.zeros([1, 1, 32])
    known, unknown = adapt(gpt), adapt(foreign)
    assert (known.is_gpt, known.max_length(), known.num_tokens(logits)) == (True, SEQUENCE, VOCABULARY)
    assert (unknown.is_gpt, unknown.max_length(), unknown.num_tokens(logits)) == (False, None, 32)
    assert (
        known.decoding_ops() == decoding_ops("float64", processor("CPU")) != decoding_ops("float64", Processor("GPU"))
    )
    assert unknown.decoding_ops() == PLAIN
