import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BASH = shutil.which("bash") or "bash"
FIRST_MINOR, PAST_MINOR = (
    int(minor)
    for minor in re.findall(r"python_requires = >=3\.(\d+),<3\.(\d+)", (REPOSITORY / "setup.cfg").read_text())[0]
)

# A fake uv: it makes a real but empty environment, and installs nothing. If there is a file uv_fails, an install prints
# that file and fails.
FAKE_UV = f"""#!{BASH}
case $1 in
    --version) exit ;;
    python) exit 1 ;;
esac
echo "$@" >>"$CHECKOUT/uv.log"
if [[ $1 == venv ]]; then exec {sys.executable} -m venv --without-pip "$4"; fi
if [[ -e $CHECKOUT/uv_fails ]]; then cat "$CHECKOUT/uv_fails"; exit 1; fi
"""


class Checkout:
    """A copy of the scripts in a new folder, and a PATH that holds a few tools and no Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        for name in ("scripts/launch", ".ci", "configs", "trainer", "tests"):
            (self.root / name).mkdir(parents=True)
        for name in (
            "scripts/environment.sh",
            "scripts/quickstart",
            "scripts/test",
            "scripts/launch/slurm",
            "scripts/launch/tpu_host.sh",
            ".ci/run",
            "setup.cfg",
            "pyproject.toml",
            "requirements.lock",
        ):
            shutil.copy(REPOSITORY / name, self.root / name)
        self.bin.mkdir()
        for tool in ("bash", "env", "cat", "cksum", "df", "dirname", "grep", "rm", "rmdir", "sed", "tail", "uname"):
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def add_python(self, name: str, version: str, venv: bool = True) -> None:
        """Puts a fake Python on PATH that prints its version, and has the venv module or not."""
        self.program(
            self.bin / name,
            f"#!{BASH}\ncase $2 in\n*version_info*) echo {version} ;;\n*ensurepip*) exit {0 if venv else 1} ;;\nesac\n",
        )

    def add_uv(self) -> None:
        self.program(self.bin / "uv", FAKE_UV)

    def uv_calls(self, command: str) -> list[str]:
        log = self.root / "uv.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.startswith(command)]

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": str(self.bin), "HOME": str(self.root.parent), "CHECKOUT": str(self.root)}
        return subprocess.run(
            command,
            cwd=self.root,
            env=variables | dict(env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    def make_environment(self, extra: str = "core", **env: str) -> subprocess.CompletedProcess[str]:
        script = f"set -euo pipefail; source scripts/environment.sh; make_environment {extra}"
        return self.run(BASH, "-c", script, env=env)

    def stub_environment(self) -> None:
        """Takes installing out of the scripts, to see what they do after it."""
        stub = f"root={self.root}\nmake_environment() {{ echo install $1; }}\nupdate_lock() {{ echo update $1; }}\n"
        (self.root / "scripts/environment.sh").write_text(stub + "fail() { echo $1; exit 1; }\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("2.7.18", "too old"),
        (f"3.{FIRST_MINOR - 1}.20", "too old"),
        (f"3.{PAST_MINOR}.0", "too new"),
        ("4.0.0", "too new"),
    ],
)
def test_python_out_of_range_is_refused_with_its_path_and_version(
    checkout: Checkout, version: str, problem: str
) -> None:
    checkout.add_python("python3", version)
    result = checkout.make_environment()
    assert result.returncode == 1
    assert f"trainer needs Python 3.{FIRST_MINOR} to 3.{PAST_MINOR - 1}, and found none." in result.stdout
    assert f"{checkout.bin}/python3 is Python {version}, {problem}" in result.stdout
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("version", [f"3.{FIRST_MINOR}.0", f"3.{PAST_MINOR - 1}.9"])
def test_python_at_either_end_of_the_range_is_taken(checkout: Checkout, version: str) -> None:
    checkout.add_uv()
    checkout.add_python("python3", version)
    assert checkout.make_environment().returncode == 0
    assert checkout.uv_calls("venv") == [f"venv --python {checkout.bin}/python3 {checkout.root}/.venv"]


def test_an_extra_can_have_an_environment_of_its_own(checkout: Checkout) -> None:
    checkout.add_uv()
    checkout.add_python("python3", f"3.{FIRST_MINOR}.4")
    made = checkout.make_environment("parity .venv-parity")
    assert made.returncode == 0
    assert "Installing gpt-trainer (parity) into .venv-parity;" in made.stdout
    assert checkout.uv_calls("venv") == [f"venv --python {checkout.bin}/python3 {checkout.root}/.venv-parity"]
    assert "--editable .[parity]" in checkout.uv_calls("pip")[0]
    assert not (checkout.root / ".venv").exists()


def test_pythons_runs_the_fast_tests_with_each_python_and_names_those_that_fail(checkout: Checkout) -> None:
    shutil.copy(REPOSITORY / "scripts/pythons", checkout.root / "scripts/pythons")
    with (checkout.root / "scripts/environment.sh").open("a") as file:
        file.write('make_environment() { echo "$1 with $TRAINER_PYTHON"; venv=$root/$2; }\n')
    first, second, last = (f"3.{minor}" for minor in range(FIRST_MINOR, PAST_MINOR))
    checkout.add_python(f"python{first}", f"{first}.4")
    checkout.add_python(f"python{second}", f"{second}.0")
    checkout.add_python(f"python{last}", f"{first}.4")  # A shim that leads to another one.
    for version in (first, second):
        pytest = f"#!{BASH}\necho {version}: $@\n[[ {version} == {first} ]]\n"
        checkout.program(checkout.root / f".venv-{version}/bin/pytest", pytest)
    ran = checkout.run("scripts/pythons", "-k", "two words")
    options = "--numprocesses logical --maxprocesses 4 --dist loadfile -m not slow -k two words"
    assert ran.returncode == 1
    assert ran.stdout.splitlines() == [
        *(f"== Python {first}", f"test with {checkout.bin}/python{first}", f"{first}: {options}"),
        *(f"== Python {second}", f"test with {checkout.bin}/python{second}", f"{second}: {options}"),
        *(f"== Python {last}", f"Python {last} was not found; install it, as with: uv python install {last}"),
        f"Failed with Python: {second} {last}",
    ]
    assert checkout.run("scripts/pythons", first).returncode == 0


def test_a_missing_python_is_reported(checkout: Checkout) -> None:
    result = checkout.make_environment()
    assert result.returncode == 1
    assert "there is no python3 or python on PATH" in result.stdout


def test_a_python_that_does_not_run_is_skipped(checkout: Checkout) -> None:
    checkout.add_uv()
    shim = f"#!{BASH}\necho command not found >&2\nexit 127\n"
    checkout.program(checkout.bin / "python3", shim)
    checkout.program(checkout.bin / f"python3.{PAST_MINOR - 1}", shim)
    assert f"{checkout.bin}/python3 does not run" in checkout.make_environment().stdout
    checkout.add_python(f"python3.{FIRST_MINOR}", f"3.{FIRST_MINOR}.4")
    assert checkout.make_environment().returncode == 0
    assert f"{checkout.bin}/python3.{FIRST_MINOR} " in checkout.uv_calls("venv")[0]


def test_trainer_python_is_never_replaced_by_another(checkout: Checkout) -> None:
    checkout.add_uv()
    checkout.add_python("python3", f"3.{FIRST_MINOR}.4")
    checkout.add_python("mine", f"3.{PAST_MINOR}.0")
    result = checkout.make_environment(TRAINER_PYTHON="mine")
    assert result.returncode == 1
    assert "TRAINER_PYTHON=mine is not usable" in result.stdout
    assert f"3.{PAST_MINOR}.0, too new" in result.stdout
    assert "there is no such program" in checkout.make_environment(TRAINER_PYTHON="/nowhere/python").stdout


def test_missing_venv_module_is_named_with_the_package_to_install(checkout: Checkout) -> None:
    checkout.add_python("python3", f"3.{FIRST_MINOR}.4", venv=False)
    result = checkout.make_environment()
    assert result.returncode == 1
    assert "its venv module (ensurepip) is missing" in result.stdout
    assert f"apt install python3.{FIRST_MINOR}-venv" in result.stdout
    assert not (checkout.root / ".venv").exists()


@pytest.mark.slow
def test_an_index_that_pip_cannot_reach_is_reported(checkout: Checkout) -> None:
    if subprocess.run([sys.executable, "-c", "import ensurepip"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this Python has no ensurepip")
    unreachable = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # the discard port: nobody listens
        "PIP_RETRIES": "0",
    }
    result = checkout.make_environment(TRAINER_PYTHON=sys.executable, **unreachable)
    assert result.returncode == 1
    assert "The package index cannot be reached." in result.stdout


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full."),
        ("failed to copy file: No space left on device (os error 28)", "The disk is full."),
        ("  cause: dns error: failed to lookup address information", "The package index cannot be reached."),
        (
            "ERROR: Could not find a version that satisfies the requirement setuptools>=77 (from versions: none)",
            "The package index cannot be reached.",
        ),
        (
            "WARNING: NewConnectionError\nERROR: No matching distribution found for x",
            "The package index cannot be reached.",
        ),
        ("ERROR: No matching distribution found for tensorflow", "The package index has no build"),
        ("something else", "Installing failed"),
    ],
)
def test_failed_install_ends_with_its_cause_and_is_tried_again(checkout: Checkout, output: str, advice: str) -> None:
    checkout.add_uv()
    checkout.add_python("python3", f"3.{FIRST_MINOR}.4")
    (checkout.root / "uv_fails").write_text(output)
    failed = checkout.make_environment()
    assert failed.returncode == 1
    assert output in failed.stdout
    assert advice in failed.stdout
    (checkout.root / "uv_fails").unlink()
    assert checkout.make_environment().returncode == 0
    assert len(checkout.uv_calls("venv")) == 1
    assert len(checkout.uv_calls("pip install")) == 2


def test_second_run_does_nothing_until_the_setup_changes(checkout: Checkout) -> None:
    checkout.add_uv()
    checkout.add_python("python3", f"3.{FIRST_MINOR}.4")
    assert checkout.make_environment().returncode == 0
    second = checkout.make_environment()
    assert (second.returncode, second.stdout) == (0, "")
    assert len(checkout.uv_calls("pip install")) == 1
    for number, name in enumerate(("setup.cfg", "pyproject.toml", "requirements.lock"), 2):
        with (checkout.root / name).open("a") as file:
            file.write("# changed\n")
        assert checkout.make_environment().returncode == 0
        assert len(checkout.uv_calls("pip install")) == number


def test_extra_is_installed_into_an_environment_that_lacks_it_and_brings_the_core(checkout: Checkout) -> None:
    checkout.add_uv()
    checkout.add_python("python3", f"3.{FIRST_MINOR}.4")
    for extra in ("core", "test", "test", "core"):
        assert checkout.make_environment(extra).returncode == 0
    assert [call.split()[-1] for call in checkout.uv_calls("pip install")] == [".", ".[test]"]


def test_versions_of_the_lock_file_are_installed_until_it_is_updated(checkout: Checkout) -> None:
    checkout.add_uv()
    checkout.add_python("python3", f"3.{PAST_MINOR - 1}.4")
    checkout.add_python(f"python3.{FIRST_MINOR}", f"3.{FIRST_MINOR}.4")
    lock = checkout.root / "requirements.lock"
    before = lock.read_text().splitlines()
    assert checkout.make_environment("test").returncode == 0
    assert f"--constraint {lock}" in checkout.uv_calls("pip install")[0]

    update = "set -euo pipefail; source scripts/environment.sh; update_lock test"
    updated = checkout.run(BASH, "-c", update)
    assert updated.returncode == 0
    assert f"Making .venv again: it has the versions of {lock}." in updated.stdout
    assert "--constraint" not in checkout.uv_calls("pip install")[1]
    # update_lock takes the oldest Python of the range. The environment of this test has no packages.
    assert f"{checkout.bin}/python3.{FIRST_MINOR} " in checkout.uv_calls("venv")[1]
    assert lock.read_text().splitlines() == [line for line in before if line.startswith("#")] != before
    assert checkout.make_environment("test").stdout == ""


def test_environment_of_a_moved_checkout_is_made_again(checkout: Checkout) -> None:
    checkout.add_uv()
    checkout.add_python("python3", f"3.{FIRST_MINOR}.4")
    assert checkout.make_environment().returncode == 0
    before = checkout.root
    checkout.root = before.rename(before.with_name("moved"))
    result = checkout.make_environment()
    assert result.returncode == 0
    assert f"Making .venv again: it was made as {before}/.venv." in result.stdout
    assert checkout.make_environment().stdout == ""


def test_environment_whose_python_is_gone_is_made_again(checkout: Checkout) -> None:
    checkout.add_uv()
    checkout.add_python("python3", f"3.{FIRST_MINOR}.4")
    assert checkout.make_environment().returncode == 0
    (checkout.root / ".venv/bin/python").unlink()
    assert "Making .venv again: its Python does not run." in checkout.make_environment().stdout
    assert checkout.make_environment().stdout == ""


def test_a_folder_that_is_not_an_environment_is_kept(checkout: Checkout) -> None:
    checkout.add_uv()
    checkout.add_python("python3", f"3.{FIRST_MINOR}.4")
    precious = checkout.root / ".venv/precious"
    precious.parent.mkdir()
    precious.write_text("mine")
    result = checkout.make_environment()
    assert result.returncode == 1
    assert "it is not a virtual environment" in result.stdout
    assert precious.read_text() == "mine"


def test_the_environment_script_refuses_to_run_directly(checkout: Checkout) -> None:
    result = checkout.run(BASH, "scripts/environment.sh")
    assert result.returncode == 2
    assert "run scripts/quickstart or scripts/test" in result.stdout


def test_quickstart_trains_then_resumes_and_passes_the_exit_status_on(checkout: Checkout) -> None:
    checkout.stub_environment()
    checkout.program(
        checkout.root / ".venv/bin/trainer",
        f"#!{BASH}\necho trainer $@\nif [[ $1 == train && -n $STATUS ]]; then exit $STATUS; fi\n",
    )
    run = checkout.root / "runs/quickstart"
    fresh = checkout.run("scripts/quickstart", "train.total_steps=7", env={"STATUS": ""})
    assert fresh.returncode == 0
    assert "install core\ntrainer train configs/quickstart.toml train.total_steps=7\n" in fresh.stdout
    assert re.search(r"Set-up \d+ s, run \d+ s\.", fresh.stdout)
    assert all(command in fresh.stdout for command in (".venv/bin/tensorboard", "trainer generate", "data.train="))

    run.mkdir(parents=True)
    (run / "config.toml").touch()
    stopped = checkout.run("scripts/quickstart", env={"STATUS": "75"})
    assert stopped.returncode == 75
    assert "trainer train --resume runs/quickstart\n" in stopped.stdout
    assert "Next:" not in stopped.stdout

    # A finished or unfinished run keeps its settings: overrides would be ignored silently.
    refused = checkout.run("scripts/quickstart", "train.total_steps=7", env={"STATUS": ""})
    assert refused.returncode == 1
    assert "runs/quickstart exists, with its own settings" in refused.stdout
    other = checkout.run("scripts/quickstart", "train.total_steps=7", "run_folder=runs/other", env={"STATUS": ""})
    assert "trainer train configs/quickstart.toml train.total_steps=7 run_folder=runs/other\n" in other.stdout
    assert "--logdir runs\n" in other.stdout


@pytest.mark.parametrize(("status", "is_queued_again"), [(0, False), (2, False), (75, True)])
def test_slurm_job_goes_on_with_its_run_and_queues_itself_again_if_it_was_stopped(
    checkout: Checkout, status: int, is_queued_again: bool
) -> None:
    fake = f'#!{BASH}\necho ${{0##*/}} "$@" cpus:$SRUN_CPUS_PER_TASK\n'
    checkout.program(checkout.bin / "srun", fake + f'while [[ $1 == -* ]]; do shift; done; "$@"; exit {status}\n')
    checkout.program(checkout.bin / "scontrol", fake)
    checkout.program(
        checkout.root / ".venv/bin/trainer", f'#!{BASH}\nprintf "<%s>" "$@" secret:${{#TRAINER_MEETING_SECRET}}; echo\n'
    )
    # SLURM runs a copy of the script, in the folder it was submitted from.
    spooled = checkout.root.parent / "slurm_script"
    shutil.copy(checkout.root / "scripts/launch/slurm", spooled)
    job = {"SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "16"}
    done = checkout.run(BASH, str(spooled), "configs/x.toml", "data.train=a b", env=job)
    assert done.returncode == status
    started, trained, *queued = done.stdout.splitlines()
    assert started.startswith("srun ") and started.endswith(
        "trainer train --or-resume configs/x.toml data.train=a b cpus:16"
    )
    # A worker that is done must not end the first one, which may still be saving.
    assert "--kill-on-bad-exit=0" in started
    assert trained == "<train><--or-resume><configs/x.toml><data.train=a b><secret:36>"
    assert queued == (["scontrol requeue 12 cpus:16"] if is_queued_again else [])


def test_slurm_script_requests_a_signal_that_stops_a_run_and_prints_how_to_submit_it(checkout: Checkout) -> None:
    asked = re.findall(r"(?m)^#SBATCH --(.*)$", (REPOSITORY / "scripts/launch/slurm").read_text())
    assert {"ntasks-per-node=1", "requeue", "signal=INT@300"} <= set(asked)
    usage = checkout.run("scripts/launch/slurm", "--help")
    assert usage.returncode == 0
    assert "sbatch -N 2 scripts/launch/slurm configs/quickstart.toml" in usage.stdout and "SBATCH" not in usage.stdout
    dry = checkout.run("scripts/launch/slurm", "--dry-run", "configs/x.toml", "data.train=a b")
    submitted, trained, queued_again = dry.stdout.splitlines()
    assert dry.returncode == 0
    assert submitted.startswith("sbatch -N NODES --") and set(asked) <= set(submitted.replace(" --", " ").split())
    assert submitted.endswith(r" scripts/launch/slurm configs/x.toml data.train=a\ b")
    assert trained.startswith("srun ") and r" trainer train --or-resume configs/x.toml data.train=a\ b" in trained
    assert queued_again.startswith("scontrol requeue")
    refused = checkout.run("scripts/launch/slurm", "configs/x.toml", "--time=1", env={"SLURM_JOB_ID": "12"})
    assert refused.returncode == 2
    assert "slurm: --time=1: no such option; there are -h and --dry-run." in refused.stdout
    alone = checkout.run("scripts/launch/slurm", "configs/x.toml")
    assert alone.returncode == 2
    assert "this is not a SLURM job; submit it: sbatch -N 2 scripts/launch/slurm configs/x.toml" in alone.stdout


def test_test_script_checks_the_programs_then_runs_the_tests(checkout: Checkout) -> None:
    checkout.stub_environment()
    for tool in ("ruff", "mypy", "pytest"):
        program = f"#!{BASH}\necho {tool} $@\nif [[ {tool} == $FAILING ]]; then exit 3; fi\n"
        checkout.program(checkout.root / ".venv/bin" / tool, program)
    checkout.program(checkout.bin / "shellcheck", f"#!{BASH}\necho shellcheck $@\n")
    result = checkout.run("scripts/test", "--fast", "-k", "two words", env={"FAILING": ""})
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        "install test",
        "== format",
        "ruff format --check trainer tests scripts",
        "== lint",
        "ruff check trainer tests scripts",
        "== types",
        "mypy",
        "== shellcheck",
        "shellcheck --external-sources scripts/environment.sh scripts/launch/tpu_host.sh .ci/run scripts/quickstart "
        "scripts/test scripts/launch/slurm",
        "== tests",
        "pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "
        "-m not slow -k two words",
    ]
    updated = checkout.run("scripts/test", "--update-lock", "-x", env={"FAILING": ""})
    assert updated.stdout.startswith("update test\n") and updated.stdout.endswith("--no-loadscope-reorder -x\n")
    (checkout.bin / "shellcheck").unlink()
    assert "== shellcheck: skipped, it is not installed" in checkout.run("scripts/test", env={"FAILING": ""}).stdout
    failed = checkout.run("scripts/test", env={"FAILING": "mypy"})
    assert failed.returncode == 3
    assert "== tests" not in failed.stdout


PROGRAMS = sorted(
    str(path.relative_to(REPOSITORY))
    for path in [*(REPOSITORY / "scripts").rglob("*"), *(REPOSITORY / "tests").rglob("*")]
    if path.is_file() and os.access(path, os.X_OK)
)


def first_line(program: str) -> str:
    return (REPOSITORY / program).read_text(encoding="utf-8").split("\n")[0]


def imports_of(program: str) -> set[str]:
    """The packages that a Python program needs."""
    nodes = list(ast.walk(ast.parse((REPOSITORY / program).read_text(encoding="utf-8"))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    plain += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in plain} - sys.stdlib_module_names


def is_python(program: str) -> bool:
    return "python" in first_line(program)


def test_programs_in_python_end_in_py_and_programs_in_bash_have_no_suffix() -> None:
    assert PROGRAMS
    for program in PROGRAMS:
        assert Path(program).suffix == (".py" if is_python(program) else ""), program
        assert is_python(program) or "bash" in first_line(program), program


# These two run in an environment that the benchmarks make for them. all.py starts the other benchmarks, and notebook.py
# runs programs that import trainer.
OF_VENV_TORCH = ("scripts/benchmarks/torch_gpt.py", "scripts/benchmarks/transformers_gpt2.py")
OF_VENV = [name for name in PROGRAMS if is_python(name) and imports_of(name) and name not in OF_VENV_TORCH] + [
    "scripts/benchmarks/all.py",
    "scripts/notebook.py",
]


@pytest.fixture
def programs(checkout: Checkout) -> Checkout:
    for name in PROGRAMS:
        (checkout.root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, checkout.root / name)
    for tool, found in (("sh", shutil.which("sh")), ("python3", sys.executable), ("python", sys.executable)):
        (checkout.bin / tool).symlink_to(str(found))
    return checkout


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name not in OF_VENV])
def test_a_program_explains_itself_and_refuses_what_it_does_not_know_before_it_does_anything(
    programs: Checkout, program: str
) -> None:
    before = sorted(programs.root.rglob("*"))
    for option in ("-h", "--help"):
        asked = programs.run(program, option)
        assert asked.returncode == 0
        assert f"{program} " in asked.stdout or f"usage: {Path(program).name} " in asked.stdout
        assert "--dry-run" in asked.stdout or not program.startswith("scripts/launch/")
    # pytest, or the program after it, judges what follows these.
    if program not in ("scripts/test", "scripts/parity", "scripts/pythons", "scripts/venv_python"):
        wrong = programs.run(program, "--nonsense")
        assert wrong.returncode in (1, 2)
        assert "--nonsense" in wrong.stdout or f"{program} " in wrong.stdout or "required: " in wrong.stdout
        assert "Traceback" not in wrong.stdout
    assert sorted(programs.root.rglob("*")) == before


@pytest.mark.parametrize("program", OF_VENV)
def test_a_program_that_needs_what_is_installed_finds_the_environment_by_itself(
    programs: Checkout, program: str
) -> None:
    missing = programs.run(program, "--help")
    assert missing.returncode == 2
    name = Path(program).name
    assert f"{name}: {programs.root}/.venv does not exist yet; make it with scripts/quickstart" in missing.stdout
    programs.program(programs.root / ".venv/bin/python", f'#!{BASH}\necho "venv: $*"\n')
    # The program also works from another folder, whose name has a blank.
    elsewhere = programs.root / "else where"
    elsewhere.mkdir()
    found = programs.run(BASH, "-c", f"cd 'else where' && ../{program} --sizes 'a b'")
    assert found.stdout == f"venv: ../{program} --sizes a b\n"


def test_quickstart_and_install_tpu_take_no_option_for_a_folder_or_a_setting(programs: Checkout) -> None:
    install, quickstart = "scripts/launch/install_tpu", "scripts/quickstart"
    for program, *words in ([install, "-x"], [install, "a", "b"], [quickstart, "--steps"], [quickstart, "a"]):
        refused = programs.run(program, *words)
        assert refused.returncode == 2
        assert f"  {program} [" in refused.stdout
    asked = programs.run("scripts/quickstart", "train.total_steps=2", "--help")
    assert asked.returncode == 0 and "scripts/quickstart [section.key=value ...]" in asked.stdout
    assert not list(programs.root.glob(".venv*")) and not (programs.root / "-x").exists()


def test_ci_runs_the_test_script_with_the_shared_text(checkout: Checkout) -> None:
    checkout.program(
        checkout.root / "scripts/test",
        f'#!{BASH}\necho "test:$*:${{TRAINER_TEST_DATA-unset}}"\nread -r x || echo no input\n',
    )
    assert checkout.run(".ci/run").stdout == "test::unset\nno input\n"
    shared = checkout.root.parent / "shared/data"
    shared.mkdir(parents=True)
    closed = checkout.run(BASH, "-c", "exec .ci/run --fast <&-")
    assert closed.stdout == f"test:--fast:{shared.resolve()}\nno input\n"
    assert checkout.run(".ci/run", env={"TRAINER_TEST_DATA": "/mine"}).stdout == "test::/mine\nno input\n"


def test_a_dry_run_of_install_tpu_prints_what_it_would_do_and_changes_nothing(programs: Checkout) -> None:
    lock = programs.root / "scripts/launch/tpu_requirements.txt"
    lock.write_text("numpy\n")
    before = sorted(programs.root.rglob("*"))
    dry = programs.run("scripts/launch/install_tpu", "--dry-run")
    venv = f"{programs.root}/.venv-tpu"
    removed, made, changed, locked, own = dry.stdout.splitlines()
    assert dry.returncode == 0
    assert (removed, made) == (f"rm -rf {venv}", f"python3.{FIRST_MINOR} -m venv {venv}")
    assert changed == f"cd {programs.root}"
    assert locked.startswith(f"{venv}/bin/python -m pip install ") and f" --no-deps --requirement {lock}" in locked
    assert own.startswith(f"{venv}/bin/python -m pip install ") and own.endswith(" --no-deps --editable .")
    assert sorted(programs.root.rglob("*")) == before
