"""What a build of TensorFlow has for NVIDIA GPUs, what the driver tells of this machine's, and whether they fit.

Nothing here loads TensorFlow: XLA ends the process if it meets a GPU that its build does not know.
"""

import ctypes
import importlib.metadata
import importlib.util
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# A version of CUDA, or a GPU's compute capability: major and minor.
Version = tuple[int, int]

# The CUDA whose PTX first names these capabilities. XLA writes PTX in the version of the CUDA that it is built with,
# and LLVM ends the process if that version does not name the GPU's capability. Source: LLVM's NVPTX.td.
_FIRST_CUDA: dict[Version, Version] = {
    (10, 0): (12, 8),
    (10, 1): (12, 8),
    (10, 3): (12, 9),
    (11, 0): (13, 0),
    (12, 0): (12, 8),
    (12, 1): (12, 9),
}
# All older capabilities are named by the CUDA of each TensorFlow that trainer runs with.
_FIRST_BLACKWELL: Version = (10, 0)
# The wheels before this release have PTX of most operations for sm_90a, which no other GPU runs: on Blackwell they fail
# with CUDA_ERROR_INVALID_PTX. Since this release it is for sm_90, which the driver compiles for newer GPUs. Source:
# `grep -aoE '\.target sm_[0-9]+a?'` in libtensorflow_cc.so.2 of 2.20.0 and 2.21.0; TensorFlow's issues 97387, 99592 and
# 101746 (2.16 to 2.20), and 111958 (only XLA fails).
_FIRST_FOR_BLACKWELL: Version = (2, 21)


class Build(NamedTuple):
    """A build of TensorFlow.

    Attributes:
        version: TensorFlow's version, such as "2.21.0".
        cuda: the CUDA it is built with; None: none.
        binaries: the compute capabilities that it has machine code for.
        ptx: the compute capabilities that it has PTX for, which the driver compiles for newer GPUs.
    """

    version: str
    cuda: Version | None = None
    binaries: tuple[Version, ...] = ()
    ptx: tuple[Version, ...] = ()


class Gpu(NamedTuple):
    """An NVIDIA GPU.

    Attributes:
        name: the driver's name for it.
        capability: its compute capability.
    """

    name: str
    capability: Version

    def __str__(self) -> str:
        return f"{self.name} (compute capability {dotted(self.capability)})"


# The newest wheels of TensorFlow, for a machine that has none with CUDA. Source: their build_info.py.
NEWEST_WHEEL = Build("2.21.0", (12, 5), ((6, 0), (7, 0), (8, 0), (8, 9)), ((9, 0),))


class Driver(NamedTuple):
    """What NVIDIA's driver tells a process.

    Attributes:
        error: the number of the error with which it refuses to start; 0: it starts.
        cuda: the newest CUDA that it runs; None: it does not tell.
        gpus: the GPUs that it shows, which CUDA_VISIBLE_DEVICES chooses, in the order of TensorFlow.
    """

    error: int = 0
    cuda: Version | None = None
    gpus: tuple[Gpu, ...] = ()


class Support(NamedTuple):
    """How much of TensorFlow runs on a GPU.

    Attributes:
        runs: whether ordinary operations run.
        is_native: whether the build has machine code for it; otherwise the driver compiles each operation before its
            first use.
        compiles: whether XLA can compile for it.
    """

    runs: bool
    is_native: bool
    compiles: bool


def support_of(build: Build, capability: Version) -> Support:
    """Returns how much of a build of TensorFlow runs on a GPU of this compute capability."""
    # Machine code runs on the same major version, and on the same or a higher minor one.
    is_native = any(major == capability[0] and minor <= capability[1] for major, minor in build.binaries)
    ptx = [each for each in build.ptx if each <= capability]
    is_for_blackwell = release(build.version) >= _FIRST_FOR_BLACKWELL or any(each >= _FIRST_BLACKWELL for each in ptx)
    runs = is_native or (bool(ptx) and (capability < _FIRST_BLACKWELL or is_for_blackwell))
    first_cuda = first_cuda_of(capability)
    return Support(runs, is_native, runs and (first_cuda is None or (build.cuda or (0, 0)) >= first_cuda))


def lacks_code(build: Build, gpu: Gpu) -> str:
    """Returns the sentence that a build of TensorFlow has no machine code for a GPU, which may go on."""
    return f"TensorFlow {build.version}, built with CUDA {dotted(build.cuda or (0, 0))}, has no machine code for {gpu}"


def first_cuda_of(capability: Version) -> Version | None:
    """Returns the CUDA that XLA has to be built with for a GPU, if some TensorFlow that trainer runs with may be older.

    A GPU that is newer than this table needs a newer CUDA than all in it.
    """
    if capability < _FIRST_BLACKWELL:
        return None
    return _FIRST_CUDA.get(capability, (max(_FIRST_CUDA.values())[0] + 1, 0))


def make_build(version: str, info: Mapping[str, Any]) -> Build:
    """Returns a build by its version and by what `tf.sysconfig.get_build_info` returns."""
    if not info.get("is_cuda_build"):
        return Build(version)
    binaries: list[Version] = []
    ptx: list[Version] = []
    for name in info.get("cuda_compute_capabilities", ()):
        # sm_89, compute_90, and sm_120a, whose letter allows further instructions.
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", str(name)):
            (binaries if found[1] == "sm" else ptx).append((int(found[2]), int(found[3])))
    return Build(version, release(str(info.get("cuda_version", ""))), tuple(binaries), tuple(ptx))


def installed_build(folder: Path | None = None) -> Build | None:
    """Returns the installed build of TensorFlow; None: none is installed, or it has no record of itself.

    Args:
        folder: the folder of the package tensorflow; None: the one that Python would import.
    """
    if folder is None:
        spec = importlib.util.find_spec("tensorflow")
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0])
    try:
        info = runpy.run_path(str(folder / "python" / "platform" / "build_info.py"))["build_info"]
    except Exception:  # The file is missing, or cut off: its code may raise anything.
        return None
    return make_build(_version_in(folder), info)


def _version_in(folder: Path) -> str:
    """Returns the version of the package that owns the folder tensorflow; "" if none does."""
    for name in ("tensorflow", "tensorflow-tpu", "tensorflow-cpu", "tf-nightly"):
        for each in importlib.metadata.distributions(name=name, path=[str(folder.parent)]):
            return each.version
    return ""


def read_driver(library: str = "libcuda.so.1") -> Driver | None:
    """Asks NVIDIA's driver for the GPUs that this process may use; None if there is no driver.

    Args:
        library: the driver's library, by its name or its path.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    number = ctypes.c_int()
    version = _cuda_version(number.value) if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0 else None
    if error := cuda.cuInit(0):
        return Driver(error, version)
    if error := cuda.cuDeviceGetCount(ctypes.byref(number)):
        return Driver(error, version)
    return Driver(0, version, tuple(_read_gpu(cuda, index) for index in range(number.value)))


# CUdevice_attribute in cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


def _read_gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    name, number = ctypes.create_string_buffer(256), ctypes.c_int()
    cuda.cuDeviceGetName(name, len(name), index)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, index)
        capability.append(number.value)
    return Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]))


def _cuda_version(number: int) -> Version:
    """Returns the version that CUDA writes as a number: 12080 is 12.8."""
    return number // 1000, number % 1000 // 10


def release(text: str) -> Version:
    """Returns major and minor of a version; (0, 0) if it has none."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def dotted(version: Version) -> str:
    """Returns a version as it is written: 12.8."""
    return f"{version[0]}.{version[1]}"
