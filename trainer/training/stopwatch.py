"""Counts what the time of a run is spent on."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator


class Stopwatch:
    """Adds up seconds by what they were spent on."""

    def __init__(self) -> None:
        self._secs: Counter[str] = Counter()

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[Callable[[], float]]:
        """Counts the time of a block as spent on something; yields a function that returns the block's time so far."""
        start = time.perf_counter()
        try:
            yield lambda: time.perf_counter() - start
        finally:
            self._secs[what] += time.perf_counter() - start  # type: ignore[assignment]

    def __str__(self) -> str:
        return ", ".join(f"{what} {secs:.1f} s" for what, secs in self._secs.items())
