"""Where a run comes from: its record keeps its parents, nearest first, so that a parent may be moved or deleted."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from trainer.runs.checkpoint import Checkpoint
from trainer.runs.run_folder import RunFolder


class Beginning(NamedTuple):
    """What a new run begins with, in place of random weights.

    Attributes:
        step: the number of steps that were taken before.
        groups: the arrays of its first checkpoint, by group: `weights`, and `optimizer` unless that begins anew.
        parents: the entries of its record about its parents, nearest first.
        first_example: see `RunFolder.first_example`.
    """

    step: int
    groups: Mapping[str, Mapping[str, np.ndarray]]
    parents: Sequence[Mapping[str, Any]]
    first_example: int = 0


def parents_by_run(
    run: RunFolder, checkpoint: Checkpoint, kind: Literal["init", "fork"], changed: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the entries about the parents of a run that begins with a checkpoint of another run.

    Args:
        run: the parent.
        checkpoint: the parent's checkpoint.
        kind: init: only the weights are the parent's. fork: also the optimizer and the steps are.
        changed: the settings that differ, one `key=value (was value)` for each.
    """
    file = checkpoint.manifest["files"]["weights.safetensors"]
    entry = {
        "kind": kind,
        "from": str(run.path),
        "step": checkpoint.step,
        "weights_sha256": file["sha256"],
        "changed": list(changed),
    }
    return [entry, *run.facts.get("parents", [])]


def describe_parents(facts: Mapping[str, Any]) -> list[str]:
    """Returns a line for each parent of a run with this record, nearest first."""
    return [_describe(entry) for entry in facts.get("parents", [])]


def _describe(entry: Mapping[str, Any]) -> str:
    what = "forked from" if entry["kind"] == "fork" else "weights from"
    at = "" if entry.get("step") is None else f", step {entry['step']}"
    digest = entry.get("weights_sha256")
    weights = "" if digest is None else f", weights {digest[:10]}"
    changed = f": {'; '.join(entry['changed'])}" if entry.get("changed") else ""
    return f"{what} {entry['from']}{at}{weights}{changed}"
