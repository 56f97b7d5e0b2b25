"""Writes the samples that show what a model has learned, with several decoders."""

from collections.abc import Callable

from trainer.config.settings import SamplesConfig
from trainer.decoding.generate import Generator
from trainer.decoding.request import Request
from trainer.decoding.writing import NotFinite


def warn_about_samples(generator: Generator, config: SamplesConfig, say: Callable[[str], None]) -> None:
    """Prints a warning for each sample setting that has another effect than it seems to have.

    It is called before the first step, and not only when the samples are written.

    Raises:
        UserError: no samples can be written with these settings.
    """
    request = Request.from_options(config, "greedy")
    for remark in generator.remarks([config.prompt], request, "samples."):
        say(f"warning: {remark}")


def write_samples(
    generator: Generator,
    config: SamplesConfig,
    say: Callable[[str], None],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Returns what each sampler writes after the prompt. The same model always writes the same samples.

    Args:
        generator: writes with the model.
        config: the samplers, the prompt, the length and the settings of each.
        say: prints a line; called if the logits are not finite. Then there are no samples. Whether the run can go on is
            decided by `check_is_learning`.
        stop_requested: called before each decoder; once it returns True, the remaining decoders are left out.
    """
    samples: dict[str, str] = {}
    for name in config.samplers:
        if stop_requested():
            break
        try:
            (text,) = generator.texts([config.prompt], Request.from_options(config, name))
            samples[name] = str(text)
        except NotFinite:
            say("No samples: the model's logits are not finite.")
            break
    return samples
