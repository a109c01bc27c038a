"""Ports for servers that are told where to listen."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port of this machine that nobody uses, below those that the kernel gives to others by itself."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free")
