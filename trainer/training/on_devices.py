"""Opens a trained model on the devices that `distribution` names, to score texts or to write them: whole on each, or in
pieces that the devices hold together if distribution.shard="weights".
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.config.settings import Config, check_can_shard, check_shard, num_pieces
from trainer.decoding.generate import Generator
from trainer.distributed.collectives import make_collectives
from trainer.distributed.strategy import describe_devices, make_strategy, processor_of
from trainer.distributed.workers import Workers
from trainer.exchange.open import OpenedModel, open_model
from trainer.execution import compute_dtype_of, ops_of
from trainer.model.build import BuildModel
from trainer.model.held import WHOLE, Held
from trainer.model.language_model import adapt
from trainer.model.ops import decoding_ops
from trainer.runs.run_folder import CheckpointStep
from trainer.training.split import SplitArray, SplitWeights


class ModelOnDevices(NamedTuple):
    """A trained model on the devices of a strategy.

    Attributes:
        opened: the model with what belongs to it. If it is in pieces, its variables hold no values.
        is_in_pieces: whether each device has only its pieces of the weights.
        held: returns, in a replica function, how the model's layers get their weights.
    """

    opened: OpenedModel
    is_in_pieces: bool
    held: Callable[[], Held]


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
            return ModelOnDevices(open_model(path, build_model, step, say), False, lambda: WHOLE)
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
    return ModelOnDevices(opened, True, lambda: made[-1].held(dtype))


@contextlib.contextmanager
def generator_on_devices(
    path: str,
    config: Config,
    step: str | CheckpointStep | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Generator]:
    """Opens a model to write with it: on all devices that `distribution` names if they hold it together, otherwise on
    the first of them.

    Args:
        path: see `open_model`.
        config: see `open_on_devices`.
        step: see `open_model`.
        say: see `open_model`.

    Raises:
        UserError: see `open_on_devices`.
    """
    strategy, length = make_strategy(config.distribution, ignore_workers=True), config.train.sequence_length
    for line in describe_devices(strategy, config.distribution, Workers()):
        say(line)
    if not _splits(config, strategy):
        with tf.device(strategy.extended.worker_devices[0]):
            opened = open_model(path, step=step, say=say)
            yield Generator(opened.model, opened.tokenizer, length, end_tokens=opened.end_tokens)
        return
    opened, _, held = open_on_devices(path, strategy, config, step=step, say=say)
    # The variables of a model in pieces are on no device.
    ops = decoding_ops(config.train.precision, processor_of(strategy))
    yield Generator(opened.model, opened.tokenizer, length, ops, opened.end_tokens, strategy, held)


def _splits(config: Config, strategy: tf.distribute.Strategy) -> bool:
    return config.distribution.shard == "weights" and strategy.num_replicas_in_sync > 1
