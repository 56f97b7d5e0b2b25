"""Laws of the messages about devices of this machine that are not used."""

import re
import sys
from pathlib import Path

import pytest

from trainer.hardware import unused
from trainer.hardware.unused import unused_gpu, unused_tpu
from trainer.system.machine import has_nvidia_gpu


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
def test_a_gpu_is_found_by_its_bus_its_driver_or_its_node(tmp_path: Path, files: dict[str, str]):
    assert has_nvidia_gpu(machine(tmp_path, **files))
    assert unused_gpu(True, tmp_path, {}) is not None


@pytest.mark.parametrize(
    "files", [{}, {"bus": "0x8086\n", "kind": "0x030000\n"}, {"bus": "0x10de\n", "kind": "0x040300\n"}]
)
def test_a_machine_without_an_nvidia_gpu_gets_no_warning(tmp_path: Path, files: dict[str, str]):
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
def test_the_warning_about_an_unused_gpu_has_the_command_that_corrects_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    environ: dict[str, str],
    is_built_with_cuda: bool,
    what: str,
):
    monkeypatch.setattr(unused.importlib.util, "find_spec", lambda name: None if name == "nvidia" else name)
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
def test_the_note_about_a_tpu_that_auto_does_not_take_has_the_setting_that_takes_it(tmp_path, files, is_there):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    said = unused_tpu(tmp_path)
    assert (said is not None) == is_there
    if said is not None:
        assert "distribution.kind=tpu" in said and "scripts/launch/install_tpu" in said


def test_installed_cuda_libraries_are_not_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unused.importlib.util, "find_spec", lambda name: name)
    said = unused_gpu(True, machine(tmp_path, driver="x", node=""), {})
    assert said is not None and "installed, but TensorFlow cannot use them" in said and "nvidia-smi" in said


def test_an_environment_without_pip_gets_a_command_of_uv(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unused.importlib.util, "find_spec", lambda name: None)
    command = unused._install_command("tensorflow-of-another-name", "and-cuda")
    assert command == f"uv pip install --python {sys.executable} 'tensorflow-of-another-name[and-cuda]'"
