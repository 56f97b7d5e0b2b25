"""A SavedModel writes and scores as its run does, in a process that does not have this package."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from random_run import PROMPTS, SEQUENCE_LENGTH, TEXT, in_fresh_process, random_run  # type: ignore[import-not-found]
from tiny import quiet  # type: ignore[import-not-found]

import trainer
from trainer.exchange.open import open_model
from trainer.exchange.saved_model import TextModule
from trainer.runs.run_folder import RunFolder
from trainer.scoring.scorer import Scorer

MODERN = (
    *("model.norm=rms", "model.positions=rope", "model.pre_norm=true", "model.activation=swiglu"),
    *(
        "model.num_key_value_heads=1",
        "model.tied_embeddings=true",
        "model.use_bias=false",
        "model.vocabulary_multiple=64",
    ),
)
TEXTS = [*PROMPTS, *TEXT.splitlines()[:7], TEXT[:500]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return random_run(tmp_path_factory.mktemp("saved"), "tokenizer={kind='bpe',vocabulary_size=300}", *MODERN)


@pytest.fixture(scope="module")
def loaded(run: RunFolder):
    exported = trainer.export(str(run.path), "savedmodel", say=quiet)
    return tf.saved_model.load(str(exported.path))


def own_texts(run: RunFolder, prompts: str | list[str], *arguments: Any, **options: Any) -> list[str]:
    return [str(text) for text in trainer.generate(str(run.path), prompts, *arguments, **options)]


def own_scores(run: RunFolder, texts: list[str]) -> tuple[np.ndarray, list[int], list[int]]:
    opened = open_model(str(run.path), say=quiet)
    scores = list(Scorer(opened.model, opened.tokenizer, SEQUENCE_LENGTH).scores(texts))
    return (
        np.array([each.nats for each in scores]),
        [each.num_tokens for each in scores],
        [each.num_bytes for each in scores],
    )


def test_greedy_text_is_that_of_the_run(run: RunFolder, loaded):
    texts = [text.decode() for text in loaded.generate(PROMPTS, num_tokens=20)["texts"].numpy()]
    assert texts == own_texts(run, PROMPTS, "greedy", 20)
    assert len(set(texts)) >= 40


def test_settings_of_a_call_are_those_of_the_decoders(run: RunFolder, loaded):
    def texts(**options: object) -> list[str]:
        return [text.decode() for text in loaded.generate(["The cat", "세"], **options)["texts"].numpy()]

    assert texts() == texts(seed=5) == own_texts(run, ["The cat", "세"], "greedy")
    assert texts(num_tokens=3) == own_texts(run, ["The cat", "세"], "greedy", 3)
    assert (
        texts(temperature=0.7, seed=3, top_k=4)[0]
        == own_texts(run, "The cat", "top-k", k=4, temperature=0.7, seed=3)[0]
    )
    assert texts(temperature=1.0, seed=3, top_p=0.6)[0] == own_texts(run, "The cat", "top-p", p=0.6, seed=3)[0]
    assert texts(temperature=1.0, top_k=1) == texts()
    again = loaded.generate(["The cat"] * 3, temperature=1.5)["texts"].numpy()
    assert len(set(again)) == 3  # A row draws for itself.


def test_what_cannot_be_written_is_refused(loaded):
    for options, message in (
        (
            {"prompts": ["x" * (SEQUENCE_LENGTH - 1)]},
            "A prompt has too many tokens; with .BOS. at most 23 are possible",
        ),
        ({"prompts": ["x"], "num_tokens": 0}, "num_tokens must be at least 1"),
        ({"prompts": ["x"], "top_p": 0.0}, "top_p must be above 0 and at most 1"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            loaded.generate(**options)
    assert len(loaded.generate(["1" * (SEQUENCE_LENGTH - 2)])["texts"]) == 1
    assert len(loaded.generate([])["texts"]) == len(loaded.score([])["nats"]) == 0


def test_scores_are_those_of_the_run_also_for_texts_longer_than_the_model_reads(run: RunFolder, loaded):
    nats, num_tokens, num_bytes = own_scores(run, TEXTS)
    scores = loaded.score(TEXTS)
    np.testing.assert_allclose(scores["nats"], nats, rtol=1e-6)
    assert scores["tokens"].numpy().tolist() == num_tokens
    assert scores["bytes"].numpy().tolist() == num_bytes
    by_signature = loaded.signatures["score"](texts=tf.constant(TEXTS))
    assert by_signature["nats"].numpy().tolist() == scores["nats"].numpy().tolist()


def test_saved_model_computes_in_float32_whatever_the_run_computes_in(run: RunFolder, tmp_path: Path):
    # With the weights of the other run.
    rounded = random_run(
        tmp_path, "tokenizer={kind='bpe',vocabulary_size=300}", *MODERN, "train.precision=mixed_bfloat16"
    )
    opened = open_model(str(rounded.path), say=quiet)
    weights = {variable.path: variable.numpy() for variable in opened.model.variables}
    module = TextModule(weights, opened.config, opened.tokenizer)
    np.testing.assert_allclose(module.score(tf.constant(TEXTS))["nats"], own_scores(run, TEXTS)[0], rtol=1e-6)


LOADS = """
import json
import sys
sys.modules["trainer"] = None  # As if it were not installed.
exec(sys.argv[1])
written = model.generate(json.loads(sys.argv[2]), num_tokens=20)["texts"].numpy()
nats = model.score(json.loads(sys.argv[3]))["nats"].numpy()
print(json.dumps([[text.decode() for text in written], nats.tolist()]))
"""


@pytest.mark.slow
def test_saved_model_writes_and_scores_as_the_run_in_a_process_without_this_package(tmp_path: Path):
    run = random_run(tmp_path, "tokenizer={kind='wordpiece',vocabulary_size=200}")  # The tutorial's shape.
    program = trainer.export(str(run.path), "savedmodel", say=quiet).how_to_load
    *_, last = in_fresh_process(LOADS, program, json.dumps(PROMPTS), json.dumps(TEXTS)).splitlines()
    texts, nats = json.loads(last)
    assert texts == own_texts(run, PROMPTS, "greedy", 20)
    assert len(set(texts)) >= 40
    np.testing.assert_allclose(nats, own_scores(run, TEXTS)[0], rtol=1e-5)
