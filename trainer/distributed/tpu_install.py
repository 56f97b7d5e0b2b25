"""Checks that the installed packages can use a TPU. Call it before TensorFlow is imported: a wrong libtpu aborts the
process.
"""

from collections.abc import Callable, Iterator
from importlib import metadata

from trainer.errors import UserError
from trainer.system.findings import Finding, error, ok
from trainer.system.packages import Packages

# tensorflow-tpu 2.20 loads these; 0.0.32 and later end the process.
LIBTPU_VERSIONS = ("0.0.17", "0.0.24", "0.0.29")


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_REMEDY = "Run scripts/launch/install_tpu on the TPU VM, and use .venv-tpu/bin/trainer"


def check_tpu_install(version_of: Callable[[str], str | None] = installed_version) -> None:
    """Checks that tensorflow-tpu is installed, with a version of libtpu that it can load.

    Raises:
        UserError: it is not; the message names the command that installs it.
    """
    if problem := _problem(version_of):
        raise UserError(f"distribution.kind='tpu': {problem}. {_REMEDY}; or set distribution.kind='cpu'.")


def check_tpu(packages: Packages, is_wanted: bool) -> Iterator[Finding]:
    """Checks the same if a TPU is wanted or tensorflow-tpu is installed.

    Args:
        packages: the installed packages.
        is_wanted: whether the config wants a TPU.
    """
    if not is_wanted and "tensorflow-tpu" not in packages:
        return

    def version_of(name: str) -> str | None:
        return packages[name].version if name in packages else None

    if problem := _problem(version_of):
        yield error("TPU", problem, _REMEDY)
    else:
        yield ok("TPU", f"tensorflow-tpu {version_of('tensorflow-tpu')} with libtpu {version_of('libtpu')}")


def _problem(version_of: Callable[[str], str | None]) -> str | None:
    """Returns why the installed packages cannot use a TPU; None if they can."""
    if version_of("tensorflow-tpu") is None:
        return "tensorflow-tpu is not installed"
    if version_of("tensorflow") is not None:
        return "plain tensorflow is installed over tensorflow-tpu, and has replaced its files"
    if version_of("libtpu") not in LIBTPU_VERSIONS:
        return f"libtpu is {version_of('libtpu')}, and tensorflow-tpu loads only {', '.join(LIBTPU_VERSIONS)}"
    return None
