"""Exchanges pieces of small arrays between the replicas of DISTRIBUTION, and compares with NumPy. Run by
test_collectives.py, in a process of its own.

    python tests/exchange_pieces.py DISTRIBUTION

DISTRIBUTION is the section of the config as JSON.
"""

import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from trainer.config.settings import DistributionConfig
from trainer.distributed.collectives import make_collectives
from trainer.distributed.strategy import make_strategy
from trainer.optimizers.variables import per_replica

SHAPES, DTYPES = [(3,), (2, 5), (1,)], (tf.float64, tf.float32, tf.bfloat16, tf.float32)


def main():
    strategy = make_strategy(DistributionConfig(**json.loads(sys.argv[1])))
    collectives, count = make_collectives(strategy, strategy.num_replicas_in_sync), strategy.num_replicas_in_sync

    def on_replica():
        # The numbers of replica i are i + 1, plus their own places: exact in every dtype.
        number = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float64) + 1
        pieces = [tf.cast(number + own, dtype) for own, dtype in arrays(1)]
        scattered = collectives.reduce_scatter([tf.cast(number + own, dtype) for own, dtype in arrays(count)])
        mine = collectives.own(tf.range(2 * count))
        # What i gives to j is 16 i + j, which bfloat16 holds.
        both = [tf.cast(16 * number + tf.range(count, dtype=tf.float64), dtype) for dtype in (tf.float64, tf.bfloat16)]
        given = collectives.all_to_all([tf.reshape(both[0], [count, 1, 1]), both[1]])
        place = tf.convert_to_tensor(collectives.place(), tf.int32)
        total = collectives.all_reduce(number[tf.newaxis])
        return collectives.gather(pieces), scattered, given, total, mine, number, place

    @tf.function(autograph=False)
    def exchange():
        return [strategy.experimental_local_results(each) for each in tf.nest.flatten(strategy.run(on_replica))]

    of_replicas = zip(*([np.asarray(tf.cast(each, tf.float64)) for each in part] for part in exchange()), strict=True)
    places = []
    numbers, received = {}, {}
    for *results, given, narrow, total, mine, number, place in of_replicas:
        numbers[int(place)], received[int(place)] = float(number), given
        np.testing.assert_array_equal(narrow, np.ravel(given))
        gathered, scattered = results[: len(SHAPES) + 1], results[len(SHAPES) + 1 :]
        places.append(int(place))
        assert total == count * (count + 1) / 2
        assert mine.tolist() == [2 * place, 2 * place + 1]
        for (own, _), whole in zip(arrays(1), gathered, strict=True):
            rows = own.shape[0]
            # A piece stands at its replica's place.
            np.testing.assert_array_equal(whole[int(place) * rows :][:rows], own + number)
            senders = np.sort(np.ravel(whole - np.concatenate([own] * count)))
            np.testing.assert_array_equal(senders, np.repeat(np.arange(1, count + 1), own.size))
        for (own, _), piece in zip(arrays(count), scattered, strict=True):
            rows = own.shape[0] // count
            np.testing.assert_array_equal(piece, own[int(place) * rows :][:rows] * count + total)
    for place, given in received.items():
        if len(numbers) == count:  # All replicas are in this process.
            np.testing.assert_array_equal(np.ravel(given), [16 * numbers[i] + place for i in range(count)])
        assert sorted(np.ravel(given - place)) == [16 * i for i in range(1, count + 1)]
    assert places == collectives.places_of_this_process(strategy)
    own = per_replica_on(strategy)
    if len(strategy.experimental_local_results(own)) > 1:
        try:
            own.numpy()
        except ValueError:
            pass
        else:
            raise AssertionError("several values were read as one")
    print("places", *places)


def per_replica_on(strategy):
    with strategy.scope():
        return per_replica([2], tf.float32)


def arrays(count):
    """Arrays of `count` times as many rows, with their dtypes."""
    shapes = [(count * shape[0], *shape[1:]) for shape in (*SHAPES, SHAPES[1])]
    return [
        (np.arange(np.prod(shape), dtype=np.float64).reshape(shape) % 3, dtype)
        for shape, dtype in zip(shapes, DTYPES, strict=True)
    ]


if __name__ == "__main__":
    main()
