"""A connection to a NATS server for threads: an event loop in a thread, reconnected for ever.

Each connect makes a new client. nats-py's own reconnect would send acknowledgements that were buffered for the old
connection: at a server with a new, empty store, these would acknowledge other messages of equal numbers.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.client import Client

from isthmus.errors import BrokerRefused, BrokerUnavailable, MessageTooLarge
from isthmus.loop_thread import LoopThread
from isthmus.retries import backoff

CONNECT_TIMEOUT_S = 5.0
"""How long an operation waits for a connection, and a connection for the server."""
REQUEST_TIMEOUT_S = 10.0
"""How long JetStream may take to confirm; a slow disk takes seconds for a batch."""
_CANCEL_AGAIN_S = 1.0  # a client may take this long to send what is left before it closes
_LOOK_S = 0.5
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.05, 2.0
# A half-open connection is seen after three intervals.
_PING_INTERVAL_S = 10
_MESSAGE_TOO_LARGE = 10054  # JSStreamMessageExceedsMaximumErr
_STREAM_FULL = 10077  # JSStreamStoreFailedErr: "maximum messages exceeded", "maximum bytes exceeded"
_NO_JETSTREAM = "JetStream does not answer; is it on (nats-server --jetstream)?"
T = TypeVar("T")


class NatsConnection(LoopThread["_Supervisor"]):
    """A supervised connection; `prepare` runs on every new client before operations do.

    `credentials` is the content of a .creds file, `user:password`, or a token.
    """

    def __init__(
        self, url: str, credentials: str = "", prepare: Callable[[Client], Awaitable[object]] | None = None
    ) -> None:
        super().__init__("nats", self._supervised)
        self.url = redacted(url)
        self._servers = [server.strip() for server in url.split(",")]
        self._login = _login(credentials.strip(), self.url)
        self._prepare = prepare

    def run(self, work: Callable[[Client], Awaitable[T]], connect_timeout_s: float | None = None) -> T:
        """The result of `work` with the connected client; `connect_timeout_s` is CONNECT_TIMEOUT_S by default.

        Raises:
            BrokerUnavailable: no connection within `connect_timeout_s`, a broken connection, or no response;
            the fact `full` is True where a stream takes no more.
            BrokerRefused: credentials, permissions, or a request that the server calls wrong.
            MessageTooLarge: a stream takes less than the server does.
        """
        supervisor, loop = self._value, self._loop
        if supervisor is None or loop is None:
            raise BrokerUnavailable(f"the connection to {self.url} is closed", broker=self.url)
        timeout_s = CONNECT_TIMEOUT_S if connect_timeout_s is None else connect_timeout_s
        try:
            return asyncio.run_coroutine_threadsafe(supervisor.run(work, timeout_s), loop).result()
        except concurrent.futures.CancelledError as e:
            raise BrokerUnavailable(f"the connection to {self.url} was closed meanwhile", broker=self.url) from e

    def post(self, work: Callable[[], Awaitable[None]]) -> None:
        """Start `work` and return; a failure is not reported."""
        loop = self._loop
        if self._value is None or loop is None:
            return

        async def quietly() -> None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await work()

        asyncio.run_coroutine_threadsafe(quietly(), loop)

    @contextlib.asynccontextmanager
    async def _supervised(self) -> AsyncIterator[_Supervisor]:
        supervisor = _Supervisor(self.url, self._servers, self._login, self._prepare)
        task = asyncio.create_task(supervisor.keep_connected(), name="nats supervisor")
        try:
            yield supervisor
        finally:
            # More than once: nats-py loses a cancellation that comes while it connects.
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=_CANCEL_AGAIN_S)


class _Supervisor:
    """Connects, and connects again whenever the connection ends."""

    def __init__(
        self,
        url: str,
        servers: list[str],
        login: dict[str, Any],
        prepare: Callable[[Client], Awaitable[object]] | None,
    ) -> None:
        self._url, self._servers, self._login, self._prepare = url, servers, login, prepare
        self._client: Client | None = None
        self._failure: BrokerUnavailable | BrokerRefused = BrokerUnavailable(f"{url} does not answer", broker=url)
        # Set while there is a client, or a refusal that waiting does not change.
        self._settled = asyncio.Event()
        self._running: set[asyncio.Task[Any] | None] = set()
        self._denied: tuple[float, str] = (0.0, "")

    async def keep_connected(self) -> None:
        """Run until cancelled, then flush and close the client."""
        pauses = backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)
        while True:
            closed = asyncio.Event()
            try:
                async with self._connected(closed) as client:
                    self._client = client
                    self._settled.set()
                    pauses = backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)
                    await _end_of(client, closed)
                    # nats-py would let requests wait for their responses until their timeouts.
                    for task in self._running:
                        if task is not None:
                            task.cancel()
                self._wait_after(self._broken())
            except BrokerRefused as e:
                self._failure = e
                self._settled.set()
            except BrokerUnavailable as e:
                self._wait_after(e)
            except Exception as e:  # what nats-py fails with at one connect must not end all later ones
                self._wait_after(BrokerUnavailable(f"{self._url}: {e!r}", broker=self._url))
            finally:
                self._client = None
            await asyncio.sleep(next(pauses))

    async def run(self, work: Callable[[Client], Awaitable[T]], connect_timeout_s: float) -> T:
        """See `NatsConnection.run`."""
        if not self._settled.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, connect_timeout_s)):
                    await self._settled.wait()
        client = self._client
        if client is None:
            # A new instance each time: threads would share the traceback.
            raise type(self._failure)(self._failure.message, hint=self._failure.hint, **self._failure.facts)
        started, task = time.monotonic(), asyncio.current_task()
        self._running.add(task)
        try:
            with translated(self._url):
                return await work(client)
        except asyncio.CancelledError as e:
            if not client.is_closed:
                raise
            raise self._broken() from e
        except BrokerUnavailable as e:
            # The server reports a missing permission out of band and leaves the request without a response.
            denied_at, denied = self._denied
            if denied_at >= started:
                raise BrokerRefused(f"{self._url}: {denied}", broker=self._url) from e
            raise
        finally:
            self._running.discard(task)

    def _wait_after(self, failure: BrokerUnavailable) -> None:
        self._failure = failure
        self._settled.clear()

    def _broken(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"the connection to {self._url} broke", broker=self._url)

    @contextlib.asynccontextmanager
    async def _connected(self, closed: asyncio.Event) -> AsyncIterator[Client]:
        async def on_closed() -> None:
            closed.set()

        client, failures = Client(), []

        async def on_error(error: Exception) -> None:
            failures.append(error)
            del failures[:-1]
            if "permissions violation" in str(error).lower():
                self._denied = (time.monotonic(), str(error).removeprefix("nats: "))

        try:
            with translated(self._url):
                try:
                    await client.connect(
                        self._servers,
                        name="isthmus",
                        error_cb=on_error,
                        closed_cb=on_closed,
                        allow_reconnect=False,
                        connect_timeout=int(CONNECT_TIMEOUT_S),
                        reconnect_time_wait=0,
                        max_reconnect_attempts=1,  # per connect; without a bound `connect` would not return
                        ping_interval=_PING_INTERVAL_S,
                        **self._login,
                    )
                except nats.errors.NoServersError as e:
                    raise failures[-1] if failures else e from None
                if self._prepare is not None:
                    await self._prepare(client)
            yield client
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):  # a half-open connection takes nothing
                    await client.close()  # flushes first


async def _end_of(client: Client, closed: asyncio.Event) -> None:
    """Wait for the end of the client's connection.

    nats-py does not call `closed_cb` where it fails to send the rest of its buffer to a connection that broke.
    """
    while not client.is_closed and not closed.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await closed.wait()


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Errors of nats-py as ours."""
    try:
        yield
    except (
        nats.errors.NoRespondersError,
        nats.js.errors.NoStreamResponseError,
        nats.js.errors.ServiceUnavailableError,
    ) as e:
        reason = getattr(e, "description", None) or _NO_JETSTREAM
        is_full = getattr(e, "err_code", None) == _STREAM_FULL
        raise BrokerUnavailable(f"{url}: {reason}", broker=url, full=is_full) from e
    except nats.js.errors.APIError as e:
        reason = e.description or str(e)
        if e.err_code == _MESSAGE_TOO_LARGE:
            raise MessageTooLarge(f"{url}: {reason}", broker=url) from e
        kind = BrokerRefused if 400 <= (e.code or 500) < 500 else BrokerUnavailable
        raise kind(f"{url}: {reason}", broker=url) from e
    except (nats.errors.Error, OSError, ValueError) as e:  # TimeoutError is an OSError
        reason = (str(e) or type(e).__name__).removeprefix("nats: ")
        kind = BrokerRefused if _is_refusal(e) else BrokerUnavailable
        raise kind(f"{url}: {reason}", broker=url) from e


def redacted(url: str) -> str:
    """The URL without user and password."""
    return re.sub("//[^/@,]*@", "//", url)


def _is_refusal(error: Exception) -> bool:
    """Whether a second try fails as well: credentials, or a name that nats-py itself calls invalid."""
    names = (nats.errors.BadSubjectError, nats.errors.BadHeaderError, nats.errors.InvalidUserCredentialsError)
    text = str(error).lower()
    return isinstance(error, (ValueError, *names)) or "authorization" in text or "authentication expired" in text


def _login(credentials: str, url: str) -> dict[str, Any]:
    """The options of nats-py for the content of a secret.

    Raises:
        BrokerRefused: a credentials file without a usable seed; nats-py would fail at every connect.
    """
    if not credentials:
        return {}
    if "BEGIN NATS USER JWT" in credentials:
        return _credentials_file(credentials, url)
    user, colon, password = credentials.partition(":")
    return {"user": user, "password": password} if colon else {"token": user}


def _credentials_file(text: str, url: str) -> dict[str, Any]:
    """The options for a .creds file: its token, and its seed to sign the server's challenge with.

    nats-py would take the file by the package nkeys, which has no wheel, so that images could not install it.
    """
    # libsodium, which other logins do not need.
    from nacl.signing import SigningKey

    token = re.search(r"BEGIN NATS USER JWT-*\s+(\S+)", text)
    seed = re.search(r"BEGIN USER NKEY SEED-*\s+(\S+)", text)
    try:
        if token is None or seed is None:
            raise ValueError("without a token or a seed")
        # Two bytes say that a seed of a user follows, two more at the end are a checksum.
        decoded = base64.b32decode(seed[1] + "=" * (-len(seed[1]) % 8))
        if not seed[1].startswith("SU"):
            raise ValueError("the seed is not a user's")
        key = SigningKey(decoded[2:-2])
    except ValueError as e:
        raise BrokerRefused(f"the credentials for {url} hold no user's seed", broker=url) from e
    return {
        "user_jwt_cb": token[1].encode,
        "signature_cb": lambda nonce: base64.b64encode(key.sign(nonce.encode()).signature),
    }
