"""The devices of this machine that a run of a config would use, found without TensorFlow."""

from typing import NamedTuple

from trainer.config.settings import Config
from trainer.hardware.cuda import Driver, read_driver
from trainer.hardware.data_sheets import GPUS
from trainer.hardware.devices import Target, cpu, find_gpu


class OwnDevices(NamedTuple):
    """The devices of this machine that a run of a config would use.

    Attributes:
        target: the devices; None: the plan cannot know them.
        why: what the reader has to know about the choice, if anything.
    """

    target: Target | None
    why: str = ""


def own_devices(config: Config, driver: Driver | None = None) -> OwnDevices:
    """Returns the devices of this machine that a run of a config would use: with distribution.kind "auto" the GPUs that
    the driver shows, otherwise the CPU. None if a split is for several devices, and this machine has one: such a config
    is written for another machine.

    Args:
        config: the run's configuration.
        driver: what NVIDIA's driver tells; None: it is asked.
    """
    found, distribution = _own_devices(config, driver), config.distribution
    is_single = found.target is not None and found.target.num_devices == 1
    if is_single and distribution.shard != "nothing" and distribution.kind != "cpu":
        return OwnDevices(
            None,
            f"this machine has one device for the run ({found.target}), and distribution.shard={distribution.shard!r} "
            f"splits over several; {_WANTS}",
        )
    return found


_WANTS = "--target adds memory and time, such as --target gpu:H100x8, tpu:v5e-8 or cpu"


def _own_devices(config: Config, driver: Driver | None) -> OwnDevices:
    distribution = config.distribution
    kind, chosen = distribution.kind, distribution.gpus
    if kind == "cpu" or distribution.logical_devices > 1:
        return OwnDevices(cpu(distribution.logical_devices))
    driver = driver or read_driver() if kind in ("auto", "gpu") else None
    names = [gpu.name for gpu in driver.gpus] if driver else []
    if kind == "auto" and chosen is None and not names:
        return OwnDevices(cpu())
    names = [names[number] for number in chosen if number < len(names)] if chosen is not None else names
    if not names or (chosen is not None and len(names) < len(chosen)):
        return OwnDevices(None, f"distribution.kind={kind!r} does not name one; {_WANTS}")
    gpus = [find_gpu(name) for name in names]
    if gpus[0] is None or any(gpu != gpus[0] for gpu in gpus):
        differ = "GPUs differ" if all(gpus) else "table of devices lacks a GPU of this machine"
        return OwnDevices(None, f"the {differ}: {', '.join(sorted(set(names)))}; {_WANTS}")
    why = f"{len(names)} x {names[0]} of this machine, which a run takes if TensorFlow can use them"
    # The driver gives cards with different memories the same name. The smallest is planned for.
    others = [f"--target {Target(gpu, len(names))}" for gpu in GPUS.values() if names[0] in gpu.known_as][1:]
    return OwnDevices(Target(gpus[0], len(names)), f"{why}; otherwise: {' or '.join([*others, '--target cpu'])}")
