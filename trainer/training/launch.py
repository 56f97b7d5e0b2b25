"""Starts and resumes runs: everything that happens before loop.py.

`start` takes a config, `resume` the folder of a run, `fork` that of a parent. All, on every worker:
1. find out which worker this process is: the only one, or one of the several that TF_CONFIG or SLURM name;
2. lock the run's folder until the run is over, if this worker is the chief, and open the run to go on with, if there is
   one;
3. make the checks of the machine that take milliseconds (checks.py);
4. get the devices, the prepared data and the folder. A single worker opens its devices, gets the data, and then makes
   the folder if the run is new (`_launch_one`). Several workers first meet and compare what they have: TensorFlow waits
   for a missing worker for ever, and workers with different settings would spoil the model. Then they get the data,
   make or open the folder, and open their devices last (`_launch_several`);
5. call `loop.train`.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.config.settings import Config, check_can_shard, check_histograms, check_shard, examples_per_replica
from trainer.data.batches import total_steps
from trainer.data.prepare import prepare, text_fingerprint
from trainer.data.shards import PreparedData
from trainer.distributed.meeting import Meeting
from trainer.distributed.strategy import (
    count_replicas_of,
    describe_devices,
    devices_of_this_worker,
    make_strategy,
    share_cores,
)
from trainer.distributed.workers import Workers, describe_loss, find_workers
from trainer.errors import UserError, quoted
from trainer.exchange.starting_weights import read_beginning
from trainer.model.build import BuildModel
from trainer.monitoring.callbacks import Callback
from trainer.monitoring.trackers import check_trackers
from trainer.runs.array_file import Arrays
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.fork import Fork, check_batch_warmup, check_has_steps, place_in_data, plan_fork
from trainer.runs.parentage import Beginning, parents_by_run
from trainer.runs.run_changes import has_steps_left
from trainer.runs.run_checkpoints import find_checkpoint, lasting, open_checkpoints, read_checkpoint, write_beginning
from trainer.runs.run_data import find_prepared
from trainer.runs.run_folder import CheckpointStep, RunFolder, check_is_free, find_run, run_and_step
from trainer.runs.run_lock import only_run_in
from trainer.system.process import call_in_new_process
from trainer.system.storage import Location, locate
from trainer.system.terminal import Say
from trainer.system.terminal import say as print_line
from trainer.training.checks import check_start
from trainer.training.loop import TrainingResult, train
from trainer.version import __version__


class Request(NamedTuple):
    """A request to start or resume a run.

    Attributes:
        config: the run's configuration.
        run: the run to go on with; None: a new one.
        build_model: builds the model; None: the GPT that config describes.
        may_prepare: whether the text is prepared if its prepared data is missing.
        step: the checkpoint to go on from: a step, or "best"; None: the newest.
        fork: the run that a new one is a fork of; None: it is none.
        callbacks: what the chief calls as the run reports something.
    """

    config: Config
    run: RunFolder | None
    build_model: BuildModel | None
    may_prepare: bool
    step: CheckpointStep | None = None
    fork: Fork | None = None
    callbacks: Sequence[Callback] = ()


def start(
    config: Config,
    build_model: BuildModel | None = None,
    say: Say = print,
    or_resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Prepares the text if that is still to be done, makes the run's folder, and trains.

    Args:
        config: the run's configuration.
        build_model: builds a Keras model from the config and the vocabulary size; None: the GPT that config describes.
        say: prints a line.
        or_resume: whether to go on with the run that is in the folder, if there is one.
        callbacks: what is called as the run reports something.

    Raises:
        UserError: a setting, the text or the folder is not right, or the workers do not agree.
    """
    say = _printing(say)
    workers = find_workers(config.distribution)
    find_run(config, or_resume)  # Before the lock: a run that is refused leaves nothing behind, not even a lock file.
    with _locked_by_chief(locate(config.run_folder), workers, say):
        run = find_run(config, or_resume)  # Again: the folder may have changed before this process had the lock.
        return _launch(Request(config, run, build_model, may_prepare=True, callbacks=callbacks), workers, say)


def resume(
    run_folder: str,
    build_model: BuildModel | None = None,
    say: Say = print,
    overrides: Sequence[str] = (),
    step: CheckpointStep | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Goes on with a run from a checkpoint, with the configuration that the run was started with.

    Args:
        run_folder: the run's folder, or the folder of one of its checkpoints.
        build_model: the function that was given to `start`.
        say: prints a line.
        overrides: `section.key=value` strings for the settings that a resumed run may change.
        step: the checkpoint's step, or "best"; None: the newest checkpoint.
        callbacks: what is called as the run reports something.

    Raises:
        UserError: the run or the checkpoint does not exist, or its data is gone, or the workers do not agree.
    """
    say = _printing(say)
    run_folder, step = run_and_step(run_folder, step)
    # Before the lock: only the chief locks, and the config is needed to know whether this worker is the chief.
    run = RunFolder(run_folder, overrides)
    workers = find_workers(run.config.distribution)
    with _locked_by_chief(run.path, workers, say):
        run = RunFolder(run_folder, overrides)  # Again: the folder may have changed before this process had the lock.
        request = Request(run.config, run, build_model, may_prepare=False, step=step, callbacks=callbacks)
        return _launch(request, workers, say)


def fork(
    run: str,
    overrides: Sequence[str],
    build_model: BuildModel | None = None,
    say: Say = print,
    step: CheckpointStep | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Makes a new run that goes on from a checkpoint of another one by another plan, and trains it.

    Args:
        run: the folder of the parent, or of one of its checkpoints, or RUN@step.
        overrides: `section.key=value` strings: run_folder, and what is not to be the parent's.
        build_model: the function that was given to `start`.
        say: prints a line.
        step: the step of the parent's checkpoint, or "best"; None: the newest checkpoint.
        callbacks: what is called as the run reports something.

    Raises:
        UserError: the parent or its checkpoint does not exist, a setting cannot change in a fork, the new folder is not
            free, or the workers do not agree.
    """
    say = _printing(say)
    planned = plan_fork(run, overrides, step)
    config = planned.config
    planned.parent.check_model(build_model)
    workers = find_workers(config.distribution)
    check_is_free(config)
    with _locked_by_chief(locate(config.run_folder), workers, say):
        check_is_free(config)  # Again: the folder may have changed before this process had the lock.
        request = Request(config, None, build_model, may_prepare=True, fork=planned, callbacks=callbacks)
        return _launch(request, workers, say)


def _printing(say: Say) -> Say:
    """Returns a function that prints a line: print_line in place of `print`, which is the default for users. print_line
    escapes control characters, and a Monitor that gets it may show a progress bar.
    """
    return print_line if say is print else say


def _locked_by_chief(folder: Location, workers: Workers, say: Say) -> contextlib.AbstractContextManager[None]:
    return only_run_in(folder, say) if workers.is_chief else contextlib.nullcontext()


def _launch(request: Request, workers: Workers, say: Say) -> TrainingResult:
    if workers.is_chief:
        check_trackers(request.config.log)
    check_histograms(request.config)
    # A finished run goes on to report its result, on a full disk, too.
    has_steps = request.run is None or request.step is not None or has_steps_left(request.run)
    check_start(request.config, say, workers.is_chief and has_steps)
    check_can_shard(request.config, is_gpt=request.build_model is None)
    if request.run is not None:
        request.run.check_model(request.build_model)
    if workers.are_several:
        return _launch_several(request, workers, say if workers.is_chief else _be_silent)
    return _launch_one(request, workers, say)


def _launch_one(request: Request, workers: Workers, say: Say) -> TrainingResult:
    """Trains as the only worker. Devices come first: if they cannot be used, no text has to be prepared to find out."""
    config = request.config
    strategy = open_devices(config, workers, say)
    _check_shares(config, strategy.num_replicas_in_sync)
    beginning = _beginning(request, read_beginning, say)
    prepared = _prepared(request, prepare, say)
    if request.run is not None and request.may_prepare:
        report_changed_text(config, prepared, say, text_fingerprint)
    run = request.run or _create(request, prepared, beginning, say)
    beginning = None  # Its arrays are in the run's folder now, and the training needs their memory.
    return train(run, workers, strategy, prepared, request.build_model, say, request.step, request.callbacks)


def _launch_several(request: Request, workers: Workers, say: Say) -> TrainingResult:
    """Trains as one of several workers. Devices come last: TensorFlow joins the workers when it opens the devices, and
    can do so only before it computes anything. That is why the text is prepared in another process.
    """
    config = request.config
    _check_shares(config, count_replicas_of(workers))
    prepare_elsewhere = functools.partial(call_in_new_process, prepare)

    with Meeting(workers) as meeting:
        meeting.agree(fingerprints(config, request.build_model))
        read_elsewhere = functools.partial(call_in_new_process, read_beginning)
        beginning = meeting.in_turn(lambda: _beginning(request, read_elsewhere, say) if workers.is_chief else None)
        # The chief prepares the data; then the others find it. Because of this order the shared prepared folder needs
        # no locks.
        prepared = meeting.in_turn(lambda: _prepared(request, prepare_elsewhere, say))
        meeting.agree({"the prepared data": prepared.fingerprint})
        if workers.is_chief and request.run is not None and request.may_prepare:
            report_changed_text(config, prepared, say, functools.partial(call_in_new_process, text_fingerprint))
        run = meeting.in_turn(lambda: _run_of_several(request, workers, prepared, beginning, say))
        meeting.agree(contents(run, request.step))
    beginning = None  # As in _launch_one.
    with _reporting_lost_workers(run, workers):
        strategy = open_devices(run.config, workers, say)
        return train(run, workers, strategy, prepared, request.build_model, say, request.step, request.callbacks)


def _run_of_several(
    request: Request, workers: Workers, prepared: PreparedData, beginning: Beginning | None, say: Say
) -> RunFolder:
    """Returns the run to go on with, or the new one, which the chief makes before the others open it."""
    if request.run is not None:
        return request.run
    if not workers.is_chief:
        return RunFolder.of(request.config)
    run = _create(request, prepared, beginning, say)
    # Keep the folder if a worker is lost before the first step: the message advises to resume the run.
    run.is_new = False
    return run


def _beginning(request: Request, read: Callable[..., Beginning | None], say: Say) -> Beginning | None:
    """Returns what a new run begins with; None: random weights, or the run is not new.

    Args:
        request: the run to start or resume.
        read: `read_beginning`, or a function that calls it in another process.
        say: prints a line.
    """
    if request.run is not None:
        return None
    if request.fork is None:
        return read(request.config, request.build_model is not None, say=say)
    parent = request.fork.parent
    # A fork without optimizer.ema_decay drops the average of its parent.
    names = ["weights", "optimizer", *(() if request.config.optimizer.ema_decay is None else ("average",))]

    def read_groups(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, Arrays]]:
        found = filter(checkpoint.has, names)
        return checkpoint, {name: lasting(checkpoint.arrays(name), checkpoint) for name in found}

    checkpoint, groups = read_checkpoint(parent, read_groups, say, request.fork.step)
    parents = parents_by_run(parent, checkpoint, "fork", request.fork.changed)
    return Beginning(checkpoint.step, groups, parents)


def _create(request: Request, prepared: PreparedData, beginning: Beginning | None, say: Say) -> RunFolder:
    """Makes the folder of a new run, with its first checkpoint if it does not begin with random weights."""
    if beginning is not None and request.fork is not None:
        check_batch_warmup(request.fork, beginning.step)
        offset, line = place_in_data(request.fork, prepared, beginning.step)
        check_has_steps(request.fork, beginning.step, total_steps(prepared, request.config, offset))
        beginning = beginning._replace(data_offset=offset)
        say(f"A fork of {request.fork.parent.path}, step {beginning.step}. {line}")
    write_first = None if beginning is None else functools.partial(write_beginning, beginning)
    return RunFolder.create(request.config, prepared, request.build_model, write_first)


def _be_silent(_: str) -> None:
    pass


def _check_shares(config: Config, num_replicas: int) -> None:
    """Raises UserError if the global batch cannot be divided into equal shares of whole micro-batches, or if
    distribution.shard has nothing to split over.
    """
    examples_per_replica(config, num_replicas)
    check_shard(config, num_replicas)


def _prepared(request: Request, prepare_text: Callable[..., PreparedData], say: Say) -> PreparedData:
    """Returns the data of a run; prepares it if that is still to be done and allowed.

    Args:
        request: the run to start or resume.
        prepare_text: `prepare`, or a function that calls it in another process.
        say: prints a line.
    """

    def prepare_now() -> PreparedData:
        return prepare_text(request.config, say=say)

    if request.fork is not None and request.fork.keeps_data:
        return find_prepared(request.fork.parent, prepare_now)
    if request.run is None:
        return prepare_now()
    return find_prepared(request.run, prepare_now if request.may_prepare else None)


def open_devices(config: Config, workers: Workers, say: Say) -> tf.distribute.Strategy:
    """Returns the strategy of a run and prints its devices. Call it before TensorFlow computes anything."""
    share_cores(config, workers)
    strategy = make_strategy(config.distribution)
    for line in describe_devices(strategy, config.distribution, workers):
        say(line)
    return strategy


def report_changed_text(
    config: Config, prepared: PreparedData, say: Say, fingerprint_of_text: Callable[[Config], str]
) -> None:
    """Prints a line if the text has changed since the run was started: the run goes on with the text as it was then.

    Args:
        config: the run's configuration.
        prepared: the run's data.
        say: prints a line.
        fingerprint_of_text: `text_fingerprint`, or a function that calls it in another process.
    """
    try:
        if fingerprint_of_text(config) == prepared.source_fingerprint:
            return
        what = "The text, or the file of tokenizer.path, has changed since this run was started"
    except UserError as error:
        what = f"The text cannot be compared with what it was when this run was started ({str(error).rstrip('.')})"
    say(
        f"{what}: the run goes on with the text as it was prepared then, in {prepared.stored_in or prepared.folder}. "
        "To train on the current text, start a new run: "
        f"{quoted(f'run_folder={config.run_folder}-2')}"
    )


def fingerprints(config: Config, build_model: BuildModel | None) -> dict[str, str]:
    """Returns what must be equal on all workers before any text is read."""
    settings = {}
    for name, value in config.model_dump(mode="json").items():
        section = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        settings.update({key: json.dumps(each) for key, each in section.items()})
    return {
        "the version of trainer": __version__,
        "the version of TensorFlow": tf.__version__,
        "the version of Keras": keras.__version__,
        "the set of devices": devices_of_this_worker(),
        "the function that builds the model": "trainer's own" if build_model is None else _name_of(build_model),
    } | settings


def contents(run: RunFolder, step: CheckpointStep | None) -> dict[str, str]:
    """Returns what all workers must find in the run's folder."""
    checkpoints = open_checkpoints(run, _be_silent)  # `train` looks again, and prints which checkpoints it skips.
    checkpoint = find_checkpoint(run, checkpoints, step)
    return {
        # Without the seal: `RunFolder.record` renews the seal in the file, but not in `facts`.
        f"the record of {run.path}": json.dumps(run.facts | {"sha256": None}, sort_keys=True),
        f"the checkpoint to go on from in {run.path}": "none" if checkpoint is None else checkpoint.manifest["sha256"],
        f"the list of validation losses in {run.path}": str(sorted(checkpoints.scores.items())),
    }


def _name_of(function: Callable[..., Any]) -> str:
    # Without the name of the module, which can differ between workers: it is `__main__` in a script that was started,
    # and the real name in a script that was imported.
    return getattr(function, "__qualname__", type(function).__qualname__)


@contextlib.contextmanager
def _reporting_lost_workers(run: RunFolder, workers: Workers) -> Iterator[None]:
    """Turns an error of TensorFlow about a lost worker into a UserError that names the worker."""
    try:
        yield
    except tf.errors.OpError as error:
        loss = describe_loss(error.message, workers)
        if loss is None:
            raise
        advice = f"Then start all workers again with: trainer train --resume {quoted(run.path)}"
        raise UserError(f"{loss} {advice}") from error
