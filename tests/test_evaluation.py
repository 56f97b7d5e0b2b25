"""Laws of the evaluation."""

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer import execution
from trainer.data.batches import evaluation_batches
from trainer.data.coverage import TextBytes, notes_on_examples
from trainer.distributed.strategy import make_strategy
from trainer.model.build import build_gpt
from trainer.model.gpt import GPT
from trainer.runs.results import Evaluation
from trainer.storybook import storybook
from trainer.storybook.printing import printed, tokens_of
from trainer.training.evaluation import Evaluator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all tests, so that a text is prepared once."""
    return tmp_path_factory.mktemp("evaluate")


WORDPIECE = {"kind": "wordpiece", "vocabulary_size": 3000}


def evaluator_of(folder, build=None, sequence_length=136, tokenizer=WORDPIECE, **data):
    config = tiny_config(
        folder,
        data={"storybook_stories": 60, "held_out_fraction": 0.3, "mode": "lines"} | data,
        tokenizer=tokenizer,
        train={"precision": "float64", "global_batch_size": 4, "sequence_length": sequence_length},
    )
    prepared = tiny_prepared(config)
    strategy = make_strategy(config.distribution)
    with strategy.scope():
        build = build or functools.partial(build_gpt, bos_id=prepared.bos_id)
        model = build(config, prepared.vocabulary_size)
    return Evaluator(model, strategy, prepared, config)


@pytest.mark.parametrize("halved_from_tokens", [1, 100_000])
def test_every_token_counts_once_and_alike(folder, monkeypatch, halved_from_tokens):
    monkeypatch.setattr(execution, "HALVED_FROM_TOKENS", halved_from_tokens)
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
    bits = expected * evaluation.num_tokens / math.log(2) / split.num_bytes
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
    assert f"by source {evaluation.losses[0]:.4f}, {evaluation.losses[1]:.4f}" in str(evaluation)


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
    # WordPiece folds case and loses spaces. A story is the print of its words, so its probability stays the same.
    spelling = storybook.built_in_grammar().spelling
    stories = [printed(tokens_of(story, spelling)) for story in stories]
    entropy = sum(-storybook.log_probability(story) for story in stories) / evaluation.num_tokens
    assert evaluation.excess == pytest.approx(evaluation.loss - entropy, abs=1e-9)


@pytest.mark.parametrize("case", ["some batches only", "stories packed", "a text file"])
def test_excess_is_left_out_if_it_is_not_exact(folder, case):
    if case == "some batches only":
        assert evaluator_of(folder)(num_batches=1).excess is None
    elif case == "stories packed":
        assert evaluator_of(folder, mode="packed")().excess is None
    else:
        text = folder / "text.txt"
        text.write_text("\n".join(f"line {i}" for i in range(50)), encoding="utf-8")
        assert evaluator_of(folder, train=[str(text)])().excess is None


def test_a_story_that_is_cut_leaves_out_the_excess_and_a_warning_says_so_before_training(folder):
    whole = evaluator_of(folder)
    longest = whole.prepared.split("validation").max_tokens
    for predict_end in (True, False):
        needed = longest + predict_end
        for length in (needed, needed - 1):
            evaluator = evaluator_of(folder, sequence_length=length, predict_end=predict_end)
            notes = [note for note in notes_on_examples(evaluator.prepared, evaluator.config) if "entropy" in note]
            assert len(notes) == (length < needed)
            assert (evaluator().excess is None) == (length < needed)
        assert notes[0].startswith("warning: ")
        end = " and its end" if predict_end else ""
        assert notes[0].endswith(
            f"the longest one has {longest} tokens{end}, and train.sequence_length={length} cuts it; set "
            f"train.sequence_length={needed}."
        )
    assert not notes_on_examples(whole.prepared, whole.config)


# Bits per byte.

PLAIN = [f"{'the cat, it is said, sat ' * (i % 4)}line {i}." for i in range(40)]


def text_of(folder, name, lines):
    path = folder / f"{name}.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [str(path)]


@pytest.mark.parametrize("halved_from_tokens", [1, 100_000])
@pytest.mark.parametrize("mode", ["packed", "lines", "lines without ends"])
@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_bits_per_byte_are_of_exactly_what_was_scored(folder, monkeypatch, kind, mode, halved_from_tokens):
    monkeypatch.setattr(execution, "HALVED_FROM_TOKENS", halved_from_tokens)
    width = {"bpe": 20, "char": 40}[kind]  # Lines mode cuts some of the text, and less than it may.
    text = text_of(folder, "plain", PLAIN)
    data = {"train": text, "validation": text, "mode": mode.split()[0], "predict_end": "without" not in mode}
    evaluator = evaluator_of(folder, sequence_length=width, tokenizer={"kind": kind}, **data)
    tokenizer = evaluator.prepared.tokenizer()
    for num_batches in (None, 3):
        num_bytes, loss_sum, num_tokens = 0, 0.0, 0
        for batch in evaluation_batches(evaluator.prepared, evaluator.config, num_batches):
            loss_sum += float(evaluator.model.evaluation_loss(*batch)[0])
            for targets, weights in zip(batch[1].numpy(), batch[2].numpy(), strict=True):
                num_tokens += int(weights.sum())
                num_bytes += len(tokenizer.decode(targets[weights == 1]).encode())
        evaluation = evaluator(num_batches)
        assert evaluation.num_tokens == num_tokens
        assert evaluation.bits_per_byte == pytest.approx(loss_sum / math.log(2) / num_bytes, rel=1e-12)
        if mode == "packed" and num_batches is None:
            assert num_bytes == sum(map(len, PLAIN))  # Neither the ends of documents nor the cuts of windows are bytes.
        cut = sum(max(0, len(tokenizer.encode(line)) - width) for line in PLAIN)
        share = 0 if mode == "packed" else cut / evaluator.prepared.split("validation").num_tokens
        assert evaluation.cut_share == pytest.approx(share)
        assert evaluation.is_lossy == (mode != "packed")
        if mode != "packed":
            assert f"(of what the tokenizer keeps, of the {1 - share:.1%} that is not cut)" in str(evaluation)


@pytest.mark.parametrize("mode", ["packed", "lines"])
@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "char", "byte"])
def test_bits_per_byte_equal_a_count_from_the_raw_bytes_for_every_tokenizer(folder, kind, mode):
    width = 64
    train = text_of(folder, "counted_train", PLAIN)
    lines = ["The  cat, it is said ('quoted').", "한국어, é", *PLAIN[:2]]
    validation = text_of(folder, "counted", lines)
    tokenizer = {"kind": kind, **({} if kind in ("char", "byte") else {"vocabulary_size": 400})}
    data = {"train": train, "validation": validation, "mode": mode}
    evaluator = evaluator_of(folder, sequence_length=width, tokenizer=tokenizer, **data)
    found, bos = evaluator.prepared.tokenizer(), evaluator.prepared.bos_id
    texts = [[bos, *found.encode(line)] for line in lines]
    # Lines: each text and its end. Packed: windows of all texts, each of which begins with the last target of the one
    # before.
    stream = [token for text in texts for token in text] + [bos]
    windows = [[*text, bos] for text in texts]
    if mode == "packed":
        windows = [stream[first : first + width + 1] for first in range(0, len(stream) - 1, width)]
    nats = 0.0
    for window in windows:
        logits = np.asarray(evaluator.model(np.array([window[:-1]], np.int32))[0], np.float64)
        log_sums = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1)
        nats += (log_sums - logits[np.arange(len(window) - 1), window[1:]]).sum()
    num_bytes = np.count_nonzero(np.fromfile(validation[0], np.uint8) != ord("\n"))
    evaluation = evaluator()
    assert evaluation.num_tokens == len(stream) - 1
    assert evaluation.bits_per_byte == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-12)
    assert evaluation.is_lossy == (kind in ("wordpiece", "char"))


@pytest.mark.parametrize("mode", ["packed", "lines"])
def test_bits_per_byte_of_a_tokenizer_that_loses_text_are_of_the_original_text(folder, mode):
    lines = [f"The  CAT,it is said ({i})." for i in range(40)]
    text = text_of(folder, "capitals", lines)
    evaluation = evaluator_of(folder, train=text, validation=text, mode=mode)()
    assert evaluation.is_lossy
    bits = evaluation.loss * evaluation.num_tokens / math.log(2)
    assert evaluation.bits_per_byte == pytest.approx(bits / sum(map(len, lines)), rel=1e-12)


@pytest.mark.parametrize("mode", ["packed", "lines"])
def test_a_text_of_unknown_characters_is_called_lossy_and_has_its_own_bytes(folder, mode):
    train, validation = text_of(folder, "known", ["abc"] * 9), text_of(folder, "unknown", ["가나다", "라 마"] * 9)
    evaluator = evaluator_of(folder, tokenizer={"kind": "char"}, train=train, validation=validation, mode=mode)
    evaluation = evaluator()
    assert evaluation.is_lossy
    bits = evaluation.loss * evaluation.num_tokens / math.log(2)
    assert evaluation.bits_per_byte == pytest.approx(bits / (9 * (9 + 7)), rel=1e-12)
    assert not evaluator_of(folder, tokenizer={"kind": "char"}, train=train, validation=train, mode=mode)().is_lossy


@pytest.mark.parametrize("weights", [None, (3, 1)])
@pytest.mark.parametrize("mode", ["packed", "lines"])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_bits_per_byte_of_training_are_of_what_an_epoch_shows(folder, kind, mode, weights):
    # Long documents are of shorter tokens than short ones, so that cutting changes the bytes of a token.
    long, short = ["a b c d e f g h i j k l m n o p " * 2] * 9, ["something remarkable"] * 30
    texts = [text_of(folder, "long", long), text_of(folder, "short", short)]
    train = [*texts[0], *texts[1]]
    data = {"train": train, "validation": train, "mode": mode, "weights": weights}
    evaluator = evaluator_of(folder, sequence_length=20, tokenizer={"kind": kind, "vocabulary_size": 400}, **data)
    prepared, config = evaluator.prepared, evaluator.config
    tokenizer = prepared.tokenizer()
    num_bytes = num_targets = 0.0
    for part, weight, lines in zip(
        prepared.parts("train"), weights or [1], [long, short] if weights else [long + short], strict=True
    ):
        shown = [
            targets[weights == 1]
            for batch in evaluation_batches(prepared, config, split=part)
            for targets, weights in zip(batch[1].numpy(), batch[2].numpy(), strict=True)
        ]
        shown = [targets for targets in shown if len(targets)]
        # A tokenizer that changes spacing: each decoded byte stands for the bytes of the text in proportion.
        decoded = sum(tokenizer.decoded_bytes()[tokenizer.encode(line)].sum() for line in lines)
        scale = sum(map(len, lines)) / decoded
        kept = np.concatenate(shown)
        kept_bytes = tokenizer.decoded_bytes()[kept[kept != prepared.bos_id]].sum()
        num_bytes += weight * kept_bytes * scale / len(shown)
        num_targets += weight * len(kept) / len(shown)
    assert TextBytes(prepared).of_target(config) == pytest.approx(num_bytes / num_targets, rel=1e-12)


@pytest.mark.parametrize("halved_from_tokens", [1, 100_000])
def test_a_model_that_offers_only_logits_is_scored_too(folder, monkeypatch, halved_from_tokens):
    monkeypatch.setattr(execution, "HALVED_FROM_TOKENS", halved_from_tokens)

    def build(config, vocabulary_size):
        inputs = keras.Input((None,), dtype="int32")
        return keras.Model(
            inputs, GPT(config.model, vocabulary_size, config.train.sequence_length, dtype="float64")(inputs)
        )

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
