"""A function at twice its capacity: goodput, refusals, and a modest caller beside a greedy one.

With the adaptive limit and without, by turns, so that the peak and the overload are of the same minutes.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from functions import Process, stage_functions
from harness import Row, arguments, at_least, at_most
from models import MODEL, REGISTRY, import_model, photos
from traffic import ClosedLoop, OpenLoop, Outcome, Query, Traffic

# Of the peak, and seconds: docs/explanation/benchmarks.md.
MIN_GOODPUT, MAX_REFUSED_S = 0.9, 0.1
# Closed loops that look for the peak: below, at and above the number of CPUs.
CALLERS = (1, 2, 4, 8)
GREEDY_CALLERS = 100
# A deadline that the queue is felt in: some ten times the seconds of a photo.
DEADLINE_S = 0.4
# 504 is no refusal: the request waited, or was worked on, until its deadline was near.
_REFUSALS = (429, 503)


@dataclass(frozen=True)
class Overload:
    """A server's peak in closed loops, and its responses at twice that rate. Units: requests a second, seconds."""

    peak: float
    outcome: Outcome
    deadline_s: float

    @property
    def goodput(self) -> float:
        """Requests a second that were answered before their deadline, as a share of the peak."""
        return self.outcome.goodput(self.deadline_s) / self.peak

    @property
    def refused_s(self) -> float:
        """The 99th percentile of the seconds to a refusal, from when the request was sent."""
        refusals = [e.done - e.sent for e in self.outcome.exchanges if e.status in _REFUSALS]
        return statistics.quantiles(refusals, n=100)[-1] if len(refusals) > 1 else 0.0

    def row(self, name: str) -> Row:
        """A row of the table."""
        statuses = self.outcome.statuses
        return {
            "server": name,
            "peak_a_s": self.peak,
            "goodput_a_s": self.goodput * self.peak,
            "goodput_share": self.goodput,
            "p99_ms": self.outcome.answered.quantile(0.99) * 1e3,
            "refused": sum(statuses.get(status, 0) for status in _REFUSALS),
            "late": statuses.get(504, 0),
            "refused_p99_ms": self.refused_s * 1e3,
            "lost": len(self.outcome.lost),
        }


def overload(
    traffic: Traffic, query: Query, *, seconds: float, deadline_s: float, callers: tuple[int, ...] = CALLERS
) -> Overload:
    """Measure the peak over closed loops of `callers`, then send twice as many requests for `seconds`.

    Every request states the deadline, with the margin that a function takes from it on top.
    """
    timed = query.with_headers(X_Timeout=f"{round(deadline_s * 1000)}ms")
    closed = [traffic.run(ClosedLoop(count, seconds / 3), [timed]) for count in callers]
    peak = max(outcome.goodput(deadline_s) for outcome in closed)
    return Overload(peak, traffic.run(OpenLoop(2 * peak, seconds), [timed]), deadline_s)


@dataclass(frozen=True)
class Fairness:
    """Latencies of a modest caller, alone and beside a greedy one. Units: seconds."""

    alone: Outcome
    beside: Outcome

    def row(self, name: str) -> Row:
        """A row of the table."""
        return {
            "server": name,
            "alone_p50_ms": self.alone.answered.quantile(0.5) * 1e3,
            "beside_p50_ms": self.beside.answered.quantile(0.5) * 1e3,
            "beside_p95_ms": self.beside.answered.quantile(0.95) * 1e3,
            "beside_answered": len(self.beside.answered) / max(1, len(self.beside)),
        }


def fairness(traffic: Traffic, query: Query, *, seconds: float) -> Fairness:
    """A caller with a request at a time, alone and beside one with a hundred in flight."""
    modest, greedy = (query.with_headers(X_Caller=name) for name in ("modest", "greedy"))
    alone = traffic.run(ClosedLoop(1, seconds / 2), [modest])
    flood = traffic.start(ClosedLoop(GREEDY_CALLERS, seconds), [greedy])
    beside = traffic.run(ClosedLoop(1, seconds * 0.8), [modest])
    flood.result()
    return Fairness(alone, beside)


def main() -> None:
    report = arguments("overload", __doc__, ["flask", "onnxruntime", "waitress"])
    import_model()
    seconds = 5.0 if report.quick else 20.0
    turns = 1 if report.quick else 3
    rows: list[Row] = []
    shares: list[float] = []
    refused: list[float] = []
    with contextlib.ExitStack() as stack:
        traffic = stack.enter_context(Traffic(workers=2))
        servers = {
            "adaptive limit and queue": stack.enter_context(_router(caller_header="X-Caller")),
            "32 at a time, no queue": stack.enter_context(_router(adaptive_concurrency="false", max_queued="0")),
        }
        queries = {name: Query(f"{server.url}/", photos()[0]) for name, server in servers.items()}
        for turn in range(turns):
            for name, query in queries.items():
                report.say(f"turn {turn + 1} of {turns}: {name}")
                measured = overload(traffic, query, seconds=seconds, deadline_s=DEADLINE_S)
                rows.append(measured.row(name))
                if name == next(iter(servers)):
                    shares.append(measured.goodput)
                    refused.append(measured.refused_s)
        report.add(f"Twice the peak, deadline {DEADLINE_S} s", rows)
        report.add(
            f"A caller beside one with {GREEDY_CALLERS} requests in flight",
            [fairness(traffic, query, seconds=seconds).row(name) for name, query in queries.items()],
        )
    report.goals = [
        at_least(
            "goodput at twice the peak rate over the peak, median of turns", statistics.median(shares), MIN_GOODPUT
        ),
        at_most("99% of refusals within, median of turns", statistics.median(refused), MAX_REFUSED_S, "s"),
    ]
    report.emit()


@contextlib.contextmanager
def _router(**environment: str) -> Iterator[Process]:
    """A router with the whole model in its process, on one CPU's thread."""
    staged = stage_functions("router", registry=REGISTRY, model=MODEL)["router"]
    with staged.start(hops="local", plan="false", threads="1", **environment) as process:
        process.wait_ready()
        yield process


if __name__ == "__main__":
    main()
