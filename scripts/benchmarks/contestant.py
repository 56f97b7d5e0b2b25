#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Trains a model some steps at a time, for scripts/benchmarks/step.py and scripts/benchmarks/time_to_loss.py.

    scripts/benchmarks/contestant.py JOB.json

Each line of standard input is a number of steps to take; the answer, a line of JSON, has the seconds of one of them.
After the number may stand `alone`: then the compiled step runs without loop and input. The line `evaluate` scores the
validation text. JOB.json has the keys program (trainer, fit, gpt2 or tutorial), config, prepared, rows,
vocabulary_size, is_compiled and total_steps; the benchmark writes those that the program needs.
"""

import argparse
import functools
import json
import os
import re
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
from trainer.data.shards import PreparedData, load_prepared
from trainer.distributed.strategy import make_strategy
from trainer.training.evaluation import Evaluator
from tutorial import Tutorial

Figures = dict[str, Any]
# Takes a number of steps; returns the seconds of one step, and the mean loss in nats.
Take = Callable[[int], tuple[float, float]]
# What the lines of standard input can ask for, by its word.
Asked = dict[str, Callable[[int], Figures]]


def answer(job: Figures) -> None:
    """Reads lines of standard input, does what each asks for, and answers each with a line of JSON."""
    config = make_config(job["config"])
    keras.utils.set_random_seed(config.train.seed)
    keras.config.set_dtype_policy(config.train.precision)
    if job["program"] == "fit":
        model, take = fitting(config, job["rows"], job["vocabulary_size"], job["is_compiled"])
        asked = {"steps": lambda num_steps: figures_of(*take(num_steps))}
    elif job["program"] == "tutorial":
        model, asked = as_in_the_tutorial(config, load_prepared(job["prepared"], check_hashes=False), job)
    else:
        model, asked = in_our_loop(config, load_prepared(job["prepared"], check_hashes=False), job)
    print(json.dumps({"num_parameters": model.count_params(), "version": f"Keras {keras.__version__}"}), flush=True)
    answered = time.process_time()
    for line in sys.stdin:
        idle_cpu_secs = time.process_time() - answered
        found = re.fullmatch(r"(\d*) ?([a-z]*)", line.strip())
        assert found is not None, line
        figures = asked[found[2] or "steps"](int(found[1] or 0))
        print(json.dumps({**figures, "idle_cpu_secs": idle_cpu_secs}), flush=True)
        answered = time.process_time()


def figures_of(step_secs: float, loss: float) -> Figures:
    """Returns what `Take` returns under the names of the answer."""
    return {"step_secs": step_secs, "loss": loss}


def in_our_loop(config: Config, prepared: PreparedData, job: Figures) -> tuple[keras.Model, Asked]:
    """Returns the config's model, or KerasNLP's GPT-2, and what can be asked of its training with trainer's step."""
    build_model = gpt2_model if job["program"] == "gpt2" else None
    # If the learning rate is constant, the training needs no end.
    training = Training(config, prepared, job.get("total_steps", sys.maxsize), build_model)
    # It takes a batch of the training, so it is made only if it is asked for.
    take_alone = functools.cache(lambda: alone(training))

    def take(num_steps: int) -> Figures:
        secs = training.take(num_steps)
        return {**figures_of(secs, training.loss), "num_targets": training.num_targets}

    return training.model, {
        "steps": take,
        "alone": lambda num_steps: figures_of(*take_alone()(num_steps)),
        "evaluate": evaluating(
            lambda: Evaluator(training.model, training.strategy, prepared, config, training.step.average)
        ),
    }


def as_in_the_tutorial(config: Config, prepared: PreparedData, job: Figures) -> tuple[keras.Model, Asked]:
    """Returns the tutorial's model, and what can be asked of its training with the tutorial's own code."""
    strategy = make_strategy(config.distribution)
    tutorial = Tutorial(config, prepared, job["is_compiled"])
    return tutorial.model, {
        "steps": lambda num_steps: figures_of(tutorial.take(num_steps), tutorial.loss),
        "evaluate": evaluating(lambda: Evaluator(tutorial.model, strategy, prepared, config)),
    }


def evaluating(make_evaluator: Callable[[], Evaluator]) -> Callable[[int], Figures]:
    """Returns a function that scores all of the validation text."""
    evaluator = functools.cache(make_evaluator)

    def evaluate(_: int) -> Figures:
        score = evaluator()()
        return {"loss": score.loss, "num_tokens": score.num_tokens}

    return evaluate


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
