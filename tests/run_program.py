"""Runs the program of a training step for several replicas, one on each of as many virtual CPU devices. Run by
test_compile.py, in the environment that has JAX.

    python -I tests/run_program.py COMPILE_HLO FOLDER...

COMPILE_HLO is the path of trainer/planning/compile_hlo.py. A FOLDER holds program.hlo, and arguments.npz with the
batches b0, b1, ... as [steps, replicas, ...] and the state s0, s1, ... as [replicas, ...], in the order of the
program's arguments. Into it goes results.npz with what is [steps, replicas, ...]: the metrics m0, m1, ... and the state
after each step.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

import numpy as np

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"


def main():
    path, *folders = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("compile_hlo", path)
    compile_hlo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compile_hlo)
    arguments = [dict(np.load(Path(folder) / "arguments.npz")) for folder in folders]
    (num_replicas,) = {each["b0"].shape[1] for each in arguments}
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_replicas}"
    for folder, arrays in zip(map(Path, folders), arguments, strict=True):
        text = compile_hlo.stable_hlo((folder / "program.hlo").read_bytes())
        np.savez(folder / "results.npz", **run(text, named(arrays, "b"), named(arrays, "s")))


def named(arrays, letter):
    """The arrays whose names are a letter and a number, in the order of the numbers."""
    return [arrays[f"{letter}{i}"] for i in range(sum(bool(re.fullmatch(rf"{letter}\d+", name)) for name in arrays))]


def run(text, batches, state):
    """Returns the metrics and the state after each step."""
    import jax
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    devices = jax.devices("cpu")
    with mlir.make_ir_context():
        options = compiler.get_compile_options(num_replicas=len(devices), num_partitions=1)
        options.device_assignment = xla_client.DeviceAssignment.create(np.array([[each.id] for each in devices]))
        devices_of = xla_client.DeviceList(tuple(devices))
        program = devices[0].client.compile_and_load(ir.Module.parse(text), devices_of, options)

    mesh = jax.sharding.Mesh(np.array(devices), "replica")

    def joined(arrays):
        """The replicas' arrays one below the other, as an array of JAX. A scalar passes for one that all have."""
        shape = arrays[0].shape
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*["replica"][: len(shape)]))
        of_all = (len(devices) * shape[0], *shape[1:]) if shape else shape
        return jax.make_array_from_single_device_arrays(of_all, sharding, arrays)

    def sent(array):
        return joined([jax.device_put(each, device) for each, device in zip(array, devices, strict=True)])

    kept = [sent(array) for array in state]
    found = {}
    for step in range(len(batches[0])):
        outputs = program.execute_sharded([*(sent(parts[step]) for parts in batches), *kept])
        results = outputs.disassemble_into_single_device_arrays()
        num_metrics = len(results) - len(state)
        kept = [joined(arrays) for arrays in results[num_metrics:]]
        for letter, arrays in (("m", results[:num_metrics]), ("s", results[num_metrics:])):
            for i, array in enumerate(arrays):
                found.setdefault(f"{letter}{i}", []).append(np.stack([np.asarray(each) for each in array]))
    return found


if __name__ == "__main__":
    main()
