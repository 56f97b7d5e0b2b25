#!/usr/bin/env python3
"""Runs a command as several workers on this machine: to rehearse a run on several hosts, or one per group of GPUs.

    scripts/launch/local.py -n 3 trainer train configs/quickstart.toml train.global_batch_size=33

Each worker gets its own TF_CONFIG, and all get the same TRAINER_MEETING_SECRET. A worker's lines are prefixed with its
number. When a worker fails, the others are stopped; then this program prints how each worker ended, and exits with the
status of the first that failed. It passes SIGINT, SIGTERM and SIGHUP on to all workers. With --dry-run it prints the
workers' commands and starts nothing.
"""

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# scripts/quickstart and scripts/test install here.
VENV_PROGRAMS = Path(__file__).resolve().parents[2] / ".venv" / "bin"

GRACE_SECS = 30.0
TOGETHER_SECS = 5.0


def free_ports(count: int) -> list[int]:
    """Returns ports that no process listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def tf_config(index: int, workers: list[str]) -> str:
    """Returns the TF_CONFIG of a worker."""
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})


class Worker:
    """A worker's process, and the thread that prints its lines."""

    def __init__(self, command: list[str], index: int, workers: list[str]) -> None:
        self.index = index
        os.environ.setdefault("TRAINER_MEETING_SECRET", secrets.token_hex(16))
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "TF_CONFIG": tf_config(index, workers), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # In the same session Ctrl-C would reach the workers twice, and the second signal kills a run.
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._pass_on, daemon=True)
        self.reader.start()

    def is_running(self) -> bool:
        """Returns whether the process has not ended yet."""
        return self.process.poll() is None

    def describe(self) -> str:
        """Returns how the process ended, or that it runs or is stopped."""
        status = self.process.poll()
        if status is not None:
            return f"ended with {status}" if status >= 0 else f"was killed by {signal_name(-status)}"
        if hasattr(os, "waitid"):  # Not on macOS.
            state = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
            if state is not None:
                return f"is stopped by {signal_name(state.si_status)}"
        return "is still running"

    def _pass_on(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                print(f"[{self.index}] {line}", end="", flush=True)
            except BrokenPipeError:
                # The reader of our output is gone. The lines go to /dev/null: a worker whose pipe is full would hang.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def signal_name(number: int) -> str:
    """Returns a name such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def wait(workers: list[Worker]) -> int:
    """Waits until all workers have ended, or one has failed; returns the exit status for this program."""
    while True:
        statuses = [worker.process.poll() for worker in workers]
        if any(statuses):
            # A worker that was killed counts first: the others fail because it is gone.
            status = next((status for status in statuses if status and status < 0), next(filter(None, statuses)))
            # Workers that stop together, as after a signal, end within a short time of each other.
            deadline = time.monotonic() + TOGETHER_SECS
            while time.monotonic() < deadline and any(worker.is_running() for worker in workers):
                time.sleep(0.1)
            report(workers)
            return status if status > 0 else 128 - status
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(0.1)


def report(workers: list[Worker]) -> None:
    """Prints how each worker ended, unless all exited with the same status."""
    statuses = [worker.process.poll() for worker in workers]
    if len(set(statuses)) == 1 and (statuses[0] or 0) > 0:
        return
    # Workers that were killed or stopped come first, because the others failed for that reason.
    lines = [f"worker {worker.index} {worker.describe()}" for worker in workers]
    lines.sort(key=lambda line: " ended with " in line or " is still running" in line)
    lines = [line for line in lines if not line.endswith((" is still running", " ended with 0"))]
    if None in statuses:
        lines.append("stopping the others")
    print(f"local.py: {'; '.join(lines)}.", file=sys.stderr)


def stop(workers: list[Worker]) -> None:
    """Ends the workers that still run: by SIGTERM, and after a while by SIGKILL."""
    for worker in workers:
        if worker.is_running():
            worker.process.terminate()
            worker.process.send_signal(signal.SIGCONT)  # A stopped process does not handle SIGTERM.
    deadline = time.monotonic() + GRACE_SECS
    for worker in workers:
        try:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
            print(f"local.py: worker {worker.index} did not end within {GRACE_SECS:.0f} s: killed.", file=sys.stderr)
        worker.reader.join(10.0)


def main() -> None:
    """Reads the command line and runs the workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("-n", type=int, required=True, help="number of workers")
    parser.add_argument("--dry-run", action="store_true", help="print the workers' commands, and start nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command that each worker runs")
    options = parser.parse_args()
    if options.n < 1:
        parser.error(f"-n {options.n}: there must be at least 1 worker.")
    if not options.command:
        parser.error("name the command that each worker runs, such as: trainer train configs/quickstart.toml")
    # At the end of PATH, so that an active environment goes first.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(VENV_PROGRAMS)])
    if shutil.which(options.command[0]) is None:
        parser.error(f"{options.command[0]} is not a program on PATH or in {VENV_PROGRAMS}; write its path.")

    addresses = [f"127.0.0.1:{port}" for port in free_ports(options.n)]
    if options.dry_run:
        for index in range(options.n):
            print(shlex.join(["env", f"TF_CONFIG={tf_config(index, addresses)}", *options.command]))
        return
    workers: list[Worker] = []

    def pass_on(number: int, _: object) -> None:
        for worker in workers:
            if worker.is_running():
                worker.process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP.
            signal.signal(number, pass_on)
    try:
        for index in range(options.n):
            workers.append(Worker(options.command, index, addresses))
        status = wait(workers)
    finally:
        stop(workers)
    sys.exit(status)


if __name__ == "__main__":
    main()
