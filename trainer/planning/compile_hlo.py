"""Compiles a serialized HloModuleProto for a TPU or GPU that this machine lacks, and prints the result as JSON.

trainer/planning/compiler.py runs this program in an environment that has JAX and the compiler but not trainer:

    python -I compile_hlo.py SETTINGS_JSON step.hlo

With the settings' key known, the digest of a program whose figures are known, this program is not compiled again.
"""

import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Without these libtpu asks the cloud's metadata server for its identity, and waits for an answer.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# Compiling uses no TPU, so another process that uses libtpu is no obstacle.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

# The sizes of the types that are not four bytes long.
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "f64": 8}


def find_devices(settings: dict[str, Any]) -> list[Any]:
    """Returns compile-only devices: all of a TPU topology, or num_devices GPUs."""
    from jax.experimental import topologies

    if "topology" in settings:
        devices: list[Any] = topologies.get_topology_desc(platform="tpu", topology_name=settings["topology"]).devices
        assert len(devices) == settings["num_devices"], (settings, len(devices))
        return devices
    import jax_plugins.xla_cuda12  # noqa: F401  Registers the platform; compiling needs no driver.

    config = {"target_config": settings["target_config"], "topology": "1x1x1"}
    device = topologies.get_topology_desc(platform="cuda", topology_name="gpu", **config).devices[0]
    return [device] * int(settings["num_devices"])


def stable_hlo(hlo: bytes) -> str:
    """Returns a serialized HloModuleProto as StableHLO, without the paths of the sources."""
    from jax._src.interpreters import mlir
    from jaxlib import _jax, xla_client
    from jaxlib.mlir import ir

    with mlir.make_ir_context():
        text = _jax.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(hlo))
        text = str(ir.Module.parse(text))
    # StableHLO has no copy; a conversion to the same type is one.
    return re.sub(r"mhlo\.copy (%\S+) : (tensor<[^>]*>)", r"stablehlo.convert \1 : (\2) -> \2", text)


def digest(settings: dict[str, Any], text: str) -> str:
    """Returns the digest of a program for a device and a compiler: the same for the same step on any machine. The order
    of the attributes in an HloModuleProto differs each time, and TensorFlow numbers its functions by all that it has
    traced before.
    """
    numbers: dict[str, int] = {}

    def numbered_here(name: re.Match[str]) -> str:
        return f"{re.sub('[0-9]+', '', name[0])}{numbers.setdefault(name[0], len(numbers))}"

    names = re.sub(r"@[\w.]+", numbered_here, text)
    return hashlib.sha256((json.dumps(settings, sort_keys=True) + names).encode()).hexdigest()


def compile_for(devices: list[Any], text: str) -> Any:
    """Compiles the StableHLO program that each of these devices runs; returns the executable."""
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    with mlir.make_ir_context():
        options = compiler.get_compile_options(num_replicas=len(devices), num_partitions=1)
        options.device_assignment = xla_client.DeviceAssignment.create(np.array([[each.id] for each in devices]))
        return devices[0].client.compile(ir.Module.parse(text), xla_client.DeviceList(tuple(devices)), options)


def bytes_of(types: str) -> int:
    """Returns the bytes of all arrays in a type of HLO, such as (f32[2,3]{1,0}, bf16[4]{0})."""
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", types)
    return sum(BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in arrays)


def sent_bytes(text: str, num_devices: int) -> float | None:
    """Returns the bytes that each device sends to others in a compiled program; see `sent_bytes` in
    trainer/planning/estimate.py. What is inside a loop counts as often as the loop turns; None if that is not known.
    """
    name = ""
    lines_of: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            name = "ENTRY" if line.startswith("ENTRY") else line[1:].split(" ")[0]
        lines_of.setdefault(name, []).append(line)

    chains: set[str] = set()

    @functools.cache
    def of(name: str) -> float:
        # A TPU's compiler writes some reduce-scatters as a computation of this name: an all-reduce and a slice.
        is_scatter, total = name.startswith("all-reduce-scatter"), 0.0
        for line in lines_of[name]:
            # It also lets several operations do parts of one, beside products. Each has the type of the whole.
            chain = re.search(r'chain_id="(\d+)"', line)
            if chain is None or chain[1] not in chains:
                total += sent_bytes_of(line, num_devices, is_scatter)
            if chain is not None:
                chains.add(chain[1])
            if loop := re.search(r"condition=%([^\s,]+), body=%([^\s,]+)", line):
                in_loop = of(loop[2])
                total += in_loop * turns_of(line, lines_of[loop[1]]) if in_loop else 0.0
            called = re.findall(r"(?:calls|to_apply|async_computation|(?:true|false)_computation)=%([^\s,)}]+)", line)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [each.strip(" %") for each in branches.split(",")]
            total += sum(map(of, called))
        return total

    total = of("ENTRY")
    return None if math.isnan(total) else total


def turns_of(line: str, condition: list[str]) -> float:
    """Returns how often a loop of a program's text turns. A TPU's compiler does not say: there it is the bound that its
    condition compares a counter with, which is right for a loop that counts from 0; NaN if there is none.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    bounds = re.findall(r" = [su]\d+\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(bounds[0]) if len(bounds) == 1 and any("direction=LT" in each for each in condition) else math.nan


def sent_bytes_of(line: str, num_devices: int, is_scatter: bool) -> float:
    """Returns the bytes that each device sends in an operation, a line of a program's text."""
    operation = r" = (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(-start)?\("
    if not (found := re.search(operation, line)):
        return 0.0
    returned, kind, starts = float(bytes_of(found[1])), found[2], found[3] is not None
    number = num_devices
    if groups := re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", line):
        number = int(groups[2]) if groups[2] else groups[1].count(",") + 1
    if starts and kind in ("collective-permute", "all-to-all"):
        returned /= 2  # What starts an operation returns the operand, too.
    if kind == "collective-permute":
        return returned
    whole = returned
    if kind in ("reduce-scatter", "all-gather") and starts:
        whole = returned * number / (number + 1)
    elif kind == "reduce-scatter":
        whole = returned * number
    passes = 2 if kind == "all-reduce" and not is_scatter else 1
    return passes * whole * (number - 1) / number


def figures(executable: Any, is_tpu: bool, num_devices: int) -> dict[str, float | None]:
    """Returns the figures of a compiled program that CompiledStep in trainer/planning/compiler.py describes."""
    import jax
    from jaxlib import _jax

    memory = executable.get_compiled_memory_stats()
    try:
        (module,) = executable.hlo_modules()
        text = module.to_string()
    except jax.errors.JaxRuntimeError:
        # jaxlib 0.10.2 cannot read the program that libtpu 0.0.52 makes for a TPU v7x.
        if not is_tpu:
            raise
        text = None
    # The GPU's compiler does not count operations. XLA's CPU client does, for a program of any device.
    cost = executable.cost_analysis() if is_tpu else _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    constants = re.findall(r"= (\w+\[[\d,]*\])\S* constant\(", text or "")
    return {
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "flops": cost["flops"],
        "accessed_bytes": cost["bytes accessed"],
        "num_all_reduces": None if text is None else len(re.findall(r" all-reduce(?:-start)?\(", text)),
        "sent_bytes": None if text is None else sent_bytes(text, num_devices),
        "largest_constant_bytes": None if text is None else max(map(bytes_of, constants), default=0),
    }


def main() -> None:
    """Prints the program's digest with the figures, or with the reason why the program does not fit the device."""
    settings, text = json.loads(sys.argv[1]), stable_hlo(Path(sys.argv[2]).read_bytes())
    known = settings.pop("known")
    # The same program has other figures for another device or from another compiler.
    program = digest(settings, text)
    if program == known:
        print(json.dumps({"program": program}))
        return
    devices = find_devices(settings)
    begin = time.monotonic()
    try:
        executable = compile_for(devices, text)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(json.dumps({"does_not_fit": str(error)[:600]}))
        return
    secs = time.monotonic() - begin
    found = figures(executable, "topology" in settings, settings["num_devices"])
    print(json.dumps(found | {"compile_secs": secs, "program": program}))


if __name__ == "__main__":
    main()
