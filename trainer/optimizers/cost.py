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
    for (rows, columns), number in Counter(tuple(sorted(part)) for part in parts_of_matrices(config.model)).items():
        flops += -(-number // num_replicas) * 2 * rows * rows * (2 * columns + rows)
    return float(NUM_ITERATIONS * flops)


def exchanged_numbers(config: Config, num_replicas: int) -> int:
    """Returns how many numbers the optimizer sums over the replicas in a step: those of Muon's matrices, and of the
    matrices of zeros that fill the last shares.
    """
    if config.optimizer.kind != "muon" or num_replicas == 1:
        return 0
    by_shape = Counter(tuple(sorted(part)) for part in parts_of_matrices(config.model))
    return sum(
        -(-number // num_replicas) * num_replicas * rows * columns for (rows, columns), number in by_shape.items()
    )
