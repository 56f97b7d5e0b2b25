"""The texts of one batch while they are written, from the tokens of the loop to strings."""

import bisect
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import tensorflow as tf

from trainer.decoding.request import Request
from trainer.decoding.text_loop import Prompts, TextLoop
from trainer.errors import UserError
from trainer.tokenizers.tokenizer import Tokenizer

# Stops are searched for between calls of the compiled loop, which write this many tokens.
_TOKENS_BETWEEN_STOPS = 32
# More than any text has, and as int64 still far from overflowing.
_ENDLESS = 1 << 40


class NotFinite(UserError):
    """The model's logits are NaN or infinite, so no text can be written."""


class Text(str):
    """A text that a model has written, with what is known about it.

    Attributes:
        prompt: what was continued.
        continuation: what the model wrote; the text is the prompt, as the tokenizer writes it, and this.
        num_tokens: the number of tokens of the continuation, without the token that ended it.
        finish: why the text ends: the model ended it, a stop was written, or there was no room or no token left.
        sample: which of the texts of its prompt it is, from 0; with beam search 0 is the best.
        score: with beam search the logarithm of the probability of the tokens that the model chose, divided by their
            number ** length_penalty; otherwise None.
    """

    prompt: str
    continuation: str
    num_tokens: int
    finish: Literal["end", "stop", "length"]
    sample: int
    score: float | None

    @classmethod
    def of(cls, text: str, **facts: Any) -> Self:
        """Returns a text with its attributes."""
        new = cls(text)
        new.__dict__.update(facts)
        return new


class Writing:
    """The texts of one batch while they are written.

    Args:
        loop: writes tokens.
        tokenizer: the tokenizer of the model.
        sequence_length: the number of tokens that the loop has room for.
        prompts: each a text and its tokens, int32 [tokens], which begin with [BOS].
        samples: which of the texts of its prompt each text is.
        request: what to write.
        stop: the request's stops, as the tokenizer writes them.
    """

    def __init__(
        self,
        loop: TextLoop,
        tokenizer: Tokenizer,
        sequence_length: int,
        prompts: Sequence[tuple[str, np.ndarray]],
        samples: Sequence[int],
        request: Request,
        stop: Sequence[str],
    ) -> None:
        self._loop = loop
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length
        self._prompts = prompts
        self._samples = np.array(samples, np.int32)
        self._request = request
        self._stop = stop
        self._is_beam = request.decoder.name == "beam"
        self._starts = [len(tokenizer.decode(tokens[1:])) for _, tokens in prompts]
        self._tokens = [tokens for _, tokens in prompts]
        lengths = np.array([len(tokens) for tokens in self._tokens], np.int64)
        most = _ENDLESS if request.sliding_window else sequence_length
        self._latest = np.minimum(lengths + min(request.num_tokens or most, most), most)
        self._ends = self._latest.copy()
        self._open(int(lengths.min()))

    def _open(self, index: int) -> None:
        """Begins the context that a position is written in. Which one that is depends on the position only, so that a
        text does not depend on the others of its batch.
        """
        length, step = self._sequence_length, max(1, self._sequence_length // 2)
        self._offset = offset = 0 if index < length else ((index - length) // step + 1) * step
        context = np.zeros([len(self._tokens), length], np.int32)
        for row, tokens in zip(context, self._tokens, strict=True):
            known = tokens[offset : offset + length]
            row[: len(known)] = known
        context[:, 0] = self._tokenizer.bos_id
        known = np.array([max(len(tokens), index) for tokens in self._tokens])
        self._given = Prompts(
            tokens=tf.constant(context),
            lengths=tf.constant(np.clip(known - offset, 0, length), tf.int32),
            ends=tf.constant(np.clip(self._ends - offset, 0, length), tf.int32),
            samples=tf.constant(self._samples),
            end_tokens=tf.constant([self._tokenizer.bos_id, *self._request.stop_tokens], tf.int32),
            num_best=tf.constant(self._request.num_samples, tf.int32),
            seed=tf.constant(self._request.seed % 2**63, tf.int64),
            offset=tf.constant(offset, tf.int64),
        )
        self._texts = self._loop.begin(self._given)
        self._index = index

    @property
    def is_over(self) -> bool:
        """Whether all texts have their ends."""
        return self._index >= self._ends.max()

    def finish(self) -> list[list[Text]]:
        """Writes all texts to their ends, and returns each prompt's texts, the best first."""
        while not self.is_over:
            self.advance(_TOKENS_BETWEEN_STOPS if self._stop else self._sequence_length)
        return [self._beams(i) if self._is_beam else [self.text(i)] for i in range(len(self._prompts))]

    def advance(self, num_tokens: int) -> None:
        """Writes some more tokens of each text that has not ended, or fewer.

        Raises:
            NotFinite: the model's logits are not finite.
        """
        if self._index - self._offset == self._sequence_length:
            self._open(self._index)
        until = min(self._index - self._offset + num_tokens, self._sequence_length)
        self._texts = self._loop.write(self._given, self._texts, tf.constant(until))
        if not self._texts.is_finite:
            raise NotFinite(
                "The model's logits are not finite: its weights are damaged; go back to an earlier checkpoint."
            )
        self._index = self._offset + int(self._texts.index)
        if self._is_beam:
            self._ends = np.reshape(self._texts.ends, self._texts.scores.shape).max(axis=1)
            return
        ends, given_ends = self._texts.ends.numpy(), self._given.ends.numpy()
        self._ends = np.where(ends < given_ends, ends + self._offset, self._ends)
        for i, (written, tokens) in enumerate(zip(self._texts.tokens.numpy(), self._tokens, strict=True)):
            new = written[max(len(tokens) - self._offset, 0) : self._index - self._offset]
            self._tokens[i] = np.concatenate([tokens, new])
        if self._stop and not self.is_over:
            self._end_stopped()

    def _end_stopped(self) -> None:
        """Ends the texts that hold a stop, so that no more of them is written."""
        ends = self._texts.ends.numpy()
        for i, tokens in enumerate(self._tokens):
            if self._cut(i, stable(self._tokenizer, self._decode(tokens[: self._ends[i]])))[1]:
                self._ends[i] = min(self._ends[i], self._index)
                ends[i] = self._ends[i] - self._offset
        self._texts = self._texts._replace(ends=tf.constant(ends))

    def _decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens[1:])

    def _cut(self, i: int, text: str) -> tuple[str, bool]:
        """Returns a text up to the first stop that is complete, and whether there is one."""
        places = [(text.find(stop, self._starts[i]), len(stop)) for stop in self._stop]
        ends = [place + length for place, length in places if place >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def so_far(self, i: int) -> str:
        """Returns as much of a text as no further token can change."""
        text = stable(self._tokenizer, self._decode(self._tokens[i][: self._ends[i]]))
        return self._cut(i, text)[0]

    def text(self, i: int) -> Text:
        """Returns a text that has its end."""
        return self._text(i, self._tokens[i][: self._ends[i]], int(self._samples[i]), None)

    def _beams(self, i: int) -> list[Text]:
        """Returns the best texts of a prompt, which are fewer than asked for if the model can write no more."""
        scores = self._texts.scores.numpy()[i]
        texts = []
        for sample, score in enumerate(scores[: self._request.num_samples].tolist()):
            row = i * len(scores) + sample
            tokens, end = self._texts.tokens[row].numpy(), int(self._texts.ends[row])
            if np.isfinite(score):
                chosen = min(end + 1, int(self._latest[i])) - len(self._prompts[i][1])
                score /= chosen**self._request.decoder.length_penalty
                texts.append(self._text(i, tokens[:end], sample, score))
        return texts

    def _text(self, i: int, tokens: np.ndarray, sample: int, score: float | None) -> Text:
        prompt, prompt_tokens = self._prompts[i]
        text, is_stopped = self._cut(i, self._decode(tokens))
        num_tokens = len(tokens)
        if is_stopped:  # Tokens after the one that completed the stop do not count.

            def holds_stop(end: int) -> bool:
                return self._cut(i, self._decode(tokens[:end]))[1]

            num_tokens = bisect.bisect_left(range(num_tokens), True, lo=len(prompt_tokens), key=holds_stop)
        is_whole = len(tokens) < self._latest[i]
        return Text.of(
            text,
            prompt=prompt,
            continuation=text[self._starts[i] :],
            num_tokens=num_tokens - len(prompt_tokens),
            finish="stop" if is_stopped else "end" if is_whole else "length",
            sample=sample,
            score=score,
        )


def stable(tokenizer: Tokenizer, text: str) -> str:
    """Returns as much of a decoded text as no further token can change: no part of a character, and with a tokenizer
    whose tokens can change the letters before them no part of a word.
    """
    if tokenizer.is_lossy:
        return text[: max(text.rfind(" "), 0)]
    return text.rstrip("\ufffd")
