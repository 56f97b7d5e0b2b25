"""Laws of the scores of texts."""

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.distributed.strategy import make_strategy
from trainer.errors import UserError
from trainer.model.build import build_gpt
from trainer.model.gpt import GPT
from trainer.scoring.last_word import score_last_words
from trainer.scoring.score import Score, total
from trainer.scoring.scorer import Scorer, tokenized
from trainer.scoring.windows import batches_of, windows_of
from trainer.system.process import call_in_new_process
from trainer.training.evaluation import Evaluator

WIDTH = 20
TEXTS = [
    "",
    "the cat",
    "The  CAT, it is said ('quoted')." * 5,
    "a\tb\n\nc  ",
    "한국어 문장, and more of it. " * 3,
    "é" * 45,
]
TOKENIZERS = {
    "wordpiece": {"kind": "wordpiece", "vocabulary_size": 400},
    "bpe": {"kind": "bpe", "vocabulary_size": 400},
    "char": {"kind": "char"},
    "byte": {"kind": "byte"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all tests, so that a text is prepared once."""
    return tmp_path_factory.mktemp("score")


def world_of(folder, kind="bpe", mode="packed", validation=("the cat, it is said", "sat"), **distribution):
    """Returns (config, prepared, model, strategy) of a random model whose tokenizer has learned ASCII text only."""
    (folder / "train.txt").write_text("the cat, it is said, sat. The CAT of tab\tand (quoted)'\n" * 20, "utf-8")
    (folder / "validation.txt").write_text("".join(f"{line}\n" for line in validation), "utf-8")
    config = tiny_config(
        folder,
        data={"train": [f"{folder}/train.txt"], "validation": [f"{folder}/validation.txt"], "mode": mode},
        tokenizer=TOKENIZERS[kind],
        train={"precision": "float64", "global_batch_size": 4, "sequence_length": WIDTH},
        distribution=distribution,
    )
    prepared = tiny_prepared(config)
    strategy = make_strategy(config.distribution)
    with strategy.scope():
        model = build_gpt(config, prepared.vocabulary_size, bos_id=prepared.bos_id)
    return config, prepared, model, strategy


@functools.cache
def cached_world(folder, kind="bpe", mode="packed"):
    return world_of(folder, kind, mode)


def plain_score(model, tokens, stride=WIDTH):
    """Returns the nats of a text and whether each token is the likeliest, position by position."""
    nats, are_right, end = 0.0, [], WIDTH
    for position in range(1, len(tokens)):
        if position > end:  # The next window ends a stride later, or with the text.
            end = min(end + stride, len(tokens) - 1)
        context = tokens[max(0, end - WIDTH) : position]
        # Zeros after the context: a causal model does not see them, and all calls have the same shape.
        row = np.pad(context, (0, WIDTH - len(context)))
        logits = np.asarray(compiled(model)(row[np.newaxis])[0, len(context) - 1])
        nats += logits.max() + np.log(np.exp(logits - logits.max()).sum()) - logits[tokens[position]]
        are_right.append(logits.argmax() == tokens[position])
    return nats, are_right


@functools.cache
def compiled(model):
    return tf.function(model)


@pytest.mark.parametrize("stride", [1, 2, 7, WIDTH - 1, WIDTH])
@pytest.mark.parametrize("num_targets", [0, 1, WIDTH - 1, WIDTH, WIDTH + 1, 2 * WIDTH, 2 * WIDTH + 1])
@pytest.mark.parametrize("first", [0, 5, WIDTH + 3])
def test_windows_score_every_target_once(stride, num_targets, first):
    windows = list(windows_of(0, first, num_targets, WIDTH, stride))
    scored = [place for window in windows for place in range(window.first, window.end)]
    assert scored == list(range(first, num_targets))
    for before, window in zip([None, *windows], windows, strict=False):
        assert window.length == min(window.end, WIDTH)  # As much context as fits.
        assert before is None or window.end - window.first <= stride


def test_batches_hold_every_window_once_and_are_not_larger_than_asked():
    random = np.random.default_rng(0)
    tokens = [random.integers(1, 99, n + 1).astype(np.int32) for n in [3, 1, 90, 17, *([40] * 9)]]
    windows = [window for i, each in enumerate(tokens) for window in windows_of(i, 0, len(each) - 1, 32, 8)]
    seen = {}
    for batch in batches_of(windows, tokens, 32, num_replicas=2, tokens_per_batch=100):
        rows, width = batch.inputs.shape
        assert rows % 2 == 0 and rows // 2 * width <= 100 and width <= 32
        assert not batch.weights[len(batch.windows) :].any()
        for window, *row in zip(batch.windows, *batch[1:], strict=False):
            seen[window] = row
    assert seen.keys() == set(windows)
    for window, (inputs, targets, weights) in seen.items():
        stream = tokens[window.text]
        np.testing.assert_array_equal(inputs[: window.length], stream[window.start : window.end])
        np.testing.assert_array_equal(targets[weights == 1], stream[window.first + 1 : window.end + 1])


@pytest.mark.parametrize("stride", [None, 1, 6])
def test_a_strided_score_equals_a_plain_loop_over_positions(folder, stride):
    _, prepared, model, strategy = cached_world(folder)
    tokenizer = prepared.tokenizer()
    results = list(Scorer(model, tokenizer, WIDTH, strategy).results(tokenized(tokenizer, TEXTS), stride))
    for text, (score, is_right) in zip(TEXTS, results, strict=True):
        tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
        nats, are_right = plain_score(model, tokens, stride or WIDTH)
        assert score.nats == pytest.approx(nats, rel=1e-12)
        assert is_right == all(are_right)
        assert (score.num_tokens, score.num_bytes) == (len(tokens) - 1, len(text.encode()))
        assert score.num_words == len(text.split())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bits_per_byte_are_of_the_raw_bytes_for_every_tokenizer(folder, kind):
    _, prepared, model, strategy = cached_world(folder, kind)
    tokenizer = prepared.tokenizer()
    file = folder / f"raw-{kind}.txt"
    texts = ["The cat, it is said ('quoted').", "한국어 é, \U0001f600", "the  cat\tsat"]
    file.write_bytes("\n".join(texts).encode())
    raw = np.fromfile(file, np.uint8)
    num_bytes = np.count_nonzero(raw != ord("\n"))
    tokens = [np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.int32) for text in texts]
    nats = sum(plain_score(model, each)[0] for each in tokens)
    score = total(Scorer(model, tokenizer, WIDTH, strategy).scores(texts))
    assert score.num_bytes == num_bytes
    assert score.bits_per_byte == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-12)
    # Byte-level tokenizers keep all of a text; a character or a word that the vocabulary cannot spell is [UNK].
    assert ("of what the tokenizer keeps" in str(score)) == (kind not in ("bpe", "byte"))
    assert (score.num_unknown > 0) == (kind in ("wordpiece", "char"))


def test_scores_of_whole_lines_with_their_ends_are_the_runs_own_evaluation(folder):
    lines = ["the cat, it is said", "sat", "of tab (quoted)"]
    config, prepared, model, strategy = world_of(folder, "bpe", "lines", lines)
    evaluation = Evaluator(model, strategy, prepared, config)()
    score = total(Scorer(model, prepared.tokenizer(), WIDTH, strategy).scores(lines, with_ends=True))
    assert score.loss == pytest.approx(evaluation.loss, rel=1e-12)
    assert score.bits_per_byte == pytest.approx(evaluation.bits_per_byte, rel=1e-12)
    assert (score.num_tokens, score.num_texts) == (evaluation.num_tokens, 3)


def test_a_model_that_offers_only_logits_has_the_same_scores(folder):
    config, prepared, ours, strategy = cached_world(folder)
    inputs = keras.Input((None,), dtype="int32")
    gpt = GPT(config.model, prepared.vocabulary_size, WIDTH, dtype="float64", bos_id=prepared.bos_id)
    foreign = keras.Model(inputs, gpt(inputs))
    gpt.set_weights(ours.get_weights())
    tokenizer = prepared.tokenizer()
    for one, other in zip(
        Scorer(foreign, tokenizer, WIDTH).scores(TEXTS, 6),
        Scorer(ours, tokenizer, WIDTH, strategy).scores(TEXTS, 6),
        strict=True,
    ):
        assert one._replace(nats=0) == other._replace(nats=0)
        assert one.nats == pytest.approx(other.nats, rel=1e-12)


def scores_on(num_replicas, folder):
    """Returns the scores of the same model on a CPU that is split; runs in a new process."""
    _, prepared, model, strategy = world_of(folder, logical_devices=num_replicas)
    assert strategy.num_replicas_in_sync == num_replicas
    return list(Scorer(model, prepared.tokenizer(), WIDTH, strategy).scores(TEXTS, 6))


@pytest.mark.slow
def test_four_replicas_give_the_scores_of_one(folder):
    one, four = scores_on(1, folder), call_in_new_process(scores_on, 4, folder)
    assert [score._replace(nats=0) for score in four] == [score._replace(nats=0) for score in one]
    assert [score.nats for score in four] == pytest.approx([score.nats for score in one], rel=1e-12)


@pytest.mark.parametrize("stride", [0, WIDTH + 1])
def test_a_stride_beyond_the_context_is_refused(folder, stride):
    _, prepared, model, strategy = cached_world(folder)
    with pytest.raises(UserError, match=f"a stride of {stride} must be from 1 to {WIDTH}"):
        list(Scorer(model, prepared.tokenizer(), WIDTH, strategy).scores(["a"], stride))


def test_figures_follow_from_the_sums():
    score = total([Score(2.0, 4, 10, 2), Score(1.0, 2, 6, 1, 1, is_lossy=True)])
    assert score == Score(3.0, 6, 16, 3, 1, 2, True)
    figures = score.figures()
    assert figures["loss"] == 0.5
    assert figures["perplexity"] == pytest.approx(math.exp(0.5))
    assert figures["word_perplexity"] == pytest.approx(math.e)
    assert figures["bits_per_byte"] == pytest.approx(3 / math.log(2) / 16)
    assert total([]).figures()["loss"] is None


def test_last_words_equal_a_plain_loop_and_are_right_if_greedy_decoding_writes_them(folder):
    _, prepared, model, strategy = cached_world(folder)
    tokenizer = prepared.tokenizer()
    texts = ["the cat, it", "  said ", "the cat, it is said, sat. The CAT of tab\tand  quoted"]
    # Texts that the model goes on with as greedy decoding does: a last word that is right.
    split = {
        "the cat, it": ("the cat,", " it"),
        "  said ": ("", " said"),
        texts[2]: (texts[2][:-8].rstrip(), " quoted"),
    }
    nats, num_tokens, num_right = 0.0, 0, 0
    for before, word in split.values():
        tokens = np.array([tokenizer.bos_id, *tokenizer.encode(before + word)], np.int32)
        first = 1 + len(tokenizer.encode(before))
        # One window, which ends with the text.
        last = tokens[-WIDTH - 1 :]
        losses = [plain_score(model, last[: place + 1]) for place in range(len(last))]
        nats += losses[-1][0] - losses[first - len(tokens) - 1][0]
        num_tokens += len(tokens) - first
        num_right += all(losses[-1][1][first - len(tokens) :])
    found = score_last_words(Scorer(model, tokenizer, WIDTH, strategy), texts)
    assert found.score.nats == pytest.approx(nats, rel=1e-12)
    assert (found.score.num_tokens, found.score.num_words, found.score.num_texts) == (num_tokens, 3, 3)
    assert found.num_right == num_right
    assert found.accuracy == num_right / 3
    assert f"{found.accuracy:.2%} of 3 texts" in str(found)


def test_a_last_word_is_right_if_each_of_its_tokens_is_the_likeliest(folder):
    _, prepared, *_ = cached_world(folder, "char")
    tokenizer = prepared.tokenizer()
    # A model of pairs of characters: after a comma and [BOS] a blank is likeliest, then an "i", then a "t".
    table = np.zeros([tokenizer.vocabulary_size] * 2, np.float32)
    table[tokenizer.bos_id, tokenizer.encode(" ")] = 1
    for pair in (", ", " i", "it"):
        table[tuple(tokenizer.encode(pair))] = 1
    embedding = keras.layers.Embedding(tokenizer.vocabulary_size, tokenizer.vocabulary_size)
    model = keras.Sequential([keras.Input((None,), dtype="int32"), embedding])
    embedding.set_weights([table])
    found = score_last_words(Scorer(model, tokenizer, WIDTH), ["the cat, it", "the cat, at", "the cat, is", "it"])
    assert found.num_right == 2
    likely = math.log(1 + (tokenizer.vocabulary_size - 1) / math.e)  # Nats of the likeliest token after these.
    assert found.score.nats == pytest.approx(11 * likely + 2 + math.log(tokenizer.vocabulary_size), rel=1e-6)


def test_texts_of_many_shapes_are_scored_without_a_warning(folder, caplog):
    # TensorFlow warns if the calls of a function trace it again and again.
    _, prepared, model, strategy = cached_world(folder, "char")
    scorer = Scorer(model, prepared.tokenizer(), WIDTH, strategy)
    for count in range(1, 8):
        assert len(list(scorer.scores(["the cat"] * count))) == count
    assert "retracing" not in caplog.text
