"""What is checked before a run: that takes milliseconds and needs no device. `trainer doctor` checks more, in the same
words.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.hardware.checks import Machine, check_driver, check_reach, check_support, this_machine
from trainer.hardware.cuda import first_cuda_of, support_of
from trainer.hardware.library_checks import check_libraries
from trainer.model.size import bytes_of_checkpoint, num_checkpoints
from trainer.system.findings import Finding
from trainer.system.folder_checks import Need, check_space
from trainer.system.limits import check_open_files, check_shared_memory
from trainer.system.packages import check_packages, check_tensorflow, required_by_trainer
from trainer.system.storage import Location, locate
from trainer.system.terminal import Say, size_of

# A run that fails one of these fails for certain; others are reported, and tried.
_REFUSED = ("code", "run_folder")


def check_start(config: Config, say: Say, saves: bool = True) -> None:
    """Checks that a run can begin, and prints a line for each thing that may keep it from working.

    Args:
        config: the run's configuration.
        say: prints a line.
        saves: whether this process will write checkpoints.

    Raises:
        UserError: the run would fail.
    """
    for finding in quick_checks(config, this_machine(required_by_trainer()), saves):
        if finding.level == "error" and finding.check in _REFUSED:
            raise UserError(f"{finding}")
        if finding.level != "ok":
            say(f"warning: {finding}")


def quick_checks(config: Config, machine: Machine, saves: bool = True) -> Iterator[Finding]:
    """Yields what the checks find that take milliseconds."""
    yield from check_packages(machine.packages, deep=False)
    yield from check_tensorflow(machine.packages)
    if may_use_gpus(config):
        seen = _seen_by_tensorflow(machine)
        yield from check_support(seen, config.distribution.gpus, config.train.xla)
        yield from check_shared_memory(len(seen.gpus(config.distribution.gpus)))
    yield from check_open_files()
    if saves:
        run_folder = locate(config.run_folder)
        yield from check_space(run_folder, need_of_run(config, run_folder, config.vocabulary_size()))


def may_use_gpus(config: Config) -> bool:
    """Whether a run takes the GPUs of its machine if there are any."""
    distribution = config.distribution
    return distribution.kind in ("gpu", "multi_worker") or (
        distribution.kind == "auto" and distribution.logical_devices == 1
    )


def need_of_run(config: Config, folder: Location, vocabulary_size: int | None) -> Need:
    """Returns what a run needs of its folder's disk: room for the checkpoints that are not there yet.

    Args:
        config: the run's configuration.
        folder: the run's folder.
        vocabulary_size: the number of tokens; None: it is not known, and neither is the need.
    """
    if vocabulary_size is None:
        return Need("run_folder")
    count, size = num_checkpoints(config), bytes_of_checkpoint(config, vocabulary_size)
    there = 0
    if isinstance(folder, Path) and folder.is_dir():
        there = sum(file.stat().st_size for file in (folder / "checkpoints").glob("*/*") if file.is_file())
    room = max(0.0, count * size - there)
    what = f"{count} checkpoints of {size_of(size)}"
    return Need("run_folder", room, min(size, room), what, "set a smaller checkpoint.keep_last")


def _seen_by_tensorflow(machine: Machine) -> Machine:
    """Returns the machine with only the GPUs that TensorFlow takes. It leaves out GPUs that are too old for it, and all
    if a library is missing; the line about unused GPUs is printed when the devices are open.
    """
    build, driver = machine.build, machine.driver
    if build is None or driver is None:
        return machine
    looks = (check_reach(machine), check_driver(machine), check_libraries(machine, xla="off"))
    is_usable = all(finding.level != "error" for finding in itertools.chain(*looks))
    seen = [
        gpu
        for gpu in driver.gpus
        if is_usable and (support_of(build, gpu.capability).runs or first_cuda_of(gpu.capability) is not None)
    ]
    return dataclasses.replace(machine, driver=driver._replace(gpus=tuple(seen)))
