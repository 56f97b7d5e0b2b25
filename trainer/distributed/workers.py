"""Finds the workers of a run, and which of them this process is, by TF_CONFIG or SLURM."""

import ipaddress
import json
import os
import re
from typing import Any, NamedTuple

from trainer.config.settings import DistributionConfig
from trainer.errors import UserError

# Ports below those that Linux gives to outgoing connections.
_SLURM_FIRST_PORT = 10_000
_SLURM_NUM_SLOTS = 200
_SLURM_PORTS_PER_SLOT = 100
_SLURM_ADVICE = "Start the workers with srun, as scripts/launch/slurm does, or set TF_CONFIG on each."


# How errors of TensorFlow's collectives name other workers, and reasons.
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
    """The workers of a run, and which of them this process is.

    Attributes:
        addresses: the host:port of each worker, if there are several; the chief comes first.
        number: the place of this process in addresses; the chief has number 0.
    """

    addresses: tuple[str, ...] = ("this process",)
    number: int = 0

    @property
    def is_chief(self) -> bool:
        """Whether this worker is the one that writes the logs, samples and checkpoints."""
        return self.number == 0

    @property
    def are_several(self) -> bool:
        """Whether there are other workers, which have to take every step together with this one."""
        return len(self.addresses) > 1

    def name(self, number: int) -> str:
        """Returns the name of a worker in messages."""
        return f"worker {number} ({self.addresses[number]})"


def find_workers(config: DistributionConfig) -> Workers:
    """Returns the workers of a run. If there are several, TF_CONFIG names them.

    In a SLURM step of several tasks this sets TF_CONFIG, if it is not set: TensorFlow reads it, too.

    Raises:
        UserError: TF_CONFIG or a variable of SLURM is missing or not right, or the config names GPUs, which is only
            possible on a single machine.
    """
    if config.kind not in ("auto", "multi_worker"):
        return Workers()
    if not os.environ.get("TF_CONFIG") and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        os.environ["TF_CONFIG"] = slurm_tf_config()
    text = os.environ.get("TF_CONFIG", "")
    # Some platforms set TF_CONFIG without a cluster for a single process; TensorFlow takes it the same way.
    if config.kind == "auto" and not (text and _parse(text).get("cluster")):
        return Workers()
    workers = read_tf_config(text)
    if "chief" in _parse(text)["cluster"]:
        os.environ["TF_CONFIG"] = _tf_config_of(workers)  # TensorFlow would number the other workers from 0, too.
    if workers.are_several and config.gpus is not None:
        raise UserError(
            f"distribution.gpus={list(config.gpus)} cannot be used with the {len(workers.addresses)} workers of "
            "TF_CONFIG: each worker uses all GPUs it sees. Leave it out and set CUDA_VISIBLE_DEVICES on each worker, "
            "or choose distribution.kind='gpu' to use only this machine."
        )
    return workers


def slurm_tf_config() -> str:
    """Returns the TF_CONFIG of this task of a SLURM step, whose tasks are the workers.

    Raises:
        UserError: a variable that srun sets is missing or not right.
    """
    import tensorflow as tf

    num_tasks, job, local_id = map(_slurm_number, ("SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_LOCALID"))
    _slurm_number("SLURM_PROCID")
    # Jobs that share a node need different ports, and the tasks of a job must agree on them before they can connect.
    # The ids of jobs that run at the same time are close to each other, so the jobs get different slots of ports.
    port_base = _SLURM_FIRST_PORT + job % _SLURM_NUM_SLOTS * _SLURM_PORTS_PER_SLOT
    try:
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=port_base,
            # SLURM assigns the GPUs. With its defaults the resolver would count them with nvidia-smi, fail if there are
            # fewer GPUs than tasks, and overwrite the CUDA_VISIBLE_DEVICES that SLURM has set for this task.
            gpus_per_node=num_tasks,
            gpus_per_task=1,
            auto_set_gpu=False,
        )
        workers = resolver.cluster_spec().as_dict()["worker"]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{_slurm_values('SLURM_STEP_NUM_TASKS', 'SLURM_STEP_NODELIST', 'SLURM_STEP_TASKS_PER_NODE')} do not "
            f"show where the tasks run: {error}. {_SLURM_ADVICE}"
        ) from None
    # Do not use SLURM_PROCID: the resolver sorts nodes as text, node10 before node9, and SLURM may number tasks
    # otherwise.
    own = f"{os.environ.get('SLURMD_NODENAME')}:{port_base + local_id}"
    if own not in workers:
        raise UserError(
            f"{_slurm_values('SLURMD_NODENAME', 'SLURM_LOCALID')} is not one of the tasks that SLURM_STEP_NODELIST and "
            f"SLURM_STEP_TASKS_PER_NODE name, {', '.join(workers)}. {_SLURM_ADVICE}"
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
    """Reads TF_CONFIG, the environment variable with the addresses of all workers and the number of this one.

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
        allowed = f"a number from 0 to {len(own) - 1}" if own else f"the index of a {task['type']} in the cluster"
        raise UserError(f"TF_CONFIG: task.index={_start_of(index)} must be {allowed}. {_TF_CONFIG_ADVICE}")
    return Workers(workers, index if task["type"] == "chief" else len(chiefs) + index)


def _tf_config_of(workers: Workers) -> str:
    return json.dumps({"cluster": {"worker": workers.addresses}, "task": {"type": "worker", "index": workers.number}})


def describe_loss(message: str, workers: Workers) -> str | None:
    """Returns which workers were lost, and why, from an error of TensorFlow's collectives; None if no worker was lost.

    Args:
        message: the error's message. A worker quotes the message of the worker from which it learned of the loss, so
            the innermost message, which comes last, names the lost worker.
        workers: the workers of the run.
    """
    if not workers.are_several:
        return None
    _, is_listed, listed = message.rpartition("tasks are unhealthy")
    found = _TASK.findall(listed) if is_listed else _REMOTE_TASK.findall(message)[-1:] or _TASK_DOWN.findall(message)
    if not found and "coordination" in message.lower():
        found = ["0"]  # The service that counts heartbeats runs in the chief.
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
        "its process was stopped or killed, for example because memory ran out."
    )


def split_address(address: str) -> tuple[str, int]:
    """Returns the host and the port of host:port. The host is in small letters and without the brackets of IPv6.

    Raises:
        ValueError: the address is not host:port.
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif not host or not host.isascii() or set(host) & set(":/@[]") or not host.isprintable() or " " in host:
        raise ValueError(f"{address!r} has no host")
    host.encode("idna")  # Looking up the name does the same. It refuses parts that are empty or too long.
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
    # With distribution.kind='auto' each worker would otherwise train by itself.
    if "sparseCluster" in parsed:
        raise _not_right(
            text,
            "has a sparseCluster, which names only some workers; Kubeflow writes it if a TFJob has "
            "enableDynamicWorker, so leave that out",
        )
    return parsed


def _not_right(text: str, fault: str) -> UserError:
    return UserError(f"TF_CONFIG={_start_of(text)} {fault}. {_TF_CONFIG_ADVICE}")


def _start_of(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = "..."
    return text if len(text) <= 300 else f"{text[:300]}..."
