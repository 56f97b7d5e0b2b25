"""The libraries of CUDA that TensorFlow opens by their names, and where the dynamic linker finds them."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from trainer.hardware.cuda import Version, release
from trainer.system.packages import Packages


class Needed(NamedTuple):
    """A library that TensorFlow opens.

    Attributes:
        file: the name that it is opened by.
        wheel: the name of the package that has it, without the version of CUDA at its end.
        is_for_several: whether only a run on several GPUs needs it.
    """

    file: str
    wheel: str
    is_for_several: bool = False


# By the major version of CUDA: the libraries without which TensorFlow registers no GPU, with the ones that they need
# themselves. Source: tsl/platform/default/dso_loader.h and dlopen_checker.cc in TensorFlow, and NVIDIA's packages.
_VERSIONS = {
    12: {"cudart": 12, "cublas": 12, "cublasLt": 12, "cufft": 11, "cusolver": 11, "cusparse": 12, "nvJitLink": 12},
    13: {"cudart": 13, "cublas": 13, "cublasLt": 13, "cufft": 12, "cusolver": 12, "cusparse": 12, "nvJitLink": 13},
}
_WHEELS = {"cudart": "cuda-runtime", "cublasLt": "cublas", "nvJitLink": "nvjitlink"}


class Found(NamedTuple):
    """A library that the dynamic linker finds.

    Attributes:
        path: the file.
        by: who leads to it: "LD_LIBRARY_PATH", "a package", "conda" or "the system".
    """

    path: Path
    by: str


def needed_libraries(cuda: Version, cudnn: int = 9) -> list[Needed]:
    """Returns the libraries that a build of TensorFlow opens.

    Args:
        cuda: the CUDA that it is built with.
        cudnn: the major version of the cuDNN that it is built with.
    """
    versions = _VERSIONS.get(cuda[0], {})
    return [
        *(Needed(f"lib{name}.so.{number}", f"nvidia-{_WHEELS.get(name, name)}") for name, number in versions.items()),
        Needed(f"libcudnn.so.{cudnn}", "nvidia-cudnn"),
        Needed("libnccl.so.2", "nvidia-nccl", is_for_several=True),
    ]


def find_library(
    file: str, site: Path, root: Path = Path("/"), environ: Mapping[str, str] = os.environ
) -> Found | None:
    """Returns the library that TensorFlow gets when it opens one by its name; None if there is none.

    Args:
        file: the name, such as libcudnn.so.9.
        site: the folder that the packages are installed in.
        root: the root of the file system; tests pass another one.
        environ: the environment variables of this process.
    """
    # The order of the dynamic linker. TensorFlow's own search path (RUNPATH) names NVIDIA's packages.
    places = [(folder, "LD_LIBRARY_PATH") for folder in _folders_of(environ.get("LD_LIBRARY_PATH", ""), root)]
    places += [(folder, "a package") for folder in sorted(site.glob("nvidia/*/lib"))]
    if has_conda_tensorflow(site):
        places.append((prefix_of(site) / "lib", "conda"))
    places += [(folder, "the system") for folder in system_folders(root)]
    return next((Found(folder / file, by) for folder, by in places if (folder / file).exists()), None)


def prefix_of(site: Path) -> Path:
    """Returns the prefix of the environment with these packages: X for X/lib/python3.12/site-packages."""
    return site.parents[2] if len(site.parents) > 2 else site


def has_conda_tensorflow(site: Path) -> bool:
    """Whether TensorFlow is conda's own, whose search path names the environment's lib. The one that pip installs names
    only NVIDIA's packages (RUNPATH), in an environment of conda, too.
    """
    return any((prefix_of(site) / "conda-meta").glob("tensorflow-base-*.json"))


def find_elsewhere(file: str, root: Path = Path("/"), site: Path = Path()) -> Path | None:
    """Returns a place of a library that the dynamic linker does not look into; None if no usual place has it."""
    if (prefix_of(site) / "conda-meta").is_dir() and (prefix_of(site) / "lib" / file).exists():
        return prefix_of(site) / "lib"
    for pattern in ("usr/local/cuda*/lib64", "usr/local/cuda*/targets/*/lib", "opt/cuda*/lib64", "usr/lib/cuda/lib64"):
        for folder in sorted(root.glob(pattern), reverse=True):
            if (folder / file).exists():
                return folder
    return None


def system_folders(root: Path) -> Iterator[Path]:
    """Yields the folders of libraries that the system's dynamic linker looks into."""
    files = [root / "etc/ld.so.conf", *sorted((root / "etc/ld.so.conf.d").glob("*.conf"))]
    for file in files:
        try:
            lines = file.read_text(errors="replace").splitlines()  # A comment may be Latin-1.
        except OSError:
            continue
        for line in lines:
            path = line.partition("#")[0].strip()
            if path.startswith("/"):
                yield root / path.lstrip("/")
    for path in ("lib", "usr/lib", "lib64", "usr/lib64"):
        yield root / path
    for machine in ("x86_64-linux-gnu", "aarch64-linux-gnu"):
        yield root / "lib" / machine
        yield root / "usr/lib" / machine


def version_of_library(found: Found, packages: Packages) -> str | None:
    """Returns a library's version, by its package or by its file's full name (libcudnn.so.9.3.0); None: unknown."""
    if found.by == "a package":
        component = found.path.parent.parent.name.replace("_", "-")
        for name, package in packages.items():
            if re.fullmatch(rf"nvidia-{re.escape(component)}(-cu\d+)?", name):
                return package.version
    full = re.search(r"\.so\.(\d+\.\d+[\d.]*)$", found.path.resolve().name)
    return full[1] if full else None


def wanted_wheels(packages: Packages, tensorflow: str) -> dict[str, Requirement]:
    """Returns NVIDIA's packages that TensorFlow's extra and-cuda requires, by their names without the CUDA at the end.

    Args:
        packages: the installed packages.
        tensorflow: the name of TensorFlow's package.
    """
    wanted = {}
    for text in packages[tensorflow].requires if tensorflow in packages else ():
        requirement = Requirement(text)
        if requirement.name.startswith("nvidia-"):
            wanted[re.sub(r"-cu\d+$", "", requirement.name)] = requirement
    return wanted


def least_version(requirement: Requirement) -> Version:
    """Returns major and minor of the least version that a requirement allows; (0, 0) if it names none."""
    least = [release(each.version) for each in requirement.specifier if each.operator in (">=", "==", "~=", ">")]
    return max(least, default=(0, 0))


def _folders_of(search_path: str, root: Path) -> Iterator[Path]:
    for text in search_path.split(":"):
        if text:
            yield root / text.lstrip("/") if root != Path("/") else Path(text)
