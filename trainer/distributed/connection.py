"""TCP connections that carry lines of text between the workers of a run, and the addresses where the chief listens."""

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

# A worker counts as lost if no byte comes from it for this long.
SILENCE_SECS = 60.0
# The longest line that is read from the other end before it has proven that it is a worker.
MAX_GREETING_BYTES = 256

# How long `close_when_read` waits for the other ends to close theirs.
_PARTING_SECS = 2.0


class Connection:
    """A TCP connection that carries lines of text.

    Args:
        tcp: the connected socket.

    Attributes:
        challenge: a random text, which the other end has to hash together with the secret.
        texts: the lines that have come and were not used yet.
        last_read_at: the time of the last bytes that came, by time.monotonic().
        max_bytes: the longest line that the other end may send.
    """

    def __init__(self, tcp: socket.socket) -> None:
        self._tcp, self._rest, self._sending = tcp, bytearray(), threading.Lock()
        tcp.settimeout(SILENCE_SECS)
        self.challenge = secrets.token_hex(16)
        self.texts: collections.deque[bytes] = collections.deque()
        self.last_read_at = time.monotonic()
        self.max_bytes = MAX_GREETING_BYTES

    def fileno(self) -> int:
        """Returns the file descriptor of the connection."""
        return self._tcp.fileno()

    def close(self) -> None:
        """Closes the connection."""
        self._tcp.close()

    def is_to_itself(self) -> bool:
        """Returns whether this socket is connected to itself. That can happen if no process listens at the port yet,
        and the system chooses the same port for the outgoing connection.
        """
        return bool(self._tcp.getsockname() == self._tcp.getpeername())

    def free_port_on_close(self) -> None:
        """Makes `close` free the port at once. By default a port stays in use for some time after a close."""
        self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def send_no_more(self) -> None:
        """Closes this side of the connection; the other end may still send."""
        with contextlib.suppress(OSError):
            self._tcp.shutdown(socket.SHUT_WR)

    def send_line(self, text: bytes) -> None:
        """Sends a line."""
        with self._sending:
            self._tcp.sendall(text + b"\n")

    def read(self) -> None:
        """Reads what has come. Call it once there is something to read.

        Raises:
            OSError: the other end has closed the connection.
            ValueError: the other end sent a line that is too long.
        """
        came = self._tcp.recv(1 << 20)
        if not came:
            raise ConnectionError("the connection was closed")
        self.last_read_at = time.monotonic()
        *whole, rest = came.split(b"\n")
        for text in whole:
            self.texts.append(bytes(self._rest) + text)
            self._rest.clear()
        self._rest += rest
        if max(len(self._rest), *map(len, self.texts), 0) > self.max_bytes:
            raise ValueError("the line is too long")

    def has_line_or_end(self) -> bool:
        """Reads what has come. Returns whether `texts` has a whole line, or no line will come that may be used."""
        try:
            self.read()
        except (OSError, ValueError):
            self.texts.clear()
            return True
        return bool(self.texts)

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


def close_all(connections: Iterable[Connection]) -> None:
    """Closes connections."""
    for each in connections:
        each.close()


def close_when_read(connections: Iterable[Connection]) -> None:
    """Closes connections once the other ends have closed theirs, or after _PARTING_SECS. If bytes arrive at a
    connection that is already closed, it is reset, and the last message to the other end can be lost.
    """
    left, deadline = list(connections), time.monotonic() + _PARTING_SECS
    for each in left:
        each.send_no_more()
    while left and (secs_left := deadline - time.monotonic()) > 0:
        for each in ready_of(left, secs_left):
            try:
                each.read()
            except (OSError, ValueError):
                left.remove(each)
    close_all(connections)


def ready_of(files: Iterable[Any], timeout_secs: float) -> list[Any]:
    """Waits at most timeout_secs until some of the files have something to read or to accept; returns these files."""
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ, file)
        return [key.data for key, _ in selector.select(timeout_secs)]


def listen(address: str) -> list[socket.socket]:
    """Listens at an address of TF_CONFIG, or at all addresses of this host if it does not have that address itself.

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
    """Returns the addresses of a name. Returns none if the name has other addresses on other hosts."""
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    found = list(dict.fromkeys((socket.AddressFamily(family), str(address[0])) for family, *_, address in infos))
    is_name = host not in [address for _, address in found] and host != "localhost"
    # On many systems the host's own name has a loopback address there, and a different address on other hosts.
    if is_name and any(ipaddress.ip_address(address).is_loopback for _, address in found):
        return []
    return found
