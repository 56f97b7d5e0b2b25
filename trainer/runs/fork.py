"""Forks: a new run that goes on from a checkpoint of another one by another plan. TensorFlow is not needed here.

A fork keeps the weights, the optimizer, the steps, the tokenizer, and the place in the data if the data are the same.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from trainer.config.file import differing_settings, make_config
from trainer.config.schedule import examples_before
from trainer.config.settings import MIXTURE_EXAMPLES, Config
from trainer.data.mixture import are_same_before, end_of_turn, phases_of
from trainer.errors import UserError, quoted
from trainer.model.build import GPT_MODEL
from trainer.model.size import parameter_shapes
from trainer.runs.run_changes import newest_step
from trainer.runs.run_folder import CheckpointStep, RunFolder, check_has_checkpoint, run_and_step
from trainer.system.storage import locate

if TYPE_CHECKING:
    from trainer.data.shards import PreparedData

# The settings that decide the order of the examples, besides the data.
_ORDER = ("data.mode=", "data.predict_end=", "data.weights=", "data.shuffle_window_mb=", "train.sequence_length=")
_SEED = "train.seed="
# The settings that decide at which examples the weights of a mixture change.
_OF_PHASES = ("data.weights_from_step=", "train.global_batch_size=", "train.batch_warmup=")


class Fork(NamedTuple):
    """A fork that is to be made.

    Attributes:
        parent: the run that it begins with.
        step: the step of the parent's checkpoint, or "best"; None: the newest.
        config: the fork's configuration.
        changed: the settings that are not the parent's, one `key=value (was value)` for each.
        keeps_data: whether it trains on the data that the parent was started on.
    """

    parent: RunFolder
    step: CheckpointStep | None
    config: Config
    changed: tuple[str, ...]
    keeps_data: bool


def plan_fork(run: str, overrides: Sequence[str], step: str | int | None = None) -> Fork:
    """Returns the fork that the user means.

    Args:
        run: the folder of the parent, or of one of its checkpoints, or RUN@step.
        overrides: `section.key=value` strings: run_folder, and what is not to be the parent's.
        step: the step of the parent's checkpoint, or "best".

    Raises:
        UserError: the parent is no run, run_folder is not given, or a setting cannot change in a fork.
    """
    folder, at = run_and_step(run, step)
    parent = RunFolder(folder, [each for each in overrides if each.startswith("data.prepared_folder=")])
    given = {each.partition("=")[0].strip() for each in overrides}
    if "run_folder" not in given:
        raise UserError(f"A fork needs a folder of its own; add {quoted(f'run_folder={parent.path}-2')}")
    for key in sorted(given):
        if key.startswith(("tokenizer", "init")):
            raise UserError(
                f"{key} cannot change in a fork, which keeps the weights and the tokenizer; leave it out, or begin a "
                f"new run with the weights only: trainer train CONFIG init.from={quoted(parent.path)}"
            )
    config = make_config(parent.recorded.model_dump(mode="json", exclude_none=True), overrides)
    if locate(config.run_folder) == parent.path:
        raise UserError(
            f"run_folder={config.run_folder!r} is the run that is to be forked; choose another folder, such as "
            f"{quoted(f'run_folder={parent.path}-2')}"
        )
    changed = differing_settings(config, parent.recorded) + differing_settings(config, parent.recorded, resumable=True)
    keeps_data = config.prepared_name() == parent.recorded.prepared_name()
    if not keeps_data:
        # Another text would make another vocabulary, and a file of tokenizer.path may be gone: the parent has a copy.
        settings = config.model_dump(mode="json", exclude_none=True)
        config = make_config(settings | {"tokenizer": {"kind": "saved", "path": str(parent.path)}})
    fork = Fork(parent, at, config, tuple(changed), keeps_data)
    _check_sizes(fork)
    if isinstance(at, int):
        check_has_checkpoint(parent.path, at)
    if at != "best":
        first = newest_step(parent) if at is None else at
        check_batch_warmup(fork, first)
        if config.train.total_steps is not None:
            check_has_steps(fork, first, config.train.total_steps)
    return fork


def check_batch_warmup(fork: Fork, step: int) -> None:
    """Raises UserError if a fork from this step sets the batch size of steps that its parent has taken."""
    before = fork.parent.recorded.train.batch_warmup
    for end, size in fork.config.train.batch_warmup.items():
        if end <= step and before.get(end) != size:
            raise UserError(
                f"train.batch_warmup.{end}={size} has no effect: the fork begins at step {step} of "
                f"{fork.parent.path}. Leave it out, or set a later step."
            )


def check_has_steps(fork: Fork, step: int, total_steps: int) -> None:
    """Raises UserError if a fork from this step has no step left to take."""
    if step >= total_steps:
        key = "train.total_steps" if fork.config.train.num_epochs is None else "train.num_epochs"
        raise UserError(
            f"The fork begins at step {step} of {fork.parent.path}, and its {key}="
            f"{getattr(fork.config.train, key[6:])} leaves it no step to take; give more, such as "
            f"train.total_steps={2 * step}"
        )


def _check_sizes(fork: Fork) -> None:
    """Raises UserError if a weight has another shape or dtype than in the parent, or the optimizer another state; the
    shapes of a foreign model are not checked.
    """
    before, now = fork.parent.recorded, fork.config
    is_wide = [each.train.precision == "float64" for each in (before, now)]
    if is_wide[0] != is_wide[1]:
        raise UserError(
            f"train.precision={now.train.precision!r} (was {before.train.precision!r}): weights and optimizer have "
            "another dtype, and a fork keeps it. Leave that out, or begin a new run with the weights only: "
            f"init.from={quoted(fork.parent.path)}"
        )
    if before.optimizer.kind != now.optimizer.kind:
        raise UserError(
            f"optimizer.kind={now.optimizer.kind!r} (was {before.optimizer.kind!r}): a fork keeps the state of the "
            "optimizer, and the other one has another. Leave that out, or begin a new run with the weights only: "
            f"init.from={quoted(fork.parent.path)}"
        )
    if fork.parent.facts["model"] != GPT_MODEL:
        return
    # The vocabulary is the same, and no other shape depends on it.
    had, has = (dict(parameter_shapes(each.model, 1, each.train.sequence_length)) for each in (before, now))
    for name in {**had, **has}:
        if had.get(name) != has.get(name):
            shapes = [list(shape) if (shape := each.get(name)) else "none" for each in (had, has)]
            what = [each for each in fork.changed if each.startswith(("model.", "train.sequence_length"))]
            raise UserError(
                f"{'; '.join(what)}: this changes {name} from {shapes[0]} to {shapes[1]} (for a vocabulary of one "
                "token), and a fork keeps all shapes. Leave that out, or begin a new run: trainer train. With fewer  "
                f"positions it can have the weights of this one: init.from={quoted(fork.parent.path)}"
            )


def place_in_data(fork: Fork, prepared: "PreparedData", step: int) -> tuple[int, str]:
    """Returns the data_offset of a fork from this step, see `RunFolder.data_offset`, and a line about it."""
    had, has = fork.parent.recorded.train, fork.config.train
    is_same = prepared.fingerprint == fork.parent.facts["data_fingerprint"]
    place = examples_before(had, step) + fork.parent.data_offset
    offset = place - examples_before(has, step)
    reordered = [each.partition("=")[0] for each in fork.changed if each.startswith((*_ORDER, _SEED))]
    remark = ""
    if is_same and not reordered and fork.config.data.weights is not None:
        before = phases_of(fork.parent.recorded.data, had, fork.parent.data_offset)
        now = phases_of(fork.config.data, has, offset)
        if not are_same_before(place, before, now):
            reordered = [each.partition("=")[0] for each in fork.changed if each.startswith(_OF_PHASES)]
        elif end_of_turn(place, before) != end_of_turn(place, now):
            remark = (
                f" Its new weights begin among the {MIXTURE_EXAMPLES:,} examples that the parent was mixing, so some "
                "of these come twice, and some only in the next epoch."
            )
    if not is_same or reordered:
        why = f"the text from the beginning, because of {', '.join(reordered)}"
        return -examples_before(has, step), f"The fork reads {why if is_same else 'its own text from the beginning'}."
    return offset, f"The fork's batches go on where the parent's ended, at example {place:,}.{remark}"
