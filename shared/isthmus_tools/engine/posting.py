"""POST with retries, of calls to functions and of callbacks."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from isthmus.http.pool import retry_after_seconds

ATTEMPTS = 5
_MAX_RESPONSE_BYTES = 64 << 20  # a response is in memory until its callback has been sent
# aiohttp sends bytes in one piece, and warns from this size on that other requests wait meanwhile.
_STREAMED_BYTES = 1 << 20
_MAX_WAIT_S = 10.0  # a Retry-After of hours would block a worker


class HttpResponse(NamedTuple):
    """Response to a POST; without a response, 502 without headers."""

    status: int = 502
    headers: CIMultiDict[str] = CIMultiDict()
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class PostPolicy:
    """Bounds of a POST: seconds of an attempt, the first pause, and the statuses that are tried again.

    `added_headers` are made for each attempt: a signature has the time of its attempt.
    """

    timeout_s: float
    first_pause_s: float = 0.2
    is_transient: Callable[[int], bool] = field(default=lambda status: status in (429, 503))
    added_headers: Callable[[bytes], Mapping[str, str]] = field(default=lambda body: {})


async def post(
    session: aiohttp.ClientSession, url: URL, headers: CIMultiDict[str], body: bytes, policy: PostPolicy
) -> HttpResponse:
    """POST, again after transient statuses and broken connections, at most ATTEMPTS times; never after a timeout.

    Redirects are not followed: a redirect could lead to an address that is not permitted.
    """
    response = HttpResponse()
    for attempt in range(ATTEMPTS):
        wait_s = min(_MAX_WAIT_S, policy.first_pause_s * 2**attempt)
        try:
            async with session.post(
                url,
                data=body if len(body) < _STREAMED_BYTES else io.BytesIO(body),
                headers=CIMultiDict([*headers.items(), *policy.added_headers(body).items()]),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=policy.timeout_s),
            ) as reply:
                response = HttpResponse(reply.status, CIMultiDict(reply.headers), await _bounded(reply))
        except TimeoutError:
            return response
        except _ResponseTooLong:
            return HttpResponse()
        except (aiohttp.ClientError, OSError):
            pass
        else:
            if not policy.is_transient(response.status):
                return response
            retry_after_s = retry_after_seconds(response.headers.get("Retry-After", ""))
            wait_s = wait_s if retry_after_s is None else min(_MAX_WAIT_S, retry_after_s)
        if attempt < ATTEMPTS - 1:
            await asyncio.sleep(wait_s)
    return response


class _ResponseTooLong(Exception):
    """A response above _MAX_RESPONSE_BYTES."""


async def _bounded(reply: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in reply.content.iter_any():
        size += len(piece)
        if size > _MAX_RESPONSE_BYTES:
            raise _ResponseTooLong
        pieces.append(piece)
    return b"".join(pieces)
