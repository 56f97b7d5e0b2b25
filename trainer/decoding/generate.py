"""Writing text with a trained model: prompts in, continued texts out.

The samplers of keras_nlp pick the tokens; what they see of the model, and where a text begins and ends, is decided
here. Knows nothing of checkpoints and runs.
"""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Sequence
from typing import Any, Self

import keras
import keras_nlp
import numpy as np
import tensorflow as tf

from trainer.config import SamplesConfig, UserError
from trainer.data.tokenizer import Tokenizer
from trainer.model.attention import Cache
from trainer.model.gpt import GPT

DECODERS = ("greedy", "beam", "top-k", "top-p")

_DEFAULTS = SamplesConfig()


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How the next token is picked.

    Attributes:
        name: one of DECODERS.
        top_k: how many of the likeliest tokens top-k draws from.
        top_p: the probability that the tokens top-p draws from have together, at least.
        num_beams: how many unfinished texts beam keeps.
        temperature: divides the logits of top-k and top-p.

    Raises:
        UserError: a value is impossible.
    """

    name: str
    top_k: int = _DEFAULTS.top_k
    top_p: float = _DEFAULTS.top_p
    num_beams: int = _DEFAULTS.num_beams
    temperature: float = _DEFAULTS.temperature

    def __post_init__(self) -> None:
        if self.name not in DECODERS:
            nearest = difflib.get_close_matches(self.name, DECODERS, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"--sampler={self.name} is not a sampler; choose one of {', '.join(DECODERS)}.{hint}")
        for option, value, is_possible, allowed in (
            ("k", self.top_k, self.top_k >= 1, "a count of at least 1"),
            ("p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("num-beams", self.num_beams, self.num_beams >= 1, "a count of at least 1"),
            ("temperature", self.temperature, 0 < self.temperature < math.inf, "a finite number above 0"),
        ):
            if not is_possible:
                raise UserError(f"--{option}={value} is impossible; give {allowed}.")

    @classmethod
    def from_config(cls, name: str, config: SamplesConfig) -> Self:
        """Returns the decoder of that name with the settings of a run."""
        return cls(name, config.top_k, config.top_p, config.num_beams, config.temperature)


class Generator:
    """Continues texts with a model, compiled once for each decoder.

    Args:
        model: a GPT, which is read through its key-value cache; or any causal Keras model from int32 [batch, sequence]
            to logits [batch, sequence, vocabulary], which then reads the whole text again for each token.
        tokenizer: of the text the model was trained on.
        sequence_length: the most tokens, [BOS] included, that a text can have.

    Raises:
        UserError: the model has fewer positions than sequence_length.
    """

    def __init__(self, model: keras.Model, tokenizer: Tokenizer, sequence_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        # Not a mark in the texts: every token that can be drawn has a meaning of its own.
        self._is_finite = tf.Variable(True, trainable=False, name="is_finite")
        self._compiled: dict[Decoder, tuple[keras_nlp.samplers.Sampler, Any]] = {}
        if isinstance(model, GPT):
            if sequence_length > model.sequence_length:
                raise UserError(
                    f"train.sequence_length={sequence_length} is more than the model's "
                    f"{model.sequence_length} positions; lower the former, or train a model with more."
                )
            self._cache = [(_open_variable(key), _open_variable(value)) for key, value in model.empty_cache(0)]

    def generate(
        self, prompts: Sequence[str], decoder: Decoder, num_tokens: int, seed: int = 0, stop: str | None = None
    ) -> list[str]:
        """Continues each prompt.

        Args:
            prompts: texts to continue; an empty one starts a new text.
            decoder: how tokens are picked.
            num_tokens: tokens to write after each prompt; cut to what sequence_length has room for. A text is shorter
                where the model ends it, by beginning the next one with [BOS].
            seed: of top-k and top-p. With the same prompts it gives the same texts.
            stop: text that ends a continuation; it is kept.

        Returns:
            Each prompt and what follows, as the tokenizer decodes them together.

        Raises:
            UserError: num_tokens or stop is impossible, a prompt leaves no room for a continuation, the tokenizer is
                not the model's, or the model's logits are not finite.
        """
        if num_tokens < 1:
            raise UserError(f"num_tokens={num_tokens} leaves nothing to write; give at least 1.")
        if stop == "":
            raise UserError("stop='' is found everywhere; give the text that ends a continuation, or leave it out.")
        if not prompts:
            return []
        tokens, lengths = self.encode(prompts)
        ends = np.minimum(lengths + num_tokens, self.sequence_length)
        if decoder not in self._compiled:
            self._compiled[decoder] = self._compile(decoder)
        sampler, write = self._compiled[decoder]
        for state in sampler.variables:  # Greedy and beam have none.
            state.assign(np.array([seed % 2**32, 0], np.uint32))
        self._is_finite.assign(True)
        written = write(tokens, lengths, ends).numpy()
        if not self._is_finite:
            raise UserError(
                "The model's logits are not finite: its weights are damaged; go back to an earlier checkpoint."
            )
        return [self._decode(row[:end], length, stop) for row, length, end in zip(written, lengths, ends, strict=True)]

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ([BOS] and the tokens of each prompt, int32 [batch, sequence]; how many these are, int32 [batch]).

        Raises:
            UserError: a prompt leaves no room for a continuation.
        """
        # Not padding, which can be [BOS]: the sampler stops where it finds that.
        filler = 0 if self.tokenizer.bos_id != 0 else 1
        tokens = np.full([len(prompts), self.sequence_length], filler, np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for i, prompt in enumerate(prompts):
            encoded = self.tokenizer.encode(prompt)
            lengths[i] = 1 + len(encoded)
            if lengths[i] >= self.sequence_length:
                raise UserError(
                    f"The prompt {_shortened(prompt)!r} has {len(encoded)} tokens; with [BOS] before them "
                    f"train.sequence_length={self.sequence_length} leaves no room to continue. Give a prompt of at "
                    f"most {self.sequence_length - 2} tokens, or train with a larger train.sequence_length."
                )
            tokens[i, : lengths[i]] = [self.tokenizer.bos_id, *encoded]
        return tokens, lengths

    def _decode(self, tokens: np.ndarray, prompt_length: int, stop: str | None) -> str:
        ended = np.flatnonzero(tokens[prompt_length:] == self.tokenizer.bos_id)
        if len(ended):
            tokens = tokens[: prompt_length + ended[0]]
        text = self.tokenizer.decode(tokens[1:])
        if stop is None:
            return text
        found = text.find(stop, len(self.tokenizer.decode(tokens[1:prompt_length])))
        return text if found < 0 else text[: found + len(stop)]

    def _compile(self, decoder: Decoder) -> tuple[keras_nlp.samplers.Sampler, Any]:
        """Returns (sampler, function), where function(tokens, lengths, ends) gives the texts, int32 [batch, sequence].

        Its arguments are the prompts, int32 [batch, sequence]; their lengths, int32 [batch]; and the positions before
        which the texts end, int32 [batch]. Their shapes leave only the batch open, so that it is traced once.
        """
        sampler = _make_sampler(decoder, self.tokenizer.vocabulary_size)

        def write(tokens: tf.Tensor, lengths: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
            first = tf.reduce_min(lengths)
            is_prompt = tf.range(self.sequence_length) < lengths[:, tf.newaxis]

            def next_token(texts: tf.Tensor, origins: Any, index: tf.Tensor) -> tuple[tf.Tensor, None, Any]:
                logits, origins = self._read(texts, origins, index, reorders=decoder.name == "beam")
                return self._constrain(logits, texts, index, tokens, lengths, ends), None, origins

            texts = sampler(next_token, tokens, self._prefill(tokens, first), first, is_prompt, [self.tokenizer.bos_id])
            if isinstance(self.model, GPT):
                self._assign_cache(self.model.empty_cache(0))
            return texts

        per_row = tf.TensorSpec([None], tf.int32)
        signature = [tf.TensorSpec([None, self.sequence_length], tf.int32), per_row, per_row]
        return sampler, tf.function(write, signature, autograph=False)

    # The key-value cache is in variables and no part of the sampler's loop, where beam search would gather it at each
    # token element by element: 3 times slower. The sampler is given `origins` in its place, for each row the row of the
    # cache that it goes on from, and gathers these. Other samplers keep to the order there is.

    def _assign_cache(self, cache: Sequence[Cache]) -> list[tf.Operation]:
        variables, new = (tuple(itertools.chain.from_iterable(pairs)) for pairs in (self._cache, cache))
        return [variable.assign(value).op for variable, value in zip(variables, new, strict=True)]

    def _prefill(self, tokens: tf.Tensor, first: tf.Tensor) -> tf.Tensor | None:
        """Makes the cache remember the prompts up to position first - 1, and returns the origins."""
        model = self.model
        if not isinstance(model, GPT):
            return None
        origins = tf.range(tf.shape(tokens)[0])

        def read_prompts() -> tf.Tensor:
            # All positions, to keep to one shape. What it makes of those that are not known yet is written over before
            # it is read: no step attends to a later position than its own.
            _, cache = model.decode(tokens, self._cache, tf.constant(0))
            with tf.control_dependencies(itertools.chain.from_iterable(cache)):
                return tf.identity(origins)

        with tf.control_dependencies(self._assign_cache(model.empty_cache(tf.shape(tokens)[0]))):
            return tf.cond(first > 1, read_prompts, lambda: tf.identity(origins))

    def _read(self, texts: tf.Tensor, origins: Any, index: tf.Tensor, reorders: bool) -> tuple[tf.Tensor, Any]:
        """Returns (logits of position index, float [rows, num_logits]; the origins of the next step)."""
        if not isinstance(self.model, GPT):
            return self.model(texts, training=False)[:, index - 1], origins
        newest = texts[:, index - 1][:, tf.newaxis]
        if reorders:
            self._assign_cache([(tf.gather(key, origins), tf.gather(value, origins)) for key, value in self._cache])
        # Writes what it adds into the variables; TensorFlow keeps all that a function does with one in order.
        logits, _ = self.model.decode(newest, self._cache, index - 1)
        return logits[:, 0], tf.range(tf.shape(texts)[0])

    def _constrain(
        self,
        logits: tf.Tensor,
        texts: tf.Tensor,
        index: tf.Tensor,
        tokens: tf.Tensor,
        lengths: tf.Tensor,
        ends: tf.Tensor,
    ) -> tf.Tensor:
        """Leaves only the tokens that may stand at a position.

        Inside a prompt and after the end of a text there is just one, with probability 1. So a beam's score counts what
        the model wrote and nothing else, and a text is the same alone and beside longer ones. After its end a text goes
        on with [BOS]: the sampler stops once every row has one.

        Args:
            logits: float [rows, num_logits]; beam search has several rows for each text.
            texts: int32 [rows, sequence], written up to index.
            index: int32 scalar, the position to write.
            tokens: int32 [batch, sequence], the prompts.
            lengths: int32 [batch], of the prompts.
            ends: int32 [batch], positions before which the texts end.

        Returns:
            float32 [rows, vocabulary], -inf where a token is not allowed.
        """
        pad_id, unknown_id, bos_id = self.tokenizer.pad_id, self.tokenizer.unknown_id, self.tokenizer.bos_id
        vocabulary_size = self.tokenizer.vocabulary_size
        num_tokens = self.model.vocabulary_size if isinstance(self.model, GPT) else logits.shape[-1]
        if num_tokens != vocabulary_size:
            raise UserError(
                f"The model tells {num_tokens} tokens apart, the tokenizer {vocabulary_size}; give the tokenizer the "
                "model was trained with."
            )
        # Logits that model.vocabulary_multiple adds are of no token: no sampler ever sees them.
        logits = logits[:, :vocabulary_size]
        num_beams = tf.shape(texts)[0] // tf.shape(tokens)[0]
        tokens, lengths, ends = (tf.repeat(x, num_beams, axis=0) for x in (tokens, lengths, ends))
        positions, ids = tf.range(self.sequence_length), tf.range(vocabulary_size)
        is_allowed = (ids == bos_id) | (ids != pad_id) & (ids != unknown_id)  # Some vocabularies pad with [BOS].
        logits = tf.where(is_allowed, tf.cast(logits, tf.float32), -math.inf)
        is_written = (lengths[:, tf.newaxis] <= positions) & (positions < index)
        is_ended = tf.reduce_any(is_written & (texts == bos_id), axis=1) | (index >= ends)
        # Of logits that are not numbers some samplers would make a token and others an error: their text ends, and
        # `generate` is told.
        is_finite = tf.math.is_finite(tf.reduce_logsumexp(logits, axis=1))
        is_told = self._is_finite.assign(
            self._is_finite & tf.reduce_all(is_finite | is_ended | (index < lengths)), read_value=False
        )
        with tf.control_dependencies([is_told]):
            only = tf.where(is_finite & ~is_ended, -1, bos_id)
        only = tf.where(index < lengths, tokens[:, index], only)[:, tf.newaxis]
        return tf.where(only < 0, logits, tf.where(ids == only, 0.0, -math.inf))


def _open_variable(value: tf.Tensor) -> tf.Variable:
    """Returns a variable for any number of rows like those of value."""
    return tf.Variable(value, trainable=False, shape=[None, *value.shape[1:]], name="cache")


def _make_sampler(decoder: Decoder, vocabulary_size: int) -> keras_nlp.samplers.Sampler:
    samplers = keras_nlp.samplers
    if decoder.name == "greedy":
        return samplers.GreedySampler()
    if decoder.name == "beam":
        return samplers.BeamSampler(decoder.num_beams)
    # The seed is set before each use.
    if decoder.name == "top-k":
        return samplers.TopKSampler(min(decoder.top_k, vocabulary_size), seed=0, temperature=decoder.temperature)
    return samplers.TopPSampler(decoder.top_p, seed=0, temperature=decoder.temperature)


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
