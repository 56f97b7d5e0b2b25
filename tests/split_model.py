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

import pytest
import tensorflow as tf

import trainer
from trainer.cli import main
from trainer.decoding.text_loop import TextLoop
from trainer.errors import UserError
from trainer.model import pieces

PROMPTS = ["the c", "on"]


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


def untied(run, overrides):
    """What verbs make of the command line's texts, and what a text is alone."""
    prompts = Path(run) / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    model = trainer.load(run, overrides=overrides)
    if overrides:
        with pytest.raises(UserError, match=r"none holds all of it; load it without distribution\.shard=weights"):
            model.model.summary()
    return {
        "scores": printed("evaluate", run, "--data", prompts, *overrides, "--json"),
        "texts": printed("generate", run, "--prompts", prompts, "--sampler", "greedy", *overrides),
        "beam": facts_of(model.generate(PROMPTS[0], "beam", num_beams=2, num_samples=2)),
        "top-k": facts_of(model.generate(PROMPTS, "top-k", k=4, seed=3)),
        "stream": "".join(model.stream(PROMPTS[0], "greedy")),
    }


def tied(run, overrides):
    """The score of the validation text, and texts of several contexts."""
    model = trainer.load(run, overrides=overrides)
    return {
        "scores": printed("evaluate", run, *overrides, "--json"),
        "beam": facts_of(model.generate(PROMPTS, "beam", num_beams=2, num_samples=2)),
        "top-p": facts_of(model.generate(PROMPTS[0], "top-p", seed=3)),
        "greedy": facts_of(model.generate(PROMPTS, "greedy", num_tokens=20, stop=["hh"], sliding_window=True)),
    }


def facts_of(texts):
    return [[str(text), text.finish, text.score] for text in texts]


if __name__ == "__main__":
    pieces.BYTES_AT_ONCE = 500  # Several operations for a block, as a large model has them.
    let_replicas_differ()
    print(json.dumps({"untied": untied, "tied": tied}[sys.argv[1]](sys.argv[2], sys.argv[3:])))
