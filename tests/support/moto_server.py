"""AWS's S3 and SQS on this machine: moto's server. It enforces conditional writes, which rclone does not."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from support.s3_server import BUCKET, KEY_ID, SECRET

REGION = "us-east-1"


@dataclass(frozen=True)
class Moto:
    """A server with the tests' bucket on a port of this machine."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Silent(MotoRequestHandler):
    """Without a line on standard error for each request."""

    def log_request(self, *_: object) -> None:
        pass


@contextmanager
def moto() -> Iterator[Moto]:
    """A server for as long as the block lasts."""
    app, state = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # moto compares and writes in two steps: of two writers at once, both would find their condition true. And it
        # closes the file of an object that is written anew, though a reader may be at it.
        if environ["REQUEST_METHOD"] not in ("GET", "PUT"):
            return app(environ, start_response)  # type: ignore[no-any-return]
        with state:
            return list(app(environ, start_response))

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=_Silent)
    thread = threading.Thread(target=server.serve_forever, name="moto")
    thread.start()
    try:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{server.port}",
            region_name=REGION,
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield Moto(server.port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[Moto]:
    """A server for all tests of a process."""
    with moto() as server:
        yield server


@pytest.fixture(scope="session")
def moto_endpoint(moto_s3: Moto) -> str:
    """The server's URL."""
    return moto_s3.endpoint
