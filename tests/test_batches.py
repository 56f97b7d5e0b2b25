"""Laws of the batches: what the tutorial feeds, in an order that is a function of seed and step only."""

import hashlib
import itertools
from pathlib import Path

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.config.settings import MIXTURE_EXAMPLES, DataConfig, TrainConfig
from trainer.data.batches import Share, evaluation_batches, total_steps, training_batches
from trainer.data.mixture import Phase, mean_weights, phases_of, shares_of
from trainer.data.order import Window, mixed, permuted, shuffled
from trainer.data.shards import num_examples
from trainer.errors import UserError

WORDS = ["sun", "moon", "star", "tree", "river", "stone", "bird", "fish", "wolf", "bear"]


def config_of(tmp_path, mode="lines", num_lines=23, predict_end=True, **sections):
    """A config on lines of 1 to 12 words, longer and shorter than the 6 tokens of an example."""
    text = tmp_path / "text.txt"
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS, random.integers(1, 13))) for _ in range(num_lines)]
    if not text.exists():
        text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {"train": str(text), "validation": str(text), "mode": mode, "predict_end": predict_end}
    return tiny_config(
        tmp_path,
        data=sections.pop("data", data),
        tokenizer={"kind": "wordpiece", "vocabulary_size": 60},
        train={"total_steps": 9, "global_batch_size": 4, "sequence_length": 6} | sections.pop("train", {}),
        **sections,
    )


def examples_of(data):
    """All examples of a data set, as tuples of (inputs, targets, weights)."""
    return [
        example
        for batch in data.as_numpy_iterator()
        for example in zip(*(map(tuple, part) for part in batch), strict=True)
    ]


def tutorial_examples(config, tokenizer):
    """What the tutorial's preprocess function makes of each line."""
    length = config.train.sequence_length
    encode = keras_nlp.tokenizers.WordPieceTokenizer(tokenizer.vocabulary, sequence_length=length, lowercase=True)
    start_packer = keras_nlp.layers.StartEndPacker(sequence_length=length, start_value=tokenizer.bos_id)
    outputs = encode(tf.constant(Path(config.data.train[0]).read_text(encoding="utf-8").splitlines()))
    features, labels = np.array(start_packer(outputs)), np.array(outputs)
    weights = (labels != 0).astype(np.float32)
    return sorted(zip(*(map(tuple, part) for part in (features, labels, weights)), strict=True))


# Shards of 40 tokens make several of them; of 2**27 a single one.
@pytest.mark.parametrize("shard_tokens", [40, 2**27])
def test_lines_are_exactly_what_the_tutorials_preprocess_gives(tmp_path, shard_tokens):
    config = config_of(tmp_path, predict_end=False, train={"total_steps": None, "num_epochs": 1})
    prepared = tiny_prepared(config, shard_tokens)
    assert (len(prepared.split("train").shards) > 1) == (shard_tokens == 40)
    tutorial = tutorial_examples(config, prepared.tokenizer())
    validation = [example for example in examples_of(evaluation_batches(prepared, config)) if any(example[2])]
    assert sorted(validation) == tutorial
    steps = total_steps(prepared, config)
    epoch = examples_of(training_batches(prepared, config, 0, steps))[: len(tutorial)]
    assert sorted(epoch) == tutorial


@pytest.mark.parametrize("shard_tokens", [40, 2**27])
def test_the_end_of_each_line_that_fits_is_a_target(tmp_path, shard_tokens):
    (tmp_path / "text.txt").write_text("".join(" ".join((2 * WORDS)[:n]) + "\n" for n in range(1, 13)))
    config = config_of(tmp_path)
    prepared = tiny_prepared(config, shard_tokens)
    tokenizer, bos = prepared.tokenizer(), prepared.bos_id
    examples = [example for example in examples_of(evaluation_batches(prepared, config)) if any(example[2])]
    lengths = set()
    for line, (inputs, targets, weights) in zip(
        Path(config.data.train[0]).read_text(encoding="utf-8").splitlines(), examples, strict=True
    ):
        tokens = tokenizer.encode(line).tolist()
        scored = [*tokens, bos][:6]
        assert targets[: len(scored)] == tuple(scored)
        assert weights == (1.0,) * len(scored) + (0.0,) * (6 - len(scored))
        assert inputs[: len(scored)] == (bos, *scored)[: len(scored)]
        lengths.add(len(tokens))
    assert {5, 6, 7} <= lengths  # One fewer than an example holds, as many, and one more.


@pytest.mark.parametrize("shard_tokens", [40, 2**27])
def test_packed_windows_use_every_token_as_target_once_an_epoch(tmp_path, shard_tokens):
    config = config_of(tmp_path, "packed")
    prepared = tiny_prepared(config, shard_tokens)
    expected = []
    for shard in prepared.split("train").shards:
        stream = np.fromfile(prepared.folder / shard.tokens_file, prepared.dtype)
        expected.extend(stream[1:])
    examples = examples_of(evaluation_batches(prepared, config))
    targets = [token for example in examples for token, weight in zip(example[1], example[2], strict=True) if weight]
    assert targets == expected
    for inputs, its_targets, weights in examples:
        used = int(sum(weights))
        # Padding is only at the end, and what is read is what came before what is predicted.
        assert weights == (1.0,) * used + (0.0,) * (6 - used)
        assert inputs[1:used] == its_targets[: used - 1] if used else True
    steps = -(-num_examples(prepared.split("train"), config) // 4)
    epoch = examples_of(training_batches(prepared, config, 0, steps))[: num_examples(prepared.split("train"), config)]
    real = [example for example in examples if any(example[2])]
    assert sorted(epoch) == sorted(real)


def number_tokens(prepared, split):
    """Puts the place of each token in a split in its stead, from 1 on; returns where each shard begins, and the end."""
    lengths = [shard.stream_length() for shard in prepared.split(split).shards]
    begins = np.cumsum([1, *lengths])
    for shard, begin, length in zip(prepared.split(split).shards, begins, lengths, strict=False):
        np.arange(begin, begin + length).astype(prepared.dtype).tofile(prepared.folder / shard.tokens_file)
    return begins


@pytest.mark.parametrize("shard_tokens", [40, 2**27])
def test_an_epoch_of_packed_training_has_every_place_but_a_shards_first_as_target_once(tmp_path, shard_tokens):
    config = config_of(tmp_path, "packed", train={"total_steps": None, "num_epochs": 1})
    prepared = tiny_prepared(config, shard_tokens)
    begins = number_tokens(prepared, "train")
    examples = examples_of(training_batches(prepared, config, 0, total_steps(prepared, config)))
    epoch = examples[: num_examples(prepared.split("train"), config)]
    inputs, targets, weights = (np.array(part) for part in zip(*epoch, strict=True))
    times = np.bincount(targets[weights == 1], minlength=begins[-1])
    expected = np.ones_like(times)
    expected[[0, *begins[:-1]]] = 0
    np.testing.assert_array_equal(times, expected)
    np.testing.assert_array_equal(inputs[weights == 1], targets[weights == 1] - 1)
    # Only the window at the end of a shard may be part empty, and what fills it counts for nothing.
    used = weights.sum(axis=1).astype(int)
    np.testing.assert_array_equal(weights, np.arange(6) < used[:, np.newaxis])
    assert set(inputs[used < 6, 0] + used[used < 6]) == {
        end - 1 for begin, end in itertools.pairwise(begins) if (end - begin - 1) % 6
    }
    np.testing.assert_array_equal(targets[weights == 0], prepared.pad_id)


@pytest.mark.parametrize("mode", ["lines", "packed"])
@pytest.mark.parametrize(("num_workers", "replicas_per_worker"), [(1, 2), (2, 1), (3, 2)])
def test_workers_share_the_batches_that_one_would_make_and_each_example_is_seen_once(
    tmp_path, mode, num_workers, replicas_per_worker
):
    config = config_of(tmp_path, mode, train={"total_steps": None, "num_epochs": 1, "global_batch_size": 12})
    prepared = tiny_prepared(config, 80)
    assert len(prepared.split("train").shards) > 1
    num_replicas = num_workers * replicas_per_worker
    shares = [Share(first, replicas_per_worker, num_replicas) for first in range(0, num_replicas, replicas_per_worker)]
    steps = total_steps(prepared, config)
    for split, batches_of in (
        ("train", lambda *share: training_batches(prepared, config, 0, steps, *share)),
        ("validation", lambda *share: evaluation_batches(prepared, config, None, *share)),
    ):
        number_tokens(prepared, split)
        whole = examples_of(batches_of())
        count = num_examples(prepared.split(split), config)
        assert len({inputs[0] for inputs, _, _ in whole[:count]}) == count
        # Side by side, what the workers make is the whole, and nothing else.
        workers = [examples_of(batches_of(share)) for share in shares]
        each = 12 // num_replicas * replicas_per_worker
        assert {len(worker) for worker in workers} == {len(whole) // num_workers}
        assert [
            example for i in range(0, len(workers[0]), each) for worker in workers for example in worker[i : i + each]
        ] == whole


@pytest.mark.parametrize("mode", ["lines", "packed"])
def test_a_batch_is_a_function_of_seed_and_step(tmp_path, mode):
    config = config_of(tmp_path, mode)
    prepared = tiny_prepared(config)
    whole = examples_of(training_batches(prepared, config, 0, 20))
    for first in (1, 7, 19):
        assert examples_of(training_batches(prepared, config, first, 20)) == whole[4 * first :]
    other = config_of(tmp_path, mode, train={"seed": 1})
    assert examples_of(training_batches(prepared, other, 0, 20)) != whole


def test_batches_cross_epochs_and_each_epoch_has_another_order(tmp_path):
    config = config_of(tmp_path)
    prepared = tiny_prepared(config)
    examples = examples_of(training_batches(prepared, config, 0, 23))  # 23 steps of 4 are 4 epochs of 23
    epochs = [examples[i : i + 23] for i in range(0, 92, 23)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_the_order_is_a_permutation_and_any_place_is_found_at_once(count):
    index = tf.range(count, dtype=tf.int64)
    for epoch in (0, 1, 10**9):
        order = permuted(index, tf.fill([count], tf.constant(epoch, tf.int64)), count, seed=3).numpy()
        assert sorted(order) == list(range(count))
    if count == 1000:
        assert abs(np.corrcoef(index, order)[0, 1]) < 0.15  # five standard errors of no correlation


@pytest.mark.parametrize("count", [1, 12, 13, 25, 100])
@pytest.mark.parametrize("window", [Window(1, 1), Window(4, 3), Window(6, 4)])
def test_a_windowed_order_is_a_permutation_too(count, window):
    for epoch in (0, 1, 10**9):
        order = order_of(count, epoch, window)
        assert sorted(order) == list(range(count))
    assert count < 13 or (order_of(count, 0, window) != order_of(count, 1, window)).any()
    np.testing.assert_array_equal(order_of(count, 10**9, window), order)


def order_of(count, epoch, window):
    index = tf.range(count, dtype=tf.int64)
    return shuffled(index, tf.fill([count], tf.constant(epoch, tf.int64)), count, 3, window).numpy()


@pytest.mark.parametrize("seed", [2**31, 2**47, 2**63 - 1])
def test_large_seeds_order_the_examples_too(seed):
    index = tf.range(100, dtype=tf.int64)
    for window in (None, Window(3, 4)):
        order = shuffled(index, tf.zeros_like(index), 100, seed, window).numpy()
        assert sorted(order) == list(range(100))
        assert (order != order_of(100, 0, window)).any()
    assert sorted(mixed(index, [1000, 1000], [Phase(0, (1.0, 1.0))], seed).numpy()) != list(range(100))


def test_a_window_reads_from_few_blocks_at_a_time():
    order = order_of(10_000, 5, Window(500, 4))
    for start in range(0, 10_000, 2000):
        examples = np.sort(order[start : start + 2000])
        # Four blocks, none next to another; one may go around the end of the ring.
        assert np.count_nonzero(np.diff(examples) > 1) <= 5
        assert abs(np.corrcoef(np.arange(2000), order[start : start + 2000])[0, 1]) < 0.11  # five standard errors


@pytest.mark.parametrize("window", [None, Window(10, 20)])
def test_every_example_comes_at_every_place_as_often(window):
    """Chi-square of the places of 2000 examples over 100 epochs, in ten bins: 9 on average, one of a thousand above 28
    by luck."""
    count, num_epochs = 2000, 100
    epochs = tf.repeat(tf.range(num_epochs, dtype=tf.int64), count)
    index = tf.tile(tf.range(count, dtype=tf.int64), [num_epochs])
    order = shuffled(index, epochs, count, 7, window).numpy().reshape(num_epochs, count)
    places = np.argsort(order, axis=1) // (count // 10)
    observed = np.stack([np.count_nonzero(places == bin, axis=0) for bin in range(10)])
    expected = num_epochs / 10
    chi_square = ((observed - expected) ** 2 / expected).sum(axis=0)
    assert chi_square.mean() == pytest.approx(9, abs=0.5)
    assert chi_square.max() < 40


# Several sources.


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1), (1, 1023)])
def test_each_source_has_its_share_and_each_of_its_examples_in_turn(weights):
    counts = [50, 1000, 7][: len(weights)]
    firsts = np.cumsum([0, *counts])
    n = tf.range(4 * MIXTURE_EXAMPLES, dtype=tf.int64)
    phases = [Phase(0, weights)]
    examples = mixed(n, counts, phases, seed=5).numpy()
    sources = np.searchsorted(firsts, examples, side="right") - 1
    shares = shares_of(weights)
    assert sum(shares) == MIXTURE_EXAMPLES
    np.testing.assert_allclose(np.array(shares) / MIXTURE_EXAMPLES, np.array(weights) / sum(weights), atol=1e-3)
    for part in np.split(sources, 4):
        assert np.bincount(part, minlength=len(weights)).tolist() == shares
    assert not np.array_equal(sources[:MIXTURE_EXAMPLES], sources[MIXTURE_EXAMPLES : 2 * MIXTURE_EXAMPLES])
    for i, count in enumerate(counts):
        own = np.sort(np.bincount(examples[sources == i] - firsts[i], minlength=count))
        assert own[-1] - own[0] <= 1  # All before any comes again.
    some = tf.constant([1, 4000, 77], tf.int64)
    np.testing.assert_array_equal(mixed(some, counts, phases, seed=5), examples[some.numpy()])


@pytest.mark.parametrize(
    ("weights", "counts", "seed", "sha256"),
    [
        ((3.0, 1.0), [40, 200], 0, "fdb6d6677485e742"),
        ((0.7, 0.2, 0.1), [50, 1000, 7], 5, "495ce1fbde28453b"),
        ((1.0, 1023.0), [999, 12345], 2**63 - 1, "afdb26717f97d7b3"),
    ],
)
def test_a_mixture_of_constant_weights_has_the_order_of_version_0_1(weights, counts, seed, sha256):
    n = tf.range(5000, dtype=tf.int64)
    examples = tf.concat([mixed(n + begin, counts, [Phase(0, weights)], seed) for begin in (0, 10**12)], axis=0)
    assert hashlib.sha256(examples.numpy().astype("<i8").tobytes()).hexdigest().startswith(sha256)


# Phases that end with a turn, one example after a turn, within the first turn, one example long, and never.
@pytest.mark.parametrize(
    "phases",
    [
        [Phase(0, (9, 1)), Phase(2 * MIXTURE_EXAMPLES, (1, 1))],
        [
            Phase(0, (0.7, 0.2, 0.1)),
            Phase(1 + MIXTURE_EXAMPLES, (0, 1, 3)),
            Phase(3000, (1, 1, 0)),
            Phase(3001, (1, 2, 4)),
        ],
        [Phase(0, (1, 0)), Phase(7, (0, 1)), Phase(300, (512, 511))],
        [Phase(0, (1, 1023)), Phase(MIXTURE_EXAMPLES - 1, (1023, 1))],
    ],
)
def test_weights_that_change_give_each_source_its_share_of_each_phase(phases):
    counts = [50, 1000, 7][: len(phases[0].weights)]
    firsts = np.cumsum([0, *counts])
    end = phases[-1].begin + 3 * MIXTURE_EXAMPLES
    examples = mixed(tf.range(end, dtype=tf.int64), counts, phases, seed=5).numpy()
    sources = np.searchsorted(firsts, examples, side="right") - 1
    for phase, after in itertools.zip_longest(phases, phases[1:]):
        size = (end if after is None else after.begin) - phase.begin
        found = np.bincount(sources[phase.begin : phase.begin + size], minlength=len(counts))
        shares = np.array(shares_of(phase.weights)) / MIXTURE_EXAMPLES
        assert np.abs(found - size * shares).max() < 1
        assert not found[np.array(phase.weights) == 0].any()
        # A share is a whole number of 1024ths of the weights.
        assert np.abs(shares - np.array(phase.weights) / sum(phase.weights)).max() < 1 / MIXTURE_EXAMPLES
        until = slice(0, phase.begin + size)
        for i, count in enumerate(counts):
            own = np.bincount(examples[until][sources[until] == i] - firsts[i], minlength=count)
            assert own.max() - own.min() <= 1  # All before any comes again, over all phases.
    some = tf.constant(np.random.default_rng(0).permutation(end)[:500], tf.int64)
    np.testing.assert_array_equal(mixed(some, counts, phases, seed=5), examples[some.numpy()])
    # A phase that is planned does not change the turns before it.
    whole = phases[1].begin // MIXTURE_EXAMPLES * MIXTURE_EXAMPLES
    before = mixed(tf.range(whole, dtype=tf.int64), counts, phases[:1], seed=5)
    np.testing.assert_array_equal(before, examples[:whole])
    expected = np.bincount(sources, minlength=len(counts)) / end
    np.testing.assert_allclose(mean_weights(phases, end), expected, atol=2e-3)  # Of rounding to 1024ths.


def test_phases_begin_at_their_steps_and_those_before_the_data_are_over():
    data = DataConfig(train=("a", "b"), weights=(9, 1), weights_from_step={30: (0, 1), 10: (1, 1)})
    train = TrainConfig(precision="float32", total_steps=200, global_batch_size=4)
    assert phases_of(data, train) == [(0, (9, 1)), (40, (1, 1)), (120, (0, 1))]
    assert phases_of(data, train, data_offset=-4 * 10) == [(0, (1, 1)), (80, (0, 1))]
    assert phases_of(data, train, data_offset=-4 * 31) == [(0, (0, 1))]
    assert phases_of(data, train, data_offset=2) == [(0, (9, 1)), (42, (1, 1)), (122, (0, 1))]


def mixture_of(tmp_path, **data):
    for name, word, num_lines in (("sun", "sun", 40), ("moon", "moon", 200)):
        (tmp_path / f"{name}.txt").write_text(f"{word} {word}\n" * num_lines)
        (tmp_path / f"{name}_valid.txt").write_text(f"{word}\n" * 5)
    sources = {"train": [str(tmp_path / "sun.txt"), str(tmp_path / "moon.txt")], "weights": [3, 1]}
    return config_of(tmp_path, data={**sources, **data})


def test_sources_are_mixed_by_weight_and_workers_share_the_mixture(tmp_path):
    valid = [str(tmp_path / "sun_valid.txt"), str(tmp_path / "moon_valid.txt")]
    config = mixture_of(tmp_path, validation=valid)
    prepared = tiny_prepared(config)
    assert list(prepared.splits) == ["train-0", "validation-0", "train-1", "validation-1"]
    assert [part.num_documents for part in prepared.parts("train")] == [40, 200]
    assert prepared.split("train").num_documents == 240
    sun = prepared.tokenizer().encode("sun")[0]
    examples = examples_of(training_batches(prepared, config, 0, 256))
    assert sum(example[1][0] == sun for example in examples) == 768
    halves = [examples_of(training_batches(prepared, config, 0, 256, Share(i, 1, 2))) for i in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(examples)
    # Other weights, the same shards.
    assert tiny_prepared(mixture_of(tmp_path, validation=valid, weights=[1, 1])) == prepared


def test_batches_change_their_mixture_at_the_step_on_any_number_of_replicas_and_after_a_resume(tmp_path):
    valid = [str(tmp_path / "sun_valid.txt"), str(tmp_path / "moon_valid.txt")]
    changes = {"3": [1, 1], "8": [0, 1]}
    config = mixture_of(tmp_path, validation=valid, weights=[1, 0], weights_from_step=changes)
    prepared = tiny_prepared(config)
    assert tiny_prepared(mixture_of(tmp_path, validation=valid)) == prepared  # The same shards.
    sun = prepared.tokenizer().encode("sun")[0]
    batches = list(training_batches(prepared, config, 0, 20).as_numpy_iterator())
    num_sun = [int((targets[:, 0] == sun).sum()) for _, targets, _ in batches]
    assert num_sun[:3] == [4] * 3 and num_sun[8:] == [0] * 12
    assert sum(num_sun[3:8]) == 10 and 0 < min(num_sun[3:8]) < max(num_sun[3:8])
    resumed = list(training_batches(prepared, config, 5, 20).as_numpy_iterator())
    np.testing.assert_equal(resumed, batches[5:])
    parts = [list(training_batches(prepared, config, 0, 20, Share(i, 1, 2)).as_numpy_iterator()) for i in (0, 1)]
    together = [tuple(np.concatenate(each) for each in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)]
    np.testing.assert_equal(together, batches)


def test_each_source_holds_out_its_own_part(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(300)))
    data = {"train": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], "weights": [1, 1], "held_out_fraction": 0.1}
    prepared = tiny_prepared(config_of(tmp_path, data=data))
    for part in (*prepared.parts("train"), *prepared.parts("validation")):
        assert part.num_documents > 10
    assert prepared.split("train").num_documents + prepared.split("validation").num_documents == 600


def test_the_last_evaluation_batch_is_filled_up_without_weight(tmp_path):
    config = config_of(tmp_path)
    prepared = tiny_prepared(config)
    sizes = [batch[0].shape for batch in evaluation_batches(prepared, config).as_numpy_iterator()]
    assert sizes == [(4, 6)] * 6  # 23 lines
    examples = examples_of(evaluation_batches(prepared, config))
    assert [any(example[2]) for example in examples] == [True] * 23 + [False]


@pytest.mark.parametrize("mode", ["lines", "packed"])
def test_some_evaluation_batches_are_a_fixed_sample_of_the_whole_text(tmp_path, mode):
    config = config_of(tmp_path, mode, num_lines=40)
    prepared = tiny_prepared(config, 150)
    split = prepared.split("validation")
    number_tokens(prepared, "validation")
    whole = [example for example in examples_of(evaluation_batches(prepared, config)) if any(example[2])]
    count = num_examples(split, config)
    assert len(whole) == count
    for num_batches in (1, 3, -(-count // 4) - 1):
        sample = examples_of(evaluation_batches(prepared, config, num_batches))
        places = [whole.index(example) for example in sample]
        assert len(places) == 4 * num_batches
        # At equal distances, except for rounding, and as far from the start as from the end.
        steps = set(np.diff(places).tolist())
        assert steps <= {count // len(places), count // len(places) + 1}
        assert abs(places[0] - (count - 1 - places[-1])) <= 1
    workers = [examples_of(evaluation_batches(prepared, config, 3, Share(i, 1, 2))) for i in (0, 1)]
    sample = examples_of(evaluation_batches(prepared, config, 3))
    assert [example for i in range(0, 6, 2) for worker in workers for example in worker[i : i + 2]] == sample
    for num_batches in (-(-count // 4), 10 * count):
        examples = examples_of(evaluation_batches(prepared, config, num_batches))
        assert [example for example in examples if any(example[2])] == whole


def test_epochs_are_counted_in_steps_rounded_up(tmp_path):
    config = config_of(tmp_path, train={"total_steps": None, "num_epochs": 2})
    assert total_steps(tiny_prepared(config), config) == 12  # 46 examples, 4 a step
    with pytest.raises(UserError, match=r"optimizer.warmup_steps=13 is more than the 12 steps that train.num_epochs=2"):
        long = config_of(tmp_path, train={"total_steps": None, "num_epochs": 2}, optimizer={"warmup_steps": 13})
        total_steps(tiny_prepared(long), long)
    all_warm = config_of(
        tmp_path,
        train={"total_steps": None, "num_epochs": 2},
        optimizer={"warmup_steps": 12, "schedule": "cosine"},
    )
    with pytest.raises(
        UserError,
        match=r"warmup_steps=12 the rate reaches its peak at the last step of the 12 steps that train.num_epochs=2",
    ):
        total_steps(tiny_prepared(all_warm), all_warm)
    profile = {"at_step": 7, "num_steps": 6}
    late = config_of(tmp_path, train={"total_steps": None, "num_epochs": 2}, profile=profile)
    with pytest.raises(UserError, match=r"profile.num_steps=6 go beyond the 12 steps that train.num_epochs=2 takes"):
        total_steps(tiny_prepared(late), late)


def test_keras_fit_takes_the_batches_as_they_are(tmp_path):
    config = config_of(tmp_path)
    prepared = tiny_prepared(config)
    model = keras.Sequential([keras.layers.Embedding(60, 8), keras.layers.Dense(60)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(training_batches(prepared, config, 0, 9), shuffle=False, verbose=0)
    assert np.isfinite(history.history["loss"][0])


def test_the_pipeline_holds_no_python(tmp_path):
    config = config_of(tmp_path)
    graph = training_batches(tiny_prepared(config, 40), config, 0, 9)._as_serialized_graph().numpy()
    assert b"RandomIndexShuffle" in graph
    assert b"PyFunc" not in graph
