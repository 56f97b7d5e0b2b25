"""Checks that this machine's NVIDIA GPUs, its driver and TensorFlow's build fit together.

Each check is a function of a `Machine`, which holds facts and not TensorFlow, so that every fault can be staged.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainer.hardware.cuda import (
    Build,
    Driver,
    Gpu,
    Support,
    Version,
    dotted,
    first_cuda_of,
    installed_build,
    lacks_code,
    read_driver,
    support_of,
)
from trainer.system.findings import Finding, error, ok, warning
from trainer.system.machine import (
    WSL_DRIVER,
    has_nvidia_driver,
    has_nvidia_gpu,
    num_nvidia_on_bus,
    nvidia_devices,
    read_line,
)
from trainer.system.packages import TENSORFLOWS, Packages, installed_packages, pip_install

_ON_CPU = "or train on the CPU: distribution.kind=cpu"

# The oldest driver for Linux of each CUDA. A driver also runs programs of a newer CUDA with the same major version, but
# it does not compile their PTX. Source: CUDA Toolkit release notes, table 3.
_FIRST_DRIVER = {
    (12, 0): "525.60",
    (12, 1): "530.30",
    (12, 2): "535.54",
    (12, 3): "545.23",
    (12, 4): "550.54",
    (12, 5): "555.42",
    (12, 6): "560.28",
    (12, 8): "570.26",
    (12, 9): "575.51",
    (13, 0): "580.65",
    (13, 1): "590.44",
}

# CUresult in cuda.h: why the driver refuses to start, and what to do.
_NO_DEVICE = 100
_REFUSALS = {
    802: (
        "the GPUs' switches are not ready (CUDA_ERROR_SYSTEM_NOT_READY)",
        "Start their manager: sudo systemctl start nvidia-fabricmanager",
    ),
    803: (
        "its library and its kernel module have different versions, as after an update "
        "(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)",
        "Restart the machine: sudo reboot; in a container restart the container",
    ),
    804: (
        "a library of cuda-compat that this GPU does not allow is found before the driver's own "
        "(CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE)",
        "Leave its folder out of LD_LIBRARY_PATH, for example with: unset LD_LIBRARY_PATH",
    ),
    999: (
        "it fails without a reason (CUDA_ERROR_UNKNOWN), often after the machine was suspended",
        "Load it anew: sudo rmmod nvidia_uvm; sudo modprobe nvidia_uvm",
    ),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The facts about a machine that checks read.

    Attributes:
        packages: the installed packages.
        build: TensorFlow's build; None: none is installed.
        site: the folder that TensorFlow is installed in.
        driver: what NVIDIA's driver tells; None: it cannot be asked.
        root: the root of the file system.
        environ: the environment variables of this process.
    """

    packages: Packages
    build: Build | None
    site: Path
    driver: Driver | None
    root: Path = Path("/")
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)

    @property
    def tensorflow(self) -> str:
        """The name of the package that TensorFlow is from."""
        return next((name for name in TENSORFLOWS if name in self.packages), "tensorflow")

    def gpus(self, chosen: tuple[int, ...] | None = None) -> tuple[Gpu, ...]:
        """The GPUs that the driver shows, or those of them with these numbers."""
        shown = self.driver.gpus if self.driver is not None else ()
        return tuple(gpu for number, gpu in enumerate(shown) if chosen is None or number in chosen)


def this_machine(packages: Packages | None = None) -> Machine:
    """Returns the facts about this machine, without loading TensorFlow.

    Args:
        packages: the installed packages that are known already; None: all.
    """
    spec = importlib.util.find_spec("tensorflow")
    places = spec.submodule_search_locations if spec is not None else None
    return Machine(
        packages=installed_packages() if packages is None else packages,
        build=installed_build(),
        site=Path(places[0]).parent if places else Path(),
        driver=read_driver() if has_nvidia_gpu() else None,
    )


def check_build(machine: Machine, may_use_gpus: bool = True) -> Iterator[Finding]:
    """Checks that TensorFlow is installed, and is built with CUDA if there is an NVIDIA GPU.

    Args:
        machine: the machine.
        may_use_gpus: whether a run takes the GPUs of its machine if there are any.
    """
    build, name = machine.build, machine.tensorflow
    if build is None:
        what = "TensorFlow is not installed, or its files are damaged"
        yield error("TensorFlow", what, f"Run: {_reinstall(machine)}")
    elif build.cuda is None and may_use_gpus and has_nvidia_gpu(machine.root):
        yield error(
            "TensorFlow",
            f"{name} {build.version} is built without CUDA, so it cannot use this machine's NVIDIA GPU",
            f"Install one with CUDA: {install_with_cuda(machine)}",
        )
    else:
        with_cuda = f"built with CUDA {dotted(build.cuda)}" if build.cuda else "built without CUDA"
        code = [f"sm_{major}{minor}" for major, minor in build.binaries]
        code += [f"compute_{major}{minor}" for major, minor in build.ptx]
        yield ok("TensorFlow", f"{name} {build.version}, {with_cuda}" + (f" for {' '.join(code)}" if code else ""))


def check_reach(machine: Machine, needs_gpu: bool = True) -> Iterator[Finding]:
    """Checks that the driver is loaded and shows this machine's GPUs to this process.

    Args:
        machine: the machine.
        needs_gpu: whether a run cannot do without a GPU: then it is an error if CUDA_VISIBLE_DEVICES hides all of them.
            Otherwise it is a warning, because that may be intended.
    """
    root, driver = machine.root, machine.driver
    if not has_nvidia_gpu(root):
        yield ok("GPU", "this machine has no NVIDIA GPU")
        return
    number = max(1, num_nvidia_on_bus(root), len(nvidia_devices(root)))
    hidden_by = machine.environ.get("CUDA_VISIBLE_DEVICES")
    is_wsl = (root / WSL_DRIVER).exists()
    if not has_nvidia_driver(root) and not nvidia_devices(root):
        yield error(
            "GPU",
            f"this machine has {_count(number)}, but no driver is loaded",
            "Install NVIDIA's driver (on Ubuntu: sudo ubuntu-drivers install), restart, and see whether nvidia-smi "
            "lists the GPU",
        )
    elif not nvidia_devices(root) and not is_wsl:
        yield error(
            "GPU",
            "NVIDIA's driver is loaded, but there is no /dev/nvidia0 here",
            "Start a container with: docker run --gpus all; on a cluster ask for a GPU; elsewhere run: "
            "sudo nvidia-modprobe -u -c=0",
        )
    elif driver is None:
        yield error(
            "GPU",
            "the driver's library, libcuda.so.1, cannot be loaded",
            "In a container install NVIDIA's container toolkit on the host and start it with: docker run --gpus all; "
            "elsewhere install the driver again (on Ubuntu: sudo ubuntu-drivers install)",
        )
    elif driver.error not in (0, _NO_DEVICE):
        reason, remedy = _REFUSALS.get(driver.error, (f"error {driver.error} of cuInit", "See: sudo dmesg | grep NVRM"))
        yield error("GPU", f"NVIDIA's driver does not start: {reason}", remedy)
    elif not driver.gpus and hidden_by is not None:
        yield (error if needs_gpu else warning)(
            "GPU",
            f"CUDA_VISIBLE_DEVICES={hidden_by!r} hides the GPUs that TensorFlow could use",
            "Make all visible with: unset CUDA_VISIBLE_DEVICES",
        )
    elif not driver.gpus:
        yield error("GPU", "NVIDIA's driver shows no GPU", "See the reason with: nvidia-smi; sudo dmesg | grep NVRM")
    else:
        version = read_line(root / "sys/module/nvidia/version")
        by = f", driver {version}" if version else ""
        yield ok("GPU", ", ".join(map(str, driver.gpus)) + by)


def check_driver(machine: Machine) -> Iterator[Finding]:
    """Checks that the driver is new enough for the CUDA that TensorFlow is built with."""
    driver, build = machine.driver, machine.build
    if driver is None or driver.cuda is None or build is None or build.cuda is None:
        return
    runs = f"NVIDIA's driver runs CUDA up to {dotted(driver.cuda)}"
    if driver.cuda[0] >= build.cuda[0]:
        yield ok("driver", f"{runs}, and TensorFlow is built with {dotted(build.cuda)}")
        return
    what = f"{runs}, and TensorFlow {build.version} is built with {dotted(build.cuda)}"
    yield error("driver", what, _newer_driver((build.cuda[0], 0)))


def check_support(machine: Machine, chosen: tuple[int, ...] | None = None, xla: str = "auto") -> Iterator[Finding]:
    """Checks that TensorFlow has code for each GPU, and that XLA can compile for it.

    Args:
        machine: the machine.
        chosen: the setting distribution.gpus; None: all GPUs.
        xla: the setting train.xla.
    """
    build, driver = machine.build, machine.driver
    if build is None or build.cuda is None:
        return
    for gpu in dict.fromkeys(machine.gpus(chosen)):
        support = support_of(build, gpu.capability)
        has = lacks_code(build, gpu)
        newer = _how_to_build(gpu)
        if not support.runs and first_cuda_of(gpu.capability) is None:
            yield error("code", f"{has}, and does not use it", "Train on the CPU: distribution.kind=cpu")
        elif not support.runs:
            yield error(
                "code",
                f"{has}, and its operations fail on it (CUDA_ERROR_INVALID_PTX)",
                f"Install 2.21, which runs there without XLA: {install_with_cuda(machine, '>=2.21,<2.22')}; {_ON_CPU}",
            )
        elif not support.compiles and xla == "on":
            yield error("code", f"train.xla='on', but {has}, and XLA would abort", f"Set train.xla=off; or {newer}")
        elif not support.compiles:
            yield warning(
                "code",
                f"{has}: XLA would abort, so the step runs without it, and at the first start the driver compiles each "
                "operation, which can take half an hour",
                f"Keep what it compiles: export CUDA_CACHE_MAXSIZE=4294967296. For XLA {newer}",
            )
        elif not support.is_native and driver is not None and _is_older_minor(driver.cuda, build.cuda):
            yield error(
                "code",
                f"TensorFlow {build.version} has no machine code for {gpu}, and PTX of CUDA {dotted(build.cuda)}, "
                f"which NVIDIA's driver cannot compile: it runs CUDA up to {dotted(driver.cuda or (0, 0))}",
                _newer_driver(build.cuda),
            )
        else:
            yield ok("code", f"{gpu}: {_code(support)}")


def _is_older_minor(one: Version | None, other: Version) -> bool:
    return one is not None and one[0] == other[0] and one < other


def _newer_driver(cuda: Version) -> str:
    first = f"driver {_FIRST_DRIVER[cuda]} or newer" if cuda in _FIRST_DRIVER else "the newest driver"
    return f"Install {first} (on Ubuntu: sudo ubuntu-drivers install) and restart; {_ON_CPU}"


def _code(support: Support) -> str:
    if support.is_native:
        return "TensorFlow has machine code for it"
    return "the driver compiles TensorFlow's operations for it before their first use"


def _how_to_build(gpu: Gpu) -> str:
    cuda = dotted(first_cuda_of(gpu.capability) or (0, 0))
    return f"use a TensorFlow built with CUDA {cuda} or newer for sm_{gpu.capability[0]}{gpu.capability[1]}"


def install_with_cuda(machine: Machine, versions: str | None = None) -> str:
    """Returns the command that installs TensorFlow with the libraries of CUDA.

    Args:
        machine: the machine.
        versions: the versions to choose from; None: the installed one.
    """
    if versions is None:
        version = machine.packages[machine.tensorflow].version if machine.tensorflow in machine.packages else ""
        versions = f"=={version}" if version else ""
    return pip_install(f"tensorflow[and-cuda]{versions}")


def _reinstall(machine: Machine) -> str:
    package = machine.packages.get(machine.tensorflow)
    version = f"=={package.version}" if package else ">=2.20,<2.22"
    return pip_install(f"{machine.tensorflow}{version}", options="--force-reinstall")


def _count(number: int) -> str:
    return "an NVIDIA GPU" if number == 1 else f"{number} NVIDIA GPUs"
