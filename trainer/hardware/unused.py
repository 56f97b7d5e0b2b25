"""Explains why the GPU or the TPU of this machine is not used, with the command that corrects it."""

import sys
from pathlib import Path

from trainer.hardware.checks import Machine, check_build, check_driver, check_reach, check_support
from trainer.hardware.library_checks import check_libraries
from trainer.system.machine import has_nvidia_gpu, num_nvidia_on_bus, nvidia_devices, on_bus, read_line

# Google's other PCI devices are network cards. Source: JAX's hardware_utils.py.
_TPUS_ON_BUS = {("0x1ae0", f"0x00{number}") for number in ("27", "5e", "62", "63", "6f", "76")}


def unused_gpu(machine: Machine) -> str | None:
    """Returns why TensorFlow sees no GPU on a machine that has one, and the command that corrects it; None if there is
    no NVIDIA GPU.
    """
    root = machine.root
    if not has_nvidia_gpu(root):
        return None
    number = max(1, num_nvidia_on_bus(root), len(nvidia_devices(root)))
    gpus = "This machine's NVIDIA GPU is" if number == 1 else f"This machine's {number} NVIDIA GPUs are"
    for check in (check_reach, check_build, check_driver, check_libraries, check_support):
        for finding in check(machine):
            if finding.level == "error":
                return f"{gpus} not used: {finding}"
    return (
        f"{gpus} not used: the CUDA libraries are installed, but TensorFlow cannot use them. See its messages with: "
        f"{sys.executable} -c 'import tensorflow as tf; tf.config.list_physical_devices(\"GPU\")'"
    )


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
