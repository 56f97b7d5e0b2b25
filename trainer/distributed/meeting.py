"""The meeting of the workers of a run: they compare what they have before TensorFlow joins them.

TensorFlow waits for a missing worker for ever, and a worker with another config would hang the others or spoil the
model. So the workers first connect by plain TCP: the chief listens at its own address of TF_CONFIG, and the others
connect to it.

Any process may connect to that address. So each side first proves that it has the run's secret, without sending it: it
hashes the secret together with a random challenge of the other side. Until then the chief reads only one short line
from a connection, for a few seconds, and parses nothing. The messages after that are neither encrypted nor signed, and
TensorFlow's own connections are not either: both need a network that only trusted machines can use.
"""

import contextlib
import hashlib
import hmac
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from trainer.distributed.connection import SILENCE_SECS, Line, close_all, close_when_read, listen, ready_of
from trainer.distributed.workers import Workers, split_address
from trainer.errors import UserError

TIMEOUT_SECS = 45.0
TIMEOUT_VARIABLE = "TRAINER_MEETING_SECS"
SECRET_VARIABLE = "TRAINER_MEETING_SECRET"

_RETRY_SECS = 0.2
# A worker sends its greeting at once, and then a sign of life at this interval; after SILENCE_SECS it counts as lost.
_GREETING_SECS = 5.0
_SIGN_OF_LIFE_SECS = 5.0
_SIGN_OF_LIFE = b"{}"

# A config may list many thousands of files.
_MAX_MESSAGE_BYTES = 256 << 20
# The most connections that have not proven anything yet; if there are more, the oldest are closed.
_MAX_STRANGERS = 64
_MAX_SHOWN_CHARS = 300

_CHALLENGE = re.compile(rb"trainer-meeting ([0-9a-f]{32})")
_GREETING = re.compile(rb"([0-9]{1,6}) ([0-9a-f]{32}) ([0-9a-f]{64})")
_WELCOME = re.compile(rb"welcome ([0-9a-f]{64})")

Facts = Mapping[str, str]
T = TypeVar("T")


def meeting_secs() -> float:
    """Returns how many seconds the workers wait for each other. TRAINER_MEETING_SECS gives them longer.

    Raises:
        UserError: the variable is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is not None and not re.fullmatch("[1-9][0-9]{0,6}", text):
        raise UserError(f"{TIMEOUT_VARIABLE}={text!r} must be a whole number of seconds, such as 600.")
    return TIMEOUT_SECS if text is None else float(text)


class Meeting:
    """Connects the workers of a run, and lets them compare what they have.

        with Meeting(workers) as meeting:
            meeting.agree({"the config": ...})

    If a worker ends, fails or is silent for SILENCE_SECS before it leaves the block, the next `agree` of every other
    worker raises an error. Between two calls of `agree` a worker may take any time.

    Args:
        workers: all workers, and which of them this process is.
        timeout_secs: how many seconds to wait until all workers are there; None: `meeting_secs`.

    Raises:
        UserError: on entering the block, on all workers that are there: a worker is missing.
    """

    def __init__(self, workers: Workers, timeout_secs: float | None = None) -> None:
        self._workers = workers
        self._timeout_secs = meeting_secs() if timeout_secs is None else timeout_secs
        # All workers hash the same key only if they have the same secret and the same list of workers.
        key = json.dumps([os.environ.get(SECRET_VARIABLE, ""), *workers.addresses])
        self._key = hashlib.sha256(key.encode()).digest()
        # On the chief: the connections to all other workers. On the others: the connection to the chief.
        self._lines: dict[int, Line] = {}
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._show_life, name="meeting", daemon=True).start()
        try:
            if self._workers.is_chief:
                problem = self._gather()
                self._tell({"problem": problem})
            else:
                self._find_chief()
                problem = self._verdict()
            if problem is not None:
                raise UserError(problem)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if self._workers.is_chief:
                self._tell({"problem": f"{self._workers.name(0)} failed: {said}"})
            else:
                self._tell({"error": said})
        self._is_over.set()
        close_when_read(self._lines.values())

    def agree(self, facts: Facts) -> None:
        """Returns once all workers have called this with the same facts.

        Args:
            facts: what must be the same on all workers, by name.

        Raises:
            UserError: on all workers that are there: the facts of a worker differ, or it is lost, or it failed.
        """
        if self._workers.is_chief:
            problem = self._compare(facts)
            self._tell({"problem": problem})
        else:
            self._tell({"facts": dict(facts)})
            problem = self._verdict()
        if problem is not None:
            raise UserError(problem)

    def in_turn(self, action: Callable[[], T]) -> T:
        """Calls a function on the chief and, once it has returned there, on the others; returns its result."""
        if not self._workers.is_chief:
            self.agree({})
        result = action()
        if self._workers.is_chief:
            self.agree({})
        return result

    # What the chief does.

    def _gather(self) -> str | None:
        """Waits for all others; returns what is wrong if some do not come."""
        deadline = time.monotonic() + self._timeout_secs
        num_refused = 0
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(each) for each in listen(self._workers.addresses[0])]
            strangers: dict[Line, float] = {}  # With the time until which each has to prove itself.
            stack.callback(lambda: close_all(strangers))
            while len(self._lines) < len(self._workers.addresses) - 1:
                now = time.monotonic()
                if now >= deadline:
                    return self._missing(num_refused)
                late = [line for line, until in strangers.items() if now >= until]
                for line in [*late, *list(strangers)[: max(0, len(strangers) - _MAX_STRANGERS)]]:
                    strangers.pop(line, None)
                    line.close()
                for each in ready_of([*listeners, *strangers, *self._lines.values()], min(0.1, deadline - now)):
                    if isinstance(each, socket.socket):
                        if (line_in := _accepted(each)) is not None:
                            strangers[line_in] = now + _GREETING_SECS
                    elif each in strangers:
                        is_greeted = self._greeted(each)
                        if is_greeted is not None:
                            del strangers[each]
                            num_refused += not is_greeted
                    else:
                        self._forget_if_gone(each)
        return None

    def _greeted(self, line: Line) -> bool | None:
        """Returns whether the other end has proven to be a worker, and lets it in; None: not known yet."""
        try:
            line.read()
            if not line.texts:
                return None
            greeting = _GREETING.fullmatch(line.texts.popleft())
            if greeting is not None:
                number, challenge, proof = int(greeting[1]), greeting[2].decode(), greeting[3].decode()
                expected = self._proof("worker", number, line.challenge, challenge)
                if hmac.compare_digest(proof, expected) and 0 < number < len(self._workers.addresses):
                    if number in self._lines:
                        line.send_line(b"taken")  # The process that came first stays.
                    else:
                        line.send_line(b"welcome " + self._proof("chief", number, line.challenge, challenge).encode())
                        line.max_bytes = _MAX_MESSAGE_BYTES
                        self._lines[number] = line
                        return True
                else:
                    line.send_line(b"refused")
        except (OSError, ValueError):
            pass  # The other end has gone, or is not a worker: close the connection.
        line.close()
        return False

    def _forget_if_gone(self, line: Line) -> None:
        """Frees the place of a worker whose process has ended, for another process with the same number."""
        try:
            line.read()
            if all(text == _SIGN_OF_LIFE for text in line.texts):
                line.texts.clear()
                return
        except (OSError, ValueError):
            pass
        self._lines = {number: each for number, each in self._lines.items() if each is not line}
        line.close()

    def _missing(self, num_refused: int) -> str:
        missing = [self._workers.name(i) for i in range(1, len(self._workers.addresses)) if i not in self._lines]
        problem = (
            f"{', '.join(missing)} did not come within {self._timeout_secs:.0f} s. Start every worker that TF_CONFIG "
            "lists, each with its own task.index."
        )
        if num_refused:
            problem += (
                f" {num_refused} connections were refused: they did not prove to be a missing worker. All workers need "
                f"the same cluster in TF_CONFIG and the same {SECRET_VARIABLE}."
            )
        return problem

    def _compare(self, own: Facts) -> str | None:
        """Waits for the facts of all others; returns what is wrong if some differ or do not come."""
        awaited = set(self._lines)
        while awaited:
            try:
                number, message = self._next_message()
            except _LostError as lost:
                return f"{self._workers.name(lost.number)} {lost.why} before the start; see its own output."
            facts = message.get("facts")
            if not isinstance(facts, dict):
                return f"{self._workers.name(number)} failed: {_shown(str(message.get('error')))}"
            for name in [*own, *(name for name in facts if name not in own)]:
                theirs, ours = str(facts.get(name)), str(own.get(name))
                if theirs != ours:
                    theirs, ours = _apart(theirs, ours)
                    return (
                        f"{_shown(name)} differs: {self._workers.name(number)} has {theirs}, worker 0 has {ours}. "
                        "Start every worker with the same version, config and devices, on the same text."
                    )
            awaited.discard(number)
        return None

    # What the others do.

    def _find_chief(self) -> None:
        """Connects to the chief, and returns once both sides have proven that they have the secret.

        Raises:
            UserError: that takes too long.
        """
        deadline = time.monotonic() + self._timeout_secs
        host, port = split_address(self._workers.addresses[0])
        refusal: str | None = None
        while True:
            secs_left = max(0.01, deadline - time.monotonic())
            try:
                connection = socket.create_connection((host, port), timeout=secs_left)
                refusal = self._refusal(Line(connection), min(_GREETING_SECS, secs_left))
                if refusal is None:
                    return
                fault = refusal
            except (OSError, ValueError) as error:
                # An answer that it gave before explains more than the error of the last try.
                fault = refusal or f"could not be reached within {self._timeout_secs:.0f} s: {error}"
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{self._workers.name(0)} {fault}. Start every worker that TF_CONFIG lists, each with its own "
                    "task.index, and let them reach each other's ports."
                )
            time.sleep(_RETRY_SECS)

    def _refusal(self, line: Line, timeout_secs: float) -> str | None:
        """Greets the chief; returns why the chief does not let this worker in, or None if it does."""
        deadline, number = time.monotonic() + timeout_secs, self._workers.number
        reason = "is not a worker of this run"
        try:
            if line.meets_itself():
                return "does not listen yet"
            challenged = _CHALLENGE.fullmatch(line.next_text(deadline))
            if challenged is not None:
                theirs, ours = challenged[1].decode(), line.challenge
                proof = self._proof("worker", number, theirs, ours)
                line.send_line(f"{number} {ours} {proof}".encode())
                answer = line.next_text(deadline)
                welcome = _WELCOME.fullmatch(answer)
                if welcome is not None and hmac.compare_digest(
                    welcome[1].decode(), self._proof("chief", number, theirs, ours)
                ):
                    line.max_bytes = _MAX_MESSAGE_BYTES
                    self._lines[0] = line
                    return None
                if answer == b"taken":
                    reason = f"refused worker {number}: another process came as worker {number} first"
                elif answer == b"refused":
                    reason = (
                        f"refused worker {number}: both need the same cluster in TF_CONFIG and the same "
                        f"{SECRET_VARIABLE}"
                    )
        finally:
            if 0 not in self._lines:
                line.close()
        return reason

    def _verdict(self) -> str | None:
        try:
            _, message = self._next_message()
        except _LostError as lost:
            return f"{self._workers.name(0)} {lost.why} before the start; see its own output."
        problem = message.get("problem")
        return None if problem is None else _shown(str(problem), 4 * _MAX_SHOWN_CHARS)

    # What all do.

    def _proof(self, role: str, number: int, of_chief: str, of_worker: str) -> str:
        return hmac.new(self._key, f"{role} {number} {of_chief} {of_worker}".encode(), "sha256").hexdigest()

    def _tell(self, message: Mapping[str, object]) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # The worker is gone; waiting for its answer will raise the error.
                line.send_line(json.dumps(message).encode())

    def _show_life(self) -> None:
        while not self._is_over.wait(_SIGN_OF_LIFE_SECS):
            for line in list(self._lines.values()):
                with contextlib.suppress(OSError):
                    line.send_line(_SIGN_OF_LIFE)

    def _next_message(self) -> tuple[int, dict]:
        """Returns the next message that is not a sign of life, and the number of the worker that sent it.

        Raises:
            _LostError: a worker is gone or silent.
        """
        wait_secs = 0.0  # First read what has come while this worker was busy.
        while True:
            ready = ready_of(self._lines.values(), wait_secs)
            for number, line in self._lines.items():
                try:
                    if line in ready and not line.texts:
                        line.read()
                except (OSError, ValueError):
                    raise _LostError(number, "went away") from None
                while line.texts:
                    if (text := line.texts.popleft()) != _SIGN_OF_LIFE:
                        return number, _parsed(text, number)
                if time.monotonic() - line.heard_at > SILENCE_SECS:
                    raise _LostError(number, f"was silent for {SILENCE_SECS:.0f} s and counts as lost")
            wait_secs = 1.0


class _LostError(Exception):
    def __init__(self, number: int, why: str) -> None:
        super().__init__(number, why)
        self.number, self.why = number, why


def _parsed(text: bytes, number: int) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise _LostError(number, "sent something that is not a message")
    return message


def _accepted(listener: socket.socket) -> Line | None:
    try:
        line = Line(listener.accept()[0])
        line.send_line(f"trainer-meeting {line.challenge}".encode())
    except OSError:  # It is closed again, or this process has as many files open as it may have.
        return None
    return line


def _apart(one: str, other: str) -> tuple[str, str]:
    """Returns the parts of two texts around their first difference, short enough for a message."""
    start = 0
    if max(len(one), len(other)) > _MAX_SHOWN_CHARS:
        num_alike = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
        start = max(0, num_alike - _MAX_SHOWN_CHARS // 3)
    dots = "..." if start else ""
    return dots + _shown(one[start:]), dots + _shown(other[start:])


def _shown(text: str, max_chars: int = _MAX_SHOWN_CHARS) -> str:
    """Returns a text of another process without control characters, and short enough for a message."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:max_chars])
    return text if len(text) < max_chars else f"{text}..."
