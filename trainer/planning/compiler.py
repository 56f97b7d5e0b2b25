"""The real compilers of TPUs and NVIDIA GPUs, on a machine that has neither: what a config's step needs on a device.

TensorFlow lowers the step in a separate process. The compiler runs in a separate environment, which is made on first
use: the compilers come with JAX, which needs other versions of TensorFlow's dependencies.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.hardware.devices import Target, compiler_settings
from trainer.system.terminal import Say
from trainer.system.whole import write_whole

PACKAGES = {
    "tpu": ("jax==0.10.2", "libtpu==0.0.52", "numpy"),
    "gpu": ("jax==0.10.2", "jax-cuda12-plugin==0.10.2", "jax-cuda12-pjrt==0.10.2", "nvidia-cuda-nvcc-cu12", "numpy"),
}

NO_NETWORK = re.compile("from versions: none|NewConnectionError|ConnectTimeout|ProxyError|SSLError|name resolution")


class CompiledStep(NamedTuple):
    """The report of a compiler about a step on one device.

    Attributes:
        arguments_bytes: memory of weights, moments and batch.
        temporaries_bytes: memory of everything else at the worst instant.
        flops: operations of one micro-batch and one update: the compiler counts the body of a loop once.
        accessed_bytes: bytes read and written by one micro-batch and one update.
        num_all_reduces: operations that sum over replicas; None if the program cannot be read back.
        largest_constant_bytes: size of the largest constant in the program; None if it cannot be read back.
        compile_secs: time that the compiler took.
        program: digest of the program, the device and the compiler.
        sent_bytes: bytes that the device sends to others in a step, at least; None if the program cannot be read back.
    """

    arguments_bytes: int
    temporaries_bytes: int
    flops: float
    accessed_bytes: float
    num_all_reduces: int | None
    largest_constant_bytes: int | None
    compile_secs: float
    program: str
    sent_bytes: float | None = None

    def memory_bytes(self) -> int:
        """Returns all memory that the step needs."""
        return self.arguments_bytes + self.temporaries_bytes


class DoesNotFit(Exception):
    """The compiler finds no way to run the step in the device's memory; the message is the compiler's."""


def compile_step(
    config: Config, vocabulary_size: int, target: Target, say: Say = print, known: CompiledStep | None = None
) -> CompiledStep:
    """Compiles one replica's whole step for a target.

    Args:
        config: the run's configuration.
        vocabulary_size: number of tokens.
        target: a TPU or GPUs.
        say: prints a line; called if the compiler has to be installed first.
        known: an earlier report, which is returned if it is of the same program, device and compiler: compiling, which
            takes minutes, would report the same again.

    Raises:
        UserError: the batch cannot be spread over the devices, or the compiler cannot be installed.
        DoesNotFit: the step does not fit the device's memory.
    """
    kind = target.processor().kind.lower()
    python = _compiler_environment(kind, say)
    settings = {**compiler_settings(target), "num_devices": target.num_devices, "packages": PACKAGES[kind]}
    settings["known"] = known and known.program
    with tempfile.TemporaryDirectory() as folder:
        toml, hlo = Path(folder) / "config.toml", Path(folder) / "step.hlo"
        toml.write_text(config.to_toml(), encoding="utf-8")
        _run([sys.executable, "-m", "trainer.planning.lower", str(toml), str(vocabulary_size), str(target), str(hlo)])
        # -I: otherwise a module beside the program would hide Python's own module of the same name.
        program = str(Path(__file__).with_name("compile_hlo.py"))
        answer = json.loads(_run([str(python), "-I", program, json.dumps(settings), str(hlo)]).splitlines()[-1])
    if "does_not_fit" in answer:
        raise DoesNotFit(answer["does_not_fit"])
    if known is not None and answer["program"] == known.program:
        return known
    return CompiledStep(**answer)


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Returns the largest of rising sizes that fits, or None. Below a size that fits, every size does."""
    low, high = 0, len(sizes)  # All sizes below low fit, and none from high on.
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


def _compiler_environment(kind: str, say: Say) -> Path:
    """Returns the Python of the environment that has the compiler; the environment lies inside the running one."""
    folder = Path(sys.prefix) / f"compile-{kind}"
    python, stamp = folder / "bin" / "python", folder / "trainer.installed"
    packages = PACKAGES[kind]
    if stamp.is_file() and stamp.read_text() == " ".join(packages):
        return python
    if sys.platform != "linux":
        raise UserError("--compile: the compilers for TPUs and GPUs run on Linux only; leave it out for an estimate.")
    say(f"Installing the compiler into {folder} (about 1 GB).")
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    # A pip.conf may set --user, which fails in an environment. LC_ALL, because NO_NETWORK matches English messages.
    variables = {**os.environ, "PIP_USER": "0", "LC_ALL": "C"}
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, *packages]):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=variables
        )
        if done.returncode:
            printed = done.stdout + done.stderr
            problem = "the package index cannot be reached" if NO_NETWORK.search(printed) else printed.strip()[-600:]
            raise UserError(
                f"{folder}: the compiler cannot be installed there: {problem}. Mend that, then run this again."
            )
    write_whole(stamp, " ".join(packages))
    return python


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        if last.startswith("trainer: "):
            raise UserError(last.removeprefix("trainer: "))
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout
