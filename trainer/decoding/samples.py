"""Writes the samples that show what a model has learned, with every decoder."""

from collections.abc import Callable

from trainer.config.settings import SamplesConfig
from trainer.decoding.decoder import DECODERS, Decoder
from trainer.decoding.generate import Generator, NotFinite


def warn_about_samples(generator: Generator, config: SamplesConfig, say: Callable[[str], None]) -> None:
    """Prints a warning for each sample setting that has another effect than it seems to have.

    It is called before the first step, and not only when the samples are written.

    Raises:
        UserError: no samples can be written with these settings.
    """
    for remark in generator.remarks([config.prompt], config.num_tokens, config.stop, "samples."):
        say(f"warning: {remark}")


def write_samples(
    generator: Generator,
    config: SamplesConfig,
    say: Callable[[str], None],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Returns what each decoder writes after the prompt. The same model always writes the same samples.

    Args:
        generator: writes with the model.
        config: the prompt, the length and the decoders' settings.
        say: prints a line; called if the logits are not finite. Then there are no samples. Whether the run can go on is
            decided by `check_is_learning`.
        stop_requested: called before each decoder; once it returns True, the remaining decoders are left out.
    """
    num_tokens = config.num_tokens or generator.sequence_length
    samples = {}
    for name in DECODERS:
        if stop_requested():
            break
        decoder = Decoder.from_config(name, config)
        try:
            (samples[name],) = generator.generate([config.prompt], decoder, num_tokens, stop=config.stop)
        except NotFinite:
            say("No samples: the model's logits are not finite.")
            break
    return samples
