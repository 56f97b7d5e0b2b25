"""What a step needs of its device by arithmetic: memory by part, and the least time it can take."""

import math

from trainer.config.settings import Config, num_pieces
from trainer.execution import DTYPE_BYTES, Execution, query_blocks, resolve
from trainer.hardware.devices import Target
from trainer.model.pieces import cut_all, most_bytes_at_once, numbers_of_pieces
from trainer.model.size import (
    count_parameters,
    matrix_parameters,
    matrix_widths,
    optimizer_numbers,
    parameter_shapes,
    tokens_per_sec_at_peak,
)
from trainer.optimizers.cost import exchanged_numbers, optimizer_flops


def estimate_memory(
    config: Config, vocabulary_size: int, target: Target, micro_batch_size: int | None = None
) -> dict[str, float]:
    """Estimates what a replica's step needs of its device, in bytes by part, at the worst instant.

    Two instants compete. Right after the loss, everything that the backward pass will read is there, with the gradient
    of the output projection and a chunk of logits with its gradient. At the end of the backward pass none of that is
    there, but the gradients of all weights are. At both instants there are the sum over micro-batches, if there are
    several, the weights with a copy of their matrices in the compute dtype, what the optimizer keeps, and the average
    of the weights if there is one. Muon needs a copy of its matrices in the dtype in which they are orthogonalized, and
    the results, when no activations are there. If distribution.shard splits the optimizer, a replica has its piece of
    what the optimizer keeps and of a weight, of a gradient at the end, and copies of what travels at a time. If it
    splits the weights, see `_in_pieces`.

    Args:
        config: the run's configuration.
        vocabulary_size: number of tokens.
        target: the devices that the run uses.
        micro_batch_size: the micro-batch to use instead of the config's own; None: the config's own.

    Raises:
        UserError: the batch cannot be spread over that many devices.
    """
    execution = resolve(config, target.processor(), target.num_devices, micro_batch_size)
    compute_bytes, weight_bytes = execution.compute_bytes, execution.weight_bytes
    num_weights = count_parameters(config, vocabulary_size)
    num_logits = config.model.num_logits(vocabulary_size)
    if config.distribution.shard == "weights":
        return _in_pieces(config, vocabulary_size, target, execution)
    copies = matrix_parameters(config, vocabulary_size) * compute_bytes if compute_bytes < weight_bytes else 0
    sums = num_weights * execution.gradient_sum_bytes
    of_muon = 2 * num_weights - optimizer_numbers(config, vocabulary_size)
    updates = of_muon * float(weight_bytes + DTYPE_BYTES[execution.orthogonalization_dtype])
    optimizer, piece = float(optimizer_numbers(config, vocabulary_size) * weight_bytes), 0.0
    if config.distribution.shard == "optimizer":
        numbers = pieces_numbers(config, vocabulary_size, target)
        of_muon = muon_pieces_numbers(config, target)
        updates = _updates_of_muon(config, target, execution)
        optimizer = float(3 * numbers - of_muon) * weight_bytes
        shapes = dict(parameter_shapes(config.model, vocabulary_size, config.train.sequence_length))
        at_once = most_bytes_at_once(shapes, num_pieces(config, target.num_devices), execution.sum_bytes)
        piece = float(numbers * execution.sum_bytes) + 2 * at_once
    always = {"weights": float(num_weights * weight_bytes + copies), "optimizer": optimizer}
    if config.optimizer.ema_decay is not None:
        always["average"] = float(num_weights * weight_bytes)
    logit_rows = min(execution.logit_rows, execution.examples_at_once * config.train.sequence_length)
    after_loss = {
        "gradients": sums + num_logits * config.model.hidden_dim * float(weight_bytes),
        "activations": kept_bytes(config, execution, copies_operands=target.processor().kind != "TPU"),
        "logits": logit_rows * float(num_logits * (weight_bytes + compute_bytes)),
    }
    gradients = max(sums, updates) + num_weights * float(weight_bytes) + piece
    at_end = {"gradients": gradients, "activations": 0.0, "logits": 0.0}
    return always | max(after_loss, at_end, key=lambda parts: sum(parts.values()))


def _in_pieces(config: Config, vocabulary_size: int, target: Target, execution: Execution) -> dict[str, float]:
    """Estimates what `estimate_memory` does if every replica holds only its piece of each weight, of its moments and of
    its gradient.

    Three instants compete. In the backward pass of the last block, its whole weights are there in the compute dtype
    with those of one that is gathered or dropped, and its whole gradients. In the loss, the table of the
    output projection is there in the compute dtype and in the dtype of the weights, with its gradient. At both there
    is what blocks keep, and on a TPU the pieces of all blocks in the compute dtype. At the end there is what
    Muon exchanges, if it trains the blocks.
    """
    weight_bytes, compute_bytes = execution.weight_bytes, execution.compute_bytes
    pieces = float(pieces_numbers(config, vocabulary_size, target) * weight_bytes)
    of_muon = float(muon_pieces_numbers(config, target) * weight_bytes)
    always = {"weights": pieces, "optimizer": 2 * pieces - of_muon}
    if config.optimizer.ema_decay is not None:
        always["average"] = pieces
    shapes = dict(parameter_shapes(config.model, vocabulary_size, config.train.sequence_length))
    of_block = sum(math.prod(shape) for name, shape in shapes.items() if "/block_0/" in name)
    num_logits = config.model.num_logits(vocabulary_size)
    table = num_logits * config.model.hidden_dim
    logit_rows = min(execution.logit_rows, execution.examples_at_once * config.train.sequence_length)
    sums = pieces + pieces / weight_bytes * execution.gradient_sum_bytes
    stacked = 0.0
    if target.processor().kind == "TPU":  # There a loop runs the blocks, whose pieces are in one array per weight.
        of_blocks = {name: shape for name, shape in shapes.items() if "/block_" in name}
        stacked = float(numbers_of_pieces(of_blocks, num_pieces(config, target.num_devices)) * compute_bytes)
    kept = kept_bytes(config, execution, copies_operands=target.processor().kind != "TPU")
    in_block = {
        "gathered": 2.0 * of_block * compute_bytes + stacked,
        "gradients": sums + of_block * weight_bytes,
        "activations": kept,
        "logits": 0.0,
    }
    in_loss = {
        "gathered": float(table * (compute_bytes + weight_bytes)) + stacked,
        "gradients": sums + table * weight_bytes,
        "activations": kept,
        "logits": logit_rows * float(num_logits * (weight_bytes + compute_bytes)),
    }
    at_end = {
        "gathered": 0.0,
        "gradients": sums + _updates_of_muon(config, target, execution),
        "activations": 0.0,
        "logits": 0.0,
    }
    return always | max(in_block, in_loss, at_end, key=lambda parts: sum(parts.values()))


def _updates_of_muon(config: Config, target: Target, execution: Execution) -> float:
    """Returns the bytes of Muon's updates of a replica's pieces, with what it exchanges for them: the rows that travel
    and the matrices that the replica gets whole, and their result.
    """
    in_shares = exchanged_numbers(config, num_pieces(config, target.num_devices))
    exchanged = 2 * DTYPE_BYTES[execution.orthogonalization_dtype] + DTYPE_BYTES[execution.direction_dtype]
    return float(muon_pieces_numbers(config, target) * execution.weight_bytes + in_shares * exchanged)


def pieces_numbers(config: Config, vocabulary_size: int, target: Target) -> int:
    """Returns how many numbers a replica has of all weights if they are split over the target's devices."""
    shapes = dict(parameter_shapes(config.model, vocabulary_size, config.train.sequence_length))
    return numbers_of_pieces(shapes, num_pieces(config, target.num_devices))


def muon_pieces_numbers(config: Config, target: Target) -> int:
    """Returns how many of these numbers Muon trains."""
    if config.optimizer.kind != "muon":
        return 0
    shapes = dict(parameter_shapes(config.model, 1, 1))
    matrices = {name: shapes[name] for name in matrix_widths(config.model)}
    return numbers_of_pieces(matrices, num_pieces(config, target.num_devices))


def kept_bytes(config: Config, execution: Execution, copies_operands: bool) -> float:
    """Estimates what the forward pass of the examples under way keeps for the backward pass.

    A block keeps, in the compute dtype and for each token:

        the residual stream before attention and before the feed-forward layer, from which norms are made again
        queries, keys and values by head; with qk_norm, queries and keys before it too
        what attention returns, by head and by token
        the feed-forward layer before its activation
        two dropout masks, in bytes
        and unless they are computed again, the probabilities, for each block of queries and the keys up to its end,
        and the feed-forward layer after its activation

    For a GPU, XLA multiplies matrices that are arrays in memory; so does TensorFlow on a CPU. For a TPU, XLA makes the
    operands of a product on the way. XLA's buffer assignments show both. So with copies_operands a block also keeps the
    outputs of its norms; the queries, keys and values that each block of queries meets, by themselves, instead of all
    queries, keys and values; and if the compute dtype is narrower than float32, one residual stream in float32.

    If weights are split, a block keeps what its forward pass hands over (trainer/training/passes.py): no masks; and if
    XLA compiles it, neither those copies, which the backward pass makes for one block at a time, nor the feed-forward
    layer after its activation.

    Args:
        config: the run's configuration.
        execution: how the replica computes.
        copies_operands: whether matrix products read all operands from memory, as on every device except a TPU.
    """
    model, sequence, compute_bytes = config.model, config.train.sequence_length, execution.compute_bytes
    tokens, width = execution.examples_at_once * sequence, model.hidden_dim
    block = _block_bytes(config, execution, copies_operands)
    ends = 2 * tokens * width * compute_bytes  # What the loss reads, and its gradient.
    if execution.recompute == "blocks":
        return model.num_layers * tokens * width * compute_bytes + block + ends
    if config.distribution.shard == "weights":
        copies_later = copies_operands and execution.is_compiled
        handed_over = _block_bytes(config, execution, copies_operands and not copies_later, is_handed_over=True)
        return model.num_layers * handed_over + (block if copies_later else 0.0) + ends
    return model.num_layers * block + ends


def _block_bytes(config: Config, execution: Execution, copies_operands: bool, is_handed_over: bool = False) -> float:
    """Estimates what a block keeps, or of split weights what its forward pass hands over; see `kept_bytes`."""
    model, sequence, compute_bytes = config.model, config.train.sequence_length, execution.compute_bytes
    examples, recompute = execution.examples_at_once, execution.recompute
    tokens, width, attention = examples * sequence, model.hidden_dim, model.num_heads * model.head_width()
    blocks = query_blocks(sequence, execution.query_block)
    scores = examples * model.num_heads * sum((end - first) * end for first, end in blocks)
    scores *= execution.keeps_probabilities
    is_activated = recompute == "nothing" and (copies_operands or not is_handed_over)
    feedforward = model.intermediate_projection_dim() + model.intermediate_dim * is_activated
    numbers = tokens * (2 * width + feedforward + 2 * attention) + scores
    if model.qk_norm:
        numbers += tokens * (attention + model.key_value_heads() * model.head_width())
    floats = 0
    if not copies_operands:
        numbers += tokens * model.query_key_value_dim()
    else:
        numbers += tokens * (2 * width + attention) + 2 * examples * attention * sum(end for _, end in blocks)
        if compute_bytes < 4:
            numbers -= tokens * width
            floats = tokens * width
    return numbers * compute_bytes + floats * 4 + (2 * tokens * width if model.dropout and not is_handed_over else 0)


def sent_bytes(config: Config, vocabulary_size: int, target: Target) -> dict[str, float]:
    """Returns the bytes that each device sends to others in a step, by what it sends; empty if there is one
    device.

    An operation over N devices sends at least (N - 1) / N of an array in a reduce-scatter or an all-gather, and twice
    that in an all-reduce. Rings of devices reach that. A loss, counts and a hash, less than 100 bytes, are left out.

    Args:
        config: the run's configuration.
        vocabulary_size: number of tokens.
        target: the devices that the run uses.

    Raises:
        UserError: the batch cannot be spread over that many devices.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    execution, number = resolve(config, target.processor(), target.num_devices), target.num_devices
    if number == 1:
        return {}
    if config.distribution.shard == "optimizer":
        own, over = pieces_numbers(config, vocabulary_size, target), num_pieces(config, number)
        scattered = own * (over - 1) + _sent_among_groups(config, number, own)
        sent = {"gradients": scattered * execution.sum_bytes, "weights": own * (over - 1.0) * execution.weight_bytes}
        return sent | _sent_of_muon(config, number, execution)
    if config.distribution.shard == "weights":
        of_muon = _sent_of_muon(config, number, execution)
        return _sent_in_pieces(config, vocabulary_size, target, execution) | of_muon
    share = (number - 1) / number
    sent = {"gradients": 2 * share * count_parameters(config, vocabulary_size) * execution.sum_bytes}
    if of_optimizer := exchanged_numbers(config, number):
        sent["directions"] = 2 * share * of_optimizer * DTYPE_BYTES[execution.direction_dtype]
    return sent


def _sent_among_groups(config: Config, num_replicas: int, numbers: float) -> float:
    """Returns the numbers that a replica sends so that these, a piece of a sum, are added up over all groups."""
    num_groups = num_replicas // num_pieces(config, num_replicas)
    return 2 * numbers * (num_groups - 1) / num_groups


def _sent_of_muon(config: Config, num_replicas: int, execution: Execution) -> dict[str, float]:
    """Returns what Muon sends of matrices in pieces, as a part of `sent_bytes`; nothing without Muon."""
    over = num_pieces(config, num_replicas)
    numbers = exchanged_numbers(config, over) * (over - 1) / over
    dtypes = execution.orthogonalization_dtype, execution.direction_dtype
    return {"matrices": numbers * sum(DTYPE_BYTES[dtype] for dtype in dtypes)} if numbers else {}


def _sent_in_pieces(config: Config, vocabulary_size: int, target: Target, execution: Execution) -> dict[str, float]:
    """Returns what `sent_bytes` does if the weights are split: in each micro-batch every block is gathered twice and
    everything else once, and each gradient is scattered. A table that embeds tokens and makes logits is used twice; a
    TPU's compiler adds its two gradients before they are scattered.
    """
    sent = {"gradients": 0.0, "weights": 0.0}
    num_replicas, num_micro_batches = target.num_devices, execution.examples // execution.micro_batch_size
    over = num_pieces(config, num_replicas)
    shapes = dict(parameter_shapes(config.model, vocabulary_size, config.train.sequence_length))
    for name, cut in cut_all(shapes, over).items():
        is_tied = config.model.tied_embeddings and "/token_embedding/" in name
        own = num_micro_batches * math.prod(cut.piece_shape)
        numbers, scattered = own * (over - 1), own * (over - 1) + _sent_among_groups(config, num_replicas, own)
        travels = execution.compute_bytes if len(cut.shape) > 1 else execution.weight_bytes
        sent["weights"] += numbers * travels * (2 if is_tied or "/block_" in name else 1)
        is_twice = is_tied and target.processor().kind != "TPU"
        sent["gradients"] += scattered * execution.weight_bytes * (2 if is_twice else 1)
    return sent


def exchange_secs(config: Config, vocabulary_size: int, target: Target) -> float | None:
    """Returns the time in which a device sends what `sent_bytes` counts, at the full speed of its links: 0 for one
    device, None if the speed is not known, as between machines.
    """
    sent, speed = sum(sent_bytes(config, vocabulary_size, target).values()), target.sent_bytes_per_sec()
    if not sent:
        return 0.0
    return None if speed is None or leaves_machine(config, target) else sent / speed


def leaves_machine(config: Config, target: Target) -> bool:
    """Returns whether a network connects GPUs: those of several workers, or more than a machine usually has."""
    link = target.device.link
    if link is None or target.device.num_axes:
        return False
    return config.distribution.kind == "multi_worker" or target.num_devices > link.num_devices


def smallest_step_secs(config: Config, vocabulary_size: int, target: Target) -> float | None:
    """Returns the time of a step at the roofline, from what it computes (`computing_secs`) and what the devices
    exchange (`exchange_secs`), if that is known. None if a peak of the device is not known.

    It is the longer of the two on TPUs, where XLA compiles the whole step and may do both at once. On GPUs it is the
    sum. Gradients are exchanged once, after the last of them, and the update needs the norm of all. If the weights are
    split, a block is one compiled function, which waits for all its weights, and exchanges take turns.
    """
    computing, exchange = (of(config, vocabulary_size, target) for of in (computing_secs, exchange_secs))
    if computing is None:
        return None
    return max(computing, exchange or 0.0) if exchanges_meanwhile(target) else computing + (exchange or 0.0)


def exchanges_meanwhile(target: Target) -> bool:
    """Returns whether devices may exchange while they compute; see `smallest_step_secs`."""
    return target.processor().kind == "TPU"


def computing_secs(config: Config, vocabulary_size: int, target: Target) -> float | None:
    """Returns the time of what a step computes: the longer of its operations at the device's peak and of its traffic at
    the peak of the device's memory. None if a peak is not known.

    The operations are those of the model and of the optimizer. What gradients compute again is left out: compilers drop
    a part of it, such as the last product of a block if model.pre_norm is set, because no gradient reads its result.

    The traffic is the least possible: the optimizer reads weights, moments and gradients and writes the first two; an
    average of the weights is read and written; a micro-batch writes what it keeps and reads it again, reads its
    matrices forward and backward and adds to the sum of gradients.
    """
    at_peak, train = tokens_per_sec_at_peak(config, vocabulary_size, target), config.train
    if at_peak is None or target.device.bytes_per_sec is None:
        return None
    execution = resolve(config, target.processor(), target.num_devices)
    weights_bytes = float(execution.weight_bytes) * count_parameters(config, vocabulary_size)
    kept = kept_bytes(config, execution, copies_operands=False)
    matrices_bytes = 2.0 * matrix_parameters(config, vocabulary_size) * execution.compute_bytes
    num_micro_batches = execution.examples // execution.micro_batch_size
    moments_bytes = float(execution.weight_bytes) * optimizer_numbers(config, vocabulary_size)
    if config.distribution.shard != "nothing":
        of_moments = 2 * pieces_numbers(config, vocabulary_size, target) - muon_pieces_numbers(config, target)
        moments_bytes = float(execution.weight_bytes) * of_moments
    num_passes = 3 + 2 * (config.optimizer.ema_decay is not None)
    of_pieces = float(execution.weight_bytes) * pieces_numbers(config, vocabulary_size, target)
    updated_bytes = of_pieces if config.distribution.shard == "weights" else weights_bytes
    traffic = num_passes * updated_bytes + 2 * moments_bytes
    traffic += num_micro_batches * (2 * kept + matrices_bytes + 2 * weights_bytes)
    tokens = train.global_batch_size * train.sequence_length
    peak = target.device.flops.get(execution.orthogonalization_dtype) or target.device.flops[execution.compute_dtype]
    of_optimizer = optimizer_flops(config, num_pieces(config, target.num_devices)) / peak
    return max(tokens / at_peak + of_optimizer, traffic / target.device.bytes_per_sec)
