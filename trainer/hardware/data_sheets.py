"""The data sheets of devices: their peaks, their memory, and the facts that their compilers need."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple


class Link(NamedTuple):
    """What a device sends over to the others of its machine, or of its slice of TPUs.

    Attributes:
        name: its name, for a message.
        bytes_per_sec: what one device can send in a second, while it receives as much.
        num_devices: the most devices that are usually linked so.
    """

    name: str
    bytes_per_sec: float
    num_devices: int


@dataclasses.dataclass(frozen=True)
class Device:
    """The device of one replica: a GPU, a core of a TPU (or both cores of its chip as one), or the CPU.

    Attributes:
        name: the name in a target.
        flops: peak operations per second of dense matrix products, by the dtype of the computation; a multiplication
            and an addition are two operations. A dtype without circuits is left out, and a CPU has none.
        memory_bytes: the device's own memory.
        bytes_per_sec: the bandwidth of that memory; None if it is unknown.
        link: what connects it with others; None if that is unknown. Each of two cores on a chip counts with all links
            of the chip: in a ring of cores, every second hop stays on a chip.
        num_axes: the axes of the grid that wires a TPU's chips; 0 if the device is not a TPU.
        per_chip: the number of these devices on a chip of a TPU.
        num_cores: the number of cores in this device, as Google's accelerator types count cores.
        most_chips: the most chips in a pod of this TPU, as a power of two; 0 if the device is not a TPU.
        known_as: the names that the driver gives a GPU.
        circuits: further facts about a GPU that XLA needs; "cc" is its compute capability.
        in_tensorflow: whether its maker says that TensorFlow runs on it.
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    bytes_per_sec: float | None = None
    link: Link | None = None
    num_axes: int = 0
    per_chip: int = 1
    num_cores: int = 1
    most_chips: int = 0
    known_as: tuple[str, ...] = ()
    circuits: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    in_tensorflow: bool = True


def _tpu(
    name: str,
    teraflops: float,
    gigabytes: float,
    gb_per_sec: float,
    sent_gb_per_sec: float,
    num_axes: int,
    most_chips: int,
    per_chip: int = 1,
    num_cores: int = 1,
    in_tensorflow: bool = True,
) -> Device:
    peak = teraflops * 1e12 / per_chip
    # TPUs multiply float32 matrices as bfloat16 roundings, unless a program requests more precision.
    flops = {"bfloat16": peak, "float32": peak}
    share = 1e9 / per_chip
    link = Link("ICI", sent_gb_per_sec * 1e9, most_chips * per_chip)
    return Device(
        name,
        flops,
        gigabytes * share,
        gb_per_sec * share,
        link,
        num_axes,
        per_chip,
        num_cores,
        most_chips,
        in_tensorflow=in_tensorflow,
    )


# The numbers of a chip: bfloat16 teraflops, gigabytes, gigabytes per second of its memory, and those that it sends over
# all its links (the documentation counts what it receives, too), axes, chips.
# Source: cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e, tpu7x; for v2, and the links of v3, Jouppi et al. 2021 ("Ten
# Lessons"), table 1; for the links of v4 Jouppi et al. 2023 ("TPU v4"), table 4.
# Their compiler, libtpu, decides which chips have their cores apart.
TPUS = {
    tpu.name: tpu
    for tpu in (
        _tpu("v2", 46, 16, 700, 248, 2, 256, per_chip=2),
        _tpu("v3", 123, 32, 900, 328, 2, 1024, per_chip=2),
        _tpu("v4", 275, 32, 1228, 300, 3, 4096, per_chip=2),
        _tpu("v5e", 197, 16, 819, 200, 2, 256),
        _tpu("v5p", 459, 95, 2765, 600, 3, 4096, num_cores=2),
        _tpu("v6e", 918, 32, 1640, 400, 2, 256),
        # "TensorFlow is not supported": cloud.google.com/tpu/docs/tpu7x.
        _tpu("v7x", 2307, 192, 7380, 600, 3, 8192, per_chip=2, in_tensorflow=False),
    )
}

_VOLTA = {"cc": 7.0, "fpus_per_core": 64, "shared": 98304, "optin": 98304, "threads_per_core": 2048}
_TURING = {"cc": 7.5, "fpus_per_core": 64, "shared": 65536, "optin": 65536, "threads_per_core": 1024}
_GA100 = {"cc": 8.0, "fpus_per_core": 64, "shared": 167936, "optin": 166912, "threads_per_core": 2048}
_GA102 = {"cc": 8.6, "fpus_per_core": 128, "shared": 102400, "optin": 101376, "threads_per_core": 1536}
_ADA = {"cc": 8.9, "fpus_per_core": 128, "shared": 102400, "optin": 101376, "threads_per_core": 1536}
_HOPPER = {"cc": 9.0, "fpus_per_core": 128, "shared": 233472, "optin": 232448, "threads_per_core": 2048}
_GB100 = {"cc": 10.0, "fpus_per_core": 128, "shared": 233472, "optin": 232448, "threads_per_core": 2048}
_GB202 = {"cc": 12.0, "fpus_per_core": 128, "shared": 102400, "optin": 101376, "threads_per_core": 1536}


def _linked(name: str, gb_per_sec: float, gpus: str, num_devices: int = 8) -> Mapping[str, Link]:
    return dict.fromkeys(gpus.split(), Link(name, gb_per_sec * 1e9, num_devices))


# Gigabytes per second in one direction: NVIDIA's data sheets have twice that, for both. NVLink counts if it connects
# all GPUs of the usual board, as with SXM modules, and not if it bridges pairs of cards. Otherwise PCIe counts, with 16
# lanes, or the eight of the RTX 5060 Ti. A10G and GH200 are left out: no data sheet has the lanes of the first, and
# machines differ in what connects the second.
_LINKS = {
    **_linked("NVLink", 150, "V100-16GB V100-32GB"),
    **_linked("NVLink", 300, "A100-40GB A100-80GB"),
    **_linked("NVLink", 450, "H100 H200"),
    **_linked("NVLink", 900, "B200"),
    **_linked("NVLink", 900, "GB200", num_devices=72),
    **_linked("PCIe", 16, "T4"),
    **_linked("PCIe", 32, "A10 A40 RTXA6000 RTX3090 RTX4070 RTX4070Ti RTX4080 RTX4090 RTX6000Ada L4 L40S"),
    **_linked("PCIe", 32, "A100-40GB-PCIe A100-80GB-PCIe RTX5060Ti-8GB RTX5060Ti-16GB"),
    **_linked("PCIe", 64, "H100-PCIe H100-NVL RTX5070 RTX5070Ti RTX5080 RTX5090 RTXPRO6000"),
}


def _gpu(
    name: str,
    known_as: str | tuple[str, ...],
    teraflops: Mapping[str, float],
    gigabytes: float,
    gb_per_sec: float,
    architecture: Mapping[str, float],
    cores: int,
    ghz: float,
    l2_mebibytes: int,
) -> Device:
    flops = {dtype: value * 1e12 for dtype, value in teraflops.items()}
    circuits = {**architecture, "cores": cores, "ghz": ghz, "l2_bytes": l2_mebibytes << 20}
    names = (known_as,) if isinstance(known_as, str) else known_as
    link = _LINKS.get(name)
    return Device(name, flops, gigabytes * 1e9, gb_per_sec * 1e9, link, known_as=names, circuits=circuits)


def _tensor_cores(half: float, float32: float) -> Mapping[str, float]:
    return {"bfloat16": half, "float16": half, "float32": float32}


def _half_only(half: float, float32: float) -> Mapping[str, float]:
    return {"float16": half, "float32": float32}


def _geforce(cores: int, ghz: float) -> Mapping[str, float]:
    """Returns teraflops by the rates of a GeForce core since Ampere: 512 operations a cycle in 16 bits, half of what
    the same core does with sums in float16, and 256 in TF32."""
    return _tensor_cores(512 * cores * ghz / 1e3, 256 * cores * ghz / 1e3)


_A100_40GB = ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB")
_A100_80GB = ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB")
_A100_40GB_PCIE = ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB")
_5060_TI = "NVIDIA GeForce RTX 5060 Ti"  # The driver gives both sizes of memory this name.
_6000_ADA = "NVIDIA RTX 6000 Ada Generation"
_PRO_6000 = "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"
# Teraflops without sparsity and with sums in float32 (float32 is TF32 if the GPU has it, as TensorFlow uses it);
# gigabytes, gigabytes per second, cores, gigahertz at boost, mebibytes of the second-level cache.
# Source: NVIDIA's data sheets; for the RTX and the A6000 the whitepapers of Ampere GA102, Ada, RTX Blackwell and RTX
# PRO Blackwell, and for the RTX 5060 Ti its product page; for the cores, clocks and caches of B200 and GB200 XLA's
# target_config (openxla/xla); for the facts of a core the table of compute capabilities in the CUDA programming guide.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16GB", "Tesla V100-SXM2-16GB", _half_only(125, 15.7), 16, 900, _VOLTA, 80, 1.53, 6),
        _gpu("V100-32GB", "Tesla V100-SXM2-32GB", _half_only(125, 15.7), 32, 900, _VOLTA, 80, 1.53, 6),
        _gpu("T4", "Tesla T4", _half_only(65, 8.1), 16, 320, _TURING, 40, 1.59, 4),
        _gpu("A100-40GB", _A100_40GB, _tensor_cores(312, 156), 40, 1555, _GA100, 108, 1.41, 40),
        _gpu("A100-80GB", _A100_80GB, _tensor_cores(312, 156), 80, 2039, _GA100, 108, 1.41, 40),
        _gpu("A100-40GB-PCIe", _A100_40GB_PCIE, _tensor_cores(312, 156), 40, 1555, _GA100, 108, 1.41, 40),
        _gpu("A100-80GB-PCIe", "NVIDIA A100 80GB PCIe", _tensor_cores(312, 156), 80, 1935, _GA100, 108, 1.41, 40),
        _gpu("A10", "NVIDIA A10", _tensor_cores(125, 62.5), 24, 600, _GA102, 72, 1.695, 6),
        _gpu("A10G", "NVIDIA A10G", _tensor_cores(70, 35), 24, 600, _GA102, 80, 1.71, 6),
        _gpu("A40", "NVIDIA A40", _tensor_cores(149.7, 74.8), 48, 696, _GA102, 84, 1.74, 6),
        _gpu("RTXA6000", "NVIDIA RTX A6000", _tensor_cores(154.8, 77.4), 48, 768, _GA102, 84, 1.8, 6),
        _gpu("RTX3090", "NVIDIA GeForce RTX 3090", _tensor_cores(71, 35.6), 24, 936, _GA102, 82, 1.695, 6),
        _gpu("RTX4070", "NVIDIA GeForce RTX 4070", _geforce(46, 2.475), 12, 504, _ADA, 46, 2.475, 36),
        _gpu("RTX4070Ti", "NVIDIA GeForce RTX 4070 Ti", _geforce(60, 2.61), 12, 504, _ADA, 60, 2.61, 48),
        _gpu("RTX4080", "NVIDIA GeForce RTX 4080", _geforce(76, 2.505), 16, 716.8, _ADA, 76, 2.505, 64),
        _gpu("RTX4090", "NVIDIA GeForce RTX 4090", _tensor_cores(165.2, 82.6), 24, 1008, _ADA, 128, 2.52, 72),
        _gpu("RTX6000Ada", _6000_ADA, _tensor_cores(364.2, 182.1), 48, 960, _ADA, 142, 2.505, 96),
        _gpu("L4", "NVIDIA L4", _tensor_cores(121, 60), 24, 300, _ADA, 58, 2.04, 48),
        _gpu("L40S", "NVIDIA L40S", _tensor_cores(362, 183), 48, 864, _ADA, 142, 2.52, 96),
        _gpu("H100-PCIe", "NVIDIA H100 PCIe", _tensor_cores(756, 378), 80, 2000, _HOPPER, 114, 1.755, 50),
        _gpu("H100-NVL", "NVIDIA H100 NVL", _tensor_cores(835, 417.5), 94, 3900, _HOPPER, 132, 1.785, 50),
        _gpu("H100", "NVIDIA H100 80GB HBM3", _tensor_cores(989.4, 494.7), 80, 3350, _HOPPER, 132, 1.98, 50),
        _gpu("GH200-96GB", "NVIDIA GH200 480GB", _tensor_cores(989.4, 494.7), 96, 4000, _HOPPER, 132, 1.98, 50),
        _gpu("GH200-144GB", "NVIDIA GH200 144G HBM3e", _tensor_cores(989.4, 494.7), 144, 4900, _HOPPER, 132, 1.98, 50),
        _gpu("H200", "NVIDIA H200", _tensor_cores(989.4, 494.7), 141, 4800, _HOPPER, 132, 1.98, 50),
        _gpu("B200", "NVIDIA B200", _tensor_cores(2250, 1125), 180, 7700, _GB100, 148, 1.965, 126),
        _gpu("GB200", "NVIDIA GB200", _tensor_cores(2500, 1250), 186, 8000, _GB100, 152, 2.062, 129),
        _gpu("RTX5060Ti-8GB", _5060_TI, _geforce(36, 2.57), 8, 448, _GB202, 36, 2.57, 32),
        _gpu("RTX5060Ti-16GB", _5060_TI, _geforce(36, 2.57), 16, 448, _GB202, 36, 2.57, 32),
        _gpu("RTX5070", "NVIDIA GeForce RTX 5070", _geforce(48, 2.512), 12, 672, _GB202, 48, 2.512, 48),
        _gpu("RTX5070Ti", "NVIDIA GeForce RTX 5070 Ti", _geforce(70, 2.452), 16, 896, _GB202, 70, 2.452, 48),
        _gpu("RTX5080", "NVIDIA GeForce RTX 5080", _geforce(84, 2.617), 16, 960, _GB202, 84, 2.617, 64),
        _gpu("RTX5090", "NVIDIA GeForce RTX 5090", _geforce(170, 2.407), 32, 1792, _GB202, 170, 2.407, 96),
        _gpu("RTXPRO6000", _PRO_6000, _tensor_cores(503.8, 251.9), 96, 1792, _GB202, 188, 2.617, 128),
    )
}  # fmt: skip
