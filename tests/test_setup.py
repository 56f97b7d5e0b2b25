"""Laws of setup.cfg and requirements.lock: what is installed, in which versions, and with which files."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from trainer.version import __version__

REPOSITORY = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(REPOSITORY / "setup.cfg")
LOCKED = dict(
    line.split("==") for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if not line.startswith("#")
)


def test_lock_file_has_a_version_in_range_of_every_requirement() -> None:
    # The tests use neither xprof nor the trackers, so no version of these has passed; scripts/parity has an environment
    # of its own.
    others = ("profile", "wandb", "mlflow", "trackio", "parity")
    extras = [text for extra, text in SETUP["options.extras_require"].items() if extra not in others]
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


def build(source: Path, kind: str, out: Path) -> Path:
    """Builds a "wheel" or an "sdist" of a checkout, as pip does, with the setuptools of this environment."""
    program = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return out / done.stdout.splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    """Returns the files of a wheel, except those that have a time or hashes in them."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def shipped() -> set[str]:
    """The files of trainer/ in the checkout. trainer/configs is a link."""
    found = {path for folder in ("trainer", "trainer/configs") for path in (REPOSITORY / folder).rglob("*")}
    return {str(path.relative_to(REPOSITORY)) for path in found if path.is_file() and path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made of the source distribution. It is the same as one that was made of the checkout."""
    folder = tmp_path_factory.mktemp("built")
    source, direct, unpacked = (folder / name for name in ("source", "direct", "unpacked"))
    ignore = shutil.ignore_patterns("__pycache__", "*.ipynb")
    for name in ("trainer", "configs", "tests", "scripts", "docs"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, source)
    # Before the wheel, whose folder build/ is no part of a checkout.
    sdist = build(source, "sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (inner,) = unpacked.iterdir()
    direct.mkdir()
    of_checkout, of_sdist = build(source, "wheel", direct), build(inner, "wheel", folder)
    assert contents(of_checkout) == contents(of_sdist)
    return of_sdist


@pytest.mark.slow
def test_a_wheel_and_a_source_distribution_have_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    about = f"gpt_trainer-{__version__}.dist-info"
    names = contents(wheel).keys()
    assert {name for name in names if not name.startswith(about)} == shipped()
    assert {"trainer/configs/schema.json", "trainer/configs/quickstart.toml", "trainer/storybook/grammar.txt"} <= names
    assert {name.removeprefix(f"{about}/") for name in names if name.startswith(about)} == {
        *("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"),
    }
    assert contents(wheel)[f"{about}/licenses/LICENSE"] == (REPOSITORY / "LICENSE").read_bytes()
    assert contents(wheel)["trainer/configs/minigpt.toml"] == (REPOSITORY / "configs/minigpt.toml").read_bytes()


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "env")
    bin = tmp_path / "env/bin"
    run(bin / "python", "-m", "pip", "install", "--no-index", "--no-deps", "--disable-pip-version-check", wheel)
    # What trainer needs comes from this environment. The checkout is not on that path: .pth files count in site folders
    # only.
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "needed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    assert run(bin / "trainer", "--version") == f"trainer {__version__}\n"
    assert run(bin / "trainer", "plan", "quickstart").startswith("parameters ")
    program = "import trainer; print(trainer.__file__, len(trainer.load_config('quickstart').to_toml()) > 100)"
    assert run(bin / "python", "-c", program) == f"{site}/trainer/__init__.py True\n"
