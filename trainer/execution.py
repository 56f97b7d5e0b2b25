"""What a config means on a kind of device: the one answer that the step, evaluation, decoding, plan and lowering read.

Pure functions of settings and device. They import no TensorFlow, so that `trainer plan` answers fast.
"""

from typing import Literal, NamedTuple

from trainer.config.settings import Config, divisor_of_shares, examples_per_replica
from trainer.errors import UserError
from trainer.hardware.processor import KINDS, Processor

OpsName = Literal["plain", "cpu", "xla"]
Recompute = Literal["nothing", "attention", "blocks"]
Use = Literal["training", "evaluation", "decoding"]

# Below this many tokens a CPU loses more by adding up the gradients of two halves than it gains by computing them side
# by side: measured on two cores, 12 x 64 tokens are a fifth slower in halves, 32 x 118 tokens a sixth faster.
HALVED_FROM_TOKENS = 2048

# Attention takes this many queries at a time. Fewer leave matrix units idle.
QUERY_BLOCK = 128
# The same if the gradient computes the probabilities again: each block then reads all keys before it once more.
RECOMPUTED_QUERY_BLOCK = 2 * QUERY_BLOCK
# Shorter sequences are faster as a whole.
BLOCKS_FROM_QUERIES = 2 * QUERY_BLOCK

# The loss takes this many tokens at a time, with one row of logits each. Fewer rows need less memory, more rows make
# fuller matrix products.
LOGIT_ROWS = 512

# The dtype that a policy computes in, and the dtype of its weights.
COMPUTE_DTYPES = {
    "float32": "float32",
    "float64": "float64",
    "mixed_bfloat16": "bfloat16",
    "mixed_float16": "float16",
}
WEIGHT_DTYPES = {"float32": "float32", "float64": "float64", "mixed_bfloat16": "float32", "mixed_float16": "float32"}
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class Execution(NamedTuple):
    """How one replica computes its share of a batch.

    Attributes:
        examples: the replica's share of the global batch; in a batch warm-up, of the largest.
        micro_batch_size: examples at a time; divides examples.
        at_once: micro-batches of a replica that may be under way at the same time.
        total_micro_batches: the micro-batches of all replicas.
        is_compiled: whether we compile forward and backward pass with XLA: if the weights are split, those of a block,
            and the loss. A TPU's strategy compiles the whole step anyway.
        ops: the way of computing: "cpu" for operations one by one on a CPU, "plain" for operations one by one on
            another device, "xla" for a function that XLA compiles as a whole. Without a TPU that is both passes, or
            with split weights a pass of a block, or the loss.
        recompute: what the backward pass computes again.
        query_block: queries that attention takes at a time, in sequences that are not attended to as a whole.
        keeps_probabilities: whether the backward pass reads the probabilities of attention from memory.
        logit_rows: tokens that the loss takes at a time, with one row of logits each.
        compute_dtype: the dtype of activations.
        weight_dtype: the dtype of weights, of their gradients after the sum over replicas, and of losses.
        sum_dtype: the dtype in which gradients are added up over micro-batches and replicas.
        stacks_matrices: whether Muon multiplies matrices of one shape as a stack. A CPU is faster with one by one, and
            then a product has the same bits whichever replica computes it.
        direction_dtype: the dtype in which replicas exchange the matrices that Muon has orthogonalized.
    """

    examples: int
    micro_batch_size: int
    at_once: int
    total_micro_batches: int
    is_compiled: bool
    ops: OpsName
    recompute: Recompute
    query_block: int
    keeps_probabilities: bool
    logit_rows: int
    compute_dtype: str
    weight_dtype: str
    sum_dtype: str
    stacks_matrices: bool
    direction_dtype: str

    @property
    def examples_at_once(self) -> int:
        """Examples that are under way at the same time, in all micro-batches."""
        return min(self.at_once * self.micro_batch_size, self.examples)

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return DTYPE_BYTES[self.compute_dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight, and of its gradient in one micro-batch."""
        return DTYPE_BYTES[self.weight_dtype]

    @property
    def sum_bytes(self) -> int:
        """Bytes of a number in the sum of gradients."""
        return DTYPE_BYTES[self.sum_dtype]

    @property
    def orthogonalization_dtype(self) -> str:
        """The dtype in which Muon orthogonalizes matrices. float16 cannot hold the squares of small numbers."""
        return "bfloat16" if self.compute_dtype == "bfloat16" else self.weight_dtype

    @property
    def gradient_sum_bytes(self) -> int:
        """Bytes per weight of the sum of gradients, which a replica keeps beside the gradients of the examples under
        way. With a single micro-batch the sum is a copy if replicas add up in a wider dtype; otherwise there is none,
        and this is 0.
        """
        return self.sum_bytes if self.micro_batch_size < self.examples or self.sum_bytes > self.weight_bytes else 0


def resolve(
    config: Config,
    device: Processor,
    num_replicas: int,
    micro_batch_size: int | None = None,
    use: Use = "training",
) -> Execution:
    """Returns how each of num_replicas replicas computes its share of a batch.

    Args:
        config: the run's configuration.
        device: the kind of device that every replica is on.
        num_replicas: replicas that share the global batch.
        micro_batch_size: the micro-batch to use instead of the config's own; None: the config's own.
        use: "training"; or "evaluation" or "decoding", which compute no gradients and are not compiled with XLA, except
            that a TPU's strategy compiles an evaluation.

    Raises:
        UserError: the batch cannot be spread evenly over the replicas, or train.xla is "on" and XLA cannot compile for
            the device.
    """
    train, is_cpu = config.train, device.kind == "CPU"
    examples = examples_per_replica(config, num_replicas)
    asked = (micro_batch_size or train.fixed_micro_batch_size()) if use == "training" else None
    # In a batch warm-up a replica's share of every batch is a number of whole micro-batches.
    share = divisor_of_shares(config, num_replicas) if use == "training" else examples
    # Every micro-batch gathers the weights again, and operations that replicas exchange by are in turn.
    gathers = config.distribution.shard == "weights" and num_replicas > 1
    size = asked or (share if gathers else _examples_at_a_time(share, train.sequence_length, device))
    if use == "training" and train.xla == "on" and not device.compiles:
        raise UserError(
            f"train.xla='on': this build of TensorFlow does not know this {device.kind}, and XLA would abort. "
            "Set train.xla=off, or leave it out; a build with a newer CUDA may know it."
        )
    wants_xla = train.xla == "on" or (train.xla == "auto" and device.kind == "GPU")
    is_compiled = use == "training" and wants_xla and device.compiles
    ops = ops_of(device, is_compiled, use)
    recompute = _recompute(config, device) if use == "training" else "nothing"
    compute_dtype, weight_dtype = compute_dtype_of(train.precision, device, ops), WEIGHT_DTYPES[train.precision]
    total_micro_batches = train.global_batch_size // size
    # A CPU adds up float32 gradients in float64, which has 29 more bits, and rounds the sum to float32. In practice the
    # result does not depend on the order of the terms, unless they differ by more than a factor of 2**29. So the same
    # micro-batches give the same bits on any number of replicas, except with distribution.shard, whose replicas add up
    # the gradients' norm in pieces. Two terms give the same bits in either order, and need no wider sum. Accelerators
    # are slow in float64, or lack it.
    # The gradients of split weights are sums over replicas, in the dtype of the weights, before micro-batches are added
    # up.
    is_wide = is_cpu and total_micro_batches > 2 and not gathers
    return Execution(
        examples=examples,
        micro_batch_size=size,
        # On a CPU two micro-batches run side by side: the cores that the sums and softmaxes of one leave idle compute
        # the matrix products of the other. One micro-batch fills any other device.
        at_once=2 if is_cpu and not gathers else 1,
        total_micro_batches=total_micro_batches,
        is_compiled=is_compiled,
        ops=ops,
        recompute=recompute,
        query_block=QUERY_BLOCK if recompute == "nothing" else RECOMPUTED_QUERY_BLOCK,
        keeps_probabilities=recompute == "nothing" or train.sequence_length < BLOCKS_FROM_QUERIES,
        logit_rows=LOGIT_ROWS,
        compute_dtype=compute_dtype,
        weight_dtype=weight_dtype,
        sum_dtype="float64" if is_wide else weight_dtype,
        stacks_matrices=not is_cpu,
        # Half the bytes, and the same numbers, because every sum has one term. NCCL, which adds up on GPUs, cannot add
        # up bfloat16 in every version.
        direction_dtype="bfloat16" if device.kind == "TPU" and compute_dtype == "bfloat16" else weight_dtype,
    )


def ops_of(device: Processor, is_compiled: bool = False, use: Use = "training") -> OpsName:
    """Returns the way of computing on a device; see `Execution.ops`.

    Raises:
        ValueError: the kind of device is unknown.
    """
    if device.kind not in KINDS:
        raise ValueError(f"device.kind={device.kind!r} has no way of computing; use one of {', '.join(KINDS)}.")
    if is_compiled or (device.kind == "TPU" and use != "decoding"):
        return "xla"
    return "cpu" if device.kind == "CPU" else "plain"


def compute_dtype_of(precision: str, device: Processor, ops: OpsName) -> str:
    """Returns the dtype that a Keras policy computes in. On a CPU that is slow in 16 bits it is a wider dtype, which
    holds all the numbers of the narrow one.
    """
    dtype = COMPUTE_DTYPES[precision]
    is_slow = dtype == "float16" or (dtype == "bfloat16" and not device.multiplies_bfloat16)
    return "float32" if is_slow and ops == "cpu" else dtype


def query_blocks(sequence: int, block: int) -> list[tuple[int, int]]:
    """Returns [first, end) of each block of queries that attention takes at a time.

    Args:
        sequence: number of queries.
        block: queries at a time, as `Execution.query_block`.
    """
    if sequence < BLOCKS_FROM_QUERIES:
        return [(0, sequence)]
    return [(first, min(first + block, sequence)) for first in range(0, sequence, block)]


def _examples_at_a_time(examples: int, sequence: int, device: Processor) -> int:
    """Returns the micro-batch if the config sets none: the whole share; on a CPU, half of a large share."""
    is_halved = device.kind == "CPU" and examples % 2 == 0 and examples * sequence >= HALVED_FROM_TOKENS
    return examples // 2 if is_halved else examples


def _recompute(config: Config, device: Processor) -> Recompute:
    if config.train.recompute != "auto":
        return config.train.recompute
    # A CPU usually has enough memory, and recomputing saves it no time.
    return "nothing" if device.kind == "CPU" else "attention"
