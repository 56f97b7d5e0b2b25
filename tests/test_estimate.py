"""Laws of what a step is estimated to need of its device."""

import dataclasses
import math
from pathlib import Path

import pytest

from trainer.config.file import load_config, make_config
from trainer.execution import resolve
from trainer.hardware.data_sheets import Device, Link
from trainer.hardware.devices import Target, cpu, parse_target
from trainer.hardware.processor import Processor
from trainer.model.pieces import BYTES_AT_ONCE
from trainer.model.size import (
    bytes_of_checkpoint,
    count_parameters,
    matrix_parameters,
    parameter_shapes,
    tokens_per_sec_at_peak,
)
from trainer.optimizers.cost import optimizer_flops
from trainer.planning.estimate import (
    computing_secs,
    estimate_memory,
    exchange_secs,
    kept_bytes,
    pieces_numbers,
    sent_bytes,
    smallest_step_secs,
)

CONFIGS = Path(__file__).parent.parent / "configs"
SETTINGS = {"run_folder": "r", "train": {"precision": "float32", "total_steps": 1}}
GPT2 = load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml", ["optimizer.kind=adamw"])
V5E_8 = parse_target("tpu:v5e-8")


def test_the_roofline_is_the_memory_s_if_memory_is_slow():
    fast = smallest_step_secs(GPT2, 50257, V5E_8)
    at_peak = tokens_per_sec_at_peak(GPT2, 50257, V5E_8)
    assert fast is not None and at_peak is not None
    assert fast == pytest.approx(512 * 1024 / at_peak)
    device = V5E_8.device
    slow = Device("slow", device.flops, device.memory_bytes, bytes_per_sec=1e9, num_axes=2)
    slower = Device("slower", device.flops, device.memory_bytes, bytes_per_sec=5e8, num_axes=2)
    of_slow, of_slower = (smallest_step_secs(GPT2, 50257, Target(each, 8)) for each in (slow, slower))
    assert of_slow is not None and of_slow > fast
    assert of_slower == pytest.approx(2 * of_slow)


@pytest.mark.parametrize("shard", ["nothing", "optimizer", "weights"])
def test_an_exchange_takes_what_is_sent_at_the_link_s_speed_and_only_a_tpu_computes_meanwhile(shard: str):
    config, h100s = make_config(SETTINGS, [f"distribution.shard={shard}"]), parse_target("gpu:H100x8")
    sent = sum(sent_bytes(config, 5000, h100s).values())
    computing, exchange = computing_secs(config, 5000, h100s), exchange_secs(config, 5000, h100s)
    assert computing is not None and exchange == sent / 450e9
    assert smallest_step_secs(config, 5000, h100s) == computing + exchange
    # The links of a v5e-8 send three quarters of what a chip's do in a large slice.
    sent = sum(sent_bytes(config, 5000, V5E_8).values())
    fast, slow = (
        V5E_8._replace(device=dataclasses.replace(V5E_8.device, link=Link("wire", speed / 0.75, 8)))
        for speed in (1e15, 1e6)
    )
    computing = computing_secs(config, 5000, V5E_8)
    assert computing is not None and smallest_step_secs(config, 5000, fast) == computing
    assert smallest_step_secs(config, 5000, slow) == pytest.approx(sent / 1e6) and computing < sent / 1e6


def test_how_long_an_exchange_takes_is_not_known_between_machines():
    config = make_config(SETTINGS, ["train.global_batch_size=144"])
    workers = make_config(SETTINGS, ["distribution.kind=multi_worker"])
    cases = [(config, 8), (config, 9), (config, 16), (workers, 8)]
    times = [exchange_secs(each, 5000, parse_target(f"gpu:H100x{number}")) for each, number in cases]
    assert times[0] and times[1:] == [None, None, None]
    assert exchange_secs(config, 5000, parse_target("gpu:GB200x72"))
    assert exchange_secs(config, 5000, parse_target("gpu:A10Gx8")) is None
    # A slice of a TPU has one kind of link, however many hosts and workers it has.
    assert exchange_secs(workers, 5000, parse_target("tpu:v5e-32"))
    assert exchange_secs(config, 5000, parse_target("gpu:A10Gx1")) == 0
    # A step is then as long as what is known of it.
    sixteen = parse_target("gpu:H100x16")
    assert smallest_step_secs(config, 5000, sixteen) == computing_secs(config, 5000, sixteen) is not None


def test_memory_of_weights_and_moments_is_exact():
    parts = estimate_memory(make_config(SETTINGS), 5000, V5E_8)
    assert (parts["weights"], parts["optimizer"]) == (3_387_266 * 4, 2 * 3_387_266 * 4)
    averaged = estimate_memory(make_config(SETTINGS, ["optimizer.ema_decay=0.999"]), 5000, V5E_8)
    assert averaged == parts | {"average": 3_387_266 * 4}
    bf16 = estimate_memory(make_config(SETTINGS, ["train.precision=mixed_bfloat16"]), 5000, V5E_8)
    assert bf16["weights"] - parts["weights"] == 2 * matrix_parameters(make_config(SETTINGS), 5000)


def test_an_optimizer_that_is_split_over_eight_needs_an_eighth_of_two_moments_and_a_copy_of_the_weights():
    whole, split = (
        estimate_memory(make_config(SETTINGS, [f"distribution.shard={shard}"]), 5000, V5E_8)
        for shard in ("nothing", "optimizer")
    )
    padding = split["optimizer"] - 3 * 4 * 3_387_266 / 8
    # 255 rows of attention's output, in each of two blocks, are 256 here.
    assert split["weights"] == whole["weights"] and 0 < padding < 0.02 * split["optimizer"]
    # If the end of the backward pass is the worst instant, the piece of the summed gradients is there, too.
    short = make_config(SETTINGS, ["train.sequence_length=2"])
    short_split = make_config(SETTINGS, ["train.sequence_length=2", "distribution.shard=optimizer"])
    more = [estimate_memory(config, 5000, V5E_8, 1)["gradients"] for config in (short, short_split)]
    assert more[1] - more[0] >= 4 * count_parameters(short, 5000) / 8
    # A weight above 32 MB travels by itself, in two copies.
    more = [estimate_memory(config, 50_000, V5E_8, 1)["gradients"] for config in (short, short_split)]
    embedding = 50_000 * short.model.hidden_dim
    assert 4 * embedding > BYTES_AT_ONCE
    assert more[1] - more[0] == 4 * pieces_numbers(short, 50_000, V5E_8) + 2 * 4 * embedding


def test_weights_that_are_split_over_eight_need_an_eighth_of_all_that_lasts_and_two_blocks():
    setting = ["distribution.shard=weights", "optimizer.ema_decay=0.9", "train.precision=mixed_bfloat16"]
    split = estimate_memory(make_config(SETTINGS, setting), 5000, V5E_8)
    piece = 4 * pieces_numbers(make_config(SETTINGS), 5000, V5E_8)
    assert (split["weights"], split["optimizer"], split["average"]) == (piece, 2 * piece, piece)
    assert 0 < piece - 4 * 3_387_266 / 8 < 0.02 * piece
    # The table of 5,000 x 256 is larger than two blocks: the loss needs most, the table in two dtypes and its gradient.
    # A TPU stacks the pieces of all blocks in bfloat16 for its loop over them; GPUs have no such loop.
    on_gpus = estimate_memory(make_config(SETTINGS, setting), 5000, parse_target("gpu:H100x8"))
    assert on_gpus["gathered"] == 5000 * 256 * (2 + 4)
    shapes = parameter_shapes(make_config(SETTINGS).model, 5000, 128)
    of_blocks = sum(math.prod(shape) for name, shape in shapes if "/block_" in name)
    assert split["gathered"] - on_gpus["gathered"] == pytest.approx(2 * of_blocks / 8, rel=0.02)
    assert split["gradients"] == piece + 5000 * 256 * 4
    # With a small table a block needs most: two blocks in bfloat16.
    large = ["model.num_layers=48", "model.hidden_dim=1600", "model.num_heads=25", "model.intermediate_dim=6400"]
    config = make_config(GPT2.model_dump(mode="json"), [*large, "distribution.shard=weights"])
    of_block = 12 * 1600**2 + 13 * 1600
    assert estimate_memory(config, 500, parse_target("gpu:H100x8"), 4)["gathered"] == 2 * 2 * of_block
    # GPT-2 1.5B fits, which it does not with all weights.
    assert sum(estimate_memory(config, 50257, V5E_8, 4).values()) < V5E_8.device.memory_bytes
    whole = make_config(config.model_dump(mode="json"), ["distribution.shard=optimizer", "train.recompute=blocks"])
    assert sum(estimate_memory(whole, 50257, V5E_8, 4).values()) > V5E_8.device.memory_bytes


def test_split_weights_are_sent_in_the_dtype_that_blocks_compute_in_twice_for_each_micro_batch():
    settings = ["distribution.shard=weights", "train.precision=mixed_bfloat16"]
    whole = sent_bytes(make_config(SETTINGS, settings), 5000, V5E_8)
    config = make_config(SETTINGS, [*settings, "train.micro_batch_size=1"])
    parts = sent_bytes(config, 5000, V5E_8)
    number = resolve(config, V5E_8.processor(), 8).examples
    assert number > 1 and parts == {name: pytest.approx(number * size) for name, size in whole.items()}
    weights = count_parameters(config, 5000)
    # Every gradient once in float32; blocks twice and tables once in bfloat16; rows of padding on top.
    assert whole["gradients"] / (7 / 8 * 4 * weights) == pytest.approx(1, abs=0.02)
    tables = 2 * 5000 * 256 + config.train.sequence_length * 256
    assert whole["weights"] / (7 / 8 * 2 * (2 * (weights - tables) + tables)) == pytest.approx(1, abs=0.02)


def test_a_cpu_sends_gradients_in_the_wider_dtype_in_which_it_adds_up_many_micro_batches():
    number, four = count_parameters(make_config(SETTINGS), 5000), cpu(4)
    assert sent_bytes(make_config(SETTINGS, ["train.global_batch_size=64"]), 5000, cpu(1)) == {}
    whole, split = (
        sent_bytes(make_config(SETTINGS, ["train.micro_batch_size=1", f"distribution.shard={shard}"]), 5000, four)
        for shard in ("nothing", "optimizer")
    )
    # An all-reduce sends 2 x 3/4 of the sum, a reduce-scatter and an all-gather 3/4 each, with the rows that pad.
    assert whole == {"gradients": 2 * 3 / 4 * 8 * number}
    assert split["gradients"] == 2 * split["weights"] and 0 <= split["weights"] / (3 / 4 * 4 * number) - 1 < 0.01


def test_muon_keeps_one_number_less_for_its_matrices_and_its_work_is_shared():
    adamw, muon = (make_config(SETTINGS, [f"optimizer.kind={kind}"]) for kind in ("adamw", "muon"))
    parts = estimate_memory(muon, 5000, V5E_8)
    # 255 columns each for queries, keys and values, and as many rows in what follows them.
    of_matrices = 2 * (256 * 3 * 255 + 255 * 256 + 2 * 256 * 256)
    assert parts["optimizer"] == 2 * 3_387_266 * 4 - of_matrices * 4
    assert bytes_of_checkpoint(adamw, 5000) - bytes_of_checkpoint(muon, 5000) == of_matrices * 4
    alone, shared = (optimizer_flops(muon, n) for n in (1, 2))
    # The layers have two matrices of each kind: 255 x 256 are eight, 256 x 256 are four.
    assert alone == 5 * 2 * (8 * 255**2 * (2 * 256 + 255) + 4 * 256**2 * (2 * 256 + 256))
    assert shared == alone / 2 and optimizer_flops(adamw, 1) == 0
    # With a memory as fast as this one, operations decide.
    fast_memory = Target(Device("fast", V5E_8.device.flops, 1e12, bytes_per_sec=1e15, num_axes=2), 1)
    fast, slow = (smallest_step_secs(config, 5000, fast_memory) for config in (adamw, muon))
    assert fast is not None and slow is not None and slow - fast == pytest.approx(alone / 197e12)


def test_micro_batches_keep_less_and_need_a_sum_of_gradients():
    config = make_config(SETTINGS, ["train.global_batch_size=64"])
    whole, halves, quarters = (estimate_memory(config, 5000, V5E_8, size) for size in (8, 4, 2))
    assert whole["activations"] == 2 * halves["activations"] == 4 * quarters["activations"]
    assert halves["gradients"] - whole["gradients"] == 3_387_266 * 4


def test_the_end_of_the_backward_pass_is_the_worst_instant_if_little_is_kept():
    parts = estimate_memory(make_config(SETTINGS, ["train.sequence_length=2"]), 5000, V5E_8, 1)
    assert parts["gradients"] == 2 * 4 * count_parameters(make_config(SETTINGS, ["train.sequence_length=2"]), 5000)
    assert parts["activations"] == 0


@pytest.mark.parametrize(
    ("sequence", "recompute", "scores"),
    [
        (255, "nothing", 255 * 255),
        (255, "attention", 255 * 255),
        (256, "nothing", 128 * 128 + 128 * 256),
        (300, "nothing", 128 * 128 + 128 * 256 + 44 * 300),
        (256, "attention", 0),
        (300, "attention", 0),
    ],
)
def test_probabilities_are_kept_of_each_block_of_queries_up_to_its_end(sequence: int, recompute: str, scores: int):
    overrides = [f"train.sequence_length={sequence}", f"train.recompute={recompute}", "train.global_batch_size=2"]
    config = make_config(SETTINGS, overrides)
    execution = resolve(config, Processor("TPU"), 1)
    without = kept_bytes(config, execution._replace(keeps_probabilities=False), copies_operands=False)
    of_one_score = 4 * config.model.num_layers * config.model.num_heads
    assert kept_bytes(config, execution, copies_operands=False) - without == 2 * scores * of_one_score


def test_normalized_queries_and_keys_are_kept_before_it_too():
    def kept(*overrides: str) -> float:
        config = make_config(SETTINGS, ["train.global_batch_size=2", "model.num_key_value_heads=1", *overrides])
        return kept_bytes(config, resolve(config, Processor("TPU"), 1), copies_operands=False)

    # 2 layers, 2 x 128 tokens, 3 heads of queries and one of keys, each 85 wide, in float32.
    assert kept("model.qk_norm=true") - kept() == 2 * 2 * 128 * (3 + 1) * 85 * 4


def test_blocks_made_again_keep_their_inputs_and_one_block():
    def kept(num_layers: int, recompute: str) -> float:
        overrides = [f"model.num_layers={num_layers}", f"train.recompute={recompute}", "train.global_batch_size=2"]
        config = make_config(SETTINGS, [*overrides, "train.sequence_length=512"])
        return kept_bytes(config, resolve(config, Processor("TPU"), 1), copies_operands=False)

    one_input = 2 * 512 * 256 * 4
    assert kept(1, "blocks") == kept(1, "attention") + one_input
    assert kept(7, "blocks") - kept(1, "blocks") == 6 * one_input


def test_a_replica_keeps_its_rows_of_the_momentum_of_muon():
    config = make_config(SETTINGS, ["optimizer.kind=muon", "distribution.shard=optimizer"])
    # Of 256 rows an eighth, and of the 255 rows of attention_output as many, one of them of zeros.
    of_matrices = 2 * (32 * 3 * 255 + 32 * 256 + 2 * 32 * 256)
    numbers = pieces_numbers(config, 5000, V5E_8)
    assert estimate_memory(config, 5000, V5E_8)["optimizer"] == (3 * numbers - of_matrices) * 4
