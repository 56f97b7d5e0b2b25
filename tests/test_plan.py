"""Laws of what a config is said to cost, and that this is what it is made of."""

import itertools
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from trainer.config import Config
from trainer.config_file import load_config, make_config
from trainer.data.prepare import prepare
from trainer.distributed.strategy import make_strategy
from trainer.errors import UserError
from trainer.execution import resolve
from trainer.hardware.devices import Device, Target, cpu, parse_target
from trainer.hardware.processor import processor
from trainer.model.attention import BLOCK, RECOMPUTED_BLOCK
from trainer.model.gpt import GPT
from trainer.model.loss import CHUNK_ROWS
from trainer.planning.compiler import CompiledStep, DoesNotFit
from trainer.planning.plan import (
    LOGIT_ROWS_AT_A_TIME,
    QUERIES_AT_A_TIME,
    RECOMPUTED_QUERIES_AT_A_TIME,
    count_parameters,
    estimate_memory,
    flops_per_token,
    kept_bytes,
    matrix_parameters,
    parameter_shapes,
    print_compiled,
    print_plan,
    smallest_step_secs,
    tokens_per_sec_at_peak,
)
from trainer.training.step import TrainingStep

CONFIGS = Path(__file__).parent.parent / "configs"
SETTINGS = {"run_folder": "r", "train": {"precision": "float32", "total_steps": 1}}
MODERN = ["model.norm=rms", "model.positions=rope", "model.num_key_value_heads=2", "model.activation=swiglu"]
GPT2 = load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml")
V5E_8 = parse_target("tpu:v5e-8")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.pre_norm=true", "model.tied_embeddings=true", "model.use_bias=false"],
        ["model.num_heads=5", "model.hidden_dim=16", "model.intermediate_dim=7", "model.tied_embeddings=true"],
        ["model.pre_norm=true", "model.num_layers=1"],
        ["model.vocabulary_multiple=16"],
        ["model.vocabulary_multiple=16", "model.tied_embeddings=true"],
        *(["model.num_heads=4", *settings] for n in range(5) for settings in itertools.combinations(MODERN, n)),
    ],
)
def test_planned_weights_are_those_of_the_model(overrides: list[str]):
    config = make_config(SETTINGS, ["train.sequence_length=9", *overrides])
    model = GPT(config.model, 31, config.train.sequence_length)
    planned = dict(parameter_shapes(config.model, 31, config.train.sequence_length))
    assert planned == {variable.path: tuple(variable.shape) for variable in model.variables}
    assert count_parameters(config, 31) == model.count_params()


def test_the_tutorial_s_model_has_3_387_266_parameters(capsys: pytest.CaptureFixture[str]):
    config = make_config(SETTINGS)
    assert count_parameters(config, 5000) == 3_387_266
    print_plan(config)
    assert "parameters   3,387,266; vocabulary 5,000, sequence length 128\n" in capsys.readouterr().out


def test_the_sizes_of_the_model_s_blocks_are_those_that_are_planned_with():
    assert (QUERIES_AT_A_TIME, RECOMPUTED_QUERIES_AT_A_TIME) == (BLOCK, RECOMPUTED_BLOCK)
    assert LOGIT_ROWS_AT_A_TIME == CHUNK_ROWS


def test_vocabulary_size_given_goes_before_the_config_s(capsys: pytest.CaptureFixture[str]):
    print_plan(make_config(SETTINGS), 100, with_weights=True)
    assert "100 x 256" in capsys.readouterr().out


def test_planned_parameters_are_those_of_the_padded_vocabulary(capsys: pytest.CaptureFixture[str]):
    print_plan(make_config(SETTINGS, ["model.vocabulary_multiple=128"]), 5000, with_weights=True)
    table = capsys.readouterr().out
    # 120 rows more, in the embedding, the projection and its bias.
    assert "5120 x 256" in table and f"{3_387_266 + 120 * (2 * 256 + 1):,}" in table
    assert "vocabulary 5,000 in 5,120 rows" in table


def test_vocabulary_that_only_the_text_knows_must_be_given(capsys: pytest.CaptureFixture[str]):
    config = make_config(SETTINGS, ["tokenizer.kind=char"])
    with pytest.raises(
        UserError, match=r"tokenizer.kind='char' takes its vocabulary from the text, which plan does not"
    ):
        print_plan(config)
    with_file = make_config(SETTINGS, ["tokenizer={kind='bpe',path='tokenizer.json'}"])
    with pytest.raises(UserError, match=r"tokenizer.kind='bpe' takes its vocabulary from tokenizer.path, which plan"):
        print_plan(with_file)
    print_plan(make_config(SETTINGS, ["tokenizer.kind=byte"]))
    assert "vocabulary 258" in capsys.readouterr().out
    print_plan(config, 68)
    assert "vocabulary 68" in capsys.readouterr().out
    with pytest.raises(UserError, match="--vocabulary-size 0 must be at least 1"):
        print_plan(config, 0)


def test_prepared_text_tells_its_vocabulary_and_how_many_epochs_the_steps_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}\n" for i in range(40)))
    data: dict[str, Any] = {"train": [str(text)], "validation": [str(text)]}
    data |= {"mode": "lines", "prepared_folder": str(tmp_path / "prepared")}
    settings: dict[str, Any] = {**SETTINGS, "data": data, "tokenizer": {"kind": "char"}}
    overrides = ["train.total_steps=5", "train.global_batch_size=16"]
    with pytest.raises(UserError, match="give --vocabulary-size"):
        print_plan(make_config(settings, overrides))
    prepared = prepare(make_config(settings), lambda _: None)
    print_plan(make_config(settings, overrides))
    out = capsys.readouterr().out
    assert f"vocabulary {prepared.vocabulary_size}," in out
    assert f"steps        5 of 16 x 128 tokens: {5 * 16 * 128:,} tokens" in out
    assert f"epochs       2.00 of 40 examples ({prepared.folder})" in out
    print_plan(make_config(settings, ["train.total_steps=none", "train.num_epochs=2", "train.global_batch_size=16"]))
    assert "steps        5 of 16 x 128" in capsys.readouterr().out


def test_steps_of_epochs_over_the_storybook_are_known_before_it_is_prepared(capsys: pytest.CaptureFixture[str]):
    print_plan(load_config(CONFIGS / "quickstart.toml", ["data.prepared_folder=nowhere"]))
    assert "steps        2,166 of 32 x 119 tokens" in capsys.readouterr().out
    packed = load_config(CONFIGS / "quickstart.toml", ["data.prepared_folder=nowhere", "data.mode=packed"])
    print_plan(packed)
    assert "how many 1 epochs take is known once the text is prepared" in capsys.readouterr().out


def test_operations_of_a_token_are_those_of_the_formula():
    # Of the tutorial's model: two layers of 256, three heads of 85, 5000 logits, 128 tokens.
    config = make_config(SETTINGS)
    matrices = 2 * (4 * 256 * 255 + 2 * 256 * 256) + 5000 * 256
    assert matrix_parameters(config, 5000) == matrices
    assert flops_per_token(config, 5000) == 6 * matrices + 12 * 2 * 3 * 85 * 128
    tied = make_config(SETTINGS, ["model.tied_embeddings=true"])
    assert matrix_parameters(tied, 5000) == matrices


def test_a_token_at_peak_takes_its_operations_by_those_of_all_devices():
    at_peak = tokens_per_sec_at_peak(GPT2, 50257, V5E_8)
    assert at_peak is not None
    assert at_peak * flops_per_token(GPT2, 50257) == pytest.approx(8 * 197e12)
    assert tokens_per_sec_at_peak(GPT2, 50257, parse_target("cpu")) is None
    # It has no circuits for bfloat16.
    assert tokens_per_sec_at_peak(GPT2, 50257, parse_target("gpu:V100-16GB")) is None


def test_roofline_is_of_the_memory_where_that_is_slow():
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


def test_memory_of_weights_and_moments_is_exact():
    parts = estimate_memory(make_config(SETTINGS), 5000, V5E_8)
    assert (parts["weights"], parts["optimizer"]) == (3_387_266 * 4, 2 * 3_387_266 * 4)
    bf16 = estimate_memory(make_config(SETTINGS, ["train.precision=mixed_bfloat16"]), 5000, V5E_8)
    assert bf16["weights"] - parts["weights"] == 2 * matrix_parameters(make_config(SETTINGS), 5000)


def test_micro_batches_keep_less_and_need_a_sum_of_gradients():
    config = make_config(SETTINGS, ["train.global_batch_size=64"])
    whole, halves, quarters = (estimate_memory(config, 5000, V5E_8, size) for size in (8, 4, 2))
    assert whole["activations"] == 2 * halves["activations"] == 4 * quarters["activations"]
    assert halves["gradients"] - whole["gradients"] == 3_387_266 * 4


def summed_bytes_of(step: TrainingStep) -> int:
    """How many bytes a weight a traced step keeps beside the gradients of the rows under way."""
    shape = [step.execution.examples, step.config.train.sequence_length]

    @tf.function(autograph=False)
    def gradients(*batch: tf.Tensor) -> list[tf.Tensor]:
        return step._sums_on_replica(batch, tf.constant(0, tf.int64), None).weights

    specs = [tf.TensorSpec(shape, dtype) for dtype in (tf.int32, tf.int32, tf.float32)]
    found = set()
    graph = gradients.get_concrete_function(*specs).graph
    for tensor in graph.outputs[2:6]:  # Of a block: the output projection's is summed over chunks of logits as well.
        source = tensor.op
        while source.type == "Identity":
            source = source.inputs[0].op
        found.add(tensor.dtype.size if source.type in ("While", "StatelessWhile") else 0)
    (found_bytes,) = found
    return found_bytes


def planned_bytes(config: Config, target: Target) -> float:
    """How many bytes a weight are planned for that."""
    num_weights = count_parameters(config, 13)
    parts = estimate_memory(config, 13, target)
    of_output = config.model.num_logits(13) * config.model.hidden_dim / num_weights
    under_way = 1 if parts["activations"] == 0 else of_output
    return round(parts["gradients"] / num_weights - under_way * (8 if config.train.precision == "float64" else 4), 6)


def step_config(batch: int, sequence: int, micro: int | None, precision: str, replicas: int = 1) -> Config:
    train: dict[str, Any] = {"precision": precision, "total_steps": 1, "global_batch_size": batch, "xla": "off"}
    return make_config(
        {
            "run_folder": "r",
            "model": {"num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4},
            "train": train | {"sequence_length": sequence} | ({} if micro is None else {"micro_batch_size": micro}),
            "distribution": {"kind": "cpu", "logical_devices": replicas},
        }
    )


def step_cases() -> Iterator[tuple[int, int, int | None, str]]:
    """Batch, sequence, micro-batch and precision: those that were planned wrong, edges of the halves, and a sample."""
    yield from ((33, 128, None, "float32"), (4, 16, None, "float32"), (5, 16, None, "float32"))
    yield from ((16, 128, None, "float32"), (16, 127, None, "float32"), (2, 1024, None, "float64"))
    yield from ((4, 16, 2, "float32"), (4, 16, 1, "float32"), (6, 16, 2, "float64"), (4, 16, 4, "mixed_bfloat16"))
    pick = random.Random(0)
    for _ in range(6):
        micro, parts = pick.randint(1, 5), pick.randint(1, 5)
        sequence, is_asked = pick.choice([8, 128, 512]), pick.random() < 0.5
        yield micro * parts, sequence, micro if is_asked else None, pick.choice(["float32", "mixed_float16", "float64"])


@pytest.mark.parametrize(("batch", "sequence", "micro", "precision"), [*step_cases()])
def test_planned_gradients_are_those_that_the_step_keeps(batch: int, sequence: int, micro: int | None, precision: str):
    config = step_config(batch, sequence, micro, precision)
    strategy = make_strategy(config.distribution)
    with strategy.scope():
        step = TrainingStep(config, 1, GPT(config.model, 13, sequence, dtype=precision), strategy)
    execution = resolve(config, processor("CPU"), 1)
    assert step.execution.micro_batch_size == execution.micro_batch_size
    assert summed_bytes_of(step) == execution.summed_bytes == planned_bytes(config, cpu())


def test_planned_gradients_of_several_replicas_and_of_accelerators_are_those_of_the_execution():
    v5e_4 = parse_target("tpu:v5e-4")
    for batch, micro, precision, on_cpus, on_tpu in (
        (4, None, "float32", 8, 0),  # Four terms: each replica's gradients are widened for their sum.
        (4, None, "float64", 0, 0),
        (8, None, "float32", 8, 0),
        (8, 1, "float32", 8, 4),
        (8, 1, "float64", 8, 8),
        (64, None, "float32", 8, 0),
    ):
        config = step_config(batch, 256, micro, precision, replicas=4)
        assert planned_bytes(config, cpu(4)) == resolve(config, processor("CPU"), 4).summed_bytes == on_cpus
        assert planned_bytes(config, v5e_4) == resolve(config, processor("TPU"), 4).summed_bytes == on_tpu


def test_plan_says_how_many_rows_a_cpu_takes_at_a_time(capsys: pytest.CaptureFixture[str]):
    for batch, size in ((64, 32), (33, 33), (12, 12)):
        print_plan(make_config(SETTINGS, ["distribution.kind=cpu", f"train.global_batch_size={batch}"]))
        assert f"{batch} rows a step on each device, {size} at a time" in capsys.readouterr().out


def test_where_little_is_kept_the_end_of_the_backward_pass_is_the_worst_instant():
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
        (300, "attention", 0),
    ],
)
def test_probabilities_are_kept_of_each_block_of_queries_up_to_its_end(sequence: int, recompute: str, scores: int):
    model = make_config(SETTINGS).model
    of_one_score = 4 * model.num_layers * model.num_heads
    # As many tokens, each a sequence with one score of its own.
    others = kept_bytes(model, 2 * sequence, 1, 4, False, recompute) - 2 * sequence * of_one_score
    assert kept_bytes(model, 2, sequence, 4, False, recompute) - others == 2 * scores * of_one_score


def test_blocks_made_again_keep_their_inputs_and_one_block():
    def kept(num_layers: int, recompute: str) -> float:
        model = make_config(SETTINGS, [f"model.num_layers={num_layers}"]).model
        return kept_bytes(model, 2, 512, 4, False, recompute)

    one_input = 2 * 512 * 256 * 4
    assert kept(1, "blocks") == kept(1, "attention") + one_input
    assert kept(7, "blocks") - kept(1, "blocks") == 6 * one_input


def test_a_device_that_is_named_is_planned_for_and_one_that_is_not_is_asked_for(capsys: pytest.CaptureFixture[str]):
    print_plan(GPT2, None, V5E_8, 0.5)
    out = capsys.readouterr().out
    total = sum(estimate_memory(GPT2, 50257, V5E_8).values())
    assert f"memory       {total / 1e9:.2f} GB of 16.00 GB on each: fits" in out
    at_peak = tokens_per_sec_at_peak(GPT2, 50257, V5E_8)
    assert at_peak is not None
    secs = 19_000 * 512 * 1024 / at_peak
    assert (
        f"{secs / 3600:.1f} hours at the roofline; {2 * secs / 3600:.1f} hours at a model FLOPs utilisation of 50%"
        in out
    )
    print_plan(GPT2, None, V5E_8)
    assert "hours at a model FLOPs utilisation of 40%, which is assumed (--utilisation)\n" in capsys.readouterr().out
    print_plan(GPT2)
    out = capsys.readouterr().out
    assert "distribution.kind='tpu' does not say which; --target adds memory and time: write gpu:NAMExCOUNT" in out
    assert "memory       " not in out


def test_what_does_not_fit_is_said_with_the_micro_batch_that_would(capsys: pytest.CaptureFixture[str]):
    overrides = ["train.micro_batch_size=128", "train.global_batch_size=1024"]
    config = load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml", overrides)
    print_plan(config, None, V5E_8)
    out = capsys.readouterr().out
    found = re.search(r"does not fit, by this estimate; train.micro_batch_size=(\d+) is the largest that does", out)
    assert found
    largest = int(found[1])
    fitting, too_much = (sum(estimate_memory(config, 50257, V5E_8, n).values()) for n in (largest, 2 * largest))
    assert fitting <= 16e9 < too_much


def test_time_of_a_dtype_that_a_device_cannot_compute_in_is_not_told(capsys: pytest.CaptureFixture[str]):
    print_plan(GPT2, None, parse_target("gpu:T4x8"))
    said = "not known for train.precision='mixed_bfloat16', computed in bfloat16: of T4 the table has float16, float32"
    assert f"time         {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize("utilisation", [0.0, 1.1, -1.0, math.nan])
def test_an_impossible_utilisation_is_said(utilisation: float):
    with pytest.raises(UserError, match=f"--utilisation {utilisation} must be above 0 and at most 1."):
        print_plan(GPT2, None, V5E_8, utilisation)


def test_a_utilisation_that_no_time_is_told_by_is_refused():
    for target, reason in (
        (parse_target("cpu"), "the time is not known for train.precision='mixed_bfloat16'"),
        (None, "without --target; write"),
    ):
        with pytest.raises(UserError, match=f"--utilisation 0.5 has no effect.*{reason}"):
            print_plan(GPT2, None, target, 0.5)


def test_a_batch_that_the_devices_cannot_share_is_said():
    with pytest.raises(UserError, match=r"train.global_batch_size=512 is not a multiple of 3 replicas"):
        print_plan(GPT2, None, parse_target("gpu:H100x3"))


def test_a_micro_batch_to_be_found_is_the_largest_that_fits(capsys: pytest.CaptureFixture[str]):
    overrides = ["train.micro_batch_size=auto", "train.global_batch_size=1024"]
    print_plan(load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml", overrides), None, V5E_8)
    said = capsys.readouterr().out
    largest = re.search(r"micro_batch_size=(\d+) is the largest that does", said)
    assert largest and 1 < int(largest[1]) < 128
    assert f"128 rows a step on each device, {largest[1]} at a time" in said
    assert "GB on each: fits, by this estimate" in said


def test_to_compile_takes_an_accelerator():
    for target in (None, parse_target("cpu")):
        with pytest.raises(UserError, match="--compile needs a --target that is a TPU or GPUs; write gpu:NAMExCOUNT"):
            print_compiled(GPT2, None, target)


@pytest.mark.parametrize(("own", "largest", "num_compiled"), [(8, 16, 3), (64, 16, 4), (8, 32, 3), (4, 0, 3)])
def test_the_largest_micro_batch_is_found_with_few_compiles(
    own: int, largest: int, num_compiled: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    compiled = []

    def compile_step(config: Config, vocabulary_size: int, target: Target) -> CompiledStep:
        size = config.train.micro_batch_size
        assert isinstance(size, int)
        compiled.append(size)
        if size > 32:
            raise DoesNotFit("Used 40G of 15.75G hbm.")
        return CompiledStep(10**9, 10**9 if size <= largest else 20 * 10**9, 1e12, 1e9, 4, 0, 60.0)

    monkeypatch.setattr("trainer.planning.plan.compile_step", compile_step)
    config = load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml", [f"train.micro_batch_size={own}"])
    assert print_compiled(config, None, V5E_8) == (own <= largest)
    assert f"largest train.micro_batch_size that fits: {largest or 'none'}\n" in capsys.readouterr().out
    assert len(compiled) == num_compiled
