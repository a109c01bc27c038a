"""A request to a function: its body, headers, deadline, share of memory, and stage timings."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from io import BytesIO
from typing import Any, NamedTuple

from werkzeug.datastructures import Headers
from werkzeug.sansio.utils import get_content_length

from isthmus.admission import Reservation
from isthmus.context import Context
from isthmus.errors import RequestMalformed, RequestTooLarge

# Characters that would end a quoted description, or the header itself.
_NOT_IN_A_TIMING = re.compile(r"[^\w.-]", re.ASCII)


@dataclass
class Timings:
    """Stages of a request, in order, for Server-Timing and the histogram. Units: seconds."""

    began: float = field(default_factory=time.perf_counter)
    cpu_began: float = field(default_factory=time.thread_time)
    stages: list[tuple[str, float, str]] = field(default_factory=list)

    def add(self, stage: str, seconds: float, description: str = "") -> None:
        """Record the duration of `stage`."""
        self.stages.append((stage, seconds, description))

    def merge(self, parts: Sequence[Timings]) -> None:
        """Record for each stage of `parts` the sum of its durations."""
        sums: dict[str, tuple[float, str]] = {}
        for stage, seconds, description in (each for part in parts for each in part.stages):
            sums[stage] = (sums.get(stage, (0.0, ""))[0] + seconds, description)
        for stage, (seconds, description) in sums.items():
            self.add(stage, seconds, description)

    def elapsed(self) -> float:
        """Seconds since the request began."""
        return time.perf_counter() - self.began

    def header(self) -> str:
        """Source: W3C Server Timing; durations in milliseconds."""
        stages = [*self.stages, ("total", self.elapsed(), "")]
        return ", ".join([f"{name}{_described(desc)};dur={seconds * 1000:.3f}" for name, seconds, desc in stages])


class FunctionRequest(NamedTuple):
    """An admitted POST; `memory` is this request's share of the memory of all requests.

    The response gets `reply_headers`; the request's log line and span get `facts`.
    """

    body: bytes | memoryview
    headers: Headers
    query: Mapping[str, str]
    context: Context
    timings: Timings
    memory: Reservation
    reply_headers: dict[str, str]
    facts: dict[str, str]

    @property
    def caller(self) -> str:
        """The name of the authenticated caller; empty where the function is open."""
        return self.context.caller


def read_body(environ: Mapping[str, Any], limit: int) -> bytes | memoryview:
    """The request body from a WSGI environment, without a copy where the server's buffer is a BytesIO.

    Raises:
        RequestTooLarge: more than `limit` bytes.
        RequestMalformed: fewer bytes than Content-Length states.
    """
    length = get_content_length(environ.get("CONTENT_LENGTH"), environ.get("HTTP_TRANSFER_ENCODING"))
    if length is not None and length > limit:
        raise RequestTooLarge(f"the body has {length} bytes; at most {limit} are taken", limit=limit)
    if length is None and not environ.get("wsgi.input_terminated"):
        length = 0  # neither a length nor chunks: such a request has no body, and reading would block
    stream = environ["wsgi.input"]
    # Servers buffer the whole body; werkzeug's own stream would read in small pieces, and `read` makes a copy.
    whole = isinstance(stream, BytesIO) and stream.tell() == 0
    body: bytes = stream.getvalue() if whole else stream.read(limit + 1 if length is None else length)
    if length is not None and len(body) != length:
        raise RequestMalformed(f"the body has {len(body)} of {length} bytes")
    if len(body) > limit:
        raise RequestTooLarge(f"the body has more than {limit} bytes", limit=limit)
    return body


def caller_of(headers: Headers, header: str, user: Callable[[], str] = str) -> str | None:
    """A name of the caller for the queue, from the header of the setting caller_header; None without that setting.

    A digest: the header may be a secret, or long. Requests without the header are of the `user` that their bodies name,
    the others of one caller.
    """
    if not header:
        return None
    # A prefix, so that no body passes for a header.
    name = headers.get(header, "") or f"user {user()}"
    return blake2b(name.encode("utf-8", "replace"), digest_size=8).hexdigest()


@lru_cache(256)
def _described(text: str) -> str:
    # A segment's id comes from a manifest, and must not end the header's value or line.
    return f';desc="{_NOT_IN_A_TIMING.sub("_", text)}"' if text else ""
