"""Scores and writes with the model of a run on the devices of OVERRIDES, and prints all figures and texts as JSON.
test_on_devices.py runs it.

    python tests/split_model.py CASE RUN OVERRIDE...

There all replicas except the first get wrong logits: they must write what the first one does, and end when it does.
A process of its own, because a CPU can only be split before TensorFlow computes anything.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

from trainer.cli import main
from trainer.config.file import make_config
from trainer.decoding.decoder import Decoder
from trainer.decoding.request import Request
from trainer.decoding.text_loop import TextLoop
from trainer.exchange.open import read_config
from trainer.training.on_devices import generator_on_devices

PROMPTS = ["the c", "on"]
GREEDY, BEAM, TOP_K, TOP_P = Decoder("greedy"), Decoder("beam", num_beams=2), Decoder("top-k", 4), Decoder("top-p")


def let_replicas_differ():
    """Gives all replicas except the first other logits, as if they rounded differently in the extreme."""
    possible = TextLoop._possible

    def turned(*arguments):
        number = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
        return tf.roll(possible(*arguments), int(number), axis=1)

    TextLoop._possible = turned


def printed(*words):
    """What the command prints, as JSON."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(word) for word in words]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def written(run, overrides, write):
    """What `write` makes of the run's generator."""
    config = make_config(read_config(run).model_dump(mode="json"), overrides)
    with generator_on_devices(run, config, say=str) as generator:

        def texts(prompts, *options, **more):
            return [
                [str(text), text.finish, text.score] for text in generator.texts(prompts, Request(*options, **more))
            ]

        return write(generator, texts)


def untied(run, overrides):
    """What verbs make of the command line's texts, and what a text is alone."""
    prompts = Path(run) / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")

    def write(generator, texts):
        return [
            texts(PROMPTS[:1], BEAM, num_samples=2),
            texts(PROMPTS, TOP_K, seed=3),
            "".join(generator.stream(PROMPTS[0], Request(GREEDY))),
        ]

    return {
        "scores": printed("evaluate", run, "--data", prompts, *overrides, "--json"),
        "texts": printed("generate", run, "--prompts", prompts, "--sampler", "greedy", *overrides),
        "written": written(run, overrides, write),
    }


def tied(run, overrides):
    """The score of the validation text, and texts of several contexts."""

    def write(_, texts):
        return [
            texts(PROMPTS, BEAM, num_samples=2),
            texts(PROMPTS[:1], TOP_P, seed=3),
            texts(PROMPTS, GREEDY, 20, stop=["hh"], sliding_window=True),
        ]

    scores = printed("evaluate", run, *overrides, "--json")
    return {"scores": scores, "texts": [], "written": written(run, overrides, write)}


if __name__ == "__main__":
    let_replicas_differ()
    print(json.dumps({"untied": untied, "tied": tied}[sys.argv[1]](sys.argv[2], sys.argv[3:])))
