"""What devices can do, by their vendors' data sheets, and the targets that name devices and how many, as tpu:v5e-8."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.config_file import whole_number
from trainer.errors import UserError
from trainer.hardware.processor import Processor, processor


@dataclasses.dataclass(frozen=True)
class Device:
    """What one replica runs on: a GPU, a core of a TPU or both cores of its chip as one, or the CPU.

    Attributes:
        name: as it is written in a target.
        flops: peak operations per second of dense matrix products by the dtype they are computed in, a multiplication
            and an addition being two; without what it has no circuits for. None are known of a CPU.
        memory_bytes: of its own.
        bytes_per_sec: to and from that memory; None: not known.
        num_axes: of the grid in which a TPU's chips are wired; 0: no TPU.
        per_chip: how many of these are a chip of a TPU.
        num_cores: of the cores that Google's accelerator types count, how many this is.
        known_as: what the driver calls a GPU.
        circuits: of a GPU, what XLA asks beside the above.
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
    # A product of float32 matrices is made of their bfloat16 roundings, unless one asks for more.
    flops = {"bfloat16": peak, "float32": peak}
    share = 1e9 / per_chip
    return Device(name, flops, gigabytes * share, gb_per_sec * share, num_axes, per_chip, num_cores)


# Of a chip: bfloat16 teraflops, gigabytes, gigabytes a second.
# Source: cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e; of v2 Jouppi et al. 2021 ("Ten Lessons"), table 1. Which have
# their cores apart is as their compiler, libtpu, has it.
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

# Where a pod ends, of powers of two.
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


def _half_alone(half: float, float32: float) -> Mapping[str, float]:
    return {"float16": half, "float32": float32}


_MB = 1 << 20
# Teraflops without sparsity and with sums in float32, and float32 as TF32 where there is such, which TensorFlow takes;
# gigabytes, gigabytes a second, cores, gigahertz at boost, bytes of the second-level cache.
# Source: NVIDIA's data sheets; of the RTX the whitepapers of Ampere GA102 and Ada, appendix A; of what a core holds the
# CUDA programming guide's table of compute capabilities.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16GB", ("Tesla V100-SXM2-16GB",), _half_alone(125, 15.7), 16, 900, _VOLTA, 80, 1.53, 6 * _MB),
        _gpu("V100-32GB", ("Tesla V100-SXM2-32GB",), _half_alone(125, 15.7), 32, 900, _VOLTA, 80, 1.53, 6 * _MB),
        _gpu("T4", ("Tesla T4",), _half_alone(65, 8.1), 16, 320, _TURING, 40, 1.59, 4 * _MB),
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
    """Devices to train on, all alike: one replica on each."""

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
        """Returns how a TPU's chips are arranged, as its compiler wants to know it: v5e:2x4."""
        chips, axes = self.num_devices // self.device.per_chip, self.device.num_axes
        doublings = chips.bit_length() - 1
        sizes = sorted(2 ** ((doublings + i) // axes) for i in range(axes))
        if axes == 3 and chips == 4:
            sizes = [2, 2, 1]  # A host's chips are never in a row.
        return f"{self.device.name}:{'x'.join(map(str, sizes))}"


def parse_target(text: str) -> Target:
    """Returns the devices of a target: cpu, tpu:v5e-8 or gpu:H100x8, in capitals or not.

    After a TPU's name the number is that of Google's accelerator types: of cores for v2, v3, v4 and v5p, of chips for
    v5e and v6e, which have one each.

    Raises:
        UserError: there is no such device, or not that many.
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
        name, _, number = name.rpartition("x")  # The last: RTX has one too.
        if name in known and (count := whole_number(number)):
            return Target(known[name], count)
    raise UserError(f"--target {text} is not one that trainer knows; {known_targets()}")


def known_targets() -> str:
    """Returns what a target can be, for a message."""
    return (
        f"write gpu:NAMExCOUNT, where NAME is {', '.join(GPUS)}, as in gpu:H100x8; tpu:NAME-COUNT, where NAME is "
        f"{', '.join(TPUS)}, as in tpu:v5e-8; or cpu."
    )


def cpu(num_devices: int = 1) -> Target:
    """Returns this machine's CPU, split into so many replicas, with its memory as theirs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target(Device("cpu", {}, memory / num_devices), num_devices)


def find_gpu(device_name: str) -> Device | None:
    """Returns the GPU that a driver calls so, or None where it is not in the table."""
    return next((gpu for gpu in GPUS.values() if device_name in gpu.known_as), None)


def compiler_settings(target: Target) -> dict[str, Any]:
    """Returns what XLA's compiler needs to know of the devices: of a TPU its topology, of GPUs their facts as the text
    of a GpuTargetConfigProto, which has a count of 1.
    """
    if target.device.num_axes:
        return {"topology": target.topology()}
    return {"target_config": _GPU_TARGET.format(device=target.device, **_circuits(target.device))}


def _parse_tpu(text: str, name: str) -> Target:
    name, _, number = name.replace("v5litepod-", "v5e-").partition("-")
    if name not in TPUS:
        raise UserError(f"--target {text} is not one that trainer knows; {known_targets()}")
    tpu = TPUS[name]
    per_chip = tpu.per_chip * tpu.num_cores
    # Of chips with two cores there is no type with less than a host's four.
    chips = [4] if per_chip > 1 else [1, 4]
    chips += [2**i for i in range(3, _MOST_CHIPS[name].bit_length())]
    count = whole_number(number)
    if count is None or count not in [each * per_chip for each in chips]:
        numbers = ", ".join(str(each * per_chip) for each in chips)
        raise UserError(f"--target {text}: there is no such {name}; its numbers are {numbers}.")
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
