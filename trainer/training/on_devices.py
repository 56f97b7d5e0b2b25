"""Opens a trained model on the devices that `distribution` names, to score texts or to write them: whole on each, or in
pieces that the devices hold together if distribution.shard="weights".
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.config.settings import Config, check_can_shard, check_shard, num_pieces
from trainer.decoding.generate import Generator
from trainer.distributed.collectives import make_collectives
from trainer.distributed.strategy import (
    describe_devices,
    first_device,
    make_strategy,
    processor_of,
    refuse_gpus_without_code,
    unseen_gpu,
    visible_gpus,
)
from trainer.distributed.workers import Workers
from trainer.errors import UserError
from trainer.exchange.open import OpenedModel, open_model
from trainer.execution import compute_dtype_of, ops_of
from trainer.model.build import BuildModel
from trainer.model.held import WHOLE, Held
from trainer.model.language_model import adapt
from trainer.model.ops import decoding_ops, scoring_ops
from trainer.runs.run_folder import CheckpointStep
from trainer.scoring.scorer import Scorer
from trainer.system.progress import ignore
from trainer.training.split import SplitArray, SplitWeights


class ModelOnDevices(NamedTuple):
    """A trained model on the devices of a strategy.

    Attributes:
        opened: the model with what belongs to it. If it is in pieces, its variables hold no values.
        strategy: the devices.
        is_in_pieces: whether each device has only its pieces of the weights.
        held: returns, in a replica function, how the model's layers get their weights.
    """

    opened: OpenedModel
    strategy: tf.distribute.Strategy
    is_in_pieces: bool = False
    held: Callable[[], Held] = lambda: WHOLE

    def generator(self) -> Generator:
        """Returns what writes with the model."""
        model, tokenizer, config = self.opened[:3]
        ops = None
        if self.is_in_pieces:  # Its variables are on no device.
            ops = decoding_ops(config.train.precision, processor_of(self.strategy), gathers=True)
        length, ends = config.train.sequence_length, self.opened.end_tokens
        return Generator(model, tokenizer, length, ops, ends, self.strategy, self.held)

    def scorer(self, sequence_length: int, note: Callable[[int], None] = ignore) -> Scorer:
        """Returns what scores texts with the model.

        Args:
            sequence_length: see `Scorer`.
            note: see `Scorer`.
        """
        model, tokenizer, config = self.opened[:3]
        ops = scoring_ops(config.train.precision, processor_of(self.strategy)) if self.is_in_pieces else None
        return Scorer(model, tokenizer, sequence_length, self.strategy, note, self.held, ops)


def open_on_devices(
    path: str,
    strategy: tf.distribute.Strategy,
    config: Config,
    build_model: BuildModel | None = None,
    step: str | CheckpointStep | None = None,
    say: Callable[[str], None] = print,
) -> ModelOnDevices:
    """Opens a model. A single device holds it whole, whatever `distribution.shard` is.

    Args:
        path: see `open_model`.
        strategy: the devices.
        config: the settings of the model, with `distribution` as it is wanted now.
        build_model: see `open_model`.
        step: see `open_model`.
        say: prints a line.

    Raises:
        UserError: see `open_model`; or the model cannot be split over these devices.
    """
    num_replicas = strategy.num_replicas_in_sync
    if not _splits(config, strategy):
        with strategy.scope():
            return ModelOnDevices(open_model(path, build_model, step, say), strategy)
    check_shard(config, num_replicas)
    check_can_shard(config, is_gpt=build_model is None)
    collectives = make_collectives(strategy, num_pieces(config, num_replicas))
    made: list[SplitWeights] = []

    def make_pieces(model: keras.Model) -> Mapping[str, SplitArray]:
        made.clear()  # It is called again if a store lost the checkpoint while it was read.
        with strategy.scope():
            made.append(SplitWeights(collectives, adapt(model).named_variables(), begins=False))
        return made[-1].arrays()

    opened = open_model(path, build_model, step, say, make_pieces)
    device = processor_of(strategy)
    dtype = compute_dtype_of(config.train.precision, device, ops_of(device, use="evaluation"))
    return ModelOnDevices(opened, strategy, True, lambda: made[-1].held(dtype))


def open_to_write(
    path: str,
    config: Config,
    is_asked: bool = False,
    build_model: BuildModel | None = None,
    step: str | CheckpointStep | None = None,
    say: Callable[[str], None] = print,
) -> ModelOnDevices:
    """Opens a model to write with it: on all devices that `distribution` names if they hold it together. Otherwise one
    device writes: the first of them if they are asked for, or else the one that TensorFlow chooses.

    Args:
        path: see `open_model`.
        config: see `open_on_devices`.
        is_asked: whether the devices are asked for now, and not only part of the model's settings.
        build_model: see `open_model`.
        step: see `open_model`.
        say: see `open_model`.

    Raises:
        UserError: see `open_on_devices`; or a TPU is asked for.
    """
    distribution = config.distribution
    is_tpu = distribution.kind == "tpu"
    if is_tpu and is_asked:
        raise UserError(
            "distribution.kind='tpu': texts are written on a CPU or on GPUs; set distribution.kind=cpu, or change no "
            "devices, for the memory of this host."
        )
    if not is_asked and (is_tpu or distribution.shard != "weights"):
        refuse_gpus_without_code(visible_gpus())
        if warning := unseen_gpu():
            say(f"warning: {warning}")
        return open_whole(path, build_model, step, say)
    strategy = make_strategy(distribution, ignore_workers=True)
    for line in describe_devices(strategy, distribution, Workers()):
        say(line)
    devices = strategy if _splits(config, strategy) else first_device(strategy)
    return open_on_devices(path, devices, config, build_model, step, say)


def open_whole(
    path: str,
    build_model: BuildModel | None = None,
    step: str | CheckpointStep | None = None,
    say: Callable[[str], None] = print,
) -> ModelOnDevices:
    """Opens a model on the one device that TensorFlow chooses; see `open_model`."""
    return ModelOnDevices(open_model(path, build_model, step, say), tf.distribute.get_strategy())


def _splits(config: Config, strategy: tf.distribute.Strategy) -> bool:
    return config.distribution.shard == "weights" and strategy.num_replicas_in_sync > 1
