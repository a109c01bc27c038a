"""One request to a function: what it brings, what it is answered with, and where its time goes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from isthmus.context import Context
from isthmus.serving.memory import Reservation

_NOT_IN_A_TIMING = re.compile(r"[^\w.-]", re.ASCII)


@dataclass
class Timings:
    """The stages of one request, in order, for Server-Timing and the histogram."""

    began: float = field(default_factory=time.perf_counter)
    stages: list[tuple[str, float, str]] = field(default_factory=list)

    def add(self, stage: str, seconds: float, description: str = "") -> None:
        """Note that `stage` took that long."""
        self.stages.append((stage, seconds, description))

    def since(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.began

    def header(self) -> str:
        """Source: W3C Server Timing; durations in milliseconds."""
        stages = [*self.stages, ("total", self.since(), "")]
        return ", ".join([f"{name}{_described(desc)};dur={seconds * 1000:.3f}" for name, seconds, desc in stages])


class RequestHeaders:
    """A WSGI request's headers, looked up in any case; werkzeug's take four times as long."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._environ = environ

    def __contains__(self, name: str) -> bool:
        return _key(name) in self._environ

    def get(self, name: str, default: Any = None, /) -> Any:
        """The header's value, or the default."""
        return self._environ.get(_key(name), default)


@lru_cache(64)
def _key(name: str) -> str:
    """WSGI's key of a header that a function asks for by name."""
    return f"HTTP_{name.upper().replace('-', '_')}"


class Work(NamedTuple):
    """One admitted request: its body, headers and query, its context, and where it notes its timings."""

    body: bytes | memoryview
    headers: RequestHeaders
    query: Mapping[str, str]
    context: Context
    timings: Timings
    later: list[Callable[[], None]]
    """What is called once the answer has been sent."""
    memory: Reservation
    """This request's share of what all requests may take in memory."""


class Reply(NamedTuple):
    """What a request is answered with, in parts that follow each other; Content-Type is among the headers."""

    body: bytes | Sequence[bytes | memoryview]
    headers: Mapping[str, str]
    status: int = 200

    @property
    def parts(self) -> Sequence[bytes | memoryview]:
        """The body's parts."""
        return [self.body] if isinstance(self.body, bytes) else self.body


@lru_cache(256)
def _described(text: str) -> str:
    """A timing's description; a segment's id comes from a manifest, and must not end the header's value or line."""
    return f';desc="{_NOT_IN_A_TIMING.sub("_", text)}"' if text else ""
