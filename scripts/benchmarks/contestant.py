#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Trains a model some steps at a time, for scripts/benchmarks/step.py.

    scripts/benchmarks/contestant.py JOB.json

Each line of standard input is a number of steps to take; the answer, a line of JSON, has the seconds of one of them.
After the number may stand `alone`: then the compiled step runs without loop and input. JOB.json has the keys program
(trainer, fit or gpt2), config, prepared, rows, vocabulary_size and is_compiled; step.py writes it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import keras_nlp
import numpy as np
import tensorflow as tf

from harness import Training, tutorial_model
from trainer.config.file import make_config
from trainer.config.settings import Config
from trainer.data.shards import load_prepared

Figures = dict[str, Any]
# Takes a number of steps; returns the seconds of one step, and the mean loss in nats.
Take = Callable[[int], tuple[float, float]]


def answer(job: Figures) -> None:
    """Reads numbers of steps from standard input, takes them, and answers each with a line of JSON."""
    config = make_config(job["config"])
    keras.utils.set_random_seed(config.train.seed)
    keras.config.set_dtype_policy(config.train.precision)
    takes: dict[str, Take] = {}
    if job["program"] == "fit":
        model, takes["steps"] = fitting(config, job["rows"], job["vocabulary_size"], job["is_compiled"])
    else:
        prepared = load_prepared(job["prepared"], check_hashes=False)
        build_model = gpt2_model if job["program"] == "gpt2" else None
        # The learning rate is constant, so the training needs no end.
        training = Training(config, prepared, sys.maxsize, build_model)
        model, takes["alone"] = training.model, alone(training)
        takes["steps"] = lambda num_steps: (training.take(num_steps), training.loss)
    print(json.dumps({"num_parameters": model.count_params(), "version": f"Keras {keras.__version__}"}), flush=True)
    answered = time.process_time()
    for line in sys.stdin:
        idle_cpu_secs = time.process_time() - answered
        num_steps, _, which = line.strip().partition(" ")
        secs, loss = takes[which or "steps"](int(num_steps))
        print(json.dumps({"step_secs": secs, "loss": loss, "idle_cpu_secs": idle_cpu_secs}), flush=True)
        answered = time.process_time()


def alone(training: Training) -> Take:
    """Returns the compiled step without loop and pipeline, on one batch. It restores the training's variables after its
    steps, because the losses of all programs are compared too.
    """
    batch, step = next(training.batches), training.step
    stop = tf.constant(False)
    take_step = tf.function(lambda: training.strategy.run(step.take_step_on_replica, (batch, stop)), autograph=False)

    variables = [*step.named_variables.values(), *step.state().values(), step.step]
    variables += [] if step.average is None else step.average.state().values()

    def take(num_steps: int) -> tuple[float, float]:
        # Copies: on a CPU numpy() may return the memory that the next step writes to.
        before = [np.array(variable.numpy()) for variable in variables]
        start = time.perf_counter()
        for _ in range(num_steps):
            _, _, loss_sum, num_targets, *_ = take_step()
        secs = (time.perf_counter() - start) / num_steps
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        return secs, float(loss_sum / num_targets)

    return take


def fitting(config: Config, rows_file: str, vocabulary_size: int, is_compiled: bool) -> tuple[keras.Model, Take]:
    """Returns the tutorial's model and its training with fit, without the tutorial's metric, which takes time."""
    train, optimizer = config.train, config.optimizer
    model = tutorial_model(config, vocabulary_size)
    adamw = keras.optimizers.AdamW(
        optimizer.learning_rate,
        optimizer.weight_decay,
        optimizer.beta_1,
        optimizer.beta_2,
        optimizer.epsilon,
        global_clipnorm=optimizer.clip_norm,
    )
    adamw.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(adamw, loss, jit_compile=is_compiled)
    rows = np.fromfile(rows_file, np.int32).reshape(-1, train.sequence_length + 1)
    data = tf.data.Dataset.from_tensor_slices((rows[:, :-1], rows[:, 1:])).repeat().shuffle(1024, seed=train.seed)
    data = data.batch(train.global_batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)

    def take(num_steps: int) -> tuple[float, float]:
        ends: list[float] = []
        clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
        # One step more, which is not timed: fit begins by filling its shuffle buffer.
        history = model.fit(data, verbose=0, shuffle=False, steps_per_epoch=num_steps + 1, callbacks=[clock])
        return (ends[-1] - ends[0]) / num_steps, history.history["loss"][0]

    return model, take


def gpt2_model(config: Config, vocabulary_size: int) -> keras.Model:
    """Builds KerasNLP's GPT-2 with logits, in the dtype policy that is set."""
    shape = config.model
    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size,
        shape.num_layers,
        shape.num_heads,
        shape.hidden_dim,
        shape.intermediate_dim,
        dropout=0.0,
        max_sequence_length=config.train.sequence_length,
    )
    tokens = keras.Input((None,), dtype="int32")
    hidden = backbone({"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)})
    return keras.Model(tokens, backbone.token_embedding(hidden, reverse=True))


def main() -> None:
    """Trains as the job describes, until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", metavar="JOB.json", type=Path, help="the file that describes the training")
    answer(json.loads(parser.parse_args().job.read_text()))


if __name__ == "__main__":
    main()
