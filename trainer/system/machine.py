"""The cores, GPUs and TPUs of this machine, found in its files, whether TensorFlow sees them or not."""

import os
import re
from pathlib import Path


def num_cores() -> int:
    """Returns the number of cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the cores that this process may use and the widest of their instructions: "2 CPU cores with AMX"."""
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    flags = re.findall(r"^flags\s*:(.*)$", text, re.MULTILINE)[:1]
    known = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    widest = next((f" with {name}" for flag, name in known.items() if flags and flag in flags[0].split()), "")
    return f"{num_cores()} CPU core{'s' if num_cores() > 1 else ''}{widest}"


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether this machine has an NVIDIA GPU, by its PCI bus and the files of its driver.

    Args:
        root: the root of the file system; tests pass another one.
    """
    return has_nvidia_driver(root) or num_nvidia_on_bus(root) > 0 or bool(nvidia_devices(root))


# The library of the Windows driver for Linux programs, which see no PCI device.
WSL_DRIVER = "usr/lib/wsl/lib/libcuda.so.1"


def has_nvidia_driver(root: Path) -> bool:
    """Whether NVIDIA's driver is loaded."""
    return any((root / path).exists() for path in ("proc/driver/nvidia", "dev/nvidiactl", WSL_DRIVER))


def nvidia_devices(root: Path) -> list[Path]:
    """Returns the device nodes of NVIDIA's driver, one for each GPU."""
    return [path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]


def num_nvidia_on_bus(root: Path) -> int:
    """Returns the number of NVIDIA GPUs on the PCI bus."""
    # The sound device of a GPU is NVIDIA's, too. Graphics is PCI class 3.
    facts = [(read_line(device / "vendor"), read_line(device / "class")) for device in on_bus(root)]
    return sum(vendor == "0x10de" and (kind == "" or kind.startswith("0x03")) for vendor, kind in facts)


def on_bus(root: Path) -> list[Path]:
    """Returns the folders of the devices on the PCI bus."""
    return list((root / "sys/bus/pci/devices").glob("*"))


def read_line(path: Path) -> str:
    """Returns the text of a small file; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""  # It does not exist, or this user may not read it.
