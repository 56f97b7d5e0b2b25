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

from trainer.config.schedule import describe_batch_warmup, examples_before, full_steps_between, steps_for
from trainer.config.settings import CharConfig, Config, micro_batch_sizes, num_pieces
from trainer.data.shards import PreparedData, num_examples, prepared_in, token_dtype
from trainer.errors import UserError
from trainer.execution import resolve
from trainer.hardware.devices import Target, known_targets
from trainer.model.size import (
    bytes_of_checkpoint,
    count_parameters,
    flops_per_token,
    num_checkpoints,
    parameter_shapes,
    tokens_per_sec_at_peak,
)
from trainer.optimizers.cost import optimizer_flops
from trainer.planning.compiler import DoesNotFit, compile_step, largest_that_fits
from trainer.planning.estimate import (
    computing_secs,
    exchange_secs,
    exchanges_meanwhile,
    sent_bytes,
    smallest_step_secs,
)
from trainer.planning.own_devices import own_devices
from trainer.planning.verdict import UNKNOWN, Command, memory_lines, print_line, way_lines, with_xla
from trainer.planning.ways import Way, needs_of, ways_to_fit
from trainer.system.storage import locate
from trainer.system.terminal import say, size_of

# The estimate and the compilers differ by less than this for the shipped configs.
ESTIMATE_MARGIN = 0.15
# What well-tuned runs reach on these devices. It is not measured for this config.
ASSUMED_UTILISATION = 0.4


def print_plan(
    config: Config,
    vocabulary_size: int | None = None,
    target: Target | None = None,
    utilisation: float | None = None,
    with_weights: bool = False,
    command: Command = UNKNOWN,
) -> None:
    """Prints what a config costs.

    Args:
        config: the run's configuration.
        vocabulary_size: number of tokens; None: the number in the prepared data, or in the config.
        target: the devices to plan for; None: those of this machine that a run would use.
        utilisation: model FLOPs utilisation that the hours follow from; None: ASSUMED_UTILISATION, which is printed.
        with_weights: whether to list every weight.
        command: the command that asks, from which the commands for what would fit are made.

    Raises:
        UserError: the vocabulary is not known, a number is impossible, the batch cannot be spread over the devices, or
            distribution.shard has only one to split over.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation} must be above 0 and at most 1.")
    vocabulary_size = find_vocabulary_size(config, vocabulary_size)
    if with_weights:
        _print_weights(config, vocabulary_size)
    for line in (*_model_lines(config, vocabulary_size), *_data_lines(config, vocabulary_size)):
        say(line)
    if target is None:
        own = own_devices(config)
        target = own.target
        if target is None and utilisation is not None:
            raise UserError(f"--utilisation {utilisation} has no effect without --target; {known_targets()}")
        if own.why:
            say(f"device       {own.why}")
        if target is None:
            return
    for line in (
        *memory_lines(config, vocabulary_size, target, command),
        *_time_lines(config, vocabulary_size, target, utilisation),
    ):
        print_line(line)


def print_compiled(
    config: Config, vocabulary_size: int | None, target: Target | None, command: Command = UNKNOWN
) -> bool:
    """Compiles a config's step with the real compiler of its devices, prints what the step needs, and the largest
    micro-batch that fits; if there is none, prints what would fit by the estimate.

    Returns:
        Whether the config's own micro-batch fits.

    Args:
        config: the run's configuration.
        vocabulary_size: number of tokens, as for `print_plan`.
        target: a TPU or GPUs.
        command: the command that asks, as for `print_plan`.

    Raises:
        UserError: target is None or a CPU, or the batch cannot be spread over the devices.
    """
    vocabulary_size = find_vocabulary_size(config, vocabulary_size)
    if target is None or target.device.name == "cpu":
        raise UserError(f"--compile needs a --target that is a TPU or GPUs; {known_targets()}")
    execution = resolve(config, target.processor(), target.num_devices)
    examples, own = execution.examples, execution.micro_batch_size

    def fits(micro_batch_size: int) -> bool:
        return _compiles(config, vocabulary_size, target, micro_batch_size)

    own_fits = fits(own)
    allowed = micro_batch_sizes(config, target.num_devices)
    sizes = [size for size in allowed if (size > own if own_fits else size < own)]
    largest = largest_that_fits(sizes, fits) or (own if own_fits else None)
    needs = needs_of(config, vocabulary_size, target).by_size
    # All at once need no sum of gradients. During train.batch_warmup they may not be allowed.
    if largest is None and own < examples in allowed and needs[examples] < needs[own] and fits(examples):
        largest = examples
    say(f"largest train.micro_batch_size that fits: {'none' if largest is None else largest}")
    if largest is None:
        ways = ways_to_fit(config, vocabulary_size, target, 1 - ESTIMATE_MARGIN, sizes_help=False)
        how = f"the estimate, with {ESTIMATE_MARGIN:.0%} to spare, for the compiler to confirm"
        for line in way_lines(config, vocabulary_size, target, ways, command, how):
            print_line(line)
    elif not own_fits:
        way = Way(target, (f"train.micro_batch_size={largest}",), 0.0, largest)
        say("This fits, by the compiler:")
        print_line(command.with_way(way))
    return own_fits


def _compiles(config: Config, vocabulary_size: int, target: Target, micro_batch_size: int) -> bool:
    """Prints what the compiler reports of a step with this micro-batch; returns whether it fits."""
    label = f"{'compiled':<12} {micro_batch_size} examples at a time"
    memory_bytes = target.device.memory_bytes
    try:
        step = compile_step(config.with_micro_batch_size(micro_batch_size), vocabulary_size, target)
    except DoesNotFit as error:
        say(f"{label}: does not fit: {error}")
        return False
    verdict = "fits" if step.memory_bytes() <= memory_bytes else "does not fit"
    in_pieces = config.distribution.shard == "weights"
    work = f"a micro-batch and an update are {step.flops / 1e12:.3g} teraflop and move {size_of(step.accessed_bytes)}; "
    sends = f"a device sends {size_of(step.sent_bytes)} a step; " if step.sent_bytes else ""
    say(
        f"{label}: {size_of(step.memory_bytes())} of {size_of(memory_bytes)}: {verdict}. "
        f"{size_of(step.arguments_bytes)} of weights, optimizer and batch and "
        # The compiler counts the body of a loop once, and split blocks are one.
        f"{size_of(step.temporaries_bytes)} of temporaries; {'' if in_pieces else work}{sends}in "
        f"{step.compile_secs:.0f} s"
    )
    if in_pieces and target.processor().kind == "GPU":
        print_line(
            f"{'':<12} This is the step as one program. A run on GPUs compiles a block and the loss by themselves, and "
            "exchanges weights between them."
        )
    return verdict == "fits"


def find_vocabulary_size(config: Config, given: int | None = None) -> int:
    """Returns the number of tokens: the given one, or the one in the prepared data, or the most that the config allows.

    Raises:
        UserError: none of these names a number, or the number is impossible.
    """
    prepared = None if given is not None else newest_prepared(config)
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


def _model_lines(config: Config, vocabulary_size: int) -> Iterator[str]:
    num_logits = config.model.num_logits(vocabulary_size)
    rows = f" in {num_logits:,} rows" if num_logits > vocabulary_size else ""
    num_parameters = count_parameters(config, vocabulary_size)
    yield (
        f"parameters   {num_parameters:,}; vocabulary {vocabulary_size:,}{rows}, sequence length "
        f"{config.train.sequence_length:,}"
    )
    count, checkpoint_bytes = num_checkpoints(config), bytes_of_checkpoint(config, vocabulary_size)
    yield f"checkpoints  {size_of(count * checkpoint_bytes)} of disk: {count} of {size_of(checkpoint_bytes)}"


def _data_lines(config: Config, vocabulary_size: int) -> Iterator[str]:
    train, examples = config.train, _num_examples(config)
    batch = f"{train.global_batch_size:,} x {train.sequence_length:,} tokens"
    steps = _num_steps(config)
    if steps is None:
        yield f"steps        of {batch}; how many {train.num_epochs} epochs take is known once the text is prepared"
        return
    warmup = describe_batch_warmup(train)
    yield f"steps        {steps:,} of {batch}{warmup}: {_num_tokens(config):,} tokens, padding included"
    if config.data.weights is not None:
        yield "epochs       each source has its own number, by data.weights"
    elif examples is None:
        yield "epochs       known once the text is prepared"
        num_bytes = 2 if token_dtype(vocabulary_size) == "uint16" else 4
        size = size_of(num_bytes * examples_before(train, steps) * train.sequence_length)
        yield f"text         {size} of disk if it is prepared to as many tokens, of {num_bytes} bytes each"
    else:
        prepared = newest_prepared(config)
        source = "about: the stories that are not held out" if prepared is None else str(prepared.folder)
        yield f"epochs       {examples_before(train, steps) / examples:.2f} of {examples:,} examples ({source})"


def _time_lines(config: Config, vocabulary_size: int, target: Target, utilisation: float | None) -> Iterator[str]:
    at_peak = tokens_per_sec_at_peak(config, vocabulary_size, target)
    of_optimizer = optimizer_flops(config, num_pieces(config, target.num_devices))
    yield (
        f"operations   {flops_per_token(config, vocabulary_size) / 1e9:.3g} gigaflop a token"
        + (f"; Muon adds {of_optimizer / 1e9:.3g} a step on each device" if of_optimizer else "")
    )
    yield from _exchange_lines(config, vocabulary_size, target)
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
        known = "; train.precision=mixed_float16 has a time" if dtype == "bfloat16" and "float16" in has else ""
        precision = f"train.precision={config.train.precision!r}, computed in {dtype}"
        yield f"time         not known for {precision}: {what}{known}"
    elif steps is not None and tokens is not None:
        assumed = "" if utilisation is not None else ", which is assumed (--utilisation)"
        utilisation = utilisation or ASSUMED_UTILISATION
        only = with_xla(config, target)
        roofline_secs = full_steps_between(config.train, 0, steps) * least
        roofline = f"{_duration(roofline_secs)} at the roofline{_part_of_exchange(config, vocabulary_size, target)}"
        at_roofline = tokens / at_peak / roofline_secs
        of, given, xla = "a model FLOPs utilisation of", f"{utilisation:.0%}{assumed}", f"; both{only}" if only else ""
        if utilisation <= at_roofline * (1 + 1e-9):  # A roofline of operations has exactly 1, apart from rounding.
            yield f"time         {roofline}; {_duration(tokens / at_peak / utilisation)} at {of} {given}{xla}"
        else:
            yield f"time         {roofline}{only}: {of} {100 * at_roofline:.3g}%, below {given}"
    elif utilisation is not None:
        raise UserError(
            f"--utilisation {utilisation} has no effect: the number of steps is known once the text is prepared. Leave "
            "it out, prepare the text first, or set train.total_steps."
        )


def _exchange_lines(config: Config, vocabulary_size: int, target: Target) -> Iterator[str]:
    """Yields a line about what several devices exchange in a step."""
    sent = sent_bytes(config, vocabulary_size, target)
    execution = resolve(config, target.processor(), target.num_devices)
    in_pieces = config.distribution.shard == "weights"
    names = {
        "gradients": f"gradients in {execution.weight_dtype if in_pieces else execution.sum_dtype}",
        "weights": f"weights in {execution.compute_dtype}" if in_pieces else f"new weights in {execution.weight_dtype}",
        "directions": f"Muon's matrices in {execution.direction_dtype}",
        "matrices": f"rows of Muon's matrices in {execution.orthogonalization_dtype} and of its results in "
        f"{execution.direction_dtype}",
    }
    if sent:
        parts = ", ".join(f"{size_of(size)} of {names[part]}" for part, size in sent.items())
        yield f"exchange     each device sends {size_of(sum(sent.values()))} a step: {parts}"
        if target.device.name != "cpu":
            yield f"links        {_time_of_exchange(config, vocabulary_size, target)}"


def _time_of_exchange(config: Config, vocabulary_size: int, target: Target) -> str:
    """Returns how long a step's exchange takes beside what the step computes, or why that is not known."""
    link, speed = target.device.link, target.sent_bytes_per_sec()
    if link is None or speed is None:
        return f"not known: the table of devices has no speed of the links of {target.device.name}"
    secs, computing = (of(config, vocabulary_size, target) for of in (exchange_secs, computing_secs))
    if secs is None:
        return f"not known: a network connects machines with {link.num_devices} or fewer {target.device.name} each"
    where = "within a slice" if target.device.num_axes else "within a machine"
    beside = ""
    if computing is not None:
        beside = f", beside {short_time(computing)} of computing at peak{_computed_again(config, target)}"
    return f"{short_time(secs)} a step at {speed / 1e9:.0f} GB/s of {link.name} {where}{beside}"


def _computed_again(config: Config, target: Target) -> str:
    """Returns what a plan appends to the time of computing if that leaves out products that gradients compute again."""
    execution = resolve(config, target.processor(), target.num_devices)
    if execution.recompute == "blocks":
        return ", apart from blocks that are computed again"
    return "" if execution.keeps_probabilities else ", apart from attention that is computed again"


def _part_of_exchange(config: Config, vocabulary_size: int, target: Target) -> str:
    """Returns what a plan appends to the time at the roofline: whether that adds the exchange, is the exchange's or
    leaves it out.
    """
    secs, computing = (of(config, vocabulary_size, target) for of in (exchange_secs, computing_secs))
    if secs is None:
        return " without the exchange"
    if secs and not exchanges_meanwhile(target):
        return " with the exchange"
    return " of the exchange" if computing is not None and secs > computing else ""


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


def newest_prepared(config: Config) -> PreparedData | None:
    """Returns the newest data that the config's text was prepared to on this machine's disks, if any.

    Raises:
        UserError: it is damaged.
    """
    home = locate(config.data.prepared_folder)
    folders = home.glob(f"{glob.escape(config.prepared_name())}-*") if isinstance(home, Path) else ()
    newest = max(folders, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else prepared_in(newest)


def _num_examples(config: Config) -> int | None:
    if (prepared := newest_prepared(config)) is not None:
        return num_examples(prepared.split("train"), config)
    data = config.data
    if data.is_storybook() and data.mode == "lines" and data.validation is None and not data.min_bytes:
        return round(data.storybook_stories * (1 - data.held_out_fraction))
    return None


def _num_steps(config: Config) -> int | None:
    examples = _num_examples(config)
    return config.train.total_steps if examples is None else steps_for(config.train, examples)


def _num_tokens(config: Config) -> int | None:
    steps = _num_steps(config)
    return None if steps is None else int(examples_before(config.train, steps)) * config.train.sequence_length


def _duration(secs: float) -> str:
    return f"{secs / 3600:,.1f} hours" if secs >= 3600 else f"{secs / 60:.1f} minutes"


def short_time(secs: float) -> str:
    """Returns the time of a part of a step, with three significant digits."""
    rounded = float(f"{secs:.3g}")
    return f"{rounded:,g} s" if rounded >= 1 else f"{1e3 * rounded:.3g} ms"
