"""Request context passed from hop to hop: deadline, call id and trace."""

from __future__ import annotations

import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

from isthmus import units
from isthmus.errors import DeadlineExceeded, RequestMalformed

ROUTE_HEADER = "Isthmus-Route"
"""The header of a request that names the only route that it may take."""
EXIT_HEADER = "Isthmus-Exit"
"""The header of a request that asks for the full model: `off`. The default is `on`."""
# W3C Trace Context forbids version ff and all-zero ids.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-((?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(-[!-~]{0,200})?"
)
# Sampled, and random trace id (Level 2); all other flags are undefined, and set to zero.
_KNOWN_FLAGS = 0x03
_TRACESTATE_MEMBER = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~]")
# W3C Trace Context, "Limits": propagate at least 512 characters, and at most 32 members.
_TRACESTATE_LENGTH, _TRACESTATE_MEMBERS = 512, 32
# A share of the limit, bounded by the time that any response needs.
_MARGIN, _MIN_MARGIN_S, _MAX_MARGIN_S = 0.1, 0.05, 1.0
# Call ids go to logs and headers: printable, without spaces, bounded.
_CALL_ID = re.compile(r"[\x21-\x7e]{1,128}")


def parse_duration(text: str) -> float:
    """Seconds of a duration in Go's syntax: `1500ms`, `1m30s`.

    Raises:
        RequestMalformed: not a duration.
    """
    try:
        return units.parse_duration(text)
    except ValueError as e:
        raise RequestMalformed(
            f"X-Timeout is {text[:40]!r}; it is a duration such as 1500ms or 2s", header="X-Timeout"
        ) from e


def parse_timeout(text: str) -> float:
    """Seconds of the header X-Timeout.

    Raises:
        RequestMalformed: not a duration, or none at all: a caller that waits no time is a defect of the caller.
    """
    if (seconds := parse_duration(text)) <= 0:
        raise RequestMalformed(f"X-Timeout is {text[:40]!r}; it is a positive duration", header="X-Timeout")
    return seconds


def working_time(limit_s: float) -> float:
    """Seconds of work under a limit enforced elsewhere: `limit_s` less a margin for the response.

    The watchdog holds the same limit, starts earlier, and answers an empty 504 at its end. The margin is a tenth of the
    limit, between 50 ms and 1 s, and at most half of the limit.
    """
    margin_s = min(max(_MARGIN * limit_s, _MIN_MARGIN_S), _MAX_MARGIN_S, limit_s / 2)
    return limit_s - margin_s


@dataclass(frozen=True)
class Deadline:
    """The moment, on this process's monotonic clock, at which the caller stops waiting."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        """A deadline `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left; 0.0 after the deadline."""
        return max(0.0, self.at - time.monotonic())

    def check(self, doing: str) -> None:
        """Continue only before the deadline.

        Raises:
            DeadlineExceeded: the deadline has passed; the message names the step `doing`.
        """
        if time.monotonic() >= self.at:
            raise DeadlineExceeded(f"the deadline passed before {doing}")


class Abandonment:
    """Ends a call from another thread: closes what the call waits for; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: Callable[[], None] | None = None
        self.is_abandoned = False

    def abandon(self) -> None:
        """End the call; a later one ends as it begins."""
        with self._lock:
            self.is_abandoned = True
            if self._end is not None:
                self._end()

    @contextmanager
    def ended_by(self, end: Callable[[], None]) -> Iterator[None]:
        """During the block `end`, which must not raise, ends what the call waits for."""
        with self._lock:
            self._end = end
            if self.is_abandoned:
                end()
        try:
            yield
        finally:
            with self._lock:
                self._end = None


class Headers(Protocol):
    """Case-insensitive request headers."""

    def get(self, key: str, default: str, /) -> str:
        """The value of a header, or the default."""
        ...


@dataclass(frozen=True)
class Context:
    """The identity and deadline of a request: OpenFaaS's X-Call-Id, W3C's traceparent and tracestate.

    `limits` are the moments at which hops are given up, by name: of hops that another route does without. `waits` is
    whether a call waits for a function that is away. `caller` is the name of an authenticated caller, else empty.
    These, and `abandonment`, stay in this process.
    """

    deadline: Deadline
    call_id: str
    traceparent: str
    tracestate: str = ""
    limits: Mapping[str, Deadline] = field(default_factory=dict)
    waits: bool = True
    abandonment: Abandonment | None = None
    caller: str = ""

    @property
    def trace_id(self) -> str:
        """The 32 digits after the version. Source: W3C Trace Context."""
        return self.traceparent[3:35]

    @classmethod
    def from_headers(cls, headers: Headers, *, longest_s: float) -> Self:
        """Read the caller's headers; absent or malformed ids are generated, as W3C Trace Context requires.

        Units: longest_s is this function's limit in seconds, from now on; X-Timeout less a margin shortens the limit,
        and never lengthens it.

        Raises:
            RequestMalformed: X-Timeout is not a positive duration.
        """
        timeout = headers.get("X-Timeout", "")
        seconds = min(longest_s, working_time(parse_timeout(timeout))) if timeout else longest_s
        call_id, trace = headers.get("X-Call-Id", ""), headers.get("traceparent", "")
        parent = _traceparent(trace)
        return cls(
            Deadline.after(seconds),
            call_id if _CALL_ID.fullmatch(call_id) else str(uuid.uuid4()),
            parent or f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
            _tracestate(headers.get("tracestate", "")) if parent else "",
        )

    def at_hop(self, name: str) -> Context:
        """The context of a call to that hop: with a limit, the hop has until then, and is not waited for."""
        if (limit := self.limits.get(name)) is None:
            return self
        return replace(self, deadline=min(limit, self.deadline, key=lambda d: d.at), waits=False, limits={})

    def to_headers(self) -> dict[str, str]:
        """The headers for the next hop; X-Timeout is the remaining time, at least a millisecond."""
        headers = {
            "X-Call-Id": self.call_id,
            # 0ms would read as no limit or as malformed.
            "X-Timeout": f"{max(1, int(self.deadline.remaining() * 1000))}ms",
            "traceparent": self.traceparent,
        }
        if self.tracestate:
            headers["tracestate"] = self.tracestate
        return headers


CURRENT: ContextVar[Context | None] = ContextVar("context", default=None)
"""The context of the request or message that this thread works on, for its log lines; None outside of both."""


@contextmanager
def working_on(context: Context | None) -> Iterator[None]:
    """Log lines of this thread belong to `context` within the block."""
    token = CURRENT.set(context)
    try:
        yield
    finally:
        CURRENT.reset(token)


def _traceparent(text: str) -> str:
    """The caller's traceparent as one of version 00, with the flags of that version; empty where malformed.

    Source: W3C Trace Context, "Versioning of traceparent": fields of later versions are not forwarded.
    """
    # Version 00 ends with the flags; later versions may append fields.
    if (match := _TRACEPARENT.fullmatch(text)) is None or (match[1] == "00" and match[4]):
        return ""
    return f"00-{match[2]}-{int(match[3], 16) & _KNOWN_FLAGS:02x}"


def _tracestate(text: str) -> str:
    """The first whole members within the limits; empty where any member is malformed.

    The text becomes a header again: control characters would split the header.
    """
    members = [member.strip(" \t") for member in text[: 8 * _TRACESTATE_LENGTH].split(",")]
    if len(text) > 8 * _TRACESTATE_LENGTH:
        members.pop()  # of which the end is missing
    members = [member for member in members if member]
    if not all(map(_TRACESTATE_MEMBER.fullmatch, members)):
        return ""
    result = ",".join(members[:_TRACESTATE_MEMBERS])
    return result if len(result) <= _TRACESTATE_LENGTH else result[: _TRACESTATE_LENGTH + 1].rpartition(",")[0]
