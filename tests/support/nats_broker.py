"""The NATS server of the tests as one of the brokers of the contract."""

from __future__ import annotations

from pathlib import Path

from isthmus.events.brokers.nats import NatsConsumer, NatsPublisher
from support.brokers import PASSWORD, USER, BrokerServer
from support.nats_server import NatsServer


class NatsBroker(BrokerServer):
    """nats-server with JetStream and a password."""

    redelivery_s = 2.0

    def __init__(self, folder: Path) -> None:
        self._server = NatsServer(folder, f"authorization {{ user: {USER}, password: {PASSWORD} }}")

    def command(self) -> list[str]:
        return []

    def consumer(self, place: str, *, password: str = PASSWORD) -> NatsConsumer:
        return NatsConsumer(self._server.place(place, ack_wait=self.redelivery_s or 0), f"{USER}:{password}")

    def publisher(self, place: str, *, password: str = PASSWORD) -> NatsPublisher:
        return NatsPublisher(self._server.place(place), f"{USER}:{password}")

    def kill(self) -> None:
        self._server.kill()

    def restart(self) -> None:
        self._server.restart()
