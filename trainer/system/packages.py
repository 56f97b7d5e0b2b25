"""The installed packages, and whether they are the versions that trainer and its packages require."""

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from trainer.system.findings import Finding, error, ok

TRAINER = "gpt-trainer"
# Builds of TensorFlow under other names, which install the same folder. A package that requires one works with each.
TENSORFLOWS = ("tensorflow", "tensorflow-tpu", "tensorflow-cpu", "tf-nightly", "tf-nightly-cpu", "tf-nightly-tpu")


class Package(NamedTuple):
    """An installed package.

    Attributes:
        version: its version.
        requires: its requirements, as in its metadata.
        python: the Pythons that it runs on, such as ">=3.11,<3.14"; "": any.
    """

    version: str
    requires: tuple[str, ...] = ()
    python: str = ""


# By the canonical name: small letters and hyphens.
Packages = Mapping[str, Package]


def installed_packages(names: Iterable[str] | None = None, folder: Path | None = None) -> dict[str, Package]:
    """Returns the installed packages.

    Args:
        names: the packages to look for, which takes a millisecond each; None: all.
        folder: the folder that they are in; None: wherever Python looks.
    """
    path = sys.path if folder is None else [str(folder)]
    found: dict[str, Package] = {}
    for name in (None,) if names is None else names:
        for each in importlib.metadata.distributions(name=name, path=path):
            facts = each.metadata  # It is parsed anew whenever it is asked for.
            if own := facts["Name"]:
                requires = tuple(facts.get_all("Requires-Dist") or ())
                # Not [...]: the backport importlib_metadata, which MLflow installs, raises KeyError if it is missing.
                python = (facts.get_all("Requires-Python") or ("",))[0]
                # The first one in the order of sys.path is the one that is imported.
                found.setdefault(canonicalize_name(own), Package(facts["Version"], requires, python))
    return found


def required_by_trainer() -> dict[str, Package]:
    """Returns trainer and those of its requirements that are installed, without the requirements of these."""
    own = installed_packages([TRAINER])
    names = [Requirement(text).name for package in own.values() for text in package.requires]
    return own | installed_packages([*names, *TENSORFLOWS])


def check_python(packages: Packages, python: str = platform.python_version()) -> Iterator[Finding]:
    """Checks that this Python is one of those that trainer runs on."""
    allowed = packages[TRAINER].python if TRAINER in packages else ""
    if python in SpecifierSet(allowed):
        yield ok("Python", f"{python}, {sys.executable}")
        return
    yield error(
        "Python",
        f"This is Python {python}, and only {allowed} is supported",
        "In a checkout remove .venv and run: TRAINER_PYTHON=/path/to/python scripts/quickstart",
    )


def check_packages(packages: Packages, deep: bool = True) -> Iterator[Finding]:
    """Checks that the requirements of trainer are installed, and of what it requires.

    Args:
        packages: the installed packages.
        deep: whether to check the requirements of its requirements, and so on, too.
    """
    if TRAINER not in packages:
        yield ok("packages", "trainer is not installed as a package, so its requirements are not known")
        return
    wanted = _wanted(packages, deep)
    faults = [(name, by) for name, by in wanted.items() if not _is_met(packages.get(name), by)]
    if not faults:
        yield ok("packages", f"trainer {packages[TRAINER].version} and {len(wanted)} that it requires fit together")
    for name, by in faults:
        installed = f"{name} {packages[name].version} is installed" if name in packages else f"{name} is not installed"
        needs = ", ".join(f"{each} needs {name}{text}" for each, text in sorted(by.items()))
        all_of = ",".join(sorted({part for text in by.values() for part in text.split(",") if part}))
        yield error("packages", f"{installed}, but {needs}", f"Run: {pip_install(name + all_of)}")


def _wanted(packages: Packages, deep: bool) -> dict[str, dict[str, str]]:
    """Returns the versions that are wanted of each package, by who wants them."""
    wanted: dict[str, dict[str, str]] = {}
    to_visit = [TRAINER]
    visited = set(to_visit)
    while to_visit:
        by = to_visit.pop()
        for text in packages[by].requires:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            name = str(canonicalize_name(requirement.name))
            if name == "tensorflow":
                name = next((each for each in TENSORFLOWS if each in packages), name)
            wanted.setdefault(name, {})[by] = str(requirement.specifier)
            if deep and name in packages and name not in visited:
                visited.add(name)
                to_visit.append(name)
    return wanted


def _is_met(package: Package | None, by: Mapping[str, str]) -> bool:
    if package is None:
        return False
    return all(SpecifierSet(text).contains(package.version, prereleases=True) for text in by.values())


def check_tensorflow(packages: Packages) -> Iterator[Finding]:
    """Checks that exactly one package owns the folder that TensorFlow is imported from. What is wrong beside
    tensorflow-tpu is said by `trainer.distributed.tpu_install`.
    """
    owners = [name for name in TENSORFLOWS if name in packages]
    if len(owners) > 1 and "tensorflow-tpu" not in owners:
        names = " and ".join(f"{name} {packages[name].version}" for name in owners)
        keep = f"{owners[0]}=={packages[owners[0]].version}"
        yield error(
            "TensorFlow",
            f"{names} are installed into the same folder, and have replaced each other's files",
            f"Run: {_pip('uninstall')} {' '.join(owners)}; {pip_install(keep)}",
        )


def pip_install(*requirements: str, options: str = "") -> str:
    """Returns the command that installs packages into this environment."""
    return " ".join([_pip("install"), *([options] if options else []), *(f"'{each}'" for each in requirements)])


def _pip(verb: str) -> str:
    # An environment made by uv has no pip.
    if importlib.util.find_spec("pip") is None:
        return f"uv pip {verb} --python {sys.executable}"
    return f"{sys.executable} -m pip {verb}" + (" -y" if verb == "uninstall" else "")
