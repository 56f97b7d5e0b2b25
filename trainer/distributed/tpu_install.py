"""Checks that the installed packages can use a TPU. Call it before TensorFlow is imported: a wrong libtpu aborts the
process.
"""

from collections.abc import Callable
from importlib import metadata

from trainer.errors import UserError

# tensorflow-tpu 2.20 loads these; 0.0.32 and later end the process.
LIBTPU_VERSIONS = ("0.0.17", "0.0.24", "0.0.29")


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_tpu_install(version_of: Callable[[str], str | None] = installed_version) -> None:
    """Checks that tensorflow-tpu is installed, with a version of libtpu that it can load.

    Raises:
        UserError: it is not; the message names the command that installs it.
    """
    if version_of("tensorflow-tpu") is None:
        problem = "tensorflow-tpu is not installed"
    elif version_of("tensorflow") is not None:
        problem = "plain tensorflow is installed over tensorflow-tpu, and has replaced its files"
    elif version_of("libtpu") not in LIBTPU_VERSIONS:
        problem = f"libtpu is {version_of('libtpu')}, and tensorflow-tpu loads only {', '.join(LIBTPU_VERSIONS)}"
    else:
        return
    raise UserError(
        f"distribution.kind='tpu': {problem}. Run scripts/launch/install_tpu on the TPU VM, and use "
        ".venv-tpu/bin/trainer; or set distribution.kind='cpu'."
    )
