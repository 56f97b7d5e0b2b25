"""Laws of the decoders' settings."""

import pytest

from trainer.config.settings import SamplesConfig
from trainer.decoding.decoder import DECODERS, Decoder
from trainer.errors import UserError


def test_decoder_refuses_impossible_settings():
    with pytest.raises(UserError, match=r"'top_k' is not a sampler; .*greedy, beam, top-k, top-p\. Did you mean top-k"):
        Decoder("top_k")
    for setting, value, option in [
        ("top_k", 0, "^k=0 is impossible"),
        ("top_k", 2.5, r"^k=2\.5 is impossible; give a count of at least 1"),
        ("top_k", "3", "^k='3' is impossible"),
        ("num_beams", 2.0, "^num_beams=2.0 is impossible"),
        ("top_p", "0.9", "^p='0.9' is impossible"),
        ("top_p", 0.0, "^p=0.0 is"),
        ("top_p", 1.5, "^p=1.5 is"),
        ("num_beams", 0, "^num_beams=0 is"),
        ("temperature", 0.0, "^temperature=0.0 is"),
        ("temperature", 1e38, "^temperature=1e\\+38 is impossible; give a number from 1e-06 to 1e\\+06"),
        ("temperature", 1e-38, "^temperature=1e-38 is"),
        ("temperature", float("nan"), "^temperature=nan is"),
    ]:
        with pytest.raises(UserError, match=option):
            Decoder("top-k", **{setting: value})


def test_decoder_takes_the_settings_of_the_run():
    config = SamplesConfig(top_k=3, top_p=0.25, num_beams=4, temperature=0.5)
    assert Decoder.from_config("top-p", config) == Decoder("top-p", 3, 0.25, 4, 0.5)


def test_an_option_that_the_decoder_does_not_read_is_refused():
    samples = SamplesConfig()
    readers = {"k": ["top-k"], "p": ["top-p"], "num_beams": ["beam"], "temperature": ["top-k", "top-p"]}
    for option, value in (("k", 3), ("p", 0.25), ("num_beams", 4), ("temperature", 0.5), ("seed", 0)):
        for name in DECODERS:
            if name in readers.get(option, ["top-k", "top-p"]):
                Decoder.from_options(name, samples, **{option: value})
                continue
            with pytest.raises(UserError, match=f"^{option}={value} has no effect with the sampler {name}, only with"):
                Decoder.from_options(name, samples, **{option: value})
    for option, value in (("temperature", 0.5), ("seed", 3)):
        with pytest.raises(UserError, match=f"^{option}={value} has no effect with k=1"):
            Decoder.from_options("top-k", samples, k=1, **{option: value})
    assert Decoder.from_options("top-k", samples, k=3, p=None) == Decoder("top-k", top_k=3)
