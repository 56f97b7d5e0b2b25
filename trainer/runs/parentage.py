"""Where a run comes from: its record keeps its parents, nearest first, so that a parent may be moved or deleted."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trainer.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from trainer.runs.array_file import Arrays
    from trainer.runs.checkpoint import Checkpoint


class Beginning(NamedTuple):
    """What a new run begins with, in place of random weights.

    Attributes:
        step: the number of steps that were taken before.
        groups: the arrays of its first checkpoint, by group: `weights`, and unless they begin anew `optimizer` and
            `average`.
        parents: the entries of its record about its parents, nearest first.
        data_offset: see `RunFolder.data_offset`.
    """

    step: int
    groups: "Mapping[str, Arrays]"
    parents: Sequence[Mapping[str, Any]]
    data_offset: int = 0


def parents_by_run(
    run: RunFolder, checkpoint: "Checkpoint", kind: Literal["init", "fork"], changed: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the entries about the parents of a run that begins with a checkpoint of another run.

    Args:
        run: the parent.
        checkpoint: the parent's checkpoint.
        kind: init: only the weights are the parent's. fork: also the optimizer and the steps are.
        changed: the settings that differ, one `key=value (was value)` for each.
    """
    # A fork goes on with the weights; a run that begins with the parent's model has their average.
    group = "average" if kind == "init" and checkpoint.has("average") else "weights"
    file = checkpoint.manifest["files"][f"{group}.safetensors"]
    entry = {
        "kind": kind,
        "from": str(run.path),
        "step": checkpoint.step,
        "weights_sha256": file["sha256"],
        "changed": list(changed),
    }
    return [entry, *run.facts.get("parents", [])]


def describe_history(run: RunFolder) -> list[str]:
    """Returns a line for each change that a run has recorded since it began, newest first, and for each of its parents,
    nearest first.
    """
    changes = [f"from step {each['step']} on: {'; '.join(each['changed'])}" for each in run.facts.get("changes", [])]
    return [*reversed(changes), *map(_describe, run.facts.get("parents", []))]


def _describe(entry: Mapping[str, Any]) -> str:
    what = "forked from" if entry["kind"] == "fork" else "weights from"
    at = "" if entry.get("step") is None else f", step {entry['step']}"
    digest = entry.get("weights_sha256")
    weights = "" if digest is None else f", weights {digest[:10]}"
    changed = f": {'; '.join(entry['changed'])}" if entry.get("changed") else ""
    return f"{what} {entry['from']}{at}{weights}{changed}"
