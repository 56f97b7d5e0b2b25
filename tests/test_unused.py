"""Laws of the messages about devices of this machine that are not used."""

import re
import sys
from pathlib import Path

import pytest

from trainer.hardware.checks import Machine
from trainer.hardware.cuda import Build, Driver, Gpu
from trainer.hardware.libraries import needed_libraries
from trainer.hardware.unused import unused_gpu, unused_tpu
from trainer.system import packages
from trainer.system.machine import has_nvidia_gpu
from trainer.system.packages import Package

WHEEL = Build("2.21.0", (12, 5), ((8, 9),), ((9, 0),))
SHOWN = Driver(0, (13, 0), (Gpu("NVIDIA H100", (9, 0)),))


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


def facts(root: Path, driver: Driver | None = None, build: Build = WHEEL, **environ: str) -> Machine:
    """Returns a machine without the libraries of CUDA."""
    packages = {"tensorflow": Package("2.21.0", ('nvidia-cublas-cu12; extra == "and-cuda"',))}
    return Machine(packages, build, root / "site", driver, root, environ)


@pytest.mark.parametrize("files", [{"bus": "0x10de\n"}, {"driver": "x"}, {"control": ""}, {"node": ""}, {"wsl": ""}])
def test_a_gpu_is_found_by_its_bus_its_driver_or_its_node(tmp_path: Path, files: dict[str, str]):
    assert has_nvidia_gpu(machine(tmp_path, **files))
    assert unused_gpu(facts(tmp_path)) is not None


@pytest.mark.parametrize(
    "files", [{}, {"bus": "0x8086\n", "kind": "0x030000\n"}, {"bus": "0x10de\n", "kind": "0x040300\n"}]
)
def test_a_machine_without_an_nvidia_gpu_gets_no_warning(tmp_path: Path, files: dict[str, str]):
    assert not has_nvidia_gpu(machine(tmp_path, **files))
    assert unused_gpu(facts(tmp_path, CUDA_VISIBLE_DEVICES="")) is None


@pytest.mark.parametrize(
    ("files", "driver", "what"),
    [
        ({"bus": "0x10de\n"}, None, r"GPU is not used: .* no driver is loaded\. .*sudo ubuntu-drivers install"),
        ({"bus": "0x10de\n", "driver": "x"}, None, r"no /dev/nvidia0 here\. .*: docker run --gpus all;"),
        (
            {"bus": "0x10de\n", "second": "0x10de\n", "driver": "x", "node": ""},
            SHOWN,
            r"2 NVIDIA GPUs are not used: libcudart\.so\.12, .* are missing.* install 'tensorflow\[and-cuda\]==2",
        ),
        # A device node by itself was made by a driver.
        ({"node": ""}, SHOWN, r"libcudart\.so\.12, .* are missing, and TensorFlow uses no GPU without them\. "),
        ({"wsl": ""}, SHOWN, r"libcudart\.so\.12, .* are missing.*: /.* install .*'tensorflow\[and-cuda\]==2\."),
        ({"wsl": ""}, None, r"libcuda\.so\.1, cannot be loaded"),
        ({"driver": "x", "node": ""}, Driver(100), "CUDA_VISIBLE_DEVICES='-1' hides .*: unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_the_warning_about_an_unused_gpu_has_the_command_that_corrects_it(
    tmp_path: Path, files: dict[str, str], driver: Driver | None, what: str
):
    said = unused_gpu(facts(machine(tmp_path, **files), driver, CUDA_VISIBLE_DEVICES="-1"))
    assert said is not None and re.search(what, said)
    if "install '" in said:
        assert f"{sys.executable} -m pip install '" in said


def test_tensorflow_without_cuda_is_named(tmp_path: Path):
    said = unused_gpu(facts(machine(tmp_path, driver="x", node=""), SHOWN, Build("2.21.0")))
    assert said is not None and re.search(r"is built without CUDA.*install .*'tensorflow\[and-cuda\]==2", said)


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


def test_whole_cuda_libraries_are_not_installed_again(tmp_path: Path):
    build = Build("2.21.0", (12, 5), ((9, 0),))
    for folder in ("lib", "bin", "nvvm/libdevice"):
        (tmp_path / "site/nvidia/cuda_nvcc" / folder).mkdir(parents=True)
    for library in needed_libraries((12, 5)):
        (tmp_path / "site/nvidia/cuda_nvcc/lib" / library.file).touch()
    for file in ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc"):
        (tmp_path / "site/nvidia/cuda_nvcc" / file).touch()
    said = unused_gpu(facts(machine(tmp_path, driver="x", node=""), SHOWN, build))
    assert said is not None and "installed, but TensorFlow cannot use them" in said
    assert "python" in said and "list_physical_devices" in said


def test_an_environment_without_pip_gets_a_command_of_uv(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert packages.pip_install("a>=1", "b") == f"uv pip install --python {sys.executable} 'a>=1' 'b'"
