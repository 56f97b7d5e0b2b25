"""A SavedModel that writes and scores texts: strings in, strings and numbers out, in a program without this package.

The model, the tokenizer and the decoder are in the graph. It computes in float32 with TensorFlow's own operations, on
any device.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config.settings import Config
from trainer.decoding.sampling import draw, most_likely, uniform
from trainer.exchange.graph_tokenizers import in_graph
from trainer.model.build import build_gpt
from trainer.model.language_model import adapt
from trainer.model.ops.plain import PLAIN
from trainer.tokenizers.tokenizer import Tokenizer

_HOW_TO_LOAD = """\
import tensorflow as tf
{imports}
model = tf.saved_model.load({path!r})
print(model.generate(["Once upon a time"])["texts"].numpy()[0].decode())
print(model.score(["Once upon a time there was a girl"])["nats"].numpy()[0])"""
_IMPORT_TEXT = "import tensorflow_text  # It has operations of the tokenizer.\n"

# The tokens that are scored at a time, padding included: all their logits are in memory.
_TOKENS_AT_A_TIME = 1 << 11


def how_to_load(tokenizer: Tokenizer, path: str) -> str:
    """Returns Python code that loads the SavedModel of a run."""
    return _HOW_TO_LOAD.format(imports=_IMPORT_TEXT if tokenizer.kind == "wordpiece" else "", path=path)


def write_saved_model(weights: dict[str, np.ndarray], config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a SavedModel.

    Args:
        weights: the weights of the model by their paths, float [...].
        config: the settings of the run.
        tokenizer: the tokenizer of the run.
        folder: the folder to write.

    Raises:
        UserError: the tokenizer cannot be in a graph.
    """
    module = TextModule(weights, config, tokenizer)
    tf.saved_model.save(module, str(folder), {"generate": module.generate, "score": module.score})


class TextModule(tf.Module):
    """A model with its tokenizer, as two functions of strings.

    Attributes:
        generate: (prompts, num_tokens, seed, temperature, top_k, top_p) to {"texts"}.
        score: texts to {"nats", "tokens", "bytes"}.
    """

    def __init__(self, weights: dict[str, np.ndarray], config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer, self._graph_tokenizer = tokenizer, in_graph(tokenizer)
        self._length = config.train.sequence_length
        in_float32 = config.model_copy(update={"train": config.train.model_copy(update={"precision": "float32"})})
        model = build_gpt(in_float32, tokenizer.vocabulary_size, tokenizer.bos_id)
        for variable in model.variables:
            variable.assign(weights[variable.path])
        self._weights = [variable.value for variable in model.variables]  # A tf.Module saves the variables it holds.
        self._model = adapt(model)
        # A SavedModel keeps defaults that are tensors.
        num_tokens = tf.constant(min(config.samples.num_tokens or self._length, self._length))
        seed, temperature, top_k, top_p = tf.constant(0, tf.int64), tf.constant(0.0), tf.constant(0), tf.constant(1.0)
        texts = tf.TensorSpec([None], tf.string, "texts")
        whole, wide, real = (tf.TensorSpec([], dtype) for dtype in (tf.int32, tf.int64, tf.float32))

        def generate(
            prompts: tf.Tensor,
            num_tokens: tf.Tensor = num_tokens,
            seed: tf.Tensor = seed,
            temperature: tf.Tensor = temperature,
            top_k: tf.Tensor = top_k,
            top_p: tf.Tensor = top_p,
        ) -> dict[str, tf.Tensor]:
            """Continues texts. temperature 0 takes the likeliest token; top_k 0 and top_p 1 leave out no token."""
            return {"texts": self._generate(prompts, num_tokens, seed, temperature, top_k, top_p)}

        prompts = tf.TensorSpec([None], tf.string, "prompts")
        self.generate = tf.function(generate, [prompts, whole, wide, real, whole, real], autograph=False)
        self.score = tf.function(self._score, [texts], autograph=False)

    def _encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns [BOS] and the tokens of each text: int32 [texts, tokens]."""
        bos = tf.fill([tf.size(texts), 1], self._tokenizer.bos_id)
        tokens: tf.RaggedTensor = tf.concat([bos, self._graph_tokenizer.encode(texts)], axis=1)
        return tokens

    def _generate(
        self,
        prompts: tf.Tensor,
        num_tokens: tf.Tensor,
        seed: tf.Tensor,
        temperature: tf.Tensor,
        top_k: tf.Tensor,
        top_p: tf.Tensor,
    ) -> tf.Tensor:
        ragged = self._encode(prompts)
        lengths = tf.cast(ragged.row_lengths(), tf.int32)
        longest = tf.reduce_max(lengths)
        checks = [
            tf.debugging.Assert(
                longest < self._length,
                [f"A prompt has too many tokens; with [BOS] at most {self._length - 1} are possible. It has:", longest],
            ),
            tf.debugging.Assert(num_tokens > 0, ["num_tokens must be at least 1, not:", num_tokens]),
            tf.debugging.Assert((top_p > 0) & (top_p <= 1), ["top_p must be above 0 and at most 1, not:", top_p]),
        ]
        with tf.control_dependencies(checks):
            tokens = ragged.to_tensor(shape=[None, self._length])
        ends = tf.minimum(lengths + tf.minimum(num_tokens, self._length), self._length)
        first = tf.reduce_min(tf.concat([lengths, [self._length]], axis=0))
        cache = self._model.read(tokens, first - 1, PLAIN)

        def pick(logits: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
            at = uniform(tf.stack([seed, tf.cast(index, tf.int64)]), tf.range(tf.size(lengths)))
            k = tf.where(top_k > 0, top_k, logits.shape[-1])
            return tf.cond(
                temperature > 0, lambda: draw(logits, at, temperature, k, top_p), lambda: most_likely(logits)
            )

        def write(index: tf.Tensor, tokens: tf.Tensor, ends: tf.Tensor, cache: Any) -> tuple[Any, ...]:
            logits, cache = self._model.next_logits(tokens, index, cache, PLAIN)
            logits = self._possible(logits, tokens[:, index - 1])
            picked = tf.where(index < lengths, tokens[:, index], pick(logits, index))
            ends = tf.where((picked == self._tokenizer.bos_id) & (index >= lengths), tf.minimum(ends, index), ends)
            tokens = tf.where(tf.range(self._length) == index, picked[:, tf.newaxis], tokens)
            return index + 1, tokens, ends, cache

        def is_unfinished(index: tf.Tensor, tokens: tf.Tensor, ends: tf.Tensor, cache: Any) -> tf.Tensor:
            return index < tf.reduce_max(ends)

        _, tokens, ends, _ = tf.while_loop(is_unfinished, write, (first, tokens, ends, cache))
        return self._graph_tokenizer.decode(tf.RaggedTensor.from_tensor(tokens, lengths=ends)[:, 1:])

    def _possible(self, logits: tf.Tensor, newest: tf.Tensor) -> tf.Tensor:
        """Returns the logits with -inf for tokens that cannot come; see trainer/decoding."""
        ids, tokenizer = np.arange(self._tokenizer.vocabulary_size), self._tokenizer
        is_possible = (ids == tokenizer.bos_id) | (ids != tokenizer.pad_id) & (ids != tokenizer.unknown_id)
        is_possible = is_possible & ((ids != tokenizer.bos_id) | (newest != tokenizer.bos_id)[:, tf.newaxis])
        return tf.where(is_possible, logits[:, : len(ids)], -np.inf)

    def _score(self, texts: tf.Tensor) -> dict[str, tf.Tensor]:
        """Scores texts: the nats of all tokens of each, how many tokens these are, and the bytes of the text.

        A text longer than the model can read is scored in windows, each with as much context as fits; see
        trainer/scoring/windows.py.
        """
        ragged = self._encode(texts)
        num_targets = tf.cast(ragged.row_lengths(), tf.int32) - 1
        tokens = ragged.to_tensor()
        per_text = -(-num_targets // self._length)
        rows = tf.repeat(tf.range(tf.size(num_targets)), per_text)  # The text of each window.
        done = (tf.range(tf.size(rows)) - tf.gather(tf.cumsum(per_text, exclusive=True), rows)) * self._length
        ends = tf.minimum(done + self._length, tf.gather(num_targets, rows))
        starts = tf.maximum(ends - self._length, 0)
        width = tf.minimum(self._length, tf.reduce_max(tf.concat([num_targets, [1]], axis=0)))
        at_a_time = tf.maximum(1, _TOKENS_AT_A_TIME // width)

        def score(first: tf.Tensor, nats: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            part = slice(first, first + at_a_time)
            places = starts[part, tf.newaxis] + tf.range(width)
            is_scored = (places >= done[part, tf.newaxis]) & (places < ends[part, tf.newaxis])
            places = tf.minimum(places, tf.shape(tokens)[1] - 2)
            read = tf.gather(tokens, rows[part])
            inputs, targets = (tf.gather(read, places + more, batch_dims=1) for more in (0, 1))
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, self._model.model(inputs))
            sums = tf.reduce_sum(tf.where(is_scored, tf.cast(losses, tf.float64), 0), axis=1)
            return first + at_a_time, nats + tf.math.unsorted_segment_sum(sums, rows[part], tf.size(num_targets))

        nats = tf.zeros(tf.shape(num_targets), tf.float64)
        _, nats = tf.while_loop(lambda first, nats: first < tf.size(rows), score, (tf.constant(0), nats))
        return {"nats": nats, "tokens": num_targets, "bytes": tf.strings.length(texts)}
