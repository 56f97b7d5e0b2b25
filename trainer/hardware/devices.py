"""The data sheets of devices, and targets such as tpu:v5e-8, which name devices and their number."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.config.file import whole_number
from trainer.errors import UserError
from trainer.hardware.processor import Processor, processor


@dataclasses.dataclass(frozen=True)
class Device:
    """The device of one replica: a GPU, a core of a TPU (or both cores of its chip as one), or the CPU.

    Attributes:
        name: the name in a target.
        flops: peak operations per second of dense matrix products, by the dtype of the computation; a multiplication
            and an addition are two operations. A dtype without circuits is left out, and a CPU has none.
        memory_bytes: the device's own memory.
        bytes_per_sec: the bandwidth of that memory; None if it is unknown.
        num_axes: the axes of the grid that wires a TPU's chips; 0 if the device is not a TPU.
        per_chip: the number of these devices on a chip of a TPU.
        num_cores: the number of cores in this device, as Google's accelerator types count cores.
        known_as: the names that the driver gives a GPU.
        circuits: further facts about a GPU that XLA needs.
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    bytes_per_sec: float | None = None
    num_axes: int = 0
    per_chip: int = 1
    num_cores: int = 1
    known_as: tuple[str, ...] = ()
    circuits: Mapping[str, int | float] = dataclasses.field(default_factory=dict)


def _tpu(
    name: str,
    teraflops: float,
    gigabytes: float,
    gb_per_sec: float,
    num_axes: int,
    per_chip: int = 1,
    num_cores: int = 1,
) -> Device:
    peak = teraflops * 1e12 / per_chip
    # TPUs multiply float32 matrices as bfloat16 roundings, unless a program requests more precision.
    flops = {"bfloat16": peak, "float32": peak}
    share = 1e9 / per_chip
    return Device(name, flops, gigabytes * share, gb_per_sec * share, num_axes, per_chip, num_cores)


# The numbers of a chip: bfloat16 teraflops, gigabytes, gigabytes per second.
# Source: cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e; for v2 Jouppi et al. 2021 ("Ten Lessons"), table 1. Their
# compiler, libtpu, decides which chips have their cores apart.
TPUS = {
    tpu.name: tpu
    for tpu in (
        _tpu("v2", 46, 16, 700, num_axes=2, per_chip=2),
        _tpu("v3", 123, 32, 900, num_axes=2, per_chip=2),
        _tpu("v4", 275, 32, 1228, num_axes=3, per_chip=2),
        _tpu("v5e", 197, 16, 819, num_axes=2),
        _tpu("v5p", 459, 95, 2765, num_axes=3, num_cores=2),
        _tpu("v6e", 918, 32, 1640, num_axes=2),
    )
}

# The most chips in a pod, as a power of two.
_MOST_CHIPS = {"v2": 256, "v3": 1024, "v4": 4096, "v5e": 256, "v5p": 4096, "v6e": 256}

_VOLTA = {"cc": 7.0, "fpus_per_core": 64, "shared": 98304, "optin": 98304, "threads_per_core": 2048}
_TURING = {"cc": 7.5, "fpus_per_core": 64, "shared": 65536, "optin": 65536, "threads_per_core": 1024}
_GA100 = {"cc": 8.0, "fpus_per_core": 64, "shared": 167936, "optin": 166912, "threads_per_core": 2048}
_GA102 = {"cc": 8.6, "fpus_per_core": 128, "shared": 102400, "optin": 101376, "threads_per_core": 1536}
_ADA = {"cc": 8.9, "fpus_per_core": 128, "shared": 102400, "optin": 101376, "threads_per_core": 1536}
_HOPPER = {"cc": 9.0, "fpus_per_core": 128, "shared": 233472, "optin": 232448, "threads_per_core": 2048}


def _gpu(
    name: str,
    known_as: tuple[str, ...],
    teraflops: Mapping[str, float],
    gigabytes: float,
    gb_per_sec: float,
    architecture: Mapping[str, float],
    cores: int,
    ghz: float,
    l2_bytes: int,
) -> Device:
    flops = {dtype: value * 1e12 for dtype, value in teraflops.items()}
    circuits = {**architecture, "cores": cores, "ghz": ghz, "l2_bytes": l2_bytes}
    return Device(name, flops, gigabytes * 1e9, gb_per_sec * 1e9, known_as=known_as, circuits=circuits)


def _tensor_cores(half: float, float32: float) -> Mapping[str, float]:
    return {"bfloat16": half, "float16": half, "float32": float32}


def _half_only(half: float, float32: float) -> Mapping[str, float]:
    return {"float16": half, "float32": float32}


_MB = 1 << 20
# Teraflops without sparsity and with sums in float32 (float32 is TF32 if the GPU has it, as TensorFlow uses it);
# gigabytes, gigabytes per second, cores, gigahertz at boost, bytes of the second-level cache.
# Source: NVIDIA's data sheets; for the RTX the whitepapers of Ampere GA102 and Ada, appendix A; for the facts of a core
# the table of compute capabilities in the CUDA programming guide.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16GB", ("Tesla V100-SXM2-16GB",), _half_only(125, 15.7), 16, 900, _VOLTA, 80, 1.53, 6 * _MB),
        _gpu("V100-32GB", ("Tesla V100-SXM2-32GB",), _half_only(125, 15.7), 32, 900, _VOLTA, 80, 1.53, 6 * _MB),
        _gpu("T4", ("Tesla T4",), _half_only(65, 8.1), 16, 320, _TURING, 40, 1.59, 4 * _MB),
        _gpu(
            "A100-40GB",
            ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-SXM4-40GB", "A100-PCIE-40GB"),
            _tensor_cores(312, 156), 40, 1555, _GA100, 108, 1.41, 40 * _MB,
        ),
        _gpu(
            "A100-80GB",
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "A100-SXM4-80GB"),
            _tensor_cores(312, 156), 80, 2039, _GA100, 108, 1.41, 40 * _MB,
        ),
        _gpu("RTX3090", ("NVIDIA GeForce RTX 3090",), _tensor_cores(71, 35.6), 24, 936, _GA102, 82, 1.695, 6 * _MB),
        _gpu("RTX4090", ("NVIDIA GeForce RTX 4090",), _tensor_cores(165.2, 82.6), 24, 1008, _ADA, 128, 2.52, 72 * _MB),
        _gpu("L4", ("NVIDIA L4",), _tensor_cores(121, 60), 24, 300, _ADA, 58, 2.04, 48 * _MB),
        _gpu("H100-PCIe", ("NVIDIA H100 PCIe",), _tensor_cores(756, 378), 80, 2000, _HOPPER, 114, 1.755, 50 * _MB),
        _gpu("H100", ("NVIDIA H100 80GB HBM3",), _tensor_cores(989.4, 494.7), 80, 3350, _HOPPER, 132, 1.98, 50 * _MB),
        _gpu("H200", ("NVIDIA H200",), _tensor_cores(989.4, 494.7), 141, 4800, _HOPPER, 132, 1.98, 50 * _MB),
    )
}  # fmt: skip


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
        chips, axes = self.num_devices // self.device.per_chip, self.device.num_axes
        doublings = chips.bit_length() - 1
        sizes = sorted(2 ** ((doublings + i) // axes) for i in range(axes))
        if axes == 3 and chips == 4:
            sizes = [2, 2, 1]  # The four chips of a host are never in one row.
        return f"{self.device.name}:{'x'.join(map(str, sizes))}"


def parse_target(text: str) -> Target:
    """Returns the devices of a target such as cpu, tpu:v5e-8 or gpu:H100x8; capitals do not matter.

    The number after a TPU's name is the number in Google's accelerator types. It counts cores for v2, v3, v4 and v5p,
    and chips for v5e and v6e, whose chips have one core.

    Raises:
        UserError: the device is not in the table, or the TPU does not come with this number.
    """
    kind, _, name = text.lower().partition(":")
    if kind == "cpu" and not name:
        return cpu()
    if kind == "tpu":
        return _parse_tpu(text, name)
    if kind == "gpu":
        known = {gpu.name.lower(): gpu for gpu in GPUS.values()}
        if name in known:
            return Target(known[name], 1)
        name, _, number = name.rpartition("x")  # The last x, because RTX has one too.
        if name in known and (count := whole_number(number)):
            return Target(known[name], count)
    raise UserError(f"--target {text} is unknown; {known_targets()}")


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


def _parse_tpu(text: str, name: str) -> Target:
    name, _, number = name.replace("v5litepod-", "v5e-").partition("-")
    if name not in TPUS:
        raise UserError(f"--target {text} is unknown; {known_targets()}")
    tpu = TPUS[name]
    per_chip = tpu.per_chip * tpu.num_cores
    # Chips with two cores come in fours at least: the chips of one host.
    chips = [4] if per_chip > 1 else [1, 4]
    chips += [2**i for i in range(3, _MOST_CHIPS[name].bit_length())]
    count = whole_number(number)
    if count is None or count not in [each * per_chip for each in chips]:
        numbers = ", ".join(str(each * per_chip) for each in chips)
        raise UserError(f"--target {text}: {name} does not come with this number; its numbers are {numbers}.")
    return Target(tpu, count // tpu.num_cores)


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
