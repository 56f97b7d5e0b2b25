"""Laws of setup.cfg and requirements.lock: what is installed, in which versions, and with which files."""

import configparser
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(REPOSITORY / "setup.cfg")
LOCKED = dict(
    line.split("==") for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if not line.startswith("#")
)


def test_lock_file_has_a_version_in_range_of_every_requirement() -> None:
    # The tests do not use xprof, so no version of it has passed them; scripts/parity has an environment of its own.
    extras = [text for extra, text in SETUP["options.extras_require"].items() if extra not in ("profile", "parity")]
    lines = "\n".join([SETUP["options"]["install_requires"], *extras]).split()
    requirements = [Requirement(line) for line in lines]
    assert {"tensorflow", "apache-beam", "pytest"} <= {each.name for each in requirements}
    for each in requirements:
        if each.name != "gpt-trainer":
            assert each.specifier.contains(LOCKED[canonicalize_name(each.name)]), each


def test_lock_file_names_versions_only() -> None:
    for name, version in LOCKED.items():
        assert name == canonicalize_name(name) and not Version(version).local


@pytest.mark.skipif(not (REPOSITORY / ".venv").is_dir() or sys.prefix != str(REPOSITORY / ".venv"), reason="not .venv")
def test_tests_run_with_the_versions_of_the_lock_file() -> None:
    installed = {name: metadata.version(name) for name in LOCKED}
    assert installed == LOCKED, "run scripts/test, which installs them"


def test_files_of_the_package_that_are_not_python_are_installed_too() -> None:
    patterns = [
        str(Path(package.replace(".", "/"), pattern))
        for package, lines in SETUP["options.package_data"].items()
        for pattern in lines.split()
    ]
    # trainer/configs is a link.
    found = [path for folder in ("trainer", "trainer/configs") for path in (REPOSITORY / folder).rglob("*")]
    others = [path.relative_to(REPOSITORY) for path in found if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert Path("trainer/configs/quickstart.toml") in others
    for path in others:
        assert any(path.match(pattern) for pattern in patterns), f"{path} is not in package_data of setup.cfg"
