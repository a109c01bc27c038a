"""Microsoft's emulator of Azure Blob Storage for tests: azurite on node, installed by `make store-servers`."""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import subprocess
from collections.abc import Iterator
from email.utils import formatdate
from http.client import HTTPConnection

import pytest

from support.paths import ROOT
from support.patience import until
from support.ports import free_port
from support.s3_server import listens

ACCOUNT = "devstoreaccount1"
# The well-known key of the emulator.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
CONTAINER = "isthmus-tests"
_PROGRAM = ROOT / ".servers" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"


class Azurite:
    """One container in memory, on a free port of this machine, until `stop`."""

    def __init__(self) -> None:
        node = shutil.which("node")
        if node is None or not _PROGRAM.is_file():
            raise FileNotFoundError("azurite is not installed: make store-servers")
        for _ in range(5):  # a port that is free may be somebody else's before it is taken
            self.port = free_port()
            self._process = subprocess.Popen(
                [
                    *(node, str(_PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
                    *("--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if until(lambda: self._process.poll() is not None or listens(self.port)) and self._process.poll() is None:
                self._make_container()
                return
            self.stop()
        raise RuntimeError("azurite did not start")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/{ACCOUNT}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _make_container(self) -> None:
        """Source: "Authorize with Shared Key" of Azure Storage."""
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02", "Content-Length": "0"}
        named = "".join(f"{name}:{headers[name]}\n" for name in ("x-ms-date", "x-ms-version"))
        text = f"PUT\n{chr(10) * 11}{named}/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        signature = hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}"
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request("PUT", f"/{ACCOUNT}/{CONTAINER}?restype=container", headers=headers)
        response = connection.getresponse()
        assert response.status == 201, response.read()
        connection.close()


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    try:
        server = Azurite()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    yield server
    server.stop()
