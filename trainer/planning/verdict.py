"""Says whether a step fits its devices, what takes the memory, and what would fit."""

import shlex
from collections.abc import Iterator
from typing import NamedTuple

from trainer.config.settings import Config, num_pieces
from trainer.execution import Execution, resolve
from trainer.hardware.cuda import NEWEST_WHEEL, Build, Gpu, installed_build, lacks_code, support_of
from trainer.hardware.devices import Target
from trainer.planning.estimate import estimate_memory
from trainer.planning.ways import Way, needs_of, smallest_memory, ways_to_fit
from trainer.system.terminal import printable, say, show, size_of


class Command(NamedTuple):
    """The command that a plan answers, from which the commands that it offers are made.

    Attributes:
        config: the name or path of the config, as it was given.
        overrides: the overrides, as they were given.
        options: further options, such as --vocabulary-size.
        has_target: whether it has a --target.
    """

    config: str = "CONFIG"
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    has_target: bool = True

    def with_way(self, way: Way) -> str:
        """Returns the line with the command that plans a way."""
        replaced = {override.partition("=")[0] for override in way.overrides}
        kept = [each for each in self.overrides if each.partition("=")[0].strip() not in replaced]
        is_own = not self.has_target and way.target.device.name == "cpu"
        target = [] if is_own else ["--target", str(way.target)]
        return _INDENT + shlex.join(["trainer", "plan", self.config, *kept, *way.overrides, *target, *self.options])


# The command of a plan that nobody typed.
UNKNOWN = Command()
# A command stands on a line of its own, indented by this.
_INDENT = " " * 4


def print_line(line: str) -> None:
    """Prints a line of a plan. A command stays whole on a terminal, too: one that is broken between words cannot be
    copied.
    """
    if line.startswith(_INDENT):
        show(f"{printable(line)}\n")
    else:
        say(line)


def memory_lines(config: Config, vocabulary_size: int, target: Target, command: Command) -> Iterator[str]:
    """Yields the lines about memory: the verdict, the parts, and if the step does not fit, what would."""
    needs, there_is = needs_of(config, vocabulary_size, target), target.device.memory_bytes
    own = needs.planned(there_is)
    execution = resolve(config, target.processor(), target.num_devices, own)
    parts, needed = estimate_memory(config, vocabulary_size, target, own), needs.by_size[own]
    yield f"target       {target}: {execution.examples:,} examples a step on each device, {own:,} at a time"
    yield from _software_lines(config, target)
    verdict = f"memory       {size_of(needed)} of {size_of(there_is)} on each:"
    if needed <= there_is:
        largest = max(needs.fitting(there_is))
        yield (
            f"{verdict} fits, by this estimate; train.micro_batch_size={largest} is the largest that does"
            f"{with_xla(config, target)}"
        )
        yield from _part_lines(config, parts, execution, target)
        return
    yield f"{verdict} does not fit, by this estimate"
    yield from _part_lines(config, parts, execution, target)
    ways = ways_to_fit(config, vocabulary_size, target)
    yield from way_lines(config, vocabulary_size, target, ways, command)


def way_lines(
    config: Config, vocabulary_size: int, target: Target, ways: list[Way], command: Command, how: str = "this estimate"
) -> Iterator[str]:
    """Yields the ways in which a step fits, each with the command that plans it, or the reason why there is none.

    Args:
        config: the run's configuration, which does not fit.
        vocabulary_size: number of tokens.
        target: the devices that it does not fit.
        ways: what `ways_to_fit` returned.
        command: the command that is answered.
        how: what says that the ways fit.
    """
    if not any(way.target.device.name == target.device.name for way in ways):
        least = smallest_memory(config, vocabulary_size, target)
        parts = ", ".join(f"{part} {size_of(size)}" for part, size in least.items() if size)
        why = "A single device holds all weights and gradients."
        if "gathered" in least:
            why = "This counts weights, moments and gradients as split over the devices (distribution.shard=weights)."
        if max(least, key=lambda part: least[part]) == "activations":
            why = "These are the activations of a single example: trainer cannot split a sequence over devices."
        needed = f"{size_of(sum(least.values()))} of {size_of(target.device.memory_bytes)}"
        yield (
            f"No micro-batch, recomputation, precision or split makes it fit {target}: at least {needed} are needed, "
            f"by the estimate: {parts}. {why}"
        )
    if not ways:
        yield (
            "No device of the table holds it either. What is left is another model: fewer model.num_layers, a smaller "
            "model.hidden_dim, a smaller vocabulary or a shorter train.sequence_length."
        )
        return
    yield f"These fit, by {how}, the smallest change first:"
    for way in ways:
        share = f"{size_of(way.memory_bytes)} of {size_of(way.target.device.memory_bytes)}"
        yield f"  {share}: {_change(config, target, way)}"
        yield command.with_way(way)


def _part_lines(config: Config, parts: dict[str, float], execution: Execution, target: Target) -> Iterator[str]:
    copies = (
        f", and its matrices in {execution.compute_dtype}" if execution.compute_bytes < execution.weight_bytes else ""
    )
    is_end, in_pieces = parts["activations"] == 0, config.distribution.shard == "weights"
    piece = f"1/{num_pieces(config, config.train.global_batch_size // execution.examples)} of "
    gradients = "of all weights" if is_end else "of the output projection"
    if execution.gradient_sum_bytes:
        gradients += f", and the sum of all gradients in {execution.sum_dtype}"
        if execution.micro_batch_size < execution.examples:
            gradients += f" over {execution.examples // execution.micro_batch_size} micro-batches"
    moments = "AdamW's two moments of each weight"
    if config.optimizer.kind == "muon":
        moments = "Muon's momentum of the matrices in blocks, AdamW's two moments of all other weights"
    if config.distribution.shard == "optimizer":
        moments = f"{piece}{moments.replace(', AdamW', ' and of AdamW')}, and of the weights that it updates"
        gradients += f", and {piece}the sum over devices" if is_end else ""
    is_in_loss = parts["logits"] > 0
    if in_pieces:
        moments = f"{piece}{moments.replace(', AdamW', ' and of AdamW')}"
        of_whole = "what Muon exchanges" if is_end else "of the output projection" if is_in_loss else "of a block"
        gradients = f"{piece}all weights, and {of_whole}"
        if execution.gradient_sum_bytes:
            gradients += f"; {piece}their sum in {execution.sum_dtype}"
    gathered = "the output projection" if is_in_loss else f"two blocks in {execution.compute_dtype}"
    if target.processor().kind == "TPU":
        gathered += f", and the pieces of all blocks in {execution.compute_dtype}"
    sequence = config.train.sequence_length
    recomputed = {"attention": "; attention is computed again", "blocks": "; blocks are computed again"}
    notes = {
        "weights": f"{piece}the model in {execution.weight_dtype}"
        if in_pieces
        else f"the model in {execution.weight_dtype}{copies}",
        "gathered": gathered,
        "optimizer": moments,
        "average": f"{piece if in_pieces else ''}the average of each weight",
        "gradients": gradients,
        "activations": f"of {execution.examples_at_once} x {sequence:,} tokens"
        + recomputed.get(execution.recompute, ""),
        "logits": f"of {min(execution.logit_rows, execution.examples_at_once * sequence)} tokens at a time",
    }
    when = "at the end of the backward pass" if is_end else "right after the loss"
    if in_pieces:
        when = "in the loss" if is_in_loss else "when Muon works" if is_end else "in the backward pass of a block"
    yield f"  the most is needed {when}:"
    for part, size in parts.items():
        if size:
            yield f"  {part:<13}{size_of(size):>9}  {notes[part]}"


def _change(config: Config, target: Target, way: Way) -> str:
    """Describes what a way changes, and what that costs."""
    settings = dict(override.partition("=")[::2] for override in way.overrides)
    execution = resolve(config, way.target.processor(), way.target.num_devices, way.micro_batch_size)
    said = []
    if way.target.device != target.device and way.target.device.name != "cpu":
        said.append(f"another device, {way.target.device.name}")
    elif way.target.num_devices > target.num_devices:
        said.append(f"{way.target.num_devices} devices, {execution.examples} examples a step on each")
    elif way.target.num_devices < target.num_devices:
        number = way.target.num_devices
        said.append(f"{number} replicas, which share the memory" if number > 1 else "one replica, with all the memory")
    if "train.precision" in settings:
        said.append(f"computed in {settings['train.precision'].removeprefix('mixed_')}, which rounds more")
    if "train.recompute" in settings:
        more = {"attention": "a sixth more of attention's products", "blocks": "one more forward pass"}
        what = settings["train.recompute"]
        said.append(f"{what} computed again, {more[what]}")
    if settings.get("distribution.shard") == "optimizer":
        said.append("the optimizer split over the devices, the same model up to rounding")
    if settings.get("distribution.shard") == "weights":
        said.append("weights and optimizer split over the devices, which gather each block twice a micro-batch")
    if "train.micro_batch_size" in settings:
        is_whole = way.micro_batch_size == execution.examples
        size = f"{way.micro_batch_size} examples at a time"
        said.append(f"all {execution.examples} examples at once, without a sum of gradients" if is_whole else size)
    return "; ".join(said)


def _software_lines(config: Config, target: Target) -> Iterator[str]:
    """Yields what TensorFlow lacks for a target, if anything."""
    device = target.device
    if not device.in_tensorflow:
        yield (
            f"tensorflow   not supported on TPU {device.name}, by Google's documents: trainer cannot train there. "
            "Memory and time are given to compare."
        )
    if not with_xla(config, target):
        return
    build, gpu = _build(), _gpu_of(target)
    if not support_of(build, gpu.capability).runs:
        yield f"tensorflow   {lacks_code(build, gpu)}: nothing runs there; docs/devices.md tells which build has code"
        return
    how = "the driver compiles its operations, and XLA is not used"
    if config.train.xla == "on":
        how = "train.xla='on' is refused there; with train.xla=off the driver compiles its operations"
    yield (
        f"tensorflow   {lacks_code(build, gpu)}; {how}. A step is likely to need more memory and time than is said "
        "here; docs/devices.md tells which build has code"
    )


def with_xla(config: Config, target: Target) -> str:
    """Returns what a plan appends to memory and hours that hold with XLA only, if the target's TensorFlow cannot use
    it; "" otherwise.
    """
    if "cc" not in target.device.circuits:
        return ""
    support = support_of(_build(), _gpu_of(target).capability)
    return "" if support.compiles or (support.runs and config.train.xla == "off") else " with XLA"


def _build() -> Build:
    build = installed_build()
    # A build without CUDA says nothing about the machine that has the GPU.
    return build if build is not None and build.cuda else NEWEST_WHEEL


def _gpu_of(target: Target) -> Gpu:
    return Gpu(target.device.known_as[0], divmod(round(target.device.circuits["cc"] * 10), 10))
