"""A run's folder: how it is made, opened and written.

run.json      the record: settings, data, tokenizer and model the run was started with, sealed by its own SHA-256
config.toml   the settings again, with all defaults written out, for people to read
tokenizer/    a copy, so that the model can be used on a machine that does not have the data
lock          while a process trains in the folder; see run_lock.py
checkpoints/  see checkpoint.py and run_checkpoints.py
scores.json   the validation losses so far, sealed: they show which checkpoint is the best; see results.py
result.json   the last evaluation and samples, once the run is over; see results.py
logs/         for TensorBoard; see monitor.py
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from trainer.config.file import (
    check_resumable,
    check_same_run,
    differing_settings,
    make_config,
    parse_config,
    shortened,
    split_step,
    whole_number,
    with_kept_changes,
)
from trainer.config.settings import Config
from trainer.errors import UserError, quoted
from trainer.model.build import GPT_MODEL, BuildModel, model_name
from trainer.system.manifest import DamagedError, unsealed, write_sealed
from trainer.system.storage import (
    Location,
    Url,
    copy_folder,
    locate,
    reason_and_remedy,
    remove_file,
    remove_folder,
)
from trainer.system.whole import make_folder, sync_tree, write_whole

if TYPE_CHECKING:
    from trainer.data.shards import PreparedData

RECORD = "run.json"
CONFIG = "config.toml"
SCORES = "scores.json"
RESULT = "result.json"
FORMAT = 2
# Marks a folder in which a first checkpoint is written before the record. Without it checkpoints/ is the user's.
_BEGUN = "begun"
# What a process that was killed while it made a run's folder can have left. A folder with only these is free.
_MADE_BEFORE_RECORD = {"lock", "tokenizer", f"{RECORD}.partial", _BEGUN, f"{_BEGUN}.partial"}

CheckpointStep = int | Literal["best"]


class RunFolder:
    """The folder of an existing run.

    Args:
        path: a folder on a disk, or a URL such as gs://bucket/run.
        overrides: `section.key=value` strings for the settings that a resumed run may change.

    Attributes:
        path: the folder.
        facts: the entries of the record.
        config: the run's configuration, with the overrides.
        recorded: the run's configuration as its record has it.
        is_new: whether this process has made the folder.

    Raises:
        UserError: the folder holds no run, one of its files was damaged or changed, or an override would change the
            result.
    """

    def __init__(self, path: str | Location, overrides: Sequence[str] = ()) -> None:
        check_resumable(overrides, path)
        self.is_new = False
        self.path = locate(path)
        self.facts = self._read_record()
        settings = self.facts["config"]
        try:
            self.recorded = make_config(settings)
        except UserError as error:
            raise UserError(
                f"{self.path / RECORD} was written by another release of trainer, whose settings this one does not "
                f"have: {error} Use that release to go on."
            ) from None
        self._check_config_file(self.recorded)
        self.config = make_config(settings, overrides)
        with_kept_changes(self.config, self.recorded)  # What will be recorded has to be a config, too.

    @classmethod
    def of(cls, config: Config) -> Self:
        """Opens the run in a config's folder. The settings that a resumed run may change are the config's.

        If the config's micro-batch is "auto", the size that the run has found on the device stays.

        Raises:
            UserError: the folder holds no run, or its run was started with other settings.
        """
        run = cls(config.run_folder)
        check_same_run(config, run.config)
        found = run.config.train.fixed_micro_batch_size()
        if config.train.micro_batch_size == "auto" and found is not None:
            config = config.with_micro_batch_size(found)
        run.config = config
        with_kept_changes(config, run.recorded)
        return run

    @classmethod
    def create(
        cls,
        config: Config,
        prepared: "PreparedData",
        build_model: BuildModel | None = None,
        write_first: Callable[[Location, dict[str, Any]], None] | None = None,
    ) -> Self:
        """Makes the folder of a new run. If other processes could do so too, call it under `run_lock.only_run_in`.

        Args:
            config: the run's configuration.
            prepared: the run's data.
            build_model: builds the run's model; None: the GPT that config describes.
            write_first: writes the run's first checkpoint, given the folder and the record, and adds to the record;
                None: the run begins with random weights.

        Raises:
            UserError: the folder is there already and not empty, or cannot be written.
            DamagedError: write_first cannot read what the run begins with.
        """
        import keras
        import tensorflow as tf

        check_is_free(config)
        path = locate(config.run_folder)
        facts = {
            "format": FORMAT,
            "config": config.model_dump(mode="json", exclude_none=True),
            "model": model_name(build_model),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "data_fingerprint": prepared.fingerprint,
            "tokenizer_fingerprint": prepared.tokenizer_fingerprint,
            **place_of(prepared, path),
        }
        try:
            make_folder(path)
            if (path / _BEGUN).is_file():  # A process was killed here.
                _undo(path)
            if write_first is not None:
                # Before the record: a run that has one never begins with random weights.
                write_whole(path / _BEGUN, "")
                write_first(path, facts)
            copy_folder(prepared.folder / "tokenizer", path / "tokenizer")
            if isinstance(path, Path):
                sync_tree(path / "tokenizer")
            _write_record(path, facts)  # A folder with a record is a run: the rest can be made from it.
            remove_file(path / _BEGUN)
            write_whole(path / CONFIG, config.to_toml())
        except BaseException as error:
            _undo(path)
            # The parent's checkpoint, which write_first reads, can be damaged: another folder would not help.
            if isinstance(error, DamagedError) or not isinstance(error, (OSError, UserError)):
                raise
            raise UserError(
                f"run_folder={config.run_folder!r} cannot be written: {reason_and_remedy(error)}, or choose another "
                "folder; nothing half-written is left."
            ) from None
        run = cls(path)
        run.is_new = True
        return run

    @property
    def first_step(self) -> int:
        """The step that the run began with: that of the parent's checkpoint for a fork, otherwise 0."""
        return int(self.facts.get("first_step", 0))

    @property
    def total_steps(self) -> int | None:
        """The number of steps by the record; None if it is by epochs and no process has recorded their steps yet."""
        return self.recorded.train.total_steps or self.facts.get("epochs_steps")

    @property
    def data_offset(self) -> int:
        """The place in the data of the first example of step 0, counted in examples; see `training_batches`. It is not
        0 only in a fork with other data, which begin at the fork, or with another batch size.
        """
        return int(self.facts.get("data_offset", 0))

    @contextlib.contextmanager
    def undone_if_it_fails(self) -> Iterator[None]:
        """Removes what `create` made if the block raises an error, so that the same command can be tried again. No step
        may be taken in the block.
        """
        try:
            yield
        except Exception:
            if self.is_new:
                _undo(self.path)
            raise

    def _read_record(self) -> dict[str, Any]:
        file = self.path / RECORD
        try:
            facts = unsealed(file.read_bytes(), file)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path} is not a run folder: it has no {RECORD}.{_runs_beside(self.path)}") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {reason_and_remedy(error)}.") from None
        except DamagedError as error:
            raise UserError(
                f"{error} Bring it back from a copy of the run: it names the data and settings of the checkpoints. A "
                f"folder that has no checkpoints can be deleted: {self.path}"
            ) from None
        if facts.get("format") != FORMAT:
            raise UserError(f"{file} is of format {facts.get('format')}, not {FORMAT}; use the release that wrote it.")
        return facts

    def _check_config_file(self, started: Config) -> None:
        """Refuses a config.toml that differs from the record: a person has changed it, or it is damaged."""
        file = self.path / CONFIG
        restore = f"Delete that file: it is written again from {RECORD}, which has the settings of the run"
        try:
            content = file.read_bytes()
            if not content:
                raise UserError("it has 0 bytes")
            found = parse_config(content.decode("utf-8-sig"), str(file))
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{file} cannot be read: {reason_and_remedy(error)}.") from None
        except ValueError as error:  # It is not UTF-8, not TOML, or a setting is not allowed.
            reason = str(error).removeprefix(f"{file}: ").removesuffix(".")
            raise UserError(f"{file} is damaged: {reason}. {restore}.") from None
        changed, may_change = differing_settings(found, started), differing_settings(found, started, resumable=True)
        # `record_micro_batch_size` writes config.toml before the record; a process killed in between leaves this.
        if started.train.micro_batch_size == "auto" and found.train.micro_batch_size != "auto":
            may_change = differing_settings(found.with_micro_batch_size("auto"), started, resumable=True)
        if changed:
            raise UserError(
                f"{file} was changed after the run was started: {shortened(changed + may_change)}. A run goes on with "
                f"the settings it was started with. {restore}; for other settings start a new run."
            )
        if may_change:
            keys = " ".join(f"{line.partition('=')[0]}=..." for line in may_change[:3])
            raise UserError(
                f"{file} was changed after the run was started: {shortened(may_change)}. {restore}; and give what is "
                f"to change as overrides: trainer train --resume {quoted(self.path)} {keys}"
            )

    def record(self, **facts: Any) -> None:
        """Adds facts to the run's record.

        Raises:
            UserError: the record cannot be written.
        """
        try:
            _write_record(self.path, self.facts | facts)
        except OSError as error:
            raise UserError(f"{self.path / RECORD} cannot be written: {reason_and_remedy(error)}.") from None
        self.facts = self.facts | facts

    def write_config_file(self) -> None:
        """Writes config.toml from the record, if it is not there, and removes what a killed process has left.

        Raises:
            UserError: the file cannot be written.
        """
        with contextlib.suppress(OSError, UserError):
            remove_file(self.path / _BEGUN)
        if not (self.path / CONFIG).is_file():
            self._write_config_file(make_config(self.facts["config"]))

    def _write_config_file(self, config: Config) -> None:
        file = self.path / CONFIG
        try:
            write_whole(file, config.to_toml())
        except OSError as error:
            raise UserError(f"{file} cannot be written: {reason_and_remedy(error)}.") from None

    def record_config(self, config: Config, **facts: Any) -> None:
        """Writes another config into the record, with more facts, and into config.toml.

        Raises:
            UserError: the record or the config cannot be written.
        """
        # In this order: a process that is killed between two of these leaves no config.toml that differs.
        try:
            remove_file(self.path / CONFIG)
        except OSError as error:
            raise UserError(f"{self.path / CONFIG} cannot be written: {reason_and_remedy(error)}.") from None
        self.record(config=config.model_dump(mode="json", exclude_none=True), **facts)
        self.recorded = config
        self._write_config_file(config)

    def record_micro_batch_size(self, size: int) -> None:
        """Writes the micro-batch that was found for "auto" into the run's config, if "auto" is the run's own setting.

        Raises:
            UserError: the config cannot be written.
        """
        started = self.recorded
        if started.train.micro_batch_size != "auto":
            return  # "auto" is an override, which is valid only for this process.
        started = started.with_micro_batch_size(size)
        self._write_config_file(started)
        self.record(config=started.model_dump(mode="json", exclude_none=True))
        self.recorded = started

    def check_model(self, build_model: BuildModel | None) -> None:
        """Raises UserError if the run's model is foreign and build_model is missing, or is the GPT and it is given."""
        model = self.facts["model"]
        if model != GPT_MODEL and build_model is None:
            raise UserError(
                f"{self.path} trains a foreign model, which {model} built, and not the GPT of its config. Go on from "
                f"Python, with that function: trainer.resume({str(self.path)!r}, build_model); trainer.generate and "
                "trainer.score take build_model, too."
            )
        if model == GPT_MODEL and build_model is not None:
            raise UserError(
                f"{self.path} trains the GPT of its config, and not a model of {model_name(build_model)}; leave out "
                "build_model, or start a new run with it."
            )


def steps_in(checkpoints: Location) -> list[int]:
    """Returns the steps that have a folder in the folder of a run's checkpoints, oldest first.

    Raises:
        UserError: the disk or the store cannot be read.
    """
    try:
        if not checkpoints.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d+)", path.name) for path in checkpoints.iterdir())
        return sorted(int(match.group(1)) for match in names if match)
    except OSError as error:
        raise UserError(f"{checkpoints} cannot be listed: {reason_and_remedy(error)}.") from None


def check_has_checkpoint(run_folder: Location, step: int) -> None:
    """Raises UserError if a step has no folder among the checkpoints of a run."""
    steps = steps_in(run_folder / "checkpoints")
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{run_folder} has no checkpoint of step {step}; it has: {there}.")


def run_and_step(path: str, step: str | int | None = None) -> tuple[str, CheckpointStep | None]:
    """Returns a run's folder and the step of the checkpoint that the user means; None for the newest checkpoint.

    Args:
        path: a run's folder, RUN@1000 or RUN@best, or the folder of a checkpoint: RUN/checkpoints/step_000001000.
        step: a number of steps, or "best"; None: the step in path, if there is one.

    Raises:
        UserError: step is not a number of steps, or path and step name different checkpoints.
    """
    given: CheckpointStep | None = "best" if step == "best" else whole_number(str(step))
    if step is not None and given is None:
        raise UserError(f"step={step!r} is not a step of a checkpoint; give a number of steps, or 'best'.")
    folder, in_path = split_step(str(path))
    if in_path is None:
        return folder, given
    named: CheckpointStep = "best" if in_path == "best" else int(in_path)
    if given not in (None, named):
        raise UserError(f"{path} and step={step!r} are two different checkpoints; leave out one of them.")
    return folder, named


def find_run(config: Config, or_resume: bool) -> RunFolder | None:
    """Returns the run to go on with, or None if a new one is to be made.

    Args:
        config: the configuration, which names the run's folder.
        or_resume: whether a run that is in the folder is to go on.

    Raises:
        UserError: the folder holds a run, and or_resume is False or the run's settings are different; or it holds
            something else.
    """
    if or_resume and (locate(config.run_folder) / RECORD).is_file():
        return RunFolder.of(config)
    check_is_free(config)
    return None


def check_is_free(config: Config) -> None:
    """Raises UserError if the folder of a new run is taken."""
    path = locate(config.run_folder)
    # List first, then look for the record: another process may be making a run there, and it writes the record before
    # any file that is not in _MADE_BEFORE_RECORD.
    names: set[str] = set()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = {child.name for child in path.iterdir()}
    if (path / RECORD).is_file():
        raise UserError(
            f"run_folder={config.run_folder!r} already holds a run. Go on with it: trainer train --resume "
            f"{quoted(path)}; or start another beside it with the override {quoted(f'run_folder={path}-2')}; or delete "
            "it."
        )
    # A process that was killed has left its lock, too. Without a lock, a tokenizer/ is a file of the user.
    may_be_there = _MADE_BEFORE_RECORD if "lock" in names or isinstance(path, Url) else set()
    if _BEGUN in names:
        may_be_there = may_be_there | {"checkpoints"}
    if path.is_file() or not names <= may_be_there:
        raise UserError(f"run_folder={config.run_folder!r} is there already and is not a run; choose another folder.")


def _undo(path: Location) -> None:
    """Removes the files of a run in which no step was taken."""
    for name in ("logs", "checkpoints"):
        remove_folder(path / name)
    for name in (CONFIG, f"{CONFIG}.partial", RECORD, f"{RECORD}.partial", f"{_BEGUN}.partial", _BEGUN):
        remove_file(path / name)
    # Last: `check_is_free` accepts a folder in which only the tokenizer is left.
    remove_folder(path / "tokenizer")


def _write_record(path: Location, facts: dict[str, Any]) -> None:
    write_sealed(path / RECORD, facts)


def place_of(prepared: "PreparedData", path: Location) -> dict[str, str]:
    """Returns the place of prepared data, also relative to the run's folder: a whole project may be moved."""
    if prepared.stored_in is not None:
        return {"prepared_folder": prepared.stored_in}
    place = {"prepared_folder": str(prepared.folder.resolve())}
    if isinstance(path, Path):
        place["prepared_folder_from_run"] = os.path.relpath(prepared.folder.resolve(), path.resolve())
    return place


def _runs_beside(path: Location) -> str:
    if isinstance(path, Url):
        return ""
    within = [parent / RECORD for parent in path.parents[:2] if (parent / RECORD).is_file()]
    near = within or [*path.glob(f"*/{RECORD}"), *path.parent.glob(f"*/{RECORD}")]
    found = sorted(str(record.parent) for record in near)
    return f" Runs near it: {', '.join(found[:5])}." if found else ""
