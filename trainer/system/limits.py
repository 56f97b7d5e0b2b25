"""Checks of the limits that a container, a scheduler or a shell sets for a process."""

import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.system.findings import Finding, error, ok, warning
from trainer.system.machine import read_line
from trainer.system.terminal import size_of

# A run of the quickstart has 13 files open at most, and maps the shards of its data. macOS allows 256.
_LEAST_FILES = 128
# NCCL exchanges gradients between GPUs through it, and Docker gives a container 64 MB. Source: NCCL's guide,
# troubleshooting.
_LEAST_SHARED_BYTES = 256e6


class Limit(NamedTuple):
    """The memory that this process may use.

    Attributes:
        memory_bytes: the memory.
        by: what limits it: "the cgroup ..." or "this machine".
    """

    memory_bytes: int
    by: str


def memory_limit(root: Path = Path("/")) -> Limit | None:
    """Returns the least of this machine's memory and of the limits of this process's cgroups; None if nothing tells.

    Args:
        root: the root of the file system; tests pass another one.
    """
    limits = []
    if found := re.search(r"^MemTotal:\s*(\d+) kB", read_line(root / "proc/meminfo"), re.MULTILINE):
        limits.append(Limit(int(found[1]) * 1024, "this machine"))
    for line in read_line(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            home, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            home, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # The limit of every group above applies, too. In a container the group itself may be the root.
        own = home / path.lstrip("/")
        for folder in (own, *own.parents):
            if (text := read_line(folder / name)).isdecimal():
                limits.append(Limit(int(text), f"the cgroup {path}"))
            if folder == home:
                break
    return min(limits, default=None)


def check_memory(need_bytes: float, root: Path = Path("/")) -> Iterator[Finding]:
    """Checks that this process may use as much memory as a run needs.

    Args:
        need_bytes: what the run needs of the host's memory, by an estimate.
        root: the root of the file system.
    """
    limit = memory_limit(root)
    if limit is None:
        return
    if limit.memory_bytes >= need_bytes:
        yield ok("memory", f"{size_of(limit.memory_bytes)} by {limit.by}; the run needs about {size_of(need_bytes)}")
        return
    needed = f"{need_bytes * 1.2 / 1e9:.0f}" if need_bytes > 2e9 else f"{need_bytes * 1.2 / 1e9:.1f}"
    yield error(
        "memory",
        f"{limit.by} allows {size_of(limit.memory_bytes)}, and the run needs about {size_of(need_bytes)}",
        f"Allow more (docker run --memory={needed}g; sbatch --mem={float(needed) * 1024:.0f}M; resources.limits.memory "
        "of a pod), or need less: a smaller train.micro_batch_size, train.recompute=blocks",
    )


def check_open_files(limits: tuple[int, int] | None = None) -> Iterator[Finding]:
    """Checks that this process may open enough files.

    Args:
        limits: the limit of this process, and the limit to which it may be raised; None: the system's answer.
    """
    allowed, most = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= allowed < _LEAST_FILES:
        to = 4096 if most < 0 else min(4096, most)
        yield warning(
            "open files",
            f"this process may open only {allowed} files at a time, and a run can need {_LEAST_FILES}",
            f"Raise it in the shell that starts the run: ulimit -n {to}",
        )


def check_shared_memory(num_gpus: int, shared_bytes: int | None = None) -> Iterator[Finding]:
    """Checks that several GPUs can exchange gradients through shared memory.

    Args:
        num_gpus: the GPUs that the run uses on this host.
        shared_bytes: the size of /dev/shm; None: the system's answer.
    """
    if num_gpus < 2:
        return
    if shared_bytes is None:
        try:
            shared_bytes = shutil.disk_usage("/dev/shm").total
        except OSError:
            return
    if shared_bytes < _LEAST_SHARED_BYTES:
        yield error(
            "shared memory",
            f"/dev/shm has {size_of(shared_bytes)}, and NCCL exchanges the gradients of {num_gpus} GPUs through it",
            "Start the container with: docker run --shm-size=1g; or, for a pod, mount an emptyDir with medium: Memory "
            "at /dev/shm",
        )
