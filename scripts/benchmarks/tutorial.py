#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Trains the tutorial's model with the tutorial's own Keras code and with trainer, and compares speed and quality.

    scripts/benchmarks/tutorial.py [--quick] [--train FILE --validation FILE]

Text, vocabulary and sizes are the same. Speed: Keras fit without XLA, Keras fit with XLA, and trainer take blocks of
steps in turn; the ratio is trainer's speed divided by the faster Keras fit's, round by round. Quality: trainer's
evaluation scores both models after the same number of steps. The default texts are the books in the folder that
TRAINER_TEST_DATA names.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_nlp
import tensorflow as tf

from harness import Training, stream_of, tokens_per_step, tutorial_model
from trainer.config.file import load_config
from trainer.config.settings import Config
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData
from trainer.runs.results import Evaluation
from trainer.tokenizers.wordpiece import WordPieceTokenizer
from trainer.training.evaluation import Evaluator

MINIGPT = Path(__file__).resolve().parents[2] / "configs" / "minigpt.toml"
WARMUP_STEPS = 3


# Returns the batches of some steps: the first step and their number.
Batches = Callable[[int, int], tf.data.Dataset]


class Tutorial:
    """The tutorial's pipeline, model and fit, with our vocabulary.

    Args:
        config: the sizes, the text and the seed; its optimizer does not count.
        prepared: the data: the vocabulary for a text in lines mode, and the tokens of a packed one.
        jit_compile: as `compile` of Keras takes it.

    Attributes:
        loss: the loss that the last call of `take` printed.
    """

    def __init__(self, config: Config, prepared: PreparedData, jit_compile: bool) -> None:
        self.name = f"Keras fit, jit_compile={jit_compile}"
        keras.utils.set_random_seed(config.train.seed)
        self._batches = (line_batches if config.data.mode == "lines" else window_batches)(config, prepared)
        self.num_taken, self.loss = 0, float("nan")
        self.model = tutorial_model(config, prepared.vocabulary_size)
        perplexity = keras_nlp.metrics.Perplexity(from_logits=True, mask_token_id=0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile("adam", loss, metrics=[perplexity], jit_compile=jit_compile)

    def take(self, steps: int) -> float:
        """Trains some steps; returns the seconds of one, without the first: fit begins by filling its buffer."""
        ends: list[float] = []
        clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
        batches = self._batches(self.num_taken, steps)
        history = self.model.fit(batches, verbose=0, shuffle=False, callbacks=[clock])
        self.num_taken += steps
        self.loss = history.history["loss"][0]
        assert len(ends) == steps
        return (ends[-1] - ends[0]) / (steps - 1)


def line_batches(config: Config, prepared: PreparedData) -> Batches:
    """Returns the tutorial's own pipeline over the lines of its text, epoch after epoch."""
    length, batch_size = config.train.sequence_length, config.train.global_batch_size
    ours = prepared.tokenizer()
    assert isinstance(ours, WordPieceTokenizer)
    tokenizer = keras_nlp.tokenizers.WordPieceTokenizer(ours.vocabulary, sequence_length=length, lowercase=True)
    start_packer = keras_nlp.layers.StartEndPacker(length, start_value=tokenizer.token_to_id("[BOS]"))

    def preprocess(inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        outputs = tokenizer(inputs)
        return start_packer(outputs), outputs

    (source,) = config.data.train
    lines = tf.data.TextLineDataset(source, compression_type="GZIP" if source.endswith(".gz") else None)
    long = lines.filter(lambda line: tf.strings.length(line) > config.data.min_bytes)
    # The order is fixed, so that each call of fit can go on with the batch after the last one of the call before.
    batches = long.batch(batch_size, drop_remainder=True).shuffle(
        256, seed=config.train.seed, reshuffle_each_iteration=False
    )

    def batches_of(first: int, steps: int) -> tf.data.Dataset:
        taken = batches.repeat().skip(first).take(steps)
        return taken.map(preprocess, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    return batches_of


def window_batches(config: Config, prepared: PreparedData) -> Batches:
    """Returns windows at random places of a text, for which the tutorial has no pipeline."""
    length, batch_size = config.train.sequence_length, config.train.global_batch_size
    tokens = tf.constant(stream_of(prepared))

    def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seed = tf.stack([tf.constant(config.train.seed, tf.int64), step])
        starts = tf.random.stateless_uniform([batch_size, 1], seed, maxval=len(tokens) - length, dtype=tf.int32)
        windows = tf.gather(tokens, starts + tf.range(length + 1))
        return windows[:, :-1], windows[:, 1:]

    return lambda first, steps: tf.data.Dataset.range(first, first + steps).map(batch).prefetch(tf.data.AUTOTUNE)


def compare_speed(rivals: list[Tutorial], ours: Training, tokens: float, rounds: int, steps: int) -> Tutorial:
    """Trains blocks of steps in turn, prints their tokens/s and the ratio; returns the faster rival."""
    trainees: list[Tutorial | Training] = [*rivals, ours]
    rates: dict[str, list[float]] = {trainee.name: [] for trainee in trainees}
    for trainee in trainees:
        trainee.take(WARMUP_STEPS)
    for _ in range(rounds):
        for trainee in trainees:
            rates[trainee.name].append(tokens / trainee.take(steps))
    for name, values in rates.items():
        each = ", ".join(f"{value:,.0f}" for value in values)
        print(f"{name:32} {statistics.median(values):8,.0f} non-pad tokens/s, median of {each}")
    best = max(rivals, key=lambda rival: statistics.median(rates[rival.name]))
    ratios = [mine / theirs for mine, theirs in zip(rates[ours.name], rates[best.name], strict=True)]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"speed: {statistics.median(ratios):.2f} times {best.name}, median of {each}")
    return best


def main() -> None:
    """Trains with both and prints the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="blocks of 10 steps and 60 steps in all")
    parser.add_argument("--train", help="a text to train on, one document a line, plain or .gz")
    parser.add_argument("--validation", help="a text to score on")
    options = parser.parse_args()
    books = Path(os.environ.get("TRAINER_TEST_DATA", "")) / "books"
    train = options.train or books / "simple_train.txt.gz"
    validation = options.validation or books / "simple_valid.txt"
    if not Path(train).is_file():
        sys.exit(f"{train} does not exist: give --train and --validation, or set TRAINER_TEST_DATA.")
    steps_per_block, total_steps = (10, 60) if options.quick else (50, 300)
    rounds = 3

    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"data.train={train}", f"data.validation={validation}", f"data.prepared_folder={folder}"]
        config = load_config(MINIGPT, overrides)
        prepared = prepare(config)
        rivals = [Tutorial(config, prepared, jit_compile) for jit_compile in (False, True)]
        ours = Training(config, prepared, total_steps)
        tokens = tokens_per_step(config, prepared)
        best = compare_speed(rivals, ours, tokens, rounds, steps_per_block)

        rest = total_steps - WARMUP_STEPS - rounds * steps_per_block
        scores: list[Evaluation] = []
        for trainee in (best, ours):
            trainee.take(rest)
            scores.append(Evaluator(trainee.model, ours.strategy, prepared, config)())
            print(f"{trainee.name:32} after {total_steps} steps: {scores[-1]}")
        print(f"perplexity: {scores[1].perplexity / scores[0].perplexity:.3f} times {best.name}")


if __name__ == "__main__":
    main()
