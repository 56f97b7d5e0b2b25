"""The workers of a run: reads from TF_CONFIG or SLURM which there are, and which of them this process is."""

import ipaddress
import json
import os
import re
from typing import Any, NamedTuple

from trainer.config import DistributionConfig
from trainer.errors import UserError

# Below the ports that Linux gives to outgoing connections.
_SLURM_FIRST_PORT = 10_000
_SLURM_NUM_SLOTS = 200
_SLURM_PORTS_PER_SLOT = 100
_SLURM_ADVICE = "Start the workers with srun, as scripts/launch/slurm does, or set TF_CONFIG on each."


# What errors of TensorFlow's collectives call other workers, and the reasons that they give.
_TASK = re.compile(r"/job:worker/(?:replica:0/)?task:(\d+)")
_REMOTE_TASK = re.compile(r"remote target /job:worker/replica:0/task:(\d+)")
_TASK_DOWN = re.compile(r"/job:worker/replica:0/task:(\d+) is down")
_REASON = re.compile(r"aborted by: (?!Collective ops)([^\n\\\"]+)")

_TF_CONFIG_ADVICE = (
    'Set it on every worker, as in {"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", '
    '"index": 0}}, or start the workers with scripts/launch/local.py, scripts/launch/slurm or '
    "scripts/launch/kubernetes_job.py."
)


class Workers(NamedTuple):
    """The processes of a run, and which of them this is.

    Attributes:
        addresses: the host:port of each worker, if there are several; the chief comes first.
        number: the place of this process in addresses; the chief has number 0.
    """

    addresses: tuple[str, ...] = ("this process",)
    number: int = 0

    @property
    def is_chief(self) -> bool:
        """Whether this one writes the logs, samples and checkpoints."""
        return self.number == 0

    @property
    def are_several(self) -> bool:
        """Whether others have to take every step with this one."""
        return len(self.addresses) > 1

    def name(self, number: int) -> str:
        """Returns what messages call a worker."""
        return f"worker {number} ({self.addresses[number]})"


def find_workers(config: DistributionConfig) -> Workers:
    """Returns the processes of the run, by TF_CONFIG where several are meant.

    In a SLURM step of several tasks TF_CONFIG is set here, where nobody has: TensorFlow reads it too.

    Raises:
        UserError: TF_CONFIG or a variable of SLURM's is missing or not right, or config names GPUs, which are one
            machine's.
    """
    if config.kind not in ("auto", "multi_worker"):
        return Workers()
    if not os.environ.get("TF_CONFIG") and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        os.environ["TF_CONFIG"] = slurm_tf_config()
    text = os.environ.get("TF_CONFIG", "")
    # Some platforms set a TF_CONFIG without a cluster for a process that is alone; TensorFlow reads it so, too.
    if config.kind == "auto" and not (text and _parse(text).get("cluster")):
        return Workers()
    workers = read_tf_config(text)
    if "chief" in _parse(text)["cluster"]:
        os.environ["TF_CONFIG"] = _tf_config_of(
            workers
        )  # TensorFlow would number its workers from 0 besides the chief.
    if workers.are_several and config.gpus is not None:
        raise UserError(
            f"distribution.gpus={list(config.gpus)} cannot be used with the {len(workers.addresses)} workers of "
            "TF_CONFIG: each worker uses all GPUs it sees. Leave it out and set CUDA_VISIBLE_DEVICES on each worker, "
            "or choose distribution.kind='gpu' to use only this machine."
        )
    return workers


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
    return _tf_config_of(Workers(tuple(workers), workers.index(own)))


def _slurm_number(name: str) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise UserError(f"{_slurm_values(name)} must be a number. {_SLURM_ADVICE}")
    return int(text)


def _slurm_values(*names: str) -> str:
    return ", ".join(
        f"{name}={_start_of(os.environ[name])}" if name in os.environ else f"{name} (not set)" for name in names
    )


def read_tf_config(text: str | None) -> Workers:
    """Reads TF_CONFIG, the environment variable that tells a worker who it is and where the others are.

    Raises:
        UserError: it is missing or not right.
    """
    if not text:
        raise UserError(f"distribution.kind='multi_worker', but TF_CONFIG is not set. {_TF_CONFIG_ADVICE}")
    parsed = _parse(text)
    cluster, task = parsed.get("cluster"), parsed.get("task")
    if not cluster and not task:
        raise UserError(
            f"distribution.kind='multi_worker', but TF_CONFIG={_start_of(text)} names no cluster. {_TF_CONFIG_ADVICE}"
        )
    if not isinstance(cluster, dict) or not isinstance(task, dict) or not {"type", "index"} <= task.keys():
        raise _not_right(text, "must have a cluster, and a task with type and index")
    if unknown := sorted({*cluster, str(task["type"])} - {"chief", "worker"}):
        raise _not_right(text, f"must have only workers, with or without one chief; leave out {', '.join(unknown)!r}")
    chiefs, others = cluster.get("chief", []), cluster.get("worker", [])
    for name, addresses in (("chief", chiefs), ("worker", others)):
        if not isinstance(addresses, list) or not all(map(_is_address, addresses)):
            raise UserError(
                f"TF_CONFIG: cluster.{name}={_start_of(addresses)} must list a host:port for each, such as "
                f'"10.0.0.1:2222" or "[fd00::1]:2222", with a port from 1 to 65535. {_TF_CONFIG_ADVICE}'
            )
    workers = (*chiefs, *others)
    if len(chiefs) > 1 or not workers or len({split_address(worker) for worker in workers}) < len(workers):
        raise UserError(
            f"TF_CONFIG: cluster={_start_of(cluster)} must list a different host:port for each worker, and at most one "
            f"chief. {_TF_CONFIG_ADVICE}"
        )
    own, index = (chiefs if task["type"] == "chief" else others), task["index"]
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(own):
        allowed = f"a number from 0 to {len(own) - 1}" if own else f"that of a {task['type']} in the cluster"
        raise UserError(f"TF_CONFIG: task.index={_start_of(index)} must be {allowed}. {_TF_CONFIG_ADVICE}")
    return Workers(workers, index if task["type"] == "chief" else len(chiefs) + index)


def _tf_config_of(workers: Workers) -> str:
    return json.dumps({"cluster": {"worker": workers.addresses}, "task": {"type": "worker", "index": workers.number}})


def describe_loss(message: str, workers: Workers) -> str | None:
    """Returns which workers were lost, and why, by an error of TensorFlow's collectives; None if it tells of none.

    Args:
        message: of the error. A worker that learned of the loss from another one quotes that one's message, so what is
            nested deepest, and comes last, is the origin.
        workers: the workers of the run.
    """
    if not workers.are_several:
        return None
    _, is_listed, listed = message.rpartition("tasks are unhealthy")
    found = _TASK.findall(listed) if is_listed else _REMOTE_TASK.findall(message)[-1:] or _TASK_DOWN.findall(message)
    if not found and "coordination" in message.lower():
        found = ["0"]  # The service that counts heartbeats runs in the first worker.
    lost = sorted({int(number) for number in found if int(number) < len(workers.addresses)})
    if not lost and "Collective ops is aborted" not in message:
        return None
    reasons = _REASON.findall(message)
    if is_listed or "Deadline Exceeded" in message:
        reason = "stopped answering"
    else:
        reason = f"broke its connection ({reasons[-1].split('. ')[0].strip()})" if reasons else "broke its connection"
    return (
        f"{' and '.join(map(workers.name, lost)) or 'another worker'} {reason}. See its own last lines, and whether "
        "its process was killed, for want of memory for example, or stopped."
    )


def split_address(address: str) -> tuple[str, int]:
    """Returns the host, in small letters and without the brackets of IPv6, and the port of host:port.

    Raises:
        ValueError: it is none.
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif not host or not host.isascii() or set(host) & set(":/@[]") or not host.isprintable() or " " in host:
        raise ValueError(f"{address!r} has no host")
    host.encode("idna")  # As the look-up of a name does; it refuses parts that are empty or too long.
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError(f"{address!r} has no port")
    return host.lower(), int(port)


def _is_address(address: object) -> bool:
    try:
        return isinstance(address, str) and bool(split_address(address))
    except ValueError:
        return False


def _parse(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_right(text, f"is not what it should be, JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise _not_right(text, "is not what it should be, a JSON object")
    return parsed


def _not_right(text: str, fault: str) -> UserError:
    return UserError(f"TF_CONFIG={_start_of(text)} {fault}. {_TF_CONFIG_ADVICE}")


def _start_of(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = "..."
    return text if len(text) <= 300 else f"{text[:300]}..."
