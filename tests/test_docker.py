"""Laws of docker/: the images are built from locked versions and do not run as root, and compose.yaml goes with them.

There is no container engine here. The Dockerfile is read as Docker reads it, and the lines of its stages are run in a
plain folder with a plain virtual environment. Packages come from the environment of the tests, which has the versions
of requirements.lock; of NVIDIA's and the TPU's only the names and versions are there, so that pip resolves all that it
is asked for and downloads nothing.
"""

import configparser
import importlib.util
import json
import re
import shutil
import site
import subprocess
import venv
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
TPU_LIST = "scripts/launch/tpu_requirements.txt"
DEVICES = ("cpu", "gpu", "tpu")


class Line(NamedTuple):
    """An instruction of the Dockerfile and what follows it."""

    instruction: str
    text: str


def stages() -> dict[str, list[Line]]:
    """The lines of each stage, FROM first; '' has the lines before the first FROM."""
    found: dict[str, list[Line]] = {"": []}
    name = ""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE))
    for text in filter(None, joined.split("\n")):
        line = Line(*text.split(" ", 1))
        if line.instruction == "FROM":
            name = line.text.split()[-1]
            found[name] = []
        found[name].append(line)
    return found


STAGES = stages()
LINES = [line for stage in STAGES.values() for line in stage]


def stages_of(device: str) -> list[list[Line]]:
    """The stages that the image of a device is built from, the first one first."""
    name, path = "image", []
    while name in STAGES:
        path.append(STAGES[name])
        name = STAGES[name][0].text.split()[0].replace("${DEVICE}", device)
    return path[::-1]


def texts_of(instruction: str) -> list[str]:
    return [line.text for line in LINES if line.instruction == instruction]


def test_the_one_base_is_tagged_with_the_python_of_the_lock_files():
    external = [text.split()[0] for text in texts_of("FROM") if text.split()[0].split("${")[0] not in STAGES]
    external = [name for name in external if "${" not in name]
    oldest = re.search(r"python_requires = >=(3\.\d+),", (ROOT / "setup.cfg").read_text())
    assert oldest is not None and external == [f"python:{oldest[1]}-slim-bookworm"]
    assert all(f"packages-{device}" in STAGES for device in DEVICES)
    assert STAGES[""] == [Line("ARG", "DEVICE=cpu")]


def test_the_rules_of_hadolint_that_matter_here_are_kept():
    assert (
        not texts_of("ADD") and not texts_of("MAINTAINER") and "latest" not in DOCKERFILE and "sudo" not in DOCKERFILE
    )
    for command in texts_of("RUN"):
        for part in re.split(r"&&|;|\|", command):
            if "pip install" in part:
                assert "--no-cache-dir" in part
                # Every version is locked: by a list of constraints, by exact pins, or by an earlier line.
                assert "--constraint" in part or "--no-deps" in part
            if "apt-get install" in part:
                assert "--no-install-recommends" in part and "rm -rf /var/lib/apt/lists" in command
        assert not re.search(r"\bcd ", command)
    assert all(text.startswith("/") for text in texts_of("WORKDIR"))
    assert all(text.startswith("[") for kind in ("ENTRYPOINT", "CMD", "SHELL", "VOLUME") for text in texts_of(kind))
    last = [line.instruction for line in STAGES["image"]]
    assert "RUN" not in last[last.index("USER") :] and "COPY" not in last[last.index("USER") :]
    (user,) = texts_of("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert texts_of("STOPSIGNAL") == ["SIGTERM"]
    if hadolint := shutil.which("hadolint"):
        done = subprocess.run([hadolint, str(ROOT / "docker/Dockerfile")], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")


def test_a_change_of_the_code_or_a_page_leaves_the_layers_of_packages_as_they_are():
    copied = {
        name: [source for line in lines if line.instruction == "COPY" for source in line.text.split()[:-1]]
        for name, lines in STAGES.items()
    }
    lists = {"setup.cfg", "pyproject.toml", "requirements.lock", "docker/cuda.lock"}
    for name in ("packages", "packages-cpu", "packages-gpu", "packages-tpu"):
        assert set(copied[name]) <= lists | {TPU_LIST}
    assert set(copied["image"]) == {"README.md", "LICENSE", "configs", "trainer"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{source}" for sources in copied.values() for source in sources} == {
        line for line in ignored if line.startswith("!")
    }


def pins_of(name: str) -> dict[str, str]:
    lines = (line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def test_cuda_lock_has_every_package_of_nvidia_that_tensorflow_asks_for_in_its_range():
    asked = [Requirement(text) for text in metadata.requires("tensorflow") or []]
    asked = [each for each in asked if each.marker and each.marker.evaluate({"extra": "and-cuda"})]
    nvidia = {each.name: each.specifier for each in asked if each.name.startswith("nvidia-")}
    pins = pins_of("docker/cuda.lock")
    assert pins.keys() == nvidia.keys()
    assert all(nvidia[name].contains(pins[name]) for name in pins)


def test_the_list_for_tpus_has_everything_that_setup_cfg_requires():
    pins = {name.replace("_", "-").lower(): version for name, version in pins_of(TPU_LIST).items()}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for required in map(Requirement, setup["options"]["install_requires"].split()):
        name = {"tensorflow": "tensorflow-tpu"}.get(required.name, required.name)
        assert required.specifier.contains(pins[name]), required


def test_services_of_compose_run_as_the_image_s_user_with_a_read_only_root():
    for name, service in SERVICES.items():
        assert (service["read_only"], service["init"], service["tmpfs"]) == (True, True, ["/tmp"])
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert "user" not in service and "privileged" not in service
        tag = service["image"].removeprefix("gpt-trainer:")
        device = "cpu" if name == "tensorboard" else tag
        assert service["build"] == {"context": "..", "dockerfile": "docker/Dockerfile", "args": {"DEVICE": device}}
    # Compose builds them at the same time.
    assert len({service["image"] for service in SERVICES.values()}) == len(SERVICES)
    volumes = {name: service["volumes"] for name, service in SERVICES.items()}
    assert volumes["trainer"] == volumes["trainer-gpu"] == ["runs:/app/runs", "prepared:/app/prepared"]
    assert volumes["tensorboard"] == ["runs:/app/runs:ro"]
    (written,) = texts_of("VOLUME")
    assert json.loads(written) == ["/app/runs", "/app/prepared"]
    assert COMPOSE["volumes"].keys() == {"runs", "prepared"}


def test_compose_gives_a_run_time_to_save_the_gpu_a_profile_and_tensorboard_this_machine_only():
    for name in ("trainer", "trainer-gpu"):
        assert SERVICES[name]["stop_grace_period"] == "5m"
        assert SERVICES[name]["command"] == json.loads(texts_of("CMD")[0])
    assert SERVICES["trainer-gpu"]["profiles"] == ["gpu"]
    (gpus,) = SERVICES["trainer-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpus == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert SERVICES["tensorboard"]["ports"] == ["127.0.0.1:6006:6006"]
    assert SERVICES["tensorboard"]["entrypoint"] == ["tensorboard", "--logdir", "/app/runs", "--bind_all"]


# --- the lines of the stages, run in a plain folder ---


# uv makes environments without pip.
HAS_PIP = importlib.util.find_spec("pip") is not None


def stand_ins(folder: Path, pins: dict[str, str]) -> Path:
    """Makes a folder of names and versions of packages, which pip takes for installed."""
    for name, version in pins.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


class Image:
    """A folder in the place of an image's root, and an environment in the place of its Python.

    Attributes:
        root: the folder.
        packages: what is installed besides pip: folders of packages.
    """

    def __init__(self, root: Path, packages: list[Path]) -> None:
        self.root = self.workdir = root
        # A pip of its own takes seconds to make, and brings an old setuptools along.
        venv.create(root / "usr", with_pip=not HAS_PIP)
        (self.library,) = (root / "usr/lib").glob("python3*/site-packages")
        for old in self.library.glob("setuptools*"):
            shutil.rmtree(old)
        (self.library / "packages.pth").write_text("".join(f"{folder}\n" for folder in packages))
        programs = dict.fromkeys(("useradd", "chown"), f'echo "${{0##*/}}" "$@" >>{root}/by_root')
        if HAS_PIP:
            programs["pip"] = f'exec {root}/usr/bin/python -m pip "$@"'
        for name, text in programs.items():
            program = root / "usr/bin" / name
            program.write_text(f"#!/bin/sh\n{text}\n")
            program.chmod(0o755)
        # pip's own isolation would download setuptools.
        self.env = {"PATH": f"{root}/usr/bin:/usr/bin:/bin", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}

    def place(self, path: str) -> Path:
        return self.root / path.lstrip("/") if path.startswith("/") else self.workdir / path

    def run_line(self, line: Line) -> None:
        match line.instruction:
            case "WORKDIR":
                self.workdir = self.place(line.text)
                self.workdir.mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = line.text.split()
                for source in sources:
                    self.copy(ROOT / source, self.place(target))
            case "ENV":
                self.env |= dict(pair.split("=") for pair in line.text.split())
            case "RUN":
                self.run("bash", "-e", "-o", "pipefail", "-c", line.text)

    def copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, symlinks=True, ignore=ignore, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.workdir, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of this environment, without trainer."""
    folder = tmp_path_factory.mktemp("installed")
    for path in Path(site.getsitepackages()[0]).iterdir():
        if "trainer" not in path.name and not path.name.startswith("__editable__"):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.slow
def test_every_line_of_the_cpu_s_image_works_in_a_plain_environment(tmp_path: Path, installed: Path):
    image = Image(tmp_path, [installed])
    for line in (line for stage in stages_of("cpu") for line in stage):
        image.run_line(line)
    assert (tmp_path / "by_root").read_text().splitlines() == [
        "useradd --uid 1000 --no-create-home trainer",
        "chown trainer:trainer runs prepared",
    ]
    assert image.workdir == tmp_path / "app"
    # It is the package that was installed, with its configs, and not the checkout.
    found = image.run("python", "-c", "import trainer; print(trainer.__file__)").strip()
    assert Path(found).is_relative_to(image.library)
    assert "parameters" in image.run("trainer", "plan", "quickstart")


@pytest.mark.slow
def test_the_lines_of_packages_for_gpus_and_tpus_find_every_version_in_their_locks(tmp_path: Path, installed: Path):
    nvidia = stand_ins(tmp_path / "nvidia", pins_of("docker/cuda.lock"))
    tpu = stand_ins(tmp_path / "tpu", pins_of(TPU_LIST))
    image = Image(tmp_path / "image", [installed, nvidia])
    for device in ("gpu", "tpu"):
        if device == "tpu":
            # The other packages are left out: pip would take their versions for installed.
            if HAS_PIP:
                shutil.copytree(installed / "pip", tpu / "pip")
            (image.library / "packages.pth").write_text(f"{tpu}\n")
        packages = stages_of(device)[:-1]
        assert packages[-1] == STAGES[f"packages-{device}"]
        for line in (line for stage in packages[device == "tpu" :] for line in stage):
            if line.text.startswith("mkdir trainer") and device == "tpu":
                continue  # It is there, because both devices have one folder here.
            image.run_line(line)
