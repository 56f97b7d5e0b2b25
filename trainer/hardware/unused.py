"""Explains why the GPU or the TPU of this machine is not used, with the command that corrects it."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from trainer.system.machine import (
    WSL_DRIVER,
    has_nvidia_driver,
    has_nvidia_gpu,
    num_nvidia_on_bus,
    nvidia_devices,
    on_bus,
    read_line,
)

# Google's other PCI devices are network cards. Source: JAX's hardware_utils.py.
_TPUS_ON_BUS = {("0x1ae0", f"0x00{number}") for number in ("27", "5e", "62", "63", "6f", "76")}


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
    number = max(1, num_nvidia_on_bus(root), len(nvidia_devices(root)))
    gpus = "This machine's NVIDIA GPU is" if number == 1 else f"This machine's {number} NVIDIA GPUs are"
    is_wsl = (root / WSL_DRIVER).exists()
    hidden_by = environ.get("CUDA_VISIBLE_DEVICES")
    if hidden_by is not None:
        why = f"CUDA_VISIBLE_DEVICES={hidden_by!r} hides the GPUs that TensorFlow could use. Make all visible with: "
        why += "unset CUDA_VISIBLE_DEVICES"
    elif not has_nvidia_driver(root) and not nvidia_devices(root):
        why = (
            "no driver is loaded. Install NVIDIA's driver (on Ubuntu: sudo ubuntu-drivers install), restart, and check "
        )
        why += "that nvidia-smi lists the GPU."
    elif not nvidia_devices(root) and not is_wsl:
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
    facts = [(read_line(path / "vendor"), read_line(path / "device")) for path in on_bus(root)]
    if not _TPUS_ON_BUS.intersection(facts) and not list((root / "dev").glob("accel[0-9]*")):
        return None
    return (
        "This machine's TPU is not used: distribution.kind='auto' never takes one. Install with "
        "scripts/launch/install_tpu, and train with: .venv-tpu/bin/trainer train CONFIG distribution.kind=tpu"
    )


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
