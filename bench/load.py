"""Throughput and latency under load: 1 to 64 callers in closed loops, and an open loop at twice the capacity.

Isthmus's functions, onnxruntime alone in a process with the same segments, Ray Serve with the same segments, and
LitServe and MLServer with the uncut model: the same ONNX files, the same input tensor, a thread for each run and two
runs at a time.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from harness import Report, Row, arguments, at_least, at_most, version_in
from load_servers import (
    ALONE,
    FUNCTIONS,
    HEAD_IN_ROUTER,
    MODELS,
    PEERS,
    SERVERS,
    Loadable,
    Server,
    Turn,
    TurnResult,
    loadable,
    onnxruntime_alone,
)
from overload import Overload, overload
from traffic import ClosedLoop, Traffic

CALLERS = (1, 4, 16, 64)
# Ours over onnxruntime in a process, at the callers where each has its largest throughput.
MIN_OF_ALONE = 0.85
MIN_GOODPUT, MAX_REFUSED_S = 0.9, 0.1
DEADLINE_S = 1.0


@dataclass
class SystemTurns:
    """The turns of one system with a number of callers. Units: requests a second, seconds; `cpu` is for a request."""

    rates: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def rate(self) -> float:
        """Median throughput."""
        return statistics.median(self.rates) if self.rates else float("nan")

    @property
    def p99_s(self) -> float:
        """Median of the turns' 99th percentiles."""
        return statistics.median(self.p99) if self.p99 else float("nan")

    @property
    def cpu_s(self) -> float:
        """Median CPU seconds of the system for an answer, those of the client left out."""
        return statistics.median(self.cpu) if self.cpu else float("nan")

    def add(self, turn: TurnResult) -> None:
        """Add a turn."""
        count = len(turn.latencies)
        self.rates.append(count / turn.during_s)
        self.failed += turn.failed
        if count > 1:
            cuts = statistics.quantiles(turn.latencies, n=100, method="inclusive")
            self.p50.append(cuts[49])
            self.p99.append(cuts[98])
            self.cpu.append(turn.cpu_s / count)


def main() -> None:
    report = arguments("load", __doc__, ["flask", "onnxruntime", "waitress"], list(MODELS))
    for name in ("ray", "litserve", "mlserver"):
        report.versions[name] = version_in(name, name)
    for name in report.models or (list(MODELS)[:1] if report.quick else list(MODELS)):
        measure(report, loadable(name, report))
    report.emit()


def measure(report: Report, model: Loadable) -> None:
    """Add the tables and goals of a model."""
    seconds, turns = (1.0, 1) if report.quick else (1.5, 3)
    cells: dict[tuple[str, int], SystemTurns] = {}
    with contextlib.ExitStack() as stack:
        traffic = stack.enter_context(Traffic())
        servers, absent = start_all(report, model, stack)
        systems: dict[str, Turn] = {name: by_traffic(traffic, server) for name, server in servers.items()}
        systems[ALONE] = stack.enter_context(onnxruntime_alone(model))
        report.say("warming up")
        for system in systems.values():
            # Batches, caches and limits settle under load.
            system(16, 2.0 if report.quick else 4.0)
        for turn in range(turns):
            report.say(f"{model.name}: turn {turn + 1} of {turns}")
            for callers in CALLERS:
                names = list(systems)
                first = (turn + callers) % len(names)
                for name in names[first:] + names[:first]:
                    cells.setdefault((name, callers), SystemTurns()).add(systems[name](callers, seconds))
        report.say("twice the capacity")
        query = servers[FUNCTIONS].query
        over = [overload(traffic, query, seconds=4 * seconds, deadline_s=DEADLINE_S) for _ in range(min(2, turns))]
    report.add(f"{model.title}: closed loops", rows(cells, absent))
    report.add(f"{model.name}: isthmus at twice its peak, deadline {DEADLINE_S} s", [o.row(FUNCTIONS) for o in over])
    add_goals(report, model.name, cells, over)


def start_all(
    report: Report, model: Loadable, stack: contextlib.ExitStack
) -> tuple[dict[str, Server], Mapping[str, str]]:
    """Each server that starts and gives the right output, and the reasons of the others."""
    servers: dict[str, Server] = {}
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
            servers[name] = server
    return servers, absent


def by_traffic(traffic: Traffic, server: Server) -> Turn:
    """Turns of a server behind HTTP."""

    def turn(callers: int, seconds: float) -> TurnResult:
        before_s = server.cpu_s()
        outcome = traffic.run(ClosedLoop(callers, seconds), [server.query])
        cpu_s = server.cpu_s() - before_s
        answered = outcome.answered.exchanges
        # The last responses come after the end: all of them count, over all of their time.
        ended = max((e.done for e in outcome.exchanges), default=0.0)
        began = min((e.scheduled for e in outcome.exchanges), default=0.0)
        during_s = max(seconds, ended - began)
        return TurnResult([e.latency_s for e in answered], during_s, cpu_s, len(outcome) - len(answered))

    return turn


def rows(cells: Mapping[tuple[str, int], SystemTurns], absent: Mapping[str, str]) -> list[Row]:
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
                "cpu_ms": cell.cpu_s * 1e3,
                "failed": cell.failed,
                "note": "",
            }
        )
    empty = dict.fromkeys(("answers_a_second", "of_alone", "p50_ms", "p99_ms", "cpu_ms", "failed"))
    return table + [{"callers": None, "system": name, **empty, "note": why} for name, why in absent.items()]


def add_goals(report: Report, model: str, cells: Mapping[tuple[str, int], SystemTurns], over: list[Overload]) -> None:
    """Goals against onnxruntime alone, and against each peer in throughput and in p99 under load."""
    best = {name: max(cells[name, n].rate for n in CALLERS) for name, _ in cells}
    ours = max(best[FUNCTIONS], best[HEAD_IN_ROUTER])
    goals = [at_least(f"{model}: best throughput over {ALONE}'s", ours / best[ALONE], MIN_OF_ALONE)]
    for peer in (name for name in best if name in PEERS):
        # With the same segments as we, or in the topology that an uncut model compares with.
        own = HEAD_IN_ROUTER if PEERS[peer] else FUNCTIONS
        goals.append(at_least(f"{model}: best throughput of {own} over {peer}'s", best[own] / best[peer], 1.0))
        for callers in (16, 64):
            ratio = cells[own, callers].p99_s / cells[peer, callers].p99_s
            goals.append(at_most(f"{model}: p99 of {own} over {peer}'s, {callers} callers", ratio, 1.0))
    goodput, refused_s = statistics.median(o.goodput for o in over), statistics.median(o.refused_s for o in over)
    goals.append(at_least(f"{model}: goodput at twice the peak, of the peak", goodput, MIN_GOODPUT))
    goals.append(at_most(f"{model}: 99% of refusals within", refused_s, MAX_REFUSED_S, "s"))
    report.goals += goals


if __name__ == "__main__":
    main()
