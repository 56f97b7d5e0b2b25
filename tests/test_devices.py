"""Laws of the table of devices and of targets."""

import re

import pytest

from trainer.errors import UserError
from trainer.hardware.data_sheets import GPUS, TPUS, Device
from trainer.hardware.devices import compiler_settings, find_gpu, parse_target


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
        ("tpu:v7x-8", 8, "tpu7x:2x2x1"),
        ("tpu:v7x-128", 128, "tpu7x:4x4x4"),
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


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("gpu:RTX-4090", "gpu:RTX4090x1"),
        ("gpu:4090x2", "gpu:RTX4090x2"),
        ("rtx 4090 x 2", "gpu:RTX4090x2"),
        ("gpu:A6000", "gpu:RTXA6000x1"),
        ("rtx5090", "gpu:RTX5090x1"),
        ("H100 SXM", "gpu:H100x1"),
        ("8xH100", "gpu:H100x8"),
        ("gpu:8xA100-80GB", "gpu:A100-80GBx8"),
        ("NVIDIA RTX 6000 Ada Generation", "gpu:RTX6000Adax1"),
        ("gpu:RTX 5060 Ti 16GB", "gpu:RTX5060Ti-16GBx1"),
        ("v5e-8", "tpu:v5e-8"),
        ("v5litepod-8", "tpu:v5e-8"),
        ("tpu:v5litepod-8", "tpu:v5e-8"),
        ("tpu7x-8", "tpu:v7x-8"),
        ("v5p-8", "tpu:v5p-8"),
        (" CPU", "cpu"),
    ],
)
def test_a_target_is_understood_as_people_write_it(text: str, target: str):
    assert str(parse_target(text)) == target


def test_every_target_and_every_name_of_a_driver_is_read_back():
    for gpu in GPUS.values():
        assert parse_target(f"gpu:{gpu.name}x3") == (gpu, 3)
        for name in gpu.known_as:
            namesakes = [each for each in GPUS.values() if name in each.known_as]
            assert len(namesakes) > 1 or parse_target(name) == (gpu, 1)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("gpu:A100x8", "gpu:A100-40GBx8 or gpu:A100-80GBx8 or gpu:A100-40GB-PCIex8"),
        ("V100", "gpu:V100-16GB or gpu:V100-32GB"),
        ("gpu:RTX5060Ti", "gpu:RTX5060Ti-8GB or gpu:RTX5060Ti-16GB"),
        ("gpu:RTX4099", "gpu:RTX4090"),
        ("RTX6000", "gpu:RTX6000Ada"),
        ("gpu:H100x0", "gpu:H100"),
        ("v5e8", "tpu:v5e-8"),
    ],
)
def test_an_unknown_target_is_refused_with_the_nearest_ones(text: str, nearest: str):
    message = f"--target {text} is unknown; did you mean {nearest}"
    with pytest.raises(UserError, match=re.escape(message) + ".*Otherwise write gpu:NAMExCOUNT"):
        parse_target(text)


@pytest.mark.parametrize("text", ["gpu:x8", "gpu:B9x8", "tpu:v9-8", "cpu:2", "gpu:v5e-8", "tpu:H100", ""])
def test_an_unknown_target_is_refused_with_the_known_ones(text: str):
    with pytest.raises(UserError, match=re.escape(f"--target {text} is unknown; ")) as e:
        parse_target(text)
    assert all(name in str(e.value) for name in [*GPUS, *TPUS])


@pytest.mark.parametrize("text", ["tpu:v5e-3", "tpu:v5e-512", "tpu:v4-4", "tpu:v7x-2", "tpu:v5e", "v5p", "tpu:v5e-"])
def test_a_number_that_a_tpu_does_not_come_with_is_refused_with_its_numbers(text: str):
    problem = r"(does not come with this number|needs a number), as in tpu:v\d\w?-8; its numbers are [18], "
    with pytest.raises(UserError, match=rf"--target {text}: v\d\w* {problem}"):
        parse_target(text)


# Operations in 16 bits that a core does in a cycle with sums in float32. An entry with sparsity would have twice as
# many, and one with sums in float16 too if it is a GeForce.
PER_CYCLE = {"V100": 1024, "T4": 1024, "A100": 2048, "H100": 4096, "H200": 4096, "GH200": 4096, "B200": 8192}
PER_CYCLE |= {"GB200": 8192, "A10G": 512}
PER_CYCLE |= dict.fromkeys(["A10", "A40", "L4", "L40S", "RTXA6000", "RTX6000Ada", "RTXPRO6000"], 1024)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_the_peak_of_a_gpu_is_what_its_cores_can_do_without_sparsity(gpu: Device):
    rate = 512 if re.fullmatch(r"RTX\d{4}(Ti)?", gpu.name.partition("-")[0]) else PER_CYCLE[gpu.name.partition("-")[0]]
    cores, hertz = gpu.circuits["cores"], gpu.circuits["ghz"] * 1e9
    # Data sheets count a lower clock than boost, by up to a sixth; sparsity would double the figure.
    assert 0.85 < gpu.flops["float16"] / (rate * cores * hertz) < 1.01
    assert gpu.flops.get("bfloat16", gpu.flops["float16"]) == gpu.flops["float16"]
    if gpu.circuits["cc"] >= 8:
        assert gpu.flops["float32"] == pytest.approx(gpu.flops["float16"] / 2, rel=0.02)
    # A megabyte of cache, gigabytes of memory and the like are not mixed up.
    assert 2e9 < gpu.memory_bytes < 200e9 and 1e11 < (gpu.bytes_per_sec or 0) < 1e13
    assert 1 << 20 < gpu.circuits["l2_bytes"] < 200 << 20


def test_blackwell_s_compute_capabilities_are_10_and_12():
    assert {name for name, gpu in GPUS.items() if gpu.circuits["cc"] == 10.0} == {"B200", "GB200"}
    newest = {name for name, gpu in GPUS.items() if gpu.circuits["cc"] == 12.0}
    assert newest == {name for name in GPUS if name.startswith(("RTX50", "RTXPRO"))}


@pytest.mark.parametrize("device", [*GPUS.values(), *TPUS.values()], ids=lambda device: device.name)
def test_a_link_is_slower_than_its_device_s_memory_and_known_for_all_but_those_without_a_figure(device: Device):
    assert (device.link is None) == (device.name in ("A10G", "GH200-96GB", "GH200-144GB"))
    if device.link is not None and device.bytes_per_sec is not None:
        speeds = {"NVLink": (150e9, 900e9), "PCIe": (16e9, 64e9), "ICI": (200e9, 600e9)}[device.link.name]
        assert speeds[0] <= device.link.bytes_per_sec <= speeds[1]
        assert device.link.bytes_per_sec < device.bytes_per_sec * device.per_chip
        assert device.link.num_devices >= 8


@pytest.mark.parametrize(
    ("text", "gigabytes"),
    [
        # Half of what data sheets have, for one direction.
        ("gpu:A100-80GBx8", 600 / 2),
        ("NVIDIA A100 80GB PCIe", 64 / 2),
        ("NVIDIA A100-PCIE-40GB", 64 / 2),
        ("gpu:H100x8", 900 / 2),
        ("gpu:H100-NVLx2", 128 / 2),
        ("gpu:B200x8", 1800 / 2),
        ("gpu:GB200x72", 1800 / 2),
        ("gpu:RTX4090x2", 64 / 2),
        # Of two links for each axis, one leads to the only neighbour on an axis of two chips, none to oneself.
        ("tpu:v5e-1", 0),
        ("tpu:v5e-4", 400 / 2 * 2 / 4),
        ("tpu:v5e-8", 400 / 2 * 3 / 4),
        ("tpu:v5e-256", 400 / 2),
        ("tpu:v4-8", 300 * 2 / 6),
        ("tpu:v5p-16", 1200 / 2 * 3 / 6),
        ("tpu:v5p-128", 1200 / 2),
    ],
)
def test_a_device_sends_at_the_speed_of_the_links_to_its_neighbours(text: str, gigabytes: float):
    assert parse_target(text).sent_bytes_per_sec() == gigabytes * 1e9


def test_a_chip_is_shared_by_its_cores():
    v4, v5p = TPUS["v4"], TPUS["v5p"]
    assert (v4.flops["bfloat16"], v4.memory_bytes) == (275e12 / 2, 16e9)
    assert (v5p.flops["bfloat16"], v5p.memory_bytes) == (459e12, 95e9)
    assert TPUS["v7x"].memory_bytes == 96e9


def test_a_gpu_is_found_only_by_the_name_that_its_driver_gives_it():
    assert find_gpu("NVIDIA A100-SXM4-80GB") == GPUS["A100-80GB"]
    assert find_gpu("NVIDIA A100 80GB PCIe") == GPUS["A100-80GB-PCIe"]
    assert find_gpu("NVIDIA A100-PCIE-40GB") == find_gpu("A100-PCIE-40GB") == GPUS["A100-40GB-PCIe"]
    assert find_gpu("NVIDIA GeForce RTX 4090") == GPUS["RTX4090"]
    # Half of the desktop card's cores.
    assert find_gpu("NVIDIA GeForce RTX 4090 Laptop GPU") is None


def test_the_settings_of_a_gpu_s_compiler_have_its_memory_and_generation():
    text = compiler_settings(parse_target("gpu:L4"))["target_config"]
    assert "major: 8 minor: 9" in text and "device_memory_size: 24000000000" in text and '"NVIDIA L4"' in text
