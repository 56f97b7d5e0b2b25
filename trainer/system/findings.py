"""What a check of this machine finds, and how to put it right."""

from typing import Literal, NamedTuple

Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        level: "ok"; "warning" if a run works, but not as it could; "error" if it fails or leaves a device unused.
        check: what was looked at, in a word or two.
        what: what was found, a sentence without its full stop.
        repair: the command or the setting that puts it right; "" if nothing is wrong.
    """

    level: Level
    check: str
    what: str
    repair: str = ""

    def __str__(self) -> str:
        return f"{self.what}. {self.repair}" if self.repair else f"{self.what}."


def ok(check: str, what: str) -> Finding:
    """Returns a finding that nothing is wrong."""
    return Finding("ok", check, what)


def warning(check: str, what: str, repair: str) -> Finding:
    """Returns a finding that does not keep a run from working."""
    return Finding("warning", check, what, repair)


def error(check: str, what: str, repair: str) -> Finding:
    """Returns a finding that keeps a run, or a device, from working."""
    return Finding("error", check, what, repair)
