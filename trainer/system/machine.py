"""The cores, GPUs and TPUs of this machine, found in its files, whether TensorFlow sees them or not."""

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path


def num_cores() -> int:
    """Returns the number of cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the cores that this process may use and the widest of their instructions: "2 CPU cores with AMX"."""
    flags = re.findall(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)[:1] if cpuinfo.is_file() else []
    known = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    widest = next((f" with {name}" for flag, name in known.items() if flags and flag in flags[0].split()), "")
    return f"{num_cores()} CPU core{'s' if num_cores() > 1 else ''}{widest}"


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether this machine has an NVIDIA GPU, by its PCI bus and the files of its driver.

    Args:
        root: the root of the file system; tests pass another one.
    """
    return _has_nvidia_driver(root) or _num_nvidia_on_bus(root) > 0 or bool(_nvidia_devices(root))


def unused_gpu(is_built_with_cuda: bool, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns why TensorFlow sees no GPU on a machine that has one, and the command that corrects it; None if there is
    no NVIDIA GPU.

    Args:
        is_built_with_cuda: the result of `tf.test.is_built_with_cuda`.
        root: the root of the file system; tests pass another one.
        environ: the environment variables of this process.
    """
    if not has_nvidia_gpu(root):
        return None
    number = max(1, _num_nvidia_on_bus(root), len(_nvidia_devices(root)))
    gpus = "This machine's NVIDIA GPU is" if number == 1 else f"This machine's {number} NVIDIA GPUs are"
    is_wsl = (root / _WSL_DRIVER).exists()
    hidden_by = environ.get("CUDA_VISIBLE_DEVICES")
    if hidden_by is not None:
        why = f"CUDA_VISIBLE_DEVICES={hidden_by!r} hides the GPUs that TensorFlow could use. Make all visible with: "
        why += "unset CUDA_VISIBLE_DEVICES"
    elif not _has_nvidia_driver(root) and not _nvidia_devices(root):
        why = (
            "no driver is loaded. Install NVIDIA's driver (on Ubuntu: sudo ubuntu-drivers install), restart, and check "
        )
        why += "that nvidia-smi lists the GPU."
    elif not _nvidia_devices(root) and not is_wsl:
        why = "its driver is loaded, but there is no /dev/nvidia0 here. Start a container with: docker run --gpus all; "
        why += "on a cluster ask for a GPU; elsewhere run: sudo nvidia-modprobe -u -c=0"
    elif not is_built_with_cuda or importlib.util.find_spec("nvidia") is None:
        what = "lacks the CUDA libraries" if is_built_with_cuda else "is built without CUDA"
        why = f"TensorFlow {what}. Install one with them: {_install_command('tensorflow', 'and-cuda')}"
    else:
        why = "the CUDA libraries are installed, but TensorFlow cannot use them. See its messages with: "
        why += f"{sys.executable} -c 'import tensorflow as tf; tf.config.list_physical_devices(\"GPU\")'; check that "
        why += "the driver is new enough with: nvidia-smi"
    return f"{gpus} not used: {why}"


def unused_tpu(root: Path = Path("/")) -> str | None:
    """Returns how to use the TPU of this machine, which distribution.kind='auto' never takes; None if it has none.

    Args:
        root: the root of the file system; tests pass another one.
    """
    on_bus = any((_read(path / "vendor"), _read(path / "device")) in _TPUS_ON_BUS for path in _on_bus(root))
    if not on_bus and not list((root / "dev").glob("accel[0-9]*")):
        return None
    return (
        "This machine's TPU is not used: distribution.kind='auto' never takes one. Install with "
        "scripts/launch/install_tpu, and train with: .venv-tpu/bin/trainer train CONFIG distribution.kind=tpu"
    )


# Google's other PCI devices are network cards. Source: JAX's hardware_utils.py.
_TPUS_ON_BUS = {("0x1ae0", f"0x00{number}") for number in ("27", "5e", "62", "63", "6f", "76")}

# The library of the Windows driver for Linux programs, which see no PCI device.
_WSL_DRIVER = "usr/lib/wsl/lib/libcuda.so.1"


def _has_nvidia_driver(root: Path) -> bool:
    return any((root / path).exists() for path in ("proc/driver/nvidia", "dev/nvidiactl", _WSL_DRIVER))


def _nvidia_devices(root: Path) -> list[Path]:
    return [path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]


def _num_nvidia_on_bus(root: Path) -> int:
    # The sound device of a GPU is NVIDIA's, too. Graphics is PCI class 3.
    facts = [(_read(device / "vendor"), _read(device / "class")) for device in _on_bus(root)]
    return sum(vendor == "0x10de" and (kind == "" or kind.startswith("0x03")) for vendor, kind in facts)


def _on_bus(root: Path) -> list[Path]:
    return list((root / "sys/bus/pci/devices").glob("*"))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # It does not exist, or this user may not read it.


def _install_command(package: str, extra: str) -> str:
    """Returns the command that installs an extra of an installed package, in the installed version."""
    # An environment made by uv has no pip.
    pip = f"{sys.executable} -m pip install"
    if importlib.util.find_spec("pip") is None:
        pip = f"uv pip install --python {sys.executable}"
    try:
        version = f"=={importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # It is installed under another name, such as tensorflow-cpu.
        version = ""
    return f"{pip} '{package}[{extra}]{version}'"
