"""The training run, top to bottom."""

import contextlib
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.config import Config, SamplesConfig, examples_per_replica
from trainer.data.batches import num_examples, training_batches
from trainer.data.batches import total_steps as count_steps
from trainer.data.coverage import TextBytes
from trainer.data.prepare import prepare, text_fingerprint
from trainer.data.shards import PreparedData
from trainer.decoding.decoder import DECODERS, Decoder
from trainer.decoding.generate import Generator, NotFinite
from trainer.distributed.rendezvous import Meeting
from trainer.distributed.strategy import (
    count_replicas_of,
    describe_devices,
    device_kind,
    device_names,
    devices_of_this_worker,
    distributed,
    find_devices,
    make_strategy,
    share_cores,
)
from trainer.distributed.workers import Workers, describe_loss, find_workers
from trainer.errors import UserError, quoted
from trainer.model.build import BuildModel, make_model
from trainer.model.gpt import GPT
from trainer.model.size import tokens_per_sec_at_peak
from trainer.system.process import call_in_new_process
from trainer.system.signals import stop_on_signals
from trainer.system.storage import Location, locate
from trainer.system.terminal import Say
from trainer.system.terminal import say as print_line
from trainer.training.evaluation import Evaluation, Evaluator
from trainer.training.first_batch import check_first_batch, hash_of_first_batch
from trainer.training.health import check_is_learning, report_skipped
from trainer.training.micro_batch import fit_micro_batch
from trainer.training.monitor import Meter, Monitor, Silence
from trainer.training.results import keep_score, read_result, write_result
from trainer.training.run_checkpoints import find_checkpoint, open_checkpoints, restore, save
from trainer.training.run_data import find_prepared, keep_place_of, load_tokenizer_of
from trainer.training.run_folder import RunFolder, Step, find_run, run_and_step
from trainer.training.run_lock import only_run_in
from trainer.training.schedule import learning_rate
from trainer.training.step import TrainingStep
from trainer.version import __version__


class TrainingResult(NamedTuple):
    """What came of a run.

    run_folder: where it is. tells_stories: whether its text is the storybook's. model: with its weights after step
    steps. evaluation and samples: of these; None and empty where a signal stopped the run before its end. best_step:
    whose checkpoint has the lowest validation loss of those that are kept; None if none was scored.
    """

    run_folder: str
    tells_stories: bool
    model: keras.Model
    step: int
    is_stopped: bool
    evaluation: Evaluation | None
    samples: dict[str, str]
    best_step: int | None = None


def start(
    config: Config, build_model: BuildModel | None = None, say: Say = print, or_resume: bool = False
) -> TrainingResult:
    """Prepares what is missing, makes the run's folder and trains; with or_resume goes on with a run that is there.

    Raises:
        UserError: a setting, the text or the folder is not right, or workers do not agree.
    """
    say = print_line if say is print else say
    workers = find_workers(config.distribution)
    find_run(config, or_resume)  # First: what is refused should leave nothing behind, not even for a moment.
    with _held(locate(config.run_folder), workers, say):
        return _start(config, workers, build_model, say, or_resume)


def _start(
    config: Config, workers: Workers, build_model: BuildModel | None, say: Say, or_resume: bool
) -> TrainingResult:
    # All hosts find the same: the first one makes the folder after all have met.
    run = find_run(config, or_resume)
    if run is not None:
        run.check_model(build_model)

    def find_data(prepare: Callable[[Config, Say], PreparedData]) -> PreparedData:
        return prepare(config, say) if run is None else find_prepared(run, lambda: prepare(config, say))

    if not workers.are_several:
        strategy = open_devices(config, workers, say)
        examples_per_replica(config, strategy.num_replicas_in_sync)
        prepared = find_data(prepare)
        if run is not None:
            tell_of_changed_text(config, prepared, say, text_fingerprint)
        run = run or RunFolder.create(config, prepared, build_model)
        return train(run, workers, strategy, prepared, build_model, say)

    def make_or_open() -> RunFolder:
        if workers.is_chief and run is None:
            RunFolder.create(config, prepared, build_model)
        return RunFolder.of(config)

    examples_per_replica(config, count_replicas_of(workers))
    say = say if workers.is_chief else _be_silent
    with Meeting(workers) as meeting:
        meeting.agree(fingerprints(config, build_model))
        # Workers that share the folder find there what the first one prepared, and need no locks of their file system.
        prepared = meeting.in_turn(lambda: find_data(prepare_in_a_process_of_its_own))
        meeting.agree({"the prepared data": prepared.fingerprint})
        if workers.is_chief and run is not None:
            tell_of_changed_text(config, prepared, say, functools.partial(call_in_new_process, text_fingerprint))
        opened = meeting.in_turn(make_or_open)
        meeting.agree(what_is_there(opened, None))
    return _train_together(opened, workers, prepared, build_model, say)


def resume(
    run_folder: str,
    build_model: BuildModel | None = None,
    say: Say = print,
    overrides: Sequence[str] = (),
    step: Step | None = None,
) -> TrainingResult:
    """Goes on with a run from its newest checkpoint, or that of a step, with the config it was started with.

    Raises:
        UserError: there is no such run or checkpoint, or its data is gone, or workers do not agree.
    """
    say = print_line if say is print else say
    run_folder, step = run_and_step(run_folder, step)
    run = RunFolder(run_folder, overrides)
    workers = find_workers(run.config.distribution)
    with _held(run.path, workers, say):
        run = RunFolder(run_folder, overrides)  # As it is now that nobody else can change it.
        run.check_model(build_model)
        if workers.are_several:
            say = say if workers.is_chief else _be_silent
            with Meeting(workers) as meeting:
                meeting.agree(fingerprints(run.config, build_model))
                prepared = find_prepared(run)
                meeting.agree(what_is_there(run, step))
            return _train_together(run, workers, prepared, build_model, say, step)
        strategy = open_devices(run.config, workers, say)
        return train(run, workers, strategy, find_prepared(run), build_model, say, step)


def _held(folder: Location, workers: Workers, say: Say) -> contextlib.AbstractContextManager[None]:
    """Holds the run's folder for its first host, from before it is made until the last checkpoint is written."""
    return only_run_in(folder, say) if workers.is_chief else contextlib.nullcontext()


def _train_together(
    run: RunFolder,
    workers: Workers,
    prepared: PreparedData,
    build_model: BuildModel | None,
    say: Say,
    step: Step | None = None,
) -> TrainingResult:
    with _telling_of_lost_workers(run, workers):
        return train(run, workers, open_devices(run.config, workers, say), prepared, build_model, say, step)


def open_devices(config: Config, workers: Workers, say: Say) -> tf.distribute.Strategy:
    """Returns the strategy of a run, and says on what it computes. Call it before TensorFlow computes anything."""
    share_cores(config, workers)
    strategy = make_strategy(config.distribution)
    for line in describe_devices(strategy, config.distribution, workers):
        say(line)
    return strategy


def fingerprints(config: Config, build_model: BuildModel | None) -> dict[str, str]:
    """Returns what all workers of a run must have in common before any text is read."""
    settings = {}
    for name, value in config.model_dump(mode="json").items():
        section = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        settings.update({key: json.dumps(each) for key, each in section.items()})
    return {
        "the version of trainer": __version__,
        "the version of TensorFlow": tf.__version__,
        "the version of Keras": keras.__version__,
        "what each computes on": devices_of_this_worker(),
        "the function that builds the model": "trainer's own" if build_model is None else _name_of(build_model),
    } | settings


def what_is_there(run: RunFolder, step: Step | None) -> dict[str, str]:
    """Returns what all workers of a run must find in its folder."""
    checkpoints = open_checkpoints(run, _be_silent)  # `train` looks again, and says what it leaves out.
    checkpoint = find_checkpoint(run, checkpoints, step)
    return {
        f"the data of {run.path}": run.facts["data_fingerprint"],
        f"the checkpoint to go on from in {run.path}": "none" if checkpoint is None else checkpoint.manifest["sha256"],
        f"the validation losses so far in {run.path}": str(sorted(checkpoints.scores.items())),
    }


def _name_of(function: Callable[..., Any]) -> str:
    # Not the module: in the script that was started it is __main__, for whoever imports the script it is not.
    return getattr(function, "__qualname__", type(function).__qualname__)


def prepare_in_a_process_of_its_own(config: Config, say: Say) -> PreparedData:
    """Prepares, and leaves this process as it was: hosts can only be joined before TensorFlow computes anything."""
    return call_in_new_process(prepare, config, say=say)


def tell_of_changed_text(
    config: Config, prepared: PreparedData, say: Say, text_fingerprint: Callable[[Config], str]
) -> None:
    """Says if the text is not what it was when the run was started: the run goes on with what was prepared then."""
    try:
        if text_fingerprint(config) == prepared.source_fingerprint:
            return
        what = "The text, or the file of tokenizer.path, has changed since this run was started"
    except UserError as error:
        what = f"The text cannot be compared with what it was when this run was started ({str(error).rstrip('.')})"
    say(
        f"{what}: the run goes on with the text of then, as it was prepared in "
        f"{prepared.stored_in or prepared.folder}. To train on the text of now, start a new run: "
        f"{quoted(f'run_folder={config.run_folder}-2')}"
    )


def _be_silent(_: str) -> None:
    pass


@contextlib.contextmanager
def _telling_of_lost_workers(run: RunFolder, workers: Workers) -> Iterator[None]:
    """Says which worker was lost, if that is what an error of TensorFlow tells."""
    try:
        yield
    except tf.errors.OpError as error:
        loss = describe_loss(error.message, workers)
        if loss is None:
            raise
        advice = f"Then start all workers again with: trainer train --resume {quoted(run.path)}"
        raise UserError(f"{loss} {advice}") from error


@contextlib.contextmanager
def _telling_of_memory(run: RunFolder) -> Iterator[None]:
    """Says how to go on if a step needs more memory than the device has."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        size = run.config.train.micro_batch_size
        raise UserError(
            f"A step does not fit the device's memory with train.micro_batch_size={size}: "
            f"{error.message.splitlines()[0][:300]}. Go on with the largest that fits: "
            f"trainer train --resume {quoted(run.path)} train.micro_batch_size=auto"
        ) from error


def train(
    run: RunFolder,
    workers: Workers,
    strategy: tf.distribute.Strategy,
    prepared: PreparedData,
    build_model: BuildModel | None,
    say: Say,
    from_step: Step | None = None,
) -> TrainingResult:
    """Trains a run from its newest checkpoint, or that of from_step, or from the start, to its end or to a signal.

    Every host takes every step and scores its part of the validation text; the first alone writes.
    """
    config = run.config
    total_steps = count_steps(prepared, config)
    spent = Stopwatch()

    with spent.on("start"), run.undone_if_it_fails():
        # The model, and all that changes with a step.
        with strategy.scope():
            model = make_model(build_model, config, prepared.vocabulary_size, prepared.bos_id)
        step_function = TrainingStep(config, total_steps, model, strategy)
        if config.train.micro_batch_size == "auto":
            config = settle_micro_batch(run, workers, step_function, say)
        checkpoints = open_checkpoints(run, say)
        step = restore(step_function, find_checkpoint(run, checkpoints, from_step))
        if workers.is_chief:
            run.write_config_file()
            keep_place_of(run, prepared)
            check_first_batch(run, hash_of_first_batch(prepared, config, total_steps), say)
        if step == total_steps and (result := read_result(run, step)) is not None:
            say(f"{run.path}: all {total_steps} steps are taken, and this is what came of them.")
            best_step = checkpoints.best_step()
            return TrainingResult(str(run.path), config.data.is_storybook(), model, step, False, *result, best_step)
        # What a killed process scored after its last checkpoint is scored again. If this is not the last one, because
        # the user has asked for it, what is known of later ones stays.
        later = () if from_step is None else checkpoints.steps()
        scores = checkpoints.scores = {at: loss for at, loss in checkpoints.scores.items() if at <= step or at in later}
        say(describe(run, prepared, model, step, total_steps))

        # What looks at it.
        evaluator = Evaluator(model, strategy, prepared, config)
        tokenizer = load_tokenizer_of(run)
        generator = Generator(model, tokenizer, config.train.sequence_length)
        # What does not fit is better known now than in an hour.
        for remark in generator.remarks(
            [config.samples.prompt], config.samples.num_tokens, config.samples.stop, "samples."
        ):
            say(f"warning: {remark}")
        at_peak = find_peak(config, model, prepared.vocabulary_size, strategy, say)
        monitor = make_monitor(run, prepared, step, at_peak, say) if workers.is_chief else Silence()
        batches = iter(
            # Endless, though nobody reads that far: else hosts would ask each other before every step whether there is
            # another batch.
            distributed(strategy, lambda share: training_batches(prepared, config, step, total_steps, share).repeat())
        )
        run_steps = step_function.run_steps.get_concrete_function(batches, tf.constant(0, tf.int64))

    def is_asked_to_stop() -> bool:
        # Several hosts have to agree on the last step, and do so within it.
        return not workers.are_several and bool(step_function.stop_requested.numpy())

    def save_now(step: int) -> None:
        if workers.is_chief:
            with spent.on("checkpoint"), monitor.doing(step, "saving"):
                save(checkpoints, step_function, run)

    def evaluate(step: int) -> bool:
        """Scores the model and keeps the score; returns whether it is the best so far."""
        with spent.on("evaluate"), monitor.doing(step, "evaluating"):
            score = evaluator.unless_stopped(is_asked_to_stop, config.evaluation.num_batches)
        if score is None:
            return False
        monitor.evaluation(step, score)
        return keep_score(run, workers, step, score.loss, scores, monitor.say)

    ends = (total_steps, *config.profile.ends())
    cadences = (
        config.log.every_steps,
        config.checkpoint.every_steps,
        config.evaluation.every_steps,
        config.samples.every_steps,
    )
    meter = Meter()
    with monitor.running(), checkpoints:
        with stop_on_signals(lambda: step_function.stop_requested.assign(True), monitor.say):
            is_stopped = False
            if is_due(step, config.evaluation.every_steps) and step < total_steps and step not in scores:
                evaluate(step)  # The process before was stopped between its last checkpoint and this.
            while step < total_steps and not (is_stopped or is_asked_to_stop()):
                # A tensor, not an int: a new Python int would trace the whole loop again.
                num_steps = min(config.train.steps_per_call, steps_until_due(step, ends, cadences))
                with monitor.profiled(step), spent.on("train") as lap, _telling_of_memory(run):
                    metrics = run_steps(batches, tf.constant(num_steps, tf.int64))
                    num_taken = int(metrics.num_steps)
                step += num_taken
                is_stopped = bool(metrics.stop_votes)
                meter.add(metrics, lap())
                monitor.advance(step)
                checkpoints.check()
                skipped_in_a_row = int(step_function.skipped_in_a_row.numpy())
                check_is_learning(step, total_steps, skipped_in_a_row, int(step_function.optimizer.num_updates.numpy()))

                if is_due(step, config.log.every_steps) or step == total_steps:
                    interval = meter.report(float(learning_rate(config.optimizer, step - 1, total_steps)))
                    monitor.interval(step, interval)
                    scale = None if step_function.loss_scale is None else float(step_function.loss_scale.value.numpy())
                    report_skipped(step, interval.num_steps, interval.num_skipped, scale, monitor.say)
                is_saved = is_due(step, config.checkpoint.every_steps) or step == total_steps
                if is_saved:
                    save_now(step)
                if is_due(step, config.evaluation.every_steps) and step < total_steps:
                    is_best = evaluate(step)
                    if is_best and not is_saved:
                        save_now(step)
                if is_due(step, config.samples.every_steps) and step < total_steps and workers.is_chief:
                    with spent.on("sample"), monitor.doing(step, "sampling"):
                        samples = write_samples(generator, config.samples, monitor.say, is_asked_to_stop)
                        monitor.samples(step, samples)

            is_stopped = is_stopped or is_asked_to_stop()
            if is_stopped:
                save_now(step)
            with spent.on("checkpoint"):
                checkpoints.wait()
            # A signal of the last moments, which no step saw: on several hosts each has to leave by itself, as it has
            # to from here on.
            is_stopped = is_stopped or bool(step_function.stop_requested.numpy())
        if is_stopped:
            newer = f" --step {step}" if step < max(checkpoints.steps(), default=0) else ""
            say(
                f"Stopped at step {step} of {total_steps}, saved. Go on with: trainer train --resume "
                f"{quoted(run.path)}{newer}"
            )
            best_step = checkpoints.best_step()
            return TrainingResult(str(run.path), config.data.is_storybook(), model, step, True, None, {}, best_step)

        # All is saved: from here on a signal just ends the process.
        with spent.on("evaluate"), monitor.doing(step, "evaluating"):
            evaluation = evaluator()
        monitor.evaluation(step, evaluation)
        of_sample = evaluation
        if (num_batches := config.evaluation.num_batches) is not None:
            with spent.on("evaluate"):  # The scores so far are of a sample of the text: compare with the same.
                of_sample = evaluator(num_batches)
        keep_score(run, workers, step, of_sample.loss, scores, monitor.say)
        with spent.on("sample"), monitor.doing(step, "sampling"):
            samples = write_samples(generator, config.samples, monitor.say) if workers.is_chief else {}
        monitor.samples(step, samples)
        if workers.is_chief:
            write_result(run, step, evaluation, samples, say)
    say(f"Time: {spent}")
    best_step = checkpoints.best_step()
    return TrainingResult(str(run.path), config.data.is_storybook(), model, step, False, evaluation, samples, best_step)


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something with this cadence happens after this step; never where the cadence is None."""
    return every_steps is not None and step > 0 and step % every_steps == 0


def steps_until_due(step: int, ends: Sequence[int], cadences: Sequence[int | None]) -> int:
    """Returns how many steps may run before the host has something to do: at one of ends, or by a cadence."""
    left = [end - step for end in ends if end > step]
    return min(left + [every - step % every for every in cadences if every is not None])


def settle_micro_batch(run: RunFolder, workers: Workers, step_function: TrainingStep, say: Say) -> Config:
    """Finds the micro-batch that the devices have memory for; returns the run's config with it, and keeps it there."""
    fit_micro_batch(step_function, say)
    size = step_function.execution.micro_batch_size
    say(f"train.micro_batch_size='auto' comes to {size} of a replica's {step_function.execution.examples} examples.")
    run.config = run.config.with_micro_batch_size(size)
    if workers.is_chief:
        run.keep_micro_batch_size(size)
    return run.config


def write_samples(
    generator: Generator, config: SamplesConfig, say: Say, is_stopped: Callable[[], bool] = lambda: False
) -> dict[str, str]:
    """Returns what each decoder writes after the prompt; the same every time but for what the model has learned.

    Args:
        generator: of the model.
        config: prompt, length and decoders' settings.
        say: prints a line. It is told if the logits are not finite, which leaves all samples out: whether the run can
            go on is for `check_is_learning` to decide.
        is_stopped: asked before each decoder; the rest is left out once it says so.
    """
    num_tokens = config.num_tokens or generator.sequence_length
    samples = {}
    for name in DECODERS:
        if is_stopped():
            break
        decoder = Decoder.from_config(name, config)
        try:
            (samples[name],) = generator.generate([config.prompt], decoder, num_tokens, stop=config.stop)
        except NotFinite:
            say("No samples: the model's logits are not finite.")
            break
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
