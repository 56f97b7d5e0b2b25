"""The ways of computing the model's operations: plain, for a CPU, and for XLA."""

from trainer.execution import Execution, compute_dtype_of, ops_of
from trainer.hardware.processor import Processor
from trainer.model.ops.cpu import CpuDecodingOps, CpuOps
from trainer.model.ops.plain import Ops
from trainer.model.ops.xla import XlaOps

_WAYS = {"plain": Ops, "cpu": CpuOps, "xla": XlaOps}


def make_ops(execution: Execution) -> Ops:
    """Returns the way of computing of an execution."""
    way = _WAYS[execution.ops]
    return way(execution.recompute, execution.query_block, execution.logit_rows, execution.compute_dtype)


def decoding_ops(precision: str, device: Processor, gathers: bool = False) -> Ops:
    """Returns the way of computing that decodes on a device.

    Args:
        precision: the Keras dtype policy of the model.
        device: the kind of device that holds the model.
        gathers: whether several devices hold the model together. Then nothing is compiled by XLA on a CPU: in a loop
            that gathers weights in several operations, the dependency optimizer of TensorFlow makes a NoOp of a
            compiled function, and the executor looks for a function of that name ("Function NoOp is not defined").
    """
    name = ops_of(device, use="decoding")
    way = CpuDecodingOps if name == "cpu" else _WAYS[name]
    return (Ops if gathers else way)(compute_dtype=compute_dtype_of(precision, device, name))


def scoring_ops(precision: str, device: Processor) -> Ops:
    """Returns the way of computing that scores texts on a device; the arguments are those of `decoding_ops`."""
    name = ops_of(device, use="evaluation")
    return _WAYS[name](compute_dtype=compute_dtype_of(precision, device, name))
