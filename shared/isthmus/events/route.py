"""The router as the trigger calls it: a message as an HTTP request, and the meaning of each response."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from urllib.parse import quote

from isthmus.context import Context, Deadline
from isthmus.events.configuration import RouterTable
from isthmus.events.message import CONTINUATION, Message
from isthmus.http.pool import (
    BrokenOff,
    ConnectionPool,
    Response,
    ResponseTooLong,
    Unreachable,
    retry_after_seconds,
)
from isthmus.http.tls import TlsTrust

MAX_RESULT_BYTES = 256 * 2**20
"""A larger response is an error of the message: no place takes it."""
_MAX_ERROR_BYTES = 2**16
# A router that accepts no connection within seconds is away.
_CONNECT_TIMEOUT_S = 5.0
# The router responds at its own deadline; a second later none is to be expected.
_LATE_S = 1.0
# Headers of messages are foreign: printable, bounded, and of a known meaning to the router.
_FORWARDED = frozenset(
    ("content-type", "content-encoding", "accept", "inference-header-content-length", "traceparent", "tracestate")
)
_MAX_HEADER_CHARACTERS, _MAX_HEADERS = 4096, 64


class Outcome(Enum):
    """The meaning of a response for its message."""

    DONE = "done"
    REFUSED = "refused"
    """The message cannot be served in this form: final."""
    BUSY = "busy"
    """At the concurrency limit: says nothing of the message."""
    AWAY = "away"
    """Not reached or not ready: says nothing of the message."""
    FAILED = "failed"
    """An error with this message at work: an attempt."""
    DEFERRED = "deferred"
    """The head has run and the tail gave no response: `body` is the continuation."""
    UNCLEAR = "unclear"
    """No response in time, or none of the function's own: an attempt where other messages succeed meanwhile."""


@dataclass(frozen=True)
class RouterReply:
    """A response; `status` is 0 where there was none. `document` is the router's own error, if it was one."""

    outcome: Outcome
    status: int = 0
    content_type: str = ""
    body: bytes = b""
    reason: str = ""
    document: Mapping[str, Any] = field(default_factory=dict)
    retry_after_s: float | None = None


class RouterRoute:
    """Sends messages to the router of the configuration; any thread may call."""

    def __init__(self, table: RouterTable, trust: TlsTrust | None = None, key: str = "") -> None:
        self.url = table.url
        # After what callers sent: a message is not the router's own caller.
        self._key = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = float(table.timeout)
        self._query = f"model={quote(table.model, safe=':')}" if table.model else ""
        connect_s = min(_CONNECT_TIMEOUT_S, self._timeout_s)
        self._pool = ConnectionPool(table.url, connect_timeout_s=connect_s, trust=trust)

    def call(self, message: Message, wait_s: int | None = None) -> RouterReply:
        """POST the message, a continuation to /continue; every failure is a reply.

        With `wait_s` the reply may be a continuation: where the tail gives no response for so long.
        """
        deadline = Deadline.after(self._timeout_s + _LATE_S)
        try:
            response = self._pool.post(
                [message.body],
                {**self._headers(message), **_preference(message, wait_s)},
                deadline,
                max_bytes=MAX_RESULT_BYTES,
                max_error_bytes=_MAX_ERROR_BYTES if wait_s is None else MAX_RESULT_BYTES,
                path="/continue" if message.content_type == CONTINUATION else "",
                query=self._query,
            )
        except Unreachable as e:
            return RouterReply(Outcome.AWAY, reason=f"{self.url} cannot be reached: {e}")
        except TimeoutError:
            return RouterReply(Outcome.UNCLEAR, reason=f"{self.url} did not answer within {self._timeout_s:g} s")
        except BrokenOff as e:
            return RouterReply(Outcome.FAILED, reason=f"{self.url} broke off: {e}")
        except ResponseTooLong:
            reason = f"the result has more than {MAX_RESULT_BYTES} bytes"
            return RouterReply(Outcome.REFUSED, 413, reason=reason, document={"error": reason})
        return _reply(self.url, response)

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()

    def _headers(self, message: Message) -> dict[str, str]:
        context = Context.from_headers({"traceparent": "", **message.headers}, longest_s=self._timeout_s)
        own = {
            "X-Topic": message.source,
            "X-Connector": "isthmus",
            "X-Call-Id": message.id,
            "Idempotency-Key": message.id,
            "traceparent": context.traceparent,
            "X-Timeout": f"{max(1, int(self._timeout_s * 1000))}ms",
        }
        plain = {name: value for name, value in own.items() if _is_plain(value)}
        return {**dict(forwarded(message.headers)), **plain, **self._key}


def _preference(message: Message, wait_s: int | None) -> dict[str, str]:
    """Headers that ask for a continuation. Source: docs/reference/continuation.md."""
    if wait_s is None:
        return {}
    accept = message.headers.get("accept", "*/*")
    return {"accept": f"{accept if _is_plain(accept) else '*/*'}, {CONTINUATION}", "Prefer": f"wait={wait_s}"}


def forwarded(headers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The headers that mean something to the router, bounded; the trace is not among them."""
    known = [name for name in headers if name in _FORWARDED or name.startswith("ce-")]
    for name in known[:_MAX_HEADERS]:
        if name not in ("traceparent",) and _is_plain(name) and " " not in name and _is_plain(headers[name]):
            yield name, headers[name]


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and len(text) <= _MAX_HEADER_CHARACTERS


def _reply(url: str, response: Response) -> RouterReply:
    """The meaning of a response. Source: docs/reference/hops.md, "Failures", and docs/reference/trigger.md."""
    status, content_type = response.status, response.headers.get("content-type", "")
    if 200 <= status < 300:
        return RouterReply(Outcome.DONE, status, content_type, bytes(response.body))
    after_s = retry_after_seconds(response.headers.get("retry-after", ""))
    if status == 503 and content_type.partition(";")[0].strip().lower() == CONTINUATION:
        reason = f"{url} answered that the tail gives no response"
        return RouterReply(Outcome.DEFERRED, status, content_type, bytes(response.body), reason, retry_after_s=after_s)
    document = _error_document(response.body)
    text = str(document.get("error") or bytes(response.body[:200]).decode("utf-8", "replace")).strip() or "no body"
    text = text.encode(errors="replace").decode()  # JSON may hold halves of characters
    outcome = _outcome(status, document, response.headers.get("x-openfaas-internal", ""))
    return RouterReply(
        outcome,
        status,
        reason=f"{url} answered {status}: {text[:500]}",
        document=document or {"error": text},
        retry_after_s=after_s,
    )


def _outcome(status: int, document: Mapping[str, Any], internal: str) -> Outcome:
    if status == 429:
        return Outcome.BUSY
    if status == 503 or (status == 507 and document.get("type") == "SpoolFull"):
        return Outcome.AWAY
    if status in (408, 504):
        return Outcome.UNCLEAR
    if status >= 500:
        if document:
            return Outcome.FAILED
        # Of the gateway's proxy: nothing listened. Without its header: the function died, or is starting.
        return Outcome.AWAY if internal else Outcome.UNCLEAR
    # A redirect, or the gateway's own refusal: a function that is being replaced, or a wrong URL or key.
    if status in (401, 403, 404) and not document:
        return Outcome.AWAY
    return Outcome.REFUSED if status >= 400 else Outcome.AWAY


def _error_document(body: bytes | bytearray) -> Mapping[str, Any]:
    """The router's error as JSON; empty where the body is something else."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) and isinstance(document.get("error"), str) else {}
