"""A small all-reduce over the devices of a config, to see that they compute and how fast they exchange gradients."""

import signal
import statistics
import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.config.settings import DistributionConfig
from trainer.distributed.strategy import device_kind, make_strategy

# NCCL waits for ever for a GPU that does not answer.
TIMEOUT_SECS = 180
_NUMBERS = 1 << 24
_TRIES = 5


class Exchange(NamedTuple):
    """What a small all-reduce showed.

    Attributes:
        kind: the kind of device: "CPU", "GPU" or "TPU".
        num_replicas: the devices that took part.
        is_right: whether each device multiplied and added up rightly.
        num_bytes: the bytes that each device gave.
        secs: the time of an all-reduce.
    """

    kind: str
    num_replicas: int
    is_right: bool
    num_bytes: int
    secs: float


def measure_all_reduce(config: DistributionConfig) -> Exchange:
    """Adds up an array over the devices of a config, of this worker only, and returns how that went.

    Call it in a process of its own: it ends the process if the devices do not answer within TIMEOUT_SECS.

    Raises:
        UserError: the config names devices that are not there.
    """
    signal.alarm(TIMEOUT_SECS)
    strategy = make_strategy(config, ignore_workers=True)
    count = strategy.num_replicas_in_sync

    def on_replica() -> tuple[tf.Tensor, tf.Tensor]:
        context = tf.distribute.get_replica_context()
        own = tf.fill([_NUMBERS], tf.cast(context.replica_id_in_sync_group + 1, tf.float32))
        ones = tf.ones([256, 256])
        return context.all_reduce(tf.distribute.ReduceOp.SUM, own)[-1], tf.reduce_sum(tf.matmul(ones, ones))

    @tf.function(autograph=False)
    def exchange() -> tuple[tf.Tensor, tf.Tensor]:
        sums, products = strategy.run(on_replica)
        return strategy.experimental_local_results(sums), strategy.experimental_local_results(products)

    is_right, all_secs = True, []
    for _ in range(_TRIES):
        started = time.perf_counter()
        sums, products = (np.array(each) for each in exchange())
        all_secs.append(time.perf_counter() - started)
        is_right = is_right and bool((sums == count * (count + 1) / 2).all() and (products == 256**3).all())
    # The first one compiles.
    return Exchange(device_kind(strategy), count, is_right, 4 * _NUMBERS, statistics.median(all_secs[1:]))
