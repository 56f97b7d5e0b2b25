"""Laws of a loaded run: its parts work together, and each form of text and tokens comes back in its own form."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from every_kind import bpe_of_every_kind, nasty_texts, wordpiece_of_every_kind  # type: ignore[import-not-found]
from tiny_run import prepared_text, save_checkpoint, tiny  # type: ignore[import-not-found]

import trainer
from mutated_values import SPECIAL_NAMES, prompt_text
from trainer.decoding.request import Request
from trainer.errors import UserError
from trainer.loaded import LoadedModel, TextTokenizer
from trainer.monitoring import tags
from trainer.monitoring.event_log import EventLog
from trainer.runs.run_folder import RunFolder
from trainer.tokenizers.characters import ByteTokenizer, CharTokenizer

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MAKERS = {
    "wordpiece": wordpiece_of_every_kind,
    "bpe": bpe_of_every_kind,
    "char": lambda: CharTokenizer(["[PAD]", "[UNK]", "[BOS]", *sorted(set("".join(nasty_texts(50))))]),
    "byte": ByteTokenizer,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loaded")
    run = RunFolder.create(tiny(folder), prepared_text(folder))
    save_checkpoint(run, 1)
    save_checkpoint(run, 2)
    return folder / "run"


@pytest.fixture(scope="module")
def run(folder: Path) -> LoadedModel:
    return trainer.load(str(folder))


def test_a_loaded_run_knows_its_step_and_settings(run: LoadedModel, folder: Path):
    assert (run.step, str(run.folder), run.config.train.sequence_length) == (2, str(folder), 8)
    assert trainer.load(str(folder), step=1).step == trainer.load(f"{folder}/checkpoints/step_000000001").step == 1
    assert repr(run) == f"<{folder} at step 2: {run.model.count_params():,} parameters, char vocabulary of 14>"


def test_a_run_without_a_checkpoint_and_a_wrong_folder_are_refused(folder: Path, tmp_path: Path):
    RunFolder.create(tiny(tmp_path), prepared_text(tmp_path))
    with pytest.raises(UserError, match="has no checkpoint yet; train on with: trainer train --resume"):
        trainer.load(str(tmp_path / "run"))
    with pytest.raises(UserError, match=f"{folder.parent} is not a run folder.* Runs near it: {folder}"):
        trainer.load(str(folder.parent))
    with pytest.raises(UserError, match="has no checkpoint of step 3; it has: 1, 2"):
        trainer.load(str(folder), step=3)


def test_the_model_is_a_keras_model_that_predicts_and_prints_its_layers(run: LoadedModel):
    tokens = np.array([[run.tokenizer.bos_id, *run.tokenizer.encode("the ")]], np.int32)
    logits = run.model.predict(tokens, verbose=0)
    assert logits.shape == (1, 5, run.tokenizer.vocabulary_size)
    np.testing.assert_array_equal(logits, run.model(tokens))
    lines: list[str] = []
    run.model.summary(print_fn=lines.append, line_length=120)
    table = "\n".join(lines)
    for layer, shape in (("token_embedding", 4), ("block_0", 4), ("unembedding", run.tokenizer.vocabulary_size)):
        (row,) = [line for line in table.split("\n") if f" {layer} " in line]
        assert f"(None, None, {shape})" in row, row
    assert f"Total params: {run.model.count_params():,}" in table


def test_generate_writes_what_trainer_generate_writes(run: LoadedModel, folder: Path):
    given: dict[str, Any] = {"sampler": "top-k", "k": 2, "seed": 5, "stop": "t", "num_tokens": 3}
    for options in (given, {}):
        of_function = trainer.generate(str(folder), ["the ", "a"], **options)
        assert run.generate(["the ", "a"], **options) == run.generate(["the ", "a"], **options) == of_function
    with pytest.raises(UserError, match="k=3 has no effect with the sampler greedy"):
        run.generate("", "greedy", k=3)


def test_a_score_is_the_sum_of_the_model_s_own_losses(run: LoadedModel):
    texts = ["the cat", "a", "the cat sat on the mat"]  # The last is longer than the context of 8 tokens.
    scores = run.score(texts)
    for text, score in zip(texts[:2], scores[:2], strict=True):
        tokens = run.tokenizer.encode(text)
        logits = run.model(np.array([[run.tokenizer.bos_id, *tokens]], np.int32))[0].numpy().astype(np.float64)
        by_hand = sum(np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits[:-1], tokens, strict=True))
        assert abs(score.nats - by_hand) <= 1e-5 * by_hand  # float32: separates a bug from rounding
        assert (score.num_tokens, score.num_bytes) == (len(tokens), len(text))
        assert score.bits_per_byte == score.nats / np.log(2) / len(text)
        assert run.score(text)._replace(nats=score.nats) == score
    assert run.score(texts[2], stride=1).num_tokens == scores[2].num_tokens == len(texts[2])
    assert run.score([]) == []
    wrong: Any
    for wrong in (5, None, ["a", 5]):
        with pytest.raises(UserError, match="is not a text"):
            run.score(wrong)


@pytest.mark.parametrize("kind", MAKERS)
def test_each_form_of_text_is_encoded_and_decoded_in_its_own_form(kind: str):
    wrapped = MAKERS[kind]()
    tokenizer = TextTokenizer(wrapped)
    texts = ["hello world!", "", *nasty_texts(20)]
    rows = [wrapped.encode(text).tolist() for text in texts]
    back = [wrapped.decode(row) for row in rows]
    tensor = tf.constant(texts)
    assert [tokenizer.encode(text) for text in texts] == tokenizer.encode(texts) == rows
    assert [tokenizer.decode(row) for row in rows] == tokenizer.decode(rows) == back
    ragged = tokenizer.encode(tensor)
    assert ragged.dtype == tf.int32 and ragged.to_list() == rows
    assert tokenizer.encode(tensor[0]).numpy().tolist() == rows[0]
    assert [text.decode() for text in tokenizer.decode(ragged).numpy()] == back
    assert tokenizer.decode(tf.constant(rows[0])).numpy().decode() == back[0]
    assert tokenizer.decode(np.array([rows[0]])) == [back[0]]
    assert tokenizer.encode([]) == [] and tokenizer.decode([]) == ""
    in_pipeline = tf.data.Dataset.from_tensor_slices(texts).batch(len(texts)).map(tokenizer.encode)
    assert next(iter(in_pipeline)).to_list() == rows
    assert next(iter(tf.data.Dataset.from_tensors(texts[0]).map(tokenizer.encode))).numpy().tolist() == rows[0]


@pytest.mark.parametrize("kind", MAKERS)
def test_the_vocabulary_names_each_token(kind: str):
    tokenizer = TextTokenizer(MAKERS[kind]())
    assert len(tokenizer.vocabulary) == tokenizer.vocabulary_size
    ids = range(tokenizer.vocabulary_size)
    assert [tokenizer.token_to_id(tokenizer.id_to_token(id)) for id in ids] == list(ids)
    assert tokenizer.id_to_token(tokenizer.bos_id) == "[BOS]" and tokenizer.token_to_id("[PAD]") == tokenizer.pad_id
    assert tokenizer.id_to_token(tf.constant(tokenizer.bos_id)) == "[BOS]"
    assert [tokenizer.decode([id]) for id in tokenizer.encode("a!")] == ["a", "!"]


@pytest.mark.parametrize("value", ["\ud800", b"\xff", 5, None, [5], tf.constant(5), tf.constant([["a"]])], ids=repr)
def test_what_is_not_text_is_not_encoded(value: object):
    with pytest.raises(UserError, match=r"give (a text|a string|texts)"):
        TextTokenizer(ByteTokenizer()).encode(value)


@pytest.mark.parametrize("value", [[-1], [258], [1.5], "a", 10**20, None, tf.constant(["a"]), [[1], [300]]], ids=repr)
def test_what_is_no_token_is_not_decoded(value: object):
    with pytest.raises(UserError, match="is not a token; tokens are the integers from 0 to 257"):
        TextTokenizer(ByteTokenizer()).decode(value)


def test_an_unknown_token_has_no_number():
    tokenizer = TextTokenizer(ByteTokenizer())
    with pytest.raises(UserError, match="'hello' is not in the vocabulary of 258 tokens"):
        tokenizer.token_to_id("hello")
    with pytest.raises(UserError, match="-1 is not a token"):
        tokenizer.id_to_token(-1)


def test_history_has_each_step_of_a_resumed_run_once_with_its_newest_value(run: LoadedModel, folder: Path):
    assert run.history == {}
    first = EventLog(folder / "logs" / "train", 0)
    for step in (10, 20, 30):
        first.scalars(step, {tags.LOSS: step, "loss/gone": 1.0} if step > 10 else {tags.LOSS: step})
    first.close()
    again = EventLog(folder / "logs" / "train", 10)  # It was killed after step 30, and goes on from step 10.
    again.scalars(20, {tags.LOSS: 0.5})
    again.texts(20, {"text/samples/greedy": "the cat"})
    again.close()
    score = EventLog(folder / "logs" / "validation", 0)
    score.scalars(20, {tags.PERPLEXITY: 1e300})
    score.close()
    history = run.history
    assert set(history) == {"train/loss/nats_per_token", "validation/loss/perplexity"}
    steps, values = history["train/loss/nats_per_token"]
    assert steps.tolist() == [10, 20] and values.tolist() == [10.0, 0.5]
    assert history["validation/loss/perplexity"].values.tolist() == [np.finfo(np.float32).max]
    for file in (folder / "logs" / "train").iterdir():
        file.write_bytes(file.read_bytes()[:-3])  # Killed while it wrote: the last event is lost.
    assert run.history["train/loss/nats_per_token"].steps.tolist() == [10, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "x"}, "seed='x' is not a whole number"),
        ({"seed": 1.5}, "seed=1.5 is not a whole number"),
        ({"stop": 5}, "stop=5 is not a text; give a string"),
        ({"stop": ["a", None]}, "stop=None is not a text"),
        ({"stop_tokens": [0.5]}, "stop_tokens=0.5 is not a token"),
        ({"sampler": None}, "None is not a sampler; choose one of greedy"),
        ({"prompts": 5}, "The prompt 5 is not a text"),
        ({"prompts": b"the"}, "The prompt b'the' is not a text"),
        ({"prompts": ["the", None]}, "The prompt None is not a text"),
        ({"prompts": "\ud800"}, r"The prompt '\\ud800' is not UTF-8"),
    ],
)
def test_what_cannot_be_written_with_is_refused(run: LoadedModel, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        run.generate(**{"prompts": "the", "num_tokens": 2, **options})


def test_one_stop_token_and_a_huge_number_of_samples_need_no_list(run: LoadedModel):
    assert run.generate("the", "greedy", num_tokens=2, stop_tokens=5) == run.generate(
        "the", "greedy", num_tokens=2, stop_tokens=[5]
    )
    request = Request.from_options(run.config.samples, num_tokens=1, num_samples=10**15, batch_size=2)
    assert next(run._generator.texts(["the"], request)).startswith("the")
    with pytest.raises(UserError, match=r"a stride of 1\.5 must be from 1 to 8"):
        run.score("the cat", stride=1.5)  # type: ignore[arg-type]


# tests/mutations/mutate.py tries thousands, with other options, on the command line and in files.
FUZZED = [*SPECIAL_NAMES, "".join(SPECIAL_NAMES), *(prompt_text(random.Random(number))[:300] for number in range(60))]


@pytest.mark.parametrize("kind", MAKERS)
def test_no_prompt_becomes_a_special_token(kind: str):
    tokenizer = TextTokenizer(MAKERS[kind]())
    for text in FUZZED:
        if not LONE_SURROGATE.search(text):
            assert not {tokenizer.bos_id, tokenizer.pad_id} & {*tokenizer.encode(text)}, repr(text)


def test_fuzzed_prompts_are_continued_unless_they_are_not_text(run: LoadedModel):
    for text in FUZZED:
        if LONE_SURROGATE.search(text):
            with pytest.raises(UserError, match="is not UTF-8"):
                run.generate(text, num_tokens=2, sliding_window=True)
        else:
            (written,) = run.generate(text, num_tokens=2, sliding_window=True)
            assert written.prompt == text and written.num_tokens <= 2


def test_no_texts_are_decoded_to_no_texts():
    tokenizer = TextTokenizer(ByteTokenizer())
    empty = tf.zeros([0, 5], tf.int32)
    for tokens in (empty, tf.RaggedTensor.from_tensor(empty), tokenizer.encode(tf.constant([], tf.string))):
        texts = tokenizer.decode(tokens)
        assert (texts.dtype, texts.shape.as_list()) == (tf.string, [0])
    assert tokenizer.decode(np.zeros((0, 5))) == []
    assert tokenizer.decode(tf.zeros([0], tf.int32)).numpy() == b""
    assert tokenizer.decode(np.zeros(0)) == tokenizer.decode([]) == ""
    assert tokenizer.decode(np.zeros((2, 0))) == ["", ""]
