"""From token shards to batches: a pure function of the prepared data, the seed and the step.

TensorFlow operations only, and no iterator state: to resume at a step is to start there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from trainer.config import Config, UserError
from trainer.data.shards import MANIFEST, PreparedData, Split

Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


class Share(NamedTuple):
    """Which part of every global batch a pipeline makes: that of num_replicas replicas from first_replica on, of
    total_replicas.
    """

    first_replica: int = 0
    num_replicas: int = 1
    total_replicas: int = 1

    def of_element(self, element: tf.Tensor, global_batch_size: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns, for element number int64 [] of the pipeline, the number of its global batch and which rows of that
        it holds, int64 [rows]. An element is the rows of one replica.
        """
        rows = global_batch_size // self.total_replicas
        replica = self.first_replica + element % self.num_replicas
        return element // self.num_replicas, replica * rows + tf.range(rows, dtype=tf.int64)


ALL = Share()


def training_batches(
    prepared: PreparedData, config: Config, first_step: int, total_steps: int, share: Share = ALL
) -> tf.data.Dataset:
    """Returns the batches of steps first_step to total_steps - 1, in order.

    Example n of the run is example permute(seed, epoch, n % N) of the data with epoch = n // N: a batch may hold the
    end of one epoch and the start of the next, so nothing is dropped, and every epoch has an order of its own.

    Args:
        prepared: the data.
        config: data.mode and train's sequence_length, global_batch_size and seed count.
        first_step: the first batch to make; making it costs nothing for those before.
        total_steps: of the run.
        share: the part of each batch to make, and nothing else is read; left out, all of it.

    Returns:
        A data set of (inputs int32, targets int32, weights float32), each [global_batch_size, sequence_length], or of
        the rows of one replica after the other; a weight is 0 where the target is padding.
    """
    split = prepared.split("train")
    batch_size, seed = config.train.global_batch_size, config.train.seed
    count = num_examples(split, config)
    read = _reader(prepared, split, config)

    def batch_at(element: tf.Tensor) -> Batch:
        step, rows = share.of_element(element, batch_size)
        n = step * batch_size + rows
        return read(permuted(n % count, n // count, count, seed))

    elements = _elements(prepared, first_step * share.num_replicas, total_steps * share.num_replicas)
    return elements.map(batch_at, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(
    prepared: PreparedData, config: Config, num_batches: int | None = None, share: Share = ALL
) -> tf.data.Dataset:
    """Returns the validation examples in the order of the text, each once; the last batch is filled up at weight 0.

    Args:
        prepared: the data.
        config: data.mode, train.sequence_length and train.global_batch_size count.
        num_batches: how many batches at most; None for all.
        share: the part of each batch to make.
    """
    split = prepared.split("validation")
    batch_size = config.train.global_batch_size
    count = num_examples(split, config)
    read = _reader(prepared, split, config)

    def batch_at(element: tf.Tensor) -> Batch:
        number, rows = share.of_element(element, batch_size)
        n = number * batch_size + rows
        inputs, targets, weights = read(tf.minimum(n, count - 1))
        return inputs, targets, weights * tf.cast(n < count, tf.float32)[:, tf.newaxis]

    elements = _elements(prepared, 0, min(-(-count // batch_size), num_batches or count) * share.num_replicas)
    return elements.map(batch_at, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)


def num_examples(split: Split, config: Config) -> int:
    """Returns how many examples an epoch of a split has: documents in lines mode, windows in packed mode."""
    return sum(_examples_per_shard(split, config))


def total_steps(prepared: PreparedData, config: Config) -> int:
    """Returns the length of the run in steps: train.total_steps, or what num_epochs epochs take, rounded up."""
    if config.train.total_steps is not None:
        return config.train.total_steps
    assert config.train.num_epochs is not None  # TrainConfig sees to it that one of the two is set.
    examples = num_examples(prepared.split("train"), config) * config.train.num_epochs
    steps = -(-examples // config.train.global_batch_size)
    if config.optimizer.warmup_steps > steps:
        raise UserError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is more than the {steps} steps that "
            f"train.num_epochs={config.train.num_epochs} takes; lower it."
        )
    return steps


def permuted(index: tf.Tensor, epoch: tf.Tensor, count: int, seed: int) -> tf.Tensor:
    """Maps positions in an epoch to examples, one to one: int64 [n] below count to the same.

    Source: a cipher over the index (Simon, Beaulieu et al. 2013) walked until it lands below count, so that any
    position is found without making the others.
    """
    key = tf.stack([tf.fill(tf.shape(index), tf.constant(seed, tf.int64)), epoch, tf.zeros_like(epoch)], axis=1)
    last = tf.constant(count - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=key, max_index=last, rounds=4)


def _elements(prepared: PreparedData, first: int, end: int) -> tf.data.Dataset:
    """Returns the numbers of a pipeline's elements; before the first one, the shards are on the host that makes it."""
    if prepared.stored_in is None:
        return tf.data.Dataset.range(first, end)
    # On a TPU slice the other hosts run TensorFlow's server and none of our Python: only operations reach their disks.
    copied = tf.data.Dataset.from_tensors(prepared.stored_in).map(lambda source: _copy_unless_there(prepared, source))
    return copied.flat_map(lambda _: tf.data.Dataset.range(first, end))


def _copy_unless_there(prepared: PreparedData, source: tf.Tensor) -> tf.Tensor:
    shards = [shard for split in prepared.splits.values() for shard in split.shards]
    # The manifest last: where it is, all is.
    names = [name for shard in shards for name in (shard.tokens_file, shard.offsets_file)] + [MANIFEST]

    def copy() -> tf.Tensor:
        for name in names:
            content = tf.io.read_file(tf.strings.join([source, "/", name]))
            tf.io.write_file(str(prepared.folder.absolute() / name), content)
        return tf.constant(True)

    there = tf.io.matching_files(str(prepared.folder.absolute() / MANIFEST))
    return tf.cond(tf.size(there) > 0, lambda: tf.constant(True), copy)


def _examples_per_shard(split: Split, config: Config) -> list[int]:
    if config.data.mode == "lines":
        return [shard.num_documents for shard in split.shards]
    # The first token of a shard is never a target and the last window may be part empty.
    return [-(-(shard.stream_length() - 1) // config.train.sequence_length) for shard in split.shards]


def _reader(prepared: PreparedData, split: Split, config: Config) -> Callable[[tf.Tensor], Batch]:
    """Returns a function from example numbers, int64 [batch], to their batch."""
    counts = _examples_per_shard(split, config)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    readers = [_shard_reader(prepared, split, i, config) for i in range(len(counts))]

    def rows_of(examples: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if len(readers) == 1:
            return readers[0](examples)
        shard = tf.searchsorted(tf.constant(ends, tf.int64), examples, side="right")
        local = examples - tf.gather(tf.constant([0, *ends[:-1]], tf.int64), shard)
        parts = tf.dynamic_partition(local, shard, len(readers))
        places = tf.dynamic_partition(tf.range(tf.size(examples)), shard, len(readers))
        rows, lengths = zip(*(read(part) for read, part in zip(readers, parts, strict=True)), strict=True)
        return tf.dynamic_stitch(places, rows), tf.dynamic_stitch(places, lengths)

    def read(examples: tf.Tensor) -> Batch:
        width = config.train.sequence_length
        rows, lengths = rows_of(examples)
        rows = tf.ensure_shape(rows, [examples.shape[0], width + 1])
        used = tf.range(width + 1, dtype=tf.int64) < lengths[:, tf.newaxis]
        rows = tf.where(used, rows, prepared.pad_id)
        return rows[:, :-1], rows[:, 1:], tf.cast(used[:, 1:], tf.float32)

    return read


def _shard_reader(
    prepared: PreparedData, split: Split, number: int, config: Config
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Returns a function from examples of one shard to (tokens int32 [n, sequence_length + 1], how many are theirs
    int64 [n]).
    """
    shard = split.shards[number]
    width, length = config.train.sequence_length, shard.stream_length()

    def read(examples: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if config.data.mode == "lines":
            offsets = _mapped(prepared.folder / shard.offsets_file, tf.int64, shard.num_documents + 1)
            starts = tf.gather(offsets, examples)
            lengths = tf.minimum(tf.gather(offsets, examples + 1) - starts, width + 1)
        else:
            starts = examples * width
            lengths = tf.minimum(length - starts, width + 1)
        places = tf.minimum(starts[:, tf.newaxis] + tf.range(width + 1, dtype=tf.int64), length - 1)
        tokens = _mapped(prepared.folder / shard.tokens_file, tf.as_dtype(prepared.dtype), length)
        return tf.cast(tf.gather(tokens, places), tf.int32), lengths

    return read


def _mapped(path: Path, dtype: tf.DType, length: int) -> tf.Tensor:
    """Returns a file as a tensor that is read where it is touched; call it in the function that gathers from it."""
    return tf.raw_ops.ImmutableConst(dtype=dtype, shape=[length], memory_region_name=str(path.absolute()))
