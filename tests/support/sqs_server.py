"""A real HTTP server of SQS: moto's. Its queues are in memory, so that they die with it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest

from isthmus.events.brokers.sqs import SqsConsumer, SqsPublisher
from isthmus.events.configuration import Seconds, SqsPlace
from support.brokers import PASSWORD, BrokerServer

REGION = "eu-central-1"


@contextlib.contextmanager
def credentials() -> Iterator[None]:
    """Keys where boto3 looks for them, until its client has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield


class SqsServer(BrokerServer):
    """Standard queues."""

    redelivery_s = 2.0
    deduplicates = False
    keeps_data = False
    checks_passwords = False
    suffix = ""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("moto")
        super().__init__(folder)

    def command(self) -> Sequence[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> Any:
        # Of the default session, which parses boto3's files once.
        with credentials():
            return boto3.client("sqs", endpoint_url=self.endpoint, region_name=REGION)

    def make(self, place: str, **attributes: str) -> None:
        fifo = {"FifoQueue": "true"} if self.suffix else {}
        with contextlib.closing(self.client()) as client:
            client.create_queue(QueueName=place + self.suffix, Attributes={**fifo, **attributes})

    def place(self, name: str, **options: str) -> SqsPlace:
        return SqsPlace(
            queue_url=f"{self.endpoint}/123456789012/{name}{self.suffix}",
            endpoint=self.endpoint,
            region=REGION,
            visibility=Seconds(self.redelivery_s or 0),
        )

    def consumer(self, place: str, *, password: str = PASSWORD) -> SqsConsumer:
        with credentials():
            return SqsConsumer(self.place(place))

    def publisher(self, place: str, *, password: str = PASSWORD) -> SqsPublisher:
        with credentials():
            return SqsPublisher(self.place(place))


class SqsFifoServer(SqsServer):
    """FIFO queues."""

    deduplicates = True
    suffix = ".fifo"
