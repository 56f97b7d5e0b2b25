"""The kind of device that computes: all that decides how a config is executed on it."""

import functools
import re
from pathlib import Path
from typing import Literal, NamedTuple

CPUINFO = Path("/proc/cpuinfo")
# As TensorFlow names the kinds of device that trainer runs on.
KINDS = ("CPU", "GPU", "TPU")


class Processor(NamedTuple):
    """A kind of device, without its speed and its memory.

    Attributes:
        kind: "CPU", "GPU" or "TPU", as TensorFlow names it.
        multiplies_bfloat16: whether it multiplies bfloat16 faster than float32; read for a CPU only.
        compiles: whether XLA can compile for it; False for GPUs that this build of TensorFlow does not know.
    """

    kind: Literal["CPU", "GPU", "TPU"]
    multiplies_bfloat16: bool = True
    compiles: bool = True


def processor(kind: str) -> Processor:
    """Returns the processor of a kind; a CPU is this machine's."""
    match kind:
        case "CPU":
            return Processor("CPU", multiplies_bfloat16())
        case "GPU":
            return Processor("GPU")
        case "TPU":
            return Processor("TPU")
    raise ValueError(f"kind={kind!r} is not a kind of device; use 'CPU', 'GPU' or 'TPU'.")


@functools.cache
def multiplies_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether this machine's CPU multiplies bfloat16 faster than float32, by the flags in its cpuinfo. It is never
    measured: every start of a run has to find the same answer.

    Intel's CPUs are faster with tiles (AMX) only; with vector instructions bfloat16 takes twice as long as float32.
    AMD's CPUs are faster with vector instructions.
    """
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return False  # Not Linux.
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = found[1].split() if found else []
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in text)
