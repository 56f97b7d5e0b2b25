"""What a config costs, before any of it is spent: parameters, memory, tokens, disk and hours, without device or data.

An estimate, but for what `trainer/planning/compiler.py` has heard from the device's real compiler.
"""

import glob
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import rich.box
import rich.console
import rich.table

from trainer.config import CharConfig, Config, ModelConfig, examples_per_replica
from trainer.errors import UserError
from trainer.execution import COMPUTE_DTYPES, resolve
from trainer.hardware.devices import Target, cpu, known_targets
from trainer.hardware.processor import Processor, processor
from trainer.planning.compiler import DoesNotFit, compile_step, largest_that_fits
from trainer.system.storage import locate
from trainer.system.terminal import say

if TYPE_CHECKING:
    from trainer.data.shards import PreparedData

Shape = tuple[int, ...]

# Blocks of attention.py and loss.CHUNK_ROWS, which a test compares: those modules load TensorFlow.
QUERIES_AT_A_TIME = 128
RECOMPUTED_QUERIES_AT_A_TIME = 256
LOGIT_ROWS_AT_A_TIME = 512

# What well-made trainings reach on the devices they were made for, and nobody has measured of this one.
ASSUMED_UTILISATION = 0.4

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def parameter_shapes(model: ModelConfig, vocabulary_size: int, sequence_length: int) -> Iterator[tuple[str, Shape]]:
    """Yields the path and shape of every weight of the GPT, without building it."""
    width, attention_dim = model.hidden_dim, model.num_heads * model.head_dim()
    num_logits = model.num_logits(vocabulary_size)
    yield "gpt/token_embedding/embeddings", (num_logits, width)
    if model.positions == "learned":
        yield "gpt/position_embedding/embeddings", (sequence_length, width)
    for i in range(model.num_layers):
        block = f"gpt/block_{i}"
        yield from _projection(f"{block}/query_key_value", (width, model.query_key_value_dim()), model.use_bias)
        yield from _projection(f"{block}/attention_output", (attention_dim, width), model.use_bias)
        yield from _norm(f"{block}/attention_norm", model)
        yield from _projection(f"{block}/intermediate", (width, model.intermediate_projection_dim()), model.use_bias)
        yield from _projection(f"{block}/output", (model.intermediate_dim, width), model.use_bias)
        yield from _norm(f"{block}/feedforward_norm", model)
    if model.pre_norm:
        yield from _norm("gpt/final_norm", model)
    if not model.tied_embeddings:
        yield "gpt/unembedding/kernel", (num_logits, width)
        if model.use_bias:
            yield "gpt/unembedding/bias", (num_logits,)


def count_parameters(config: Config, vocabulary_size: int) -> int:
    """Returns how many numbers a model learns."""
    shapes = parameter_shapes(config.model, vocabulary_size, config.train.sequence_length)
    return sum(math.prod(shape) for _, shape in shapes)


def matrix_parameters(config: Config, vocabulary_size: int) -> int:
    """Returns how many of them every token is multiplied by: those of the blocks' matrices and of the output
    projection, which may be the token embedding; not what is looked up, biases and normalizations.
    """
    shapes = parameter_shapes(config.model, vocabulary_size, config.train.sequence_length)
    tied = "gpt/token_embedding/embeddings" if config.model.tied_embeddings else ""
    return sum(math.prod(shape) for path, shape in shapes if path.endswith("/kernel") or path == tied)


def flops_per_token(config: Config, vocabulary_size: int) -> float:
    """Returns the operations that a token costs in training: 6 N + 12 layers heads head_dim sequence_length.

    N is `matrix_parameters`. Each costs a multiplication and an addition forward, and twice that backward; and so do a
    query's scores with all sequence_length keys and their mix of the values: with no regard to the causal mask, which
    makes half of them needless, as it is usually counted. Nothing that is computed again is counted again.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    model = config.model
    attention = model.num_layers * model.num_heads * model.head_dim() * config.train.sequence_length
    return 6.0 * matrix_parameters(config, vocabulary_size) + 12.0 * attention


def tokens_per_sec_at_peak(config: Config, vocabulary_size: int, target: Target) -> float | None:
    """Returns how many tokens a second a utilisation of 1 would be, which no training comes near: a training's tokens
    per second by these are its model FLOPs utilisation. None where a peak is not known, as of a CPU or for float64.
    """
    peak = target.device.flops.get(COMPUTE_DTYPES[config.train.precision])
    return None if peak is None else target.num_devices * peak / flops_per_token(config, vocabulary_size)


def kept_bytes(
    model: ModelConfig,
    rows: int,
    sequence: int,
    dtype_bytes: int,
    copies_operands: bool,
    recompute: str,
) -> float:
    """Estimates what is kept of the forward pass for the backward pass.

    A block keeps, in the compute dtype and for each token:

        the residual stream before attention and before the feed-forward layer, from which norms are made again
        queries, keys and values by head
        what attention returns, by head and by token
        the feed-forward layer before its activation
        of dropout two masks, in bytes
        and where nothing is made again, the probabilities, of each block of queries those of the keys up to its end;
        queries, keys and values as the projection made them; and the feed-forward layer after its activation

    XLA for a GPU makes matrix products of arrays in memory, where that for a TPU makes what goes into them on the way;
    both as their buffer assignments show. So with copies_operands a block keeps the outputs of its norms too; in place
    of queries, keys and values, those that each block of queries meets, by themselves; and where the compute
    dtype is narrower, one residual stream in float32 and, unless it is made again, the derivative of GELU in float32.

    Args:
        model: its shape.
        rows: examples at a time.
        sequence: tokens in each.
        dtype_bytes: of the compute dtype.
        copies_operands: whether for a GPU.
        recompute: "nothing"; "attention", its probabilities and the activations; or "blocks", all of a block but its
            input, one block at a time.
    """
    tokens, width, attention = rows * sequence, model.hidden_dim, model.num_heads * model.head_dim()
    step = sequence
    if sequence >= 2 * QUERIES_AT_A_TIME:  # Shorter ones are attended to as a whole.
        step = QUERIES_AT_A_TIME if recompute == "nothing" else RECOMPUTED_QUERIES_AT_A_TIME
    blocks = [(first, min(first + step, sequence)) for first in range(0, sequence, step)]
    scores = rows * model.num_heads * sum((end - first) * end for first, end in blocks)
    scores *= recompute == "nothing" or len(blocks) == 1  # Short sequences are attended to as a whole.
    feedforward = model.intermediate_projection_dim() + model.intermediate_dim * (recompute == "nothing")
    numbers = tokens * (2 * width + feedforward + 2 * attention) + scores
    floats = 0
    if not copies_operands:
        numbers += tokens * model.query_key_value_dim() * (2 if recompute == "nothing" else 1)
    else:
        numbers += tokens * (2 * width + attention) + 2 * rows * attention * sum(end for _, end in blocks)
        if dtype_bytes < 4:
            numbers -= tokens * width
            floats = tokens * width
    block = numbers * dtype_bytes + floats * 4 + (2 * tokens * width if model.dropout else 0)
    ends = 2 * tokens * width * dtype_bytes  # What the loss reads, and its gradient.
    if recompute == "blocks":
        return model.num_layers * tokens * width * dtype_bytes + block + ends
    return model.num_layers * block + ends


def estimate_memory(
    config: Config, vocabulary_size: int, target: Target, micro_batch_size: int | None = None
) -> dict[str, float]:
    """Estimates what a replica's step needs of its device, in bytes by part, at the worst instant.

    Two instants compete. Right after the loss all that the backward pass will read is there, the gradient of the
    output projection, and a chunk of logits with its gradient. At the end of the backward pass none of that is, but the
    gradients of all weights. The sum over micro-batches, if there are several, is there at both, as
    `trainer.execution` says, and so are weights, with a copy of their matrices in the compute dtype, and AdamW's two
    moments.

    Args:
        config: of the run.
        vocabulary_size: number of tokens.
        target: what it runs on.
        micro_batch_size: in place of the config's own.

    Raises:
        UserError: the batch cannot be spread over that many devices.
    """
    train, model = config.train, config.model
    execution = resolve(config, _processor(target), target.num_devices, micro_batch_size)
    micro = execution.examples_at_once
    is_tpu = target.device.num_axes > 0
    recompute = _recomputed(config, target)
    dtype_bytes = DTYPE_BYTES[COMPUTE_DTYPES[train.precision]]
    wide_bytes = execution.weight_bytes
    num_weights = count_parameters(config, vocabulary_size)
    num_logits = model.num_logits(vocabulary_size)
    copies = matrix_parameters(config, vocabulary_size) * dtype_bytes if dtype_bytes < wide_bytes else 0
    sums = num_weights * execution.summed_bytes
    always = {"weights": float(num_weights * wide_bytes + copies), "optimizer": 2.0 * num_weights * wide_bytes}
    after_loss = {
        "gradients": sums + num_logits * model.hidden_dim * float(wide_bytes),
        "activations": kept_bytes(model, micro, train.sequence_length, dtype_bytes, not is_tpu, recompute),
        "logits": min(LOGIT_ROWS_AT_A_TIME, micro * train.sequence_length)
        * float(num_logits * (wide_bytes + dtype_bytes)),
    }
    at_end = {"gradients": sums + num_weights * float(wide_bytes), "activations": 0.0, "logits": 0.0}
    return always | max(after_loss, at_end, key=lambda parts: sum(parts.values()))


def smallest_step_secs(config: Config, vocabulary_size: int, target: Target) -> float | None:
    """Returns what a step takes at the roofline: the longer of its operations at the device's peak and of its traffic
    at its memory's. None where a peak is not known.

    The least traffic there can be: AdamW reads weights, moments and gradients and writes the first two; a micro-batch
    writes what it keeps and reads it again, reads its matrices forward and backward and adds to the sum of gradients.
    """
    at_peak, train = tokens_per_sec_at_peak(config, vocabulary_size, target), config.train
    if at_peak is None or target.device.bytes_per_sec is None:
        return None
    rows = examples_per_replica(config, target.num_devices)
    micro = train.fixed_micro_batch_size() or rows
    dtype_bytes = DTYPE_BYTES[COMPUTE_DTYPES[train.precision]]
    weights_bytes = 4.0 * count_parameters(config, vocabulary_size)
    kept = kept_bytes(config.model, micro, train.sequence_length, dtype_bytes, False, _recomputed(config, target))
    matrices_bytes = 2.0 * matrix_parameters(config, vocabulary_size) * dtype_bytes
    traffic = 7 * weights_bytes + rows // micro * (2 * kept + matrices_bytes + 2 * weights_bytes)
    tokens = train.global_batch_size * train.sequence_length
    return max(tokens / at_peak, traffic / target.device.bytes_per_sec)


def _processor(target: Target) -> Processor:
    return processor("CPU" if _is_cpu(target) else "TPU" if target.device.num_axes else "GPU")


def _is_cpu(target: Target) -> bool:
    return target.device.name == "cpu"


def _recomputed(config: Config, target: Target) -> str:
    if config.train.recompute == "auto":
        return "nothing" if _is_cpu(target) else "attention"
    return config.train.recompute


def print_plan(
    config: Config,
    vocabulary_size: int | None = None,
    target: Target | None = None,
    utilisation: float | None = None,
    with_weights: bool = False,
) -> None:
    """Prints what a config costs.

    Args:
        config: of the run.
        vocabulary_size: in place of that of the prepared data or of the config.
        target: what it is to run on; None: what the config's distribution says, where it does.
        utilisation: model FLOPs utilisation to tell hours by; None: one is assumed, and said to be.
        with_weights: whether to list every weight.

    Raises:
        UserError: the vocabulary is not known, or a number is impossible.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation} must be above 0 and at most 1.")
    vocabulary_size = find_vocabulary_size(config, vocabulary_size)
    if with_weights:
        _print_weights(config, vocabulary_size)
    for line in (*_model_lines(config, vocabulary_size), *_data_lines(config)):
        say(line)
    target = target or own_target(config)
    if target is None:
        if utilisation is not None:
            raise UserError(f"--utilisation {utilisation} has no effect without --target; {known_targets()}")
        say(
            f"device       distribution.kind={config.distribution.kind!r} does not say which; --target adds memory and "
            f"time: {known_targets()}"
        )
        return
    for line in (
        *_memory_lines(config, vocabulary_size, target),
        *_time_lines(config, vocabulary_size, target, utilisation),
    ):
        say(line)


def print_compiled(config: Config, vocabulary_size: int | None, target: Target | None) -> bool:
    """Compiles a config's step with the real compiler of its devices, prints what it needs there, and the largest
    micro-batch that fits; returns whether the config's own does.

    Args:
        config: of the run.
        vocabulary_size: as of `print_plan`.
        target: TPU or GPUs.

    Raises:
        UserError: there is no such compiler, or the batch cannot be spread over the devices.
    """
    vocabulary_size = find_vocabulary_size(config, vocabulary_size)
    if target is None or target.device.name == "cpu":
        raise UserError(f"--compile needs a --target that is a TPU or GPUs; {known_targets()}")
    rows = examples_per_replica(config, target.num_devices)
    own, memory_bytes = config.train.fixed_micro_batch_size() or rows, target.device.memory_bytes

    def fits(micro_batch_size: int) -> bool:
        train = config.train.model_copy(update={"micro_batch_size": micro_batch_size})
        label = f"{'compiled':<12} {micro_batch_size} rows at a time"
        try:
            step = compile_step(config.model_copy(update={"train": train}), vocabulary_size, target)
        except DoesNotFit as error:
            say(f"{label}: does not fit: {error}")
            return False
        share = f"{_size_of(step.memory_bytes())} of {_size_of(memory_bytes)}"
        verdict = "fits" if step.memory_bytes() <= memory_bytes else "does not fit"
        say(
            f"{label}: {share}: {verdict}. {_size_of(step.arguments_bytes)} of weights, optimizer and batch and "
            f"{_size_of(step.temporaries_bytes)} of temporaries; a micro-batch and an update are "
            f"{step.flops / 1e12:.3g} teraflop and move {_size_of(step.accessed_bytes)}; in {step.compile_secs:.0f} s"
        )
        return verdict == "fits"

    own_fits = fits(own)
    sizes = [size for size in range(1, rows + 1) if rows % size == 0 and (size > own if own_fits else size < own)]
    largest = largest_that_fits(sizes, fits) or (own if own_fits else None)
    say(f"largest train.micro_batch_size that fits: {'none' if largest is None else largest}")
    return own_fits


def find_vocabulary_size(config: Config, asked: int | None = None) -> int:
    """Returns how many tokens there are: as asked, or as prepared, or at most by the config.

    Raises:
        UserError: none of these says it, or it is impossible.
    """
    prepared = None if asked is not None else _prepared(config)
    size = prepared.vocabulary_size if prepared is not None else config.vocabulary_size() if asked is None else asked
    if size is None:
        where, example = "tokenizer.path", "GPT-2: 50257"
        if isinstance(config.tokenizer, CharConfig):
            where, example = "the text", "English in plain characters: about 100"
        raise UserError(
            f"tokenizer.kind={config.tokenizer.kind!r} takes its vocabulary from {where}, which plan does not read; "
            f"give --vocabulary-size ({example})."
        )
    if size < 1:
        raise UserError(f"--vocabulary-size {size} must be at least 1.")
    return size


def own_target(config: Config) -> Target | None:
    """Returns the devices that a config's distribution names: none but CPUs."""
    distribution = config.distribution
    is_cpu = distribution.kind in ("auto", "cpu") and distribution.gpus is None
    return cpu(distribution.logical_devices) if is_cpu else None


def _model_lines(config: Config, vocabulary_size: int) -> Iterator[str]:
    num_logits = config.model.num_logits(vocabulary_size)
    rows = f" in {num_logits:,} rows" if num_logits > vocabulary_size else ""
    num_parameters = count_parameters(config, vocabulary_size)
    yield (
        f"parameters   {num_parameters:,}; vocabulary {vocabulary_size:,}{rows}, sequence length "
        f"{config.train.sequence_length:,}"
    )
    checkpoint_bytes = 3.0 * num_parameters * (8 if config.train.precision == "float64" else 4)
    # A new one is written before the oldest goes, and the best of those that were scored is kept besides.
    count = config.checkpoint.keep_last + 1 + (config.evaluation.every_steps is not None)
    yield f"checkpoints  {_size_of(count * checkpoint_bytes)} of disk: {count} of {_size_of(checkpoint_bytes)}"


def _data_lines(config: Config) -> Iterator[str]:
    train, examples = config.train, _num_examples(config)
    batch = f"{train.global_batch_size:,} x {train.sequence_length:,} tokens"
    steps = _num_steps(config)
    if steps is None:
        yield f"steps        of {batch}; how many {train.num_epochs} epochs take is known once the text is prepared"
        return
    yield f"steps        {steps:,} of {batch}: {_num_tokens(config):,} tokens, padding counted"
    if config.data.weights is not None:
        yield "epochs       of each source its own, by data.weights"
    elif examples is None:
        yield "epochs       known once the text is prepared"
    else:
        prepared = _prepared(config)
        source = "about: as many stories are not held out" if prepared is None else str(prepared.folder)
        yield f"epochs       {steps * train.global_batch_size / examples:.2f} of {examples:,} examples ({source})"


def _memory_lines(config: Config, vocabulary_size: int, target: Target) -> Iterator[str]:
    rows, train = examples_per_replica(config, target.num_devices), config.train
    own = resolve(config, _processor(target), target.num_devices).micro_batch_size
    there_is = target.device.memory_bytes

    def total(micro_batch_size: int) -> float:
        return sum(estimate_memory(config, vocabulary_size, target, micro_batch_size).values())

    fitting = [size for size in range(1, rows + 1) if rows % size == 0 and total(size) <= there_is]
    if train.micro_batch_size == "auto":
        own = max((size for size in fitting if size <= own), default=1)
    verdict = "fits" if total(own) <= there_is else "does not fit"
    largest = f"train.micro_batch_size={max(fitting)} is the largest that does" if fitting else "no micro-batch does"
    yield f"target       {target}: {rows:,} rows a step on each device, {own:,} at a time"
    needed = f"{_size_of(total(own))} of {_size_of(there_is)}"
    yield f"memory       {needed} on each: {verdict}, by this estimate; {largest}"
    for part, size in estimate_memory(config, vocabulary_size, target, own).items():
        yield f"  {part:<13}{_size_of(size):>9}"


def _time_lines(config: Config, vocabulary_size: int, target: Target, utilisation: float | None) -> Iterator[str]:
    at_peak = tokens_per_sec_at_peak(config, vocabulary_size, target)
    yield f"operations   {flops_per_token(config, vocabulary_size) / 1e9:.3g} gigaflop a token"
    steps, tokens = _num_steps(config), _num_tokens(config)
    least = smallest_step_secs(config, vocabulary_size, target)
    if at_peak is None or least is None:
        dtype, has = COMPUTE_DTYPES[config.train.precision], ", ".join(target.device.flops)
        what = f"of {target.device.name} the table has {has}" if has else "a CPU's peak is not in the table"
        if utilisation is not None:
            raise UserError(
                f"--utilisation {utilisation} has no effect: the time is not known for train.precision="
                f"{config.train.precision!r}, computed in {dtype}: {what}. Leave it out, or choose another --target."
            )
        yield f"time         not known for train.precision={config.train.precision!r}, computed in {dtype}: {what}"
    elif steps is not None and tokens is not None:
        assumed = "" if utilisation is not None else ", which is assumed (--utilisation)"
        utilisation = utilisation or ASSUMED_UTILISATION
        at_roofline, likely = _duration(steps * least), _duration(tokens / at_peak / utilisation)
        yield (
            f"time         {at_roofline} at the roofline; {likely} at a model FLOPs utilisation of "
            f"{utilisation:.0%}{assumed}"
        )
    elif utilisation is not None:
        raise UserError(
            f"--utilisation {utilisation} has no effect: the number of steps is known once the text is prepared. Leave "
            "it out, prepare the text first, or set train.total_steps."
        )


def _print_weights(config: Config, vocabulary_size: int) -> None:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_footer=True)
    shapes = list(parameter_shapes(config.model, vocabulary_size, config.train.sequence_length))
    total = sum(math.prod(shape) for _, shape in shapes)
    table.add_column("weight", footer="all")
    table.add_column("shape", justify="right")
    table.add_column("parameters", justify="right", footer=f"{total:,}")
    table.add_column("share", justify="right")
    for path, shape in shapes:
        size = math.prod(shape)
        table.add_row(path, " x ".join(map(str, shape)), f"{size:,}", f"{size / total:.1%}")
    rich.console.Console().print(table)


def _prepared(config: Config) -> "PreparedData | None":
    """Returns what the config's text was prepared as last, on a disk, if it was."""
    home = locate(config.data.prepared_folder)
    folders = home.glob(f"{glob.escape(config.prepared_name())}-*") if isinstance(home, Path) else ()
    newest = max(folders, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return None
    from trainer.data.shards import prepared_in

    return prepared_in(newest)


def _num_examples(config: Config) -> int | None:
    if (prepared := _prepared(config)) is not None:
        from trainer.data.shards import num_examples

        return num_examples(prepared.split("train"), config)
    data = config.data
    if data.is_storybook() and data.mode == "lines" and data.validation is None and not data.min_bytes:
        return round(data.storybook_stories * (1 - data.held_out_fraction))
    return None


def _num_steps(config: Config) -> int | None:
    examples = _num_examples(config)
    return config.train.total_steps if examples is None else config.train.steps_for(examples)


def _num_tokens(config: Config) -> int | None:
    steps = _num_steps(config)
    return None if steps is None else steps * config.train.global_batch_size * config.train.sequence_length


def _size_of(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _duration(secs: float) -> str:
    return f"{secs / 3600:,.1f} hours" if secs >= 3600 else f"{secs / 60:.1f} minutes"


def _projection(path: str, shape: Shape, use_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{path}/kernel", shape
    if use_bias:
        yield f"{path}/bias", shape[-1:]


def _norm(path: str, model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield f"{path}/gamma", (model.hidden_dim,)
    if model.use_bias:
        yield f"{path}/beta", (model.hidden_dim,)
