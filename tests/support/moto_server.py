"""AWS's S3 and SQS on this machine: moto's server. It enforces conditional writes, which rclone does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

REGION = "us-east-1"
KEY_ID, SECRET = "TESTKEYID", "test-secret-key"


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """The server's URL."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()
