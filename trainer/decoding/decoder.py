"""Which decoder picks the tokens, and its settings. It loads no TensorFlow, so that a mistake is reported at once."""

import dataclasses
import difflib
import numbers
from typing import Any, Self

from trainer.config.settings import SAMPLERS, TEMPERATURES, SamplesConfig
from trainer.errors import UserError

_DRAWN = ("random", "top-k", "top-p", "min-p")
# Which decoders read each option of `trainer.generate`. Below, the field that each option sets.
READ_BY = {
    "k": ("top-k", "random"),
    "p": ("top-p", "random"),
    "min_p": ("min-p", "random"),
    "num_beams": ("beam",),
    "length_penalty": ("beam",),
    "repetition_penalty": SAMPLERS,
    "temperature": _DRAWN,
    "seed": _DRAWN,
}
_FIELDS = {"k": "top_k", "p": "top_p"}
# What a decoder reads and is not given. `random` leaves out nothing unless it is told to.
_SAMPLES = SamplesConfig()
_DEFAULTS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": _SAMPLES.top_k},
    "top-p": {"top_p": _SAMPLES.top_p},
    "min-p": {"min_p": 0.1},
}
_REPETITION_PENALTIES = (0.01, 100.0)
_LENGTH_PENALTIES = (0.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How the next token is picked. Settings that its name does not read have no effect.

    Attributes:
        name: one of SAMPLERS.
        top_k: the number of likeliest tokens that are drawn from.
        top_p: the least probability that the tokens which are drawn from have together.
        num_beams: number of unfinished texts that beam keeps.
        temperature: divides the logits before a draw.
        min_p: the least share of the likeliest token's probability that a token has which is drawn.
        repetition_penalty: divides positive logits of tokens that the text holds, and multiplies negative ones.
        length_penalty: beam prefers the largest score / length ** length_penalty.

    Raises:
        UserError: a value is impossible.
    """

    name: str
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = _SAMPLES.num_beams
    temperature: float = _SAMPLES.temperature
    min_p: float | None = None
    repetition_penalty: float = 1.0
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            nearest = difflib.get_close_matches(str(self.name), SAMPLERS, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"{self.name!r} is not a sampler; choose one of {', '.join(SAMPLERS)}.{hint}")
        for setting, value in _DEFAULTS.get(self.name, {}).items():
            if getattr(self, setting) is None:
                object.__setattr__(self, setting, value)  # The way to set a field of a frozen dataclass.
        share = "a number above 0 and at most 1"
        for option, value, is_possible, allowed in (
            ("k", self.top_k, self.top_k is None or is_count(self.top_k), "a count of at least 1"),
            ("p", self.top_p, self.top_p is None or _is_share(self.top_p), share),
            ("min_p", self.min_p, self.min_p is None or _is_share(self.min_p), share),
            ("num_beams", self.num_beams, is_count(self.num_beams), "a count of at least 1"),
            _ranged("temperature", self.temperature, TEMPERATURES),
            _ranged("repetition_penalty", self.repetition_penalty, _REPETITION_PENALTIES),
            _ranged("length_penalty", self.length_penalty, _LENGTH_PENALTIES),
        ):
            if not is_possible:
                raise UserError(f"{option}={value!r} is impossible; give {allowed}.")

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are drawn by chance, and a temperature is read."""
        return self.name in _DRAWN

    @property
    def is_random(self) -> bool:
        """Whether another seed can give another text."""
        return self.is_drawn and self.cuts()["k"] != 1

    def cuts(self) -> dict[str, Any]:
        """Returns which tokens are drawn from: the options `k`, `p` and `min_p` that this decoder reads, or None."""
        fields = {"k": self.top_k, "p": self.top_p, "min_p": self.min_p}
        return {option: value if self.name in READ_BY[option] else None for option, value in fields.items()}

    @classmethod
    def from_options(cls, name: str, config: SamplesConfig, **options: Any) -> Self:
        """Returns the decoder of that name with options instead of the settings of a run.

        Args:
            name: one of SAMPLERS.
            config: the run's samples settings.
            options: the keys of READ_BY; None stands for an option that is not given.

        Raises:
            UserError: a value is impossible, or an option has no effect on what this decoder writes.
        """
        given = {option: value for option, value in options.items() if value is not None}
        settings: dict[str, Any] = {"num_beams": config.num_beams, "temperature": config.temperature}
        settings |= {"top_k": config.top_k} if name == "top-k" else {}
        settings |= {"top_p": config.top_p} if name == "top-p" else {}
        settings |= {_FIELDS.get(option, option): value for option, value in given.items() if option != "seed"}
        decoder = cls(name, **settings)
        for option, value in given.items():
            readers = READ_BY[option]
            if name not in readers:
                raise UserError(
                    f"{option}={value} has no effect with the sampler {name}, only with {_listed(readers)}; choose "
                    f"another sampler, or leave out {option}."
                )
            if option in ("temperature", "seed", "p", "min_p") and not decoder.is_random:
                raise UserError(
                    f"{option}={value} has no effect with k=1, which always takes the likeliest token; raise k, or "
                    f"leave out {option}."
                )
        return decoder


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, numbers.Integral) and int(value) >= 1


def _is_share(value: object) -> bool:
    return isinstance(value, numbers.Real) and 0 < float(value) <= 1


def _ranged(option: str, value: object, bounds: tuple[float, float]) -> tuple[str, object, bool, str]:
    low, high = bounds
    is_possible = isinstance(value, numbers.Real) and low <= float(value) <= high
    return option, value, is_possible, f"a number from {low:g} to {high:g}"


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
