"""A trained model as an object, which `trainer.load` returns: its Keras model, tokenizer, texts, scores and curves."""

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.config.settings import Config
from trainer.decoding.generate import Generator
from trainer.decoding.request import Request, one_or_several
from trainer.decoding.writing import Text
from trainer.errors import UserError
from trainer.monitoring.curves import Curve, read_history
from trainer.scoring.scorer import Scorer
from trainer.system.storage import Location
from trainer.system.terminal import warn
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.training.on_devices import ModelOnDevices


class LoadedModel:
    """A trained model with what belongs to it.

    Args:
        model: the model on its devices.

    Attributes:
        tokenizer: its tokenizer, for strings, lists and tensors.
        config: the settings that it was trained with.
        step: the steps that it was trained for.
        folder: the folder that it was read from; for a checkpoint the folder of its run.
    """

    def __init__(self, model: ModelOnDevices) -> None:
        self._model, opened = model, model.opened
        self.tokenizer = TextTokenizer(opened.tokenizer)
        self.config: Config = opened.config
        self.step: int = opened.step
        self.folder: Location = opened.folder

    @property
    def model(self) -> keras.Model:
        """The Keras model, from int32 [batch, sequence] to logits [batch, sequence, vocabulary].

        Raises:
            UserError: several devices hold its weights together.
        """
        if self._model.is_in_pieces:
            raise UserError(
                "The devices hold this model together, and none holds all of it; load it without "
                "distribution.shard=weights."
            )
        return self._model.opened.model

    def __repr__(self) -> str:
        trained = f" at step {self.step:,}" if self.step else ""
        return (
            f"<{self.folder}{trained}: {self._model.opened.model.count_params():,} parameters, {self.tokenizer.kind} "
            f"vocabulary of {self.tokenizer.vocabulary_size:,}>"
        )

    @functools.cached_property
    def _generator(self) -> Generator:
        return self._model.generator()

    def generate(self, prompts: str | Sequence[str] = "", sampler: str = "top-p", **options: Any) -> list[Text]:
        """Continues prompts: `trainer.generate` without loading the model again. A decoder is compiled once.

        Args:
            prompts: one text or several.
            sampler: see `trainer.generate`.
            options: the other arguments of `trainer.generate`, by name.

        Returns:
            The prompts with their continuations.

        Raises:
            UserError: a prompt or an option cannot be used.
        """
        request = Request.from_options(self.config.samples, sampler, **options)
        texts = one_or_several(prompts)
        for remark in self._generator.remarks(texts, request):
            warn(f"warning: {remark}")
        return list(self._generator.texts(texts, request))

    def stream(self, prompt: str = "", sampler: str = "top-p", **options: Any) -> Iterator[str]:
        """Yields a text in pieces while it is made, as `for piece in run.stream("once"): print(piece, end="")`. Joined,
        they are the text that `generate` returns.

        Args:
            prompt: the text to continue, which comes first.
            sampler: see `trainer.generate`; not beam, which knows its text at the end.
            options: see `generate`; no num_samples.

        Raises:
            UserError: the prompt or an option cannot be used.
        """
        request = Request.from_options(self.config.samples, sampler, **options)
        for remark in self._generator.remarks([prompt], request):
            warn(f"warning: {remark}")
        return self._generator.stream(prompt, request)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return self._model.scorer(self.config.train.sequence_length)

    def score(self, texts: str | Sequence[str], stride: int | None = None, with_ends: bool = False) -> Any:
        """Scores texts, each by itself: its first token given [BOS], and each other token given those before it.

        Args:
            texts: one text or several.
            stride: how a text is read that is longer than the model's context: each window after the first scores
                only the next stride tokens, with the tokens before them as context. None: as many as the context has.
            with_ends: whether the end of each text is scored, too.

        Returns:
            The `Score` of the text, or a list of the scores of several: `nats`, `num_tokens`, `num_bytes`, `loss`,
            `perplexity`, `bits_per_byte` and more.

        Raises:
            UserError: it is not text, or the stride is not from 1 to the length of the context.
        """
        rows = [_text_of(text) for text in (texts if _is_sequence(texts) else [texts])]
        scores = list(self._scorer.scores(rows, stride, with_ends))
        return scores if _is_sequence(texts) else scores[0]

    @property
    def history(self) -> dict[str, Curve]:
        """The curves of the run by name, such as "train/loss/nats_per_token": all that the run has logged
        until now, also after the step of this model. Empty if nothing was logged.
        """
        return read_history(self.folder)


class TextTokenizer:
    """A model's tokenizer, for one text or several. What it returns has the form of what it is given.

    Args:
        tokenizer: the tokenizer.

    Attributes:
        wrapped: the tokenizer.
        kind: the kind of tokenizer: wordpiece, bpe, char or byte.
        vocabulary: the tokens; a token's index is its id. BPE and byte write each byte as a letter.
        vocabulary_size: the number of tokens, the special ones included.
        bos_id: the token before each document. `encode` adds none.
        pad_id: the token of padding.
        unknown_id: the token of what the vocabulary cannot spell; -1 if it can spell everything.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.wrapped = tokenizer
        self.kind = tokenizer.kind
        self.vocabulary = tokenizer.vocabulary
        self.vocabulary_size = tokenizer.vocabulary_size
        self.bos_id, self.pad_id, self.unknown_id = tokenizer.bos_id, tokenizer.pad_id, tokenizer.unknown_id

    def __repr__(self) -> str:
        return f"<{self.kind} tokenizer with a vocabulary of {self.vocabulary_size:,}>"

    def encode(self, texts: Any) -> Any:
        """Returns the tokens of texts, without [BOS].

        Args:
            texts: a string; a list of strings; or a string tensor, [] or [texts], also in `tf.data.Dataset.map`.

        Returns:
            For a string a list of integers, for a list of strings a list of these; for a tensor int32 [tokens], or
            ragged int32 [texts, tokens].

        Raises:
            UserError: it is not text.
        """
        if isinstance(texts, str | bytes):
            return self.wrapped.encode(_text_of(texts)).tolist()
        if not tf.is_tensor(texts):
            rows = [_text_of(text) for text in (texts if _is_sequence(texts) else [texts])]
            return [tokens.tolist() for tokens in self.wrapped.encode_batch(rows)]
        if texts.dtype != tf.string or texts.shape.rank not in (0, 1):
            raise UserError(
                f"encode got {texts.dtype.name} {texts.shape}; give texts, as a string tensor [] or [texts]."
            )
        rows = tf.reshape(texts, [-1])
        if tf.executing_eagerly():
            tokens, lengths = self._encode_bytes(rows.numpy())
        else:
            tokens, lengths = tf.numpy_function(self._encode_bytes, [rows], [tf.int32, tf.int64])
        tokens, lengths = tf.ensure_shape(tokens, [None]), tf.ensure_shape(lengths, [None])
        return tf.RaggedTensor.from_row_lengths(tokens, lengths) if texts.shape.rank else tokens

    def _encode_bytes(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.wrapped.encode_batch([_text_of(text) for text in texts])
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.concatenate([np.zeros(0, np.int32), *rows]), lengths

    def decode(self, tokens: Any) -> Any:
        """Returns the text of tokens, [PAD] and [BOS] left out.

        Args:
            tokens: a list or an array of integers; a list of these; or an integer tensor, [tokens] or [texts, tokens],
                also a ragged one.

        Returns:
            For tokens of one text a string, for several a list of strings; for a tensor a string tensor, [] or [texts].

        Raises:
            UserError: a number is not a token.
        """
        if isinstance(tokens, tf.RaggedTensor):
            return tf.constant([self.decode(row) for row in tokens.to_list()], tf.string)
        if tf.is_tensor(tokens):
            return tf.constant(self.decode(tokens.numpy()), tf.string)
        rows = list(tokens) if _is_sequence(tokens) else [tokens]
        if getattr(tokens, "ndim", 1) > 1 or (rows and _is_sequence(rows[0])):
            return [self.decode(row) for row in rows]
        return self.wrapped.decode(np.array([self._checked(token) for token in rows], np.int32))

    def id_to_token(self, id: int) -> str:
        """Returns the token with a number.

        Raises:
            UserError: no token has it.
        """
        return self.vocabulary[self._checked(id)]

    def token_to_id(self, token: str) -> int:
        """Returns the number of a token.

        Raises:
            UserError: the vocabulary does not have it.
        """
        found = self._ids.get(token)
        if found is None:
            raise UserError(f"{token!r} is not in the vocabulary of {self.vocabulary_size:,} tokens.")
        return found

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: id for id, token in enumerate(self.vocabulary) if token}

    def _checked(self, id: Any) -> int:
        try:
            index = operator.index(id)
        except TypeError:
            index = -1
        if not 0 <= index < self.vocabulary_size:
            raise UserError(f"{id!r} is not a token; tokens are the integers from 0 to {self.vocabulary_size - 1}.")
        return index


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def _text_of(text: Any) -> str:
    """Returns a text, which may be given as UTF-8.

    Raises:
        UserError: it is not a text.
    """
    try:
        if isinstance(text, bytes):
            return text.decode()
        text.encode()
    except UnicodeError:
        raise UserError(f"{text!r:.80} is not UTF-8; give a text in UTF-8.") from None
    except AttributeError:
        raise UserError(f"{text!r:.80} is not a text; give a string, or a list of strings.") from None
    return str(text)
