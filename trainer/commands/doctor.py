"""Checks whether this machine can do what a config wants, and prints what was found and how to repair it.

`examine` and `check_up` are the lists of the checks. Each check yields findings, or none if it has nothing to look at.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.config.settings import Config, DistributionConfig, check_shard
from trainer.distributed.tpu_install import check_tpu
from trainer.distributed.workers import find_workers
from trainer.errors import UserError
from trainer.hardware.checks import Machine, check_build, check_driver, check_reach, check_support, this_machine
from trainer.hardware.devices import cpu
from trainer.hardware.library_checks import check_libraries
from trainer.hardware.unused import unused_tpu
from trainer.model.size import bytes_of_checkpoint, count_parameters
from trainer.planning.estimate import estimate_memory
from trainer.planning.plan import find_vocabulary_size, newest_prepared
from trainer.system.findings import Finding, error, ok, warning
from trainer.system.folder_checks import Need, check_space, check_writing
from trainer.system.limits import check_memory, check_open_files, check_shared_memory
from trainer.system.packages import check_packages, check_python, check_tensorflow
from trainer.system.process import call_in_new_process
from trainer.system.storage import locate
from trainer.system.terminal import quiet_import, size_of
from trainer.training.checks import may_use_gpus, need_of_run

# Python with TensorFlow, Keras and a compiled step, without the model: 0.34 GB were measured on the quickstart, beside
# mapped files, which the kernel gives up when memory runs out.
_BASE_BYTES = 0.5e9


def examine(config: Config, machine: Machine) -> Iterator[Finding]:
    """Yields what the checks find that only read: what is installed, the devices, the workers and the limits."""
    gpus, xla = config.distribution.gpus, config.train.xla
    yield from check_python(machine.packages)
    yield from check_packages(machine.packages)
    yield from check_tensorflow(machine.packages)
    yield from check_build(machine, may_use_gpus(config))
    yield from check_tpu(machine.packages, config.distribution.kind == "tpu")
    yield from check_unused_tpu(config, machine)
    if may_use_gpus(config):
        yield from check_reach(machine, config.distribution.kind == "gpu")
        yield from check_driver(machine)
        yield from check_libraries(machine, gpus, xla)
        yield from check_support(machine, gpus, xla)
        yield from check_shared_memory(len(machine.gpus(gpus)))
    yield from check_workers(config.distribution)
    yield from check_memory(host_memory(config, machine), machine.root)
    yield from check_open_files()


def run_doctor(config: Config, say: Callable[[str], None], as_json: bool = False) -> bool:
    """Prints what each check finds, and at the end whether all is well.

    Args:
        config: the settings of the run to check for.
        say: prints a line.
        as_json: whether to print a JSON list of all findings instead.

    Returns:
        Whether no check found an error.
    """
    found: list[Finding] = []
    for finding in check_up(config):
        found.append(finding)
        if not as_json:
            say(f"{finding.level:<8} {finding.check:<20} {finding.what}")
            if finding.repair:
                say(f"{'':<8} {'repair:':<20} {finding.repair}")
    errors, warnings = (sum(each.level == level for each in found) for level in ("error", "warning"))
    if as_json:
        say(json.dumps([each._asdict() for each in found], indent=2))
    elif errors or warnings:
        say(f"{_count(errors, 'error')}, {_count(warnings, 'warning')}.")
    else:
        say("All is well.")
    return not errors


def check_up(config: Config) -> Iterator[Finding]:
    """Yields what all checks find: those that only read, and those that write into the folders and use the devices."""
    faults: set[str] = set()
    for finding in examine(config, this_machine()):
        faults.update({finding.check} if finding.level == "error" else ())
        yield finding
    yield from check_folders(config)
    # TensorFlow would end the process, for a reason that is known by now.
    if not faults & {"code", "TensorFlow", "TPU"}:
        yield from check_devices(config)


def check_unused_tpu(config: Config, machine: Machine) -> Iterator[Finding]:
    """Reports a TPU that the config does not use."""
    if config.distribution.kind == "auto" and (why := unused_tpu(machine.root)):
        what, _, remedy = why.partition(". ")
        yield warning("TPU", what, remedy)


def check_workers(config: DistributionConfig) -> Iterator[Finding]:
    """Checks TF_CONFIG, and what SLURM sets for the tasks of a step."""
    try:
        with quiet_import():
            workers = find_workers(config)
    except UserError as cause:
        what, _, remedy = str(cause).partition(". ")
        yield error("workers", what, remedy)
        return
    if workers.are_several:
        yield ok("workers", f"{len(workers.addresses)} workers; this is {workers.name(workers.number)}")


def host_memory(config: Config, machine: Machine) -> float:
    """Returns about how many bytes of this host's memory a run needs."""
    try:
        vocabulary_size = find_vocabulary_size(config)
    except UserError:  # The text decides it, and is not prepared yet.
        return _BASE_BYTES
    # Saving copies the weights and the moments to the host.
    need = _BASE_BYTES + bytes_of_checkpoint(config, vocabulary_size)
    distribution = config.distribution
    takes_gpus = may_use_gpus(config) and bool(machine.gpus())
    if distribution.kind in ("auto", "cpu", "multi_worker") and not takes_gpus:
        num_workers = 1
        with contextlib.suppress(UserError), quiet_import():  # check_workers reports it.
            num_workers = len(find_workers(distribution).addresses) or 1
        target = cpu(distribution.logical_devices * num_workers)
        with contextlib.suppress(UserError):  # The batch cannot be spread over them, which training reports.
            need += distribution.logical_devices * sum(estimate_memory(config, vocabulary_size, target).values())
    if distribution.kind == "tpu" and distribution.shard == "weights" and config.samples.samplers:
        need += 4 * count_parameters(config, vocabulary_size)  # The chief gathers the model there to write samples.
    return need


def check_folders(config: Config) -> Iterator[Finding]:
    """Checks the folders that a run writes into."""
    run_folder, prepared_folder = locate(config.run_folder), locate(config.data.prepared_folder)
    try:
        vocabulary_size = find_vocabulary_size(config)
    except UserError:
        vocabulary_size = None
    needs = [(run_folder, need_of_run(config, run_folder, vocabulary_size))]
    if (ready := _prepared_already(config)) is not None:
        yield ok("data.prepared_folder", f"{ready}: the text is prepared already")
    else:
        needs.append((prepared_folder, need_of_text(config)))
    for folder, need in needs:
        found = list(check_writing(folder, need))
        yield from found
        if all(each.level != "error" for each in found):
            yield from check_space(folder, need)


def _prepared_already(config: Config) -> Path | None:
    """Returns the folder that the config's text was prepared to on this machine's disks; None if it is still to do."""
    try:
        prepared = newest_prepared(config)
    except (OSError, UserError):
        return None
    return None if prepared is None else prepared.folder


def need_of_text(config: Config) -> Need:
    """Returns what the prepared text needs of its folder's disk at most: twice the plain text files."""
    size = 0.0
    for source in config.data.train:
        # What cannot be read is reported when the text is opened.
        with contextlib.suppress(OSError, UserError):
            file = locate(source)
            size += 2.0 * file.stat().st_size if isinstance(file, Path) and file.is_file() else 0.0
    return Need("data.prepared_folder", size, size / 4, "the prepared text, at most twice the text")


def check_devices(config: Config) -> Iterator[Finding]:
    """Computes on the devices, and adds up an array over them, in a process of its own. Checks that there are several
    if distribution.shard splits something.
    """
    try:
        kind, count, is_right, num_bytes, secs = call_in_new_process(_compute, config.distribution)
    except Exception as cause:
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        yield _failed(lines[0])
        return
    if not is_right:
        yield error(
            "devices",
            f"{count} x {kind} computed a wrong product or sum",
            "A device, or what connects them, is damaged: try each alone, with 'distribution.gpus=[0]' and so on",
        )
    elif count == 1:
        yield ok("devices", f"1 x {kind} computes; there is no other one to add up gradients with")
    else:
        yield ok("devices", f"{count} x {kind} add up {size_of(num_bytes)} at {size_of(num_bytes / secs)}/s")
    yield from check_split(config, count)


def check_split(config: Config, num_devices: int) -> Iterator[Finding]:
    """Checks that distribution.shard has several replicas to split over.

    Args:
        config: the settings of the run.
        num_devices: this worker's devices.
    """
    with contextlib.suppress(UserError):  # check_workers reports it.
        with quiet_import():
            num_workers = len(find_workers(config.distribution).addresses)
        try:
            check_shard(config, num_devices * num_workers)
        except UserError as cause:
            what, _, remedy = str(cause).partition("; ")
            yield error("distribution.shard", what, remedy[0].upper() + remedy[1:].rstrip("."))


def _failed(reason: str) -> Finding:
    if "SIGALRM" in reason:  # The process sets it as its own limit.
        return error(
            "devices",
            "a small computation had no end: a device, or its exchange with the others, does not answer",
            "See where it waits: NCCL_DEBUG=INFO trainer doctor; try one GPU alone, with 'distribution.gpus=[0]'",
        )
    what = f"a small computation failed: {reason[:300].rstrip('.')}"
    return error("devices", what, "See what TensorFlow printed before; on the CPU: distribution.kind=cpu")


def _compute(config: DistributionConfig) -> tuple[str, int, bool, int, float]:
    """Returns the fields of an `Exchange` as they are: to unpickle an Exchange would load TensorFlow."""
    with quiet_import():
        from trainer.distributed.all_reduce import measure_all_reduce
    seen = measure_all_reduce(config)
    return seen.kind, seen.num_replicas, seen.is_right, seen.num_bytes, seen.secs


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number or 'no'} {what}s"
