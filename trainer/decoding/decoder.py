"""Which decoder picks the tokens, and its settings. It loads no TensorFlow, so that a mistake is reported at once."""

import dataclasses
import difflib
import numbers
from typing import Any, Self

from trainer.config.settings import TEMPERATURES, SamplesConfig
from trainer.errors import UserError

DECODERS = ("greedy", "beam", "top-k", "top-p")

_DEFAULTS = SamplesConfig()
# Which decoders read each option of `trainer.generate`. Below, the setting that each option replaces.
_READ_BY = {
    "k": ("top-k",),
    "p": ("top-p",),
    "num_beams": ("beam",),
    "temperature": ("top-k", "top-p"),
    "seed": ("top-k", "top-p"),
}
_SETTINGS = {"k": "top_k", "p": "top_p", "num_beams": "num_beams", "temperature": "temperature"}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How the next token is picked.

    Attributes:
        name: one of DECODERS.
        top_k: number of likeliest tokens that top-k draws from.
        top_p: the least probability that the tokens which top-p draws from have together.
        num_beams: number of unfinished texts that beam keeps.
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
            raise UserError(f"{self.name!r} is not a sampler; choose one of {', '.join(DECODERS)}.{hint}")
        low, high = TEMPERATURES
        for option, value, is_possible, allowed in (
            ("k", self.top_k, is_count(self.top_k), "a count of at least 1"),
            ("p", self.top_p, _is_real(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("num_beams", self.num_beams, is_count(self.num_beams), "a count of at least 1"),
            (
                "temperature",
                self.temperature,
                _is_real(self.temperature) and low <= self.temperature <= high,
                f"a number from {low:g} to {high:g}",
            ),
        ):
            if not is_possible:
                raise UserError(f"{option}={value!r} is impossible; give {allowed}.")

    @property
    def is_random(self) -> bool:
        """Whether another seed can give another text."""
        return self.name == "top-p" or (self.name == "top-k" and self.top_k > 1)

    @classmethod
    def from_config(cls, name: str, config: SamplesConfig) -> Self:
        """Returns the decoder of that name with the settings of a run."""
        return cls(name, config.top_k, config.top_p, config.num_beams, config.temperature)

    @classmethod
    def from_options(cls, name: str, config: SamplesConfig, **options: Any) -> Self:
        """Returns the decoder of that name with options instead of the settings of a run.

        Args:
            name: one of DECODERS.
            config: the run's samples settings.
            options: `k`, `p`, `num_beams`, `temperature` and `seed`; None stands for an option that is not given.

        Raises:
            UserError: a value is impossible, or an option has no effect on what this decoder writes.
        """
        given = {option: value for option, value in options.items() if value is not None}
        settings = {_SETTINGS[option]: value for option, value in given.items() if option in _SETTINGS}
        decoder = cls.from_config(name, config.model_copy(update=settings))
        for option, value in given.items():
            readers = _READ_BY[option]
            if name not in readers:
                raise UserError(
                    f"{option}={value} has no effect with the sampler {name}, only with {' and '.join(readers)}; "
                    f"choose another sampler, or leave out {option}."
                )
            if option in ("temperature", "seed") and not decoder.is_random:
                raise UserError(
                    f"{option}={value} has no effect with k=1, which always takes the likeliest token; raise k, or "
                    f"leave out {option}."
                )
        return decoder


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, numbers.Integral) and int(value) >= 1


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real)
