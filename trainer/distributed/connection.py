"""Lines of text over TCP between the workers of a run, and the addresses at which the chief listens."""

import collections
import contextlib
import errno
import ipaddress
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Any

from trainer.distributed.workers import split_address
from trainer.errors import UserError

# A worker that is silent for this long counts as lost.
SILENCE_SECS = 60.0
# Until a connection has proven that its other end is a worker, its lines may not be longer.
MAX_GREETING_BYTES = 256

_PARTING_SECS = 2.0


class Line:
    """A connection that carries lines of text.

    Attributes:
        challenge: a random text, which the other end has to hash together with the secret.
        texts: the lines that have come and were not used yet.
        heard_at: the time of the last bytes that came, by time.monotonic().
        max_bytes: the longest line that the other end may send.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._rest, self._sending = connection, bytearray(), threading.Lock()
        connection.settimeout(SILENCE_SECS)
        self.challenge = secrets.token_hex(16)
        self.texts: collections.deque[bytes] = collections.deque()
        self.heard_at = time.monotonic()
        self.max_bytes = MAX_GREETING_BYTES

    def fileno(self) -> int:
        """Returns the file descriptor of the connection."""
        return self._connection.fileno()

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def meets_itself(self) -> bool:
        """Returns whether this connection is connected to itself. That can happen if no process listens yet, and the
        system gives the same port to the outgoing connection.
        """
        if self._connection.getsockname() != self._connection.getpeername():
            return False
        # Close it without lingering: otherwise the chief could not listen at the port.
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return True

    def send_no_more(self) -> None:
        """Closes this side of the connection; the other end may still send."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def send_line(self, text: bytes) -> None:
        """Sends a line."""
        with self._sending:
            self._connection.sendall(text + b"\n")

    def read(self) -> None:
        """Reads what has come. Call it once there is something to read.

        Raises:
            OSError: the other end has closed the connection.
            ValueError: the other end sent a line that is too long.
        """
        came = self._connection.recv(1 << 20)
        if not came:
            raise ConnectionError("the connection was closed")
        self.heard_at = time.monotonic()
        *whole, rest = came.split(b"\n")
        for text in whole:
            self.texts.append(bytes(self._rest) + text)
            self._rest.clear()
        self._rest += rest
        if max(len(self._rest), *map(len, self.texts), 0) > self.max_bytes:
            raise ValueError("the line is too long")

    def next_text(self, deadline: float) -> bytes:
        """Returns the next line.

        Raises:
            OSError: the line does not come in time, or the connection was closed.
            ValueError: the line is too long.
        """
        while not self.texts:
            if not ready_of([self], max(0.0, deadline - time.monotonic())):
                raise TimeoutError("it does not answer")
            self.read()
        return self.texts.popleft()


def close_all(lines: Iterable[Line]) -> None:
    """Closes connections."""
    for line in lines:
        line.close()


def close_when_read(lines: Iterable[Line]) -> None:
    """Closes connections once the other ends have closed theirs, or after _PARTING_SECS. If bytes arrive at a
    connection that is already closed, it is reset, and the last message to the other end can be lost.
    """
    left, deadline = list(lines), time.monotonic() + _PARTING_SECS
    for line in left:
        line.send_no_more()
    while left and (secs_left := deadline - time.monotonic()) > 0:
        for line in ready_of(left, secs_left):
            try:
                line.read()
            except (OSError, ValueError):
                left.remove(line)
    close_all(lines)


def ready_of(files: Iterable[Any], timeout_secs: float) -> list[Any]:
    """Returns the files that have something to read or accept, once there is one or the time is over."""
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ, file)
        return [key.data for key, _ in selector.select(timeout_secs)]


def listen(address: str) -> list[socket.socket]:
    """Listens at an address of TF_CONFIG: only there if this host has the address, otherwise at all of its addresses.

    Raises:
        UserError: another process listens there.
    """
    host, port = split_address(address)
    found = []
    try:
        for family, own in _own_addresses(host):
            try:
                found.append(socket.create_server((own, port), family=family))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
        if not found:
            # The other workers reach this host at an address that it does not have itself, as in a container.
            is_dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if is_dual else socket.AF_INET
            found.append(socket.create_server(("", port), family=family, dualstack_ipv6=is_dual))
    except OSError as error:
        for each in found:
            each.close()
        raise UserError(f"TF_CONFIG: this worker cannot listen at its address {address}: {error}.") from None
    for each in found:
        each.setblocking(False)
    return found


def _own_addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Returns the addresses of a name; none if other hosts would find other addresses."""
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    found = list(dict.fromkeys((socket.AddressFamily(family), str(address[0])) for family, *_, address in infos))
    is_name = host not in [address for _, address in found] and host != "localhost"
    # On many systems the host's own name has a loopback address, which it does not have for other hosts.
    if is_name and any(ipaddress.ip_address(address).is_loopback for _, address in found):
        return []
    return found
