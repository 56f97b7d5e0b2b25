"""The law this project stands on: the same weights on any number of replicas, hosts and micro-batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import replica_steps  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.distributed.strategy import make_strategy

SCRIPT = Path(__file__).parent / "replica_steps.py"
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
MISTAKES = ["clip_before_reduce", "mean_of_means", "dropped_last_example", "one_mask_for_all"]

TIED = {"tied_embeddings": True, "use_bias": False, "pre_norm": True}
CASES = [
    {"model": model, "precision": precision, "micro_batches": micro_batches}
    for model in ({}, TIED)
    for precision in ("float64", "float32")
    for micro_batches in (1, 4)
]
MODERN = {
    "model": {
        **TIED,
        "norm": "rms",
        "positions": "rope",
        "num_key_value_heads": 1,
        "activation": "swiglu",
        "qk_norm": True,
    },
    "train": {"z_loss": 0.1, "batch_warmup": {2: 48}},
    "optimizer": {"kind": "muon", "ema_decay": 0.3},
}
# All examples of a replica at a time, which a batch warm-up does not allow, or a part of them.
MUON = [{**MODERN, "train": {}, "micro_batches": micro_batches} for micro_batches in (1, 2, 4)]
CONTROLS = [{"mistake": mistake} for mistake in MISTAKES]
# Sizes that leave pieces of which the last rows are padding.
ODD = {"num_layers": 2, "num_heads": 3, "hidden_dim": 18, "intermediate_dim": 40}
SPLIT = [
    {"model": ODD | TIED, "precision": "float64", "micro_batches": 3},
    {
        "model": {**ODD, **MODERN["model"], "pre_norm": False, "tied_embeddings": False},
        "optimizer": {"ema_decay": 0.3},
        "precision": "float64",
        "micro_batches": 1,
    },
    {"model": ODD, "precision": "float32", "micro_batches": 3},
    {
        "model": {**ODD, **MODERN["model"]},
        "optimizer": {"kind": "muon"},
        "precision": "float64",
        "micro_batches": 1,
    },
]


def split(case, shard="optimizer", over=None):
    """The same case with something split over the replicas, or over groups of them."""
    return {**case, "distribution": {"shard": shard, "shard_over": over}}


SHARDS = ("optimizer", "weights")
# A step that is traced in a moment, for many replicas. Eleven share another batch.
FOREIGN = {"foreign": True}
ELEVENTHS = {**FOREIGN, "train": {"global_batch_size": 88}}
SPLIT_CONTROLS = [split({"mistake": mistake}) for mistake in [*MISTAKES, *replica_steps.SPLIT_MISTAKES]]
SPLIT_CONTROLS += [split({"mistake": mistake}, "weights") for mistake in replica_steps.SPLIT_MISTAKES]
# The same eight micro-batches on any number of replicas.
EIGHTHS = {n: {"model": {}, "precision": "float32", "micro_batches": 8 // n} for n in (1, 2, 4, 8)}
EIGHTHS_OF_MUON = {n: {**MODERN, "train": {}, "precision": "float32", "micro_batches": 8 // n} for n in (1, 4)}
# Replicas are traced one by one, which takes minutes for all cases on four and more: there each model and precision
# comes once or twice, and so does each number of micro-batches.
ON_FOUR = [CASES[1], CASES[4], CASES[7]]
ON_EIGHT = [
    {"model": {}, "precision": "float64", "micro_batches": 4},
    EIGHTHS[8],
    {"model": TIED, "precision": "float64", "micro_batches": 1},
    {"model": TIED, "precision": "float32", "micro_batches": 4},
]
# Four replicas as one group have some of the cases with each split, and as two groups others.
SPLIT_ON_FOUR = {"optimizer": SPLIT[:3], "weights": [SPLIT[0], *SPLIT[2:]]}
IN_GROUPS = {"optimizer": SPLIT[3], "weights": SPLIT[1]}
COMPILED = split({**SPLIT[0], "train": {"xla": "on"}}, "weights")
# A process takes all the cases that a number of replicas is needed for.
CASES_ON = {
    1: [*CASES, EIGHTHS[1], EIGHTHS_OF_MUON[1], *SPLIT, FOREIGN, ELEVENTHS, *MUON[::2]],
    2: [*CASES, COMPILED, *SPLIT_CONTROLS, *CONTROLS],
    4: [
        *ON_FOUR,
        EIGHTHS[4],
        EIGHTHS_OF_MUON[4],
        *(split(case, shard) for shard in SHARDS for case in SPLIT_ON_FOUR[shard]),
        *(split(case, shard, 2) for shard, case in IN_GROUPS.items()),
        MUON[1],
    ],
    8: [*ON_EIGHT, *(split(SPLIT[0], shard) for shard in SHARDS)],
    12: [split(FOREIGN)],
    16: [split(FOREIGN)],
}


def start(out, distribution, cases, environment=None):
    arguments = [sys.executable, str(SCRIPT), str(out), json.dumps(distribution), *map(json.dumps, cases)]
    return subprocess.Popen(
        arguments,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_workers(folder, addresses, cases):
    """Starts workers that take the cases together; returns the processes and their files of results."""
    outs = [folder / f"worker{i}.npz" for i in range(len(addresses))]
    cluster = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}} for i in range(len(outs))]
    return [
        start(out, {"kind": "multi_worker"}, cases, {"TF_CONFIG": json.dumps(task)})
        for out, task in zip(outs, cluster, strict=True)
    ], outs


def results_of(process, out):
    """One dictionary per case."""
    try:
        said, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
    arrays = dict(np.load(out))
    del arrays["num_replicas"]
    cases = sorted({int(name.split("/")[0]) for name in arrays})
    return [{n.split("/", 1)[1]: a for n, a in arrays.items() if n.startswith(f"{case}/")} for case in cases]


def relative_difference(one, two, group):
    def together(results):
        return np.concatenate([np.ravel(results[name]) for name in sorted(two) if name.startswith(group)])

    return np.linalg.norm(together(one) - together(two)) / np.linalg.norm(together(two))


def assert_equal(results, reference, tolerance):
    assert relative_difference(results, reference, "weights/") <= tolerance
    if any(name.startswith("averages/") for name in reference):
        assert relative_difference(results, reference, "averages/") <= tolerance
    names = [name for name in reference if name.startswith("gradients/")]
    whole = np.linalg.norm([np.linalg.norm(reference[name]) for name in names])
    for name in names:
        if np.linalg.norm(reference[name]) > 1e-6 * whole:
            difference = np.linalg.norm(results[name] - reference[name]) / np.linalg.norm(reference[name])
            assert difference <= tolerance, (name, difference)
    assert results["num_clipped"] == reference["num_clipped"] == 4
    assert results["batches_hash"] == reference["batches_hash"]
    np.testing.assert_allclose(results["loss"], reference["loss"], rtol=tolerance)


def on_replicas(num_replicas):
    return {"kind": "cpu", "logical_devices": num_replicas}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each number of replicas makes of its cases."""
    folder = tmp_path_factory.mktemp("replicas")
    outs = {n: folder / f"{n}.npz" for n in CASES_ON}
    # All at once: most of their time they trace, which takes one core each.
    processes = {n: start(outs[n], on_replicas(n), CASES_ON[n]) for n in CASES_ON}
    try:
        return {n: results_of(processes[n], outs[n]) for n in CASES_ON}
    finally:
        for process in processes.values():
            process.kill()


@pytest.fixture(scope="module")
def one_device(results):
    return results[1]


def test_two_replicas_make_the_weights_of_one(tmp_path):
    grown = MODERN | {"micro_batches": 4}  # In the warm-up a loop over micro-batches has a length that changes.
    cases = [{}, grown, SPLIT[0] | {"micro_batches": 6}, SPLIT[1], grown]
    twice, thirds = {"micro_batches": 2}, {"micro_batches": 3}
    again = thirds | {"train": {"recompute": "blocks"}}
    halves = [twice, twice, split(thirds), split(again, "weights"), split(twice, "weights")]
    given = [case | half for case, half in zip(cases, halves, strict=True)]
    process = start(tmp_path / "2.npz", on_replicas(2), given)
    wholes = []
    for case in cases:
        config = replica_steps.config_of(on_replicas(1), case)
        wholes.append(replica_steps.take_steps(make_strategy(config.distribution), config))
    for in_halves, whole in zip(results_of(process, tmp_path / "2.npz"), wholes, strict=True):
        assert_equal(in_halves, whole, TOLERANCE["float64"])


@pytest.mark.slow
def test_micro_batches_change_nothing_on_one_device(one_device):
    for whole in range(0, len(CASES), 2):
        parts = whole + 1
        assert_equal(one_device[parts], one_device[whole], TOLERANCE[CASES[parts]["precision"]])


@pytest.mark.slow
def test_the_same_micro_batches_make_the_same_bits_on_any_number_of_replicas(results):
    for cases in (EIGHTHS, EIGHTHS_OF_MUON):
        alone, *others = (results[n][CASES_ON[n].index(case)] for n, case in cases.items())
        for other in others:
            for name in alone.keys() - {"num_reductions"}:
                np.testing.assert_array_equal(other[name], alone[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [2, 4, 8])
def test_the_number_of_replicas_changes_nothing(results, one_device, num_replicas):
    cases = [case for case in CASES_ON[num_replicas] if case in CASES]
    assert len(cases) == len({2: CASES, 4: ON_FOUR, 8: ON_EIGHT}[num_replicas])
    for case in cases:
        result = results[num_replicas][CASES_ON[num_replicas].index(case)]
        i = CASES.index(case)
        assert_equal(result, one_device[i - i % 2], TOLERANCE[case["precision"]])
        # One operation sums all gradients, the loss and the counts.
        assert result["num_reductions"] == num_replicas


@pytest.mark.slow
def test_replicas_that_share_the_work_of_muon_change_nothing(results):
    # Two replicas are among the fast tests.
    whole, in_parts, on_four = results[1][-2], results[1][-1], results[4][-1]
    for result in (in_parts, on_four):
        assert_equal(result, whole, TOLERANCE["float64"])
    # One operation sums all gradients, and one all orthogonalized matrices.
    assert (whole["num_reductions"], on_four["num_reductions"]) == (0, 2 * 4)


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("num_replicas", [4, 8])
def test_what_is_in_pieces_changes_nothing(results, num_replicas, shard):
    cases = [case for case in SPLIT if split(case, shard) in CASES_ON[num_replicas]]
    assert cases == ([SPLIT[0]] if num_replicas == 8 else SPLIT_ON_FOUR[shard])
    for case in cases:
        result = results[num_replicas][CASES_ON[num_replicas].index(split(case, shard))]
        assert_equal(result, results[1][CASES_ON[1].index(case)], TOLERANCE[case["precision"]])
        # The loss, the counts and the square of the norm; the gradients are scattered.
        assert result["num_reductions"] == num_replicas


@pytest.mark.slow
def test_blocks_that_xla_compiles_between_the_exchanges_change_nothing(results):
    result = results[2][CASES_ON[2].index(COMPILED)]
    assert_equal(result, results[1][CASES_ON[1].index(SPLIT[0])], TOLERANCE["float64"])


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
def test_pieces_in_each_of_two_groups_change_nothing(results, shard):
    case = IN_GROUPS[shard]
    result = results[4][CASES_ON[4].index(split(case, shard, 2))]
    assert_equal(result, results[1][CASES_ON[1].index(case)], TOLERANCE["float64"])


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [12, 16])
def test_an_optimizer_in_pieces_changes_nothing_for_a_model_of_keras_on_many_replicas(results, num_replicas):
    (result,) = results[num_replicas]
    assert_equal(result, results[1][CASES_ON[1].index(FOREIGN)], TOLERANCE["float64"])


@pytest.mark.slow
def test_eleven_workers_with_an_optimizer_in_pieces_make_the_weights_of_one(tmp_path, results, free_addresses):
    # The names of eleven workers are not in the order of their numbers as texts: 0, 1, 10, 2, ...
    cases = [split(ELEVENTHS), split({**ELEVENTHS, "mistake": "place_is_number"})]
    processes, outs = start_workers(tmp_path, free_addresses(11), cases)
    reference = results[1][CASES_ON[1].index(ELEVENTHS)]
    for right, broken in [results_of(process, out) for process, out in zip(processes, outs, strict=True)]:
        assert_equal(right, reference, TOLERANCE["float64"])
        with pytest.raises(AssertionError):
            assert_equal(broken, reference, TOLERANCE["float32"])
        assert relative_difference(broken, reference, "weights/") > 1e-4


@pytest.mark.slow
def test_a_mistake_would_be_seen(results, one_device):
    controls = [case for case in CASES_ON[2] if "mistake" in case]
    assert len(controls) == 2 * len(MISTAKES) + 2 * len(replica_steps.SPLIT_MISTAKES)
    for mistake, broken in zip(controls, results[2][-len(controls) :], strict=True):
        with pytest.raises(AssertionError):
            assert_equal(broken, one_device[0], TOLERANCE["float32"])
        assert relative_difference(broken, one_device[0], "weights/") > 1e-4, mistake


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_number_of_hosts_changes_nothing(tmp_path, results, one_device, num_workers, free_addresses):
    workers = free_addresses(num_workers)
    chosen = [0, 3, 5]
    # Three workers have no whole number of examples in three micro-batches.
    apart = [SPLIT[0] | {"micro_batches": 4}, SPLIT[1]]
    in_pieces = [split(case, shard) for shard in SHARDS for case in apart]
    processes, outs = start_workers(tmp_path, workers, [*(CASES[i] for i in chosen), *in_pieces])
    all_results = [results_of(process, out) for process, out in zip(processes, outs, strict=True)]
    expected = [one_device[i - i % 2] for i in chosen] + 2 * [results[1][CASES_ON[1].index(case)] for case in SPLIT[:2]]
    for of_worker in all_results:
        for case, result, one in zip([*(CASES[i] for i in chosen), *apart, *apart], of_worker, expected, strict=True):
            assert_equal(result, one, TOLERANCE[case["precision"]])
            assert result["num_reductions"] == 1
    for others, first in zip(zip(*all_results[1:], strict=True), all_results[0], strict=True):
        for other in others:
            for name in first:
                np.testing.assert_array_equal(other[name], first[name])
