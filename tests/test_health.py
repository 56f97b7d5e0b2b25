import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer.config import UserError
from trainer.training.health import EXIT_INTERRUPTED, check_finite, only_run_in, stop_on_signals

ROOT = Path(__file__).parent.parent

# One call of a compiled loop that by itself ends after minutes, with a flag that stops it.
LOOP = """
import signal, sys, time
import tensorflow as tf
from trainer.training.health import EXIT_INTERRUPTED, stop_on_signals

stop_requested = tf.Variable(False)
reached = tf.Variable(0, dtype=tf.int64)

@tf.function(autograph=False)
def run():
    return tf.while_loop(
        lambda i: (i < 2**40) & ~stop_requested.read_value(), lambda i: reached.assign_add(1), [tf.zeros([], tf.int64)]
    )

before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
with stop_on_signals(lambda: stop_requested.assign(True)):
    run.get_concrete_function()
    print("running", flush=True)
    run()
    print("stopped", int(reached) > 0, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == before
sys.exit(EXIT_INTERRUPTED)
"""


def start_loop(then: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, then], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    time.sleep(0.1)  # Now it is in the call.
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_from_outside_stops_a_compiled_loop(number: signal.Signals):
    with start_loop("exit") as process:
        sent = time.monotonic()
        process.send_signal(number)
        assert process.stdout.readline() == "stopped True\n"
        assert time.monotonic() - sent < 2  # Against a loop of minutes.
        process.communicate()
        assert process.returncode == EXIT_INTERRUPTED


@pytest.mark.slow
@pytest.mark.parametrize(("second", "ending"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "")])
def test_second_signal_ends_the_process(second: signal.Signals, ending: str):
    with start_loop("wait") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopped True\n"
        process.send_signal(second)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == -second
        assert ending in errors


def test_first_signal_asks_to_stop_and_the_second_interrupts():
    asked = threading.Event()
    with pytest.raises(KeyboardInterrupt), stop_on_signals(asked.set):
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_any_second_signal_is_the_second():
    asked = threading.Event()
    with pytest.raises(KeyboardInterrupt), stop_on_signals(asked.set):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


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


def test_one_holder_per_folder_and_it_lets_go(tmp_path: Path):
    with only_run_in(tmp_path), pytest.raises(UserError, match="is being trained in"), only_run_in(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), only_run_in(tmp_path):
        1 / 0  # noqa: B018
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_skipped_steps_are_reported_until_all_are():
    said: list[str] = []
    check_finite(100, 50, 0, said.append)
    assert said == []
    check_finite(100, 50, 49, said.append)
    assert said == ["step 100: skipped 49 of 50 steps, whose loss or gradient was not finite."]
    check_finite(100, 0, 0, said.append)
    with pytest.raises(UserError) as error:
        check_finite(100, 50, 50, said.append)
    assert str(error.value) == (
        "All 50 steps before step 100 had a loss or gradient that was not finite and were skipped. Lower "
        "optimizer.learning_rate, set optimizer.clip_norm (1.0 is common) or raise optimizer.warmup_steps; the newest "
        "checkpoint is from before."
    )
    assert len(said) == 1
