"""Calls a function in a new Python process, for work that this process must not do itself."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any, TypeVar, cast

from trainer.errors import UserError
from trainer.exit_status import ExitStatus
from trainer.system.terminal import quiet_import

# The main module is not imported again in the new process, as multiprocessing would do: a script without
# `if __name__ == "__main__":` would start over.
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from trainer.system.process import _serve; _serve(int(sys.argv[1]))"
)
# How long a child that got SIGINT may take to clean up.
_GRACE_SECS = 10.0

T = TypeVar("T")


def call_in_new_process(function: Callable[..., T], *arguments: object, say: Callable[[str], None] | None = None) -> T:
    """Calls a function in a new Python process and returns what it returns.

    Args:
        function: a function that the new process can import by its module and name.
        arguments: the arguments of the function. They and the result must be picklable.
        say: prints a line. `function` gets an argument `say` that passes its lines to it; by default `function` is
            called without that argument.

    Raises:
        UserError: the process was killed.
        Exception: the exception that the function raised.
    """
    reader, writer = os.pipe()
    command = [sys.executable, "-c", _CHILD, str(writer)]
    try:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[writer])
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    assert child.stdin is not None
    try:
        # The child's stdin stays open until the end: when it closes, this process has died, and the child ends too.
        with os.fdopen(reader, "rb") as answers, contextlib.closing(_Request(child.stdin)) as request:
            request.send(pickle.dumps(sys.path) + pickle.dumps((function, arguments, say is not None)))
            outcome, content = "", cast(Any, None)
            while outcome not in ("result", "error"):
                outcome, content = pickle.load(answers)
                if outcome == "line":
                    assert say is not None
                    say(content)
    except EOFError:
        raise UserError(
            f"The process of {function.__name__} {describe_end(child.wait())}. If this machine was short of memory, "
            "give it more or end other programs."
        ) from None
    except BaseException:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_SECS)
        child.kill()
        raise
    finally:
        child.wait()
    if outcome == "error":
        error, where = content
        raise error from RuntimeError(f"in a new process:\n{where}")
    result: T = content
    return result


class _Request:
    """The pipe to a new process. If that process has ended already, nothing is raised here: no answer arrives."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    def send(self, content: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(content)
            self._pipe.flush()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()


def describe_end(status: int) -> str:
    """Returns how a process ended, given its return code of subprocess."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _serve(descriptor: int) -> None:
    """Calls the function that is read from stdin, and writes pairs of a kind (line, result or error) and its value."""
    with quiet_import():
        function, arguments, has_say = pickle.load(sys.stdin.buffer)
    is_done = threading.Event()

    def end_with_the_parent() -> None:
        # Not sys.stdin: a thread that waits in it when Python exits makes the exit a fatal error.
        while os.read(0, 1 << 16):
            pass
        if not is_done.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            is_done.wait(_GRACE_SECS)
            os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    with os.fdopen(descriptor, "wb") as answers:

        def send(outcome: str, content: Any) -> None:
            answers.write(pickle.dumps((outcome, content)))
            answers.flush()

        try:
            result = function(*arguments, **({"say": lambda line: send("line", line)} if has_say else {}))
            is_done.set()
            send("result", result)
        except KeyboardInterrupt:
            sys.exit(ExitStatus.INTERRUPTED)
        except Exception as error:
            is_done.set()
            where = traceback.format_exc()
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # Pickling an exception can raise anything.
                error = RuntimeError(f"{type(error).__name__}: {error}")
            send("error", (error, where))
