"""The training run, top to bottom."""

import contextlib
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.config import Config, SamplesConfig, UserError, rows_per_replica
from trainer.data.batches import num_examples, training_batches
from trainer.data.batches import total_steps as count_steps
from trainer.data.coverage import TextBytes
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData
from trainer.decoding.decoder import DECODERS, Decoder
from trainer.decoding.generate import Generator
from trainer.evaluate import Evaluation, Evaluator
from trainer.model.gpt import GPT
from trainer.plan import tokens_per_sec_at_peak
from trainer.run import BuildModel, RunFolder, find_run, make_model
from trainer.terminal import Say
from trainer.terminal import say as print_line
from trainer.training.checkpoint import Checkpoint, Checkpoints, assign
from trainer.training.distribution import (
    count_replicas_of,
    describe_devices,
    device_kind,
    device_names,
    distributed,
    find_devices,
    make_strategy,
    share_cores,
)
from trainer.training.health import check_is_learning, only_run_in, report_skipped, stop_on_signals
from trainer.training.hosts import Hosts, find_hosts, meet
from trainer.training.memory import fit_micro_batch
from trainer.training.monitor import Meter, Monitor, Silence
from trainer.training.schedule import learning_rate
from trainer.training.step import TrainingStep


class TrainingResult(NamedTuple):
    """What came of a run.

    run_folder: where it is. tells_stories: whether its text is the storybook's. model: with its weights after step
    steps. evaluation and samples: of these; None and empty where a signal stopped the run before its end.
    """

    run_folder: str
    tells_stories: bool
    model: keras.Model
    step: int
    was_interrupted: bool
    evaluation: Evaluation | None
    samples: dict[str, str]


def start(
    config: Config, build_model: BuildModel | None = None, say: Say = print, or_resume: bool = False
) -> TrainingResult:
    """Prepares what is missing, makes the run's folder and trains; with or_resume goes on with a run that is there.

    Raises:
        UserError: a setting, the text or the folder is not right, or workers do not agree.
    """
    say = print_line if say is print else say
    hosts = find_hosts(config.distribution)
    # All hosts find the same: the first one makes the folder after all have met.
    run = find_run(config, or_resume)

    def find_data(prepare: Callable[[Config, Say], PreparedData], say: Say) -> PreparedData:
        return prepare(config, say) if run is None else run.prepared(lambda: prepare(config, say))

    if not hosts.are_several:
        strategy = open_devices(config, hosts, say)
        rows_per_replica(config, strategy.num_replicas_in_sync)
        prepared = find_data(prepare, say)
        run = run or RunFolder.create(config, prepared)
        with _whole_run(run, hosts):
            return train(run, hosts, strategy, prepared, build_model, say)

    def prepared_fingerprints() -> dict[str, str]:
        prepared = find_data(prepare_in_a_process_of_its_own, say)
        return fingerprints(config) | {"the prepared data": prepared.fingerprint}

    rows_per_replica(config, count_replicas_of(hosts))
    say = say if hosts.is_chief else _be_silent
    meet(hosts.workers, hosts.number, prepared_fingerprints)
    prepared = find_data(prepare_in_a_process_of_its_own, _be_silent)
    if hosts.is_chief and run is None:
        RunFolder.create(config, prepared)
    return _join(lambda: RunFolder.of(config), hosts, prepared, build_model, say)


def resume(
    run_folder: str, build_model: BuildModel | None = None, say: Say = print, overrides: Sequence[str] = ()
) -> TrainingResult:
    """Goes on with a run from its newest checkpoint, with the config it was started with.

    Raises:
        UserError: there is no such run, or its data is gone, or workers do not agree.
    """
    say = print_line if say is print else say
    run = RunFolder(run_folder, overrides)
    hosts = find_hosts(run.config.distribution)
    if hosts.are_several:
        say = say if hosts.is_chief else _be_silent
        return _join(lambda: RunFolder(run_folder, overrides), hosts, run.prepared(), build_model, say)
    strategy = open_devices(run.config, hosts, say)
    with _whole_run(run, hosts):
        return train(run, hosts, strategy, run.prepared(), build_model, say)


def _join(
    open_run: Callable[[], RunFolder], hosts: Hosts, prepared: PreparedData, build_model: BuildModel | None, say: Say
) -> TrainingResult:
    """Trains with other workers, once all see the same run and the same newest checkpoint."""

    def what_is_there() -> dict[str, str]:
        run = open_run()
        newest = run.checkpoints(say).latest()
        return fingerprints(run.config) | {
            f"the data of {run.path}": run.facts["data_fingerprint"],
            f"the newest checkpoint in {run.path}": "none" if newest is None else newest.manifest["sha256"],
        }

    meet(hosts.workers, hosts.number, what_is_there)
    run = open_run()
    with _whole_run(run, hosts):
        return train(run, hosts, open_devices(run.config, hosts, say), prepared, build_model, say)


def open_devices(config: Config, hosts: Hosts, say: Say) -> tf.distribute.Strategy:
    """Returns the strategy of a run, and says on what it computes. Call it before TensorFlow computes anything."""
    share_cores(config, hosts)
    strategy = make_strategy(config.distribution)
    for line in describe_devices(strategy, config.distribution, hosts):
        say(line)
    return strategy


def fingerprints(config: Config) -> dict[str, str]:
    """Returns what all workers of a run must have in common before any text is read."""
    return {"the config": config.to_toml(), "TensorFlow": tf.__version__, "Keras": keras.__version__}


def prepare_in_a_process_of_its_own(config: Config, say: Say) -> PreparedData:
    """Prepares, and leaves this process as it was: hosts can only be joined before TensorFlow computes anything."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
        if say in (print_line, _be_silent):
            return executor.submit(prepare, config, say).result()
        prepared, lines = executor.submit(_prepare_and_listen, config).result()
    for line in lines:  # Only now: nobody else's function can be called from another process.
        say(line)
    return prepared


def _prepare_and_listen(config: Config) -> tuple[PreparedData, list[str]]:
    lines: list[str] = []
    return prepare(config, lines.append), lines


def _be_silent(_: str) -> None:
    pass


@contextlib.contextmanager
def _whole_run(run: RunFolder, hosts: Hosts) -> Iterator[None]:
    """Holds the run's folder for its first host, and says what a lost worker means for the others."""
    with only_run_in(run.path) if hosts.is_chief else contextlib.nullcontext():
        try:
            yield
        except tf.errors.OpError as error:
            if not hosts.are_several:
                raise
            raise UserError(
                f"Worker {hosts.number} ({hosts.workers[hosts.number]}) cannot go on, most likely because another one "
                f"went away: {error.message[:300]}. See what the others said, then start all of them again with: "
                f"trainer train --resume {run.path}"
            ) from error


def train(
    run: RunFolder,
    hosts: Hosts,
    strategy: tf.distribute.Strategy,
    prepared: PreparedData,
    build_model: BuildModel | None,
    say: Say,
) -> TrainingResult:
    """Trains a run from its newest checkpoint, or from the start, to its end or to a signal.

    Every host takes every step and scores its part of the validation text; the first alone writes.
    """
    config = run.config
    total_steps = count_steps(prepared, config)
    spent = Stopwatch()

    with spent.on("start"):
        # The model, and all that changes with a step.
        with strategy.scope():
            model = make_model(build_model, config, prepared.vocabulary_size, prepared.bos_id)
        step_function = TrainingStep(config, total_steps, model, strategy)
        if config.train.micro_batch_size == "auto":
            config = settle_micro_batch(run, hosts, step_function, say)
        checkpoints = run.checkpoints(say)
        step = restore(step_function, checkpoints.latest())
        if step == total_steps and (result := run.result(step)) is not None:
            say(f"{run.path}: all {total_steps} steps are taken, and this is what came of them.")
            return TrainingResult(str(run.path), config.data.is_storybook(), model, step, False, *result)
        say(describe(run, prepared, model, step, total_steps))

        # What looks at it.
        evaluator = Evaluator(model, strategy, prepared, config)
        tokenizer = run.tokenizer()
        generator = Generator(model, tokenizer, config.train.sequence_length)
        # What does not fit is better known now than in an hour.
        for remark in generator.remarks(
            [config.samples.prompt], config.samples.num_tokens, config.samples.stop, "samples."
        ):
            say(f"warning: {remark}")
        at_peak = find_peak(config, model, prepared.vocabulary_size, strategy, say)
        monitor = make_monitor(run, prepared, step, at_peak, say) if hosts.is_chief else Silence()
        batches = iter(
            # Endless, though nobody reads that far: else hosts would ask each other before every step whether there is
            # another batch.
            distributed(strategy, lambda share: training_batches(prepared, config, step, total_steps, share).repeat())
        )
        run_steps = step_function.run_steps.get_concrete_function(batches, tf.constant(0, tf.int64))

    def is_asked_to_stop() -> bool:
        # Several hosts have to agree on the last step, and do so within it.
        return not hosts.are_several and bool(step_function.stop_requested.numpy())

    ends = (total_steps, *config.profile.ends())
    cadences = (
        config.log.every_steps,
        config.checkpoint.every_steps,
        config.evaluation.every_steps,
        config.samples.every_steps,
    )
    meter = Meter()
    with monitor.running():
        with stop_on_signals(lambda: step_function.stop_requested.assign(True), monitor.say):
            is_stopped = False
            while step < total_steps and not (is_stopped or is_asked_to_stop()):
                # A tensor, not an int: a new Python int would trace the whole loop again.
                num_steps = min(config.train.steps_per_call, steps_until_due(step, ends, cadences))
                with monitor.profiled(step), spent.on("train") as lap:
                    metrics = run_steps(batches, tf.constant(num_steps, tf.int64))
                    num_taken = int(metrics.num_steps)
                step += num_taken
                is_stopped = bool(metrics.stop_votes)
                meter.add(metrics, lap())
                monitor.advance(step)
                skipped_in_a_row = int(step_function.skipped_in_a_row.numpy())
                check_is_learning(step, total_steps, skipped_in_a_row, int(step_function.optimizer.num_updates.numpy()))

                if is_due(step, config.log.every_steps) or step == total_steps:
                    interval = meter.report(float(learning_rate(config.optimizer, step - 1, total_steps)))
                    monitor.interval(step, interval)
                    scale = None if step_function.loss_scale is None else float(step_function.loss_scale.value.numpy())
                    report_skipped(step, interval.num_steps, interval.num_skipped, scale, monitor.say)
                if (is_due(step, config.checkpoint.every_steps) or step == total_steps) and hosts.is_chief:
                    with spent.on("checkpoint"), monitor.doing(step, "saving"):
                        save(checkpoints, step_function, run)
                if is_due(step, config.evaluation.every_steps) and step < total_steps:
                    with spent.on("evaluate"), monitor.doing(step, "evaluating"):
                        score = evaluator.unless_stopped(is_asked_to_stop, config.evaluation.num_batches)
                    if score is not None:
                        monitor.evaluation(step, score)
                if is_due(step, config.samples.every_steps) and step < total_steps and hosts.is_chief:
                    with spent.on("sample"), monitor.doing(step, "writing samples"):
                        monitor.samples(step, write_samples(generator, config.samples, is_asked_to_stop))

            is_stopped = is_stopped or is_asked_to_stop()
            with spent.on("checkpoint"):
                if is_stopped and hosts.is_chief:
                    with monitor.doing(step, "saving"):
                        save(checkpoints, step_function, run)
                checkpoints.wait()
        if is_stopped:
            say(f"Stopped at step {step} of {total_steps}, saved. Go on with: trainer train --resume {run.path}")
            return TrainingResult(str(run.path), config.data.is_storybook(), model, step, True, None, {})

        # All is saved: from here on a signal just ends the process.
        with spent.on("evaluate"), monitor.doing(step, "evaluating"):
            evaluation = evaluator()
        monitor.evaluation(step, evaluation)
        with spent.on("sample"), monitor.doing(step, "writing samples"):
            samples = write_samples(generator, config.samples) if hosts.is_chief else {}
        monitor.samples(step, samples)
        if hosts.is_chief:
            run.keep_result(step, evaluation, samples, say)
    say(f"Time: {spent}")
    return TrainingResult(str(run.path), config.data.is_storybook(), model, step, False, evaluation, samples)


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something with this cadence happens after this step; never where the cadence is None."""
    return every_steps is not None and step > 0 and step % every_steps == 0


def steps_until_due(step: int, ends: Sequence[int], cadences: Sequence[int | None]) -> int:
    """Returns how many steps may run before the host has something to do: at one of ends, or by a cadence."""
    left = [end - step for end in ends if end > step]
    return min(left + [every - step % every for every in cadences if every is not None])


def settle_micro_batch(run: RunFolder, hosts: Hosts, step_function: TrainingStep, say: Say) -> Config:
    """Finds the micro-batch that the devices have memory for; returns the run's config with it, and keeps it there."""
    fit_micro_batch(step_function, say)
    size = step_function.micro_batch_size
    say(f"train.micro_batch_size='auto' comes to {size} of a replica's {step_function.rows_per_replica} examples.")
    run.config = run.config.with_micro_batch_size(size)
    if hosts.is_chief:
        run.keep_micro_batch_size(size)
    return run.config


def restore(step_function: TrainingStep, checkpoint: Checkpoint | None) -> int:
    """Gives model, optimizer and step the values of a checkpoint; returns the step."""
    if checkpoint is None:
        return 0
    assign(step_function.named_variables, checkpoint.arrays("weights"), checkpoint.folder)
    # Runs of older releases did not count them.
    state = {"skipped_in_a_row": np.zeros([], np.int64), **checkpoint.arrays("optimizer")}
    assign(step_function.state(), state, checkpoint.folder)
    step_function.step.assign(checkpoint.step)
    return checkpoint.step


def save(checkpoints: Checkpoints, step_function: TrainingStep, run: RunFolder) -> None:
    """Saves everything that a step changes."""
    groups = {
        "weights": _snapshot(step_function.named_variables),
        "optimizer": _snapshot(step_function.state()),
    }
    facts = {key: run.facts[key] for key in ("data_fingerprint", "tokenizer_fingerprint")}
    checkpoints.save(int(step_function.step.numpy()), groups, facts | {"config": run.config.model_dump(mode="json")})


def write_samples(
    generator: Generator, config: SamplesConfig, is_stopped: Callable[[], bool] = lambda: False
) -> dict[str, str]:
    """Returns what each decoder writes after the prompt; the same every time but for what the model has learned.

    Args:
        generator: of the model.
        config: prompt, length and decoders' settings.
        is_stopped: asked before each decoder; the rest is left out once it says so.
    """
    num_tokens = config.num_tokens or generator.sequence_length
    samples = {}
    for name in DECODERS:
        if is_stopped():
            break
        decoder = Decoder.from_config(name, config)
        (samples[name],) = generator.generate([config.prompt], decoder, num_tokens, stop=config.stop)
    return samples


def find_peak(
    config: Config, model: keras.Model, vocabulary_size: int, strategy: tf.distribute.Strategy, say: Say
) -> float | None:
    """Returns the tokens per second that would be a model FLOPs utilisation of 1, where that is known; says of which
    accelerator it is not.
    """
    kind = device_kind(strategy)
    if kind == "CPU" or not isinstance(model, GPT):
        return None
    names = device_names(strategy)
    devices = find_devices(kind, names, strategy.num_replicas_in_sync)
    at_peak = None if devices is None else tokens_per_sec_at_peak(config, vocabulary_size, devices)
    if at_peak is None:
        name = " and ".join(sorted(names)) or f"this {kind}"
        say(f"The peak of {name} in train.precision={config.train.precision!r} is not known: no utilisation is shown.")
    return at_peak


def make_monitor(
    run: RunFolder,
    prepared: PreparedData,
    first_step: int,
    at_peak: float | None,
    say: Say,
) -> Monitor:
    """Returns the monitor of a run."""
    config, split = run.config, prepared.split("train")
    text_bytes, parts = TextBytes(prepared), prepared.parts("train")
    is_cut = config.data.mode == "lines" and split.max_tokens > config.train.sequence_length
    has_epochs = config.data.weights is None  # The sources of a mixture end at different times.
    return Monitor(
        run.path / "logs",
        config,
        first_step,
        count_steps(prepared, config),
        1 / (text_bytes.of_target(config) * math.log(2)),
        is_cut or any(map(text_bytes.is_lossy, parts)),
        say=None if say is print_line else say,
        steps_per_epoch=num_examples(split, config) / config.train.global_batch_size if has_epochs else None,
        tokens_per_sec_at_peak=at_peak,
    )


def describe(run: RunFolder, prepared: PreparedData, model: keras.Model, step: int, total_steps: int) -> str:
    """Returns one line about a run that starts."""
    train = run.config.train
    tokens = train.global_batch_size * train.sequence_length
    text = prepared.split("train")
    return (
        f"{run.path}: {model.count_params():,} parameters, {train.precision}; {text.num_tokens:,} tokens of text; "
        f"steps {step} to {total_steps} of {train.global_batch_size} x {train.sequence_length} = {tokens:,} tokens."
    )


class Stopwatch:
    """Where the time of a run goes."""

    def __init__(self) -> None:
        self._secs: Counter[str] = Counter()

    @contextmanager
    def on(self, what: str) -> Iterator[Callable[[], float]]:
        """Counts the time of a block as spent on something; gives a function that returns that time so far."""
        start = time.perf_counter()
        try:
            yield lambda: time.perf_counter() - start
        finally:
            self._secs[what] += time.perf_counter() - start  # type: ignore[assignment]

    def __str__(self) -> str:
        return ", ".join(f"{what} {secs:.1f} s" for what, secs in self._secs.items())


def _snapshot(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    # A copy: on a CPU numpy() can be the memory that the next step writes to.
    return {name: np.array(variable.numpy()) for name, variable in variables.items()}
