"""The first batch of a run: if it changes, the data order has changed, and the run must not go on."""

import hashlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer.config.settings import Config
from trainer.data.batches import training_batches
from trainer.data.shards import PreparedData
from trainer.errors import UserError
from trainer.runs.run_folder import RunFolder


def hash_of_first_batch(prepared: PreparedData, config: Config, first_step: int = 0, data_offset: int = 0) -> str:
    """Returns the SHA-256 of the first batch of a run; the arguments are those of `training_batches`."""
    batch = next(iter(training_batches(prepared, config, first_step, first_step + 1, data_offset=data_offset)))
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest()


def check_first_batch(run: RunFolder, digest: str, say: Callable[[str], None]) -> None:
    """Keeps the digest of the run's first batch, or compares it with the one that was kept when the run was started.

    The order of the examples depends on an operation of TensorFlow, which another release may change.

    Args:
        run: the run.
        digest: `hash_of_first_batch`, as this process computes it.
        say: prints a line; called if the releases differ and the batch does not.

    Raises:
        UserError: the batch differs: the run would see some examples twice and others never.
    """
    before = _releases(run.facts)
    now = _releases({"tensorflow": tf.__version__, "keras": keras.__version__})
    if "first_batch" not in run.facts:
        run.record(first_batch=digest)
    if run.facts["first_batch"] != digest:
        raise UserError(
            f"{run.path}: the batches of this run come in another order here. It was started with {before}; this "
            f"is {now}. Go on with the same releases, including the same release of trainer, or start a new run."
        )
    if before != now:
        say(
            f"{run.path} was started with {before}; this is {now}. "
            "The batches are the same; sums may be rounded differently."
        )


def _releases(facts: dict[str, Any]) -> str:
    return f"TensorFlow {facts['tensorflow']} and Keras {facts['keras']}"
