"""Targets such as tpu:v5e-8, which name devices of the table and their number."""

import difflib
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainer.config.file import whole_number
from trainer.errors import UserError
from trainer.hardware.data_sheets import GPUS, TPUS, Device
from trainer.hardware.processor import Processor, processor


class Target(NamedTuple):
    """Devices to train on, all of one kind, with one replica on each.

    Attributes:
        device: the kind of device.
        num_devices: their number.
    """

    device: Device
    num_devices: int

    def __str__(self) -> str:
        name = self.device.name
        if self.device.num_axes:
            return f"tpu:{name}-{self.num_devices * self.device.num_cores}"
        return "cpu" if name == "cpu" else f"gpu:{name}x{self.num_devices}"

    def processor(self) -> Processor:
        """Returns the kind of device that each replica is on."""
        if self.device.name == "cpu":
            return processor("CPU")
        return processor("TPU" if self.device.num_axes else "GPU")

    def topology(self) -> str:
        """Returns the arrangement of a TPU's chips, in the form that its compiler needs: v5e:2x4."""
        return f"{_LIBTPU_NAMES.get(self.device.name, self.device.name)}:{'x'.join(map(str, self._grid()))}"

    def sent_bytes_per_sec(self) -> float | None:
        """Returns how much each device can send in a second to others in its machine or slice; None if that is unknown.

        A TPU's chip has two links for each axis of the grid. It uses one if it has one neighbour there. A longer axis
        counts as a ring, in which every chip has two neighbours, although in small slices its ends are not connected.
        """
        link, num_axes = self.device.link, self.device.num_axes
        if link is None or not num_axes:
            return link and link.bytes_per_sec
        num_links = sum(min(size - 1, 2) for size in self._grid())
        return link.bytes_per_sec * num_links / (2 * num_axes)

    def _grid(self) -> list[int]:
        chips, axes = self.num_devices // self.device.per_chip, self.device.num_axes
        doublings = chips.bit_length() - 1
        sizes = sorted(2 ** ((doublings + i) // axes) for i in range(axes))
        # The four chips of a host are never in one row.
        return [2, 2, 1] if axes == 3 and chips == 4 else sizes


def parse_target(text: str) -> Target:
    """Returns the devices of a target such as cpu, tpu:v5e-8 or gpu:H100x8.

    Capitals, blanks, hyphens and makers' names do not matter, and gpu: and tpu: may be left out: "v5litepod-8",
    "8xH100", "RTX 4090", "4090x2" and the names that a driver gives a GPU are understood.

    The number after a TPU's name is the number in Google's accelerator types. It counts cores for v2, v3, v4, v5p and
    v7x, and chips for v5e and v6e, whose chips have one core.

    Raises:
        UserError: the device is not in the table, or the TPU does not come with this number.
    """
    kind, colon, name = text.lower().strip().partition(":")
    if not colon:
        kind, name = "", kind
    if (kind, name) in (("", "cpu"), ("cpu", "")):
        return cpu()
    if kind in ("", "tpu") and (tpu := _find_tpu(name)) is not None:
        return _parse_tpu(text, *tpu)
    if kind in ("", "gpu") and (gpu := _find_gpu_and_count(name)) is not None:
        return Target(*gpu)
    nearest = " or ".join(_nearest(kind, name))
    guess = f"did you mean {nearest}? Otherwise " if nearest else ""
    name = text if len(text) <= 100 else f"{text[:100]}..."
    raise UserError(f"--target {name} is unknown; {guess}{known_targets()}")


def known_targets() -> str:
    """Returns the known targets, for a message."""
    return (
        f"write gpu:NAMExCOUNT, where NAME is {', '.join(GPUS)}, as in gpu:H100x8; tpu:NAME-COUNT, where NAME is "
        f"{', '.join(TPUS)}, as in tpu:v5e-8; or cpu."
    )


def cpu(num_devices: int = 1) -> Target:
    """Returns this machine's CPU, split into this many replicas that share its memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target(Device("cpu", {}, memory / num_devices), num_devices)


def find_gpu(device_name: str) -> Device | None:
    """Returns the GPU with this name of the driver; None if it is not in the table."""
    return next((gpu for gpu in GPUS.values() if device_name in gpu.known_as), None)


def compiler_settings(target: Target) -> dict[str, Any]:
    """Returns the facts about the devices that XLA's compiler needs: the topology of a TPU, or the text of a
    GpuTargetConfigProto with the facts of one of the GPUs.
    """
    if target.device.num_axes:
        return {"topology": target.topology()}
    return {"target_config": _GPU_TARGET.format(device=target.device, **_circuits(target.device))}


# As libtpu names a TPU in a topology, if not by the name in a target.
_LIBTPU_NAMES = {"v7x": "tpu7x"}
# Further names of TPUs and GPUs, as `_plain` returns them.
_TPU_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "ironwood": "v7x", "7x": "v7x", "v7": "v7x"}
_GPU_NAMES = {"h100sxm": "H100", "h100sxm5": "H100", "h10080gb": "H100", "h200sxm": "H200", "h10094gb": "H100-NVL"}


def _plain(name: str) -> str:
    """Returns the lower-case letters and digits of a name, without its maker."""
    return re.sub("nvidia|tesla|geforce|[^a-z0-9]", "", name.lower())


def _gpu_names() -> Iterator[tuple[str, Device]]:
    """Yields every plain name of every GPU; the driver's name may be shared by several."""
    for gpu in GPUS.values():
        for name in (_plain(gpu.name), *map(_plain, gpu.known_as)):
            yield name, gpu
            yield name.removeprefix("rtx"), gpu
    for name, known in _GPU_NAMES.items():
        yield name, GPUS[known]


def _find_gpu_and_count(text: str) -> tuple[Device, int] | None:
    """Returns the GPU and the number of H100, H100x8 or 8xH100; None if no GPU or several have that name."""
    for name, number in _with_counts(text):
        found = {gpu.name: gpu for plain, gpu in _gpu_names() if plain == _plain(name)}
        if len(found) == 1 and number:
            return next(iter(found.values())), number
    return None


def _with_counts(text: str) -> Iterator[tuple[str, int | None]]:
    """Yields the readings of a name with or without a number, which the letter x may also separate by accident."""
    yield text, 1
    for pattern in (r"(?P<name>.*?)[ *x]*x *(?P<number>\d+) *", r" *(?P<number>\d+) *x *(?P<name>.*)"):
        if found := re.fullmatch(pattern, text):
            yield found["name"], whole_number(found["number"])


def _find_tpu(text: str) -> tuple[Device, str] | None:
    """Returns the TPU of a text such as v5e-8, and the text of its number."""
    found = re.fullmatch(r"(?:tpu[ _-]?)?(v?[a-z0-9]*?)(?:[ _-](.*))?", text)
    name = _plain(found[1]) if found else ""
    name = _TPU_NAMES.get(name, name)
    return (TPUS[name], found[2] or "") if found and name in TPUS else None


def _parse_tpu(text: str, tpu: Device, number: str) -> Target:
    per_chip = tpu.per_chip * tpu.num_cores
    # Chips with two cores come in fours at least: the chips of one host.
    chips = [4] if per_chip > 1 else [1, 4]
    chips += [2**i for i in range(3, tpu.most_chips.bit_length())]
    numbers = [each * per_chip for each in chips]
    if whole_number(number) not in numbers:
        problem = f"{tpu.name} does not come with this number" if number else f"{tpu.name} needs a number"
        raise UserError(
            f"--target {text}: {problem}, as in tpu:{tpu.name}-8; its numbers are {', '.join(map(str, numbers))}."
        )
    return Target(tpu, int(number) // tpu.num_cores)


def _nearest(kind: str, text: str) -> list[str]:
    """Returns the targets whose names a text begins; if there are none, those whose names are like it."""
    alike: list[str] = []
    for name, number in _with_counts(text) if kind in ("", "gpu", "tpu") else ():
        plain, count = _plain(name), f"x{number}" if number and number > 1 else ""
        known = [] if kind == "tpu" else [(each, f"gpu:{gpu.name}{count}") for each, gpu in _gpu_names()]
        known += [] if kind == "gpu" else [(each, f"tpu:{each}-8") for each in TPUS]
        begun = [target for each, target in known if each == plain]
        begun = begun or [target for each, target in known if len(plain) > 2 and each.startswith(plain)]
        if begun:
            return list(dict.fromkeys(begun))[:3]
        if len(plain) > 2:
            names = difflib.get_close_matches(plain, [each for each, _ in known], n=3)
            alike = [target for each, target in known if each in names]
    return list(dict.fromkeys(alike))[:3]


def _circuits(gpu: Device) -> dict[str, Any]:
    major, minor = divmod(round(gpu.circuits["cc"] * 10), 10)
    memory, bandwidth = math.floor(gpu.memory_bytes), math.floor(gpu.bytes_per_sec or 0)
    return {**gpu.circuits, "major": major, "minor": minor, "memory": memory, "bandwidth": bandwidth}


_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads_per_core}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {fpus_per_core} clock_rate_ghz: {ghz} l2_cache_size: {l2_bytes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{device.known_as[0]}"
"""
