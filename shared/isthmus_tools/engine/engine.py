"""Lifecycle of the local engine: bind the port, stage the functions, run them, drain, clean up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from isthmus.errors import LocalError
from isthmus.loop_thread import LoopThread
from isthmus_tools.engine.async_queue import DEFAULT_MAX_BODY_BYTES, AsyncQueue, QueueOptions
from isthmus_tools.engine.call_runner import CallRunner, callback_keys
from isthmus_tools.engine.callbacks import CallbackPolicy, networks_of
from isthmus_tools.engine.credentials import PASSWORD_FILE, USER, SecretFolder, ensure_password
from isthmus_tools.engine.fleet import EngineContext, Fleet
from isthmus_tools.engine.gateway import create_gateway, create_runner, page_path
from isthmus_tools.engine.nats_process import NATS_SECRET_VARIABLE, NATS_VARIABLE, TOKEN_SECRET, open_nats
from isthmus_tools.engine.proxy import ReverseProxy, open_session
from isthmus_tools.engine.stack import StackFile, build_folder
from isthmus_tools.engine.telemetry import Event, InvocationMetrics, OnEvent, ignore_event, shielded

DEFAULT_PORT = 8080
DRAIN_S = 10.0
_MAX_CRASHES = 2  # a first crash may be an accident
_POLL_S = 0.05
_BACKLOG = 1024  # a burst of callers that connect at once


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Arguments of an engine.

    `replicas` maps a function to its number of replicas. `environment` maps a function, or `*` for every function, to
    variables that override stack.yml. `${…}` in stack.yml is filled from `variables`, by default this process's
    environment. `callback_networks`, in CIDR notation, are permitted for callbacks beside public addresses;
    `callback_secret` names the secret that signs callbacks. `nats_port` is the NATS server's, None for 4222 or
    any free one; asynchronous calls have at most `async_body_bytes`. Without `asynchronous` no such server competes for
    the CPUs during measurements.
    """

    stack_file: Path | str = "stack.yml"
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    replicas: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    callback_networks: Sequence[str] = ()
    callback_secret: str = ""
    asynchronous: bool = True
    nats_port: int | None = None
    async_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    drain_s: float = DRAIN_S
    on_event: OnEvent = ignore_event


def run_engine(options: EngineOptions) -> None:
    """Serve the functions of a stack until SIGINT or SIGTERM, then drain; a second signal kills the functions.

    Raises:
        LocalError: the stack cannot be read or staged, a network is malformed, or the port is taken.
    """
    asyncio.run(_run_until_signal(options))


class Engine(LoopThread["_RunningEngine"]):
    """An engine in a thread of this process, for tests and `isthmus demo`; a context manager. See `EngineOptions`.

    Entering returns once the port is bound, before the functions are ready; exiting drains the functions.

    Raises:
        LocalError: on entering; the stack cannot be read or staged, or the port is taken.
    """

    def __init__(
        self,
        stack_file: Path | str = "stack.yml",
        *,
        port: int = 0,
        replicas: Mapping[str, int] | None = None,
        environment: Mapping[str, Mapping[str, str]] | None = None,
        variables: Mapping[str, str] | None = None,
        callback_networks: Sequence[str] = (),
        callback_secret: str = "",
        asynchronous: bool = True,
        nats_port: int = 0,
        async_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        drain_s: float = DRAIN_S,
        on_event: OnEvent = ignore_event,
    ) -> None:
        options = EngineOptions(
            stack_file=stack_file,
            port=port,
            replicas=replicas or {},
            environment=environment or {},
            variables=dict(os.environ) if variables is None else variables,
            callback_networks=callback_networks,
            callback_secret=callback_secret,
            asynchronous=asynchronous,
            nats_port=nats_port,
            async_body_bytes=async_body_bytes,
            drain_s=drain_s,
            on_event=on_event,
        )
        super().__init__("engine", lambda: _running(options))

    @property
    def url(self) -> str:
        """The gateway's address.

        Raises:
            LocalError: the engine does not run.
        """
        if self._value is None:
            raise LocalError("the engine does not run")
        return self._value.url

    @property
    def login(self) -> tuple[str, str]:
        """User and password of the system API.

        Raises:
            LocalError: the engine does not run.
        """
        if self._value is None:
            raise LocalError("the engine does not run")
        return USER, self._value.password

    def wait_ready(
        self, timeout_s: float = 60.0, progress: Callable[[Mapping[str, str]], None] = lambda _: None
    ) -> None:
        """Wait until every function is ready; `progress` receives changes of state: `ready` or the reason, by function.

        Raises:
            LocalError: a function's settings stop its start, a function crashed twice, or the time is over.
        """
        until, reported = time.monotonic() + timeout_s, None
        while True:
            if self._value is None:
                raise LocalError("the engine does not run")
            states = {s.name: "ready" if s.settled else s.reason for s in list(self._value.fleet)}
            if states != reported:
                reported = states
                progress(states)
            if all(state == "ready" for state in states.values()):
                return
            for s in list(self._value.fleet):
                if s.given_up or s.crashes >= _MAX_CRASHES:
                    raise LocalError(f"{s.name} does not start: {s.failure}", function=s.name)
            if time.monotonic() > until:
                waiting = "; ".join(f"{name}: {state}" for name, state in states.items() if state != "ready")
                raise LocalError(f"not ready after {timeout_s:g} s: {waiting}")
            time.sleep(_POLL_S)


@dataclass(frozen=True)
class _RunningEngine:
    url: str
    password: str
    fleet: Fleet


async def _run_until_signal(options: EngineOptions) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    async with _running(options) as running:

        def on_signal() -> None:
            if stopped.is_set():
                running.fleet.kill()
            stopped.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        await stopped.wait()


@contextlib.asynccontextmanager
async def _running(options: EngineOptions) -> AsyncIterator[_RunningEngine]:
    """Run an engine from binding its port to the end of its last process."""
    report = shielded(options.on_event)
    # Read before anything starts: a stack that cannot be read stops the start.
    stack = StackFile(Path(options.stack_file), {NATS_VARIABLE: "", **options.variables}).read()
    networks = networks_of(options.callback_networks)
    with contextlib.closing(_listen(options.host, options.port)) as listener:
        port = listener.getsockname()[1]
        url = f"http://{options.host}:{port}"
        state = stack.root / ".isthmus"
        password = ensure_password(state)
        async with contextlib.AsyncExitStack() as cleanup:
            build = cleanup.enter_context(build_folder(state / "build", port))
            context = EngineContext(url, build, state / "cache", SecretFolder(state / "secrets"))
            keys = callback_keys(context.secrets, options.callback_secret)
            # An engine on any free port has no successor that could take its calls over.
            queue_folder = state / "nats" / str(port) if options.port else build / "nats"
            queue_options = await cleanup.enter_async_context(_broker(options, queue_folder, context.secrets, report))
            variables = options.variables
            if queue_options is not None and not variables.get(NATS_VARIABLE):
                # Another server is not shown this one's token.
                own = {NATS_VARIABLE: queue_options.nats_url, NATS_SECRET_VARIABLE: TOKEN_SECRET}
                variables = {**variables, **own}
            session = await cleanup.enter_async_context(open_session())
            file = StackFile(Path(options.stack_file), variables)
            fleet = Fleet(file, context, session, report, overrides=options.environment, drain_s=options.drain_s)
            cleanup.push_async_callback(fleet.close)
            fleet.start(options.replicas)
            metrics = InvocationMetrics()
            policy = CallbackPolicy(url, networks)
            calls = CallRunner(fleet, url, session, policy, keys)
            cleanup.push_async_callback(calls.close)
            queue = AsyncQueue(fleet, calls, policy, queue_options, report)
            gateway = create_gateway(
                fleet,
                ReverseProxy(fleet.get, metrics, session),
                queue,
                metrics,
                context.secrets,
                password=password,
                loopback=_is_local(options.host),
            )
            runner = create_runner(gateway, options.drain_s)
            await runner.setup()
            cleanup.push_async_callback(runner.cleanup)
            # Before the gateway: the queue calls through the gateway.
            cleanup.push_async_callback(queue.close)
            await web.SockSite(runner, listener, backlog=_BACKLOG).start()
            report(Event("listening", url))
            login = f"faas-cli login -g {url} -u {USER} --password-stdin < {shlex.quote(str(state / PASSWORD_FILE))}"
            report(Event("login", login))
            if path := page_path(fleet):
                report(Event("page", f"{url}{path}"))
            yield _RunningEngine(url, password, fleet)


@contextlib.asynccontextmanager
async def _broker(
    options: EngineOptions, folder: Path, secrets: SecretFolder, on_event: OnEvent
) -> AsyncIterator[QueueOptions | None]:
    """Run the NATS server; None where there is none, or none is asked for."""
    limit = options.async_body_bytes
    nats = None
    if options.asynchronous:
        nats = open_nats(folder, secrets, on_event, port=options.nats_port, max_body_bytes=limit)
    if nats is None:
        yield None
        return
    async with nats.running():
        yield QueueOptions(nats_url=nats.url, token=nats.token, folder=folder, max_body_bytes=limit)


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as e:
        listener.close()
        raise LocalError(
            f"cannot listen on {host}:{port}: {e.strerror or e}",
            hint=f"something else listens there (see: ss -ltnp 'sport = :{port}'); choose another with --port",
            port=port,
        ) from e
    return listener


def _is_local(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1")
