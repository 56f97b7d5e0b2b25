"""Checks that the dynamic linker finds the libraries of CUDA that TensorFlow opens, and XLA what it needs of CUDA."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from trainer.hardware.checks import Machine, install_with_cuda
from trainer.hardware.cuda import dotted, release, support_of
from trainer.hardware.libraries import (
    Found,
    find_elsewhere,
    find_library,
    least_version,
    needed_libraries,
    prefix_of,
    version_of_library,
    wanted_wheels,
)
from trainer.system.findings import Finding, error, ok
from trainer.system.machine import has_nvidia_gpu
from trainer.system.packages import pip_install


def check_libraries(machine: Machine, chosen: tuple[int, ...] | None = None, xla: str = "auto") -> Iterator[Finding]:
    """Checks that each library of CUDA is found by the dynamic linker, that cuDNN is new enough, and that XLA finds its
    assembler and its library of functions.

    Args:
        machine: the machine.
        chosen: the setting distribution.gpus; None: all GPUs.
        xla: the setting train.xla.
    """
    build, found = machine.build, 0
    missing: list[str] = []
    if build is None or build.cuda is None or not has_nvidia_gpu(machine.root):
        return
    faults = []
    wheels = wanted_wheels(machine.packages, machine.tensorflow)
    for needed in needed_libraries(build.cuda):
        if needed.is_for_several and len(machine.gpus(chosen)) < 2:
            continue
        library = find_library(needed.file, machine.site, machine.root, machine.environ)
        if library is None:
            if fault := _misplaced(machine, needed.file, wheels.get(needed.wheel)):
                faults.append(fault)
            else:
                missing.append(needed.file)
        elif needed.wheel in wheels and (fault := _too_old(machine, needed.file, library, wheels[needed.wheel])):
            faults.append(fault)
        else:
            found += 1
    if missing:
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        what = f"{', '.join(missing)} {verb} missing, and TensorFlow uses no GPU without {them}"
        faults.append(error("libraries", what, f"Run: {install_with_cuda(machine)}"))
    wants_xla = xla != "off" and any(support_of(build, gpu.capability).compiles for gpu in machine.gpus(chosen))
    if wants_xla:
        faults += _check_compiler(machine)
    yield from faults
    if not faults:
        of_xla = ", and XLA finds ptxas and libdevice" if wants_xla else ""
        yield ok("libraries", f"all {found} of CUDA are found{of_xla}")


def _misplaced(machine: Machine, file: str, wheel: Requirement | None) -> Finding | None:
    """Returns why a library is not found although it is installed; None if it is not."""
    is_installed = wheel is not None and wheel.name in machine.packages
    if elsewhere := find_elsewhere(file, machine.root, machine.site):
        return error(
            "libraries",
            f"{file} is in {elsewhere}, where the dynamic linker does not look",
            f"Add the folder: export LD_LIBRARY_PATH={elsewhere}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}",
        )
    if wheel is not None and is_installed:
        package = f"{wheel.name}=={machine.packages[wheel.name].version}"
        return error(
            "libraries",
            f"{file} is missing, although its package {wheel.name} is installed",
            f"Install it again: {pip_install(package, options='--force-reinstall --no-deps')}",
        )
    return None


def _too_old(machine: Machine, file: str, found: Found, wheel: Requirement) -> Finding | None:
    """Returns a fault if cuDNN is older than the one that TensorFlow is built with: TensorFlow refuses it then."""
    version = version_of_library(found, machine.packages)
    if version is None or not file.startswith("libcudnn") or release(version) >= least_version(wheel):
        return None
    needs = f"TensorFlow needs {dotted(least_version(wheel))} or newer"
    what = f"{file} in {found.path.parent} is cuDNN {version}, and {needs}"
    if found.by == "LD_LIBRARY_PATH":
        return error("libraries", f"{what}; LD_LIBRARY_PATH leads to it", "Leave its folder out: unset LD_LIBRARY_PATH")
    return error("libraries", what, f"Run: {pip_install(f'{wheel.name}{wheel.specifier}')}")


def _check_compiler(machine: Machine) -> Iterator[Finding]:
    toolkits = [machine.site / "nvidia/cuda_nvcc", *sorted(machine.root.glob("usr/local/cuda*"))]
    # The prefix is for conda's packages of NVIDIA. XLA reads neither CUDA_HOME nor CUDA_PATH. Source:
    # CandidateCudaRoots in tsl's cuda_root_path.cc.
    toolkits += [*sorted(machine.site.glob("nvidia/cu[0-9]*")), prefix_of(machine.site), machine.root / "opt/cuda"]
    if given := re.search(r"--xla_gpu_cuda_data_dir=(\S+)", machine.environ.get("XLA_FLAGS", "")):
        toolkits.append(Path(given[1]))
    for file, of in (("bin/ptxas", "assembler"), ("nvvm/libdevice/libdevice.10.bc", "library of functions")):
        # XLA looks for programs on PATH, too. Source: FindCudaExecutable in xla's subprocess_compilation.cc.
        is_on_path = shutil.which(Path(file).name, path=machine.environ.get("PATH", "")) is not None
        if not is_on_path and not any((toolkit / file).exists() for toolkit in toolkits):
            yield error(
                "libraries",
                f"{file}, the {of} of XLA, is missing",
                f"Run: {install_with_cuda(machine)}; or do without XLA: train.xla=off",
            )
