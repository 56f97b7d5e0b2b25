"""The exit statuses of the command and what each one means; `trainer --help` prints them."""

import enum
from typing import Self


class ExitStatus(enum.IntEnum):
    """An exit status of the command.

    Attributes:
        meaning: what the status means, for the help text.
    """

    meaning: str

    DONE = 0, "done"
    FAILED = 1, "verify, inspect or doctor found a fault, plan --compile's step does not fit, or watch's run was killed"
    USER_ERROR = 2, "an argument, a setting or a file is wrong; the message names it and what to do about it"
    # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again.
    STOPPED = (
        75,
        "(EX_TEMPFAIL) train was stopped by a signal: configure your scheduler to retry on it; watch: it was stopped",
    )
    # What shells report for a program that SIGINT or SIGPIPE killed: 128 and the signal's number.
    INTERRUPTED = 130, "a verb other than train was stopped by Ctrl-C"
    BROKEN_PIPE = 141, "the reader of standard output went away, such as head"

    def __new__(cls, value: int, meaning: str) -> Self:
        """Makes a member from its two values."""
        status = int.__new__(cls, value)
        status._value_ = value
        status.meaning = meaning
        return status
