"""Pass a request on to a replica and its answer back, as OpenFaaS's gateway does."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from isthmus.local.door import Caller
from isthmus.local.exchange import End, Exchange
from isthmus.local.fleet import NAMESPACE
from isthmus.local.flow import READ_BYTES
from isthmus.local.heads import Header, RequestHead
from isthmus.local.metrics import Metrics
from isthmus.local.pipes import Pipes
from isthmus.local.replica import Replica
from isthmus.local.supervisor import Supervisor
from isthmus.local.watchdog import INTERNAL, REFUSED, TIMED_OUT
from isthmus.local.wire import Address, Pool, Wire, nothing

MAX_BODY_BYTES = 512 << 20
UPSTREAM_TIMEOUT_S = 60.0

_PROXY = (INTERNAL, b"proxy")


class Proxy:
    """Any method on /function/NAME[.NAMESPACE][/path]; `find` knows the functions by NAME[.NAMESPACE].

    Units: max_body_bytes bounds a request's body, timeout_s a call.
    """

    def __init__(
        self,
        find: Callable[[str], Supervisor | None],
        metrics: Metrics,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        timeout_s: float = UPSTREAM_TIMEOUT_S,
    ) -> None:
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes
        self.timeout_s = timeout_s
        self.pool = Pool(asyncio.get_running_loop())
        self.scratch = memoryview(bytearray(READ_BYTES))
        self.pipes = Pipes()
        self._find = find

    def handle(self, caller: Caller, request: RequestHead, first: memoryview) -> None:
        """Answer one request, of whose body `first` is here, with what a replica of the function answers."""
        name, rest = split(request.target.decode("latin-1"))
        supervisor = self._find(name)
        if supervisor is None:
            caller.answer(404, f"error finding function {name}: it is not deployed here")
        else:
            _Call(self, caller, request, supervisor).begin(rest, first)

    def close(self) -> None:
        """Close the connections that wait for a request, and the pipes that wait for a body."""
        self.pool.close()
        self.pipes.close()


class _Call:
    """One call of a function, from its head to its place in the metrics."""

    def __init__(self, proxy: Proxy, caller: Caller, request: RequestHead, supervisor: Supervisor) -> None:
        self._proxy = proxy
        self._caller = caller
        self._request = request
        self._supervisor = supervisor
        self._started = time.perf_counter()
        self._timed_out: tuple[int, Sequence[Header]] = (502, ())  # the gateway's own, upstream_timeout
        call_id = request.find(b"x-call-id") or str(uuid.uuid4()).encode()
        self._ours = [(b"X-Call-Id", call_id), (b"X-Start-Time", b"%d" % time.time_ns())]

    def begin(self, rest: str, first: memoryview) -> None:
        """Find a replica for it, or say why there is none."""
        length = self._request.length or 0
        if length > self._proxy.max_body_bytes:
            self._answer(413, f"the body has {length} bytes; the gateway takes {self._proxy.max_body_bytes}")
        elif rest == "/_/health" and self._supervisor.replicas:  # the watchdog's own; local processes run without one
            self._answer(200, "OK")
        elif (replica := self._supervisor.pick()) is None:
            text = f"No endpoints available for: {self._supervisor.name}."
            if self._supervisor.exposes_details:
                text += f" {self._supervisor.reason}"
            self._answer(503, text, (b"Retry-After", b"1"), _PROXY)
        else:
            self._pass_on(replica, replica.deployment.ready_path if rest == "/_/ready" else rest, first)

    def _pass_on(self, replica: Replica, target: str, first: memoryview) -> None:
        watchdog = replica.deployment.watchdog
        if watchdog.refuses(replica.in_flight):
            self._answer(429, watchdog.refusal, REFUSED)
            return
        timeout_s = self._proxy.timeout_s
        if 0 < (limit_s := watchdog.timeout_s(self._request.find(b"x-timeout").decode("latin-1"))) < timeout_s:
            timeout_s, self._timed_out = limit_s, (504, (TIMED_OUT,))
        host, address = _address(replica.url)
        try:
            upstream = self._proxy.pool.take(address)
        except OSError:
            self._failed(End.UNREACHABLE)
            return
        replica.in_flight += 1

        def done(how: End) -> None:
            replica.in_flight -= 1
            self._done(how, exchange, upstream, address)

        exchange = Exchange(
            self._caller.wire,
            upstream,
            self._request,
            ours=self._ours,
            scratch=self._proxy.scratch,
            pipes=self._proxy.pipes,
            most=self._proxy.max_body_bytes,
            timeout_s=timeout_s,
            done=done,
        )
        self._caller.stop = exchange.stop
        head = self._request.forwarded(target.encode("latin-1"), host, self._caller.peer, self._ours)
        exchange.begin(head, first)

    def _done(self, how: End, exchange: Exchange, upstream: Wire, address: Address) -> None:
        if exchange.keeps_upstream:
            self._proxy.pool.put(address, upstream)
        else:
            upstream.close()
        self._caller.stop = nothing
        if how is End.ANSWERED:
            self._caller.answered(exchange.keeps_caller, exchange.ahead)
        elif how is End.GONE:
            self._caller.close()
            return
        elif exchange.status:
            self._caller.abort()
        else:
            self._failed(how)
            return
        self._count(exchange.status)

    def _failed(self, how: End) -> None:
        """Answer for a function that did not."""
        if how is End.TIMED_OUT:
            status, headers = self._timed_out
            took = b"%.6f" % (time.perf_counter() - self._started)
            self._answer(status, "", *headers, (b"X-Duration-Seconds", took))
        elif how is End.TOO_LONG:
            self._answer(413, f"the body has more than the {self._proxy.max_body_bytes} bytes that the gateway takes")
        else:
            self._answer(500, f"Can't reach service for: {self._supervisor.name}.", _PROXY)

    def _answer(self, status: int, text: str, *more: Header) -> None:
        self._caller.answer(status, text, [*self._ours, *more])
        self._count(status)

    def _count(self, status: int) -> None:
        self._supervisor.invocations += 1
        name = f"{self._supervisor.name}.{NAMESPACE}"
        self._proxy.metrics.count(name, status, time.perf_counter() - self._started)


@lru_cache(256)
def _address(url: str) -> tuple[bytes, Address]:
    """What Host says of a replica, and where it listens."""
    parts = urlsplit(url)
    return parts.netloc.encode(), (parts.hostname or "", parts.port or 80)


def split(raw_path: str) -> tuple[str, str]:
    """A function's name and the rest of a path /function/NAME/rest?query, still quoted.

    The watchdog's /_/ready is the function's own.
    """
    _, _, after = raw_path[1:].partition("/")
    for end, character in enumerate(after):
        if character in "/?":
            return after[:end], after[end:] if character == "/" else "/" + after[end:]
    return after, "/"
