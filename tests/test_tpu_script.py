"""Laws of scripts/launch/tpu, with a gcloud that runs nothing in a cloud: it notes its arguments, and is the host."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TPU = REPOSITORY / "scripts/launch/tpu"
BASH = shutil.which("bash") or "bash"
WHERE = ("my-tpu", "--zone", "us-west4-a")
CONFIG = "configs/quickstart.toml"
KEEP = ("keep", "--type", "v5e-8", "--spot", CONFIG, "run_folder=gs://b/run")

# A fake gcloud: it writes down each argument and a NUL, and one NUL more after each call. If there is a folder $HOST,
# it also acts as the host: it takes the file of scp, and runs the text of ssh with $HOST as the home folder. The states
# of a queued resource stand in the file $QUEUE, one in a line for each time that gcloud is asked.
FAKE_GCLOUD = f"""#!{BASH}
printf '%s\\0' "$@" >>"$CALLS"
printf '\\0' >>"$CALLS"
if [[ "$3 $4" == "queued-resources describe" && -e $QUEUE ]]; then
    read -r state <"$QUEUE"
    sed -i 1d "$QUEUE"
    if [[ $state == ERROR ]]; then echo "ERROR: (gcloud.x) UNAVAILABLE" >&2; exit 1; fi
    if [[ $state == NONE ]]; then echo "ERROR: (gcloud.x) NOT_FOUND: Resource q was not found." >&2; exit 1; fi
    echo "$state"
    exit
fi
if [[ "$3 $4" == "tpu-vm describe" ]]; then echo "${{NODE:-READY}}"; exit; fi
if [[ ! -d $HOST ]]; then exit; fi
cd "$HOST" || exit 255
if [[ -e unreachable ]]; then exit 255; fi
export HOME=$HOST
for argument in "$@"; do
    case $argument in --command=*) exec {BASH} -c "${{argument#--command=}}" ;; esac
done
if [[ $4 == scp ]]; then cp "$5" .; fi
"""
# Writes down its arguments, then runs until SIGTERM, as a trainer does; or ends at once if a file names a status.
FAKE_TRAINER = f"""#!{BASH}
printf '%s\\0' "$@" >"$HOME/trained_with"
echo "${{TPU_LOAD_LIBRARY-unset}}" >"$HOME/tpu_load_library"
if [[ -e $HOME/ends_with ]]; then echo "trainer: no such config"; exit "$(cat "$HOME/ends_with")"; fi
trap 'echo saved; exit 75' TERM
echo training
while [[ ! -e $HOME/finishes ]]; do sleep 0.05; done
exit "$(cat "$HOME/finishes")"
"""
FAKE_SERVER = f"""#!{BASH}
echo "${{TPU_LOAD_LIBRARY-unset}}" >>"$HOME/served"
if [[ -e $HOME/no_server ]]; then echo "KeyError: 'v6e-16'"; exit 1; fi
echo serving
while :; do sleep 0.1; done
"""
FAKE_INSTALL = f"""#!{BASH}
echo "$TRAINER_PYTHON" >>"$HOME/installed_with"
cp -R "$HOME/made_by_install" "$(dirname "$0")/../../.venv-tpu"
"""
# In place of twenty seconds of tail: waits until the command works or has ended.
FAKE_TIMEOUT = f"""#!{BASH}
pid=${{@: -2:1}} log=${{@: -1}}
while kill -0 "${{pid#--pid=}}" 2>/dev/null && ! grep -qE '^(training|serving)' "$log"; do sleep 0.05; done
cat "$log"
"""
# A minute passes at once; the program after_minute_N, if there is one, says what happened in it.
FAKE_SLEEP = f"""#!{BASH}
if [[ $1 != 60 ]]; then exec {shutil.which("sleep")} "$@"; fi
echo minute >>"$QUEUE.minutes"
after=$QUEUE.$(grep -c . "$QUEUE.minutes")
if [[ -e $after ]]; then source "$after"; fi
"""
# Checks more often than every second whether the process has ended.
FAKE_TAIL = f"""#!{BASH}
exec {shutil.which("tail")} -s 0.05 "$@"
"""
FAKE_PIP = f"""#!{BASH}
[[ $* == "-m pip install --user --quiet uv" ]] || exit 9
mkdir -p ~/.local/bin && cp ~/uv ~/.local/bin
"""
FAKE_UV = f"""#!{BASH}
echo "$*" >>~/uv_calls
if [[ $2 == find ]]; then echo /uv/python3; fi
"""

only_linux = pytest.mark.skipif(platform.system() != "Linux", reason="a TPU's host runs Ubuntu")


class Bench:
    """A checkout with scripts/launch/tpu, and a PATH that holds a few tools and a fake gcloud."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.host = folder / "checkout", folder / "bin", folder / "host"
        self.calls_file, self.queue = folder / "calls", folder / "queue"
        for name in ("scripts/launch/tpu", "scripts/launch/tpu_host.sh", "scripts/environment.sh", "setup.cfg", CONFIG):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, self.root / name)
        self.bin.mkdir()
        for tool in (
            *("bash", "cat", "cp", "dirname", "git", "grep", "gzip", "mkdir", "mv", "nohup", "pgrep", "pkill", "rm"),
            *("sed", "setsid", "tar"),
        ):
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.program(self.bin / "gcloud", FAKE_GCLOUD)
        self.program(self.bin / "timeout", FAKE_TIMEOUT)
        self.program(self.bin / "tail", FAKE_TAIL)
        self.program(self.bin / "sleep", FAKE_SLEEP)

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def make_host(self, addresses: str = "a:b:10.0.0.2") -> None:
        """Lets gcloud be a fresh TPU VM, whose metadata has these addresses of the slice's hosts."""
        for name, text in (("trainer", FAKE_TRAINER), ("start_grpc_tpu_worker", FAKE_SERVER)):
            self.program(self.host / "made_by_install/bin" / name, text)
        python = f'#!{BASH}\nPYTHONPATH={REPOSITORY} exec {sys.executable} "$@"\n'
        self.program(self.host / "made_by_install/bin/python", python)
        self.program(self.host / "uv", FAKE_UV)
        self.program(self.bin / "python3", FAKE_PIP)
        self.program(self.bin / "curl", f"#!{BASH}\n[[ $* == */worker-network-endpoints ]] && echo {addresses}\n")
        self.program(self.root / "scripts/launch/install_tpu", FAKE_INSTALL)

    def track(self) -> None:
        for arguments in (("init", "--quiet"), ("add", "--all")):
            subprocess.run(["git", *arguments], cwd=self.root, check=True)

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return self.bash(str(self.root / "scripts/launch/tpu"), *arguments, env=env)

    def bash(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": str(self.bin), "HOST": str(self.host), "CALLS": str(self.calls_file)}
        variables |= {"QUEUE": str(self.queue), "LANG": "C.UTF-8"}
        return subprocess.run(
            [BASH, *arguments],
            env=variables | dict(env or {}),
            cwd=self.root.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        """Takes what gcloud was called with since the last time."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        self.calls_file.unlink(missing_ok=True)
        return [call.split("\0") for call in text.split("\0\0") if call]

    def trained_with(self) -> list[str]:
        return (self.host / "trained_with").read_text().split("\0")[:-1]

    def end_all(self) -> None:
        for file in self.host.glob("trainer/*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.end_all()


@pytest.mark.parametrize("project", [[], ["--project", "my-project"]])
@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("create", ["--type", "v5litepod-8", "--spot"]),
        ("install", []),
        ("train", [CONFIG, "data.train=[\"it's\", 'a b/*.gz']"]),
        ("resume", ["runs/my run", "log.every_steps=5"]),
        ("log", []),
        ("stop", []),
        ("delete", []),
        ("create", ["--type", "v5e-8", "--spot", "--queued"]),
        ("delete", ["--queued"]),
    ],
)
def test_a_dry_run_prints_what_gcloud_is_given_and_runs_nothing(
    bench: Bench, verb: str, words: list[str], project: list[str]
) -> None:
    bench.track()
    bench.queue.write_text("ACTIVE\n")
    assert bench.run(verb, *WHERE, *project, *words).returncode == 0
    calls = bench.calls()
    group = "queued-resources" if "--queued" in words else "tpu-vm"
    assert all(call[:3] == ["compute", "tpus", group] and "--zone=us-west4-a" in call for call in calls)
    assert all(("--project=my-project" in call) == bool(project) for call in calls)
    assert [call[3] for call in calls] == {
        "create": ["create", "describe"] if "--queued" in words else ["create"],
        "install": ["scp", "ssh"],
        "delete": ["delete"],
    }.get(verb, ["ssh"])
    shutil.rmtree(bench.root / "build", ignore_errors=True)

    without_gcloud = bench.bin / "gcloud"
    without_gcloud.rename(bench.bin / "elsewhere")
    dry = bench.run(verb, *WHERE, "--dry-run", *project, *words)
    without_gcloud.with_name("elsewhere").rename(without_gcloud)
    assert (dry.returncode, dry.stderr, bench.calls()) == (0, "", [])
    assert not (bench.root / "build").exists()
    # Pasted into a shell, the lines do the same.
    assert bench.bash("-c", dry.stdout).returncode == 0
    assert bench.calls() == calls


def test_every_text_for_a_host_is_bash(bench: Bench) -> None:
    bench.track()
    bench.queue.write_text("ACTIVE\n" * 2 + "FAILED\n")
    for words in (["install"], ["train", CONFIG], ["resume", "runs/x"], ["log"], ["stop"], [*KEEP]):
        bench.run(words[0], *WHERE, *words[1:])
    texts = [a.removeprefix("--command=") for call in bench.calls() for a in call if a.startswith("--command=")]
    assert len(set(texts)) == 7
    for text in texts:
        checked = subprocess.run([BASH, "-n", "-c", text], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
        if shellcheck := shutil.which("shellcheck"):
            checked = subprocess.run([shellcheck, "--shell=bash", "-"], input=text, capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5e-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_each_generation_is_created_with_its_software(bench: Bench, kind: str, version: str) -> None:
    bench.run("create", *WHERE, f"--type={kind}")
    (call,) = bench.calls()
    kind = kind.replace("v5e", "v5litepod")
    assert call[3:] == ["create", "my-tpu", f"--accelerator-type={kind}", f"--version={version}", "--zone=us-west4-a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tune", *WHERE],
            "tune: no such command; there are create, install, train, resume, keep, log, stop and delete.",
        ),
        (["log", "--zone", "z"], "the TPU's name is missing"),
        (["train", "--zone", "z", CONFIG], f"{CONFIG}: a TPU's name is lower-case letters, digits and hyphens"),
        (["log", "my-tpu"], "--zone is missing"),
        (["log", "my-tpu", "--zone"], "--zone needs a value"),
        (["log", "my-tpu", "--zone", "--dry-run"], "--zone needs a value"),
        (["log", *WHERE, "--quiet"], "--quiet: no such option; there are --zone, --project, --type, --spot, --queued"),
        (["log", *WHERE, "more"], "log takes only the TPU's name; leave out: more"),
        (["log", *WHERE, "--spot"], "--type and --spot go with create and keep only"),
        (["train", *WHERE, CONFIG, "--type", "v4-8"], "--type and --spot go with create and keep only"),
        (["create", *WHERE], "--type is missing; it must be v2-N, v3-N, v4-N, v5e-N (or v5litepod-N), v5p-N"),
        (["create", *WHERE, "--type", "v5e-x"], "--type v5e-x must be v2-N, v3-N, v4-N, v5e-N (or v5litepod-N)"),
        (["keep", *WHERE, CONFIG, "run_folder=gs://b/run"], "--type is missing"),
        (["keep", *WHERE, "--type", "v5e-8"], "keep needs a config file"),
        (["keep", *WHERE, "--type", "v5e-8", CONFIG, "train.seed=1"], "keep needs run_folder=gs://BUCKET/FOLDER among"),
        (["train", *WHERE, CONFIG, "--queued"], "--queued goes with create and delete only"),
        (["create", *WHERE, "--type", "v4-eight"], "--type v4-eight must be v2-N"),
        (["create", *WHERE, "--type", "v6e-16"], "--type v6e-16 has several hosts"),
        (["train", *WHERE], "train needs a config file"),
        (["train", *WHERE, "configs/none.toml"], "configs/none.toml: no such file in"),
        (["train", *WHERE, CONFIG, "train.total_steps"], "train.total_steps is not an override; write key.sub=value"),
        (["resume", *WHERE], "resume needs a run's folder"),
    ],
)
def test_an_impossible_request_is_refused_with_what_is_possible(
    bench: Bench, arguments: list[str], message: str
) -> None:
    result = bench.run(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert bench.calls() == []


def test_a_config_that_git_does_not_know_is_refused_since_it_would_not_be_copied(bench: Bench) -> None:
    (bench.root / ".gitignore").write_text("/mine/\n")
    bench.track()
    for name in ("configs/my own.toml", "mine/mine.toml"):
        (bench.root / name).parent.mkdir(exist_ok=True)
        (bench.root / name).touch()
        kept = bench.run("keep", *WHERE, "--type", "v5e-8", name, "run_folder=gs://b/run", "--dry-run")
        refused = bench.run("train", *WHERE, name, "--dry-run")
        for each in (kept, refused):
            assert (each.returncode, each.stdout) == (1, "")
            assert f"{name}: git does not know this file" in each.stderr
        # keep installs by itself.
        add, _, install = refused.stderr.splitlines()[-1].partition("; ")
        assert add == kept.stderr.splitlines()[-1]
        assert install == "scripts/launch/tpu install my-tpu --zone us-west4-a"
        assert bench.bash("-c", add).returncode == 0
        assert bench.run("train", *WHERE, name, "--dry-run").returncode == 0


def test_a_missing_gcloud_is_reported_with_where_to_get_it(bench: Bench) -> None:
    (bench.bin / "gcloud").unlink()
    result = bench.run("log", *WHERE)
    assert result.returncode == 1
    assert "gcloud is not on PATH" in result.stderr
    assert "https://cloud.google.com/sdk/docs/install" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["-h"], ["train", "--help"]])
def test_usage_is_the_header(bench: Bench, arguments: list[str]) -> None:
    result = bench.run(*arguments)
    assert result.returncode == 0
    for verb in ("create", "install", "train", "resume", "keep", "log", "stop", "delete"):
        assert f"\n  scripts/launch/tpu {verb} " in result.stdout
    assert "This script has not yet run against Google Cloud" in result.stdout
    assert "set -euo" not in result.stdout


@only_linux
def test_from_install_to_stop_on_one_host(bench: Bench) -> None:
    bench.make_host()
    (bench.root / "left_out").touch()
    bench.program(bench.root / ".gitignore", "/build/\n/left_out\n")
    bench.track()
    (bench.root / CONFIG).write_text("# changed, and not committed\n")
    installed = bench.run("install", *WHERE)
    assert installed.returncode == 0, installed.stderr
    assert (bench.host / "trainer" / CONFIG).read_text() == "# changed, and not committed\n"
    assert not (bench.host / "trainer/left_out").exists()
    assert (bench.host / "installed_with").read_text() == "/uv/python3\n"
    (oldest,) = re.findall(r"python_requires = >=(3\.\d+),", (REPOSITORY / "setup.cfg").read_text())
    assert f"python install {oldest}\n" in (bench.host / "uv_calls").read_text()
    assert not (bench.host / "served").exists()

    # Each arrives unchanged: spaces, quotes, lists, a glob that matches, text that a shell would expand, a script.
    overrides = [
        "data.train=[\"a b.txt\", 'it''s.gz']",
        'train.precision="float32"',
        "run_folder=runs/$HOME `date` \\ *",
        "data.prepared_folder=이야기; exit 3",
        "data.validation=",
    ]
    begun = bench.run("train", *WHERE, CONFIG, *overrides)
    assert begun.returncode == 0, begun.stderr
    assert begun.stdout.startswith("training\nTraining goes on without this connection.")
    expected = ["train", CONFIG, "distribution.kind=tpu", "distribution.tpu_name=local", *overrides]
    assert bench.trained_with() == expected
    assert (bench.host / "tpu_load_library").read_text() == "unset\n"

    for refused in (bench.run("train", *WHERE, CONFIG), bench.run("install", *WHERE)):
        assert refused.returncode == 1
        assert "A training runs here" in refused.stderr
    pid = int((bench.host / "trainer/train.pid").read_text())
    assert os.getsid(pid) == pid  # its own session: a connection that is lost takes nothing along

    stopped = bench.run("stop", *WHERE)
    assert (stopped.returncode, stopped.stdout.splitlines()[-2:]) == (0, ["saved", "The trainer has ended."])
    assert not Path(f"/proc/{pid}").exists()
    assert bench.run("log", *WHERE).stdout.splitlines()[-2:] == ["training", "saved"]
    nothing = bench.run("stop", *WHERE)
    assert nothing.returncode == 1
    assert "Nothing is training here." in nothing.stderr

    assert bench.run("resume", *WHERE, "runs/my run", "log.every_steps=5").returncode == 0
    expected = ["train", "--resume", "runs/my run", "distribution.kind=tpu", "distribution.tpu_name=local"]
    assert bench.trained_with() == [*expected, "log.every_steps=5"]
    assert (bench.host / "trainer/train.log.before").read_text() == "training\nsaved\n"


@only_linux
@pytest.mark.parametrize("status", [0, 2])
def test_a_training_that_ends_at_once_gives_its_message_and_status(bench: Bench, status: int) -> None:
    bench.make_host()
    bench.track()
    bench.run("install", *WHERE)
    (bench.host / "ends_with").write_text(str(status))
    (bench.bin / "timeout").unlink()
    (bench.bin / "timeout").symlink_to(str(shutil.which("timeout")))
    result = bench.run("train", *WHERE, CONFIG)
    assert (result.returncode, result.stdout) == (status, "trainer: no such config\n")


@only_linux
def test_training_before_install_is_refused(bench: Bench) -> None:
    bench.make_host()
    for verb, word in (("train", CONFIG), ("resume", "runs/x")):
        result = bench.run(verb, *WHERE, word)
        assert result.returncode == 1
        assert "trainer is not installed here; run scripts/launch/tpu install first." in result.stderr


@only_linux
def test_on_a_slice_every_host_serves_and_the_first_one_drives(bench: Bench) -> None:
    bench.make_host("x:y:10.0.0.2,x:y:10.0.0.3:z")
    bench.track()
    installed = bench.run("install", *WHERE)
    assert installed.returncode == 0, installed.stderr
    assert (bench.host / "served").read_text() == "unset\n"  # the server is who takes the TPU
    assert ["--worker=all" in call for call in bench.calls()] == [True, True]
    assert bench.run("install", *WHERE).returncode == 0
    assert (bench.host / "served").read_text() == "unset\n"  # one is there: it is left alone

    bench.calls()
    in_bucket = ["run_folder=gs://b/run", "data.prepared_folder=gs://b/prepared"]
    assert bench.run("train", *WHERE, CONFIG, *in_bucket).returncode == 0
    addresses = "distribution.tpu_name=grpc://10.0.0.2:8470,grpc://10.0.0.3:8470"
    assert bench.trained_with()[1:] == [CONFIG, "distribution.kind=tpu", addresses, *in_bucket]
    assert (bench.host / "tpu_load_library").read_text() == "0\n"
    assert ["--worker=0" in call for call in bench.calls()] == [True]
    assert bench.run("stop", *WHERE).stdout.splitlines()[-2] == "saved"

    assert bench.run("resume", *WHERE, "gs://b/run").returncode == 0
    assert bench.trained_with()[1:] == ["--resume", "gs://b/run", "distribution.kind=tpu", addresses]
    bench.run("stop", *WHERE)
    refused = bench.run("resume", *WHERE, "runs/x")
    assert refused.returncode == 1
    assert "On a slice the run has to be on gs://; it is runs/x." in refused.stderr


@only_linux
@pytest.mark.parametrize(
    ("overrides", "folders"),
    [([], "runs/quickstart and prepared"), (["run_folder=gs://b/run"], "gs://b/run and prepared")],
)
def test_on_a_slice_folders_that_only_one_host_sees_are_refused(
    bench: Bench, overrides: list[str], folders: str
) -> None:
    bench.make_host("x:y:10.0.0.2,x:y:10.0.0.3")
    bench.track()
    bench.run("install", *WHERE)
    result = bench.run("train", *WHERE, CONFIG, *overrides)
    assert result.returncode == 1
    assert f"have to be on gs://; they are {folders}." in result.stderr
    assert not (bench.host / "trained_with").exists()


@only_linux
def test_a_server_that_does_not_start_ends_the_install_with_its_reason(bench: Bench) -> None:
    bench.make_host("x:y:10.0.0.2,x:y:10.0.0.3")
    bench.track()
    (bench.host / "no_server").touch()
    result = bench.run("install", *WHERE)
    assert result.returncode == 1
    assert "KeyError: 'v6e-16'" in result.stdout


def kinds_of(calls: list[list[str]]) -> list[str]:
    """What gcloud was asked to do, without being asked how it goes."""
    kinds = [f"{call[2]} {call[3]}" for call in calls]
    return [kind for kind in kinds if "describe" not in kind]


@only_linux
def test_a_training_on_a_spot_tpu_is_kept_until_it_ends(bench: Bench) -> None:
    bench.make_host()
    bench.track()
    minutes = {
        # The host saves and stops before a maintenance.
        4: 'kill -TERM "$(cat $HOST/trainer/train.pid)"; until [[ -e $HOST/trainer/train.status ]]; do :; done',
        # The TPU is taken away, with its disk; the next one is another.
        6: 'kill -KILL "$(cat $HOST/trainer/train.pid)"; sleep 0.2; rm -rf "$HOST/trainer" "$HOST/trained_with"',
        9: 'echo 0 >"$HOST/finishes"; until [[ -e $HOST/trainer/train.status ]]; do sleep 0.05; done',
    }
    for minute, happens in minutes.items():
        bench.program(bench.queue.with_name(f"queue.{minute}"), happens)
    states = ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", "NONE", "ACTIVE"]
    bench.queue.write_text("".join(f"{state}\n" for state in [*states, "ACTIVE"]))
    kept = bench.run("keep", *WHERE, *KEEP[1:], "data.train=gs://b/text/*.gz")
    assert kept.returncode == 0, kept.stderr
    request, install, start = "queued-resources create", ["tpu-vm scp", "tpu-vm ssh"], "tpu-vm ssh"
    look = "tpu-vm ssh"
    calls = bench.calls()
    assert kinds_of(calls) == [
        *(request, look, *install, start, look),
        *(look, *install, start, look),
        *("queued-resources delete", request, look, *install, start, look),
    ]
    assert calls[1][3:] == [
        *("create", "my-tpu", "--node-id=my-tpu", "--accelerator-type=v5litepod-8"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--zone=us-west4-a"),
    ]
    (deleted,) = (call for call in calls if call[3] == "delete")
    assert {"--force", "--quiet"} <= set(deleted)  # There is nobody to ask.
    assert bench.trained_with() == [
        *("train", "--or-resume", CONFIG, "distribution.kind=tpu", "distribution.tpu_name=local"),
        *("run_folder=gs://b/run", "data.train=gs://b/text/*.gz"),
    ]
    assert "The TPU was taken away; asking for another one." in kept.stdout
    assert "The training has ended." in kept.stdout
    assert "scripts/launch/tpu delete my-tpu --zone us-west4-a --queued" in kept.stdout


@only_linux
def test_a_training_that_ends_by_its_own_fault_is_not_started_again(bench: Bench) -> None:
    bench.make_host()
    bench.track()
    (bench.host / "ends_with").write_text("2")
    bench.queue.write_text("ACTIVE\n" * 2)
    kept = bench.run(KEEP[0], *WHERE, *KEEP[1:])
    assert kept.returncode == 1
    assert "The training ended with status 2, which another start does not mend." in kept.stderr
    assert "trainer: no such config" in kept.stdout
    assert kinds_of(bench.calls()) == ["tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh"]


@only_linux
@pytest.mark.parametrize(("node", "is_asked_again"), [("PREEMPTED", True), ("READY", False)])
def test_a_host_that_cannot_be_reached_is_looked_at(bench: Bench, node: str, is_asked_again: bool) -> None:
    bench.make_host()
    (bench.host / "unreachable").touch()
    bench.queue.write_text("ACTIVE\n" * 10 + "FAILED\n")
    kept = bench.run(KEEP[0], *WHERE, *KEEP[1:], env={"NODE": node})
    assert kept.returncode == 1
    calls = kinds_of(bench.calls())
    assert ("queued-resources delete" in calls) == is_asked_again
    if not is_asked_again:
        assert calls == ["tpu-vm ssh"] * 10
        assert "gcloud, or what it ran on the host, failed 10 times, one after the other" in kept.stderr


@only_linux
def test_a_training_that_its_host_refuses_is_not_asked_for_without_end(bench: Bench) -> None:
    bench.make_host("x:y:10.0.0.2,x:y:10.0.0.3")
    bench.program(bench.host / "made_by_install/bin/python", f"#!{BASH}\necho gs://b/run and prepared\n")
    bench.track()
    # What an earlier training left is not the result of this one.
    bench.program(bench.host / "trainer/train.status", "0\n")
    bench.queue.write_text("ACTIVE\n" * 10 + "FAILED\n")
    kept = bench.run(KEEP[0], *WHERE, *KEEP[1:])
    assert kept.returncode == 1
    assert kept.stderr.count("have to be on gs://; they are gs://b/run and prepared.") == 10
    assert "failed 10 times, one after the other" in kept.stderr


def test_only_failures_in_a_row_are_counted(bench: Bench) -> None:
    between = ("WAITING_FOR_RESOURCES", "NONE", "SUSPENDED", "FAILED")
    bench.queue.write_text("".join("ERROR\n" * 9 + f"{state}\n" for state in between))
    kept = bench.run(KEEP[0], *WHERE, *KEEP[1:])
    assert kept.returncode == 1
    assert "The queued resource my-tpu is FAILED; gcloud says why:" in kept.stderr
    assert kinds_of(bench.calls()) == ["queued-resources create", "queued-resources delete"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_queued_resource_that_gets_no_tpu_is_reported(bench: Bench, state: str) -> None:
    bench.queue.write_text(f"WAITING_FOR_RESOURCES\n{state}\n")
    created = bench.run("create", *WHERE, "--type", "v5e-8", "--queued")
    assert created.returncode == 1
    assert "The queued resource my-tpu is WAITING_FOR_RESOURCES; looking again in 60 s." in created.stdout
    assert f"The queued resource my-tpu is {state}; gcloud says why:" in created.stderr
    assert "gcloud compute tpus queued-resources describe my-tpu --zone=us-west4-a\n" in created.stderr


def test_gcloud_s_own_parser_takes_every_command(bench: Bench, tmp_path: Path) -> None:
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not installed")
    bench.track()
    lines = []
    for verb, *words in (
        *(["create", "--type", "v5e-8", "--spot"], ["create", "--type", "v4-32", "--queued"], ["install"]),
        *(["train", CONFIG], ["delete"], ["delete", "--queued"], KEEP),
    ):
        lines += bench.run(verb, *WHERE, "--project", "p", "--dry-run", *words).stdout.splitlines()
    # The texts for hosts are the shell's own; gcloud takes any.
    lines = [line for line in lines if line.startswith("gcloud ")]
    commands = {re.sub(r" \S*--command=.*(?= --zone=)", " --command=x", line) for line in lines}
    for page in (*(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "configs").glob("*.toml"), TPU):
        commands |= set(re.findall(r"(?m)^(?:#   )?(gcloud .*)$", page.read_text()))
    commands.add("gcloud compute tpus queued-resources delete q --force --quiet --zone=z --project=p")
    commands.add("gcloud compute tpus tpu-vm describe q '--format=value(state)' --zone=z --project=p")
    assert len(commands) > 8
    wrong = "gcloud compute tpus tpu-vm create x --sport"
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([{"command_string": command} for command in (*sorted(commands), wrong)]))
    checked = subprocess.run(
        [gcloud, "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        capture_output=True,
        text=True,
    )
    answers = {each["command_string"]: each["error_message"] for each in json.loads(checked.stdout)}
    assert "--sport (did you mean '--spot'?)" in answers.pop(wrong)
    assert answers == dict.fromkeys(sorted(commands))
