"""What a request carries from hop to hop: its deadline, its id and its trace."""

from __future__ import annotations

import re
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import Protocol, Self

from isthmus import units
from isthmus.errors import DeadlineExceeded, RequestMalformed

_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,200})?"
)
_TRACESTATE = re.compile(r"[\x20-\x7e]*")
_TRACESTATE_LENGTH = 512
_MARGIN, _MIN_MARGIN_S, _MAX_MARGIN_S = 0.1, 0.05, 1.0
_CALL_ID = re.compile(r"[\x21-\x7e]{1,128}")


def parse_duration(text: str) -> float:
    """Seconds of a duration as Go writes it: `1500ms`, `1m30s`.

    Raises:
        RequestMalformed: not such a duration.
    """
    try:
        return units.parse_duration(text)
    except ValueError as e:
        raise RequestMalformed(
            f"X-Timeout is {text[:40]!r}; it is a duration such as 1500ms or 2s", header="X-Timeout"
        ) from e


def working_time(limit_s: float) -> float:
    """Seconds to work in where someone else ends the call after `limit_s`: a margin is left for the response.

    The watchdog, whose timer holds the same value and began earlier, answers an empty 504 at its end. The margin is a
    tenth of the limit, between 50 ms and 1 s, and at most half of it.
    """
    margin_s = min(max(_MARGIN * limit_s, _MIN_MARGIN_S), _MAX_MARGIN_S, limit_s / 2)
    return limit_s - margin_s


@dataclass(frozen=True)
class Deadline:
    """The moment, on this process's monotonic clock, after which no one waits for the answer."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        """A deadline that many seconds from now."""
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left; 0.0 once it has passed."""
        return max(0.0, self.at - time.monotonic())

    def check(self, doing: str) -> None:
        """Go on only if time is left.

        Raises:
            DeadlineExceeded: it has passed; the message says what was about to be done.
        """
        if time.monotonic() >= self.at:
            raise DeadlineExceeded(f"the deadline passed before {doing}")


class Headers(Protocol):
    """A request's headers, looked up in any case."""

    def get(self, key: str, default: str, /) -> str:
        """The header's value, or the default."""
        ...


@dataclass(frozen=True)
class Context:
    """One request's identity: OpenFaaS's X-Call-Id, W3C's traceparent and tracestate, and the deadline."""

    deadline: Deadline
    call_id: str
    traceparent: str
    tracestate: str = ""

    @classmethod
    def from_headers(cls, headers: Headers, *, longest_s: float, began: float | None = None) -> Self:
        """Read the caller's headers; what is missing or malformed is made anew, as W3C Trace Context asks.

        Units: longest_s is the longest this function may take; X-Timeout, less a margin for the response, shortens it
        and never lengthens it. Both are counted from `began`, by default from now, on the clock of `time.monotonic`.

        Raises:
            RequestMalformed: X-Timeout is not a duration.
        """
        timeout = headers.get("X-Timeout", "")
        seconds = min(longest_s, working_time(parse_duration(timeout))) if timeout else longest_s
        call_id, trace = headers.get("X-Call-Id", ""), headers.get("traceparent", "")
        # Version 00 ends with its flags; a later one may append fields.
        known = (match := _TRACEPARENT.fullmatch(trace)) is not None and not (match[1] == "00" and match[2])
        return cls(
            Deadline((time.monotonic() if began is None else began) + seconds),
            call_id if _CALL_ID.fullmatch(call_id) else str(uuid.uuid4()),
            trace if known else f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
            _tracestate(headers.get("tracestate", "")) if known else "",
        )

    def to_headers(self) -> dict[str, str]:
        """The headers that the next hop gets; X-Timeout is what is left now, at least a millisecond."""
        headers = {
            "X-Call-Id": self.call_id,
            "X-Timeout": f"{max(1, int(self.deadline.remaining() * 1000))}ms",
            "traceparent": self.traceparent,
        }
        if self.tracestate:
            headers["tracestate"] = self.tracestate
        return headers


def _tracestate(text: str) -> str:
    """Its members as far as they fit, whole ones only; nothing of what is no header's text."""
    if not _TRACESTATE.fullmatch(text):
        return ""
    return text if len(text) <= _TRACESTATE_LENGTH else text[: _TRACESTATE_LENGTH + 1].rpartition(",")[0]
