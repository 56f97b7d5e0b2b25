"""What an optimizer costs, by arithmetic without TensorFlow, so that `trainer plan` answers fast."""

from collections import Counter

from trainer.config.settings import Config
from trainer.model.size import parts_of_matrices

# How often Newton and Schulz's iteration is applied.
NUM_ITERATIONS = 5


def optimizer_flops(config: Config, num_replicas: int) -> float:
    """Returns the operations of the products of matrices in the optimizer, on the replica that does most of them.

    A replica orthogonalizes its share of the matrices of each shape. An iteration takes two products with the matrix,
    and one of its square.
    """
    if config.optimizer.kind != "muon":
        return 0.0
    flops = 0
    for shape, number in _numbers_by_shape(config).items():
        rows, columns = sorted(shape)
        flops += -(-number // num_replicas) * 2 * rows * rows * (2 * columns + rows)
    return float(NUM_ITERATIONS * flops)


def exchanged_numbers(config: Config, num_replicas: int) -> int:
    """Returns how many numbers a replica gives to each exchange of Muon's matrices in a step, with the zeros that fill
    the last shares. Without a split that is a sum over replicas of all matrices. If distribution.shard cuts them, it is
    an all-to-all of this replica's rows of every matrix.
    """
    if config.optimizer.kind != "muon" or num_replicas == 1:
        return 0
    numbers = 0
    for (rows, columns), number in _numbers_by_shape(config).items():
        own_rows = rows if config.distribution.shard == "nothing" else -(-rows // num_replicas)
        numbers += -(-number // num_replicas) * num_replicas * own_rows * columns
    return numbers


def _numbers_by_shape(config: Config) -> Counter[tuple[int, int]]:
    """Returns how many matrices of each shape are shared among the replicas. With distribution.shard, [rows, columns]
    and [columns, rows] are two shapes, because a replica's rows of them differ in shape.
    """
    parts = parts_of_matrices(config.model)
    if config.distribution.shard != "nothing":
        return Counter(parts)
    return Counter((min(part), max(part)) for part in parts)
