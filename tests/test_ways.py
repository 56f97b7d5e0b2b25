"""Laws of what `trainer plan` offers for a config that does not fit: each offer fits when it is planned in its turn."""

import os
import random
import re
import shlex
from pathlib import Path

import pytest

from trainer import verbs
from trainer.config.file import load_config, make_config
from trainer.hardware.cuda import Driver, Gpu
from trainer.hardware.data_sheets import GPUS, TPUS
from trainer.hardware.devices import Target, cpu, parse_target
from trainer.parser import parse
from trainer.planning.estimate import estimate_memory
from trainer.planning.own_devices import own_devices
from trainer.planning.ways import ways_to_fit

# With the optimizer whose memory these cases are made for.
GPU_CONFIG, TPU_CONFIG = ("gpt2_124m_8gpu optimizer.kind=adamw", "gpt2_124m_tpu_v5e_8 optimizer.kind=adamw")
XL = "model.num_layers=48 model.hidden_dim=1600 model.num_heads=25 model.intermediate_dim=6400"
WHOLE = "train.micro_batch_size=none"
SIZES = re.compile(r"([\d.]+ [MG]B) of ([\d.]+ GB):")

# The command of a plan that does not fit, and what must be among the offers.
CASES = {
    "one GPU, whole batch": (f"{GPU_CONFIG} {WHOLE} --target gpu:RTX4090", "train.micro_batch_size=64"),
    "eight GPUs, whole share": (f"{GPU_CONFIG} {WHOLE} --target gpu:RTX5070x8", "train.recompute=blocks"),
    "eight GPUs, accumulation": (f"{GPU_CONFIG} train.micro_batch_size=32 --target gpu:RTX5060Ti-8GBx8", "size=16"),
    "more devices help": (f"{GPU_CONFIG} {WHOLE} --target gpu:A100-40GBx2", "gpu:A100-40GBx8"),
    "smaller batches at the beginning": (
        f"{GPU_CONFIG} {WHOLE} train.global_batch_size=480 train.batch_warmup.100=320 --target gpu:RTX4090",
        "train.micro_batch_size=40",
    ),
    "float32 on a T4": (f"{GPU_CONFIG} train.precision=float32 train.micro_batch_size=64 --target gpu:T4", "float16"),
    "float32 on a V100": (f"{GPU_CONFIG} train.precision=float32 {WHOLE} --target gpu:V100-16GBx8", "gpu:V100-16GBx32"),
    "float64 on an A100": (f"{GPU_CONFIG} train.precision=float64 {WHOLE} --target gpu:A100-40GBx8", "=float32"),
    "accumulation costs a second gradient": (
        f"{GPU_CONFIG} {XL} train.sequence_length=128 train.global_batch_size=64 train.micro_batch_size=4 "
        "--target gpu:RTX5090x8",
        "train.micro_batch_size=8",
    ),
    "a vocabulary of millions": (
        f"{GPU_CONFIG} tokenizer.vocabulary_size=2_000_000 --target gpu:RTX4090x8",
        "--target gpu:A40x8",
    ),
    "a vocabulary that is given": (
        f"{GPU_CONFIG} train.micro_batch_size=1 --vocabulary-size 3000000 --target gpu:L40S",
        "--vocabulary-size 3000000",
    ),
    "1.5 billion weights on a v5e": (f"{TPU_CONFIG} {XL} --target tpu:v5e-8", "--target tpu:v5p-16"),
    "a v5e by the name of gcloud": (
        f"{TPU_CONFIG} {WHOLE} train.global_batch_size=2048 --target v5litepod-8",
        "--target tpu:v5e-32",
    ),
    "an older TPU": (f"{TPU_CONFIG} {XL} train.micro_batch_size=2 --target tpu:v3-32", "--target tpu:v5p-64"),
    "nothing is recomputed": (
        f"{TPU_CONFIG} train.recompute=nothing train.micro_batch_size=64 --target tpu:v5e-8",
        "train.recompute=attention",
    ),
    "long sequences": (
        f"{GPU_CONFIG} train.sequence_length=131072 train.global_batch_size=8 {WHOLE} --target gpu:H100x8",
        "train.recompute=blocks",
    ),
    "a micro-batch that is found": (
        f"{GPU_CONFIG} train.sequence_length=131072 train.global_batch_size=8 train.micro_batch_size=auto "
        "--target gpu:A40x8",
        "train.recompute=blocks",
    ),
    "a CPU": (
        f"{GPU_CONFIG} distribution.gpus=none distribution.kind=cpu train.precision=float32 {WHOLE}",
        "train.micro_batch_size=4",
    ),
    "a CPU as a target": (f"{GPU_CONFIG} {WHOLE} --target cpu", "--target cpu"),
    "a split of the optimizer": (
        f"{GPU_CONFIG} {XL} train.recompute=blocks --target gpu:RTX5090x8",
        "train.recompute=blocks distribution.shard=optimizer --target gpu:RTX5090x8",
    ),
    "a split and fewer examples": (
        f"{GPU_CONFIG} {XL} --target gpu:RTX5090x8",
        "distribution.shard=optimizer train.micro_batch_size=4 --target gpu:RTX5090x8",
    ),
    "a split, fewer examples and recomputation": (
        f"{GPU_CONFIG} {XL} train.global_batch_size=1024 train.sequence_length=4096 train.precision=mixed_bfloat16 "
        "--target gpu:RTX5090x8",
        "train.recompute=blocks distribution.shard=optimizer train.micro_batch_size=",
    ),
    "a split over more devices": (
        f"{GPU_CONFIG} {XL} train.micro_batch_size=1 --target gpu:RTX4090",
        "distribution.shard=optimizer --target gpu:RTX4090x32",
    ),
    "a split of the weights": (
        f"{GPU_CONFIG} {XL} train.recompute=blocks distribution.shard=optimizer --target gpu:RTX4090x8",
        "distribution.shard=weights --target gpu:RTX4090x8",
    ),
    "split weights and a narrower precision": (
        f"{GPU_CONFIG} model.num_layers=40 model.num_heads=24 model.hidden_dim=3072 model.intermediate_dim=12288 "
        "train.sequence_length=4096 train.precision=float32 train.global_batch_size=64 train.micro_batch_size=1 "
        "--target gpu:RTX4080x8",
        "train.precision=mixed_bfloat16 train.recompute=blocks distribution.shard=weights train.micro_batch_size=1 "
        "--target gpu:RTX4080x8",
    ),
    "a split that is there already": (
        f"{GPU_CONFIG} {XL} model.num_layers=200 train.recompute=blocks distribution.shard=weights "
        "--target gpu:RTX4090x8",
        "--target gpu:RTX4090x16",
    ),
    "split weights and a recomputation over more devices": (
        "llama_7b_8gpu distribution.shard=nothing train.recompute=auto train.micro_batch_size=1 --target gpu:RTX4090x2",
        "train.recompute=blocks distribution.shard=weights --target gpu:RTX4090x8",
    ),
    "split weights that are gathered least often": (
        f"{GPU_CONFIG} {XL} train.micro_batch_size=64 --target gpu:RTX4090x2",
        "train.recompute=blocks distribution.shard=weights train.micro_batch_size=32 --target gpu:RTX4090x2",
    ),
    "a split CPU of which one part is left": (
        "quickstart model.num_layers=22 model.hidden_dim=1280 model.intermediate_dim=3424 model.num_heads=20 "
        "distribution.logical_devices=2 distribution.shard=optimizer optimizer.kind=adamw",
        "distribution.logical_devices=1 distribution.shard=nothing",
    ),
    "a split CPU in groups, of which one part is left": (
        "quickstart model.num_layers=22 model.hidden_dim=1280 model.intermediate_dim=3424 model.num_heads=20 "
        "distribution.logical_devices=2 distribution.shard=optimizer distribution.shard_over=2 "
        "optimizer.kind=adamw",
        "distribution.logical_devices=1 distribution.shard=nothing distribution.shard_over=none",
    ),
    "a CPU in parts": (
        "quickstart model.num_layers=24 model.hidden_dim=768 model.intermediate_dim=3072 model.num_heads=12 "
        "distribution.logical_devices=16",
        "distribution.logical_devices=16 distribution.shard=weights",
    ),
}


def planned(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns what a command prints: trainer plan ..."""
    program, *words = shlex.split(command)
    assert program == "trainer"
    verbs.plan(parse(words))
    return capsys.readouterr().out


def offers(printed: str) -> list[str]:
    return re.findall(r"^    (trainer plan .+)$", printed, re.MULTILINE)


@pytest.fixture(autouse=True)
def memory_of_16_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the CPU the same memory on every machine."""
    real = os.sysconf
    known = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 16_000_000}
    monkeypatch.setattr(os, "sysconf", lambda name: known[name] if name in known else real(name))


@pytest.mark.parametrize(("words", "offered"), CASES.values(), ids=CASES)
def test_what_is_offered_for_a_config_that_does_not_fit_fits(
    words: str, offered: str, capsys: pytest.CaptureFixture[str]
):
    printed = planned(f"trainer plan {words}", capsys)
    verdict = re.search(r"memory +\S+ GB of \S+ GB on each: does not fit", printed)
    assert verdict and "the most is needed" in printed and "  weights " in printed
    commands = offers(printed)
    assert commands and len(set(commands)) == len(commands)
    assert any(offered in command for command in commands), commands
    said = SIZES.findall(printed[printed.index("These fit") :])
    for command, (needed, there_is) in zip(commands, said, strict=True):
        second = planned(command, capsys)
        assert f"{needed} of {there_is} on each: fits, by this estimate" in second, (command, second)


def test_all_examples_at_once_are_offered_if_the_sum_of_gradients_is_what_does_not_fit(
    capsys: pytest.CaptureFixture[str],
):
    printed = planned(f"trainer plan {CASES['accumulation costs a second gradient'][0]}", capsys)
    assert re.search(
        r"gradients +12.\d+ GB  of all weights, and the sum of all gradients in float32 over 2 micro-batches", printed
    )
    assert "all 8 examples at once, without a sum of gradients" in printed


def test_a_model_that_no_device_holds_is_said_to_be_too_large(capsys: pytest.CaptureFixture[str]):
    large = "model.num_layers=96 model.hidden_dim=12288 model.num_heads=96 model.intermediate_dim=49152"
    printed = planned(f"trainer plan {GPU_CONFIG} {large} --target gpu:H100x8", capsys)
    assert not offers(printed)
    needed = (
        "at least 453.87 GB of 80.00 GB are needed, by the estimate: weights 87.30 GB, optimizer 174.59 GB, gathered"
    )
    assert f"makes it fit gpu:H100x8: {needed}" in printed
    assert (
        "This counts weights, moments and gradients as split over the devices (distribution.shard=weights)" in printed
    )
    assert "No device of the table holds it either. What is left is another model" in printed


def test_a_sequence_that_no_device_holds_is_said_to_be_too_long(capsys: pytest.CaptureFixture[str]):
    long = "train.sequence_length=10_000_000 model.positions=rope train.global_batch_size=8 train.micro_batch_size=1"
    printed = planned(f"trainer plan {GPU_CONFIG} {long} --target gpu:H100x8", capsys)
    assert not offers(printed)
    assert "trainer cannot split a sequence over devices" in printed and "or a shorter train.sequence_length" in printed


def test_a_split_is_offered_with_both_optimizers_and_only_over_several_devices(capsys: pytest.CaptureFixture[str]):
    words = f"trainer plan {GPU_CONFIG} {XL} train.recompute=blocks train.micro_batch_size=1"
    of_muon = offers(planned(f"{words} optimizer.kind=muon --target gpu:RTX4090x8", capsys))
    assert any("shard" in each for each in of_muon)
    # Not on the one GPU itself.
    of_one = [each for each in offers(planned(f"{words} --target gpu:RTX5090", capsys)) if "shard" in each]
    assert [each[each.index("distribution.") :] for each in of_one] == [
        "distribution.shard=optimizer --target gpu:RTX5090x4"
    ]


def test_a_device_that_tensorflow_cannot_use_is_not_offered(capsys: pytest.CaptureFixture[str]):
    printed = planned(f"trainer plan {TPU_CONFIG} {XL} model.num_layers=128 --target tpu:v5p-8", capsys)
    assert offers(printed) and not any("v7x" in command for command in offers(printed))
    printed = planned(f"trainer plan {TPU_CONFIG} --target tpu:v7x-8", capsys)
    assert "tensorflow   not supported on TPU v7x, by Google's documents" in printed and "fits, by" in printed


def test_a_gpu_that_xla_has_no_code_for_is_planned_with_a_warning(capsys: pytest.CaptureFixture[str]):
    printed = planned(f"trainer plan {GPU_CONFIG} --target gpu:RTX5090x8", capsys)
    lacks = r"has no machine code for NVIDIA GeForce RTX 5090 \(compute capability 12.0\)"
    how = "the driver compiles its operations, and XLA is not used"
    assert re.search(rf"tensorflow   TensorFlow 2\.\S+, built with CUDA \S+, {lacks}; {how}", printed)
    assert re.search(r"micro_batch_size=\d+ is the largest that does with XLA\n", printed)
    assert re.search(r"time .* which is assumed \(--utilisation\); both with XLA\n", printed)
    refused = planned(f"trainer plan {GPU_CONFIG} --target gpu:RTX5090x8 train.xla=on", capsys)
    assert "train.xla='on' is refused there; with train.xla=off the driver compiles its operations" in refused
    for command in ("gpu:RTX5090x8 train.xla=off", "gpu:H100x8"):
        printed = planned(f"trainer plan {GPU_CONFIG} --target {command}", capsys)
        assert "tensorflow" not in printed and "XLA" not in printed


def random_case(pick: random.Random) -> tuple[dict[str, object], Target]:
    precision = pick.choice(["float32", "mixed_bfloat16", "mixed_float16", "float64"])
    train = {
        "precision": precision,
        "total_steps": 1,
        "global_batch_size": 1024,
        "sequence_length": pick.choice([64, 1024, 8192]),
        "micro_batch_size": pick.choice([1, 8, 64, "auto"]),
        "recompute": pick.choice(["auto", "nothing", "attention", "blocks"]),
    }
    width = pick.choice([512, 1024, 2048, 4096])
    model = {"num_layers": pick.choice([2, 24, 48]), "num_heads": 8, "hidden_dim": width, "intermediate_dim": 4 * width}
    target = pick.choice([Target(pick.choice([*GPUS.values()]), pick.choice([1, 4, 16])), parse_target("tpu:v5e-16")])
    if pick.random() < 0.2:
        target = cpu(pick.choice([1, 4]))
    return {"run_folder": "r", "train": train, "model": model}, target


def test_every_way_fits_in_a_sample_of_models_and_devices():
    pick, number = random.Random(0), 0
    for _ in range(30):
        settings, target = random_case(pick)
        config = make_config(settings)
        if sum(estimate_memory(config, 50257, target).values()) <= target.device.memory_bytes:
            continue
        for way in ways_to_fit(config, 50257, target):
            number += 1
            overrides = [each for each in way.overrides if "logical_devices" not in each]
            changed = make_config(settings, overrides)
            needed = sum(estimate_memory(changed, 50257, way.target, way.micro_batch_size).values())
            assert needed == way.memory_bytes <= way.target.device.memory_bytes
    assert number > 20


def test_a_plan_without_a_target_is_for_the_gpus_of_this_machine_if_a_run_would_take_them():
    def own(overrides: list[str], *names: str) -> tuple[str, str]:
        config = make_config({"run_folder": "r", "train": {"precision": "float32", "total_steps": 1}}, overrides)
        found = own_devices(config, Driver(gpus=tuple(Gpu(name, (8, 9)) for name in names)))
        return str(found.target), found.why

    two = ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090")
    target, why = own([], *two)
    assert target == "gpu:RTX4090x2"
    assert why.startswith("2 x NVIDIA GeForce RTX 4090 of this machine, which a run takes if TensorFlow can use them")
    target, why = own([], "NVIDIA GeForce RTX 5060 Ti")
    assert target == "gpu:RTX5060Ti-8GBx1" and why.endswith("otherwise: --target gpu:RTX5060Ti-16GBx1 or --target cpu")
    assert own(["distribution.gpus=[1]"], *two)[0] == "gpu:RTX4090x1"
    assert own(["distribution.kind=gpu"], *two)[0] == "gpu:RTX4090x2"
    assert own(["distribution.kind=cpu"], *two) == ("cpu", "")
    assert own(["distribution.logical_devices=2"], *two) == ("cpu", "")
    assert own([]) == ("cpu", "")
    target, why = own(["distribution.gpus=[2]"], *two)
    assert target == "None" and "does not name one; --target adds memory and time" in why
    target, why = own([], "NVIDIA GeForce RTX 4090", "NVIDIA GeForce GTX 1080")
    assert target == "None" and why.startswith(
        "the table of devices lacks a GPU of this machine: NVIDIA GeForce GTX 1080"
    )
    assert own(["distribution.kind=tpu"], *two)[0] == "None"
    # A split is for several devices: such a config is for another machine, unless it names the CPU.
    for names in ((), two[:1]):
        target, why = own(["distribution.shard=optimizer"], *names)
        assert target == "None" and re.match(
            rf"this machine has one device for the run \({'gpu:RTX4090x1' if names else 'cpu'}\), and "
            "distribution.shard='optimizer' splits over several; --target adds memory and time",
            why,
        )
    assert own(["distribution.shard=optimizer"], *two)[0] == "gpu:RTX4090x2"
    assert own(["distribution.shard=optimizer", "distribution.kind=cpu"])[0] == "cpu"


def test_the_commands_keep_what_was_typed(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Overrides that are replaced go, others stay, and a path with blanks is quoted."""
    path = tmp_path / "my config.toml"
    path.write_text(load_config("gpt2_124m_8gpu").to_toml())
    first = f"trainer plan {shlex.quote(str(path))} train.micro_batch_size=64 'data.train=a b.txt' --target gpu:T4x8"
    commands = offers(planned(first, capsys))
    sizes = [re.findall(r"train.micro_batch_size=\S+", command) for command in commands]
    assert sizes[0] == ["train.micro_batch_size=32"] and all(len(each) == 1 for each in sizes)
    assert all(f"trainer plan '{path}' " in command and "'data.train=a b.txt'" in command for command in commands)


def test_tpus_are_only_offered_in_numbers_that_they_come_with():
    config = load_config("gpt2_124m_tpu_v5e_8", ["train.micro_batch_size=none", "train.global_batch_size=32768"])
    for tpu in TPUS.values():
        for way in ways_to_fit(config, 50257, parse_target(f"tpu:{tpu.name}-8")):
            assert parse_target(str(way.target)) == way.target


def test_the_page_about_the_plan_shows_what_it_prints_and_all_devices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    root = Path(__file__).parent.parent
    page = (root / "docs" / "plan.md").read_text()
    shown = re.findall(r"```sh\n\S*(trainer plan [^\n]+)\n```\n\n```text\n(.+?)```", page, re.DOTALL)
    assert len(shown) == 3
    monkeypatch.chdir(root)
    for command, printed in shown:
        assert printed in planned(command, capsys)
    assert all(f"`{name}`" in page for name in [*GPUS, *TPUS])
