"""The command line: runs a verb, and turns errors that a user can put right into messages.

The arguments of each verb are in parser.py, and what it does is in verbs.py. verbs.py is imported after `main` has
begun to watch for signals, because its imports take a moment in which a signal must not be lost.
"""

import os
import signal
import sys
from collections.abc import Sequence

from trainer.completion import complete
from trainer.errors import UserError
from trainer.exit_status import ExitStatus
from trainer.parser import parse, shortened
from trainer.system.signals import STOPPING, Ending, ended_by
from trainer.system.storage import REMEDIES, reason_and_remedy
from trainer.system.terminal import discard, lasting_errors, open_streams, warn


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status, which is an `ExitStatus`."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    with lasting_errors():
        if words[:1] not in (["train"], ["fork"]):
            # In prepare, Ctrl-C raises KeyboardInterrupt: the text prepared so far is kept.
            numbers = [signal.SIGTERM] if words[:1] == ["prepare"] else [signal.SIGINT, signal.SIGTERM]
            with ended_by(numbers, Ending()):
                return _run(words, Ending())
        ending = Ending(ExitStatus.STOPPED, lambda: "No run was begun. Start it again with the same command.")
        with ended_by(STOPPING, ending):
            status = _run(words, ending)
    if arguments is None:
        for number in STOPPING:  # The run is over: a signal could now only replace its exit status.
            signal.signal(number, signal.SIG_IGN)
    return status


def _run(words: list[str], ending: Ending) -> int:
    try:
        try:
            options = parse(words)
            options.ending = ending
            from trainer import verbs

            status: ExitStatus | None = getattr(verbs, options.verb)(options)
            return int(status or ExitStatus.DONE)
        finally:
            sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        warn("trainer: stopped.")
        return int(ExitStatus.INTERRUPTED)
    except BrokenPipeError:
        discard(sys.stdout)
        return int(ExitStatus.BROKEN_PIPE)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{where}{reason_and_remedy(error)}.")


def _fail(text: str) -> int:
    warn(f"trainer: {shortened(text)}")
    return int(ExitStatus.USER_ERROR)
