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

from trainer.distributed.connection import SILENCE_SECS, Connection, close_all, close_when_read, listen, ready_of
from trainer.distributed.workers import Workers, split_address
from trainer.errors import UserError

TIMEOUT_SECS = 45.0
TIMEOUT_VARIABLE = "TRAINER_MEETING_SECS"
SECRET_VARIABLE = "TRAINER_MEETING_SECRET"

# The time between two tries to connect to the chief.
_RETRY_SECS = 0.2
# The most time from the connection to the greeting, which a worker sends at once.
_GREETING_SECS = 5.0
# Every worker sends this message at this interval: it counts as lost if nothing comes from it for SILENCE_SECS.
_SIGN_OF_LIFE_SECS = 5.0
_SIGN_OF_LIFE = b"{}"

# The longest message of a worker: a config may list many thousands of files.
_MAX_MESSAGE_BYTES = 256 << 20
# The most open connections that have not proven anything yet; if there are more, the oldest are closed.
_MAX_STRANGERS = 64
# The most characters of another worker's text that a message of this one shows.
_MAX_SHOWN_CHARS = 300

# The chief sends its challenge; a worker answers with its number, its own challenge and its proof; the chief answers
# with its own proof, or with "taken" or "refused".
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
        self._connections: dict[int, Connection] = {}
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._show_life, name="meeting", daemon=True).start()
        try:
            if self._workers.is_chief:
                problem = self._gather()
                self._send_to_all({"problem": problem})
            else:
                self._find_chief()
                problem = self._await_answer()
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
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if self._workers.is_chief:
                self._send_to_all({"problem": f"{self._workers.name(0)} failed: {why}"})
            else:
                self._send_to_all({"error": why})
        self._is_over.set()
        close_when_read(self._connections.values())

    def agree(self, facts: Facts) -> None:
        """Returns once all workers have called this with the same facts.

        Args:
            facts: what must be the same on all workers, by name.

        Raises:
            UserError: on all workers that are there: the facts of a worker differ, or it is lost, or it failed.
        """
        if self._workers.is_chief:
            problem = self._compare(facts)
            self._send_to_all({"problem": problem})
        else:
            self._send_to_all({"facts": dict(facts)})
            problem = self._await_answer()
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
        """Waits for all other workers; returns what is wrong if some do not come."""
        deadline = time.monotonic() + self._timeout_secs
        num_refused = 0
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(each) for each in listen(self._workers.addresses[0])]
            # The connections that have not proven anything yet, oldest first, each with the time at which it is closed.
            strangers: dict[Connection, float] = {}
            stack.callback(lambda: close_all(strangers))
            while len(self._connections) < len(self._workers.addresses) - 1:
                now = time.monotonic()
                if now >= deadline:
                    return self._missing(num_refused)
                _close_surplus(strangers, now)
                files = [*listeners, *strangers, *self._connections.values()]
                for each in ready_of(files, min(0.1, deadline - now)):
                    if isinstance(each, socket.socket):
                        if (stranger := _accepted(each)) is not None:
                            strangers[stranger] = now + _GREETING_SECS
                    elif each not in strangers:
                        self._drop_if_gone(each)
                    elif each.has_line_or_end():
                        del strangers[each]
                        num_refused += not self._let_in(each)
        return None

    def _let_in(self, stranger: Connection) -> bool:
        """Lets the other end in if its line proves that it is a missing worker, and otherwise closes the connection.

        Returns:
            Whether it was let in.
        """
        is_let_in = False
        with contextlib.suppress(OSError, ValueError):  # The other end has gone.
            is_let_in = self._answer_greeting(stranger)
        if not is_let_in:
            stranger.close()
        return is_let_in

    def _answer_greeting(self, stranger: Connection) -> bool:
        greeting = _GREETING.fullmatch(stranger.texts.popleft()) if stranger.texts else None
        if greeting is None:
            return False  # It is not a worker, and gets no answer.
        number, challenge, proof = int(greeting[1]), greeting[2].decode(), greeting[3].decode()
        expected = self._proof("worker", number, stranger.challenge, challenge)
        if not (hmac.compare_digest(proof, expected) and 0 < number < len(self._workers.addresses)):
            stranger.send_line(b"refused")
            return False
        if number in self._connections:
            stranger.send_line(b"taken")  # The process that came first stays.
            return False
        stranger.send_line(b"welcome " + self._proof("chief", number, stranger.challenge, challenge).encode())
        stranger.max_bytes = _MAX_MESSAGE_BYTES
        self._connections[number] = stranger
        return True

    def _drop_if_gone(self, connection: Connection) -> None:
        """Frees the place of a worker whose process has ended, for another process with the same number."""
        try:
            connection.read()
            if all(text == _SIGN_OF_LIFE for text in connection.texts):
                connection.texts.clear()
                return
        except (OSError, ValueError):
            pass
        self._connections = {number: each for number, each in self._connections.items() if each is not connection}
        connection.close()

    def _missing(self, num_refused: int) -> str:
        """Returns the message about the workers that have not come."""
        missing = [self._workers.name(i) for i in range(1, len(self._workers.addresses)) if i not in self._connections]
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
        awaited = set(self._connections)
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
                    theirs, ours = _around_difference(theirs, ours)
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
                tcp = socket.create_connection((host, port), timeout=secs_left)
                refusal = self._greet(Connection(tcp), min(_GREETING_SECS, secs_left))
                if refusal is None:
                    return
                fault = refusal
            except (OSError, ValueError) as error:
                # An earlier answer of the chief explains more than the error of the last try.
                fault = refusal or f"could not be reached within {self._timeout_secs:.0f} s: {error}"
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{self._workers.name(0)} {fault}. Start every worker that TF_CONFIG lists, each with its own "
                    "task.index, and let them reach each other's ports."
                )
            time.sleep(_RETRY_SECS)

    def _greet(self, connection: Connection, timeout_secs: float) -> str | None:
        """Greets the chief; returns why the chief does not let this worker in, or None if it does."""
        deadline, number = time.monotonic() + timeout_secs, self._workers.number
        reason = "is not a worker of this run"
        try:
            if connection.is_to_itself():
                connection.free_port_on_close()  # Otherwise the chief could not listen at the port.
                return "does not listen yet"
            challenged = _CHALLENGE.fullmatch(connection.next_text(deadline))
            if challenged is not None:
                theirs, ours = challenged[1].decode(), connection.challenge
                proof = self._proof("worker", number, theirs, ours)
                connection.send_line(f"{number} {ours} {proof}".encode())
                answer = connection.next_text(deadline)
                welcome = _WELCOME.fullmatch(answer)
                if welcome is not None and hmac.compare_digest(
                    welcome[1].decode(), self._proof("chief", number, theirs, ours)
                ):
                    connection.max_bytes = _MAX_MESSAGE_BYTES
                    self._connections[0] = connection
                    return None
                if answer == b"taken":
                    reason = f"refused worker {number}: another process came as worker {number} first"
                elif answer == b"refused":
                    reason = (
                        f"refused worker {number}: both need the same cluster in TF_CONFIG and the same "
                        f"{SECRET_VARIABLE}"
                    )
        finally:
            if 0 not in self._connections:
                connection.close()
        return reason

    def _await_answer(self) -> str | None:
        """Waits for the chief's answer; returns the problem that it reports, or None."""
        try:
            _, message = self._next_message()
        except _LostError as lost:
            return f"{self._workers.name(0)} {lost.why} before the start; see its own output."
        problem = message.get("problem")
        return None if problem is None else _shown(str(problem), 4 * _MAX_SHOWN_CHARS)

    # What all do.

    def _proof(self, role: str, number: int, of_chief: str, of_worker: str) -> str:
        return hmac.new(self._key, f"{role} {number} {of_chief} {of_worker}".encode(), "sha256").hexdigest()

    def _send_to_all(self, message: Mapping[str, object]) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # The worker is gone; `_next_message` will raise the error.
                connection.send_line(json.dumps(message).encode())

    def _show_life(self) -> None:
        while not self._is_over.wait(_SIGN_OF_LIFE_SECS):
            for connection in list(self._connections.values()):
                with contextlib.suppress(OSError):
                    connection.send_line(_SIGN_OF_LIFE)

    def _next_message(self) -> tuple[int, dict]:
        """Returns the next message that is not a sign of life, and the number of the worker that sent it.

        Raises:
            _LostError: a worker is gone or silent.
        """
        wait_secs = 0.0  # First read what has come while this worker was busy.
        while True:
            ready = ready_of(self._connections.values(), wait_secs)
            for number, connection in self._connections.items():
                try:
                    if connection in ready and not connection.texts:
                        connection.read()
                except (OSError, ValueError):
                    raise _LostError(number, "went away") from None
                while connection.texts:
                    if (text := connection.texts.popleft()) != _SIGN_OF_LIFE:
                        return number, _parsed(text, number)
                if time.monotonic() - connection.last_read_at > SILENCE_SECS:
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


def _close_surplus(strangers: dict[Connection, float], now: float) -> None:
    """Closes the connections whose time is over, and the oldest ones if there are more than _MAX_STRANGERS."""
    too_late = [each for each, until in strangers.items() if now >= until]
    too_many = list(strangers)[: max(0, len(strangers) - _MAX_STRANGERS)]  # A dict keeps the order of insertion.
    for each in {*too_late, *too_many}:
        del strangers[each]
        each.close()


def _accepted(listener: socket.socket) -> Connection | None:
    """Accepts a connection and sends the chief's challenge; returns None if the connection is gone again."""
    try:
        connection = Connection(listener.accept()[0])
        connection.send_line(f"trainer-meeting {connection.challenge}".encode())
    except OSError:  # The peer has closed the connection, or this process has too many files open.
        return None
    return connection


def _around_difference(one: str, other: str) -> tuple[str, str]:
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
