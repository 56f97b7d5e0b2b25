import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.exit_status import ExitStatus
from trainer.system import signals
from trainer.system.signals import stop_on_signals, watched

ROOT = Path(__file__).parent.parent

# The command, whose verb catches whatever is raised, as imports do, and never ends. A shell's background job, as which
# tests may run, ignores SIGINT, and one behind nohup SIGHUP. The program sets its signals itself, and not preexec_fn:
# that runs Python between fork and exec, and a child of a process with threads can die there.
STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if sys.argv[1]:
    signal.signal(int(sys.argv[1]), signal.SIG_IGN)
from trainer import cli, verbs
def stubborn(options):
    print("in", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
verbs.train = verbs.generate = verbs.prepare = stubborn
sys.exit(cli.main(sys.argv[2:]))
"""


@contextlib.contextmanager
def running(*arguments: str, ignored: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """Yields a process of STUBBORN, once its verb runs, and kills it in the end."""
    pipe = subprocess.PIPE
    program = [sys.executable, "-c", STUBBORN, "" if ignored is None else str(int(ignored)), *arguments]
    process = subprocess.Popen(program, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "in\n":
        _, errors = process.communicate()
        pytest.fail(f"ended with {process.returncode} before its verb ran: {errors}")
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("verb", "number", "status", "message"),
    [
        ("train", signal.SIGINT, 75, "trainer: stopped by SIGINT. No run was begun. Start it again with the same"),
        ("train", signal.SIGTERM, 75, "trainer: stopped by SIGTERM. No run was begun. Start it again with the same"),
        ("train", signal.SIGHUP, 75, "trainer: stopped by SIGHUP. No run was begun. Start it again with the same"),
        ("generate", signal.SIGINT, 130, "trainer: stopped by SIGINT.\n"),
        ("generate", signal.SIGTERM, 143, "trainer: stopped by SIGTERM.\n"),
        ("prepare", signal.SIGTERM, 143, "trainer: stopped by SIGTERM.\n"),
    ],
)
def test_a_signal_ends_a_verb_at_once_whatever_the_code_under_way_catches(
    verb: str, number: int, status: int, message: str
):
    with running(verb, "x") as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == status and errors.startswith(message) and "Traceback" not in errors, errors


def test_what_nohup_started_outlives_the_terminal():
    with running("train", "x", ignored=signal.SIGHUP) as process:
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


# One call of a compiled loop that takes hours, with a flag that stops it.
LOOP = """
import signal, sys, threading, time
import tensorflow as tf
from trainer.exit_status import ExitStatus
from trainer.system.signals import stop_on_signals

stop_requested = tf.Variable(False)
reached = tf.Variable(0, dtype=tf.int64)

@tf.function(autograph=False)
def run():
    return tf.while_loop(
        lambda i: (i < 2**40) & ~stop_requested.read_value(), lambda i: reached.assign_add(1), [tf.zeros([], tf.int64)]
    )

def announce():
    while int(reached) == 0:
        time.sleep(0.01)
    print("running", flush=True)

before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
with stop_on_signals(lambda: stop_requested.assign(True)):
    threading.Thread(target=announce).start()
    run()
    print("stopped", flush=True)
    time.sleep(float(sys.argv[1]))
assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == before
sys.exit(ExitStatus.STOPPED)
"""


@pytest.fixture(autouse=True)
def interrupts_are_not_ignored():
    """A shell's background job ignores SIGINT, and so does every process that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopped = []
    with stop_on_signals(lambda: stopped.append(True)):
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert not stopped


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_from_outside_stops_a_compiled_loop_and_a_second_one_the_process(number: signal.Signals):
    is_second_sent = number == signal.SIGINT
    command = [sys.executable, "-c", LOOP, "60" if is_second_sent else "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "running\n"
            sent = time.monotonic()
            process.send_signal(number)
            assert process.stdout.readline() == "stopped\n"
            assert time.monotonic() - sent < 2  # Against a loop of hours.
            if is_second_sent:
                time.sleep(1.1)
                process.send_signal(number)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == (-signal.SIGINT if is_second_sent else ExitStatus.STOPPED), errors
    assert ("KeyboardInterrupt" in errors) == is_second_sent


TERMINATED = """
import os, signal, threading, time
from trainer.system import signals
from trainer.system.signals import stop_on_signals
signals.SAME_EVENT_SECS = 0
requested = threading.Event()
with stop_on_signals(requested.set):
    os.kill(os.getpid(), signal.SIGTERM)
    assert requested.wait(5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
"""


def test_second_sigterm_ends_the_process():
    assert subprocess.run([sys.executable, "-c", TERMINATED], cwd=ROOT).returncode == -signal.SIGTERM


def test_first_signal_requests_a_stop_and_the_second_interrupts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "SAME_EVENT_SECS", 0.0)
    requested = threading.Event()
    with pytest.raises(KeyboardInterrupt), stop_on_signals(requested.set):
        os.kill(os.getpid(), signal.SIGINT)
        assert requested.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_any_second_signal_is_the_second(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "SAME_EVENT_SECS", 0.0)
    requested = threading.Event()
    with pytest.raises(KeyboardInterrupt), stop_on_signals(requested.set):
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_several_signals_of_one_event_and_hang_ups_are_the_first(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    requested: list[bool] = []
    with stop_on_signals(lambda: requested.append(True), said.append):
        # The thread that reads them may come late; a second one that it took for one would end this process.
        monkeypatch.setattr(signals, "SAME_EVENT_SECS", 60.0)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
            time.sleep(0.02)
        while not said:
            time.sleep(0.01)
        monkeypatch.setattr(signals, "SAME_EVENT_SECS", 0.0)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.02)
    assert requested == [True]
    assert said == ["SIGINT: saving after the step under way; a second signal ends at once, unsaved."]


def test_handlers_are_as_before_afterwards():
    def mine(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, mine)
    threads = threading.active_count()
    try:
        for _ in range(3):
            with stop_on_signals(lambda: None):
                assert signal.getsignal(signal.SIGTERM) is not mine
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert signal.set_wakeup_fd(-1) == -1
        with pytest.raises(ZeroDivisionError), stop_on_signals(lambda: None):
            os.kill(os.getpid(), signal.SIGTERM)
            1 / 0  # noqa: B018
        assert signal.getsignal(signal.SIGTERM) is mine
        assert threading.active_count() == threads
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_signals_stop_nothing():
    requested, seen = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.set())
    try:
        with stop_on_signals(requested.set):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen.wait(5)
            assert not requested.wait(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert requested.wait(5)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_than_the_main_one_is_let_run():
    done = threading.Event()

    def work() -> None:
        with stop_on_signals(lambda: None):
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done.is_set()
