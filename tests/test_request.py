"""Laws of what can be asked of a generator."""

import pytest

from trainer.config.settings import SamplesConfig
from trainer.decoding.decoder import Decoder
from trainer.decoding.request import Request
from trainer.errors import UserError

TOP_P = Decoder("top-p")


def test_impossible_requests_are_refused():
    for decoder, options, message in (
        (TOP_P, {"num_tokens": 0}, r"^num_tokens=0 leaves nothing to write; give a count of at least 1"),
        (TOP_P, {"seed": 1.5}, r"^seed=1\.5 is not a whole number"),
        (TOP_P, {"num_samples": 0}, r"^num_samples=0 must be at least 1"),
        (TOP_P, {"batch_size": 1.5}, r"^batch_size=1\.5 must be at least 1"),
        (TOP_P, {"stop_tokens": ["a"]}, r"^stop_tokens='a' is not a token; give its number"),
        (TOP_P, {"sliding_window": True}, r"^sliding_window=True lets a text go on for ever; give num_tokens"),
        (Decoder("beam"), {"sliding_window": True, "num_tokens": 9}, r"^sliding_window=True does not go with .*beam"),
        (Decoder("beam", num_beams=3), {"num_samples": 4}, r"^num_samples=4 is more than num_beams=3, .*raise num_b"),
        (Decoder("greedy"), {"num_samples": 2}, r"^num_samples=2: greedy always writes the same text; ask for 1"),
        (Decoder("top-k", top_k=1), {"num_samples": 2}, r"^num_samples=2: top-k with k=1 always writes the same"),
    ):
        with pytest.raises(UserError, match=message):
            Request(decoder, **options)
    Request(Decoder("beam", num_beams=3), num_samples=3)


def test_a_request_takes_the_settings_of_the_run_except_for_what_is_given():
    samples = SamplesConfig(num_tokens=7, stop="x", top_p=0.25)
    assert Request.from_options(samples) == Request(Decoder("top-p", top_p=0.25), 7, stop="x")
    given = Request.from_options(samples, "top-k", num_tokens=3, stop=["a", "b"], seed=4, k=2, min_p=None)
    assert given == Request(Decoder("top-k", top_k=2), 3, 4, ("a", "b"))
    assert Request.from_options(samples, stop=()).stop == ()
    with pytest.raises(UserError, match="k=2 has no effect with the sampler top-p, only with top-k and random"):
        Request.from_options(samples, k=2)
