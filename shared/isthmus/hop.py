"""One call to the next segment, in this process or over HTTP; the only place that retries.

Segments are pure functions of their frame, so a call that got no answer may be made again. What a failure means is read
from its status, body and X-OpenFaaS-Internal as docs/hops.md lists them.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Protocol

import stamina

from isthmus import frame as frames
from isthmus.answers import Answer, AnswerTooLong, BrokenOff
from isthmus.connections import Connections, Unreachable
from isthmus.context import Context
from isthmus.errors import HopBusy, HopRejected, HopTimeout, HopUnavailable, IsthmusError, ShapeMismatch
from isthmus.frame import Frame

if TYPE_CHECKING:  # a router whose hops are all remote never loads onnxruntime
    from isthmus.runners.store import SegmentStore

MAX_ERROR_BYTES = 2**16
"""What is read of an answer other than 200; a hop's own errors are far shorter."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_RUN_MS = re.compile(r"(?:^|,)\s*run;[^,]*\bdur=([0-9.]+)")


class Reply(NamedTuple):
    """A hop's answer.

    Units: `run_s` is the time that the segment itself took, in seconds; sent and received are bytes on the wire, 0 in
    this process.
    """

    frame: Frame
    run_s: float
    sent: int = 0
    received: int = 0


class Hop(Protocol):
    """Where a segment runs."""

    @property
    def packs(self) -> bool:
        """Whether tensors become bytes on the way, so that packing them makes sense."""
        ...

    @property
    def name(self) -> str:
        """What errors and timings call it."""
        ...

    whole_until: float
    """Until when, by `time.monotonic`, no refinement is sent: it had forgotten what it was to keep."""

    def call(self, frame: Frame, context: Context) -> Reply:
        """Run the segment that `frame` names on its tensors, within the context's deadline.

        Raises:
            HopTimeout: the deadline passed.
            HopUnavailable, HopBusy: not reached, or at its limit, until attempts were spent.
            HopRejected: the hop understood and refused. An error of the caller's making keeps its own class and facts
                in `facts["error"]`.
        """
        ...


class LocalHop:
    """A segment in this process: nothing is packed, sent or copied."""

    name = "local"
    packs = False
    whole_until = math.inf

    def __init__(self, store: SegmentStore) -> None:
        self._store = store

    def call(self, frame: Frame, context: Context) -> Reply:
        """See `Hop.call`; the segment's own errors pass as they are."""
        ran = self._store.run(frame.bundle, frame.segment, frame.tensors, context.deadline)
        return Reply(Frame(ran.outputs, frame.bundle, frame.segment, frame.request), ran.run_s)


class HttpHop:
    """A segment behind a URL: an OpenFaaS function, through a gateway or directly."""

    packs = True

    def __init__(self, url: str, *, attempts: int, connect_timeout_s: float, max_reply_bytes: int) -> None:
        self.name = url
        self.whole_until = 0.0
        self._connections = Connections(url, connect_timeout_s=connect_timeout_s)
        self._attempts = max(1, attempts)
        self._max_reply_bytes = max_reply_bytes

    def call(self, frame: Frame, context: Context) -> Reply:
        """See `Hop.call`."""
        body = frames.encode_parts(frame)
        try:
            return self._once(body, context)
        except (HopUnavailable, HopBusy) as e:
            return self._again(e, body, context)

    def _again(self, error: HopUnavailable | HopBusy, body: Sequence[bytes | memoryview], context: Context) -> Reply:
        """The tries after the first one, which failed with `error`; most calls never come here."""
        pauses = _pauses()
        first: Exception | None = error
        for attempt in stamina.retry_context(
            on=lambda e: _worth_another(e, context, pauses), attempts=self._attempts, timeout=None
        ):
            with attempt:
                if first is not None:
                    failed, first = first, None
                    raise failed
                return self._once(body, context)
        raise AssertionError("unreachable: the last attempt raises")

    def close(self) -> None:
        """Close the connections that wait for the next call."""
        self._connections.close()

    def _once(self, body: Sequence[bytes | memoryview], context: Context) -> Reply:
        if context.deadline.remaining() <= 0:
            raise HopTimeout(f"the deadline passed before {self.name} could be called", hop=self.name)
        try:
            answer = self._connections.post(
                body,
                {"Content-Type": frames.CONTENT_TYPE, **context.to_headers()},
                context.deadline,
                most=self._max_reply_bytes,
                most_of_an_error=MAX_ERROR_BYTES,
            )
        except Unreachable as e:
            raise HopUnavailable(f"{self.name} cannot be reached: {e}", hop=self.name) from e
        except AnswerTooLong as e:
            raise HopRejected(
                f"{self.name} answered with more than {self._max_reply_bytes} bytes", hop=self.name, status=200
            ) from e
        except TimeoutError as e:
            raise HopTimeout(f"{self.name} did not answer within the deadline", hop=self.name) from e
        except BrokenOff as e:
            raise HopUnavailable(f"{self.name} broke off: {e}", hop=self.name) from e
        if answer.status != 200:
            self._refuse(answer)
        run = _RUN_MS.search(answer.headers.get("server-timing", ""))
        try:
            reply = frames.decode(answer.body, max_bytes=self._max_reply_bytes)
        except IsthmusError as e:
            raise HopRejected(
                f"{self.name} answered with something that is no frame: {e}", hop=self.name, status=200
            ) from e
        return Reply(reply, float(run[1]) / 1000 if run else 0.0, sum(map(len, body)), len(answer.body))

    def _refuse(self, answer: Answer) -> NoReturn:
        """Raise what a status other than 200 means. Source: docs/hops.md, from OpenFaaS's sources."""
        status, internal = answer.status, answer.headers.get("x-openfaas-internal", "")
        error = _error_document(answer.body)
        said = str(error.get("error") or answer.body[:200].decode("utf-8", "replace")).strip()[:1000] or "no body"
        facts: dict[str, Any] = {"hop": self.name, "status": status, "error": error}
        after = _seconds(answer.headers.get("retry-after", ""))
        message = f"{self.name} answered {status}: {said}"
        if status == 429:
            raise HopBusy(message, retry_after_s=after, **facts)
        if status == 504:
            raise HopTimeout(message, **facts)
        if status in (502, 503) or (status == 500 and (internal or not error)):
            # 500 with X-OpenFaaS-Internal is the proxy or the watchdog: nothing listened, or it died on the way.
            raise HopUnavailable(message, retry_after_s=after, **facts)
        if error.get("type") == ShapeMismatch.__name__:
            # Only running the graph shows that free dimensions do not go together: the caller's fault, not the hop's.
            raise ShapeMismatch(said, **facts)
        raise HopRejected(message, **facts)


def hops_to(
    urls: tuple[str, ...],
    store: SegmentStore | None,
    *,
    attempts: int,
    connect_timeout_s: float,
    max_reply_bytes: int,
) -> tuple[Hop, ...]:
    """A hop for each of the setting's entries: `local`, which needs a store, or a URL."""
    made: list[Hop] = []
    for url in urls:
        if url == "local" and store is not None:
            made.append(LocalHop(store))
        else:
            made.append(
                HttpHop(url, attempts=attempts, connect_timeout_s=connect_timeout_s, max_reply_bytes=max_reply_bytes)
            )
    return tuple(made)


def _worth_another(error: Exception, context: Context, pauses: Iterator[float]) -> float | Literal[False]:
    """The seconds to wait before another try; False where none is worth it."""
    if not isinstance(error, HopUnavailable | HopBusy):
        return False
    pause = float(error.facts.get("retry_after_s") or next(pauses))
    # A wait that outlasts the deadline only delays the error.
    return pause if pause < context.deadline.remaining() else False


def _pauses() -> Iterator[float]:
    """Doubling, and never the same for two routers."""
    pause = _FIRST_PAUSE_S
    while True:
        yield pause + random.uniform(0, _FIRST_PAUSE_S)  # noqa: S311
        pause = min(_LONGEST_PAUSE_S, pause * 2)


def _error_document(data: bytes | bytearray) -> dict[str, Any]:
    try:
        doc = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return doc if isinstance(doc, dict) and "error" in doc else {}


def _seconds(text: str) -> float | None:
    return float(text) if text.isdigit() and len(text) < 6 else None
