"""Laws of the texts of a batch: where they end, how they stream, and which of them beam search finds."""

import functools
import itertools
import math

import keras
import numpy as np
import pytest
from every_kind import bpe_of_every_kind, wordpiece_of_every_kind  # type: ignore[import-not-found]

from trainer.decoding.decoder import Decoder
from trainer.decoding.generate import Generator
from trainer.decoding.request import Request
from trainer.decoding.writing import Writing, stable
from trainer.errors import UserError
from trainer.tokenizers.characters import ByteTokenizer, CharTokenizer
from trainer.tokenizers.vocabulary import SPECIAL_TOKENS

GREEDY, RANDOM = Decoder("greedy"), Decoder("random")
LETTERS = CharTokenizer([*SPECIAL_TOKENS, *"abcd"])
BOS = LETTERS.bos_id


def make_model(tokenizer, seed=0, scale=1.0):
    """A model that is quick to trace, and whose next token depends on the last four."""
    model = keras.Sequential([
        keras.layers.Embedding(tokenizer.vocabulary_size, 8),
        keras.layers.Conv1D(8, 4, padding="causal", activation="tanh"),
        keras.layers.Dense(tokenizer.vocabulary_size),
    ])  # fmt: skip
    model.build((None, 8))
    random = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(random.normal(0, scale, weight.shape))
    return model


def make_generator(tokenizer=LETTERS, sequence_length=16, seed=0, scale=1.0):
    return Generator(make_model(tokenizer, seed, scale), tokenizer, sequence_length)


def every_next(generator, prompt, length):
    """Returns the log probabilities of the next token after the prompt and each continuation shorter than length."""
    letters = range(len(SPECIAL_TOKENS), LETTERS.vocabulary_size)
    found = {}
    for size in range(length):
        continuations = list(itertools.product(letters, repeat=size))
        texts = np.array([[BOS, *LETTERS.encode(prompt), *continuation] for continuation in continuations])
        logits = generator.model(texts).numpy().astype(np.float64)[:, -1]
        logits[:, [LETTERS.pad_id, LETTERS.unknown_id]] = -np.inf
        if texts.shape[1] == 1:
            logits[:, BOS] = -np.inf  # No text is empty.
        found |= zip(continuations, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), strict=True)
    return found


def plain_beam_search(following, length, width, penalty):
    """Returns (score, continuation) of the beams, the best first: plain Python, without a tensor."""

    def rank(beam):
        return beam[0] / max(1, len(beam[1])) ** penalty

    beams = [(0.0, ())]
    for _ in range(length):
        ended = [beam for beam in beams if beam[1][-1:] == (BOS,)]
        longer = [
            (score + following[tokens][token], (*tokens, token))
            for score, tokens in beams
            if tokens[-1:] != (BOS,)
            for token in range(LETTERS.vocabulary_size)
            if following[tokens][token] > -math.inf
        ]
        beams = sorted(ended + longer, key=rank, reverse=True)[:width]
    return [(rank(beam), beam[1]) for beam in beams]


@functools.cache
def everything(prompt, length):
    following = every_next(make_generator(scale=0.7), prompt, length)
    return following, plain_beam_search(following, length, 10**9, 0.0)


@pytest.mark.parametrize(
    ("width", "penalty"),
    [
        *[(1, 1.0), (2, 0.0), (7, 0.6), (40, 0.0), (341, 1.0), (5**5, 1.0)],
        *[(width, penalty) for width in (3, 1364) for penalty in (0.0, 0.6, 1.0, 2.5)],
    ],
)
def test_beam_search_is_the_plain_one_and_over_everything_finds_the_best_text(width, penalty):
    length, prompts = 5, ("", "abdc", "c")
    generator = make_generator(scale=0.7)
    decoder = Decoder("beam", num_beams=width, length_penalty=penalty)
    number = min(width, 5)
    texts = generator.generate(prompts, decoder, length, num_samples=number, batch_size=10**6)
    for i, prompt in enumerate(prompts):
        following, all_texts = everything(prompt, length)
        found = texts[number * i : number * (i + 1)]
        expected = plain_beam_search(following, length, width, penalty)[:number]
        assert [text.sample for text in found] == list(range(number))
        assert found == [prompt + LETTERS.decode(tokens) for _, tokens in expected]
        np.testing.assert_allclose([text.score for text in found], [score for score, _ in expected], rtol=1e-5)
        best = max(all_texts, key=lambda text: text[0] / len(text[1]) ** penalty)[1]
        if width >= 1364:  # As many texts as there are; 340 of them end before the last token.
            assert len(all_texts) == (1364 if prompt == "" else 1365) and found[0] == prompt + LETTERS.decode(best)


def test_a_length_penalty_makes_beams_longer_and_there_are_no_more_beams_than_texts():
    generator = make_generator(scale=0.7)
    short, long = (
        generator.generate([""], Decoder("beam", num_beams=9, length_penalty=penalty), 9)[0] for penalty in (0.0, 2.0)
    )
    assert len(short) < len(long)
    one = generator.generate(["ab"], Decoder("beam", num_beams=9), 1, num_samples=9)
    assert len(one) == 5 and math.fsum(math.exp(text.score) for text in one) == pytest.approx(1, rel=1e-5)


def test_a_repetition_penalty_is_that_of_transformers_and_leaves_the_end_of_a_text_alone():
    generator = make_generator(seed=10)
    prompt, penalty = "abca", 1.7
    [text] = generator.generate([prompt], Decoder("greedy", repetition_penalty=penalty), 8)
    tokens = [BOS, *LETTERS.encode(prompt)]
    for _ in range(8):
        logits = generator.model(np.array([tokens])).numpy()[0, -1]
        logits[[LETTERS.pad_id, LETTERS.unknown_id]] = -np.inf
        for token in set(tokens) - {BOS}:
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        tokens.append(int(np.argmax(logits)))
        if tokens[-1] == BOS:
            break
    assert text == LETTERS.decode(tokens) != generator.generate([prompt], GREEDY, 8)[0]


def test_a_text_knows_why_it_ends_and_how_many_tokens_it_has():
    generator = make_generator()
    request = {"seed": 4, "num_samples": 60}
    texts = generator.generate(["ab"], RANDOM, 6, stop=("dd", "ca"), **request)
    assert {text.finish for text in texts} == {"end", "stop", "length"}
    for text, whole in zip(texts, generator.generate(["ab"], RANDOM, 6, **request), strict=True):
        assert (
            text.prompt + text.continuation == text and text.num_tokens == len(text.continuation) and whole[:2] == "ab"
        )
        ends = [whole.find(stop, 2) + 2 for stop in ("dd", "ca") if whole.find(stop, 2) >= 0]
        assert text == whole[: min(ends)] if ends else whole
        assert text.finish == ("stop" if ends else whole.finish)
        assert (whole.finish == "length") == (len(whole) == 8)


@pytest.fixture
def indexes(monkeypatch):
    """The position that each call of the compiled loop reaches."""
    reached = []
    advance = Writing.advance
    monkeypatch.setattr(Writing, "advance", lambda self, number: advance(self, number) or reached.append(self._index))
    return reached


def test_a_stop_ends_the_writing_and_not_only_the_text(indexes):
    generator = Generator(make_model(ByteTokenizer()), ByteTokenizer(), 4000)
    [text] = generator.generate([""], RANDOM, 9, seed=1)
    [stopped] = generator.generate([""], RANDOM, 3000, seed=1, stop=text[-1])
    assert stopped.finish == "stop" and max(indexes) < 100


def test_a_stop_token_ends_a_text_and_is_left_out():
    generator = make_generator(seed=2)
    [c] = LETTERS.encode("c")
    for whole, text in zip(
        *(generator.generate([""], RANDOM, 12, num_samples=20, stop_tokens=stop) for stop in ([], [c])), strict=True
    ):
        place = whole.find("c")
        assert (text, text.finish) == ((whole[:place], "end") if place >= 0 else (whole, whole.finish))
    with pytest.raises(UserError, match=r"^stop_tokens=7 is not a token; the vocabulary has the tokens 0 to 6"):
        generator.generate([""], RANDOM, 1, stop_tokens=[7])


TOKENIZERS = {
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer([*SPECIAL_TOKENS, *" abcé한🙂\n"]),
    "bpe": bpe_of_every_kind,
    "wordpiece": wordpiece_of_every_kind,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_stream_is_the_text_in_whole_characters(kind):
    tokenizer = TOKENIZERS[kind]()
    generator = make_generator(tokenizer, 40)
    written = set()
    for seed in range(3):
        for prompt, stop in (("", ()), ("가 é", ()), ("abc", "a"), ("", ("e", " "))):
            request = Request(RANDOM, 25, seed, stop)
            try:
                [whole] = generator.texts([prompt], request)
            except UserError:  # WordPiece cannot write a space alone.
                continue
            pieces = list(generator.stream(prompt, request))
            assert "".join(pieces) == whole
            # What is shown lasts: a part of a character is shown only once it can no longer become a whole one.
            for end in range(1, len(pieces)):
                assert whole.startswith("".join(pieces[:end]))
            written.add(whole)
    assert len(written) > 5
    with pytest.raises(UserError, match="A stream is one text"):
        next(generator.stream("", Request(Decoder("beam"))))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_stable_is_the_beginning_of_every_longer_text(kind):
    tokenizer = TOKENIZERS[kind]()
    random = np.random.default_rng(0)
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.unknown_id}
    ids = [i for i in range(tokenizer.vocabulary_size) if i not in special]
    texts = [tokenizer.encode("가 é🙂 다람쥐 헌 ㅋㅋ ㅠㅠ ab")] + [random.choice(ids, 60) for _ in range(20)]
    for tokens in texts:
        whole, last = tokenizer.decode(tokens), 0
        for end in range(len(tokens) + 1):
            shown = stable(tokenizer, tokenizer.decode(tokens[:end]))
            assert whole.startswith(shown) and len(shown) >= last
            last = len(shown)
        assert last > 0


def test_a_sliding_window_goes_on_with_the_last_half_whatever_the_batch():
    generator = make_generator(sequence_length=8, seed=1)
    texts = {}
    for prompt in ("", "abcd", "abcdabcdabcdabcdabcd", "dcba" * 3):
        [text] = generator.generate([prompt], RANDOM, 30, seed=5, sliding_window=True)
        # Position p is written in the context that begins with [BOS] in place of token `offset`.
        tokens = [BOS, *LETTERS.encode(text)]
        assert text[: len(prompt)] == prompt
        texts[prompt] = text
        again = [BOS, *LETTERS.encode(prompt)]
        while len(again) < len(tokens):
            offset = 0 if len(again) < 8 else ((len(again) - 8) // 4 + 1) * 4
            context = np.array([[BOS, *again[offset + 1 :]]])
            logits = generator.model(context).numpy()[0, -1]
            logits[[LETTERS.pad_id, LETTERS.unknown_id, *[BOS] * int(again[-1] == BOS)]] = -np.inf
            again.append(drawn(logits, 5, len(again)))
        assert tokens == again
    assert max(map(len, texts.values())) > 16
    together = generator.generate(list(texts), RANDOM, 30, seed=5, sliding_window=True)
    assert together == list(texts.values())
    assert "".join(generator.stream("abcd", Request(RANDOM, 30, 5, sliding_window=True))) == texts["abcd"]
    with pytest.raises(UserError, match="write with a sliding window"):
        generator.generate(["abcdabcd"], GREEDY, 1)


def drawn(logits, seed, position):
    """Returns what `random` draws at a position."""
    import tensorflow as tf

    from trainer.decoding.sampling import draw, uniform

    at = uniform(tf.constant([seed, position], tf.int64), tf.constant([0]))
    return int(draw(tf.constant(logits[np.newaxis]), at)[0])


def test_beam_search_ends_when_nothing_can_overtake_its_best_texts(indexes):
    generator, decoder = make_generator(sequence_length=60, seed=4, scale=0.7), Decoder("beam", num_beams=6)
    [best] = generator.generate(["ab"], decoder)
    assert best.finish == "end" and best.num_tokens < 10
    assert indexes == [best.num_tokens + 4]  # [BOS], two letters, and the token that ended it.
