"""Laws of the table of devices and of targets."""

import re

import pytest

from trainer.errors import UserError
from trainer.hardware.devices import GPUS, TPUS, compiler_settings, find_gpu, parse_target


@pytest.mark.parametrize(
    ("text", "num_devices", "topology"),
    [
        ("tpu:v2-8", 8, "v2:2x2"),
        ("tpu:v3-8", 8, "v3:2x2"),
        ("tpu:v3-32", 32, "v3:4x4"),
        ("tpu:v3-2048", 2048, "v3:32x32"),
        ("tpu:v4-8", 8, "v4:2x2x1"),
        ("tpu:v4-16", 16, "v4:2x2x2"),
        ("tpu:v4-32", 32, "v4:2x2x4"),
        ("tpu:v4-64", 64, "v4:2x4x4"),
        ("tpu:v4-128", 128, "v4:4x4x4"),
        ("tpu:v5e-1", 1, "v5e:1x1"),
        ("tpu:v5e-4", 4, "v5e:2x2"),
        ("tpu:v5litepod-8", 8, "v5e:2x4"),
        ("TPU:V5E-256", 256, "v5e:16x16"),
        # A chip's two cores are one device, and the number counts cores all the same.
        ("tpu:v5p-8", 4, "v5p:2x2x1"),
        ("tpu:v6e-8", 8, "v6e:2x4"),
    ],
)
def test_a_tpu_has_the_devices_and_the_topology_of_its_accelerator_type(text: str, num_devices: int, topology: str):
    target = parse_target(text)
    assert (target.num_devices, target.topology()) == (num_devices, topology)
    assert parse_target(str(target)) == target


def test_a_gpu_is_named_with_or_without_a_count_and_capitals():
    assert parse_target("gpu:H100x8") == parse_target("GPU:h100X8") == (GPUS["H100"], 8)
    assert parse_target("gpu:rtx4090") == (GPUS["RTX4090"], 1)
    assert parse_target("gpu:RTX4090x2") == (GPUS["RTX4090"], 2)
    assert str(parse_target("gpu:a100-80gbX8")) == "gpu:A100-80GBx8"
    assert str(parse_target("cpu")) == "cpu"


@pytest.mark.parametrize("text", ["gpu:x8", "gpu:H100x0", "gpu:B9x8", "gpu:A100x8", "tpu:v9-8", "cpu:2", "h100", ""])
def test_an_unknown_target_is_refused_with_the_known_ones(text: str):
    with pytest.raises(UserError, match=re.escape(f"--target {text} is unknown; write gpu:NAMExC")) as e:
        parse_target(text)
    assert all(name in str(e.value) for name in [*GPUS, *TPUS])


@pytest.mark.parametrize("text", ["tpu:v5e-3", "tpu:v5e-512", "tpu:v4-4", "tpu:v5e", "tpu:v5e-"])
def test_a_number_that_a_tpu_does_not_come_with_is_refused_with_its_numbers(text: str):
    with pytest.raises(
        UserError, match=rf"--target {text}: v\d\w* does not come with this number; its numbers are [18], "
    ):
        parse_target(text)


def test_a_chip_is_shared_by_its_cores():
    v4, v5p = TPUS["v4"], TPUS["v5p"]
    assert (v4.flops["bfloat16"], v4.memory_bytes) == (275e12 / 2, 16e9)
    assert (v5p.flops["bfloat16"], v5p.memory_bytes) == (459e12, 95e9)


def test_a_gpu_is_found_only_by_the_name_that_its_driver_gives_it():
    assert find_gpu("NVIDIA A100-SXM4-80GB") == GPUS["A100-80GB"]
    assert find_gpu("NVIDIA GeForce RTX 4090") == GPUS["RTX4090"]
    # Half of the desktop card's cores.
    assert find_gpu("NVIDIA GeForce RTX 4090 Laptop GPU") is None


def test_the_settings_of_a_gpu_s_compiler_have_its_memory_and_generation():
    text = compiler_settings(parse_target("gpu:L4"))["target_config"]
    assert "major: 8 minor: 9" in text and "device_memory_size: 24000000000" in text and '"NVIDIA L4"' in text
