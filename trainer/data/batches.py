"""From token shards to batches: a pure function of the prepared data, the seed and the step.

Everything is TensorFlow operations, and no iterator has a state: a run resumes at a step by starting there.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from trainer.config.schedule import batch_size_at, examples_before, steps_for
from trainer.config.settings import Config, TrainConfig
from trainer.data.mixture import phases_of
from trainer.data.order import Window, mixed, shuffled
from trainer.data.shards import MANIFEST, PreparedData, Split, examples_per_shard, num_examples

Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor]
# For each shard its tokens, and in lines mode its documents' offsets: mapped files, read page by page when touched.
Shards = tuple[tuple[tf.Tensor, ...], ...]

# One call of the pipeline's function reads this many tokens, which are split into elements after that. Otherwise small
# batches would spend their time on the overhead of starting operations.
TOKENS_PER_READ = 1 << 16
# Large enough that a disk reads a block at its full speed.
BLOCK_BYTES = 8_000_000


class Share(NamedTuple):
    """The part of every global batch that a pipeline makes: the examples of some of the replicas.

    Attributes:
        first_replica: the first replica whose examples are made.
        num_replicas: the number of replicas, from the first on, whose examples are made.
        total_replicas: the number of replicas among which a batch is divided.
    """

    first_replica: int = 0
    num_replicas: int = 1
    total_replicas: int = 1

    def of_element(self, element: tf.Tensor, global_batch_size: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds what an element of the pipeline holds: the examples of one replica.

        Args:
            element: int64 [...], numbers of elements.
            global_batch_size: examples in a batch.

        Returns:
            (batch, examples): the number of the global batch, int64 [...], and the places in it of the element's
            examples, int64 [..., examples].
        """
        num_examples = global_batch_size // self.total_replicas
        replica = self.first_replica + element % self.num_replicas
        places = replica[..., tf.newaxis] * num_examples + tf.range(num_examples, dtype=tf.int64)
        return element // self.num_replicas, places


WHOLE_BATCH = Share()


def training_batches(
    prepared: PreparedData,
    config: Config,
    first_step: int,
    total_steps: int,
    share: Share = WHOLE_BATCH,
    data_offset: int = 0,
) -> tf.data.Dataset:
    """Returns the batches of steps first_step to total_steps - 1, in order.

    Step s takes the places from `examples_before` of s + data_offset on. Place n of the run holds one of the data's N
    examples: `shuffled` of n % N in epoch n // N. Each epoch has another order, and no example is dropped: a batch may
    hold the end of one epoch and the start of the next. With data.weights it holds the example that `mixed` returns for
    n. During train.batch_warmup the first slots of each replica hold the batch's examples; the others, of weight 0, are
    empty.

    Args:
        prepared: the data.
        config: the run's configuration. The batches depend on data.mode, predict_end, weights, weights_from_step
            and shuffle_window_mb, and on train.sequence_length, global_batch_size, batch_warmup and seed.
        first_step: the first batch to make; earlier batches cost nothing.
        total_steps: the length of the run.
        share: the part of each batch to make, which is all that is read; by default all of it.
        data_offset: the place of the first example of step 0. It may be negative if first_step is not 0: no place of a
            batch that is made may be negative.

    Returns:
        A data set of (inputs int32, targets int32, weights float32), each [examples, sequence_length]. An element
        holds the examples of one replica; by default, all of the global batch. A weight is 0 if its target is padding.
    """
    split = prepared.split("train")
    seed, is_mixture = config.train.seed, config.data.weights is not None
    count = num_examples(split, config)
    read = _reader(prepared, split, config)
    window = _window(prepared, split, config)
    phases = phases_of(config.data, config.train, data_offset) if is_mixture else []
    counts = [num_examples(part, config) for part in prepared.parts("train")]

    def example_at(n: tf.Tensor) -> tf.Tensor:
        return mixed(n, counts, phases, seed) if is_mixture else shuffled(n % count, n // count, count, seed, window)

    def examples_at(n: tf.Tensor, shards: Shards) -> Batch:
        if not config.train.batch_warmup:
            return read(example_at(n + data_offset), shards)
        places, is_used = places_of_slots(n, config.train, share.total_replicas)
        inputs, targets, weights = read(example_at(places + data_offset), shards)
        return inputs, targets, weights * tf.cast(is_used, tf.float32)[:, tf.newaxis]

    return _pipeline(prepared, split, config, share, first_step, total_steps, examples_at)


def places_of_slots(slots: tf.Tensor, train: TrainConfig, num_replicas: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Maps the slots of a run's batches, all of global_batch_size, to the places of the run's examples.

    Args:
        slots: int64 [n]; step s has the slots from s * global_batch_size on, one replica's after the other's.
        train: the batch size and its warm-up.
        num_replicas: the number of replicas among which a batch is divided.

    Returns:
        (places, is_used): int64 [n] and bool [n]. An empty slot has the place of the last example of its replica.
    """
    step, slot = slots // train.global_batch_size, slots % train.global_batch_size
    slots_per_replica = train.global_batch_size // num_replicas
    replica, slot = slot // slots_per_replica, slot % slots_per_replica
    num_examples = batch_size_at(train, step, tf.minimum) // num_replicas
    first = examples_before(train, step, tf.minimum) + replica * num_examples
    return first + tf.minimum(slot, num_examples - 1), slot < num_examples


def evaluation_batches(
    prepared: PreparedData,
    config: Config,
    num_batches: int | None = None,
    share: Share = WHOLE_BATCH,
    split: Split | None = None,
) -> tf.data.Dataset:
    """Returns the validation examples in the order of the text, each once. The last batch is padded with examples of
    weight 0.

    Args:
        prepared: the data.
        config: the run's configuration. The batches depend on data.mode and predict_end, and on train.sequence_length
            and global_batch_size.
        num_batches: the most batches to make; None for all. If some are left out, the examples lie at equal distances
            in the whole split, the same each time, so that they represent a sorted text as well.
        share: the part of each batch to make.
        split: the split to read; by default the whole validation text.
    """
    split = split or prepared.split("validation")
    count = num_examples(split, config)
    read = _reader(prepared, split, config)

    num_scored = min(count, (num_batches or count) * config.train.global_batch_size)

    def examples_at(n: tf.Tensor, shards: Shards) -> Batch:
        # The middle of each of num_scored equal parts; example n itself if all are scored.
        examples = (2 * tf.minimum(n, num_scored - 1) + 1) * count // (2 * num_scored)
        inputs, targets, weights = read(examples, shards)
        return inputs, targets, weights * tf.cast(n < num_scored, tf.float32)[:, tf.newaxis]

    end = num_evaluation_batches(split, config, num_batches)
    return _pipeline(prepared, split, config, share, 0, end, examples_at)


def whole_validation(prepared: PreparedData, config: Config) -> tf.data.Dataset:
    """Returns the validation examples of all sources; see `evaluation_batches`."""
    of_sources = (evaluation_batches(prepared, config, split=split) for split in prepared.parts("validation"))
    return functools.reduce(lambda one, other: one.concatenate(other), of_sources)


def num_evaluation_batches(split: Split, config: Config, num_batches: int | None = None) -> int:
    """Returns how many batches `evaluation_batches` makes of a split."""
    of_split = -(-num_examples(split, config) // config.train.global_batch_size)
    return min(of_split, num_batches or of_split)


def total_steps(prepared: PreparedData, config: Config, data_offset: int = 0) -> int:
    """Returns the length of the run in steps: train.total_steps, or the steps of num_epochs epochs, rounded up.

    Raises:
        UserError: a setting does not fit into the steps of num_epochs epochs.
    """
    steps = steps_for(config.train, num_examples(prepared.split("train"), config), data_offset)
    if config.train.total_steps is None:
        config.check_total_steps(steps, f"the {steps} steps that train.num_epochs={config.train.num_epochs} takes")
    return steps


def _window(prepared: PreparedData, split: Split, config: Config) -> Window | None:
    asked = config.data.shuffle_window_mb
    if asked is None:
        return None
    num_bytes = sum(shard.stream_length() for shard in split.shards) * tf.as_dtype(prepared.dtype).size
    block_examples = max(1, BLOCK_BYTES * num_examples(split, config) // num_bytes)
    return Window(block_examples, max(1, asked * 10**6 // BLOCK_BYTES))


def _pipeline(
    prepared: PreparedData,
    split: Split,
    config: Config,
    share: Share,
    first_batch: int,
    end_batch: int,
    examples_at: Callable[[tf.Tensor, Shards], Batch],
) -> tf.data.Dataset:
    """Returns the elements of a range of batches; examples_at reads the run's examples by their numbers, int64 [n]."""
    batch_size, width = config.train.global_batch_size, config.train.sequence_length
    examples_per_element = batch_size // share.total_replicas

    def elements_at(numbers: tf.Tensor, shards: Shards) -> Batch:
        batch, places = share.of_element(numbers, batch_size)
        inputs, targets, weights = examples_at(tf.reshape(batch[:, tf.newaxis] * batch_size + places, [-1]), shards)
        shape = [-1, examples_per_element, width]
        return tf.reshape(inputs, shape), tf.reshape(targets, shape), tf.reshape(weights, shape)

    first, end = first_batch * share.num_replicas, end_batch * share.num_replicas
    numbers = tf.data.Dataset.range(first, end).batch(max(1, TOKENS_PER_READ // (examples_per_element * width)))
    # cache(): mapping the files again for each read would cost more than the read itself.
    reads = tf.data.Dataset.zip(numbers, _shards(prepared, split, config).cache().repeat())
    elements = reads.map(elements_at, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).unbatch()
    # Keras fit and a progress bar need the number of elements, which unbatch() leaves unknown.
    return elements.apply(tf.data.experimental.assert_cardinality(end - first)).prefetch(tf.data.AUTOTUNE)


def _shards(prepared: PreparedData, split: Split, config: Config) -> tf.data.Dataset:
    """Returns a data set of one element, the `Shards` of a split; the host that makes it copies missing files first."""

    def mapped() -> Shards:
        shards = []
        for shard in split.shards:
            tokens = _mapped(prepared.folder / shard.tokens_file, tf.as_dtype(prepared.dtype), shard.stream_length())
            offsets = []
            if config.data.mode == "lines":
                offsets.append(_mapped(prepared.folder / shard.offsets_file, tf.int64, shard.num_documents + 1))
            shards.append((tokens, *offsets))
        return tuple(shards)

    def copied_and_mapped(source: tf.Tensor) -> Shards:
        with tf.control_dependencies([_copy_unless_there(prepared, source)]):
            return mapped()

    if prepared.stored_in is None:
        return tf.data.Dataset.from_tensors(0).map(lambda _: mapped())
    # On a TPU slice the other hosts run TensorFlow's server, without our Python: only operations reach their disks.
    return tf.data.Dataset.from_tensors(prepared.stored_in).map(copied_and_mapped)


def _copy_unless_there(prepared: PreparedData, source: tf.Tensor) -> tf.Tensor:
    shards = [shard for split in prepared.splits.values() for shard in split.shards]
    names = [name for shard in shards for name in (shard.tokens_file, shard.offsets_file)]
    # The manifest is copied last: if it is there, all files are.
    names += [*(f"tokenizer/{name}" for name in prepared.tokenizer_files), MANIFEST]

    def copy() -> tf.Tensor:
        for name in names:
            content = tf.io.read_file(tf.strings.join([source, "/", name]))
            tf.io.write_file(str(prepared.folder.absolute() / name), content)
        return tf.constant(True)

    there = tf.io.matching_files(str(prepared.folder.absolute() / MANIFEST))
    return tf.cond(tf.size(there) > 0, lambda: tf.constant(True), copy)


def _reader(prepared: PreparedData, split: Split, config: Config) -> Callable[[tf.Tensor, Shards], Batch]:
    """Returns a function from example numbers, int64 [batch], to their batch."""
    counts = examples_per_shard(split, config)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    read_shard: Callable[..., tuple[tf.Tensor, tf.Tensor]] = _read_windows
    if config.data.mode == "lines":
        read_shard = functools.partial(_read_documents, num_ends=int(config.data.predict_end))

    def tokens_of(examples: tf.Tensor, shards: Shards) -> tuple[tf.Tensor, tf.Tensor]:
        if len(shards) == 1:
            return read_shard(examples, config.train.sequence_length, *shards[0])
        number = tf.searchsorted(tf.constant(ends, tf.int64), examples, side="right")
        local = examples - tf.gather(tf.constant([0, *ends[:-1]], tf.int64), number)
        parts = tf.dynamic_partition(local, number, len(shards))
        places = tf.dynamic_partition(tf.range(tf.size(examples)), number, len(shards))
        read = [
            read_shard(part, config.train.sequence_length, *shard) for part, shard in zip(parts, shards, strict=True)
        ]
        tokens, lengths = zip(*read, strict=True)
        return tf.dynamic_stitch(places, tokens), tf.dynamic_stitch(places, lengths)

    def read(examples: tf.Tensor, shards: Shards) -> Batch:
        width = config.train.sequence_length
        tokens, lengths = tokens_of(examples, shards)
        tokens = tf.ensure_shape(tokens, [None, width + 1])
        used = tf.range(width + 1, dtype=tf.int64) < lengths[:, tf.newaxis]
        tokens = tf.where(used, tokens, prepared.pad_id)
        return tokens[:, :-1], tokens[:, 1:], tf.cast(used[:, 1:], tf.float32)

    return read


def _read_documents(
    examples: tf.Tensor, width: int, tokens: tf.Tensor, offsets: tf.Tensor, num_ends: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Reads documents of one shard.

    Args:
        examples: int64 [n], the documents' numbers in the shard.
        width: tokens in an example.
        tokens: the shard's tokens.
        offsets: the shard's offsets.
        num_ends: 1 to count the [BOS] after a document as its last token, 0 to leave it out.

    Returns:
        (tokens, lengths): the tokens from each document's [BOS] on, int32 [n, width + 1], and how many of them belong
        to the document, int64 [n].
    """
    starts = tf.gather(offsets, examples)
    lengths = tf.minimum(tf.gather(offsets, examples + 1) - starts + num_ends, width + 1)
    return _gather_from(tokens, starts, width + 1), lengths


def _read_windows(examples: tf.Tensor, width: int, tokens: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Reads windows of one shard, as `_read_documents` reads documents; a window begins with the last target of the
    window before.
    """
    starts, length = examples * width, tokens.shape[0]
    num_full = (length - 1) // width  # A window after these, if there is one, is partly empty.

    def copy_windows() -> tf.Tensor:
        windows = tf.gather(tf.reshape(tokens[: num_full * width], [num_full, width]), examples)
        last = tf.gather(tokens, starts + width)[:, tf.newaxis]
        return tf.cast(tf.concat([windows, last], axis=1), tf.int32)

    # Copying a window takes a tenth of the time of gathering its tokens.
    read = tf.cond(tf.reduce_all(examples < num_full), copy_windows, lambda: _gather_from(tokens, starts, width + 1))
    return read, tf.minimum(length - starts, width + 1)


def _gather_from(tokens: tf.Tensor, starts: tf.Tensor, count: int) -> tf.Tensor:
    """Returns count tokens from each start on, int32 [n, count]; beyond the end, the last token again."""
    places = starts[:, tf.newaxis] + tf.range(count, dtype=tf.int64)
    return tf.cast(tf.gather(tokens, tf.minimum(places, tokens.shape[0] - 1)), tf.int32)


def _mapped(path: Path, dtype: tf.DType, length: int) -> tf.Tensor:
    return tf.raw_ops.ImmutableConst(dtype=dtype, shape=[length], memory_region_name=str(path.absolute()))
