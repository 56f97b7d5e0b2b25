"""What is known about a run, for reports and comparisons: its record, curves, scores and samples. No TensorFlow."""

import ast
import contextlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import PydanticUndefined

from trainer.config.schedule import examples_before, full_steps_between
from trainer.config.settings import SAMPLERS, Config, TrainConfig
from trainer.data.shards import read_manifest
from trainer.errors import UserError
from trainer.monitoring import tags
from trainer.monitoring.run_log import Dot, RunLog, read_log
from trainer.reports.list_runs import state_of
from trainer.runs.results import Evaluation, read_result, read_scores
from trainer.runs.run_changes import newest_step
from trainer.runs.run_data import find_data_folder
from trainer.runs.run_folder import RunFolder, run_and_step, steps_in
from trainer.storybook.storybook import verdict

BITS_PER_BYTE = (tags.bits_per_byte(False), tags.bits_per_byte(True))


class Sample(NamedTuple):
    """A text that a run has written.

    Attributes:
        step: the steps that were taken.
        decoder: the decoder that wrote it.
        text: the text.
        remark: for a model of the storybook: whether the text is one of its stories; otherwise "".
    """

    step: int
    decoder: str
    text: str
    remark: str


class History(NamedTuple):
    """A run as a report shows it.

    Attributes:
        run: the run.
        state: what it does; see `list_runs.Row`.
        step: the newest step.
        train: what it has logged about training.
        validation: what it has logged about the validation text.
        scores: the validation losses by step, in nats per token.
        result: the score on the whole validation text after the last step; None if the run is not over.
        samples: what it has written, oldest first.
        num_parameters: the numbers that the model learns; None: there is no checkpoint yet.
        num_tokens: the tokens of the training text; None: the prepared data are gone.
        bytes_per_token: the bytes of the training text for each of its tokens; None: the prepared data are gone.
        tokens_per_step: the tokens of a step, without padding if `num_tokens` is known.
        validation_splits: the entries of the validation text in the manifest of the prepared data; None: they are gone.
    """

    run: RunFolder
    state: str
    step: int
    train: RunLog
    validation: RunLog
    scores: dict[int, float]
    result: Evaluation | None
    samples: list[Sample]
    num_parameters: int | None
    num_tokens: int | None
    bytes_per_token: float | None
    tokens_per_step: float
    validation_splits: list[dict[str, Any]] | None = None

    @property
    def config(self) -> Config:
        """The run's settings."""
        return self.run.config

    @property
    def name(self) -> str:
        """The run's folder."""
        return str(self.run.path)

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss that is a number; None if nothing was scored."""
        steps = [step for step, loss in self.scores.items() if math.isfinite(loss)]
        return min(steps, key=lambda step: (self.scores[step], step), default=None)

    def tokens_at(self, step: float) -> float:
        """Returns how many tokens the model has seen after a step, by the run and the runs that it was forked from."""
        seen, begin = 0.0, 0.0
        for part in reversed(_parts(self.run.facts.get("parents", []), self.config.train, self.tokens_per_step)):
            if step > begin:
                seen += part.tokens_between(begin, min(step, part.end))
                begin = part.end
        return seen

    def curve(self, tag: str, split: str = "train") -> list[Dot]:
        """Returns a curve; no points if there is none."""
        return (self.train if split == "train" else self.validation).curves.get(tag, [])

    def bits_per_byte(self, split: str = "validation") -> list[Dot]:
        """Returns the curve of bits per byte, whether they are about all of the text or not."""
        return [dot for tag in BITS_PER_BYTE for dot in self.curve(tag, split)]

    def goodput(self) -> dict[str, float]:
        """Returns the shares of the time of training: in steps (of that waiting for batches), and everything else.

        The intervals between two points of the curves count by their examples. Empty if nothing was logged.
        """
        overall, inputs = (
            {dot.step: dot.value for dot in self.curve(tag)} for tag in (tags.TOKENS_PER_SEC_OVERALL, tags.INPUT_SHARE)
        )
        in_steps = all_time = waiting = 0.0
        before = self.run.first_step
        for dot in self.curve(tags.TOKENS_PER_SEC_IN_STEPS):
            if dot.value > 0 and overall.get(dot.step, 0) > 0:
                num_steps = full_steps_between(self.config.train, before, dot.step)
                in_steps += num_steps / dot.value
                all_time += num_steps / overall[dot.step]
                waiting += num_steps / dot.value * inputs.get(dot.step, 0.0)
            before = dot.step
        if not all_time:
            return {}
        parts = {"computing": in_steps - waiting, "waiting for batches": waiting}
        parts["saving, scoring, sampling"] = max(0.0, all_time - in_steps)
        total = sum(parts.values())
        return {name: secs / total for name, secs in parts.items()}

    def differing(self) -> list[tuple[str, Any, Any]]:
        """Returns the settings that are not the defaults: the key, the value and the default, None if it has none."""
        found = []
        for section, values in self.config:
            if section == "run_folder":
                continue
            shipped = Config.model_fields[section].default
            for name, field in type(values).model_fields.items():
                value = getattr(values, name)
                default = getattr(shipped, name) if type(shipped) is type(values) else field.default
                if value != default:
                    found.append((f"{section}.{name}", value, None if default is PydanticUndefined else default))
        return found


def read_history(path: str) -> History:
    """Reads what is known about a run.

    Args:
        path: the run's folder, or the folder of one of its checkpoints.

    Raises:
        UserError: the folder holds no run, or a file of it cannot be read.
    """
    run = RunFolder(run_and_step(path)[0])
    step = newest_step(run)
    train, validation = read_log(run.path / "logs" / "train"), read_log(run.path / "logs" / "validation")
    state = state_of(run, step)
    if state == "training":
        step = max([step, *(dots[-1].step for dots in train.curves.values())])
    result = read_result(run, step)
    samples = _samples(run.config, train.texts)
    num_tokens, bytes_per_token, tokens_per_step = _tokens(run)
    return History(
        run=run,
        state=state,
        step=step,
        train=train,
        validation=validation,
        scores=read_scores(run),
        result=None if result is None else result[0],
        samples=samples,
        num_parameters=_num_parameters(run),
        num_tokens=num_tokens,
        bytes_per_token=bytes_per_token,
        tokens_per_step=tokens_per_step,
        validation_splits=_validation_splits(run),
    )


def _samples(config: Config, texts: Mapping[str, Mapping[int, str]]) -> list[Sample]:
    is_storybook = config.data.is_storybook()
    prefixes = (tags.samples_of(""), "samples/")  # Now, and in 0.1.0.
    found = [
        Sample(step, name.removeprefix(prefix), text, verdict(text) if is_storybook else "")
        for name, of_steps in texts.items()
        for prefix in prefixes
        if name.startswith(prefix)
        for step, text in of_steps.items()
    ]
    order: dict[str, int] = {name: number for number, name in enumerate(SAMPLERS)}
    return sorted(found, key=lambda each: (each.step, order.get(each.decoder, len(order)), each.decoder))


class _Part(NamedTuple):
    """The steps that one of a run and the runs that it was forked from has taken.

    Attributes:
        end: the last step; infinite for the run itself.
        train: its batches.
        tokens_per_example: the tokens of an example.
    """

    end: float
    train: TrainConfig
    tokens_per_example: float

    def tokens_between(self, step: float, later: float) -> float:
        """Returns the tokens of the steps between two steps."""
        examples = examples_before(self.train, later) - examples_before(self.train, step)
        return float(examples * self.tokens_per_example)


def _parts(parents: Sequence[Mapping[str, Any]], train: TrainConfig, tokens_per_step: float) -> list[_Part]:
    """Returns a run's own part and then one for each parent that it was forked from, nearest first."""
    own = _Part(math.inf, train, tokens_per_step / train.global_batch_size)
    parts = [own]
    for parent in parents:
        if parent["kind"] != "fork":
            break  # It gave only its weights: the steps begin at 0 there.
        changed = r"^train\.(global_batch_size|sequence_length|batch_warmup)=.* \(was (.*)\)$"
        was = {key: ast.literal_eval(value) for key, value in re.findall(changed, "\n".join(parent["changed"]), re.M)}
        if "batch_warmup" in was:
            was["batch_warmup"] = {int(step): size for step, size in was["batch_warmup"].items()}
        train = train.model_copy(update=was)
        per_example = own.tokens_per_example * train.sequence_length / own.train.sequence_length
        parts.append(_Part(parent["step"], train, per_example))
    return parts


def _tokens(run: RunFolder) -> tuple[int | None, float | None, float]:
    """Returns the tokens of the training text, the bytes of each, and the tokens of a step."""
    train = run.config.train
    slots = float(train.global_batch_size * train.sequence_length)
    try:
        split = read_manifest(find_data_folder(run))["splits"]["train"]
    except (UserError, OSError, KeyError):
        return None, None, slots
    if run.config.data.mode == "lines" and split["num_documents"]:
        slots = min(slots, train.global_batch_size * split["num_tokens"] / split["num_documents"])
    return int(split["num_tokens"]), split["num_bytes"] / max(1, split["num_tokens"]), slots


def _validation_splits(run: RunFolder) -> list[dict[str, Any]] | None:
    with contextlib.suppress(UserError, OSError, KeyError):
        manifest = read_manifest(find_data_folder(run))
        if manifest["fingerprint"] == run.facts["data_fingerprint"]:
            return [split for name, split in manifest["splits"].items() if name.partition("-")[0] == "validation"]
    return None


def _num_parameters(run: RunFolder) -> int | None:
    """Returns the numbers in the weights of the newest checkpoint, from the head of its file."""
    for step in reversed(steps_in(run.path / "checkpoints")):
        file = run.path / "checkpoints" / f"step_{step:09d}" / "weights.safetensors"
        if not file.is_file():
            continue  # The process that trains has replaced this checkpoint by a newer one.
        with contextlib.suppress(OSError, ValueError, struct.error), file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            head = json.loads(opened.read(size))
            return sum(math.prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")
    return None
