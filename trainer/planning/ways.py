"""Ways in which a config that does not fit its devices does fit, each tried by the arithmetic of `estimate_memory`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from trainer.config.settings import Config, check_shard, micro_batch_sizes
from trainer.errors import UserError
from trainer.execution import resolve
from trainer.hardware.cuda import NEWEST_WHEEL, support_of
from trainer.hardware.data_sheets import GPUS, TPUS, Device
from trainer.hardware.devices import Target, parse_target
from trainer.planning.estimate import computing_secs, estimate_memory, exchange_secs, exchanges_meanwhile

# Values by names such as train.recompute.
Change = dict[str, Any]
# From the one that keeps most in memory to the one that keeps least.
_RECOMPUTE = ("nothing", "attention", "blocks")
# More devices than these are not offered.
_MOST_GPUS = 64


class Way(NamedTuple):
    """Settings and devices with which a config fits.

    Attributes:
        target: the devices.
        overrides: the settings to add, as overrides.
        memory_bytes: what a step then needs of each device.
        micro_batch_size: the examples at a time.
    """

    target: Target
    overrides: tuple[str, ...]
    memory_bytes: float
    micro_batch_size: int


class Needs(NamedTuple):
    """What a step needs of each device by the number of examples at a time.

    Attributes:
        by_size: the bytes with each micro-batch that divides a replica's share of every batch; not all rising, because
            a micro-batch that is smaller than the share needs a sum of gradients beside the gradients.
        own: the config's micro-batch; with "auto" the largest that a run would try.
        is_auto: whether a run finds the micro-batch.
        compute_dtype: the dtype of activations.
    """

    by_size: dict[int, float]
    own: int
    is_auto: bool
    compute_dtype: str

    def planned(self, most_bytes: float) -> int:
        """Returns the examples at a time on a device with this memory; with "auto" the most that fit."""
        if not self.is_auto:
            return self.own
        return max((size for size in self.fitting(most_bytes) if size <= self.own), default=1)

    def fitting(self, most_bytes: float) -> list[int]:
        """Returns the micro-batches that fit a memory, rising."""
        return [size for size, needed in self.by_size.items() if needed <= most_bytes]


def needs_of(config: Config, vocabulary_size: int, target: Target) -> Needs:
    """Returns what a config's step needs of each device of a target, which does not depend on their memory.

    Raises:
        UserError: the batch cannot be spread over the devices, or distribution.shard has only one to split over.
    """
    execution = resolve(config, target.processor(), target.num_devices)
    check_shard(config, target.num_devices)
    sizes = micro_batch_sizes(config, target.num_devices)
    by_size = {size: sum(estimate_memory(config, vocabulary_size, target, size).values()) for size in sizes}
    is_auto = config.train.micro_batch_size == "auto"
    return Needs(by_size, execution.micro_batch_size, is_auto, execution.compute_dtype)


def ways_to_fit(
    config: Config, vocabulary_size: int, target: Target, budget: float = 1.0, sizes_help: bool = True
) -> list[Way]:
    """Returns ways in which a step fits its devices, the smallest change first; none if nothing helps.

    Settings that do not change the model come first, then the precision, fewer replicas of a CPU, more devices, and
    another device. A way that needs several changes at once is returned only if there is none with fewer of its kind.

    Args:
        config: the run's configuration, which does not fit.
        vocabulary_size: number of tokens.
        target: the devices that it does not fit.
        budget: the share of a device's memory that a step may need.
        sizes_help: whether another micro-batch alone may be enough; False: the compiler said that none is.
    """
    search = _Search(config, vocabulary_size, target, budget)
    found = [*search.settings(sizes_help), *search.precisions()]
    return [*found, *search.fewer_replicas(), *search.more_devices(splits=not found), *search.other_devices()]


class _Search:
    """Tries changes of a config. Settings are tried as copies of the config, which is much faster than reading them."""

    def __init__(self, config: Config, vocabulary_size: int, target: Target, budget: float) -> None:
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.target = target
        self.budget = budget
        self.known: dict[tuple[Any, ...], Needs | None] = {}

    def settings(self, sizes_help: bool) -> list[Way]:
        """Returns the ways that change how the same step is computed."""
        recomputing, splitting = self.recomputing(), self.splitting()
        alone = [self._first([{}], sizes=True) if sizes_help else None, self._first(recomputing)]
        two = [self._first(recomputing, sizes=True), self._first(splitting, sizes=True)]
        three = [self._first(_together(recomputing, splitting), sizes=True)]
        # Last, because the devices then exchange the weights in every micro-batch.
        is_auto, splits = self.config.train.micro_batch_size == "auto", self.splitting_weights()
        weights = [(None if is_auto else self._first(splits)) or self._quickest(splits)]
        for number in ([*alone, self._first(splitting)], two, three, weights):
            if found := [way for way in number if way is not None]:
                return found
        return []

    def precisions(self) -> list[Way]:
        """Returns the way with the nearest narrower precision, together with other settings if it must be."""
        for change in self.narrower():
            changes = [change, *_together([change], self.recomputing())]
            changes += [*_together(changes, self.splitting()), *_together([change], self.splitting_weights())]
            way = self._first([change]) or self._first([change], sizes=True) or self._first(changes, sizes=True)
            if way is not None:
                return [way]
        return []

    def fewer_replicas(self) -> list[Way]:
        """Returns the way with fewer replicas of a split CPU, which share its memory."""
        number = self.target.num_devices
        if self.target.device.name != "cpu":
            return []
        for fewer in (each for each in range(number - 1, 0, -1) if number % each == 0):
            whole = self.target.device.memory_bytes * number
            target = Target(Device("cpu", {}, whole / fewer), fewer)
            if way := self._try({"distribution.logical_devices": fewer}, target):
                return [way]
        return []

    def more_devices(self, splits: bool) -> list[Way]:
        """Returns the way with the fewest more devices of the same kind, at the same global batch.

        Args:
            splits: whether the optimizer or the weights may be split over them, the weights with a recomputation, too.
        """
        if self.target.device.name == "cpu":
            return []
        numbers = [self.target.num_devices << doublings for doublings in range(1, 13)]
        targets = [target for number in numbers if (target := _as_offered(Target(self.target.device, number)))]
        splitting = [self.splitting(is_several=True), self.splitting_weights(is_several=True)]
        unchanged: list[Change] = [{}]
        for changes in [unchanged, *(splitting if splits else [])]:
            if way := next((way for target in targets if (way := self._first(changes, target))), None):
                return [way]
        return []

    def other_devices(self) -> list[Way]:
        """Returns the way with the smallest other device that the step fits as it is. If there is none, returns the way
        with the smallest device that it fits with other settings.
        """
        targets = [*self._bigger_devices()]
        as_it_is = next((way for target in targets if (way := self._try({}, target))), None)
        changes = self.all_changes()
        for target in [] if as_it_is else targets:
            if way := self._first(changes, target) or self._first(changes, target, sizes=True):
                return [way]
        return [as_it_is] if as_it_is else []

    def _bigger_devices(self) -> Iterator[Target]:
        """Yields as many of every device with more memory, and one for a CPU however it is split; those that
        TensorFlow's XLA has no code for come last.
        """
        kinds = [GPUS] if not self.target.device.num_axes else [TPUS, GPUS]
        is_cpu, number = self.target.device.name == "cpu", self.target.num_devices
        memory_bytes = self.target.device.memory_bytes * (number if is_cpu else 1)
        for kind in kinds:
            for device in sorted(kind.values(), key=lambda each: (_is_unknown_to_wheels(each), each.memory_bytes)):
                target = _as_offered(Target(device, 1 if is_cpu else number))
                if target is not None and device.memory_bytes > memory_bytes and device.in_tensorflow:
                    yield target

    def recomputing(self) -> list[Change]:
        """Returns the recomputations that keep less than the config's, the smallest first."""
        own = resolve(self.config, self.target.processor(), self.target.num_devices).recompute
        return [{"train.recompute": each} for each in _RECOMPUTE[_RECOMPUTE.index(own) + 1 :]]

    def splitting(self, is_several: bool = False) -> list[Change]:
        """Returns the split of what the optimizer keeps, if training would accept it.

        Args:
            is_several: whether there are several devices whatever the target has.
        """
        distribution, is_several = self.config.distribution, is_several or self.target.num_devices > 1
        if not is_several or distribution.shard != "nothing":
            return []
        return [{"distribution.shard": "optimizer"}]

    def splitting_weights(self, is_several: bool = False) -> list[Change]:
        """Returns the split of the weights, alone and with recomputations, as `splitting` does."""
        is_several = is_several or self.target.num_devices > 1
        if not is_several or self.config.distribution.shard == "weights":
            return []
        return [change | {"distribution.shard": "weights"} for change in [{}, *self.recomputing()]]

    def all_changes(self) -> list[Change]:
        """Returns every change and all that go together, without those of the micro-batch."""
        changes = [{}, *self.recomputing(), *self.narrower(), *_together(self.narrower(), self.recomputing())]
        return [
            *changes,
            *_together(changes, self.splitting()),
            *_together([{}, *self.narrower()], self.splitting_weights()),
        ]

    def narrower(self) -> list[Change]:
        """Returns the precisions that keep less, the nearest first."""
        flops, precision = self.target.device.flops, self.config.train.precision
        mixed = "mixed_float16" if flops and "bfloat16" not in flops else "mixed_bfloat16"
        narrower = {"float64": ["float32", mixed], "float32": [mixed]}.get(precision, [])
        return [{"train.precision": each} for each in narrower]

    def _first(self, changes: list[Change], target: Target | None = None, sizes: bool = False) -> Way | None:
        """Returns the way with the first change that fits, and if sizes with the largest micro-batch that does."""
        return next((way for change in changes if (way := self._try(change, target or self.target, sizes))), None)

    def _quickest(self, changes: list[Change]) -> Way | None:
        """Returns the way that takes the least time of those with each change and the largest micro-batch that fits; if
        the time is not known, that with the largest micro-batch.
        """
        found = [(change, way) for change in changes if (way := self._try(change, self.target, sizes=True))]

        def cost(each: tuple[Change, Way]) -> tuple[float, int]:
            change, way = each
            config = _changed(self.config, change | {"train.micro_batch_size": way.micro_batch_size})
            secs = exchange_secs(config, self.vocabulary_size, self.target)
            computing = computing_secs(config, self.vocabulary_size, self.target)
            if secs is None or computing is None:
                return 0.0, -way.micro_batch_size
            computing *= 4 / 3 if config.train.recompute == "blocks" else 1.0  # One more forward pass.
            is_beside = exchanges_meanwhile(self.target)
            return max(secs, computing) if is_beside else secs + computing, -way.micro_batch_size

        return min(found, key=cost)[1] if found else None

    def _try(self, change: Change, target: Target, sizes: bool = False) -> Way | None:
        """Returns the way with a change and perhaps another micro-batch; None if it does not fit."""
        if target.num_devices == 1 and self.config.distribution.shard != "nothing":
            change = {**change, "distribution.shard": "nothing"}
            if self.config.distribution.shard_over is not None:
                change["distribution.shard_over"] = None
        needs, most_bytes = self._needs(change, target), self.budget * target.device.memory_bytes
        if needs is None:
            return None
        is_other = target.device.name != self.target.device.name
        if is_other and needs.compute_dtype not in (*target.device.flops, "float64"):
            return None  # A device without circuits for the config's dtype is no help.
        size = needs.planned(most_bytes)
        if sizes and not needs.is_auto:
            size = max(needs.fitting(most_bytes), default=size)
            change = {**change, "train.micro_batch_size": size}
        if needs.by_size[size] > most_bytes:
            return None
        overrides = tuple(f"{name}={'none' if value is None else value}" for name, value in change.items())
        return Way(target, overrides, needs.by_size[size], size)

    def _needs(self, change: Change, target: Target) -> Needs | None:
        """Returns what a changed config needs of these devices; None if they cannot share the batch."""
        key = (*change.items(), target.processor().kind, target.num_devices)
        if key not in self.known:
            try:
                self.known[key] = needs_of(_changed(self.config, change), self.vocabulary_size, target)
            except UserError:
                self.known[key] = None
        return self.known[key]


def smallest_memory(config: Config, vocabulary_size: int, target: Target) -> dict[str, float]:
    """Returns what a step needs of these devices by part, with the settings that need least."""
    tried = []
    for change in _Search(config, vocabulary_size, target, budget=1.0).all_changes():
        other = _changed(config, change)
        largest = micro_batch_sizes(other, target.num_devices)[-1]
        tried += [estimate_memory(other, vocabulary_size, target, size) for size in {1, largest}]
    return min(tried, key=lambda parts: sum(parts.values()))


def _together(ones: list[Change], others: list[Change]) -> list[Change]:
    """Returns each of some changes with each of others."""
    return [{**one, **other} for one in ones for other in others]


def _changed(config: Config, change: Change) -> Config:
    """Returns a config with other values, which are not checked."""
    sections: dict[str, Change] = {}
    for name, value in change.items():
        section, _, setting = name.partition(".")
        sections.setdefault(section, {})[setting] = value
    changed = {section: getattr(config, section).model_copy(update=each) for section, each in sections.items()}
    return config.model_copy(update=changed)


def _is_unknown_to_wheels(device: Device) -> bool:
    """Whether XLA of TensorFlow's wheels cannot compile a step for this GPU."""
    if "cc" not in device.circuits:
        return False
    return not support_of(NEWEST_WHEEL, divmod(round(device.circuits["cc"] * 10), 10)).compiles


def _as_offered(target: Target) -> Target | None:
    """Returns a target that a user can write; None if the TPU does not come with this number, or there are too many."""
    if not target.device.num_axes:
        return target if target.num_devices <= _MOST_GPUS else None
    try:
        return parse_target(str(target))
    except UserError:
        return None
