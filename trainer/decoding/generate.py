"""Writing text with a trained model: prompts in, continued texts out.

Checkpoints and runs are not its concern. text_loop.py writes tokens, sampling.py picks them.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.decoding.decoder import Decoder
from trainer.decoding.request import Request
from trainer.decoding.text_loop import TextLoop
from trainer.decoding.writing import Text, Writing
from trainer.errors import UserError
from trainer.model.held import WHOLE, Held
from trainer.model.language_model import adapt
from trainer.model.ops.plain import Ops
from trainer.tokenizers.tokenizer import Tokenizer

# A stream writes more tokens at a time as long as they take less than this.
_PIECE_SECS = 0.05
# The compiled loops that a generator keeps, those used last.
_MAX_LOOPS = 8


class Generator:
    """Continues texts with a model, compiled once for each of the decoders used last.

    Args:
        model: a GPT, which is read through its key-value cache; or any causal Keras model from int32 [batch, sequence]
            to logits [batch, sequence, vocabulary], which then reads the whole text again for each token.
        tokenizer: the tokenizer of the text the model was trained on.
        sequence_length: the most tokens, [BOS] included, that a text can have.
        ops: a GPT's way of computing; None: the fastest on the device that holds it.
        end_tokens: tokens that end each text as [BOS] does; the text does not hold them.
        strategy: the devices that write together; None: the one that TensorFlow chooses.
        held: returns, in a replica function, how the layers of a GPT get their weights. If these are gathered, every
            process of the strategy writes the same texts at the same time.

    Raises:
        UserError: the model has fewer positions than sequence_length.
    """

    def __init__(
        self,
        model: keras.Model,
        tokenizer: Tokenizer,
        sequence_length: int,
        ops: Ops | None = None,
        end_tokens: Sequence[int] = (),
        strategy: tf.distribute.Strategy | None = None,
        held: Callable[[], Held] = lambda: WHOLE,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self._end_tokens = end_tokens
        self._loops: dict[tuple[Decoder, int | None], TextLoop] = {}
        self._strategy, self._held = strategy or tf.distribute.get_strategy(), held
        self._ops = ops or adapt(model).decoding_ops()
        max_length = adapt(model).max_length()
        if max_length is not None and sequence_length > max_length:
            raise UserError(
                f"train.sequence_length={sequence_length} is more than the model's {max_length} positions; lower the "
                "former, or train a model with more."
            )

    def generate(
        self,
        prompts: Sequence[str],
        decoder: Decoder,
        num_tokens: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> list[Text]:
        """Continues each prompt.

        Args:
            prompts: texts to continue; an empty one starts a new text.
            decoder: how tokens are picked.
            num_tokens: see `Request`.
            seed: see `Request`. A prompt, the seed and the sample's number decide the text, whatever the other prompts.
            stop: see `Request`. Stops are searched for as the tokenizer writes them.
            options: the other fields of `Request`.

        Returns:
            Each prompt with its continuation, as the tokenizer decodes them together; all texts of a prompt follow each
            other.

        Raises:
            UserError: an option is impossible, a prompt leaves no room for a continuation, or the tokenizer does not
                belong to the model.
            NotFinite: the model's logits are not finite.
        """
        return list(self.texts(prompts, Request(decoder, num_tokens, seed, stop, **options)))

    def texts(self, prompts: Iterable[str], request: Request) -> Iterator[Text]:
        """Yields the texts of each prompt, a batch at a time; see `generate`."""
        samples = range(1 if request.decoder.name == "beam" else request.num_samples)
        rows = ((prompt, sample) for prompt in prompts for sample in samples)
        rows_per_text = request.decoder.num_beams if request.decoder.name == "beam" else 1
        while batch := list(itertools.islice(rows, max(1, request.batch_size // rows_per_text))):
            for texts in self._begin(batch, request).finish():
                yield from texts

    def stream(self, prompt: str, request: Request) -> Iterator[str]:
        """Yields a text in pieces, as it is made: its prompt, and whole characters. Joined, they are the text that
        `generate` returns.

        Raises:
            UserError: see `generate`; or the request is for several texts, or for beam search, whose text is known only
                at its end.
        """
        if not request.is_stream:
            raise UserError("A stream is one text that is made from its start to its end: not beam, nor several texts.")
        writing = self._begin([(prompt, 0)], request)
        text, num_tokens = "", 1
        while not writing.is_over:
            # A token can change the end of the text before it, so only what lasts is shown.
            longer = writing.so_far(0)
            yield longer[len(text) :]
            text, began = longer, time.monotonic()
            writing.advance(num_tokens)
            is_fast = time.monotonic() - began < _PIECE_SECS
            num_tokens = 2 * num_tokens if is_fast else max(1, num_tokens // 2)
        yield writing.text(0)[len(text) :]

    def _begin(self, rows: Sequence[tuple[str, int]], request: Request) -> Writing:
        stop = [self.as_written(each) for each in request.stop]
        for token in request.stop_tokens:
            if not 0 <= token < self.tokenizer.vocabulary_size:
                raise UserError(
                    f"stop_tokens={token} is not a token; the vocabulary has the tokens 0 to "
                    f"{self.tokenizer.vocabulary_size - 1}."
                )
        request = dataclasses.replace(request, stop_tokens=[*self._end_tokens, *request.stop_tokens])
        prompts = [(prompt, self.encode(prompt, request.sliding_window)) for prompt, _ in rows]
        is_known = self._strategy.num_replicas_in_sync > 1 or (len(rows) == 1 and request.decoder.name != "beam")
        key = request.decoder, len(rows) if is_known else None
        loop = self._loops.pop(key, None) or TextLoop(
            self.model, self.tokenizer, self.sequence_length, *key, self._ops, self._strategy, self._held
        )
        self._loops[key] = loop  # The last one is the newest.
        if len(self._loops) > _MAX_LOOPS:
            del self._loops[next(iter(self._loops))]
        samples = [sample for _, sample in rows]
        return Writing(loop, self.tokenizer, self.sequence_length, prompts, samples, request, stop)

    def encode(self, prompt: str, sliding_window: bool = False) -> np.ndarray:
        """Returns [BOS] and the tokens of a prompt, int32 [tokens].

        Raises:
            UserError: the prompt leaves no room for a continuation, or is not text.
        """
        _check_is_text("The prompt ", prompt)
        encoded = self.tokenizer.encode(prompt)
        if len(encoded) >= self.sequence_length - 1 and not sliding_window:
            raise UserError(
                f"The prompt {_shortened(prompt)!r} has {len(encoded)} tokens; with [BOS] before them "
                f"train.sequence_length={self.sequence_length} leaves no room to continue. Give a prompt of at "
                f"most {self.sequence_length - 2} tokens, write with a sliding window, or train with a larger "
                "train.sequence_length."
            )
        return np.concatenate([[self.tokenizer.bos_id], encoded]).astype(np.int32)

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

    def remarks(self, prompts: Sequence[str], request: Request, prefix: str = "") -> list[str]:
        """Returns a line about each argument that has another effect than it seems to have.

        Args:
            prompts: see `generate`.
            request: what to write.
            prefix: beginning of the arguments' names in the lines, such as "samples." if they are settings.

        Raises:
            UserError: a stop can never be written, or a prompt leaves no room for a continuation.
        """
        lines = []
        lengths = []
        for prompt in prompts:
            tokens = self.encode(prompt, request.sliding_window)
            lengths.append(len(tokens))
            if self.tokenizer.unknown_id in tokens[1:]:
                lines.append(
                    f"{prefix}prompt={_shortened(prompt)!r}: the vocabulary has no token for "
                    f"{self._without_token(prompt)}; the model reads [UNK] instead."
                )
        room = self.sequence_length - max(lengths, default=1)
        if request.num_tokens is not None and request.num_tokens > room and not request.sliding_window:
            longest = prompts[int(np.argmax(lengths))] if lengths else ""
            after = f"the prompt {_shortened(longest)!r}" if longest else "[BOS]"
            lines.append(
                f"{prefix}num_tokens={request.num_tokens}: train.sequence_length={self.sequence_length} has room for "
                f"{room} after {after}, and no more are written."
            )
        for stop in request.stop:
            written = self.as_written(stop, f"{prefix}stop")
            if written != stop:
                lines.append(f"{prefix}stop={stop!r} is searched for as {written!r}, as the tokenizer writes it.")
            elif about := _about_escapes(stop):
                lines.append(f"{prefix}stop={stop!r}:{about}")
        return list(dict.fromkeys(lines))

    def _without_token(self, text: str) -> str:
        unknown = [each for each in dict.fromkeys(text) if self.tokenizer.unknown_id in self.tokenizer.encode(each)]
        return ", ".join(map(repr, unknown[:10])) or "some of its words"


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def _about_escapes(text: str) -> str:
    found = re.search(r"\\[nrt]", text)
    if found is None:
        return ""
    return f" {found[0]} is a backslash and a letter here; in bash, $'{found[0]}' is the character that it stands for."


def _check_is_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{name}{text!r:.80} is not a text; give a string.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name}{_shortened(text)!r} is not UTF-8: it is in another encoding, or a part of a character is missing. "
            "Give it in UTF-8."
        ) from None
