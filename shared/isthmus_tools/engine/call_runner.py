"""An asynchronous call: the function, then the callback with its response."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import aiohttp
import msgspec
from msgspec import Struct
from multidict import CIMultiDict
from yarl import URL

from isthmus.events.message import Message
from isthmus.events.places.signing import sign, signing_keys
from isthmus_tools.engine.callbacks import CallbackPolicy, PermittedResolver
from isthmus_tools.engine.credentials import SecretFolder
from isthmus_tools.engine.fleet import Fleet
from isthmus_tools.engine.posting import HttpResponse, PostPolicy, post
from isthmus_tools.engine.proxy import HOP_BY_HOP, end_to_end

WORKERS = 4
CALL_TIMEOUT_S = 60.0
CALLBACK_TIMEOUT_S = 15.0
"""A callback that times out is not retried: few workers serve all calls."""
_CALLBACK_PAUSE_S = 0.5  # with back-off 7.5 s in all: a receiver restarts in that time
_MAX_START_S = 60.0  # a call waits for its function, still loading a model after the engine's start
_POLL_S = 0.1
NOT_IN_CALLBACKS = HOP_BY_HOP | {"host", "expect", "content-length"}
_CALL_HEADER = "x-isthmus-call"


def callback_keys(secrets: SecretFolder, name: str) -> tuple[bytes, ...]:
    """The keys that sign callbacks, of the secret `name`; none for an empty name.

    Raises:
        Missing: no such secret.
        SettingsError: the secret cannot sign.
    """
    return signing_keys(secrets.read(name), name) if name else ()


class QueuedCall(Struct, frozen=True, forbid_unknown_fields=True):
    """A call in the queue; its body is the message's."""

    id: str
    function: str
    path: str
    headers: tuple[tuple[str, str], ...]
    callback: str = ""

    def to_message(self, body: bytes, key: str) -> Message:
        """The call as a message; `key` is for the broker's deduplication."""
        return Message(body, key, headers={_CALL_HEADER: msgspec.json.encode(self).decode()})

    @classmethod
    def of_message(cls, message: Message) -> Self:
        """The call in a message.

        Raises:
            msgspec.DecodeError: the message is another program's.
        """
        return msgspec.json.decode(message.headers.get(_CALL_HEADER, ""), type=cls)


@dataclass(frozen=True)
class CallOutcome:
    """The function's status and content type, and the reason of a failure, of the call or its callback."""

    status: int
    content_type: str = ""
    failure: str = ""
    called_back: bool = False


class CallRunner:
    """Runs calls through the gateway at `url`; callbacks are signed with `signing_keys` where there are any."""

    def __init__(
        self,
        fleet: Fleet,
        url: str,
        session: aiohttp.ClientSession,
        policy: CallbackPolicy,
        signing_keys: Sequence[bytes] = (),
    ) -> None:
        self._fleet, self._url, self._session = fleet, url, session
        self._signing_keys = tuple(signing_keys)
        self._callbacks = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=WORKERS, resolver=PermittedResolver(policy), use_dns_cache=False),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        )

    async def close(self) -> None:
        """Close the connections to callbacks."""
        await self._callbacks.close()

    async def run(self, call: QueuedCall, body: bytes) -> CallOutcome:
        """Call the function, then send its response to the callback."""
        await self._wait_for_function(call.function)
        started = time.perf_counter()
        # Through the gateway's own listener, so that the call is proxied and counted as every call.
        target = URL(f"{self._url}/function/{call.function}{call.path}", encoded=True)
        policy = PostPolicy(timeout_s=CALL_TIMEOUT_S)
        response = await post(self._session, target, CIMultiDict(call.headers), body, policy)
        content_type = response.headers.get("Content-Type", "")
        if not call.callback:
            failure = f"the function answered {response.status}" if response.status >= 400 else ""
            return CallOutcome(response.status, content_type, failure)
        status = await self._call_back(call, response, time.perf_counter() - started)
        failure = f"its callback answered {status}" if status >= 400 else ""
        return CallOutcome(response.status, content_type, failure, called_back=status < 400)

    async def _call_back(self, call: QueuedCall, response: HttpResponse, seconds: float) -> int:
        headers = end_to_end(response.headers, NOT_IN_CALLBACKS)
        headers.setdefault("Content-Type", "application/octet-stream")
        headers.setdefault("X-Duration-Seconds", f"{seconds:.6f}")
        headers["X-Call-Id"] = call.id
        headers["X-Function-Name"] = call.function
        headers["X-Function-Status"] = str(response.status)

        def signature(body: bytes) -> Mapping[str, str]:
            return sign(self._signing_keys, call.id, body, time.time()) if self._signing_keys else {}

        policy = PostPolicy(
            timeout_s=CALLBACK_TIMEOUT_S,
            first_pause_s=_CALLBACK_PAUSE_S,
            is_transient=lambda status: status in (408, 425, 429) or status >= 500,
            added_headers=signature,
        )
        url = URL(call.callback, encoded=True)
        return (await post(self._callbacks, url, headers, response.body, policy)).status

    async def _wait_for_function(self, name: str) -> None:
        """Return once the function is ready, or will not be soon: calls of an earlier engine come before that."""
        until = time.monotonic() + _MAX_START_S
        while time.monotonic() < until:
            supervisor = self._fleet.get(name)
            if supervisor is None or supervisor.given_up or supervisor.settled:
                return
            await asyncio.sleep(_POLL_S)
