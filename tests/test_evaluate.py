"""Laws of the evaluation."""

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config import make_config
from trainer.data import storybook
from trainer.data.batches import evaluation_batches
from trainer.data.prepare import prepare
from trainer.evaluate import Evaluation, Evaluator
from trainer.model.gpt import GPT
from trainer.run import build_gpt
from trainer.training import distribution
from trainer.training.distribution import make_strategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all tests, so that a text is prepared once."""
    return tmp_path_factory.mktemp("evaluate")


def evaluator_of(folder, build=None, sequence_length=128, **data):
    config = make_config(
        {
            "run_folder": str(folder / "run"),
            "data": {
                "storybook_stories": 60,
                "held_out_fraction": 0.3,
                "prepared_folder": str(folder / "p"),
                "mode": "lines",
            }
            | data,
            "tokenizer": {"kind": "wordpiece", "vocabulary_size": 3000},
            "model": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8},
            "train": {
                "precision": "float64",
                "total_steps": 1,
                "global_batch_size": 4,
                "sequence_length": sequence_length,
            },
        }
    )
    prepared = prepare(config, lambda _: None)
    strategy = make_strategy(config.distribution)
    with strategy.scope():
        build = build or functools.partial(build_gpt, bos_id=prepared.bos_id)
        model = build(config, prepared.vocabulary_size)
    return Evaluator(model, strategy, prepared, config)


@pytest.mark.parametrize("halved_from_tokens", [1, 100_000])
def test_every_token_counts_once_and_alike(folder, monkeypatch, halved_from_tokens):
    monkeypatch.setattr(distribution, "HALVED_FROM_TOKENS", halved_from_tokens)
    evaluator = evaluator_of(folder)
    plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none", dtype="float64")
    losses, weights = [], []
    for inputs, targets, batch_weights in evaluation_batches(evaluator.prepared, evaluator.config):
        losses.append(np.ravel(plain(targets, evaluator.model(inputs))))
        weights.append(np.ravel(batch_weights))
    expected = np.average(np.concatenate(losses), weights=np.concatenate(weights))
    evaluation = evaluator()
    split = evaluator.prepared.split("validation")
    assert evaluation.num_tokens == split.num_tokens + split.num_documents == np.concatenate(weights).sum()
    assert evaluation.loss == pytest.approx(expected, rel=1e-12)
    assert evaluation.perplexity == pytest.approx(math.exp(expected), rel=1e-12)
    bits = expected * split.num_tokens / math.log(2) / split.num_bytes
    assert evaluation.bits_per_byte == pytest.approx(bits, rel=1e-12)


def test_each_source_of_a_mixture_is_scored_by_itself_too(folder):
    for name, lines in (
        ("a", "one\ntwo two\n"),
        ("b", "three\n"),
        ("a_valid", "two\none\n"),
        ("b_valid", "three one\n" * 9),
    ):
        (folder / f"{name}.txt").write_text(lines)
    train, validation = ([str(folder / f"{name}{end}.txt") for name in "ab"] for end in ("", "_valid"))
    evaluator = evaluator_of(folder, train=train, validation=validation, weights=[1, 1])
    evaluation = evaluator()
    sums = []
    for split in evaluator.prepared.parts("validation"):
        batches = evaluation_batches(evaluator.prepared, evaluator.config, split=split)
        scores = [[float(each) for each in evaluator.model.evaluation_loss(*batch)] for batch in batches]
        sums.append(np.sum(scores, axis=0))
    counts = [split.num_tokens + split.num_documents for split in evaluator.prepared.parts("validation")]
    assert [count for _, count in sums] == counts
    assert evaluation.losses == pytest.approx([loss / count for loss, count in sums], rel=1e-12)
    assert evaluation.num_tokens == sum(counts)
    assert evaluation.loss == pytest.approx(sum(loss for loss, _ in sums) / sum(counts), rel=1e-12)
    assert f"of each source {evaluation.losses[0]:.4f}, {evaluation.losses[1]:.4f}" in str(evaluation)


@pytest.mark.parametrize("predict_end", [True, False])
def test_excess_is_measured_from_the_exact_probability_of_the_same_stories(folder, predict_end):
    evaluator = evaluator_of(folder, predict_end=predict_end)
    split, tokenizer = evaluator.prepared.split("validation"), evaluator.prepared.tokenizer()
    stories = [
        tokenizer.decode(row[: int(weight.sum())])
        for _, targets, weights in evaluation_batches(evaluator.prepared, evaluator.config).as_numpy_iterator()
        for row, weight in zip(targets, weights, strict=True)
        if weight.any()
    ]
    assert len(stories) == split.num_documents
    evaluation = evaluator()
    assert evaluation.num_tokens == split.num_tokens + predict_end * split.num_documents
    # After the closing sentence a story's end is certain: it adds nothing to the entropy.
    entropy = sum(-storybook.log_probability(story) for story in stories) / evaluation.num_tokens
    assert evaluation.excess == pytest.approx(evaluation.loss - entropy, abs=1e-9)


@pytest.mark.parametrize("case", ["some batches only", "stories packed", "stories cut", "a text file"])
def test_excess_is_left_out_where_it_would_not_be_exact(folder, case):
    if case == "some batches only":
        assert evaluator_of(folder)(num_batches=1).excess is None
    elif case == "stories packed":
        assert evaluator_of(folder, mode="packed")().excess is None
    elif case == "stories cut":
        assert evaluator_of(folder, sequence_length=100)().excess is None
    else:
        text = folder / "text.txt"
        text.write_text("\n".join(f"line {i}" for i in range(50)), encoding="utf-8")
        assert evaluator_of(folder, train=[str(text)])().excess is None


@pytest.mark.parametrize("halved_from_tokens", [1, 100_000])
def test_a_model_that_offers_only_logits_is_scored_too(folder, monkeypatch, halved_from_tokens):
    monkeypatch.setattr(distribution, "HALVED_FROM_TOKENS", halved_from_tokens)

    def build(config, vocabulary_size):
        inputs = keras.Input((None,), dtype="int32")
        return keras.Model(inputs, GPT(config.model, vocabulary_size, 128, dtype="float64")(inputs))

    ours, foreign = evaluator_of(folder), evaluator_of(folder, build)
    foreign.model.layers[-1].set_weights(ours.model.get_weights())
    assert not isinstance(foreign.model, GPT)
    assert foreign().loss == pytest.approx(ours().loss, rel=1e-12)


def test_a_lossy_tokenizer_is_named():
    assert "of what the tokenizer keeps" in str(Evaluation(1.0, 10, 2.0, True, None))
    assert "of what the tokenizer keeps" not in str(Evaluation(1.0, 10, 2.0, False, 0.01))
    assert "+0.0100 nats per token above" in str(Evaluation(1.0, 10, 2.0, False, 0.01))


def test_evaluation_leaves_the_model_as_it_is(folder):
    evaluator = evaluator_of(folder)
    before = [tf.identity(v.value) for v in evaluator.model.variables]
    first, second = evaluator(), evaluator()
    assert first == second
    for variable, value in zip(evaluator.model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
