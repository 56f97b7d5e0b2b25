"""The compiled loop that writes texts token by token. sampling.py picks the tokens; no strings are known here."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.config.settings import SAMPLERS
from trainer.decoding.decoder import Decoder
from trainer.decoding.sampling import best_beams, draw, most_likely, penalize_repetition, uniform
from trainer.errors import UserError
from trainer.model.attention import Cache
from trainer.model.held import Held
from trainer.model.language_model import adapt
from trainer.model.ops.plain import Ops
from trainer.tokenizers.tokenizer import Tokenizer


class Prompts(NamedTuple):
    """The prompts to continue.

    Attributes:
        tokens: int32 [rows, sequence], the prompts; zeros after them.
        lengths: int32 [rows], the number of tokens of each prompt.
        ends: int32 [rows], the position before which each text ends at the latest.
        samples: int32 [rows], which of the texts of the same prompt each row is.
        end_tokens: int32 [any], the tokens that end a text.
        num_best: int32 scalar, the number of texts of a prompt that are asked for; read by beam search only.
        seed: int64 scalar.
        offset: int64 scalar, the position of the first token in the whole text, by which tokens are drawn.
    """

    tokens: tf.Tensor
    lengths: tf.Tensor
    ends: tf.Tensor
    samples: tf.Tensor
    end_tokens: tf.Tensor
    num_best: tf.Tensor
    seed: tf.Tensor
    offset: tf.Tensor


class Texts(NamedTuple):
    """The texts that are written so far. Beam search has a row for each beam of a text.

    Attributes:
        index: int32 scalar, the position to write next.
        tokens: int32 [rows, sequence].
        ends: int32 [rows], the position before which each text ends; smaller than in Prompts if the model ended it.
        is_finite: bool scalar, whether all logits were finite.
        scores: float32 [texts, beams], the logarithm of each beam's probability, the best beam first; -inf: there is
            no such beam, and its tokens are arbitrary.
        cache: what the model remembers of the positions before index - 1.
    """

    index: tf.Tensor
    tokens: tf.Tensor
    ends: tf.Tensor
    is_finite: tf.Tensor
    scores: tf.Tensor
    cache: list[Cache]


class TextLoop:
    """Writes texts with one decoder, as two compiled functions.

    Only the number of rows can be open in the shapes of their arguments, so that each is traced once. A single row has
    its own loop, because the model reads it faster if it is known to be single; see `Ops.compiles_blocks`.

    Args:
        model: a GPT, or any Keras model that returns logits.
        tokenizer: the tokenizer of its texts.
        sequence_length: the most tokens that a text can have.
        decoder: how tokens are picked.
        num_rows: the number of texts; None: any. Replicas that exchange weights need to know it.
        ops: a GPT's way of computing.
        strategy: the devices that hold the model together. Each replica writes the same texts, with a cache of its own.
        held: returns, in a replica function, how the layers of a GPT get their weights.

    Attributes:
        begin: a function from Prompts to Texts, which reads what all prompts have.
        write: a function of Prompts, Texts and `until`, int32 scalar, to Texts: it writes up to that position, or
            less if all texts end before it.
    """

    def __init__(
        self,
        model: keras.Model,
        tokenizer: Tokenizer,
        sequence_length: int,
        decoder: Decoder,
        num_rows: int | None,
        ops: Ops,
        strategy: tf.distribute.Strategy,
        held: Callable[[], Held],
    ) -> None:
        self._model = model
        self._strategy = strategy
        self._held = held
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length
        self._decoder = decoder
        self._ops = ops
        self._num_beams = decoder.num_beams if decoder.name == "beam" else 1
        per_row, any_number = tf.TensorSpec([num_rows], tf.int32), tf.TensorSpec([None], tf.int32)
        tokens = tf.TensorSpec([num_rows, sequence_length], tf.int32)
        num_best, number = tf.TensorSpec([], tf.int32), tf.TensorSpec([], tf.int64)
        prompts = Prompts(tokens, per_row, per_row, per_row, any_number, num_best, number, number)
        self.begin = tf.function(self._on_replicas(self._begin), [prompts], autograph=False)
        # Traced here: TensorFlow warns if many calls trace the same code, as generators in one process do.
        texts = tf.nest.map_structure(tf.type_spec_from_value, self.begin.get_concrete_function().structured_outputs)
        write = self._on_replicas(self._write)
        self.write = tf.function(write, [prompts, texts, tf.TensorSpec([], tf.int32)], autograph=False)
        self.write.get_concrete_function()

    def _on_replicas(self, function: Callable[..., Texts]) -> Callable[..., Texts]:
        """Returns a function that has every replica call this one. All replicas return the same, except that the cache
        of each is on its own device.
        """

        def call(*arguments: Any) -> Texts:
            *texts, cache = self._strategy.run(function, arguments)
            first = [self._strategy.experimental_local_results(each)[0] for each in texts]
            return Texts._make([*first, cache])

        return call

    def _begin(self, prompts: Prompts) -> Texts:
        first = tf.reduce_min(prompts.lengths)
        # All texts have these tokens. The last of them is read with the first step.
        cache = adapt(self._model, self._held()).read(prompts.tokens, first - 1, self._ops)
        # Only the first beam of a text is real at the start; the others get -inf.
        scores = tf.tile([[0.0] + [-math.inf] * (self._num_beams - 1)], [tf.shape(prompts.tokens)[0], 1])
        tokens, ends, cache = self._per_beam((prompts.tokens, prompts.ends, cache))
        return Texts(first, tokens, ends, tf.constant(True), scores, cache)

    def _per_beam(self, structure: Any) -> Any:
        if self._num_beams == 1:
            return structure
        rows = tf.repeat(tf.range(tf.shape(tf.nest.flatten(structure)[0])[0]), self._num_beams)
        return _gather(structure, rows)

    def _write(self, prompts: Prompts, texts: Texts, until: tf.Tensor) -> Texts:
        prompts = Prompts._make((*self._per_beam(prompts[:4]), *prompts[4:]))
        held = self._held()

        def is_unfinished(*state: Any) -> tf.Tensor:
            index, ends = Texts(*state).index, Texts(*state).ends
            return index < tf.minimum(until, tf.reduce_max(ends))

        def write_next(*state: Any) -> Texts:
            return self._write_next(prompts, Texts(*state), held)

        return Texts(*tf.while_loop(is_unfinished, held.loop_body(write_next), texts))

    def _write_next(self, prompts: Prompts, texts: Texts, held: Held) -> Texts:
        """Returns the texts with one more token."""
        index, tokens, ends, is_finite, scores, cache = texts
        decoder, bos_id = self._decoder, self._tokenizer.bos_id
        model = adapt(self._model, held)
        logits, cache = model.next_logits(tokens, index, cache, self._ops)
        logits = self._possible(logits, tokens[:, index - 1], model.num_tokens(logits))
        is_prompt, is_over = index < prompts.lengths, index >= ends
        is_number = tf.math.is_finite(tf.reduce_logsumexp(logits, axis=1))
        is_unreal = tf.math.is_inf(tf.reshape(scores, [-1]))  # Such a beam holds arbitrary tokens.
        is_finite &= tf.reduce_all(is_number | is_over | is_prompt | is_unreal)
        if decoder.repetition_penalty != 1:
            logits = penalize_repetition(logits, self._seen(tokens, index), decoder.repetition_penalty)
        # The token is given within a prompt, and is [BOS] after the end of a text. It is [BOS], too, if the logits are
        # not finite: that ends the text, and `Generator` raises NotFinite.
        given = tf.where(is_prompt, prompts.tokens[:, index], tf.where(is_over | ~is_number, bos_id, -1))
        if decoder.name == "beam":
            # A given token has probability 1: only tokens that the model has chosen count in a score.
            certain = tf.one_hot(given, logits.shape[1], on_value=0.0, off_value=-math.inf)
            logits = tf.where(given[:, tf.newaxis] < 0, logits, certain)
            # A token that ends a text is one of those chosen.
            lengths = tf.minimum(tf.minimum(index, ends) + 1, prompts.ends) - prompts.lengths
            origins, picked, scores = best_beams(logits, scores, lengths, decoder.length_penalty)
            origins, picked, scores, is_finite = held.of_first([origins, picked, scores, is_finite])
            tokens, ends, cache = _gather((tokens, ends, cache), origins)
        else:
            picked = self._pick(logits, prompts, index)
            picked, is_finite = held.of_first([tf.where(given < 0, picked, given), is_finite])
        tokens = tf.where(tf.range(self._sequence_length) == index, picked[:, tf.newaxis], tokens)
        is_end = tf.reduce_any(picked[:, tf.newaxis] == prompts.end_tokens, axis=1) & ~is_prompt
        ends = tf.where(is_end, tf.minimum(ends, index), ends)
        if decoder.name == "beam" and not decoder.length_penalty:
            # A probability only falls: once the best texts are over, nothing that is longer can overtake them.
            is_over = tf.reshape(index + 1 >= ends, [-1, self._num_beams])[:, : prompts.num_best]
            is_decided = tf.repeat(tf.reduce_all(is_over, axis=1), self._num_beams)
            ends = tf.where(is_decided, tf.minimum(ends, index + 1), ends)
        return Texts(index + 1, tokens, ends, is_finite, scores, cache)

    def _possible(self, logits: tf.Tensor, newest: tf.Tensor, num_tokens: int) -> tf.Tensor:
        """Returns the logits with -inf for tokens that cannot come.

        Padding and [UNK] are never written, and [BOS] is not written after [BOS]: no document is empty, but a model at
        the start of its training gives an empty one more probability than any text, and beam search would find it.

        Args:
            logits: float [rows, num_logits].
            newest: int32 [rows], the token before each.
            num_tokens: the tokens of the model's vocabulary.

        Returns:
            float32 [rows, vocabulary].
        """
        pad_id, unknown_id, bos_id = self._tokenizer.pad_id, self._tokenizer.unknown_id, self._tokenizer.bos_id
        vocabulary_size = self._tokenizer.vocabulary_size
        if num_tokens != vocabulary_size:
            raise UserError(
                f"The model has a vocabulary of {num_tokens} tokens, the tokenizer one of {vocabulary_size}; use the "
                "tokenizer that the model was trained with."
            )
        ids = np.arange(vocabulary_size)
        is_possible = (ids == bos_id) | (ids != pad_id) & (ids != unknown_id)  # Some vocabularies pad with [BOS].
        is_possible = is_possible & ((ids != bos_id) | (newest != bos_id)[:, tf.newaxis])
        # Logits that model.vocabulary_multiple adds do not belong to a token.
        return tf.where(is_possible, tf.cast(logits[:, :vocabulary_size], tf.float32), -math.inf)

    def _seen(self, tokens: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Returns the tokens before a position, as `penalize_repetition` reads them. [BOS] is left out: every text
        begins with it, and a penalty on it would be one on the end of a text.
        """
        is_seen = (tf.range(self._sequence_length) < index) & (tokens != self._tokenizer.bos_id)
        return tf.where(is_seen, tokens, self._tokenizer.vocabulary_size)

    def _pick(self, logits: tf.Tensor, prompts: Prompts, index: tf.Tensor) -> tf.Tensor:
        decoder = self._decoder
        if decoder.name == "greedy":
            return most_likely(logits)
        if decoder.is_drawn:
            seed = tf.stack([prompts.seed, prompts.offset + tf.cast(index, tf.int64)])
            return draw(logits, uniform(seed, prompts.samples), decoder.temperature, **decoder.cuts())
        raise ValueError(
            f"Decoder.name={decoder.name!r} picks no tokens here; add it, or use one of {', '.join(SAMPLERS)}."
        )


def _gather(structure: Any, rows: tf.Tensor) -> Any:
    return tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), structure)
