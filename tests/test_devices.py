"""Laws of the names that say which devices are meant."""

import re
import sys
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.hardware import devices
from trainer.hardware.devices import (
    GPUS,
    TPUS,
    compiler_settings,
    describe_cpu,
    find_gpu,
    has_nvidia_gpu,
    num_cores,
    parse_target,
    unused_gpu,
    unused_tpu,
)


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


def test_a_gpu_is_named_with_a_count_or_alone_in_capitals_or_not():
    assert parse_target("gpu:H100x8") == parse_target("GPU:h100X8") == (GPUS["H100"], 8)
    assert parse_target("gpu:rtx4090") == (GPUS["RTX4090"], 1)
    assert parse_target("gpu:RTX4090x2") == (GPUS["RTX4090"], 2)
    assert str(parse_target("gpu:a100-80gbX8")) == "gpu:A100-80GBx8"
    assert str(parse_target("cpu")) == "cpu"


@pytest.mark.parametrize("text", ["gpu:x8", "gpu:H100x0", "gpu:B9x8", "gpu:A100x8", "tpu:v9-8", "cpu:2", "h100", ""])
def test_a_target_that_is_not_known_is_said_with_those_that_are(text: str):
    with pytest.raises(
        UserError, match=re.escape(f"--target {text} is not one that trainer knows; write gpu:NAMExC")
    ) as e:
        parse_target(text)
    assert all(name in str(e.value) for name in [*GPUS, *TPUS])


@pytest.mark.parametrize("text", ["tpu:v5e-3", "tpu:v5e-512", "tpu:v4-4", "tpu:v5e", "tpu:v5e-"])
def test_a_tpu_of_a_number_that_there_is_not_is_said(text: str):
    with pytest.raises(UserError, match=rf"--target {text}: there is no such v\d\w*; its numbers are [18], "):
        parse_target(text)


def test_a_chip_is_shared_by_its_cores():
    v4, v5p = TPUS["v4"], TPUS["v5p"]
    assert (v4.flops["bfloat16"], v4.memory_bytes) == (275e12 / 2, 16e9)
    assert (v5p.flops["bfloat16"], v5p.memory_bytes) == (459e12, 95e9)


def test_a_gpu_is_found_by_the_name_of_its_driver_and_by_no_other():
    assert find_gpu("NVIDIA A100-SXM4-80GB") == GPUS["A100-80GB"]
    assert find_gpu("NVIDIA GeForce RTX 4090") == GPUS["RTX4090"]
    # Half of the desktop card's cores.
    assert find_gpu("NVIDIA GeForce RTX 4090 Laptop GPU") is None


def test_the_compiler_of_a_gpu_hears_of_its_memory_and_generation():
    text = compiler_settings(parse_target("gpu:L4"))["target_config"]
    assert "major: 8 minor: 9" in text and "device_memory_size: 24000000000" in text and '"NVIDIA L4"' in text


@pytest.mark.parametrize(
    ("flags", "widest"),
    [
        ("fpu avx2 avx512f amx_bf16", " with AMX"),
        ("avx2 avx512f", " with AVX-512"),
        ("avx2", " with AVX2"),
        ("fpu", ""),
    ],
)
def test_a_cpu_is_named_by_its_cores_and_its_widest_instructions(tmp_path: Path, flags: str, widest: str):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    cores = f"{num_cores()} CPU core{'s' if num_cores() > 1 else ''}"
    assert describe_cpu(cpuinfo) == cores + widest
    assert describe_cpu(tmp_path / "macos") == cores


def machine(root: Path, **files: str) -> Path:
    """Makes the files by which a machine shows its GPUs: bus, driver, node, wsl."""
    places = {
        "bus": "sys/bus/pci/devices/0000:01:00.0/vendor",
        "second": "sys/bus/pci/devices/0000:02:00.0/vendor",
        "kind": "sys/bus/pci/devices/0000:01:00.0/class",
        "driver": "proc/driver/nvidia/version",
        "control": "dev/nvidiactl",
        "node": "dev/nvidia0",
        "wsl": "usr/lib/wsl/lib/libcuda.so.1",
    }
    for name, text in files.items():
        path = root / places[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("files", [{"bus": "0x10de\n"}, {"driver": "x"}, {"control": ""}, {"node": ""}, {"wsl": ""}])
def test_a_gpu_shows_by_its_bus_its_driver_or_its_node(tmp_path: Path, files: dict[str, str]):
    assert has_nvidia_gpu(machine(tmp_path, **files))
    assert unused_gpu(True, tmp_path, {}) is not None


@pytest.mark.parametrize(
    "files", [{}, {"bus": "0x8086\n", "kind": "0x030000\n"}, {"bus": "0x10de\n", "kind": "0x040300\n"}]
)
def test_no_gpu_of_nvidia_is_none_to_warn_of(tmp_path: Path, files: dict[str, str]):
    assert not has_nvidia_gpu(machine(tmp_path, **files))
    assert unused_gpu(True, tmp_path, {"CUDA_VISIBLE_DEVICES": ""}) is None


@pytest.mark.parametrize(
    ("files", "environ", "is_built_with_cuda", "what"),
    [
        ({"bus": "0x10de\n"}, {}, True, r"NVIDIA GPU is not used: no driver is loaded\. .*sudo ubuntu-drivers install"),
        ({"bus": "0x10de\n", "driver": "x"}, {}, True, r"no /dev/nvidia0 here\. .*: docker run --gpus all;"),
        (
            {"bus": "0x10de\n", "second": "0x10de\n", "driver": "x", "node": ""},
            {},
            True,
            r"2 NVIDIA GPUs are not used: TensorFlow lacks the CUDA libraries\. .* install 'tensorflow\[and-cuda\]==2",
        ),
        # A device node by itself was made by a driver.
        ({"node": ""}, {}, True, r"TensorFlow lacks the CUDA libraries\. "),
        (
            {"wsl": ""},
            {},
            True,
            r"TensorFlow lacks the CUDA libraries\. .*: /.* install .*'tensorflow\[and-cuda\]==2\.",
        ),
        ({"driver": "x", "node": ""}, {}, False, r"TensorFlow is built without CUDA\. .* install .*'tensorflow\[and-c"),
        (
            {"driver": "x", "node": ""},
            {"CUDA_VISIBLE_DEVICES": "-1"},
            True,
            "CUDA_VISIBLE_DEVICES='-1' hides .*: unset ",
        ),
    ],
)
def test_a_gpu_that_is_not_used_is_said_with_the_command_that_mends_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    environ: dict[str, str],
    is_built_with_cuda: bool,
    what: str,
):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None if name == "nvidia" else name)
    said = unused_gpu(is_built_with_cuda, machine(tmp_path, **files), environ)
    assert said is not None and re.search(what, said)
    if "install '" in said:
        assert f"{sys.executable} -m pip install '" in said


@pytest.mark.parametrize(
    ("files", "is_there"),
    [
        ({"sys/bus/pci/devices/a/vendor": "0x1ae0\n", "sys/bus/pci/devices/a/device": "0x0063\n"}, True),
        ({"dev/accel0": ""}, True),
        # Google's network card.
        ({"sys/bus/pci/devices/a/vendor": "0x1ae0\n", "sys/bus/pci/devices/a/device": "0x0042\n"}, False),
        ({}, False),
    ],
)
def test_a_tpu_that_auto_leaves_alone_is_said_with_the_setting_that_takes_it(tmp_path, files, is_there):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    said = unused_tpu(tmp_path)
    assert (said is not None) == is_there
    if said is not None:
        assert "distribution.kind=tpu" in said and "scripts/launch/install_tpu" in said


def test_libraries_that_are_there_and_of_no_use_are_not_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name)
    said = unused_gpu(True, machine(tmp_path, driver="x", node=""), {})
    assert said is not None and "installed, but TensorFlow cannot use them" in said and "nvidia-smi" in said


def test_an_environment_without_pip_is_mended_by_uv(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    command = devices._install_command("tensorflow-of-another-name", "and-cuda")
    assert command == f"uv pip install --python {sys.executable} 'tensorflow-of-another-name[and-cuda]'"
