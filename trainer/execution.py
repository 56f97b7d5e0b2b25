"""How a step works through its batch, as one pure answer for all who need it: the step, and the plan of it.

It imports no TensorFlow, so that a plan needs none.
"""

from typing import NamedTuple

from trainer.config import Config, examples_per_replica

# In smaller batches adding up the gradients costs more than two halves at once gain: measured on two cores, 12 x 64
# tokens are a fifth slower in halves, 32 x 118 a sixth faster.
HALVED_FROM_TOKENS = 2048


class Execution(NamedTuple):
    """How a replica computes the gradients of its rows.

    Attributes:
        rows: of a replica's batch.
        micro_batch_size: rows at a time; divides rows.
        at_once: micro-batches that may be under way at the same time.
        sum_bytes: of each number in the sum of gradients.
        weight_bytes: of each weight, and of each gradient by it.
    """

    rows: int
    micro_batch_size: int
    at_once: int
    sum_bytes: int
    weight_bytes: int

    @property
    def summed_bytes(self) -> int:
        """Bytes a weight of what a replica keeps beside the gradients of the rows under way: their sum over several
        micro-batches; of a single one a copy, if replicas add up in a wider dtype; otherwise nothing.
        """
        return self.sum_bytes if self.micro_batch_size < self.rows or self.sum_bytes > self.weight_bytes else 0


def execution_of(config: Config, num_replicas: int, is_cpu: bool, micro_batch_size: int | None = None) -> Execution:
    """Returns how each of num_replicas replicas computes a step's gradients.

    Args:
        config: of the run.
        num_replicas: that share the global batch.
        is_cpu: whether replicas are on CPUs.
        micro_batch_size: in place of the config's own.

    Raises:
        UserError: the batch cannot be spread evenly over the replicas.
    """
    train = config.train
    rows = examples_per_replica(config, num_replicas)
    asked = micro_batch_size or train.fixed_micro_batch_size()
    size, at_once = micro_batches(asked, rows, train.sequence_length, is_cpu)
    weight_bytes = 8 if train.precision == "float64" else 4
    # In float64 a sum of float32 gradients does not depend on the order of its terms, so a CPU makes the same bits of
    # the same micro-batches on any number of replicas; two terms have but one order. Accelerators are slow in float64,
    # or lack it.
    is_wide = is_cpu and train.global_batch_size // size > 2
    return Execution(rows, size, at_once, 8 if is_wide else weight_bytes, weight_bytes)


def micro_batches(asked: int | None, rows: int, sequence: int, is_cpu: bool) -> tuple[int, int]:
    """Returns how many rows of its batch a replica works through at a time, and how many such parts at once.

    On a CPU two halves run side by side: the cores that one's sums and softmaxes leave idle do the other's matrix
    products. Anywhere else one part at a time fills the device, and a second would only need memory.

    Args:
        asked: train.micro_batch_size, where it is a number.
        rows: of a replica's batch.
        sequence: tokens in a row.
        is_cpu: whether the replica is on a CPU.
    """
    if not is_cpu:
        return asked or rows, 1
    halves = rows % 2 == 0 and rows * sequence >= HALVED_FROM_TOKENS
    return asked or (rows // 2 if halves else rows), 2
