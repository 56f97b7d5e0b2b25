"""The story of a training run: `train`, from top to bottom.

A run has one worker or several. A worker is a process, usually one per host (a Cloud TPU slice has one worker for all
its hosts). Each of its devices is a replica, which holds the whole model, or only its pieces of the weights if
distribution.shard="weights". Worker 0 is the chief: only the chief writes checkpoints, logs, samples and results. On a
single machine the only worker is the chief.

launch    Every worker, in launch.py. The chief locks the run's folder; a run to go on with is opened. A single worker
          then opens its devices, gets the prepared data, and makes the folder if the run is new. Several workers first
          meet; then they get the data, make or open the folder, and open their devices last. On the way they compare
          their settings, data and checkpoint.
build     Every worker builds the same model and optimizer, and finds the micro-batch if it is "auto".
restore   Every worker loads a checkpoint if the run has one: the newest, or the one that --step names.
prepare   Every worker makes the batches, the compiled steps, and what scores, samples and reports. The chief records
          the settings that are others from here on.
loop      Every worker takes the same steps. In a step (step.py) each replica computes the gradients of its share of the
          batch, the gradients are summed over all replicas, and each replica makes the same update of its copy of the
          model. If distribution.shard splits something, it updates its piece of the weights, and the pieces are
          gathered at the end of the step (split.py), or when a block is computed (gathered.py).
          Between calls of the compiled loop, whenever it is due: the chief logs; histograms of weights and gradients
          are computed by every worker and written by the chief; the chief saves a checkpoint, and every worker sends
          its pieces for it; every worker scores its share of the validation text and of evaluation.sets; the
          chief writes samples, together with all other workers if the weights are split. If a signal stops the run, it
          is saved, and ends here.
finish    Every worker scores its share of the whole validation text and of evaluation.sets. The chief writes samples
          and the results.

With optimizer.ema_decay every worker also keeps an average of the weights. The average takes the place of the weights
in the model while the model is scored or writes samples, and for good once everything is saved.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.config.schedule import first_decay_step, learning_rate
from trainer.config.settings import Config
from trainer.data.batches import Batch, training_batches
from trainer.data.batches import total_steps as count_steps
from trainer.data.shards import PreparedData
from trainer.distributed.strategy import distributed
from trainer.distributed.workers import Workers
from trainer.errors import quoted
from trainer.model.build import BuildModel, make_model
from trainer.model.held import without_values
from trainer.monitoring.callbacks import Callback, Callbacks
from trainer.monitoring.curves import Curve, read_history
from trainer.monitoring.monitor import Monitor, SilentMonitor, describe_run, make_monitor
from trainer.monitoring.trackers import open_trackers
from trainer.runs.checkpoint import Checkpoints
from trainer.runs.first_batch import check_first_batch, hash_of_first_batch
from trainer.runs.results import Evaluation, read_result, record_score, scores_to_keep, write_result
from trainer.runs.run_changes import changes_of, check_length, has_other_scores, record_changes
from trainer.runs.run_checkpoints import find_checkpoint, open_checkpoints
from trainer.runs.run_data import load_tokenizer_of, record_place_of
from trainer.runs.run_folder import CheckpointStep, RunFolder
from trainer.system.signals import stop_on_signals
from trainer.system.storage import locate
from trainer.system.terminal import Say
from trainer.training.evaluation import Evaluator
from trainer.training.evaluation_sets import EvaluationSets
from trainer.training.health import check_is_learning, report_skipped
from trainer.training.histograms import Histograms
from trainer.training.meter import Meter
from trainer.training.micro_batch import advising_on_memory, settle_micro_batch
from trainer.training.sampler import Sampler
from trainer.training.snapshot import restore, save
from trainer.training.step import TrainingStep
from trainer.training.stopwatch import Stopwatch


def train(
    run: RunFolder,
    workers: Workers,
    strategy: tf.distribute.Strategy,
    prepared: PreparedData,
    build_model: BuildModel | None,
    say: Say,
    from_step: CheckpointStep | None = None,
    callbacks: Sequence[Callback] = (),
) -> "TrainingResult":
    """Trains a run to its end, or until a signal stops it. Every worker calls this.

    Args:
        run: the run.
        workers: the workers of the run, and which of them this process is.
        strategy: the devices of all workers.
        prepared: the run's data.
        build_model: builds a foreign model; None: the GPT that the run's config describes.
        say: prints a line.
        from_step: the step of the checkpoint to go on from, or "best"; None: the newest.
        callbacks: what the chief calls as the run reports something.
    """
    config, spent = run.config, Stopwatch()
    total_steps = count_steps(prepared, config, run.data_offset)

    with spent.on("start"), run.undone_if_it_fails():
        # Build, every worker: the model, and everything else that a step changes.
        # A device that holds pieces of the weights never holds all of them, and begins without any.
        in_pieces = config.distribution.shard == "weights"
        with strategy.scope(), without_values() if in_pieces else contextlib.nullcontext():
            model = make_model(build_model, config, prepared.vocabulary_size, prepared.bos_id)
        training_step = TrainingStep(config, total_steps, model, strategy)
        # The micro-batch is the examples of one forward and backward pass. `resolve` (execution.py) decides it from
        # the config, the kind of device and the number of replicas. If the setting is "auto", the result is only a
        # default: here it is kept if it fits the devices, or replaced by the largest smaller one that fits.
        if config.train.micro_batch_size == "auto":
            config = settle_micro_batch(run, workers, training_step, say)

        # Restore, every worker: the values of a checkpoint. The chief brings the folder up to date.
        checkpoints = open_checkpoints(run, say)
        step = restore(training_step, find_checkpoint(run, checkpoints, from_step))
        check_length(run, step, count_steps(prepared, run.recorded, run.data_offset), total_steps)
        # Before the chief records what has changed.
        has_changed, is_scored_otherwise = bool(changes_of(run)), has_other_scores(run)
        if workers.is_chief:
            bring_up_to_date(run, prepared, say)
        model_with_weights = None if in_pieces else model
        result = TrainingResult(run_folder=str(run.path), model=model_with_weights, step=step, samples={})
        if step == total_steps and not has_changed and (written := read_result(run, step)) is not None:
            say(f"{run.path}: all {total_steps} steps are taken, and this is the result.")
            training_step.hand_over_average()
            return result._replace(evaluation=written[0], samples=written[1], best_step=checkpoints.best_step())
        say(describe_run(run, prepared, model, step, total_steps))

        # Prepare the loop, every worker: what scores, samples and reports; the batches; the compiled steps.
        tokenizer = load_tokenizer_of(run)
        held = training_step.held
        evaluator = Evaluator(model, strategy, prepared, config, training_step.average, held)
        evaluation_sets = EvaluationSets(model, strategy, tokenizer, config, held)
        sampler = Sampler(training_step, tokenizer, config.samples, say)
        takes_part_in_samples = workers.is_chief or sampler.is_in_pieces
        # Not before all of these are made: settings that they refuse must not stay in the record.
        if workers.is_chief:
            record_changes(run, step, total_steps, say)
        # One dict with two users: `record_score` adds a loss, and the checkpoints keep the one with the lowest loss.
        scores = {} if is_scored_otherwise else scores_to_keep(checkpoints, step, from_step)
        checkpoints.scores = scores
        checkpoints.kept_steps = saved_anyway = steps_saved_anyway(config, total_steps)
        called = Callbacks(callbacks, lambda: training_step.stop_requested.assign(True), say)
        monitor: Monitor | SilentMonitor = SilentMonitor()
        if workers.is_chief:
            monitor = make_monitor(run, prepared, model, strategy, step, say, [called])
            checkpoints.on_whole = monitor.checkpoint

        # repeat(): with a finite dataset TensorFlow synchronizes the workers before every step to ask if data is left.
        def batches_from(first: int) -> Iterable[Batch]:
            return distributed(
                strategy,
                lambda share: training_batches(prepared, config, first, total_steps, share, run.data_offset).repeat(),
            )

        batches, histograms = iter(batches_from(step)), Histograms(training_step, batches_from)
        run_steps = training_step.run_steps.get_concrete_function(batches, tf.constant(0, tf.int64))
        if isinstance(monitor, Monitor):  # Last: from here on monitor.running() ends them, whatever fails.
            monitor.add(open_trackers(run, say))

    def stop_requested() -> bool:
        # With several workers always False: only the votes counted in a step (metrics.stop_votes) stop them, so that
        # all stop after the same step.
        return not workers.are_several and bool(training_step.stop_requested.numpy())

    def save_now() -> None:
        # Every worker sends its pieces of what is split over the replicas.
        if workers.is_chief or training_step.split is not None:
            with spent.on("checkpoint"), monitor.doing(step, "saving"):
                save(checkpoints, training_step, run, writes=workers.is_chief)

    def evaluate() -> bool:
        """Scores the model and keeps the score; returns whether it is the best so far."""
        with spent.on("evaluate"), monitor.doing(step, "evaluating") as note:
            score = evaluator.until_stopped(stop_requested, config.evaluation.num_batches, note)
            with training_step.averaged():
                sets = evaluation_sets.until_stopped(stop_requested)
        if score is None or sets is None:
            return False
        monitor.evaluation(step, score._replace(sets=sets))
        return record_score(run, workers, step, score.loss, scores, monitor.say)

    is_stopped, meter = False, Meter()
    with monitor.running(), checkpoints:
        with stop_on_signals(lambda: training_step.stop_requested.assign(True), monitor.say):
            if is_due(step, config.evaluation.every_steps) and step < total_steps and step not in scores:
                evaluate()  # The previous process was stopped between saving this step and scoring it.
            while step < total_steps and not (is_stopped or stop_requested()):
                # Train, every worker: some steps, in one call of the compiled loop.
                num_steps = steps_in_call(config, step, total_steps)
                with monitor.profiled(step), spent.on("train") as lap, advising_on_memory(run):
                    # A tensor, not an int: a new Python int would trace the whole loop again.
                    metrics = run_steps(batches, tf.constant(num_steps, tf.int64))
                    step += int(metrics.num_steps)  # Fewer if a stop was requested meanwhile.
                is_stopped = bool(metrics.stop_votes)
                meter.add(metrics, lap())
                monitor.advance(step)
                checkpoints.check()
                skipped_in_a_row = int(training_step.skipped_in_a_row.numpy())
                check_is_learning(step, total_steps, skipped_in_a_row, int(training_step.optimizer.num_updates.numpy()))

                # Log, the chief.
                if is_due(step, config.log.every_steps) or step == total_steps:
                    log(step, training_step, meter, monitor)

                # Histograms, every worker: all compute the gradients of the next step. The chief writes.
                if is_due(step, config.log.histograms_every_steps) and step < total_steps:
                    with spent.on("histograms"), advising_on_memory(run):
                        monitor.histograms(step, histograms.at(step))

                # Save, the chief; every worker if something is split.
                is_saved = is_due(step, config.checkpoint.every_steps) or step in saved_anyway
                if is_saved:
                    save_now()

                # Evaluate, every worker. The best model is saved as above.
                if is_due(step, config.evaluation.every_steps) and step < total_steps:
                    is_best = evaluate()
                    if is_best and not is_saved:
                        save_now()

                # Sample, the chief; every worker if the weights are split.
                if is_due(step, config.samples.every_steps) and step < total_steps and takes_part_in_samples:
                    with spent.on("sample"), monitor.doing(step, "sampling"), training_step.averaged():
                        monitor.samples(step, sampler.write(workers.is_chief, monitor.say, stop_requested))

            is_stopped = is_stopped or stop_requested()
            if is_stopped:
                save_now()
            with spent.on("checkpoint"):
                checkpoints.wait()
            # A signal after the last step: no step has counted it. If there are several workers, only those that got it
            # stop here; the others fail while they score the text below, and name the missing worker. All is saved.
            is_stopped = is_stopped or bool(training_step.stop_requested.numpy())
        if is_stopped:
            training_step.hand_over_average()
            say(f"Stopped at step {step} of {total_steps}, saved. {how_to_go_on(run, checkpoints, step)}")
            called.ended()
            return result._replace(step=step, is_stopped=True, best_step=checkpoints.best_step())

        # Finish, every worker: scores of the whole text. The chief writes. From here on a signal ends the process at
        # once, because everything is saved.
        with spent.on("evaluate"), monitor.doing(step, "evaluating") as note:
            evaluation, num_batches = evaluator(note=note), config.evaluation.num_batches
            # Earlier scores used num_batches batches: compare with the score of the same batches.
            comparable = evaluation if num_batches is None else evaluator(num_batches)
            training_step.hand_over_average()
            evaluation = evaluation._replace(sets=evaluation_sets())
        monitor.evaluation(step, evaluation)
        record_score(run, workers, step, comparable.loss, scores, monitor.say)
        with spent.on("sample"), monitor.doing(step, "sampling"):
            samples = sampler.write(workers.is_chief, monitor.say) if takes_part_in_samples else {}
        monitor.samples(step, samples)
        if workers.is_chief:
            write_result(run, step, evaluation, samples, say)
    say(f"Time: {spent}")
    called.ended()
    return result._replace(step=step, evaluation=evaluation, samples=samples, best_step=checkpoints.best_step())


class TrainingResult(NamedTuple):
    """The result of a run.

    Attributes:
        run_folder: the run's folder.
        model: the model, with its weights after step steps, or their average if there is one. None if
            distribution.shard split the weights: `trainer.load` reads them from the run's folder.
        step: the steps that were taken.
        samples: what each decoder wrote, by its name; empty if the run was stopped, and on workers except the chief.
        is_stopped: whether a signal, or a callback, stopped the run before its end.
        evaluation: the score on the whole validation text; None if the run was stopped.
        best_step: the step of the kept checkpoint with the lowest validation loss; None if none was scored.
    """

    run_folder: str
    model: keras.Model | None
    step: int
    samples: dict[str, str]
    is_stopped: bool = False
    evaluation: Evaluation | None = None
    best_step: int | None = None

    @property
    def history(self) -> dict[str, Curve]:
        """The curves of the run by name, such as "train/loss/nats_per_token" or "validation/loss/perplexity"; each has
        `steps` and `values`, two arrays. Read from the run's folder.
        """
        return read_history(locate(self.run_folder))

    def __repr__(self) -> str:
        parts = [f"{self.run_folder} at step {self.step:,}{', stopped' * self.is_stopped}"]
        if self.evaluation is not None:
            parts.append(f"validation: {self.evaluation}")
        if self.best_step is not None:
            parts.append(f"lowest validation loss of a checkpoint at step {self.best_step:,}")
        if self.samples:
            parts.append(f"samples by {', '.join(self.samples)}")
        return f"<{'; '.join(parts)}>"


def bring_up_to_date(run: RunFolder, prepared: PreparedData, say: Say) -> None:
    """Writes the files that are missing in a run's folder, and the place of its data; checks the order of the data.

    Raises:
        UserError: the batches would come in another order, or the folder cannot be written.
    """
    run.write_config_file()
    record_place_of(run, prepared)
    check_first_batch(run, hash_of_first_batch(prepared, run.config, run.first_step, run.data_offset), say)


def log(step: int, training_step: TrainingStep, meter: Meter, monitor: Monitor | SilentMonitor) -> None:
    """Reports the steps since the last report, and how many of them were skipped."""
    config, total_steps, loss_scale = training_step.config, training_step.total_steps, training_step.loss_scale
    scale = None if loss_scale is None else float(loss_scale.value.numpy())
    interval = meter.report(float(learning_rate(config.optimizer, step - 1, total_steps)), scale)
    monitor.interval(step, interval)
    report_skipped(step, interval.num_steps, interval.num_skipped, scale, monitor.say)


def is_due(step: int, every_steps: int | None) -> bool:
    """Returns whether something with this cadence happens after this step; None means never."""
    return every_steps is not None and step > 0 and step % every_steps == 0


def steps_saved_anyway(config: Config, total_steps: int) -> tuple[int, ...]:
    """Returns the steps that are saved whatever the cadence: the last one of the run, and the last one before the decay
    of the learning rate if there is a decay. The run can get longer only from before its decay.
    """
    decay_step = first_decay_step(config.optimizer, total_steps)
    return (total_steps,) if decay_step is None else (decay_step, total_steps)


def steps_in_call(config: Config, step: int, total_steps: int) -> int:
    """Returns how many steps to take in one call of the compiled loop: at most until something is due."""
    ends = (*steps_saved_anyway(config, total_steps), *config.profile.ends())
    cadences = (
        config.log.every_steps,
        config.log.histograms_every_steps,
        config.checkpoint.every_steps,
        config.evaluation.every_steps,
        config.samples.every_steps,
    )
    return min(config.train.steps_per_call, steps_until_due(step, ends, cadences))


def steps_until_due(step: int, ends: Sequence[int], cadences: Sequence[int | None]) -> int:
    """Returns the number of steps until the next of the ends, or until a cadence is due."""
    left = [end - step for end in ends if end > step]
    return min(left + [every - step % every for every in cadences if every is not None])


def how_to_go_on(run: RunFolder, checkpoints: Checkpoints, step: int) -> str:
    """Returns the command that resumes a run that was stopped at this step."""
    is_newest = step >= max(checkpoints.steps(), default=0)
    return f"Go on with: trainer train --resume {quoted(run.path)}{'' if is_newest else f' --step {step}'}"
