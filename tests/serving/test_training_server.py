"""The server of a training: requests that arrive too slowly, or are too many bytes together, lose their connections."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from isthmus.context import Context
from isthmus.pipeline.hop import HttpHop
from isthmus.serving.training import TrainingServer
from isthmus.settings import RegistrySettings
from isthmus.wire.frame import Frame
from isthmus_tools.learning.remote import training_settings
from support.patience import LONG_S, eventually

TOTAL_BYTES = 10_000


def echo(frame: Frame, context: Context) -> Frame:
    return frame


@contextmanager
def served(folder: Path, receive_s: float) -> Iterator[TrainingServer]:
    settings = training_settings(RegistrySettings(secrets_dir=str(folder)))
    settings = replace(settings, deadline_s=receive_s, max_working_bytes=2 * TOTAL_BYTES)
    with TrainingServer(settings, echo) as server:
        yield server


def connect(server: TrainingServer) -> socket.socket:
    connection = socket.create_connection((server.host, server.port), timeout=LONG_S)
    connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closed the connection, which is sent another byte."""
    connection.settimeout(0.01)
    try:
        connection.sendall(b"x")
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def call(server: TrainingServer) -> None:
    hop = HttpHop(server.url, attempts=1, connect_timeout_s=LONG_S, max_reply_bytes=2**20)
    try:
        frame = Frame({"x": np.ones(3, "f4")})
        reply = hop.call(frame, Context.from_headers({}, longest_s=LONG_S)).frame
    finally:
        hop.close()
    np.testing.assert_array_equal(reply.tensors["x"], frame.tensors["x"])


def test_connections_that_drip_bytes_are_closed_and_block_nobody(tmp_path: Path) -> None:
    with served(tmp_path, receive_s=0.5) as server:
        dripping = [connect(server) for _ in range(150)]
        call(server)
        for connection in dripping:
            eventually(lambda connection=connection: is_closed(connection))  # type: ignore[misc]
            connection.close()


def test_requests_without_a_response_are_bounded_in_bytes_together(tmp_path: Path) -> None:
    with served(tmp_path, receive_s=10 * LONG_S) as server:
        both = [connect(server) for _ in range(2)]
        for connection in both:
            connection.sendall(bytes(TOTAL_BYTES * 2 // 3))
        eventually(lambda: any(is_closed(connection) for connection in both))
        call(server)
        for connection in both:
            connection.close()
