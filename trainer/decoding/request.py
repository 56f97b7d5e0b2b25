"""What is asked of a generator. It loads no TensorFlow, so that a mistake is reported at once."""

import dataclasses
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, Self

from trainer.config.settings import SamplesConfig
from trainer.decoding.decoder import READ_BY, Decoder, is_count
from trainer.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """How texts are continued, whatever the prompts and the model are.

    Attributes:
        decoder: how tokens are picked.
        num_tokens: the most tokens to write after a prompt; None: as many as the context has room for.
        seed: decides what is drawn, together with the sample's number and the position of the token.
        stop: texts that end a continuation, which keeps the first of them that is complete. Beam search finishes its
            texts before they are cut.
        stop_tokens: tokens that end a text as [BOS] does; the text does not hold them.
        num_samples: the number of texts for each prompt. With beam search these are the best of its beams.
        sliding_window: whether a text goes on when the context is full, with its last half and [BOS] as the new
            beginning. Learned positions start again there.
        batch_size: the most texts that are written at a time; each beam counts as one.

    Raises:
        UserError: a value is impossible, or has no effect.
    """

    decoder: Decoder
    num_tokens: int | None = None
    seed: int = 0
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    num_samples: int = 1
    sliding_window: bool = False
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", () if self.stop is None else one_or_several(self.stop))
        object.__setattr__(self, "stop_tokens", one_or_several(self.stop_tokens))
        if self.num_tokens is not None and not is_count(self.num_tokens):
            raise UserError(f"num_tokens={self.num_tokens!r} leaves nothing to write; give a count of at least 1.")
        for option, value in (("num_samples", self.num_samples), ("batch_size", self.batch_size)):
            if not is_count(value):
                raise UserError(f"{option}={value!r} must be at least 1.")
        if not isinstance(self.seed, numbers.Integral):
            raise UserError(f"seed={self.seed!r} is not a whole number.")
        for token in self.stop_tokens:
            if not isinstance(token, numbers.Integral):
                raise UserError(f"stop_tokens={token!r} is not a token; give its number in the vocabulary.")
        if self.num_samples > 1:
            self._check_num_samples()
        if self.sliding_window and self.decoder.name == "beam":
            raise UserError("sliding_window=True does not go with the sampler beam; choose another sampler.")
        if self.sliding_window and self.num_tokens is None:
            raise UserError("sliding_window=True lets a text go on for ever; give num_tokens too.")

    @property
    def is_stream(self) -> bool:
        """Whether the text can be shown while it is made: it is one, and not chosen at the end by beam search."""
        return self.num_samples == 1 and self.decoder.name != "beam"

    def _check_num_samples(self) -> None:
        decoder, number = self.decoder, self.num_samples
        if decoder.name == "beam":
            if number > decoder.num_beams:
                raise UserError(
                    f"num_samples={number} is more than num_beams={decoder.num_beams}, the number of texts that beam "
                    "search has at its end; raise num_beams, or ask for fewer."
                )
        elif not decoder.is_random:
            with_k = "" if decoder.name == "greedy" else " with k=1"
            raise UserError(f"num_samples={number}: {decoder.name}{with_k} always writes the same text; ask for 1.")

    @classmethod
    def from_options(cls, samples: SamplesConfig, sampler: str = "top-p", **options: Any) -> Self:
        """Returns the request that options make of a run's settings.

        Args:
            samples: the run's settings: defaults of the decoder's, of num_tokens and of stop.
            sampler: one of SAMPLERS.
            options: the options of `Decoder.from_options` and the fields of a request; None stands for an option that
                is not given.

        Raises:
            UserError: a value is impossible, or an option has no effect.
        """
        given = {option: value for option, value in options.items() if value is not None}
        decoder = Decoder.from_options(sampler, samples, **{name: given[name] for name in given if name in READ_BY})
        defaults = {"num_tokens": samples.num_tokens, "stop": samples.stop or ()}
        return cls(decoder, **defaults | {name: given[name] for name in given if name == "seed" or name not in READ_BY})


def one_or_several(value: Any) -> tuple[Any, ...]:
    """Returns the values of an argument that may be one value or several: a string is one."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else (value,)
