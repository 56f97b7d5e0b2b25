"""A run's folder: its config, tokenizer and checkpoints, and how the model comes back from them.

config.toml   the resolved config, every default written out
run.json      which prepared data and tokenizer it uses
tokenizer/    a copy, so that the model can be used where the data is not
checkpoints/  see training/checkpoint.py
logs/         for TensorBoard
result.json   the last evaluation and samples, once the run is over
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from trainer.config import Config, UserError, check_resumable, check_same_run, parse_config
from trainer.storage import Location, Url, copy_folder, locate, on_disk, remove_folder, write_whole

if TYPE_CHECKING:
    import keras

    from trainer.data.shards import PreparedData
    from trainer.data.tokenizer import Tokenizer
    from trainer.evaluate import Evaluation
    from trainer.training.checkpoint import Checkpoint, Checkpoints

# What a process that died while it made a run's folder can have left: no run yet, and nobody else's.
_MADE_BEFORE_CONFIG = {"tokenizer", "run.json", "config.toml.partial"}

BuildModel = Callable[[Config, int], "keras.Model"]


class RunFolder:
    """The folder of a run.

    Args:
        path: made by `create`; a folder on a disk, or a URL such as gs://bucket/run.
        overrides: `section.key=value` strings, of what a resumed run may change.

    Raises:
        UserError: there is no run, or an override would change what comes out.
    """

    def __init__(self, path: str | Location, overrides: Sequence[str] = ()) -> None:
        check_resumable(overrides)
        self.path = locate(path)
        for name in ("config.toml", "run.json"):
            if not (self.path / name).is_file():
                raise UserError(f"{self.path} is not a run folder: it has no {name}.{_runs_beside(self.path)}")
        config_file = self.path / "config.toml"
        self.config = parse_config(config_file.read_text(encoding="utf-8"), str(config_file), overrides)
        self.facts: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))

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
    def create(cls, config: Config, prepared: "PreparedData") -> Self:
        """Makes the folder of a new run.

        Raises:
            UserError: it is there already and not empty, or cannot be written.
        """
        path = locate(config.run_folder)
        check_is_free(config)
        facts = {
            "prepared_folder": prepared.stored_in or str(prepared.folder.resolve()),
            "data_fingerprint": prepared.fingerprint,
            "tokenizer_fingerprint": prepared.tokenizer_fingerprint,
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            copy_folder(prepared.folder / "tokenizer", path / "tokenizer")
            (path / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            # Last: a folder with a config is a run.
            write_whole(path / "config.toml", config.to_toml())
        except OSError as error:
            remove_folder(path)
            raise UserError(
                f"run_folder={config.run_folder!r} cannot be written: {error.strerror or error}. Make room, or choose "
                "another folder; nothing half-written is left."
            ) from None
        return cls(path)

    def keep_micro_batch_size(self, size: int) -> None:
        """Writes what "auto" came to into the run's config, where that leaves it open.

        Raises:
            UserError: it cannot be written.
        """
        config_file = self.path / "config.toml"
        started = parse_config(config_file.read_text(encoding="utf-8"), str(config_file))
        if started.train.micro_batch_size != "auto":
            return  # "auto" is an override, which like any other counts for this process alone.
        try:
            write_whole(config_file, started.with_micro_batch_size(size).to_toml())
        except OSError as error:
            raise UserError(f"{config_file} cannot be written: {error.strerror or error}. Make room.") from None

    def prepared(self, prepare_again: "Callable[[], PreparedData] | None" = None) -> "PreparedData":
        """Returns the data the run was started on.

        Args:
            prepare_again: called where it is gone; left out, that is an error.

        Raises:
            UserError: it is gone, or is not the same.
        """
        from trainer.data.prepare import fetch
        from trainer.data.shards import load_prepared

        folder = locate(self.facts["prepared_folder"])
        if folder.is_dir():
            prepared = fetch(folder) if isinstance(folder, Url) else load_prepared(folder)
        elif prepare_again is not None:
            prepared = prepare_again()
        else:
            raise UserError(
                f"{self.path} was started on the prepared data {folder}, which is gone. Prepare the same text with the "
                f"same settings again (trainer prepare {self.path / 'config.toml'}) or start a new run."
            )
        if prepared.fingerprint != self.facts["data_fingerprint"]:
            raise UserError(
                f"{prepared.folder} is not the data {self.path} was started on; start a new run for other data."
            )
        return prepared

    def tokenizer(self) -> "Tokenizer":
        """Returns the run's tokenizer."""
        from trainer.data.tokenizer import load_tokenizer

        with on_disk(self.path / "tokenizer") as folder:
            tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint != self.facts["tokenizer_fingerprint"]:
            raise UserError(f"{self.path / 'tokenizer'} is not the tokenizer this run was started with.")
        return tokenizer

    def checkpoints(self, say: Callable[[str], None] = print) -> "Checkpoints":
        """Returns the run's checkpoints."""
        from trainer.training.checkpoint import Checkpoints

        return Checkpoints(str(self.path / "checkpoints"), self.config.checkpoint.keep_last, say)

    def keep_result(
        self, step: int, evaluation: "Evaluation", samples: dict[str, str], say: Callable[[str], None] = print
    ) -> None:
        """Writes what came of the run after its last step; says so if it cannot be written, as all else is."""
        result = {"step": step, "evaluation": evaluation._asdict(), "samples": samples}
        try:
            write_whole(self.path / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            say(f"{self.path / 'result.json'} cannot be written: {error.strerror or error}. The checkpoint is whole.")

    def result(self, step: int) -> "tuple[Evaluation, dict[str, str]] | None":
        """Returns the evaluation and the samples that `keep_result` wrote for this step; None if they are not there, or
        not as this release writes them.
        """
        from trainer.evaluate import Evaluation

        file = self.path / "result.json"
        if not file.is_file():
            return None
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in result["evaluation"].items()
            }
            return (Evaluation(**values), dict(result["samples"])) if result["step"] == step else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # The run is scored again.

    def load_model(
        self, build_model: BuildModel | None = None, say: Callable[[str], None] = print
    ) -> tuple["keras.Model", "Checkpoint"]:
        """Builds the model and gives it the weights of the newest checkpoint.

        Raises:
            UserError: there is no checkpoint that verifies, or it is of another model.
        """
        from trainer.training.checkpoint import assign, named_variables

        checkpoint = self.checkpoints(say).latest()
        if checkpoint is None:
            raise UserError(f"{self.path} has no checkpoint yet; train on with: trainer train --resume {self.path}")
        tokenizer = self.tokenizer()
        model = make_model(build_model, self.config, tokenizer.vocabulary_size, tokenizer.bos_id)
        assign(named_variables(model), checkpoint.arrays("weights"), checkpoint.folder)
        return model, checkpoint


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
    if or_resume and (locate(config.run_folder) / "config.toml").is_file():
        return RunFolder.of(config)
    check_is_free(config)
    return None


def check_is_free(config: Config) -> None:
    """Raises UserError where a new run's folder is taken."""
    path = locate(config.run_folder)
    if (path / "config.toml").is_file():
        raise UserError(
            f"run_folder={config.run_folder!r} already holds a run. Go on with it: trainer train --resume {path}; or "
            f"start another beside it with the override run_folder={path}-2; or delete it."
        )
    if path.is_file() or (path.is_dir() and not {child.name for child in path.iterdir()} <= _MADE_BEFORE_CONFIG):
        raise UserError(f"run_folder={config.run_folder!r} is there already and is no run; choose another folder.")


def _runs_beside(path: Location) -> str:
    if isinstance(path, Url):
        return ""
    found = sorted(str(config.parent) for config in [*path.glob("*/config.toml"), *path.parent.glob("*/config.toml")])
    return f" Runs near it: {', '.join(found[:5])}." if found else ""
