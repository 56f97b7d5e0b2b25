"""A run's folder: its config, tokenizer and checkpoints, and how the model comes back from them.

run.json      the record: settings, data, tokenizer and model the run was started with, sealed by its own SHA-256
config.toml   the settings again, every default written out, for people to read
tokenizer/    a copy, so that the model can be used where the data is not
checkpoints/  see training/checkpoint.py
scores.json   the validation losses so far, sealed; by them the best checkpoint is known
logs/         for TensorBoard
result.json   the last evaluation and samples, once the run is over
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from trainer.config import Config
from trainer.config_file import (
    check_resumable,
    check_same_run,
    differing_settings,
    make_config,
    parse_config,
    shortened,
    whole_number,
)
from trainer.errors import UserError, quoted
from trainer.system.manifest import DamagedError, unsealed, write_sealed
from trainer.system.storage import (
    Location,
    Url,
    copy_folder,
    locate,
    on_disk,
    reason_and_remedy,
    remove_file,
    remove_folder,
)
from trainer.system.whole import make_folder, sync_tree, write_whole

if TYPE_CHECKING:
    import keras

    from trainer.data.shards import PreparedData
    from trainer.data.tokenizer import Tokenizer
    from trainer.training.checkpoint import Checkpoint, Checkpoints
    from trainer.training.evaluation import Evaluation

RECORD = "run.json"
CONFIG = "config.toml"
SCORES = "scores.json"
RESULT = "result.json"
FORMAT = 2
# What a process that died while it made a run's folder can have left: no run yet, and nobody else's.
_MADE_BEFORE_RECORD = {"lock", "tokenizer", f"{RECORD}.partial"}

GPT_MODEL = "gpt"

BuildModel = Callable[[Config, int], "keras.Model"]
Step = int | Literal["best"]


class RunFolder:
    """The folder of a run.

    Args:
        path: made by `create`; a folder on a disk, or a URL such as gs://bucket/run.
        overrides: `section.key=value` strings, of what a resumed run may change.

    Raises:
        UserError: there is no run, a file of it was damaged or changed, or an override would change what comes out.
    """

    def __init__(self, path: str | Location, overrides: Sequence[str] = ()) -> None:
        check_resumable(overrides)
        self.is_new = False
        self.path = locate(path)
        self.facts = self._read_record()
        settings = self.facts["config"]
        try:
            started = make_config(settings)
        except UserError as error:
            raise UserError(
                f"{self.path / RECORD} was written by another release of trainer, whose settings this one does not "
                f"know: {error} Use that release to go on."
            ) from None
        self._check_config_file(started)
        self.config = make_config(settings, overrides)

    @classmethod
    def of(cls, config: Config) -> Self:
        """Opens the run in a config's folder, with what a resumed run may change as the config has it.

        Where the config leaves the micro-batch to the device, what the run has found on it stays.

        Raises:
            UserError: there is no run, or it was started with other settings.
        """
        run = cls(config.run_folder)
        check_same_run(config, run.config)
        found = run.config.train.fixed_micro_batch_size()
        if config.train.micro_batch_size == "auto" and found is not None:
            config = config.with_micro_batch_size(found)
        run.config = config
        return run

    @classmethod
    def create(cls, config: Config, prepared: "PreparedData", build_model: BuildModel | None = None) -> Self:
        """Makes the folder of a new run. If other processes could do so too, call it under `run_lock.only_run_in`.

        Raises:
            UserError: the folder is there already and not empty, or cannot be written.
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
            **_place_of(prepared, path),
        }
        try:
            make_folder(path)
            copy_folder(prepared.folder / "tokenizer", path / "tokenizer")
            if isinstance(path, Path):
                sync_tree(path / "tokenizer")
            _write_record(path, facts)  # A folder with a record is a run: the rest can be made from it.
            write_whole(path / CONFIG, config.to_toml())
        except BaseException as error:
            _undo(path)
            if not isinstance(error, (OSError, UserError)):
                raise
            raise UserError(
                f"run_folder={config.run_folder!r} cannot be written: {reason_and_remedy(error)}, or choose another "
                "folder; nothing half-written is left."
            ) from None
        run = cls(path)
        run.is_new = True
        return run

    @contextlib.contextmanager
    def undone_if_it_fails(self) -> Iterator[None]:
        """Removes what `create` made if the block, which takes no step, raises an error, for the next try."""
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
                f"{error} Bring it back from a copy of the run: without it nothing says which data and settings the "
                f"checkpoints are of. A folder that has no checkpoints can be deleted: {self.path}"
            ) from None
        if facts.get("format") != FORMAT:
            raise UserError(f"{file} is of format {facts.get('format')}, not {FORMAT}; use the release that wrote it.")
        return facts

    def _check_config_file(self, started: Config) -> None:
        """Refuses a config.toml that says other than the record: a person changed it, or a disk did."""
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
        except ValueError as error:  # Of UTF-8 or of a setting.
            reason = str(error).removeprefix(f"{file}: ").removesuffix(".")
            raise UserError(f"{file} is damaged: {reason}. {restore}.") from None
        changed, may_change = differing_settings(found, started), differing_settings(found, started, resumable=True)
        # A process that was killed between writing the one and the other leaves this difference.
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

    def keep(self, **facts: Any) -> None:
        """Adds facts to the run's record.

        Raises:
            UserError: it cannot be written.
        """
        try:
            _write_record(self.path, self.facts | facts)
        except OSError as error:
            raise UserError(f"{self.path / RECORD} cannot be written: {reason_and_remedy(error)}.") from None
        self.facts = self.facts | facts

    def write_config_file(self) -> None:
        """Writes config.toml from the record, if it is not there.

        Raises:
            UserError: it cannot be written.
        """
        if not (self.path / CONFIG).is_file():
            self._write_config_file(make_config(self.facts["config"]))

    def _write_config_file(self, config: Config) -> None:
        file = self.path / CONFIG
        try:
            write_whole(file, config.to_toml())
        except OSError as error:
            raise UserError(f"{file} cannot be written: {reason_and_remedy(error)}.") from None

    def keep_micro_batch_size(self, size: int) -> None:
        """Writes what "auto" came to into the run's config, where that leaves it open.

        Raises:
            UserError: it cannot be written.
        """
        started = make_config(self.facts["config"])
        if started.train.micro_batch_size != "auto":
            return  # "auto" is an override, which like any other counts for this process alone.
        started = started.with_micro_batch_size(size)
        self._write_config_file(started)
        self.keep(config=started.model_dump(mode="json", exclude_none=True))

    def check_model(self, build_model: BuildModel | None) -> None:
        """Raises UserError if the run's model is foreign and nobody gives it, or is the GPT and somebody does."""
        model = self.facts["model"]
        if model != GPT_MODEL and build_model is None:
            raise UserError(
                f"{self.path} trains a model of its own, which {model} built, and not the GPT of its config. Go on "
                f"from Python, with that function: trainer.resume({str(self.path)!r}, build_model); trainer.generate "
                "and trainer.score take build_model, too."
            )
        if model == GPT_MODEL and build_model is not None:
            raise UserError(
                f"{self.path} trains the GPT of its config, and not a model of {model_name(build_model)}; leave out "
                "build_model, or start a new run with it."
            )

    def check_first_batch(self, digest: str, say: Callable[[str], None]) -> None:
        """Keeps what the run's first batch is, or compares it with what it was when the run was started.

        The order of the examples rests on an operation of TensorFlow, which another release may change.

        Args:
            digest: SHA-256 of the first batch.
            say: prints a line, if the releases differ and the batch does not.

        Raises:
            UserError: it is another batch: the run would see examples twice and others never.
        """
        import keras
        import tensorflow as tf

        before, now = (
            self._releases(self.facts),
            self._releases({"tensorflow": tf.__version__, "keras": keras.__version__}),
        )
        if "first_batch" not in self.facts:
            self.keep(first_batch=digest)
        if self.facts["first_batch"] != digest:
            raise UserError(
                f"{self.path}: the batches of this run come in another order here. It was started with {before}; this "
                f"is {now}. Go on with the releases of then, trainer's own included, or start a new run."
            )
        if before != now:
            say(
                f"{self.path} was started with {before}; this is {now}. The batches are the same; sums may be rounded "
                "in another way."
            )

    @staticmethod
    def _releases(facts: dict[str, Any]) -> str:
        return f"TensorFlow {facts['tensorflow']} and Keras {facts['keras']}"

    def data_folder(self) -> Location:
        """Returns where the data is that the run was started on, by its fingerprint: where it was then, or if the
        project was moved or mounted elsewhere, in the same place relative to the run, in data.prepared_folder, or
        beside the run. If it is in none of these, the place where it was, as long as there is a folder.

        Raises:
            UserError: it is gone.
        """
        from trainer.data.shards import read_manifest

        recorded = locate(self.facts["prepared_folder"])
        for folder in self._data_folders():
            try:
                if read_manifest(folder)["fingerprint"] == self.facts["data_fingerprint"]:
                    return folder
            except UserError:
                continue  # Damaged, or in a store that does not answer. The place where it was is looked at below.
        with contextlib.suppress(PermissionError):  # The place where it was can be another user's here.
            if recorded.is_dir():
                return recorded
        homes = ", ".join(dict.fromkeys(str(home) for home in self._data_homes()))
        raise UserError(
            f"{self.path} was started on the prepared data {recorded}, which is gone. Prepare the same text with the "
            f"same settings again (trainer prepare {quoted(self.path / CONFIG)}), or bring the folder {recorded.name} "
            f"back into one of {homes}, or name another folder that has it, data.prepared_folder=FOLDER after `trainer "
            f"train --resume {quoted(self.path)}` or `trainer evaluate {quoted(self.path)}`. Or start a new run."
        )

    def _data_homes(self) -> Iterator[Location]:
        """Yields the folders that the prepared data may be in."""
        yield locate(self.config.data.prepared_folder)
        if isinstance(self.path, Path):
            path = self.path.resolve()
            if relative := self.facts.get("prepared_folder_from_run"):
                yield Path(os.path.normpath(path / relative)).parent
            yield from (path.parent, path.parent / "prepared", path.parent.parent / "prepared")

    def _data_folders(self) -> Iterator[Location]:
        from trainer.data.shards import MANIFEST

        recorded = locate(self.facts["prepared_folder"])
        yield recorded
        homes = list(dict.fromkeys(self._data_homes()))
        yield from (home / recorded.name for home in homes)
        yield locate(self.config.data.prepared_folder)  # Which a user may have taken for the name of this very folder.
        for home in homes:
            if isinstance(home, Path):
                yield from (manifest.parent for manifest in sorted(home.glob(f"*/{MANIFEST}")))

    def prepared(self, prepare_again: "Callable[[], PreparedData] | None" = None) -> "PreparedData":
        """Returns the data the run was started on.

        Args:
            prepare_again: called where it is gone; left out, that is an error.

        Raises:
            UserError: it is gone, or is not the same.
        """
        from trainer.data.prepare import fetch
        from trainer.data.shards import load_prepared

        try:
            folder = self.data_folder()
        except UserError:
            if prepare_again is None:
                raise
            prepared = prepare_again()
        else:
            prepared = fetch(folder) if isinstance(folder, Url) else load_prepared(folder)
        if prepared.fingerprint != self.facts["data_fingerprint"]:
            raise UserError(
                f"{prepared.folder} is not the data {self.path} was started on; start a new run for other data."
            )
        return prepared

    def keep_place_of(self, prepared: "PreparedData") -> None:
        """Keeps where the data is, if that is not where it was.

        Raises:
            UserError: it cannot be written.
        """
        place = _place_of(prepared, self.path)
        if any(self.facts.get(key) != value for key, value in place.items()):
            self.keep(**place)

    def tokenizer(self) -> "Tokenizer":
        """Returns the run's tokenizer.

        Raises:
            UserError: it is damaged, or is another one.
        """
        from trainer.data.tokenizer import load_tokenizer

        try:
            with on_disk(self.path / "tokenizer") as folder:
                tokenizer = load_tokenizer(folder)
            if tokenizer.fingerprint != self.facts["tokenizer_fingerprint"]:
                raise UserError(f"{self.path / 'tokenizer'} is not the tokenizer this run was started with.")
        except (OSError, UserError) as error:
            reason = str(error).partition("; delete what holds it")[0].rstrip(".")
            raise UserError(
                f"{reason}. Copy it again from the data of the run, whose folder has the same tokenizer/: "
                f"{self.facts['prepared_folder']}"
            ) from None
        return tokenizer

    def keep_result(
        self, step: int, evaluation: "Evaluation", samples: dict[str, str], say: Callable[[str], None] = print
    ) -> None:
        """Writes what came of the run after its last step; says so if it cannot be written, as all else is."""
        result = {"step": step, "evaluation": evaluation._asdict(), "samples": samples}
        try:
            write_sealed(self.path / RESULT, result)
        except (OSError, UserError) as error:
            say(f"{self.path / RESULT} cannot be written: {reason_and_remedy(error)}. The checkpoint is whole.")

    def result(self, step: int) -> "tuple[Evaluation, dict[str, str]] | None":
        """Returns the evaluation and the samples that `keep_result` wrote for this step; None if they are not there, or
        not as this release writes them.
        """
        from trainer.training.evaluation import Evaluation

        file = self.path / RESULT
        if not file.is_file():
            return None
        try:
            result = unsealed(file.read_bytes(), file)
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in result["evaluation"].items()
            }
            return (Evaluation(**values), dict(result["samples"])) if result["step"] == step else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # The run is scored again.

    def scores(self) -> dict[int, float]:
        """Returns the validation losses so far, by step.

        Raises:
            UserError: their file is damaged.
        """
        file = self.path / SCORES
        try:
            losses = unsealed(file.read_bytes(), file).get("losses")
            if not isinstance(losses, dict):
                raise DamagedError(f"{file} is damaged: it is another file of trainer's, without losses.")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"{file} cannot be read: {reason_and_remedy(error)}.") from None
        except DamagedError as error:
            raise UserError(
                f"{error} Bring it back from a copy, or delete it: the best checkpoint is then looked for among those "
                "that are scored from here on."
            ) from None
        return {int(step): float(loss) for step, loss in losses.items()}

    def keep_scores(self, scores: dict[int, float]) -> None:
        """Writes the validation losses so far.

        Raises:
            UserError: they cannot be written.
        """
        file = self.path / SCORES
        try:
            write_sealed(file, {"losses": {str(step): loss for step, loss in scores.items()}})
        except OSError as error:
            raise UserError(f"{file} cannot be written: {reason_and_remedy(error)}.") from None

    def checkpoints(self, say: Callable[[str], None] = print) -> "Checkpoints":
        """Returns the run's checkpoints.

        Raises:
            UserError: the file of its scores is damaged.
        """
        from trainer.training.checkpoint import Checkpoints

        config = self.config.checkpoint
        return Checkpoints(
            self.path / "checkpoints",
            config.keep_last,
            say,
            config.max_failures,
            self.scores(),
            self._fault_of,
            self._note_saved,
        )

    def checkpoint_facts(self) -> dict[str, Any]:
        """Returns what a checkpoint's manifest says of its run."""
        kept = {key: self.facts[key] for key in _KEPT_IN_CHECKPOINTS}
        return kept | {"config": self.config.model_dump(mode="json")}

    def _fault_of(self, manifest: dict[str, Any]) -> str | None:
        """Returns why a checkpoint is not one of this run, by its manifest; None if it is."""
        differing = [
            f"{key}={manifest[key]!r} (this run's is {self.facts[key]!r})"
            for key in _KEPT_IN_CHECKPOINTS
            if manifest.get(key, self.facts[key]) != self.facts[key]
        ]
        if "config" in manifest:
            try:
                differing += differing_settings(make_config(self.facts["config"]), make_config(manifest["config"]))
            except UserError as error:
                return f"it was saved with settings that this release does not know: {error}"
        return f"it is of another run: {shortened(differing)}." if differing else None

    def _note_saved(self) -> None:
        if not self.facts.get("has_saved"):
            self.keep(has_saved=True)

    def checkpoint(self, checkpoints: "Checkpoints", step: Step | None = None) -> "Checkpoint | None":
        """Returns a checkpoint of the run.

        Args:
            checkpoints: of `checkpoints`.
            step: which one: a step, or "best" for the one with the lowest validation loss; None: the newest.

        Returns:
            The checkpoint, or None if the newest is asked for and the run has never saved one.

        Raises:
            UserError: there is no such checkpoint, or it does not verify; or the run has saved some, and all are gone.
        """
        if step is None:
            newest = checkpoints.latest()
            if newest is None and self.facts.get("has_saved"):
                raise UserError(
                    f"{checkpoints.folder} is empty, though this run has saved checkpoints. Bring them back (is a disk "
                    f"not mounted?), or begin again in another folder: trainer train {quoted(self.path / CONFIG)} "
                    f"{quoted(f'run_folder={self.path}-2')}"
                )
            return newest
        if step == "best":
            step = checkpoints.best_step()
            if step is None:
                raise UserError(
                    f"{self.path}: no checkpoint was scored on the validation text, so none is known to be the best; "
                    "a run with evaluation.every_steps scores them as it trains."
                )
        if step not in checkpoints.steps():
            there = ", ".join(map(str, checkpoints.steps())) or "none"
            raise UserError(f"{self.path} has no checkpoint of step {step}; it has: {there}.")
        try:
            return checkpoints.of_step(step)
        except UserError as error:
            raise UserError(f"{self.path}: the checkpoint of step {step} cannot be used: {error}") from None

    def load_model(
        self, build_model: BuildModel | None = None, say: Callable[[str], None] = print, step: Step | None = None
    ) -> tuple["keras.Model", "Checkpoint"]:
        """Builds the model and gives it the weights of a checkpoint.

        Args:
            build_model: as it was given to `train`.
            say: prints a line.
            step: which checkpoint: a step, or "best" for the one with the lowest validation loss; None: the newest.

        Raises:
            UserError: there is no such checkpoint that verifies, or it is of another model.
        """
        from trainer.training.checkpoint import assign, named_variables

        self.check_model(build_model)
        while True:
            checkpoints = self.checkpoints(say)
            seen = checkpoints.steps(), checkpoints.scores
            try:
                checkpoint = self.checkpoint(checkpoints, step)
                if checkpoint is None:
                    raise UserError(
                        f"{self.path} has no checkpoint yet; train on with: trainer train --resume {quoted(self.path)}"
                    )
                weights = checkpoint.arrays("weights")
                break
            except UserError:
                # A training beside it may have replaced it by a newer one, or a better one, since it was listed.
                if seen == (checkpoints.steps(), self.scores()):
                    raise
        tokenizer = self.tokenizer()
        model = make_model(build_model, self.config, tokenizer.vocabulary_size, tokenizer.bos_id)
        assign(named_variables(model), weights, checkpoint.folder)
        return model, checkpoint


# What a checkpoint's manifest repeats of the run's record.
_KEPT_IN_CHECKPOINTS = ("data_fingerprint", "tokenizer_fingerprint", "model")


def model_name(build_model: BuildModel | None) -> str:
    """Returns what a run's record calls its model: GPT_MODEL, or the module and name of the function that builds it."""
    if build_model is None:
        return GPT_MODEL
    if isinstance(build_model, functools.partial):
        return model_name(build_model.func)
    named = build_model if hasattr(build_model, "__qualname__") else type(build_model)
    return f"{named.__module__}.{named.__qualname__}"


def run_and_step(path: str, step: str | int | None = None) -> tuple[str, Step | None]:
    """Returns the run's folder and the step of its checkpoint that are meant.

    Args:
        path: a run's folder, or that of one of its checkpoints: RUN/checkpoints/step_000001000.
        step: a step, or "best"; None: the path's, or the newest.

    Raises:
        UserError: step is neither, or path and step name different ones.
    """
    asked: Step | None = "best" if step == "best" else whole_number(str(step))
    if step is not None and asked is None:
        raise UserError(f"step={step!r} is not a checkpoint's; give a number of steps, or 'best'.")
    named = re.fullmatch(r"(?:(.*)/)?checkpoints/step_([0-9]{1,18})/*", str(path))
    if named is None:
        return str(path), asked
    if asked is not None and asked != int(named[2]):
        raise UserError(f"{path} and step={step!r} are two checkpoints; leave out one of them.")
    return named[1] or ".", int(named[2])


def make_model(build_model: BuildModel | None, config: Config, vocabulary_size: int, bos_id: int) -> "keras.Model":
    """Builds the model of a run, with initial weights: a foreign one where build_model makes it, otherwise the GPT that
    the config describes.

    Raises:
        UserError: build_model returns no Keras model, or one that does not give a logit for each token.
    """
    if build_model is None:
        return build_gpt(config, vocabulary_size, bos_id)
    import keras

    model = build_model(config, vocabulary_size)
    if not isinstance(model, keras.Model):
        raise UserError(f"build_model returned {model!r}; return a Keras model.")
    length = config.train.sequence_length
    # A symbolic call, which computes nothing: Sequential without an Input, and a subclass of Model, make their weights
    # when they are first called.
    logits = model(keras.Input([length], dtype="int32"))
    shape = getattr(logits, "shape", None)
    if shape is None or tuple(shape) != (None, length, vocabulary_size):
        raise UserError(
            f"build_model's model turns tokens [batch, {length}] into {logits if shape is None else list(shape)}; it "
            f"must return logits [batch, sequence, vocabulary], here [None, {length}, {vocabulary_size}]."
        )
    return model


def build_gpt(config: Config, vocabulary_size: int, bos_id: int) -> "keras.Model":
    """Builds the GPT of a config, with initial weights."""
    from trainer.model.gpt import GPT

    train = config.train
    return GPT(config.model, vocabulary_size, train.sequence_length, train.seed, train.precision, bos_id)


def find_run(config: Config, or_resume: bool) -> RunFolder | None:
    """Returns the run to go on with, or None where a new one is to be made.

    Raises:
        UserError: the folder is taken: without or_resume by any run, with it by a run with other settings.
    """
    if or_resume and (locate(config.run_folder) / RECORD).is_file():
        return RunFolder.of(config)
    check_is_free(config)
    return None


def check_is_free(config: Config) -> None:
    """Raises UserError where a new run's folder is taken."""
    path = locate(config.run_folder)
    # Listed before the record is looked for: another process may be making a run there, and makes the record first of
    # all that is not in _MADE_BEFORE_RECORD.
    names: set[str] = set()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = {child.name for child in path.iterdir()}
    if (path / RECORD).is_file():
        raise UserError(
            f"run_folder={config.run_folder!r} already holds a run. Go on with it: trainer train --resume "
            f"{quoted(path)}; or start another beside it with the override {quoted(f'run_folder={path}-2')}; or delete "
            "it."
        )
    # A process that was killed left its lock, too. Without one, a tokenizer/ is somebody's own.
    may_be_there = _MADE_BEFORE_RECORD if "lock" in names or isinstance(path, Url) else set()
    if path.is_file() or not names <= may_be_there:
        raise UserError(f"run_folder={config.run_folder!r} is there already and is no run; choose another folder.")


def _undo(path: Location) -> None:
    """Removes the files of a run in which no step was taken."""
    for name in ("logs", "checkpoints"):
        remove_folder(path / name)
    for name in (CONFIG, f"{CONFIG}.partial", RECORD, f"{RECORD}.partial"):
        remove_file(path / name)
    # Last: this much can be there before a run begins.
    remove_folder(path / "tokenizer")


def _write_record(path: Location, facts: dict[str, Any]) -> None:
    write_sealed(path / RECORD, facts)


def _place_of(prepared: "PreparedData", path: Location) -> dict[str, str]:
    """Returns where prepared data is, and where that is relative to a run: a project may be moved as a whole."""
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
