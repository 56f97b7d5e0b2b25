"""Writing text with a trained model: prompts in, continued texts out.

This module decides where a text begins and ends, and has the model read it; sampling.py picks the tokens. Checkpoints
and runs are not its concern.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.decoding.decoder import DECODERS, Decoder, is_count
from trainer.decoding.sampling import best_beams, draw_top_k, draw_top_p, most_likely
from trainer.errors import UserError
from trainer.model.attention import Cache
from trainer.model.language_model import adapt
from trainer.model.ops.plain import Ops
from trainer.tokenizers.tokenizer import Tokenizer


class NotFinite(UserError):
    """The model's logits are NaN or infinite, so no text can be written."""


class Generator:
    """Continues texts with a model, compiled once for each decoder.

    Args:
        model: a GPT, which is read through its key-value cache; or any causal Keras model from int32 [batch, sequence]
            to logits [batch, sequence, vocabulary], which then reads the whole text again for each token.
        tokenizer: the tokenizer of the text the model was trained on.
        sequence_length: the most tokens, [BOS] included, that a text can have.
        ops: a GPT's way of computing; None: the fastest on the device that holds it.

    Raises:
        UserError: the model has fewer positions than sequence_length.
    """

    def __init__(self, model: keras.Model, tokenizer: Tokenizer, sequence_length: int, ops: Ops | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self._compiled: dict[Decoder, Any] = {}
        self._language_model = adapt(model)
        self._ops = ops or self._language_model.decoding_ops()
        max_length = self._language_model.max_length()
        if max_length is not None and sequence_length > max_length:
            raise UserError(
                f"train.sequence_length={sequence_length} is more than the model's {max_length} positions; lower the "
                "former, or train a model with more."
            )

    def generate(
        self, prompts: Sequence[str], decoder: Decoder, num_tokens: int, seed: int = 0, stop: str | None = None
    ) -> list[str]:
        """Continues each prompt.

        Args:
            prompts: texts to continue; an empty one starts a new text.
            decoder: how tokens are picked.
            num_tokens: tokens to write after each prompt; cut to what sequence_length has room for. A text is shorter
                if the model ends it, by beginning the next one with [BOS].
            seed: seed of top-k and top-p. The same seed and prompts give the same texts. Further prompts at the end of
                the list change none of the texts before them.
            stop: text that ends a continuation, and is kept. It is searched for as the tokenizer writes it.

        Returns:
            Each prompt with its continuation, as the tokenizer decodes them together.

        Raises:
            UserError: num_tokens or stop is impossible, a prompt leaves no room for a continuation, or the tokenizer
                does not belong to the model.
            NotFinite: the model's logits are not finite.
        """
        if not is_count(num_tokens):
            raise UserError(f"num_tokens={num_tokens!r} leaves nothing to write; give a count of at least 1.")
        if stop is not None:
            stop = self.as_written(stop)
        if not prompts:
            return []
        tokens, lengths = self.encode(prompts)
        # The minimum before the sum: num_tokens can be any number, and the sum has to fit int32.
        ends = np.minimum(lengths + min(num_tokens, self.sequence_length), self.sequence_length)
        if decoder not in self._compiled:
            self._compiled[decoder] = self._compile(decoder)
        texts, is_finite = self._compiled[decoder](tokens, lengths, ends, np.int64(seed % 2**63))
        if not is_finite:
            raise NotFinite(
                "The model's logits are not finite: its weights are damaged; go back to an earlier checkpoint."
            )
        rows = zip(texts.numpy(), lengths, ends, strict=True)
        return [self._decode(row[:end], length, stop) for row, length, end in rows]

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns [BOS] and the tokens of each prompt, int32 [batch, sequence], and their number, int32 [batch].

        Raises:
            UserError: a prompt leaves no room for a continuation, or is not text.
        """
        tokens = np.zeros([len(prompts), self.sequence_length], np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for i, prompt in enumerate(prompts):
            _check_is_text("The prompt ", prompt)
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

    def as_written(self, stop: str, name: str = "stop") -> str:
        """Returns the text that ends a continuation as the tokenizer writes it: perhaps in lower case, or with spaces
        around punctuation.

        Args:
            stop: the text.
            name: name of the option or setting, for the error message.

        Raises:
            UserError: no text that the model writes can hold it.
        """
        if stop == "":
            raise UserError(f"{name}='' is found everywhere; give the text that ends a continuation, or leave it out.")
        _check_is_text(f"{name}=", stop)
        encoded = self.tokenizer.encode(stop)
        if self.tokenizer.unknown_id in encoded:
            reason = f"the vocabulary has no token for {self._without_token(stop)}"
        elif not self.tokenizer.is_lossy:
            return stop
        elif written := self.tokenizer.decode(encoded):
            # A space at either end is kept: it makes the difference between a word and a part of one.
            return " " * stop[0].isspace() + written + " " * stop[-1].isspace()
        else:
            reason = "the tokenizer keeps nothing of it"
        raise UserError(
            f"{name}={stop!r} can never be written: {reason}.{_about_escapes(stop)} Give another text, or leave it out."
        )

    def remarks(self, prompts: Sequence[str], num_tokens: int | None, stop: str | None, prefix: str = "") -> list[str]:
        """Returns a line about each argument that has another effect than it seems to have.

        Args:
            prompts: see `generate`.
            num_tokens: see `generate`; None: as many as sequence_length has room for.
            stop: see `generate`.
            prefix: beginning of the arguments' names in the lines, such as "samples." if they are settings.

        Raises:
            UserError: stop can never be written, or a prompt leaves no room for a continuation.
        """
        lines = []
        for prompt, tokens in zip(prompts, self.encode(prompts)[0], strict=True):
            if self.tokenizer.unknown_id in tokens[1:]:
                lines.append(
                    f"{prefix}prompt={_shortened(prompt)!r}: the vocabulary has no token for "
                    f"{self._without_token(prompt)}; the model reads [UNK] instead."
                )
        longest = max(prompts, key=lambda prompt: len(self.tokenizer.encode(prompt)), default="")
        room = self.sequence_length - 1 - len(self.tokenizer.encode(longest))
        if num_tokens is not None and num_tokens > room:
            after = f"the prompt {_shortened(longest)!r}" if longest else "[BOS]"
            lines.append(
                f"{prefix}num_tokens={num_tokens}: train.sequence_length={self.sequence_length} has room for {room} "
                f"after {after}, and no more are written."
            )
        if stop is not None:
            written = self.as_written(stop, f"{prefix}stop")
            if written != stop:
                lines.append(f"{prefix}stop={stop!r} is searched for as {written!r}, as the tokenizer writes it.")
            elif about := _about_escapes(stop):
                lines.append(f"{prefix}stop={stop!r}:{about}")
        return list(dict.fromkeys(lines))

    def _without_token(self, text: str) -> str:
        unknown = [each for each in dict.fromkeys(text) if self.tokenizer.unknown_id in self.tokenizer.encode(each)]
        return ", ".join(map(repr, unknown[:10])) or "some of its words"

    def _decode(self, tokens: np.ndarray, prompt_length: int, stop: str | None) -> str:
        ended = np.flatnonzero(tokens[prompt_length:] == self.tokenizer.bos_id)
        if len(ended):
            tokens = tokens[: prompt_length + ended[0]]
        text = self.tokenizer.decode(tokens[1:])
        if stop is None:
            return text
        found = text.find(stop, len(self.tokenizer.decode(tokens[1:prompt_length])))
        return text if found < 0 else text[: found + len(stop)]

    def _compile(self, decoder: Decoder) -> Any:
        """Returns `_write` for a decoder, compiled. Only the batch size is open in the shapes of its arguments, so that
        it is traced once.
        """
        per_row = tf.TensorSpec([None], tf.int32)
        tokens = tf.TensorSpec([None, self.sequence_length], tf.int32)

        @tf.function(input_signature=[tokens, per_row, per_row, tf.TensorSpec([], tf.int64)], autograph=False)
        def write(*prompts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return self._write(decoder, _Prompts._make(prompts))

        # Traced here: TensorFlow warns if many calls trace the same code, as generators in one process do.
        write.get_concrete_function()
        return write

    def _write(self, decoder: Decoder, prompts: "_Prompts") -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the texts, int32 [batch, sequence], and whether the logits of all of them were finite."""
        num_beams = decoder.num_beams if decoder.name == "beam" else 1
        first = tf.reduce_min(prompts.lengths)
        # All texts have these tokens. The last of them is read with the first step.
        cache = self._language_model.read(prompts.tokens, first - 1, self._ops)
        # Only the first beam of a text is real at the start; the others get -inf.
        scores = tf.tile([[0.0] + [-math.inf] * (num_beams - 1)], [tf.shape(prompts.tokens)[0], 1])
        if num_beams > 1:
            rows = tf.repeat(tf.range(tf.shape(prompts.tokens)[0]), num_beams)
            repeated = _gather((prompts.tokens, prompts.lengths, prompts.ends, cache), rows)
            prompts, cache = _Prompts._make((*repeated[:3], prompts.seed)), repeated[3]

        def is_unfinished(*state: Any) -> tf.Tensor:
            texts = _Texts(*state)
            return (texts.index < tf.reduce_max(prompts.ends)) & ~tf.reduce_all(texts.is_ended)

        def write_next(*state: Any) -> _Texts:
            return self._write_next(decoder, prompts, _Texts(*state))

        is_ended = tf.zeros_like(prompts.lengths, tf.bool)
        start = _Texts(first, prompts.tokens, is_ended, tf.constant(True), scores, cache)
        texts = _Texts(*tf.while_loop(is_unfinished, write_next, start))
        beams = tf.reshape(texts.tokens, [-1, num_beams, self.sequence_length])
        return tf.gather(beams, most_likely(texts.scores), batch_dims=1), texts.is_finite

    def _write_next(self, decoder: Decoder, prompts: "_Prompts", texts: "_Texts") -> "_Texts":
        """Returns the texts with one more token."""
        index, tokens, is_ended, is_finite, scores, cache = texts
        bos_id = self.tokenizer.bos_id
        logits, cache = self._language_model.next_logits(tokens, index, cache, self._ops)
        logits = self._possible(logits, tokens[:, index - 1])
        is_prompt, is_over = index < prompts.lengths, is_ended | (index >= prompts.ends)
        is_number = tf.math.is_finite(tf.reduce_logsumexp(logits, axis=1))
        is_unreal = tf.math.is_inf(tf.reshape(scores, [-1]))  # Such a beam holds arbitrary tokens.
        is_finite &= tf.reduce_all(is_number | is_over | is_prompt | is_unreal)
        # The token is given within a prompt, and is [BOS] after the end of a text. It is [BOS], too, if the logits are
        # not finite: that ends the text, and `generate` raises NotFinite.
        given = tf.where(is_prompt, prompts.tokens[:, index], tf.where(is_over | ~is_number, bos_id, -1))
        if decoder.name == "beam":
            # A given token has probability 1: only tokens that the model has chosen count in a score.
            certain = tf.one_hot(given, logits.shape[1], on_value=0.0, off_value=-math.inf)
            logits = tf.where(given[:, tf.newaxis] < 0, logits, certain)
            origins, picked, scores = best_beams(logits, scores)
            tokens, is_ended, cache = _gather((tokens, is_ended, cache), origins)
        else:
            picked = _pick(decoder, logits, tf.stack([prompts.seed, tf.cast(index, tf.int64)]))
            picked = tf.where(given < 0, picked, given)
        tokens = tf.where(tf.range(self.sequence_length) == index, picked[:, tf.newaxis], tokens)
        is_ended |= (picked == bos_id) & (index >= prompts.lengths)
        return _Texts(index + 1, tokens, is_ended, is_finite, scores, cache)

    def _possible(self, logits: tf.Tensor, newest: tf.Tensor) -> tf.Tensor:
        """Returns the logits with -inf for tokens that cannot come.

        Padding and [UNK] are never written, and [BOS] is not written after [BOS]: no document is empty, but a model at
        the start of its training gives an empty one more probability than any text, and beam search would find it.

        Args:
            logits: float [rows, num_logits].
            newest: int32 [rows], the token before each.

        Returns:
            float32 [rows, vocabulary].
        """
        pad_id, unknown_id, bos_id = self.tokenizer.pad_id, self.tokenizer.unknown_id, self.tokenizer.bos_id
        vocabulary_size = self.tokenizer.vocabulary_size
        num_tokens = self._language_model.num_tokens(logits)
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


class _Prompts(NamedTuple):
    """The prompts to continue.

    Attributes:
        tokens: int32 [rows, sequence], the prompts; with beam search a row for each beam of a text.
        lengths: int32 [rows], the number of tokens of each prompt.
        ends: int32 [rows], the position before which each text ends.
        seed: int64 scalar.
    """

    tokens: tf.Tensor
    lengths: tf.Tensor
    ends: tf.Tensor
    seed: tf.Tensor


class _Texts(NamedTuple):
    """The texts that are written so far.

    Attributes:
        index: int32 scalar, the position to write next.
        tokens: int32 [rows, sequence].
        is_ended: bool [rows], whether the model has ended the text.
        is_finite: bool scalar, whether all logits were finite.
        scores: float32 [texts, beams], the logarithm of each beam's probability.
        cache: what the model remembers of the positions before index - 1.
    """

    index: tf.Tensor
    tokens: tf.Tensor
    is_ended: tf.Tensor
    is_finite: tf.Tensor
    scores: tf.Tensor
    cache: list[Cache]


def _gather(structure: Any, rows: tf.Tensor) -> Any:
    return tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), structure)


def _pick(decoder: Decoder, logits: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    if decoder.name == "greedy":
        return most_likely(logits)
    if decoder.name == "top-k":
        return draw_top_k(logits, decoder.top_k, decoder.temperature, seed)
    if decoder.name == "top-p":
        return draw_top_p(logits, decoder.top_p, decoder.temperature, seed)
    raise ValueError(
        f"Decoder.name={decoder.name!r} picks no tokens here; add it, or use one of {', '.join(DECODERS)}."
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def _about_escapes(text: str) -> str:
    found = re.search(r"\\[nrt]", text)
    if found is None:
        return ""
    return f" {found[0]} is a backslash and a letter here; in bash, $'{found[0]}' is the character that it stands for."


def _check_is_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name}{_shortened(text)!r} is not UTF-8: it is in another encoding, or a part of a character is missing. "
            "Give it in UTF-8."
        ) from None
