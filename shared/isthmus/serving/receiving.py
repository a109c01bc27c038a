"""Bounds on requests that are still arriving: seconds for each, bytes for all together.

waitress calls the app once a request has been received whole. Until then the listening socket given to waitress holds
the bounds: a request beyond them loses its connection. Functions have those of their template instead, which stands
alone (template/python3-isthmus/bounded_server.py).
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from typing import Any


class BoundedListener(socket.socket):
    """A listening socket for waitress whose connections are bounded.

    Units: `total_bytes` of all requests without a response, `receive_s` seconds from a request's first byte to its
    last, and for the peer to acknowledge bytes of a response.
    """

    def __init__(self, listening: socket.socket, *, total_bytes: int, receive_s: float) -> None:
        super().__init__(listening.family, listening.type, listening.proto, listening.detach())
        self._room, self._receive_s = _Room(total_bytes), receive_s

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        accepted, address = super().accept()
        # waitress has no timeout for a worker that waits for its peer to read: the kernel closes that connection.
        if sys.platform == "linux":
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(self._receive_s * 1000)))
        return _BoundedConnection(accepted, self._room, self._receive_s), address


class _Room:
    """Bytes of all requests without a response."""

    def __init__(self, total_bytes: int) -> None:
        self._left = total_bytes
        self._lock = threading.Lock()  # a worker sends while the server's thread receives

    def take(self, connection: _BoundedConnection, count: int) -> bool:
        """Count bytes that a connection received; False if there is no room."""
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            connection.received += count
            return True

    def release(self, connection: _BoundedConnection) -> None:
        """Count the bytes of a connection no longer."""
        with self._lock:
            self._left += connection.received
            connection.received = 0


class _BoundedConnection(socket.socket):
    def __init__(self, accepted: socket.socket, room: _Room, receive_s: float) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self.received = 0
        self._room, self._receive_s, self._began = room, receive_s, 0.0

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Receive bytes; none beyond the bounds, so that waitress closes the connection."""
        data = super().recv(size, flags)
        now = time.monotonic()
        if not self.received:
            self._began = now
        is_late = now - self._began > self._receive_s
        return b"" if is_late or not self._room.take(self, len(data)) else data

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send bytes of a response: its request counts no longer."""
        self._room.release(self)
        return super().send(data, flags)

    def close(self) -> None:
        """Close; the bytes received count no longer."""
        self._room.release(self)
        super().close()
