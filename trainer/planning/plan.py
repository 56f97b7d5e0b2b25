"""Prints what a config costs before any of it is spent: parameters, memory, tokens, disk and hours.

`print_plan` prints estimates by arithmetic; `print_compiled` prints figures of the device's real compiler.
"""

import glob
import math
from collections.abc import Iterator
from pathlib import Path

import rich.box
import rich.console
import rich.table

from trainer.config.settings import CharConfig, Config
from trainer.data.shards import PreparedData, num_examples, prepared_in
from trainer.errors import UserError
from trainer.execution import resolve
from trainer.hardware.devices import Target, cpu, known_targets
from trainer.model.size import count_parameters, flops_per_token, parameter_shapes, tokens_per_sec_at_peak
from trainer.planning.compiler import DoesNotFit, compile_step, largest_that_fits
from trainer.planning.estimate import estimate_memory, smallest_step_secs
from trainer.system.storage import locate
from trainer.system.terminal import say

# What well-tuned runs reach on these devices. It is not measured for this config.
ASSUMED_UTILISATION = 0.4


def print_plan(
    config: Config,
    vocabulary_size: int | None = None,
    target: Target | None = None,
    utilisation: float | None = None,
    with_weights: bool = False,
) -> None:
    """Prints what a config costs.

    Args:
        config: the run's configuration.
        vocabulary_size: number of tokens; None: the number in the prepared data, or in the config.
        target: the devices to plan for; None: the CPU, if `own_target` returns it.
        utilisation: model FLOPs utilisation that the hours follow from; None: ASSUMED_UTILISATION, which is printed.
        with_weights: whether to list every weight.

    Raises:
        UserError: the vocabulary is not known, a number is impossible, or the batch cannot be spread over the devices.
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
            f"device       distribution.kind={config.distribution.kind!r} does not name one; --target adds memory and "
            f"time: {known_targets()}"
        )
        return
    for line in (
        *_memory_lines(config, vocabulary_size, target),
        *_time_lines(config, vocabulary_size, target, utilisation),
    ):
        say(line)


def print_compiled(config: Config, vocabulary_size: int | None, target: Target | None) -> bool:
    """Compiles a config's step with the real compiler of its devices, prints what the step needs, and the largest
    micro-batch that fits.

    Returns:
        Whether the config's own micro-batch fits.

    Args:
        config: the run's configuration.
        vocabulary_size: number of tokens, as for `print_plan`.
        target: a TPU or GPUs.

    Raises:
        UserError: target is None or a CPU, or the batch cannot be spread over the devices.
    """
    vocabulary_size = find_vocabulary_size(config, vocabulary_size)
    if target is None or target.device.name == "cpu":
        raise UserError(f"--compile needs a --target that is a TPU or GPUs; {known_targets()}")
    execution = resolve(config, target.processor(), target.num_devices)
    examples, own, memory_bytes = execution.examples, execution.micro_batch_size, target.device.memory_bytes

    def fits(micro_batch_size: int) -> bool:
        label = f"{'compiled':<12} {micro_batch_size} examples at a time"
        try:
            step = compile_step(config.with_micro_batch_size(micro_batch_size), vocabulary_size, target)
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
    sizes = [size for size in _divisors(examples) if (size > own if own_fits else size < own)]
    largest = largest_that_fits(sizes, fits) or (own if own_fits else None)
    say(f"largest train.micro_batch_size that fits: {'none' if largest is None else largest}")
    return own_fits


def find_vocabulary_size(config: Config, given: int | None = None) -> int:
    """Returns the number of tokens: the given one, or the one in the prepared data, or the most that the config allows.

    Raises:
        UserError: none of these names a number, or the number is impossible.
    """
    prepared = None if given is not None else _prepared(config)
    size = prepared.vocabulary_size if prepared is not None else config.vocabulary_size() if given is None else given
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
    """Returns the CPU if distribution.kind is "cpu", or is "auto" without distribution.gpus; otherwise None, because
    the config does not name its devices. With "auto" a run uses the GPUs of its machine, which the plan cannot see.
    """
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
    # A new checkpoint is written before the oldest is removed, and the best one that was scored is kept as well.
    count = config.checkpoint.keep_last + 1 + (config.evaluation.every_steps is not None)
    yield f"checkpoints  {_size_of(count * checkpoint_bytes)} of disk: {count} of {_size_of(checkpoint_bytes)}"


def _data_lines(config: Config) -> Iterator[str]:
    train, examples = config.train, _num_examples(config)
    batch = f"{train.global_batch_size:,} x {train.sequence_length:,} tokens"
    steps = _num_steps(config)
    if steps is None:
        yield f"steps        of {batch}; how many {train.num_epochs} epochs take is known once the text is prepared"
        return
    yield f"steps        {steps:,} of {batch}: {_num_tokens(config):,} tokens, padding included"
    if config.data.weights is not None:
        yield "epochs       each source has its own number, by data.weights"
    elif examples is None:
        yield "epochs       known once the text is prepared"
    else:
        prepared = _prepared(config)
        source = "about: the stories that are not held out" if prepared is None else str(prepared.folder)
        yield f"epochs       {steps * train.global_batch_size / examples:.2f} of {examples:,} examples ({source})"


def _memory_lines(config: Config, vocabulary_size: int, target: Target) -> Iterator[str]:
    execution = resolve(config, target.processor(), target.num_devices)
    examples, own, there_is = execution.examples, execution.micro_batch_size, target.device.memory_bytes

    def total(micro_batch_size: int) -> float:
        return sum(estimate_memory(config, vocabulary_size, target, micro_batch_size).values())

    fitting = [size for size in _divisors(examples) if total(size) <= there_is]
    if config.train.micro_batch_size == "auto":
        own = max((size for size in fitting if size <= own), default=1)
    verdict = "fits" if total(own) <= there_is else "does not fit"
    largest = f"train.micro_batch_size={max(fitting)} is the largest that does" if fitting else "no micro-batch does"
    yield f"target       {target}: {examples:,} examples a step on each device, {own:,} at a time"
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
        dtype = resolve(config, target.processor(), target.num_devices).compute_dtype
        has = ", ".join(target.device.flops)
        what = f"the table of peaks has {target.device.name} in {has}" if has else "the table of peaks has no CPU"
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


def _prepared(config: Config) -> PreparedData | None:
    """Returns the newest data that the config's text was prepared to on this machine's disks, if any."""
    home = locate(config.data.prepared_folder)
    folders = home.glob(f"{glob.escape(config.prepared_name())}-*") if isinstance(home, Path) else ()
    newest = max(folders, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else prepared_in(newest)


def _num_examples(config: Config) -> int | None:
    if (prepared := _prepared(config)) is not None:
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


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _size_of(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _duration(secs: float) -> str:
    return f"{secs / 3600:,.1f} hours" if secs >= 3600 else f"{secs / 60:.1f} minutes"
