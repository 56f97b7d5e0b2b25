import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.system.signals import watched

ROOT = Path(__file__).parent.parent

# The command, whose verb catches whatever is raised, as imports do, and never ends.
STUBBORN = """
import sys, time
from trainer import cli
def stubborn(options):
    print("in", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
cli._train = cli._generate = stubborn
sys.exit(cli.main(sys.argv[1:]))
"""


def start(*arguments: str, ignored: int | None = None) -> subprocess.Popen[str]:
    def set_signals() -> None:
        # A shell's background job, as which tests may run, ignores SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    pipe = subprocess.PIPE
    program = [sys.executable, "-c", STUBBORN, *arguments]
    return subprocess.Popen(program, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=set_signals)


@pytest.mark.parametrize(
    ("verb", "number", "status", "message"),
    [
        ("train", signal.SIGINT, 75, "trainer: stopped by SIGINT. No run was begun. Start it again with the same"),
        ("train", signal.SIGTERM, 75, "trainer: stopped by SIGTERM. No run was begun. Start it again with the same"),
        ("train", signal.SIGHUP, 75, "trainer: stopped by SIGHUP. No run was begun. Start it again with the same"),
        ("generate", signal.SIGINT, 130, "trainer: stopped by SIGINT.\n"),
        ("generate", signal.SIGTERM, -signal.SIGTERM, ""),
    ],
)
def test_a_signal_ends_a_verb_at_once_whatever_the_code_under_way_catches(
    verb: str, number: int, status: int, message: str
):
    with start(verb, "x") as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == status and errors.startswith(message) and "Traceback" not in errors, errors


def test_what_nohup_started_outlives_the_terminal():
    with start("train", "x", ignored=signal.SIGHUP) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_that_is_not_dealt_with_goes_to_whoever_watched_before():
    outer: list[int] = []
    inner: list[int] = []

    def once(number: int) -> bool:
        inner.append(number)
        return len(inner) == 1

    with (
        watched([signal.SIGTERM], lambda number: not outer.append(number), lambda *_: None),
        watched([signal.SIGTERM], once, lambda *_: None),
    ):
        for sent in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: len(inner) == sent + 1 and len(outer) == sent)  # noqa: B023
    assert (len(inner), len(outer)) == (3, 2)


def test_a_forked_child_has_its_signals_to_itself():
    seen: list[int] = []
    with watched([signal.SIGTERM], lambda number: not seen.append(number), lambda *_: None):
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM and seen == []
