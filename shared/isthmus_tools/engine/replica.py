"""One process that serves a function: started on a port of its own, probed, drained, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import site
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import aiohttp

from isthmus_tools import parent_death as leash
from isthmus_tools.engine.logbook import Logbook, read_lines
from isthmus_tools.engine.stack import FunctionSpec
from isthmus_tools.engine.watchdog import Watchdog

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
_OF_BOTO3 = "AWS_"
"""What boto3's variables start with: the functions find the S3 keys where commands do."""
OF_THE_IMAGE = {
    "PYTHONUNBUFFERED": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=33554432"
    ":glibc.malloc.trim_threshold=134217728",
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}
"""Variables of the templates' Dockerfiles that matter here as well."""

_PROBE_TIMEOUT_S = 2.0
_LAST_WORDS_S = 3.0  # for reading what a process that has ended had said
_FIRST_PROBE_S, _MAX_PROBE_S = 0.05, 0.5
_INTERRUPT_S = 2.0  # how long a process may take to leave once it is idle and was asked to


class State(Enum):
    """Where a replica is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, eq=False)
class Deployment:
    """One way to run a function; two deployments are never equal, so that each one replaces the last."""

    spec: FunctionSpec
    folder: Path
    environment: Mapping[str, str]
    ready_path: str = "/ready"
    watchdog: Watchdog = field(default_factory=Watchdog)

    @property
    def exposes_details(self) -> bool:
        """Whether callers are told what the function's log says; else only the engine's own log has it."""
        return self.environment.get("expose_details", "").lower() in ("true", "1")


class Replica:
    """A process of one deployment. `in_flight` is kept by who sends requests to it."""

    def __init__(self, deployment: Deployment, logbook: Logbook, session: aiohttp.ClientSession) -> None:
        self.deployment = deployment
        self.id = f"{deployment.spec.name}-{secrets.token_hex(3)}"
        self.state = State.STARTING
        self.reason = "starting"
        self.asked_to_stop = False
        self.in_flight = 0
        self.used_at = 0.0
        self.ready_at: float | None = None
        self.url = ""
        self._logbook = logbook
        self._session = session
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The process's id, once it is started."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process in a session of its own, on a leash that ends it with this process.

        Called on the event loop's own thread: the kernel ends the process with the thread that started it.
        """
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", leash.__file__, str(os.getpid())),
            *(sys.executable, "index.py"),
            cwd=self.deployment.folder,
            env={
                **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                # Not the folder for temporary files, where any user may put a .local of packages, which Python imports.
                "HOME": str(self.deployment.folder.parent),
                "PYTHONUSERBASE": site.getuserbase(),
                **s3_keys(os.environ),
                **OF_THE_IMAGE,
                **self.deployment.environment,
                "upstream_url": self.url,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        if self.asked_to_stop:  # while it was being started
            self._kill_group()

    async def pump(self) -> int:
        """Pass the process's output to the logbook until it ends; its exit status, negative for a signal."""
        process = self._process
        if process is None or process.stdout is None:
            return 0
        # A grandchild may hold the pipe open after the process itself has gone.
        reading = asyncio.create_task(self._read(process.stdout))
        status = await process.wait()
        self._kill_group()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reading, _LAST_WORDS_S)
        self.state = State.GONE
        return status

    async def probe(self) -> None:
        """Return once the function says that it is ready; `reason` holds what it says until then."""
        wait_s = _FIRST_PROBE_S
        url = self.url + self.deployment.ready_path
        while self.state is State.STARTING:
            try:
                timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
                async with self._session.get(url, timeout=timeout) as reply:
                    if reply.status == 200 and self.state is State.STARTING:  # it may have been told to stop meanwhile
                        self.state, self.reason, self.ready_at = State.READY, "", time.monotonic()
                        return
                    self.reason = _reason(reply.status, await reply.content.read(4096))
            except (aiohttp.ClientError, TimeoutError):
                self.reason = "starting"
            await asyncio.sleep(wait_s)
            wait_s = min(_MAX_PROBE_S, wait_s * 1.5)

    async def stop(self, drain_s: float) -> None:
        """Take no more requests, wait at most `drain_s` seconds for those under way, then end the process."""
        self.state, self.asked_to_stop = State.DRAINING, True
        until = time.monotonic() + drain_s
        while self.in_flight and time.monotonic() < until:
            await asyncio.sleep(0.02)
        process = self._process
        if process is None or process.returncode is not None:
            return
        if not self.in_flight and self.ready_at is not None:  # one that still loads has nothing to leave in order
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _INTERRUPT_S)
        self._kill_group()
        await process.wait()

    def kill(self) -> None:
        """End the process and all that it started, now."""
        self._kill_group()

    async def _read(self, stream: asyncio.StreamReader) -> None:
        async for text in read_lines(stream):
            self._logbook.add(self.id, text)

    def _kill_group(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def s3_keys(environ: Mapping[str, str]) -> dict[str, str]:
    """boto3's variables among these, and where its files are, which a function's HOME would not tell."""
    files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
    found = dict[str, str]()
    with contextlib.suppress(RuntimeError):  # a user without a home
        found = {name: str(Path.home() / ".aws" / file) for name, file in files.items()}
    return found | {name: text for name, text in environ.items() if name.startswith(_OF_BOTO3)}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _reason(status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])[:300]
    except (ValueError, KeyError, TypeError):
        return f"GET /ready answers {status}"
