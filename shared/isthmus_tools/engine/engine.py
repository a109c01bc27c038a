"""The engine's life: take the port, lay the functions out, run them, and leave nothing behind."""

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
from isthmus_tools.engine.async_queue import AsyncQueue
from isthmus_tools.engine.build import build_folder
from isthmus_tools.engine.callbacks import CallbackPolicy, parse_networks
from isthmus_tools.engine.credentials import PASSWORD_FILE, USER, ensure_password
from isthmus_tools.engine.events import Event, OnEvent, ignore, shielded
from isthmus_tools.engine.fleet import Fleet, Places
from isthmus_tools.engine.gateway import create_gateway, create_runner
from isthmus_tools.engine.metrics import Metrics
from isthmus_tools.engine.proxy import Proxy, open_session
from isthmus_tools.engine.secrets import SecretFolder
from isthmus_tools.engine.stack import StackFile
from isthmus_tools.netem.loop_thread import InThread

DEFAULT_PORT = 8080
DRAIN_S = 10.0
_CRASHES_THAT_ARE_A_PATTERN = 2
_POLL_S = 0.05
_BACKLOG = 1024


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an engine is told: `environment` and `replicas` are by function, `*` in `environment` is every one."""

    stack_file: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    replicas: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    callback_networks: Sequence[str] = ()
    drain_s: float = DRAIN_S
    on_event: OnEvent = ignore


def run_engine(
    stack_file: Path | str = "stack.yml",
    *,
    port: int = DEFAULT_PORT,
    host: str = "127.0.0.1",
    replicas: Mapping[str, int] | None = None,
    environment: Mapping[str, Mapping[str, str]] | None = None,
    variables: Mapping[str, str] | None = None,
    callback_networks: Sequence[str] = (),
    on_event: OnEvent = ignore,
) -> None:
    """Serve the functions of a stack until SIGINT or SIGTERM, then drain and return; a second signal ends it at once.

    `replicas` maps a function to how many of it run. `environment` maps a function, or `*` for every one, to variables
    that go before stack.yml's. The stack's own `${…}` are filled from `variables`, by
    default this process's environment. `callback_networks`, in CIDR notation, are those beside public addresses that
    the results of async calls may be sent to.

    Raises:
        LocalError: the stack cannot be read or laid out, a network is none, or the port is taken.
    """
    options = Options(
        stack_file=Path(stack_file),
        host=host,
        port=port,
        replicas=replicas or {},
        environment=environment or {},
        variables=dict(os.environ) if variables is None else variables,
        callback_networks=callback_networks,
        on_event=on_event,
    )
    asyncio.run(_run_until_signal(options))


class Engine(InThread["_Running"]):
    """An engine in a thread of this process, for tests and `isthmus demo`; a context manager.

    It is entered once its port is taken, before its functions are ready, and left when they have drained.

    Raises:
        LocalError: on entering; the stack cannot be read or laid out, or the port is taken.
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
        drain_s: float = DRAIN_S,
        on_event: OnEvent = ignore,
    ) -> None:
        options = Options(
            stack_file=Path(stack_file),
            port=port,
            replicas=replicas or {},
            environment=environment or {},
            variables=dict(os.environ) if variables is None else variables,
            callback_networks=callback_networks,
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
        """Wait until every function is ready; `progress` is told `ready` or the reason, by function, as they change.

        Raises:
            LocalError: a function's settings stop its start, or it ended twice before it was ready, or the time is
                over; says why.
        """
        until, told = time.monotonic() + timeout_s, None
        while True:
            if self._value is None:
                raise LocalError("the engine does not run")
            states = {s.name: "ready" if s.settled else s.reason for s in list(self._value.fleet)}
            if states != told:
                told = states
                progress(states)
            if all(state == "ready" for state in states.values()):
                return
            for s in list(self._value.fleet):
                if s.given_up or s.crashes >= _CRASHES_THAT_ARE_A_PATTERN:
                    raise LocalError(f"{s.name} does not start: {s.failure}", function=s.name)
            if time.monotonic() > until:
                waiting = "; ".join(f"{name}: {state}" for name, state in states.items() if state != "ready")
                raise LocalError(f"not ready after {timeout_s:g} s: {waiting}")
            time.sleep(_POLL_S)


@dataclass(frozen=True)
class _Running:
    url: str
    password: str
    fleet: Fleet


async def _run_until_signal(options: Options) -> None:
    loop, leave = asyncio.get_running_loop(), asyncio.Event()
    async with _running(options) as running:

        def on_signal() -> None:
            if leave.is_set():
                running.fleet.kill()
            leave.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        await leave.wait()


@contextlib.asynccontextmanager
async def _running(options: Options) -> AsyncIterator[_Running]:
    """An engine from the moment its port is taken until its last process is gone."""
    tell = shielded(options.on_event)
    file = StackFile(options.stack_file, options.variables)
    stack = file.read()
    networks = parse_networks(options.callback_networks)
    with contextlib.closing(_listen(options.host, options.port)) as listener:
        port = listener.getsockname()[1]
        url = f"http://{options.host}:{port}"
        state = stack.root / ".isthmus"
        password = ensure_password(state)
        async with contextlib.AsyncExitStack() as leaving:
            build = leaving.enter_context(build_folder(state / "build", port))
            places = Places(url, build, state / "cache", SecretFolder(state / "secrets"))
            session = await leaving.enter_async_context(open_session())
            fleet = Fleet(file, places, session, tell, overrides=options.environment, drain_s=options.drain_s)
            leaving.push_async_callback(fleet.close)
            fleet.start(options.replicas)
            metrics = Metrics()
            policy = CallbackPolicy(url, networks)
            queue = AsyncQueue(fleet, url, session, tell, policy)
            gateway = create_gateway(
                fleet,
                Proxy(fleet.get, metrics, session),
                queue,
                metrics,
                places.secrets,
                password=password,
                loopback=_is_local(options.host),
            )
            runner = create_runner(gateway, options.drain_s)
            await runner.setup()
            leaving.push_async_callback(runner.cleanup)
            # Before the gateway: the queue calls through it, and a connection that comes while it closes stays open.
            leaving.push_async_callback(queue.close)
            await web.SockSite(runner, listener, backlog=_BACKLOG).start()
            tell(Event("listening", url))
            login = f"faas-cli login -g {url} -u {USER} --password-stdin < {shlex.quote(str(state / PASSWORD_FILE))}"
            tell(Event("login", login))
            yield _Running(url, password, fleet)


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
