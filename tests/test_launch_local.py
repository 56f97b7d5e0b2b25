"""Laws of scripts/launch/local.py, with small programs in place of a training."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainer.distributed.workers import read_tf_config

LAUNCH = Path(__file__).parent.parent / "scripts" / "launch" / "local.py"
WHO = "import json, os; config = json.loads(os.environ['TF_CONFIG']); index = config['task']['index']; "


# The script, with a short wait for workers that do not end together.
IMPATIENT = (
    f"import runpy; main = runpy.run_path({str(LAUNCH)!r})['main']; main.__globals__['TOGETHER_SECS'] = 0.5; main()"
)


def launch(count, program, *script, **options):
    script = script or (str(LAUNCH),)
    command = [sys.executable, *script, "-n", str(count), sys.executable, "-c", program]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, **options
    )


def finish(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_every_worker_gets_a_number_and_the_same_addresses_and_its_lines_are_prefixed():
    status, output, errors = finish(launch(3, WHO + "print(index, sorted(config['cluster']['worker']))"))
    assert (status, errors) == (0, "")
    lines = sorted(output.splitlines())
    assert [line[:5] for line in lines] == ["[0] 0", "[1] 1", "[2] 2"]
    (addresses,) = {line[6:] for line in lines}
    assert addresses.count("127.0.0.1:") == 3


def test_a_worker_that_fails_stops_the_others_and_gives_its_status():
    begin = time.monotonic()
    status, _, errors = finish(
        launch(2, WHO + "import sys, time; sys.exit(7) if index else time.sleep(60)", "-c", IMPATIENT)
    )
    assert status == 7
    assert "worker 1 ended with 7; stopping the others." in errors
    assert time.monotonic() - begin < 40


def test_a_signal_goes_to_all_workers_and_their_status_comes_back():
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    process = launch(2, program)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(signal.SIGTERM)
    status, output, errors = finish(process)
    assert (status, errors) == (75, "")
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_command_that_cannot_run_is_reported():
    command = [sys.executable, str(LAUNCH), "-n", "2"]
    for arguments, message in (
        (["no-such-program"], "no-such-program is not a program on PATH or in "),
        ([], "name the command that each worker runs"),
    ):
        process = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert process.returncode == 2
        assert message in process.stderr


def test_all_workers_get_the_same_secret_and_each_launch_another():
    secrets = []
    for given in (None, None, "mine"):
        environment = {**os.environ} | ({} if given is None else {"TRAINER_MEETING_SECRET": given})
        status, output, _ = finish(launch(2, "import os; print(os.environ['TRAINER_MEETING_SECRET'])", env=environment))
        assert status == 0
        (secret,) = {line[4:] for line in output.splitlines()}
        secrets.append(secret)
    assert secrets[2] == "mine"
    assert len(set(secrets)) == 3
    assert len(secrets[0]) == 32


def test_a_worker_that_is_killed_is_named_with_the_signal_though_the_others_end_by_themselves():
    program = WHO + (
        "import os, signal, sys, time; print(os.getpid(), flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL) if index == 1 else time.sleep(0.3); sys.exit(2)"
    )
    status, _, errors = finish(launch(3, program))
    assert status == 128 + signal.SIGKILL
    assert errors == "local.py: worker 1 was killed by SIGKILL; worker 0 ended with 2; worker 2 ended with 2.\n"


def test_a_worker_that_is_stopped_is_named_and_ended():
    program = WHO + (
        "import os, signal, sys, time\nos.kill(os.getpid(), signal.SIGSTOP) if index else (time.sleep(1), sys.exit(2))"
    )
    begin = time.monotonic()
    status, _, errors = finish(launch(2, program, "-c", IMPATIENT))
    assert status == 2
    if hasattr(os, "waitid"):
        assert errors == "local.py: worker 1 is stopped by SIGSTOP; worker 0 ended with 2; stopping the others.\n"
    assert time.monotonic() - begin < 20


def test_workers_go_on_when_the_reader_of_their_lines_is_gone(tmp_path):
    program = WHO + (
        f"import sys, time\nfor i in range(20_000): print('x' * 50)\nopen(f'{tmp_path}/{{index}}', 'w').write('done')"
    )
    process = launch(2, program)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0", "1"]
    process.stderr.close()


def test_a_dry_run_prints_the_workers_commands_and_starts_none(tmp_path):
    program = f"open('{tmp_path}/started', 'w')"
    command = [sys.executable, str(LAUNCH), "--dry-run", "-n", "2", sys.executable, "-c", program]
    dry = subprocess.run(command, capture_output=True, text=True, check=True)
    workers = [shlex.split(line) for line in dry.stdout.splitlines()]
    assert not list(tmp_path.iterdir())
    for index, (env, variable, *rest) in enumerate(workers):
        assert (env, rest) == ("env", [sys.executable, "-c", program])
        name, _, value = variable.partition("=")
        assert (name, read_tf_config(value).number) == ("TF_CONFIG", index)
    assert len(workers) == 2


def test_an_unknown_option_is_refused():
    refused = subprocess.run([sys.executable, str(LAUNCH), "-n", "2", "--dry", "true"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "unrecognized arguments: --dry" in refused.stderr
