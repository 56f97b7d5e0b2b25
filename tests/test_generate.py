"""What a text from a model is, whichever way it is computed."""

import dataclasses
import itertools
import string

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config.settings import SAMPLERS, ModelConfig
from trainer.decoding import generate
from trainer.decoding.decoder import Decoder
from trainer.decoding.generate import Generator
from trainer.decoding.request import Request
from trainer.errors import UserError
from trainer.model.gpt import GPT
from trainer.model.language_model import adapt
from trainer.model.ops.cpu import CpuOps
from trainer.model.ops.plain import PLAIN
from trainer.tokenizers.characters import ByteTokenizer, CharTokenizer
from trainer.tokenizers.vocabulary import SPECIAL_TOKENS
from trainer.tokenizers.wordpiece import WordPieceTokenizer

SEQUENCE = 16
TOKENIZER = CharTokenizer([*SPECIAL_TOKENS, *string.ascii_lowercase[:17]])
TINY_TOKENIZER = CharTokenizer([*SPECIAL_TOKENS, "a", "b", "c"])
PAD, UNKNOWN, BOS = range(3)

GREEDY, BEAM, TOP_K, TOP_P = (
    Decoder("greedy"),
    Decoder("beam", num_beams=3),
    Decoder("top-k"),
    Decoder("top-p", top_p=0.9),
)

TUTORIAL_LIKE = ModelConfig(num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=16)
MODERN = TUTORIAL_LIKE.model_copy(
    update={
        "num_layers": 2,
        "activation": "swiglu",
        "norm": "rms",
        "positions": "rope",
        "num_key_value_heads": 1,
        "pre_norm": True,
        "tied_embeddings": True,
        "use_bias": False,
    }
)


def make_model(config=TUTORIAL_LIKE, tokenizer=TOKENIZER, dtype="float32", seed=1):
    """A GPT whose next token depends on all before it; with initial weights it would repeat one."""
    model = GPT(config, tokenizer.vocabulary_size, SEQUENCE, dtype=dtype)
    random = np.random.default_rng(seed)
    for weight in model.trainable_variables:
        mean = 1.0 if weight.path.endswith("gamma") else 0.0
        spread = 0.5 if len(weight.shape) == 2 else 0.1
        weight.assign(random.normal(mean, spread, weight.shape))
    return model


def make_bigram_model(*likely, tokenizer=TINY_TOKENIZER):
    """A foreign model whose logits depend on the token before only: 0, except for `likely` (before, token, logit)."""
    table = np.zeros([tokenizer.vocabulary_size] * 2, np.float32)
    for before, token, logit in likely:
        table[before, token] = logit
    model = keras.Sequential([keras.layers.Embedding(*table.shape)])
    model.build((None, SEQUENCE))
    model.layers[0].embeddings.assign(table)
    return model


class Uncached(keras.Model):
    """Hides from the generator that a model is a GPT."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def call(self, tokens):
        return self.gpt(tokens)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, TOKENIZER, SEQUENCE)


def next_log_probs(model, tokens):
    """Returns log p of each next token, [PAD] and [UNK] ruled out, from the full forward pass."""
    logits = model(np.array([tokens], np.int32)).numpy().astype(np.float64)[0, -1]
    logits[[PAD, UNKNOWN]] = -np.inf
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def greedy_text(model, prompt, num_tokens, tokenizer=TOKENIZER):
    """Repeats the argmax of the full forward pass."""
    tokens = [BOS, *tokenizer.encode(prompt)]
    for _ in range(min(num_tokens, SEQUENCE - len(tokens))):
        tokens.append(int(np.argmax(next_log_probs(model, tokens))))
        if tokens[-1] == BOS:
            break
    return tokenizer.decode(tokens)


def log_probs(model, prompt, continuations, tokenizer):
    """Returns log p of the tokens of each continuation, from one full forward pass."""
    prompt = [BOS, *tokenizer.encode(prompt)]
    rows = [([*prompt, *continuation] + [PAD] * SEQUENCE)[:SEQUENCE] for continuation in continuations]
    logits = model(np.array(rows, np.int32)).numpy().astype(np.float64)
    logits[:, :, [PAD, UNKNOWN]] = -np.inf
    logits -= np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return [
        sum(logits[i, len(prompt) - 1 + j, token] for j, token in enumerate(continuation))
        for i, continuation in enumerate(continuations)
    ]


EACH_SETTING: list[dict[str, object]] = [
    {},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"activation": "swiglu"},
    {"norm": "rms", "norm_epsilon": 1e-3},
    {"positions": "rope", "rope_theta": 100.0},
    {"positions": "rope", "qk_norm": True},
    {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    {"pre_norm": True},
    {"tied_embeddings": True},
    {"use_bias": False},
    {"use_bias": ("query_key_value",)},
    {"vocabulary_multiple": 16},
]


@pytest.mark.parametrize(
    "config",
    [MODERN, *(ModelConfig(**{**TUTORIAL_LIKE.model_dump(), **setting}) for setting in EACH_SETTING)],
    ids=["modern", *(", ".join(setting) or "tutorial" for setting in EACH_SETTING)],
)
def test_cached_step_gives_the_logits_of_the_full_forward_pass(config):
    model = make_model(config)
    tokens = np.random.default_rng(1).integers(0, TOKENIZER.vocabulary_size, [3, SEQUENCE], np.int32)
    first, cache = model.decode(tokens[:, :5], model.empty_cache(3), tf.constant(0))
    logits = [first]
    for i in range(5, SEQUENCE):
        step, cache = model.decode(tokens[:, i : i + 1], cache, tf.constant(i))
        logits.append(step)
    np.testing.assert_allclose(tf.concat(logits, axis=1), model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "a", "fed"])
def test_greedy_repeats_the_argmax_of_the_full_forward_pass(model, generator, prompt):
    expected = greedy_text(model, prompt, 10)
    assert len(set(expected)) > 3  # Otherwise the test would prove little.
    assert generator.generate([prompt], GREEDY, 10) == [expected]


@pytest.mark.parametrize(
    "decoder",
    [
        Decoder("beam", num_beams=1),
        Decoder("top-k", top_k=1),
        Decoder("top-p", top_p=1e-6),
        Decoder("top-k", top_k=1000, temperature=1e-6),  # More tokens than there are: it draws from all.
    ],
)
def test_decoder_with_no_choice_is_greedy(generator, decoder):
    prompts = ["", "bad", "cab"]
    assert generator.generate(prompts, decoder, 10) == generator.generate(prompts, GREEDY, 10)


def test_beam_search_over_everything_finds_the_likeliest_text():
    model = make_model(tokenizer=TINY_TOKENIZER)
    generator = Generator(model, TINY_TOKENIZER, SEQUENCE)
    prompts = ["", "abc", "ca"]
    # A continuation is three tokens, or fewer and [BOS].
    letters = TINY_TOKENIZER.encode("abc")
    continuations = [[*text, BOS][:3] for length in range(4) for text in itertools.product(letters, repeat=length)]
    best, greedy, beam = [], [], []
    for seed in (10, 31, 50):
        model.set_weights(make_model(tokenizer=TINY_TOKENIZER, seed=seed).get_weights())
        for prompt in prompts:
            scores = log_probs(model, prompt, continuations, TINY_TOKENIZER)
            assert np.exp(scores).sum() == pytest.approx(1)
            best.append(prompt + TINY_TOKENIZER.decode(continuations[np.argmax(scores)]))
            greedy.append(greedy_text(model, prompt, 3, TINY_TOKENIZER))
        beam += generator.generate(prompts, Decoder("beam", num_beams=TINY_TOKENIZER.vocabulary_size**2), 3)
    assert beam == best
    # Where the two differ, greedy's text is the less likely one; were they always equal, this would prove little.
    assert sum(a != b for a, b in zip(best, greedy, strict=True)) == 5


def test_top_k_draws_from_the_k_likeliest_tokens(model, generator):
    likeliest = TOKENIZER.decode(np.argsort(next_log_probs(model, [BOS, *TOKENIZER.encode("a")]))[-3:])
    texts = generator.generate(["a"], Decoder("top-k", top_k=3, temperature=100.0), 1, num_samples=64)
    # At that temperature the three are about equally likely.
    assert {text[1:] for text in texts} == set(likeliest)


def test_top_p_draws_from_the_fewest_tokens_that_reach_p():
    model = make_bigram_model((BOS, 3, np.log(60)), (BOS, 4, np.log(30)), (BOS, 5, np.log(9)))  # and [BOS] 1
    generator = Generator(model, TINY_TOKENIZER, SEQUENCE)
    for p, drawn in [(0.5, {"a"}), (0.8, {"a", "b"}), (0.95, {"a", "b", "c"})]:
        assert set(generator.generate([""], Decoder("top-p", top_p=p), 1, num_samples=64)) == drawn


@pytest.mark.parametrize("decoder", [TOP_K, TOP_P], ids=lambda decoder: decoder.name)
def test_seed_decides_the_text(generator, decoder):
    texts = [generator.generate(["", "b"], decoder, 12, seed=seed) for seed in (1, 2, 1, 2**32 - 1, 2**40 + 7)]
    assert texts[0] == texts[2]
    assert len(set(map(tuple, texts))) == 4


@pytest.mark.parametrize("decoder", [GREEDY, BEAM, TOP_K, TOP_P], ids=lambda decoder: decoder.name)
def test_no_prompt_seed_length_or_weight_traces_again(model, generator, decoder):
    before = generator.generate(["a"], decoder, 5)
    generator.generate(["", "abc"], decoder, 7, seed=3)
    generator.generate(["cab"], dataclasses.replace(decoder), SEQUENCE)
    weights = model.get_weights()
    model.set_weights([-weight for weight in weights])
    after = generator.generate(["a"], decoder, 5)
    model.set_weights(weights)
    assert after != before
    loops = [loop for (each, _), loop in generator._loops.items() if each == decoder]
    assert len(loops) == (1 if decoder == BEAM else 2)  # A single row has a loop of its own, except with beams.
    for loop in loops:
        assert [each.experimental_get_tracing_count() for each in (loop.begin, loop.write)] == [1, 1]


@pytest.mark.parametrize("decoder", [GREEDY, BEAM], ids=lambda decoder: decoder.name)
def test_text_is_the_same_alone_and_beside_other_prompts(decoder):
    generator = Generator(make_model(tokenizer=TINY_TOKENIZER, seed=50), TINY_TOKENIZER, SEQUENCE)
    random = np.random.default_rng(0)
    prompts = ["".join(random.choice(list("abc"), length)) for length in [*range(SEQUENCE - 1), 1, 2, 3]]
    together = generator.generate(prompts, decoder, 6)
    assert together == [generator.generate([prompt], decoder, 6)[0] for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True))


def test_text_has_the_requested_number_of_tokens_and_never_more_than_fit():
    model = make_bigram_model((BOS, 3, 9.0), (3, 3, 9.0))
    generator = Generator(model, TINY_TOKENIZER, SEQUENCE)
    room = SEQUENCE - 1  # [BOS] takes one.
    asked = [(0, 1), (0, room), (0, room + 1), (3, 5), (room - 1, 1), (room - 1, 2), (3, 2**31 - 1), (3, 10**30)]
    for prompt_length, num_tokens in asked:
        [text] = generator.generate(["a" * prompt_length], GREEDY, num_tokens)
        assert text == "a" * min(prompt_length + num_tokens, room)


def test_bos_ends_a_text():
    model = make_bigram_model((BOS, 3, 9.0), (3, 4, 9.0), (4, 5, 9.0), (5, BOS, 9.0))
    generator = Generator(model, TINY_TOKENIZER, SEQUENCE)
    for decoder in [GREEDY, BEAM]:
        assert generator.generate(["", "b", "abcabca"], decoder, 8) == ["abc", "bc", "abcabcabc"]


def test_no_text_is_empty_even_if_that_is_the_likeliest_text():
    model = make_bigram_model((BOS, BOS, 9.0), (BOS, 3, 5.0), (3, BOS, 9.0))
    generator = Generator(model, TINY_TOKENIZER, SEQUENCE)
    assert generator.generate(["", "a"], GREEDY, 8) == ["a", "a"]
    [text, prompted] = generator.generate(["", "a"], BEAM, 8)
    assert text != "" and prompted == "a"


def test_pad_and_unknown_are_never_written():
    model = make_bigram_model(*((token, bad, 99.0) for token in range(6) for bad in (PAD, UNKNOWN)), (BOS, 3, 9.0))
    generator = Generator(model, TINY_TOKENIZER, SEQUENCE)
    for name in SAMPLERS:
        texts = generator.generate([""] * 8, Decoder(name, temperature=50.0, num_beams=20), 8)
        assert set("".join(texts)) <= set("abc")
    # In a prompt it is what the user gave.
    assert generator.generate(["?"], GREEDY, 1)[0].startswith("[UNK]")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_logit_beyond_the_vocabulary_is_never_written_however_large(name):
    model = make_model(TUTORIAL_LIKE.model_copy(update={"vocabulary_multiple": 16}), TINY_TOKENIZER)
    model.unembedding.bias.assign(np.where(np.arange(16) < TINY_TOKENIZER.vocabulary_size, 0.0, 99.0))
    assert (np.argmax(model(np.array([[BOS, 3, 4, 5]])), axis=-1) >= TINY_TOKENIZER.vocabulary_size).all()
    plain = make_model(TUTORIAL_LIKE, TINY_TOKENIZER)
    for variable, weight in zip(plain.variables, model.get_weights(), strict=True):
        variable.assign(weight[tuple(map(slice, variable.shape))])
    decoder = Decoder(name, top_k=1000, num_beams=20)
    texts, expected = (
        Generator(each, TINY_TOKENIZER, SEQUENCE).generate(["", "ab"], decoder, 8, seed=3) for each in (model, plain)
    )
    assert texts == expected


def test_stop_string_ends_the_continuation_and_is_kept():
    model = make_bigram_model((BOS, 3, 9.0), (3, 4, 9.0), (4, 5, 9.0), (5, 3, 9.0))
    generator = Generator(model, TINY_TOKENIZER, SEQUENCE)
    for prompt, stop, expected in [
        ("", "bc", "abc"),
        ("abc", "bc", "abcabc"),
        ("ab", "bc", "abcabc"),  # Begun in the prompt, it does not count.
        ("a", "aa", "abcabca"),
        ("ab", "c", "abc"),
    ]:
        assert generator.generate([prompt], GREEDY, 6, stop=stop)[0] == expected


def test_any_keras_model_writes_what_a_cached_one_writes(model, generator):
    foreign = Generator(Uncached(model), TOKENIZER, SEQUENCE)
    for decoder in [GREEDY, BEAM]:
        assert foreign.generate(["", "bad"], decoder, 9) == generator.generate(["", "bad"], decoder, 9)


def test_sequential_model_with_a_fixed_length_works():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Embedding(20, 8, "normal"), keras.layers.Dense(20, kernel_initializer="normal")]
    model = keras.Sequential([keras.Input([SEQUENCE], dtype="int32"), *layers])
    table = keras.Sequential(layers)
    [text] = Generator(model, TOKENIZER, SEQUENCE).generate(["ab"], GREEDY, 5)
    assert text == greedy_text(table, "ab", 5)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [
        ("float64", "float64"),
        ("mixed_bfloat16", "bfloat16"),
        ("mixed_bfloat16", "float32"),
        ("mixed_float16", "float32"),
    ],
)
def test_other_precisions_work(dtype, compute_dtype):
    model = make_model(MODERN, dtype=dtype, seed=2)
    generator = Generator(model, TOKENIZER, SEQUENCE, CpuOps(compute_dtype=compute_dtype))
    texts = generator.generate(["", "bad"], GREEDY, 6)
    tokens = tf.constant([generator.encode("bad")])
    (key, value), *_ = adapt(model).read(tokens, tf.constant(3), CpuOps(compute_dtype=compute_dtype))
    assert key.dtype == value.dtype == compute_dtype
    if dtype == "float64":  # The others round the cached and the full pass to different texts.
        assert texts == [greedy_text(model, prompt, 6) for prompt in ("", "bad")]
    assert texts[1].startswith("bad") and len(texts[0]) == 6


def test_no_prompts_give_no_texts(generator):
    assert generator.generate([], GREEDY, 5) == []


@pytest.mark.parametrize("decoder", [TOP_K, TOP_P], ids=lambda decoder: decoder.name)
def test_the_same_seed_draws_the_same_texts_in_any_batch(generator, decoder):
    alone = generator.generate(["bad"], decoder, 12, seed=5, num_samples=3)
    assert len(set(alone)) == 3 and [text.sample for text in alone] == [0, 1, 2]
    assert generator.generate(["bad"], decoder, 12, seed=5) == alone[:1]
    for before, after, batch_size in ((["cab"], [], 32), (["", "a", "fedcba"], ["bad"], 5), ([], ["a"] * 3, 1)):
        texts = generator.generate([*before, "bad", *after], decoder, 12, 5, num_samples=3, batch_size=batch_size)
        assert texts[3 * len(before) :][:3] == alone


def test_a_cache_that_is_kept_between_calls_or_made_again_gives_the_text_of_the_full_forward_pass(model, generator):
    for prompt in ("", "bad"):
        expected = greedy_text(model, prompt, SEQUENCE)
        assert "".join(generator.stream(prompt, Request(GREEDY))) == expected
        tokens = [BOS, *TOKENIZER.encode(expected)]
        while len(tokens) < 3 * SEQUENCE:  # Each position has the context that it is written in.
            half = SEQUENCE // 2
            offset = 0 if len(tokens) < SEQUENCE else ((len(tokens) - SEQUENCE) // half + 1) * half
            tokens.append(int(np.argmax(next_log_probs(model, [BOS, *tokens[offset + 1 :]]))))
            if tokens[-1] == BOS:
                break
        request = Request(GREEDY, 3 * SEQUENCE - 1 - len(prompt), sliding_window=True)
        [whole], pieces = generator.texts([prompt], request), generator.stream(prompt, request)
        assert len(whole) > SEQUENCE and whole == "".join(pieces) == TOKENIZER.decode(tokens)


@pytest.mark.parametrize("decoder", [GREEDY, BEAM, TOP_K, TOP_P], ids=lambda decoder: decoder.name)
def test_other_devices_write_the_same_texts(model, generator, decoder):
    prompts = ["", "bad", "fedcba"]
    expected = generator.generate(prompts, decoder, 9, seed=4)
    elsewhere = Generator(model, TOKENIZER, SEQUENCE, PLAIN)
    assert elsewhere.generate(prompts, decoder, 9, seed=4) == expected


def test_beams_that_are_not_real_yet_do_not_count_as_damaged():
    # Such beams hold arbitrary tokens, and after [PAD] the logits of this model are NaN.
    model = make_bigram_model((BOS, 3, 9.0), (3, 4, 9.0), (PAD, 3, float("nan")))
    generator = Generator(model, TINY_TOKENIZER, SEQUENCE)
    for num_beams in (1, 3, 20):
        assert generator.generate(["", "abc"], Decoder("beam", num_beams=num_beams), 2)[0].startswith("ab")


def test_prompt_without_room_to_continue_is_refused(generator):
    with pytest.raises(UserError, match=r"'aaaaaaaaaaaaaaa' has 15 tokens; .*train\.sequence_length=16 .*at most 14"):
        generator.generate(["b", "a" * (SEQUENCE - 1)], GREEDY, 1)


def test_impossible_requests_are_refused(model, generator):
    with pytest.raises(UserError, match=r"num_tokens=0 .*at least 1"):
        generator.generate([""], GREEDY, 0)
    with pytest.raises(UserError, match=r"num_tokens=2\.5 .*a count of at least 1"):
        generator.generate([""], GREEDY, 2.5)
    with pytest.raises(UserError, match=r"stop='' .*leave it out"):
        generator.generate([""], GREEDY, 1, stop="")
    with pytest.raises(
        UserError, match=r"model has a vocabulary of 20 tokens, the tokenizer one of 6; use the tokenizer that"
    ):
        Generator(model, TINY_TOKENIZER, SEQUENCE).generate([""], GREEDY, 1)
    with pytest.raises(UserError, match=r"train\.sequence_length=17 is more than the model's 16 positions"):
        Generator(model, TOKENIZER, SEQUENCE + 1)


def test_a_decoder_that_nothing_implements_is_refused(generator, monkeypatch):
    monkeypatch.setattr("trainer.decoding.decoder.SAMPLERS", (*SAMPLERS, "new"))
    with pytest.raises(ValueError, match=r"Decoder\.name='new' .*greedy, beam, random, top-k"):
        generator.generate([""], Decoder("new"), 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_model_with_damaged_weights_is_refused(name):
    model = make_bigram_model((BOS, 3, 9.0), (3, 4, float("nan")))
    generator = Generator(model, TINY_TOKENIZER, SEQUENCE)
    for _ in range(2):
        with pytest.raises(UserError, match=r"logits are not finite: .*earlier checkpoint"):
            generator.generate(["", "a"], Decoder(name, num_beams=1), 4)
    # After "b" all is well.
    assert generator.generate(["b"], Decoder(name, num_beams=1, top_k=1, top_p=0.1), 1)[0][:1] == "b"


@pytest.mark.parametrize(("name", "bos_id"), [("greedy", 0), ("beam", 2), ("top-k", 2), ("top-p", 0)])
def test_a_vocabulary_that_pads_with_what_begins_a_text_ends_its_texts_too(name, bos_id, monkeypatch):
    tokenizer = CharTokenizer(TINY_TOKENIZER.vocabulary)
    monkeypatch.setattr(tokenizer, "bos_id", bos_id)
    monkeypatch.setattr(tokenizer, "pad_id", bos_id)
    likely = [(bos_id, 3, 99.0), (3, 4, 99.0), (4, bos_id, 99.0), (5, 4, float("nan"))]
    model = make_bigram_model(*likely, tokenizer=tokenizer)
    generator = Generator(model, tokenizer, SEQUENCE)
    assert generator.generate(["", "ba"], Decoder(name, num_beams=1), 9) == ["ab", "bab"]
    with pytest.raises(UserError, match=r"logits are not finite: .*earlier checkpoint"):
        generator.generate(["", "c"], Decoder(name, num_beams=1), 9)


WORDS = ["[PAD]", "[UNK]", "[BOS]", "town", "his", ".", "the", "t", "##own", "end"]


def test_a_stop_is_searched_for_as_the_tokenizer_writes_it():
    tokenizer = WordPieceTokenizer(WORDS, lowercase=True)
    model = make_bigram_model((BOS, 6, 9.0), (6, 3, 9.0), (3, 4, 9.0), (4, 5, 9.0), (5, 9, 9.0), tokenizer=tokenizer)
    generator = Generator(model, tokenizer, SEQUENCE)
    for stop, written, expected in (
        ("Town", "town", "the town"),
        ("his.", "his .", "the town his ."),
        ("  His\n", " his ", "the town his "),
        (". End", ". end", "the town his . end"),
    ):
        assert generator.as_written(stop) == written
        assert generator.generate([""], GREEDY, 5, stop=stop) == [expected]
        assert generator.remarks([""], Request(GREEDY, None, stop=stop), "samples.") == [
            f"samples.stop={stop!r} is searched for as {written!r}, as the tokenizer writes it."
        ]
    assert generator.remarks(["the"], Request(GREEDY, 3, stop="his .")) == []


def test_a_stop_that_can_never_be_written_is_refused():
    words = Generator(make_bigram_model(tokenizer=WordPieceTokenizer(WORDS, True)), WordPieceTokenizer(WORDS, True), 8)
    letters = Generator(make_bigram_model(), TINY_TOKENIZER, SEQUENCE)
    for generator, stop, reason in (
        (words, "\n", "the tokenizer keeps nothing of it"),
        (words, "café", "the vocabulary has no token for 'c', 'a', 'f', 'é'"),
        (letters, "Town", "the vocabulary has no token for 'T', 'o', 'w', 'n'"),
        (letters, "\\n", r"no token for '\\', 'n'. \n is a backslash and a letter here; in bash, $'\n' is"),
    ):
        with pytest.raises(UserError) as error:
            generator.remarks([""], Request(GREEDY, None, stop=stop), "samples.")
        said = str(error.value)
        assert said.startswith(f"samples.stop={stop!r} can never be written: ") and reason in said
        with pytest.raises(UserError, match=r"^stop=.* can never be written"):
            generator.generate([""], GREEDY, 1, stop=stop)


def test_the_shell_s_line_break_is_explained_if_it_could_be_meant():
    generator = Generator(make_bigram_model(tokenizer=ByteTokenizer()), ByteTokenizer(), SEQUENCE)
    assert generator.remarks([""], Request(GREEDY, None, stop="\n")) == []
    (line,) = generator.remarks([""], Request(GREEDY, None, stop="a\\n"))
    assert line == (
        r"stop='a\\n': \n is a backslash and a letter here; in bash, $'\n' is the character that it stands for."
    )


def test_tokens_beyond_the_context_and_unknown_characters_are_reported(generator):
    assert generator.remarks(["", "bad"], Request(GREEDY, 12)) == []
    assert generator.remarks(["", "bad", "bad"], Request(GREEDY, 13)) == [
        "num_tokens=13: train.sequence_length=16 has room for 12 after the prompt 'bad', and no more are written."
    ]
    assert generator.remarks([""], Request(GREEDY, 16), "samples.") == [
        "samples.num_tokens=16: train.sequence_length=16 has room for 15 after [BOS], and no more are written."
    ]
    assert generator.remarks(["bad", "b☃d?"], Request(GREEDY)) == [
        "prompt='b☃d?': the vocabulary has no token for '☃', '?'; the model reads [UNK] instead."
    ]


def test_half_a_character_is_refused_as_prompt_and_as_stop(generator):
    half = "가".encode()[:2].decode(errors="surrogateescape")
    with pytest.raises(UserError, match=r"^The prompt .* is not UTF-8: it is in another encoding, or a part of a"):
        generator.generate([half], GREEDY, 1)
    with pytest.raises(UserError, match=r"^stop=.* is not UTF-8"):
        generator.generate([""], GREEDY, 1, stop=half)


@pytest.mark.slow
def test_a_notebook_that_writes_again_and_again_is_not_warned_of_retracing(monkeypatch):
    # In a notebook each call of trainer.generate loads tokenizer and model anew.
    warned: list[str] = []
    monkeypatch.setattr(tf.get_logger(), "warning", lambda message, *_: warned.append(message))
    for _ in range(6):
        tokenizer = WordPieceTokenizer(WORDS, lowercase=True)
        Generator(make_bigram_model(tokenizer=tokenizer), tokenizer, SEQUENCE).generate(["the town"], GREEDY, 1)
    assert warned == []


def test_only_the_loops_used_last_are_kept(monkeypatch):
    compiled: list[Decoder] = []

    class Counted(generate.TextLoop):
        def __init__(self, model, tokenizer, sequence_length, decoder, *others):
            compiled.append(decoder)
            super().__init__(model, tokenizer, sequence_length, decoder, *others)

    monkeypatch.setattr(generate, "TextLoop", Counted)
    monkeypatch.setattr(generate, "_MAX_LOOPS", 2)
    generator = Generator(make_bigram_model(), TINY_TOKENIZER, SEQUENCE)
    a, b, c = (Decoder("random", temperature=temperature) for temperature in (0.5, 1.0, 2.0))
    for decoder in (a, b, a, c, a, b):
        generator.generate([""], decoder, 1)
    assert compiled == [a, b, c, b]
