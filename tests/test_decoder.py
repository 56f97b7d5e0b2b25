"""Laws of the decoders' settings."""

import pytest

from trainer.config.settings import SAMPLERS, SamplesConfig
from trainer.decoding.decoder import Decoder
from trainer.errors import UserError


def test_decoder_refuses_impossible_settings():
    with pytest.raises(
        UserError, match=r"'top_k' is not a sampler; .*greedy, beam, random, top-k, top-p, min-p\. Did you mean"
    ):
        Decoder("top_k")
    for setting, value, option in [
        ("top_k", 0, "^k=0 is impossible"),
        ("top_k", 2.5, r"^k=2\.5 is impossible; give a count of at least 1"),
        ("top_k", "3", "^k='3' is impossible"),
        ("num_beams", 2.0, "^num_beams=2.0 is impossible"),
        ("top_p", "0.9", "^p='0.9' is impossible"),
        ("top_p", 0.0, "^p=0.0 is"),
        ("top_p", 1.5, "^p=1.5 is"),
        ("min_p", 0.0, "^min_p=0.0 is impossible; give a number above 0 and at most 1"),
        ("num_beams", 0, "^num_beams=0 is"),
        ("repetition_penalty", 0.0, "^repetition_penalty=0.0 is impossible; give a number from 0.01 to 100"),
        ("length_penalty", -0.5, "^length_penalty=-0.5 is impossible; give a number from 0 to 10"),
        ("temperature", 0.0, "^temperature=0.0 is"),
        ("temperature", 1e38, "^temperature=1e\\+38 is impossible; give a number from 1e-06 to 1e\\+06"),
        ("temperature", 1e-38, "^temperature=1e-38 is"),
        ("temperature", float("nan"), "^temperature=nan is"),
    ]:
        with pytest.raises(UserError, match=option):
            Decoder("top-k", **{setting: value})


def test_decoder_takes_the_settings_of_the_run():
    config = SamplesConfig(top_k=3, top_p=0.25, num_beams=4, temperature=0.5)
    for name, field in (("top-k", {"top_k": 3}), ("top-p", {"top_p": 0.25}), ("min-p", {"min_p": 0.1}), ("random", {})):
        assert Decoder.from_options(name, config) == Decoder(name, num_beams=4, temperature=0.5, **field)
    assert Decoder("random").cuts() == {"k": None, "p": None, "min_p": None}
    assert Decoder("top-k", top_p=0.5).cuts() == {"k": 10, "p": None, "min_p": None}


def test_an_option_that_the_decoder_does_not_read_is_refused():
    samples = SamplesConfig()
    drawn = ["random", "top-k", "top-p", "min-p"]
    readers = {"k": ["top-k", "random"], "p": ["top-p", "random"], "min_p": ["min-p", "random"], "num_beams": ["beam"]}
    readers |= {"length_penalty": ["beam"], "repetition_penalty": list(SAMPLERS), "temperature": drawn, "seed": drawn}
    values = {"k": 3, "p": 0.25, "min_p": 0.2, "num_beams": 4, "temperature": 0.5, "seed": 0}
    values |= {"length_penalty": 0.6, "repetition_penalty": 1.2}
    for option, value in values.items():
        for name in SAMPLERS:
            if name in readers[option]:
                Decoder.from_options(name, samples, **{option: value})
                continue
            with pytest.raises(UserError, match=f"^{option}={value} has no effect with the sampler {name}, only with"):
                Decoder.from_options(name, samples, **{option: value})
    for name, option, value in (("top-k", "temperature", 0.5), ("top-k", "seed", 3), ("random", "p", 0.3)):
        with pytest.raises(UserError, match=f"^{option}={value} has no effect with k=1"):
            Decoder.from_options(name, samples, k=1, **{option: value})
    assert Decoder.from_options("top-k", samples, k=3, p=None) == Decoder("top-k", top_k=3)
    assert Decoder.from_options("random", samples, p=0.9, k=40).cuts() == {"k": 40, "p": 0.9, "min_p": None}
