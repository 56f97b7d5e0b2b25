"""The processes of a run on several hosts: who they are, and that they agree before TensorFlow joins them.

TensorFlow waits for a missing worker for ever, and a worker with another config would hang or corrupt the others. So
they first talk in plain TCP: the first worker listens at its own address of TF_CONFIG, the others report to it, and all
get the same verdict.
"""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

from trainer.config import DistributionConfig, UserError

TIMEOUT_SECS = 45.0
TIMEOUT_VARIABLE = "TRAINER_MEETING_SECS"
_RETRY_SECS = 0.2
# A worker says at once who it is.
_GREETING_SECS = 5.0
_MAX_MESSAGE_BYTES = 1_000_000

# Below the ports that Linux gives to outgoing connections.
_SLURM_FIRST_PORT = 10_000
_SLURM_NUM_SLOTS = 200
_SLURM_PORTS_PER_SLOT = 100
_SLURM_ADVICE = "Start the workers with srun, as scripts/slurm_train does, or set TF_CONFIG on each."

Facts = Mapping[str, str]


class Hosts(NamedTuple):
    """The processes of a run: host:port of each, where there are several, and which of them this is."""

    workers: tuple[str, ...] = ("this process",)
    number: int = 0

    @property
    def is_chief(self) -> bool:
        """Whether this one writes the logs, samples and checkpoints."""
        return self.number == 0

    @property
    def are_several(self) -> bool:
        """Whether others have to take every step with this one."""
        return len(self.workers) > 1


def find_hosts(config: DistributionConfig) -> Hosts:
    """Returns the processes of the run, by TF_CONFIG where several are meant.

    In a SLURM step of several tasks TF_CONFIG is set here, where nobody has: TensorFlow reads it too.

    Raises:
        UserError: TF_CONFIG or a variable of SLURM's is missing or not right, or config names GPUs, which are one
            machine's.
    """
    if config.kind not in ("auto", "multi_worker"):
        return Hosts()
    if "TF_CONFIG" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        os.environ["TF_CONFIG"] = slurm_tf_config()
    if config.kind == "auto" and "TF_CONFIG" not in os.environ:
        return Hosts()
    hosts = read_tf_config(os.environ.get("TF_CONFIG"))
    if hosts.are_several and config.gpus is not None:
        raise UserError(
            f"distribution.gpus={list(config.gpus)} does not go with the {len(hosts.workers)} workers of TF_CONFIG, "
            "each of which uses all GPUs it sees; leave it out and set CUDA_VISIBLE_DEVICES on each, or choose "
            "distribution.kind='gpu' to use this machine alone."
        )
    return hosts


def slurm_tf_config() -> str:
    """Returns the TF_CONFIG of this task of a SLURM step; its tasks are the workers.

    Raises:
        UserError: a variable that srun sets is missing or not right.
    """
    import tensorflow as tf

    num_tasks, job, local_id = map(_slurm_number, ("SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_LOCALID"))
    _slurm_number("SLURM_PROCID")
    # Jobs that share a node need ports of their own, and a job's tasks have to know each other's before they can talk:
    # ids of jobs that run together are close to each other, so they fall into different slots.
    port_base = _SLURM_FIRST_PORT + job % _SLURM_NUM_SLOTS * _SLURM_PORTS_PER_SLOT
    try:
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=port_base,
            # GPUs are SLURM's to share out. Left alone, the resolver would count them with nvidia-smi, fail where there
            # are none or fewer than tasks, and write over the CUDA_VISIBLE_DEVICES that SLURM gave this task.
            gpus_per_node=num_tasks,
            gpus_per_task=1,
            auto_set_gpu=False,
        )
        workers = resolver.cluster_spec().as_dict()["worker"]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{_slurm_values('SLURM_STEP_NUM_TASKS', 'SLURM_STEP_NODELIST', 'SLURM_STEP_TASKS_PER_NODE')} do not say "
            f"where the tasks run: {error}. {_SLURM_ADVICE}"
        ) from None
    # Not by SLURM_PROCID: the resolver sorts nodes as text, node10 before node9, and SLURM counts tasks as it likes.
    own = f"{os.environ.get('SLURMD_NODENAME')}:{port_base + local_id}"
    if own not in workers:
        raise UserError(
            f"{_slurm_values('SLURMD_NODENAME', 'SLURM_LOCALID')} is none of the tasks that SLURM_STEP_NODELIST and "
            f"SLURM_STEP_TASKS_PER_NODE tell of, {', '.join(workers)}. {_SLURM_ADVICE}"
        )
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": workers.index(own)}})


def _slurm_number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{_slurm_values(name)} must be a number. {_SLURM_ADVICE}")
    return int(text)


def _slurm_values(*names: str) -> str:
    return ", ".join(f"{name}={os.environ[name]!r}" if name in os.environ else f"{name} (not set)" for name in names)


def read_tf_config(text: str | None) -> Hosts:
    """Reads TF_CONFIG, the environment variable that tells a worker who it is and where the others are.

    Raises:
        UserError: it is missing or not right.
    """
    example = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'
    advice = (
        f"Set it on every worker, as in {example}, or start the workers with scripts/launch_local, scripts/slurm_train "
        "or scripts/kubernetes_job."
    )
    if not text:
        raise UserError(f"distribution.kind='multi_worker', but TF_CONFIG is not set. {advice}")
    try:
        parsed = json.loads(text)
        workers, task = parsed["cluster"]["worker"], parsed["task"]
        index, kind = task["index"], task["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"TF_CONFIG={text!r} is not what it should be ({error!r}). {advice}") from None
    right = isinstance(workers, list) and workers and all(isinstance(w, str) and ":" in w for w in workers)
    if not right or len(set(workers)) != len(workers):
        raise UserError(
            f"TF_CONFIG: cluster.worker={workers!r} must list a different host:port for each worker. {advice}"
        )
    if kind != "worker" or set(parsed["cluster"]) != {"worker"}:
        raise UserError(f"TF_CONFIG={text!r} has a task that is no worker; trainer runs on workers alone. {advice}")
    if not isinstance(index, int) or not 0 <= index < len(workers):
        raise UserError(f"TF_CONFIG: task.index={index!r} must be a number from 0 to {len(workers) - 1}. {advice}")
    return Hosts(tuple(workers), index)


def meeting_secs() -> float:
    """Returns how long workers wait for each other; longer where TRAINER_MEETING_SECS says that they come far apart.

    Raises:
        UserError: that is no number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is not None and not (text.isdecimal() and int(text)):
        raise UserError(f"{TIMEOUT_VARIABLE}={text!r} must be a whole number of seconds, such as 600.")
    return TIMEOUT_SECS if text is None else float(text)


def meet(workers: Sequence[str], index: int, facts: Callable[[], Facts], timeout_secs: float | None = None) -> None:
    """Returns once all workers are there and agree.

    Args:
        workers: host:port of each.
        index: which of them this is.
        facts: what must be the same on all, by name; called when all are there, and may take as long as it likes.
        timeout_secs: how long to wait for the others to come; left out, `meeting_secs`.

    Raises:
        UserError: a worker does not come, goes away, fails or differs. Every worker that is there raises.
    """
    if timeout_secs is None:
        timeout_secs = meeting_secs()
    if len(workers) == 1:
        facts()
    elif index == 0:
        _lead(workers, facts, timeout_secs)
    else:
        _follow(workers, index, facts, timeout_secs)


def _lead(workers: Sequence[str], facts: Callable[[], Facts], timeout_secs: float) -> None:
    deadline = time.monotonic() + timeout_secs
    lines: dict[int, _Line] = {}
    host, _, port = workers[0].rpartition(":")
    try:
        # On all interfaces: the name that others know this host by need not be one of its own.
        listener = socket.create_server(("", int(port)))
    except OSError as error:
        raise UserError(f"TF_CONFIG: this worker cannot listen at its address {host}:{port}: {error}.") from None
    problem: str | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        while len(lines) < len(workers) - 1:
            secs_left = deadline - time.monotonic()
            if secs_left <= 0:
                missing = [f"{i} ({workers[i]})" for i in range(1, len(workers)) if i not in lines]
                problem = (
                    f"worker {', '.join(missing)} did not come within {timeout_secs:.0f} s. Start every worker that "
                    "TF_CONFIG lists, each with its own task.index."
                )
                break
            listener.settimeout(secs_left)
            try:
                connection, _ = listener.accept()
            except OSError:
                continue
            line = _Line(connection)
            # Somebody who is no worker may knock, and say nothing.
            try:
                number = int(line.receive(min(_GREETING_SECS, secs_left))["index"])
            except (OSError, ValueError, TypeError, KeyError, OverflowError):
                line.close()
                continue
            lines[number] = stack.enter_context(line)
        if problem is None:
            _tell(lines, {})
            problem = _compared(lines, facts, workers)
        _tell(lines, {"problem": problem})
    if problem is not None:
        raise UserError(problem)


def _compared(lines: "dict[int, _Line]", facts: Callable[[], Facts], workers: Sequence[str]) -> str | None:
    try:
        own = dict(facts())
    except Exception as error:
        _tell(lines, {"problem": f"worker 0 ({workers[0]}) failed: {error}"})
        raise
    for number, line in sorted(lines.items()):
        try:
            answer = line.receive(None)
        except (OSError, ValueError):
            return f"worker {number} ({workers[number]}) went away before the start; see what it said."
        if "error" in answer:
            return f"worker {number} ({workers[number]}) failed: {answer['error']}"
        for name, value in own.items():
            if answer["facts"].get(name) != value:
                return (
                    f"{name} differs: worker {number} ({workers[number]}) has {answer['facts'].get(name)}, worker 0 "
                    f"has {value}. Start every worker with the same config, on the same text."
                )
    return None


def _follow(workers: Sequence[str], index: int, facts: Callable[[], Facts], timeout_secs: float) -> None:
    host, _, port = workers[0].rpartition(":")
    deadline = time.monotonic() + timeout_secs
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=max(0.01, deadline - time.monotonic()))
            if connection.getsockname() != connection.getpeername():
                break
            # Where nobody listens yet and the port is one for outgoing connections, it can meet itself. Closed at once,
            # as a port that lingers could not be listened at.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"worker 0 ({workers[0]}) could not be reached within {timeout_secs:.0f} s: {error}. Start every "
                    "worker that TF_CONFIG lists, and let them reach each other's ports."
                ) from None
            time.sleep(_RETRY_SECS)
    with _Line(connection) as line:
        _ask(line, workers, {"index": index}, timeout_secs + 10)
        try:
            own = dict(facts())
        except Exception as error:
            with contextlib.suppress(OSError):
                line.send({"error": str(error)})
            raise
        _ask(line, workers, {"facts": own}, None)


def _ask(line: "_Line", workers: Sequence[str], message: Mapping[str, object], timeout_secs: float | None) -> None:
    """Sends something to the first worker and waits for its verdict."""
    try:
        line.send(message)
        answer = line.receive(timeout_secs)
    except (OSError, ValueError):
        raise UserError(f"worker 0 ({workers[0]}) went away before the start; see what it said.") from None
    if answer.get("problem"):
        raise UserError(answer["problem"])


def _tell(lines: "dict[int, _Line]", message: Mapping[str, object]) -> None:
    for line in lines.values():
        try:
            line.send(message)
        except OSError:
            continue  # It is gone, and whoever reads its answer learns so.


class _Line:
    """A connection that carries a JSON object per line."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rwb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._connection.close()

    def send(self, message: Mapping[str, object]) -> None:
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()

    def receive(self, timeout_secs: float | None) -> dict:
        self._connection.settimeout(timeout_secs)
        text = self._file.readline(_MAX_MESSAGE_BYTES)
        if not text:
            raise ConnectionError("the connection was closed")
        return json.loads(text)
