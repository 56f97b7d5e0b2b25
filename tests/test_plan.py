"""Laws of the figures that `trainer plan` prints."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.config.file import load_config, make_config
from trainer.config.settings import Config
from trainer.data.prepare import prepare
from trainer.errors import UserError
from trainer.hardware.devices import Target, parse_target
from trainer.model.size import count_parameters, tokens_per_sec_at_peak
from trainer.planning.compiler import CompiledStep, DoesNotFit
from trainer.planning.estimate import computing_secs, estimate_memory, exchange_secs, smallest_step_secs
from trainer.planning.plan import print_compiled, print_plan, short_time
from trainer.planning.verdict import Command

CONFIGS = Path(__file__).parent.parent / "configs"
SETTINGS = {"run_folder": "r", "train": {"precision": "float32", "total_steps": 1}}
MODERN = ["model.norm=rms", "model.positions=rope", "model.num_key_value_heads=2", "model.activation=swiglu"]
GPT2 = load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml", ["optimizer.kind=adamw"])
V5E_8 = parse_target("tpu:v5e-8")


def test_the_tutorial_s_model_has_3_387_266_parameters(capsys: pytest.CaptureFixture[str]):
    config = make_config(SETTINGS)
    assert count_parameters(config, 5000) == 3_387_266
    print_plan(config)
    assert "parameters   3,387,266; vocabulary 5,000, sequence length 128\n" in capsys.readouterr().out


def test_a_vocabulary_size_that_is_given_replaces_the_config_s(capsys: pytest.CaptureFixture[str]):
    print_plan(make_config(SETTINGS), 100, with_weights=True)
    assert "100 x 256" in capsys.readouterr().out


def test_planned_parameters_are_those_of_the_padded_vocabulary(capsys: pytest.CaptureFixture[str]):
    print_plan(make_config(SETTINGS, ["model.vocabulary_multiple=128"]), 5000, with_weights=True)
    table = capsys.readouterr().out
    # 120 rows more, in the embedding, the projection and its bias.
    assert "5120 x 256" in table and f"{3_387_266 + 120 * (2 * 256 + 1):,}" in table
    assert "vocabulary 5,000 in 5,120 rows" in table


def test_a_vocabulary_size_that_only_the_text_has_must_be_given(capsys: pytest.CaptureFixture[str]):
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


def test_the_vocabulary_and_the_number_of_epochs_come_from_the_prepared_text(
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
    print_plan(make_config(settings, overrides), 70_000)
    out = capsys.readouterr().out
    assert "epochs       known once the text is prepared\n" in out
    assert (
        f"text         {4 * 5 * 16 * 128 / 1e6:.1f} MB of disk if it is prepared to as many tokens, of 4 bytes" in out
    )
    prepared = prepare(make_config(settings), lambda _: None)
    print_plan(make_config(settings, overrides))
    out = capsys.readouterr().out
    assert "text   " not in out
    assert f"vocabulary {prepared.vocabulary_size}," in out
    assert f"steps        5 of 16 x 128 tokens: {5 * 16 * 128:,} tokens" in out
    assert f"epochs       2.00 of 40 examples ({prepared.folder})" in out
    print_plan(make_config(settings, ["train.total_steps=none", "train.num_epochs=2", "train.global_batch_size=16"]))
    assert "steps        5 of 16 x 128" in capsys.readouterr().out


def test_steps_of_epochs_over_the_storybook_are_known_before_it_is_prepared(capsys: pytest.CaptureFixture[str]):
    print_plan(load_config(CONFIGS / "quickstart.toml", ["data.prepared_folder=nowhere"]))
    assert "steps        1,733 of 32 x 112 tokens" in capsys.readouterr().out
    packed = load_config(CONFIGS / "quickstart.toml", ["data.prepared_folder=nowhere", "data.mode=packed"])
    print_plan(packed)
    assert "how many 1 epochs take is known once the text is prepared" in capsys.readouterr().out


def test_plan_prints_how_many_examples_a_cpu_takes_at_a_time(capsys: pytest.CaptureFixture[str]):
    for batch, size in ((64, 32), (33, 33), (12, 12)):
        print_plan(make_config(SETTINGS, ["distribution.kind=cpu", f"train.global_batch_size={batch}"]))
        assert f"{batch} examples a step on each device, {size} at a time" in capsys.readouterr().out


def test_a_target_is_planned_for_and_without_one_its_memory_and_time_are_left_out(capsys: pytest.CaptureFixture[str]):
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
    assert "distribution.kind='tpu' does not name one; --target adds memory and time, such as" in out
    assert "memory       " not in out


def test_a_config_that_does_not_fit_is_reported_with_the_largest_micro_batch_that_would(
    capsys: pytest.CaptureFixture[str],
):
    overrides = ["train.micro_batch_size=128", "train.global_batch_size=1024"]
    config = load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml", overrides)
    print_plan(config, None, V5E_8)
    out = capsys.readouterr().out
    assert "on each: does not fit, by this estimate\n" in out
    found = re.search(r"trainer plan CONFIG train.micro_batch_size=(\d+) --target tpu:v5e-8\n", out)
    assert found
    largest = int(found[1])
    fitting, too_much = (sum(estimate_memory(config, 50257, V5E_8, n).values()) for n in (largest, 2 * largest))
    assert fitting <= 16e9 < too_much


def test_no_time_is_printed_for_a_dtype_that_a_device_cannot_compute_in(capsys: pytest.CaptureFixture[str]):
    print_plan(GPT2, None, parse_target("gpu:T4x8"))
    reason = (
        "computed in bfloat16: the table of peaks has T4 in float16, float32; train.precision=mixed_float16 has a time"
    )
    out = capsys.readouterr().out
    assert f"time         not known for train.precision='mixed_bfloat16', {reason}\n" in out
    config = load_config(CONFIGS / "gpt2_124m_8gpu.toml", ["train.precision=mixed_float16"])
    print_plan(config, None, parse_target("gpu:T4x8"))
    assert "hours at the roofline" in capsys.readouterr().out


@pytest.mark.parametrize("utilisation", [0.0, 1.1, -1.0, math.nan])
def test_an_impossible_utilisation_is_refused(utilisation: float):
    with pytest.raises(UserError, match=f"--utilisation {utilisation} must be above 0 and at most 1."):
        print_plan(GPT2, None, V5E_8, utilisation)


def test_a_utilisation_that_changes_no_time_is_refused():
    for target, reason in (
        (parse_target("cpu"), "the time is not known for train.precision='mixed_bfloat16'"),
        (None, "without --target; write"),
    ):
        with pytest.raises(UserError, match=f"--utilisation 0.5 has no effect.*{reason}"):
            print_plan(GPT2, None, target, 0.5)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"train.global_batch_size=512 is not a multiple of 3 replicas"):
        print_plan(GPT2, None, parse_target("gpu:H100x3"))


def test_a_split_over_one_device_is_refused_as_training_does():
    split = make_config(SETTINGS, ["distribution.shard=optimizer"])
    for target in (parse_target("gpu:H100"), parse_target("cpu")):
        with pytest.raises(UserError, match=r"distribution.shard='optimizer' splits over several .*; choose 'nothing'"):
            print_plan(split, 50257, target)


def test_groups_that_do_not_divide_the_devices_are_refused_and_those_that_do_hold_a_part_of_the_moments(
    capsys: pytest.CaptureFixture[str],
):
    def split(over: int) -> Config:
        return make_config(SETTINGS, ["distribution.shard=optimizer", f"distribution.shard_over={over}"])

    with pytest.raises(
        UserError, match=r"shard_over=3 does not divide 8 replicas into equal.*set distribution.shard_over=none"
    ):
        print_plan(split(3), 50257, V5E_8)
    print_plan(split(2), 50257, V5E_8)
    assert "1/2 of AdamW's two moments of each weight" in capsys.readouterr().out


def test_several_devices_have_a_line_about_what_each_sends(capsys: pytest.CaptureFixture[str]):
    print_plan(GPT2, None, V5E_8)
    # 2 x 7/8 of 4 bytes for each weight.
    (line,) = re.findall(r"exchange .*\n", capsys.readouterr().out)
    size = f"{7 * count_parameters(GPT2, 50257) / 1e6:.1f} MB"
    assert line == f"exchange     each device sends {size} a step: {size} of gradients in float32\n"
    print_plan(make_config(SETTINGS, ["distribution.shard=optimizer"]), 50257, V5E_8)
    assert re.search(
        r"sends \S+ MB a step: \S+ MB of gradients in float32, \S+ MB of new weights in f", capsys.readouterr().out
    )
    print_plan(make_config(SETTINGS, ["distribution.shard=weights", "train.precision=mixed_bfloat16"]), 50257, V5E_8)
    assert re.search(r"MB of gradients in float32, \S+ MB of weights in bfloat16\n", capsys.readouterr().out)
    print_plan(make_config(SETTINGS, ["optimizer.kind=muon", "train.precision=mixed_bfloat16"]), 50257, V5E_8)
    assert re.search(r"of gradients in float32, \S+ MB of Muon's matrices in bfloat16\n", capsys.readouterr().out)
    print_plan(GPT2, None, parse_target("gpu:H100"))
    assert not re.search("exchange|links", capsys.readouterr().out)


def test_what_a_tpu_gathers_counts_the_pieces_of_all_blocks(capsys: pytest.CaptureFixture[str]):
    config = make_config(SETTINGS, ["distribution.shard=weights", "train.precision=mixed_bfloat16"])
    # The loss needs most with the first vocabulary, a block with the second; see test_estimate.py.
    for vocabulary_size, part in ((5000, "the output projection"), (500, "two blocks in bfloat16")):
        print_plan(config, vocabulary_size, V5E_8)
        assert f"MB  {part}, and the pieces of all blocks in bfloat16\n" in capsys.readouterr().out
        print_plan(config, vocabulary_size, parse_target("gpu:H100x8"))
        assert f"MB  {part}\n" in capsys.readouterr().out


def test_the_exchange_has_a_time_beside_that_of_computing(capsys: pytest.CaptureFixture[str]):
    print_plan(GPT2, None, V5E_8)
    sent, at_peak = 7 * count_parameters(GPT2, 50257), tokens_per_sec_at_peak(GPT2, 50257, V5E_8)
    assert at_peak is not None
    line = f"{1e3 * sent / 150e9:.3g} ms a step at 150 GB/s of ICI within a slice"
    beside = (
        f"beside {512 * 1024 / at_peak * 1e3:.3g} ms of computing at peak, apart from attention that is computed again"
    )
    out = capsys.readouterr().out
    assert f"\nlinks        {line}, {beside}\n" in out and "hours at the roofline; " in out
    # 16 GPUs are in two machines, and no data sheet has what connects A10Gs.
    for target, reason in (
        ("gpu:H100x16", "a network connects machines with 8 or fewer H100 each"),
        ("gpu:A10Gx8", "the table of devices has no speed of the links of A10G"),
    ):
        print_plan(GPT2, None, parse_target(target))
        out = capsys.readouterr().out
        assert f"\nlinks        not known: {reason}\n" in out and " at the roofline without the exchange; " in out
    print_plan(make_config(SETTINGS, ["distribution.kind=cpu", "distribution.logical_devices=2"]))
    assert "links" not in capsys.readouterr().out
    # Short times have as many digits.
    small = make_config(SETTINGS, ["model.num_layers=1", "model.hidden_dim=16", "model.num_heads=1"])
    h100s = parse_target("gpu:H100x8")
    times = [of(small, 20, h100s) for of in (exchange_secs, computing_secs)]
    assert all(secs is not None and secs < 1e-4 for secs in times)
    print_plan(small, 20, h100s)
    line = "{:.3g} ms a step at 450 GB/s of NVLink within a machine, beside {:.3g} ms".format(
        *(1e3 * secs for secs in times if secs is not None)
    )
    assert f"\nlinks        {line} of computing at peak" in capsys.readouterr().out


def test_a_plan_tells_that_the_time_of_computing_leaves_out_what_is_computed_again(
    capsys: pytest.CaptureFixture[str],
):
    for overrides, left_out in (
        (["train.recompute=nothing"], ""),
        (["train.recompute=attention"], ", apart from attention that is computed again"),
        (["train.recompute=attention", "train.sequence_length=255"], ""),  # Its probabilities are kept.
        (["train.recompute=blocks"], ", apart from blocks that are computed again"),
        (["distribution.shard=weights", "train.recompute=nothing"], ""),
    ):
        print_plan(make_config(GPT2.model_dump(mode="json"), overrides), None, V5E_8)
        assert f" of computing at peak{left_out}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("secs", "printed"),
    [
        (12_345, "12,300 s"),
        (2.006, "2.01 s"),
        (0.9996, "1 s"),
        (0.9994, "999 ms"),
        (0.3404, "340 ms"),
        (2.5e-6, "0.0025 ms"),
    ],
)
def test_the_time_of_an_exchange_has_three_significant_digits(secs: float, printed: str):
    assert short_time(secs) == printed


def test_a_utilisation_above_the_roofline_gives_no_hours(capsys: pytest.CaptureFixture[str]):
    config = make_config(GPT2.model_dump(mode="json"), ["distribution.shard=weights", "train.micro_batch_size=1"])
    target = parse_target("gpu:RTX4090x8")
    least, at_peak = smallest_step_secs(config, 50257, target), tokens_per_sec_at_peak(config, 50257, target)
    assert least is not None and at_peak is not None
    most = 512 * 1024 / at_peak / least
    hours = f"{19_000 * least / 3600:,.1f} hours at the roofline with the exchange"
    for utilisation, end in ((most + 1e-6, ""), (None, ", which is assumed (--utilisation)")):
        print_plan(config, None, target, utilisation)
        below = f"a model FLOPs utilisation of {100 * most:.3g}%, below {utilisation or 0.4:.0%}{end}\n"
        assert f"time         {hours}: {below}" in capsys.readouterr().out
    # A TPU may exchange while it computes: then the exchange is longer, and decides alone.
    print_plan(config, None, V5E_8)
    assert " hours at the roofline of the exchange; " in capsys.readouterr().out
    print_plan(GPT2, None, parse_target("gpu:H100x1"))
    assert " hours at the roofline; " in capsys.readouterr().out
    print_plan(config, None, target, most)
    assert f"time         {hours}; {19_000 * least / 3600:,.1f} hours at a model" in capsys.readouterr().out
    # If operations take longest, no utilisation is above the roofline, rounding aside.
    for tpu in ("tpu:v5e-8", "tpu:v5e-16", "tpu:v5e-64", "tpu:v4-8"):
        print_plan(GPT2, None, parse_target(tpu), 1.0)
        assert re.search(
            r"time +(.+) at the roofline; \1 at a model FLOPs utilisation of 100%\n", capsys.readouterr().out
        )


def test_an_auto_micro_batch_is_planned_as_the_largest_that_fits(capsys: pytest.CaptureFixture[str]):
    overrides = ["train.micro_batch_size=auto", "train.global_batch_size=1024"]
    print_plan(load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml", overrides), None, V5E_8)
    said = capsys.readouterr().out
    largest = re.search(r"micro_batch_size=(\d+) is the largest that does", said)
    assert largest and 1 < int(largest[1]) < 128
    assert f"128 examples a step on each device, {largest[1]} at a time" in said
    assert "GB on each: fits, by this estimate" in said


@pytest.mark.parametrize(("own", "limit", "tried"), [(4, 99, [4, 12, 24]), (8, 2, [8, 3, 2]), (6, 0, [6, 3, 2, 1])])
def test_only_micro_batches_that_divide_smaller_batches_too_are_compiled(
    own: int, limit: int, tried: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    compiled = []

    def compile_step(config: Config, vocabulary_size: int, target: Target) -> CompiledStep:
        size = make_config(config.model_dump(mode="json", exclude_none=True)).train.micro_batch_size
        assert isinstance(size, int)
        compiled.append(size)
        return CompiledStep(10**9, 10**9 if size <= limit else 20 * 10**9, 1e12, 1e9, 4, 0, 60.0, "", sent_bytes=2e9)

    monkeypatch.setattr("trainer.planning.plan.compile_step", compile_step)
    sizes = ["train.global_batch_size=384", "train.batch_warmup.9=192", f"train.micro_batch_size={own}"]
    config = load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml", sizes)
    print_plan(config, None, V5E_8)
    largest = re.search(r"micro_batch_size=(\d+) is the largest that does", capsys.readouterr().out)
    assert largest and 24 % int(largest[1]) == 0
    print_compiled(config, None, V5E_8)
    assert compiled == tried


def test_compiling_needs_an_accelerator():
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
        return CompiledStep(10**9, 10**9 if size <= largest else 20 * 10**9, 1e12, 1e9, 4, 0, 60.0, "", sent_bytes=2e9)

    monkeypatch.setattr("trainer.planning.plan.compile_step", compile_step)
    config = load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml", [f"train.micro_batch_size={own}"])
    assert print_compiled(config, None, V5E_8, Command("c.toml", (), ("--compile",))) == (own <= largest)
    out = capsys.readouterr().out
    assert f"largest train.micro_batch_size that fits: {largest or 'none'}\n" in out
    assert "; a device sends 2.00 GB a step; in 60 s\n" in out
    assert len(compiled) == num_compiled
    command = f"    trainer plan c.toml train.micro_batch_size={largest} --target tpu:v5e-8 --compile\n"
    assert (command in out) == (0 < largest < own)
    # The estimate says that a smaller micro-batch fits. The compiler is right, so only other ways are offered.
    assert ("by the estimate, with 15% to spare, for the compiler to confirm" in out) == (largest == 0)
    assert ("    trainer plan c.toml train.recompute=blocks --target tpu:v5e-8 --compile\n" in out) == (largest == 0)
    assert largest or "c.toml train.micro_batch_size" not in out


def test_planning_loads_no_tensorflow():
    program = "import sys; import trainer.planning.plan; assert not {'tensorflow', 'keras'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
