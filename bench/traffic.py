"""Load for servers under test: open loop at a rate or closed loop with callers, from a process of its own.

An open loop holds its schedule however late responses are, and latency counts from the scheduled arrival, so that a
server that stalls cannot delay the requests that would show it (no coordinated omission). Times are of
`time.monotonic`, which all processes of a machine share: the moment of a fault compares with the times of requests.

    with Traffic() as traffic:
        outcome = traffic.run(OpenLoop(rate=20, seconds=10), [Query(url, photo)])
        print(outcome.within(0.25), outcome.quantile(0.95), outcome.routes)
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import aiohttp
import numpy as np

# A client gives up here, far beyond any deadline of a request.
GIVE_UP_S = 60.0
# The worker process starts, and connections open, before the first scheduled arrival.
_LEAD_S = 0.05


@dataclass(frozen=True)
class Query:
    """A request: POST of `body`. Deadline (X-Timeout), pin (Isthmus-Route) and caller go into `headers`."""

    url: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def with_headers(self, **headers: str) -> Query:
        """The same with further headers; `_` in a name stands for `-`."""
        return replace(self, headers={**self.headers, **{k.replace("_", "-"): v for k, v in headers.items()}})


@dataclass(frozen=True)
class OpenLoop:
    """Arrivals at `rate` a second for `seconds`: a Poisson process, or in steady steps.

    The process is that with exactly rate times seconds arrivals, so that two loads of a rate offer as much work.
    """

    rate: float
    seconds: float
    poisson: bool = True
    seed: int = 0

    def arrivals(self) -> Sequence[float]:
        """Seconds from the start to each arrival."""
        count = round(self.rate * self.seconds)
        if not self.poisson:
            return [n / self.rate for n in range(count)]
        # A Poisson process of a known count is so many uniform times.
        rng = random.Random(self.seed)
        return sorted(rng.uniform(0, self.seconds) for _ in range(count))


@dataclass(frozen=True)
class ClosedLoop:
    """`callers` callers for `seconds`, each with one request at a time."""

    callers: int
    seconds: float


class Exchange(NamedTuple):
    """A request and its response. Units: seconds of `time.monotonic`.

    `query` is the index of the query. `status` is 0 where no response came, and `error` says why. `answer` is the top
    class of a photo, otherwise a digest of the tensors or of the body.
    """

    query: int
    scheduled: float
    sent: float
    done: float
    status: int
    route: str = ""
    degraded: str = ""
    retry_after: str = ""
    answer: str = ""
    error: str = ""

    @property
    def latency_s(self) -> float:
        """Seconds from the scheduled arrival to the last byte of the response."""
        return self.done - self.scheduled


@dataclass(frozen=True)
class Outcome:
    """The exchanges of a load, in the order of their schedule, over `seconds` of arrivals."""

    exchanges: Sequence[Exchange]
    seconds: float

    def __len__(self) -> int:
        return len(self.exchanges)

    def between(self, start: float, stop: float) -> Outcome:
        """The exchanges scheduled from `start` to before `stop`, by `time.monotonic`."""
        return Outcome([e for e in self.exchanges if start <= e.scheduled < stop], stop - start)

    @property
    def answered(self) -> Outcome:
        """The exchanges with status 200."""
        return Outcome([e for e in self.exchanges if e.status == 200], self.seconds)

    @property
    def lost(self) -> Sequence[Exchange]:
        """The exchanges with neither an answer nor a clear refusal."""
        return [e for e in self.exchanges if e.status not in (200, 429, 503, 504)]

    def wrong(self, right: Collection[str]) -> Sequence[Exchange]:
        """The exchanges with another answer than any of `right`."""
        return [e for e in self.exchanges if e.status == 200 and e.answer not in right]

    def within(self, bound_s: float) -> float:
        """The share of all exchanges answered within `bound_s` of their scheduled arrival."""
        return sum(e.status == 200 and e.latency_s <= bound_s for e in self.exchanges) / max(1, len(self.exchanges))

    def goodput(self, bound_s: float) -> float:
        """Requests a second answered within `bound_s`."""
        return self.within(bound_s) * len(self.exchanges) / self.seconds

    def quantile(self, share: float) -> float:
        """Seconds within which `share` of the exchanges end, however they end; NaN without exchanges."""
        return float(np.quantile([e.latency_s for e in self.exchanges], share)) if self.exchanges else float("nan")

    @property
    def routes(self) -> Mapping[str, float]:
        """The share of each route among the answers, the largest first."""
        counts = Counter(e.route for e in self.answered.exchanges)
        return {route: count / counts.total() for route, count in counts.most_common()}

    @property
    def statuses(self) -> Mapping[int, int]:
        """Exchanges by status."""
        return dict(Counter(e.status for e in self.exchanges))

    @property
    def lateness_s(self) -> float:
        """The 99th percentile of the seconds that the client itself sent late: the error of the schedule."""
        late = [e.sent - e.scheduled for e in self.exchanges]
        return float(np.quantile(late, 0.99)) if late else 0.0

    def row(self, bound_s: float) -> dict[str, float]:
        """A table's usual columns."""
        return {
            "requests": len(self),
            "within": self.within(bound_s),
            "goodput_a_s": self.goodput(bound_s),
            "p50_ms": self.answered.quantile(0.5) * 1e3,
            "p95_ms": self.answered.quantile(0.95) * 1e3,
            "p99_ms": self.answered.quantile(0.99) * 1e3,
            "refused": sum(e.status in (429, 503, 504) for e in self.exchanges),
            "lost": len(self.lost),
        }


class Traffic:
    """A process that sends loads; with `workers` several, of which each sends one load at a time. A context manager."""

    def __init__(self, workers: int = 1) -> None:
        # A fork would share the locks and threads of the benchmark.
        self._pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        for ready in [self._pool.submit(time.sleep, 0.1) for _ in range(workers)]:
            ready.result()

    def start(self, load: OpenLoop | ClosedLoop, queries: Sequence[Query]) -> Future[Outcome]:
        """Begin a load; queries take turns. The result is there once every exchange has ended."""
        return self._pool.submit(send, load, queries)

    def run(self, load: OpenLoop | ClosedLoop, queries: Sequence[Query]) -> Outcome:
        """Send a load and wait for its outcome."""
        return self.start(load, queries).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def send(load: OpenLoop | ClosedLoop, queries: Sequence[Query]) -> Outcome:
    """Send a load from this process."""
    exchanges = asyncio.run(_send(load, queries))
    return Outcome(sorted(exchanges, key=lambda e: e.scheduled), load.seconds)


async def _send(load: OpenLoop | ClosedLoop, queries: Sequence[Query]) -> list[Exchange]:
    exchanges: list[Exchange] = []
    turns = itertools.cycle(range(len(queries)))
    timeout = aiohttp.ClientTimeout(total=GIVE_UP_S)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=GIVE_UP_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def ask(at: float) -> None:
            turn = next(turns)
            exchanges.append(await _exchange(session, turn, queries[turn], at))

        begin = time.monotonic() + _LEAD_S
        async with asyncio.TaskGroup() as tasks:
            if isinstance(load, OpenLoop):
                for arrival in load.arrivals():
                    await asyncio.sleep(begin + arrival - time.monotonic())
                    tasks.create_task(ask(begin + arrival))
            else:
                for _ in range(load.callers):
                    tasks.create_task(_repeat(ask, begin + load.seconds))
    return exchanges


async def _repeat(ask: Callable[[float], Any], until: float) -> None:
    while (now := time.monotonic()) < until:
        await ask(now)


async def _exchange(session: aiohttp.ClientSession, turn: int, query: Query, scheduled: float) -> Exchange:
    sent = time.monotonic()
    try:
        async with session.post(query.url, data=query.body, headers=query.headers) as response:
            body = await response.read()
            done = time.monotonic()
    except (aiohttp.ClientError, OSError, TimeoutError) as e:
        return Exchange(turn, scheduled, sent, time.monotonic(), 0, error=f"{type(e).__name__}: {e}")
    header = response.headers.get
    more = (header("Isthmus-Route", ""), header("Isthmus-Degraded", ""), header("Retry-After", ""))
    if response.status != 200:
        return Exchange(turn, scheduled, sent, done, response.status, *more, error=body[:200].decode(errors="replace"))
    return Exchange(turn, scheduled, sent, done, 200, *more, answer=answer_of(body, response.headers))


def answer_of(body: bytes, headers: Mapping[str, str]) -> str:
    """The top class of a photo's response; a digest of the tensors of binary ones; else a digest of the body."""
    start = headers.get("Inference-Header-Content-Length")
    if start is None:
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            best = json.loads(body)["classes"][0]
            return str(best["label"] or best["index"])
    return hashlib.sha256(body[int(start or 0) :]).hexdigest()[:16]
