"""A lower bound: the chain of bench/chain.py as three processes on plain sockets, with the same bytes.

Run as `tcp_chain.py router PORT HEAD_PORT TAIL_PORT` or `tcp_chain.py head|tail PORT`. A message is its length, the
length of the head's response, and the bytes.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable

PREFIX = struct.Struct("<QQ")
ONE_SEND_BELOW = 65_536
Message = tuple[int, memoryview]


class Peer:
    """A connection that carries messages."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def at(cls, port: int) -> Peer:
        """A connection to a process on this machine."""
        return cls(socket.create_connection(("127.0.0.1", port)))

    def send(self, body: bytes | memoryview, response_size: int = 0) -> None:
        """Send a message that asks for a response of that size."""
        prefix = PREFIX.pack(len(body), response_size)
        if len(body) < ONE_SEND_BELOW:
            self._connection.sendall(b"".join((prefix, body)))
        else:
            self._connection.sendall(prefix)
            self._connection.sendall(body)

    def receive(self) -> Message:
        """The next message: the response size asked for, and the bytes.

        Raises:
            ConnectionError: the peer closed the connection.
        """
        size, response_size = PREFIX.unpack(self._exactly(PREFIX.size))
        return response_size, self._exactly(size)

    def _exactly(self, size: int) -> memoryview:
        view = memoryview(bytearray(size))
        at = 0
        while at < size:
            got = self._connection.recv_into(view[at:])
            if not got:
                raise ConnectionError("the peer closed the connection")
            at += got
        return view


def serve(port: int, respond: Callable[[Message], bytes | memoryview]) -> None:
    """Serve connections in sequence, each until it ends."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            connection, _ = listener.accept()
            peer = Peer(connection)
            try:
                while True:
                    peer.send(respond(peer.receive()))
            except ConnectionError:
                connection.close()


def route(head: Peer, tail: Peer) -> Callable[[Message], memoryview]:
    """The router: the small input to the head, the activations to the tail, the tail's output back."""

    def respond(message: Message) -> memoryview:
        response_size, body = message
        head.send(body, response_size)
        _, activations = head.receive()
        tail.send(activations)
        return tail.receive()[1]

    return respond


def main() -> None:
    role, port = sys.argv[1], int(sys.argv[2])
    ready: dict[int, bytes] = {}
    if role == "router":
        head, tail = (Peer.at(int(p)) for p in sys.argv[3:5])
        serve(port, route(head, tail))
    elif role == "head":
        serve(port, lambda message: ready.setdefault(message[0], bytes(message[0])))
    else:
        serve(port, lambda message: message[1][:64])


if __name__ == "__main__":
    main()
