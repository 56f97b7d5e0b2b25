import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.system.signals import EXIT_STOPPED
from trainer.training import health
from trainer.training.health import (
    MAX_SKIPPED_IN_A_ROW,
    check_is_learning,
    only_run_in,
    report_skipped,
    stop_on_signals,
)

ROOT = Path(__file__).parent.parent

# One call of a compiled loop that by itself ends after hours, with a flag that stops it.
LOOP = """
import signal, sys, threading, time
import tensorflow as tf
from trainer.system.signals import EXIT_STOPPED
from trainer.training.health import stop_on_signals

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
sys.exit(EXIT_STOPPED)
"""


@pytest.fixture(autouse=True)
def interrupts_are_not_ignored():
    """As they are where the tests run as a shell's background job, and so in every process that these start."""
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
    assert process.returncode == (-signal.SIGINT if is_second_sent else EXIT_STOPPED), errors
    assert ("KeyboardInterrupt" in errors) == is_second_sent


TERMINATED = """
import os, signal, threading, time
from trainer.training import health
from trainer.training.health import stop_on_signals
health.SAME_EVENT_SECS = 0
asked = threading.Event()
with stop_on_signals(asked.set):
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked.wait(5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
"""


def test_second_sigterm_ends_the_process():
    assert subprocess.run([sys.executable, "-c", TERMINATED], cwd=ROOT).returncode == -signal.SIGTERM


def test_first_signal_asks_to_stop_and_the_second_interrupts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "SAME_EVENT_SECS", 0.0)
    asked = threading.Event()
    with pytest.raises(KeyboardInterrupt), stop_on_signals(asked.set):
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_any_second_signal_is_the_second(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "SAME_EVENT_SECS", 0.0)
    asked = threading.Event()
    with pytest.raises(KeyboardInterrupt), stop_on_signals(asked.set):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_several_signals_of_one_event_and_hang_ups_are_the_first(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    asked: list[bool] = []
    with stop_on_signals(lambda: asked.append(True), said.append):
        # The thread that reads them may come late; a second one that it took for one would end this process.
        monkeypatch.setattr(health, "SAME_EVENT_SECS", 60.0)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
            time.sleep(0.02)
        while not said:
            time.sleep(0.01)
        monkeypatch.setattr(health, "SAME_EVENT_SECS", 0.0)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.02)
    assert asked == [True]
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
    asked, seen = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.set())
    try:
        with stop_on_signals(asked.set):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen.wait(5)
            assert not asked.wait(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.wait(5)
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


HOLD = """
import pathlib, sys
from trainer.training.health import only_run_in
with only_run_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_one_process_trains_in_a_folder(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, only_run_in(tmp_path):
            pass
        assert str(error.value) == f"{tmp_path} is being trained in by another process; wait for it or stop it."
        process.kill()
    with only_run_in(tmp_path):  # What was killed holds nothing.
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    said: list[str] = []
    with only_run_in(tmp_path / "runs/a", said.append):
        assert (tmp_path / "runs/a").is_dir()
    assert said == [
        f"warning: the file system of {tmp_path}/runs/a has no locks ({os.strerror(number)}): see to it that no two "
        "processes train in it."
    ]
    assert not (tmp_path / "runs/a").exists()


def test_a_folder_that_nobody_can_make_is_an_error_and_not_waited_for(tmp_path: Path):
    with pytest.raises(UserError, match=r"^/proc/nothing/run cannot be written: .* or choose another run_folder\.$"):
        only_run_in(Path("/proc/nothing/run")).__enter__()
    (tmp_path / "lock").symlink_to(tmp_path / "nothing/lock")
    with pytest.raises(UserError, match=r"cannot be written: No such file .*, or choose another run_folder\.$"):
        only_run_in(tmp_path).__enter__()
    (tmp_path / "run.json").touch()  # A run that is there cannot go on in another folder.
    with pytest.raises(UserError, match=r"cannot be written: No such file .*Check the path and its file system\.$"):
        only_run_in(tmp_path).__enter__()


def test_one_holder_per_folder_and_it_lets_go(tmp_path: Path):
    with only_run_in(tmp_path), pytest.raises(UserError, match="is being trained in"), only_run_in(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), only_run_in(tmp_path):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with only_run_in(tmp_path):
        pass


def test_skipped_steps_are_reported_however_many_they_are():
    said: list[str] = []
    report_skipped(100, 50, 0, None, said.append)
    assert said == []
    report_skipped(100, 50, 49, None, said.append)
    report_skipped(101, 1, 1, 1024.0, said.append)
    assert said == [
        "step 100: skipped 49 of 50 steps, whose loss or gradient was not finite.",
        "step 101: skipped 1 of 1 steps, whose loss or gradient was not finite; the loss scale, which each of them "
        "halves, is 1024 now.",
    ]


def test_a_run_ends_where_too_many_steps_in_a_row_were_skipped_or_all():
    most = MAX_SKIPPED_IN_A_ROW
    check_is_learning(100, 200, most - 1, 5)
    check_is_learning(100, 100, most - 1, 1)
    check_is_learning(20, 20, 9, 11)
    check_is_learning(99, 100, most - 1, 0)
    told = (
        " had a loss or gradient that was not finite and were skipped. Lower optimizer.learning_rate, set "
        "optimizer.clip_norm (1.0 is common) or raise optimizer.warmup_steps. Skipped steps leave the weights alone: "
        "the newest checkpoint is finite."
    )
    with pytest.raises(UserError) as error:
        check_is_learning(100, 200, most, 5)
    assert str(error.value) == f"The last {most} steps before step 100 all{told}"
    with pytest.raises(UserError) as error:
        check_is_learning(20, 20, 10, 10)
    assert str(error.value) == f"The last 10 steps before step 20 all{told}"
    with pytest.raises(UserError) as error:
        check_is_learning(3, 3, 0, 0)
    assert str(error.value) == f"All 3 steps of the run{told}"
