"""A replica: a local process of a deployment, started on a free port, probed, drained, ended.

No watchdog runs in front of the process, so of-watchdog's limits on calls are applied by the proxy.
Source: of-watchdog 0.11.6, config/config.go, executor/http_runner.go, and its concurrency limiter.
"""

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
from typing import Self

import aiohttp

from isthmus.units import parse_duration
from isthmus_tools import parent_death
from isthmus_tools.engine.stack import FunctionSpec
from isthmus_tools.engine.telemetry import LogBuffer, read_lines

DEFAULT_TIMEOUT_S = 30.0  # of of-watchdog
INTERNAL_HEADER = "X-OpenFaaS-Internal"
TIMEOUT_HEADERS = {INTERNAL_HEADER: "of-watchdog"}
"""Header of the empty 504 at a call's timeout."""
REFUSAL_HEADERS = {INTERNAL_HEADER: "faas-middleware"}
"""Header of the 429 for a call above max_inflight."""
WATCHDOG_VARIABLES = frozenset(
    {
        *("fprocess", "function_process", "mode", "port", "upstream_url", "http_upstream_url", "content_type"),
        *("read_timeout", "write_timeout", "exec_timeout", "healthcheck_interval", "max_inflight", "ready_path"),
        *("prefix_logs", "log_buffer_size", "log_callid", "suppress_lock", "buffer_http", "http_buffer_req_body"),
        *("static_path", "jwt_auth", "jwt_auth_debug", "jwt_auth_local"),
    }
)
"""Environment variables of of-watchdog."""


@dataclass(frozen=True)
class WatchdogLimits:
    """of-watchdog's limits on the calls of a replica.

    Units: exec_timeout_s in seconds; 0 means no limit, for max_inflight too.
    """

    exec_timeout_s: float = DEFAULT_TIMEOUT_S
    max_inflight: int = 0

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Limits from the variables `exec_timeout` and `max_inflight`; a malformed value becomes the default."""
        inflight = env.get("max_inflight", "")
        return cls(
            _seconds(env.get("exec_timeout", ""), DEFAULT_TIMEOUT_S),
            int(inflight) if _is_whole(inflight) else 0,
        )

    def timeout_s(self, x_timeout: str) -> float:
        """Timeout of a call in seconds, 0 for no limit: X-Timeout shortens exec_timeout and never lengthens it.

        Without exec_timeout, of-watchdog ignores X-Timeout, and the function alone applies the header.
        """
        try:
            return min(parse_duration(x_timeout), self.exec_timeout_s)
        except ValueError:
            return self.exec_timeout_s

    def refuses(self, in_flight: int) -> bool:
        """Whether `in_flight` calls leave no room for another."""
        return 0 < self.max_inflight <= in_flight

    @property
    def refusal(self) -> str:
        """Body of the 429."""
        return f"Concurrent request limit exceeded. Max concurrent requests: {self.max_inflight}\n"


def _seconds(text: str, default: float) -> float:
    if _is_whole(text):
        return float(text)
    try:
        return parse_duration(text)
    except ValueError:
        return default


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


_INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
_STORE_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_", "HADOOP_", "KRB5")
"""Prefixes of the stores' own variables: functions inherit the registry's credentials of the engine."""
_OTEL_PREFIX = "OTEL_"
"""Prefix of OpenTelemetry's variables: one receiver takes the traces of all functions."""
IMAGE_VARIABLES = {
    "PYTHONUNBUFFERED": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=33554432"
    ":glibc.malloc.trim_threshold=134217728",
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}
"""Variables of the template's Dockerfile that apply to local processes."""

_PROBE_TIMEOUT_S = 2.0  # a probe of a busy process is repeated
_LAST_OUTPUT_S = 3.0  # for reading the last output of an ended process
_FIRST_PROBE_S, _MAX_PROBE_S = 0.05, 0.5  # a start takes 0.3 s at best, a minute with a large model
_INTERRUPT_S = 2.0  # between SIGINT to an idle process and SIGKILL


class ReplicaState(Enum):
    """Lifecycle of a replica."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, eq=False)
class Deployment:
    """Specification, staged folder and environment of a function; compared by identity: each replaces the last."""

    spec: FunctionSpec
    folder: Path
    environment: Mapping[str, str]
    ready_path: str = "/ready"
    watchdog: WatchdogLimits = field(default_factory=WatchdogLimits)

    @property
    def exposes_details(self) -> bool:
        """Whether responses to callers may hold lines of the function's log."""
        return self.environment.get("expose_details", "").lower() in ("true", "1")


class Replica:
    """A process of a deployment; the proxy counts its calls in `in_flight`."""

    def __init__(self, deployment: Deployment, log_buffer: LogBuffer, session: aiohttp.ClientSession) -> None:
        self.deployment = deployment
        self.id = f"{deployment.spec.name}-{secrets.token_hex(3)}"
        self.state = ReplicaState.STARTING
        self.reason = "starting"
        self.asked_to_stop = False
        self.in_flight = 0
        self.used_at = 0.0
        self.ready_at: float | None = None
        self.url = ""
        self._log_buffer = log_buffer
        self._session = session
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id, once started."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process in a session of its own; the kernel kills the process when this one dies.

        Called on the event loop's thread: PR_SET_PDEATHSIG follows the thread that forked, not the process.
        """
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", parent_death.__file__, str(os.getpid())),
            *(sys.executable, "index.py"),
            cwd=self.deployment.folder,
            env={
                **{name: os.environ[name] for name in _INHERITED if name in os.environ},
                # Not /tmp: any user may put a .local of packages there, and Python would import from it.
                "HOME": str(self.deployment.folder.parent),
                "PYTHONUSERBASE": site.getuserbase(),
                **store_keys(os.environ),
                **{name: text for name, text in os.environ.items() if name.startswith(_OTEL_PREFIX)},
                "OTEL_SERVICE_NAME": self.deployment.spec.name,
                **IMAGE_VARIABLES,
                **self.deployment.environment,
                "upstream_url": self.url,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        if self.asked_to_stop:  # during the start
            self._kill_group()

    async def pump(self) -> int:
        """Read the process's output into the log buffer until the end; exit status, negative for a signal."""
        process = self._process
        if process is None or process.stdout is None:
            return 0
        # A grandchild may hold the pipe open after the end of the process.
        reading = asyncio.create_task(self._read(process.stdout))
        status = await process.wait()
        self._kill_group()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reading, _LAST_OUTPUT_S)
        self.state = ReplicaState.GONE
        return status

    async def probe(self) -> None:
        """Probe readiness until the function is ready; `reason` is its last refusal."""
        wait_s = _FIRST_PROBE_S
        url = self.url + self.deployment.ready_path
        while self.state is ReplicaState.STARTING:
            try:
                timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
                async with self._session.get(url, timeout=timeout) as reply:
                    # The state may have changed during the probe.
                    if reply.status == 200 and self.state is ReplicaState.STARTING:
                        self.state, self.reason, self.ready_at = ReplicaState.READY, "", time.monotonic()
                        return
                    self.reason = _reason(reply.status, await reply.content.read(4096))
            except (aiohttp.ClientError, TimeoutError):
                self.reason = "starting"
            await asyncio.sleep(wait_s)
            wait_s = min(_MAX_PROBE_S, wait_s * 1.5)

    async def stop(self, drain_s: float) -> None:
        """Drain: no new calls, at most `drain_s` seconds for calls in flight, then end the process."""
        self.state, self.asked_to_stop = ReplicaState.DRAINING, True
        until = time.monotonic() + drain_s
        while self.in_flight and time.monotonic() < until:
            await asyncio.sleep(0.02)
        process = self._process
        if process is None or process.returncode is not None:
            return
        if not self.in_flight and self.ready_at is not None:  # a loading process has nothing to clean up
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _INTERRUPT_S)
        self._kill_group()
        await process.wait()

    def kill(self) -> None:
        """Kill the process group now."""
        self._kill_group()

    async def _read(self, stream: asyncio.StreamReader) -> None:
        async for text in read_lines(stream):
            self._log_buffer.add(self.id, text)

    def _kill_group(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def store_keys(environ: Mapping[str, str]) -> dict[str, str]:
    """The stores' variables in `environ`, and the paths of their files: HOME of a function is another folder."""
    paths = dict[str, str]()
    with contextlib.suppress(RuntimeError):  # a user without a home
        home = Path.home()
        files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
        paths = {name: str(home / ".aws" / file) for name, file in files.items()}
        # Without the file the variable would be a mistake, and hide the instance's own credentials.
        if (google := home / ".config" / "gcloud" / "application_default_credentials.json").is_file():
            paths["GOOGLE_APPLICATION_CREDENTIALS"] = str(google)
    return paths | {name: text for name, text in environ.items() if name.startswith(_STORE_PREFIXES)}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _reason(status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])[:300]
    except (ValueError, KeyError, TypeError):
        return f"GET /ready answers {status}"
