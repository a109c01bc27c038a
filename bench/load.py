"""Throughput and latency under load: 1 to 64 callers in closed loops, and an open loop at twice the capacity.

Isthmus's functions, onnxruntime alone in a process with the same segments, Ray Serve with the same segments, and
LitServe and MLServer with the uncut model: the same ONNX files, the same input tensor, a thread for each run and two
runs at a time.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from harness import Report, Row, arguments, at_least, at_most, version_in
from load_servers import ALONE, FUNCTIONS, HEAD_IN_ROUTER, SERVERS, UNCUT, Loadable, loadable, onnxruntime_alone
from overload import Overload, overload
from traffic import ClosedLoop, Query, Traffic

CALLERS = (1, 4, 16, 64)
# Ours over onnxruntime in a process, at the callers where each has its largest throughput.
MIN_OF_ALONE = 0.85
MIN_GOODPUT, MAX_REFUSED_S = 0.9, 0.1
DEADLINE_S = 1.0


@dataclass
class Cell:
    """The turns of one system with a number of callers. Units: requests a second, seconds."""

    rates: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def rate(self) -> float:
        """Median throughput."""
        return statistics.median(self.rates) if self.rates else float("nan")

    @property
    def p99_s(self) -> float:
        """Median of the turns' 99th percentiles."""
        return statistics.median(self.p99) if self.p99 else float("nan")

    def add(self, seconds: list[float], during: float, failed: int = 0) -> None:
        """Add a turn: the latencies of its answers."""
        self.rates.append(len(seconds) / during)
        self.failed += failed
        if len(seconds) > 1:
            cuts = statistics.quantiles(seconds, n=100, method="inclusive")
            self.p50.append(cuts[49])
            self.p99.append(cuts[98])


Turn = Callable[[int, float], tuple[list[float], float, int]]
"""Callers and seconds to latencies, the seconds that the turn took, and failed requests."""


def main() -> None:
    report = arguments("load", __doc__, ["flask", "onnxruntime", "waitress"])
    for name in ("ray", "litserve", "mlserver"):
        report.versions[name] = version_in(name, name)
    model = loadable(report)
    seconds, turns = (1.5, 1) if report.quick else (4.0, 3)
    cells: dict[tuple[str, int], Cell] = {}
    with contextlib.ExitStack() as stack:
        traffic = stack.enter_context(Traffic())
        queries, absent = start_all(report, model, stack)
        systems: dict[str, Turn] = {name: by_traffic(traffic, query) for name, query in queries.items()}
        systems[ALONE] = stack.enter_context(onnxruntime_alone(model))
        warm(systems, seconds)
        for turn in range(turns):
            for callers in CALLERS:
                names = list(systems)
                first = (turn + callers) % len(names)
                for name in names[first:] + names[:first]:
                    report.say(f"turn {turn + 1} of {turns}, {callers} callers: {name}")
                    cells.setdefault((name, callers), Cell()).add(*systems[name](callers, seconds))
        report.say("twice the capacity")
        over = [overload(traffic, queries[FUNCTIONS], seconds=3 * seconds, deadline_s=DEADLINE_S) for _ in range(turns)]
    report.add(f"{model.title}: closed loops", rows(cells, absent))
    report.add(f"isthmus at twice its peak, deadline {DEADLINE_S} s", [each.row(FUNCTIONS) for each in over])
    add_goals(report, cells, over)
    report.emit()


def start_all(
    report: Report, model: Loadable, stack: contextlib.ExitStack
) -> tuple[dict[str, Query], Mapping[str, str]]:
    """A query for each server that starts and gives the right output, and the reasons of the others."""
    queries: dict[str, Query] = {}
    absent: dict[str, str] = {}
    for name, start in SERVERS.items():
        report.say(f"starting {name}")
        try:
            server = stack.enter_context(start(model))
            server.check(model.expected)
        # Whatever keeps a peer from starting here stands in the table; ours must start.
        except Exception as e:
            if name in (FUNCTIONS, HEAD_IN_ROUTER):
                raise
            absent[name] = f"did not start: {type(e).__name__}: {str(e)[:200]}"
            report.say(f"{name} {absent[name]}")
        else:
            queries[name] = server.query
    return queries, absent


def by_traffic(traffic: Traffic, query: Query) -> Turn:
    """Turns of a server behind HTTP."""

    def turn(callers: int, seconds: float) -> tuple[list[float], float, int]:
        outcome = traffic.run(ClosedLoop(callers, seconds), [query])
        answered = outcome.answered.exchanges
        # The last responses come after the end: all of them count, over all of their time.
        ended = max((e.done for e in outcome.exchanges), default=0.0)
        began = min((e.scheduled for e in outcome.exchanges), default=0.0)
        return [e.latency_s for e in answered], max(seconds, ended - began), len(outcome) - len(answered)

    return turn


def warm(systems: Mapping[str, Turn], seconds: float) -> None:
    """Load every system once at the callers at which batches, caches and limits settle."""
    for turn in systems.values():
        turn(16, 2 * seconds)


def rows(cells: Mapping[tuple[str, int], Cell], absent: Mapping[str, str]) -> list[Row]:
    """A row for each system and number of callers; `of_alone` is the throughput over onnxruntime's."""
    table: list[Row] = []
    for (name, callers), cell in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0])):
        table.append(
            {
                "callers": callers,
                "system": name,
                "answers_a_second": cell.rate,
                "of_alone": cell.rate / cells[ALONE, callers].rate,
                "p50_ms": statistics.median(cell.p50) * 1e3 if cell.p50 else None,
                "p99_ms": cell.p99_s * 1e3 if cell.p99 else None,
                "failed": cell.failed,
                "note": "",
            }
        )
    empty = dict.fromkeys(("answers_a_second", "of_alone", "p50_ms", "p99_ms", "failed"))
    return table + [{"callers": None, "system": name, **empty, "note": why} for name, why in absent.items()]


def add_goals(report: Report, cells: Mapping[tuple[str, int], Cell], over: list[Overload]) -> None:
    """Goals against onnxruntime alone, and against each peer in throughput and p99 at the callers that saturate."""
    best = {name: max(cells[name, n].rate for n in CALLERS) for name, _ in cells}
    report.goals.append(
        at_least(f"best throughput over {ALONE}'s", max(best[FUNCTIONS], best[HEAD_IN_ROUTER]) / best[ALONE], 0.85)
    )
    for name in best:
        if name in (FUNCTIONS, HEAD_IN_ROUTER, ALONE):
            continue
        ours = HEAD_IN_ROUTER if name in UNCUT else FUNCTIONS
        report.goals.append(at_least(f"throughput of {ours} over {name}'s, best", best[ours] / best[name], 1.0))
        for callers in (16, 64):
            ratio = cells[ours, callers].p99_s / cells[name, callers].p99_s
            report.goals.append(at_most(f"p99 of {ours} over {name}'s, {callers} callers", ratio, 1.0))
    report.goals.append(
        at_least("goodput at twice the peak, share of it", statistics.median(o.goodput for o in over), MIN_GOODPUT)
    )
    report.goals.append(
        at_most("99% of refusals within", statistics.median(o.refused_s for o in over), MAX_REFUSED_S, "s")
    )


if __name__ == "__main__":
    main()
