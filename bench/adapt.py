"""Steps of a link under steady load: the adaptive router beside each fixed route and a router planned every 10 s.

A router with a quarter of a CPU at the edge, a cloud function behind an emulated link whose uplink and round trip take
three steps. Requests arrive in steady steps, few enough that no route has a queue. The periodic re-planner takes, for
each period, the route that was the quickest in the period before; its requests are those of the fixed routes' runs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import urllib3
from adaptive import Site, photo, plan_of, planned, site
from harness import Report, Row, arguments, at_most
from prometheus_client.parser import text_string_to_metric_families
from traffic import ClosedLoop, Exchange, OpenLoop, Outcome, Traffic

from isthmus.artifacts.conditions import Conditions
from isthmus.routing.choice import RouteChooser
from isthmus.routing.demand import Demand
from isthmus.routing.outstanding import Outstanding
from isthmus_tools.netem import LinkShape
from support.route_simulation import World, fake_candidate

ADAPTIVE, REPLANNED = "adaptive", "planned every {:g} s"
FIXED = ("edge-float", "cloud-photo")
# A second; a quarter of a CPU answers some 25 by the whole model.
RATE = 6.0
PERIOD_S = 10.0
# The link has settled after the later of these.
SETTLED_S, SETTLED_REQUESTS = 2.0, 20
MAX_OVER_BEST, MAX_SWITCHES, MAX_CHOICE_US = 1.10, 2, 50.0
TURNS = 3


@dataclass(frozen=True)
class Phase:
    """A link for a time."""

    uplink_bps: float
    rtt_s: float

    @property
    def shape(self) -> LinkShape:
        """The same for the emulator."""
        return LinkShape(self.uplink_bps, self.uplink_bps, self.rtt_s)

    @property
    def name(self) -> str:
        """`2 Mbit/s, 5 ms`."""
        return f"{self.uplink_bps / 1e6:g} Mbit/s, {self.rtt_s * 1e3:g} ms"


PHASES = (Phase(50e6, 0.005), Phase(2e6, 0.005), Phase(20e6, 0.005), Phase(20e6, 0.08))
# Steady, but noisy: where the photo's route and the edge's are not far apart.
NOISY = LinkShape(10e6, 10e6, 0.02, jitter_s=0.01)


@dataclass
class Run:
    """The exchanges of each phase, and how often the preferred route changed in it."""

    phases: list[Outcome] = field(default_factory=list)
    switches: list[int] = field(default_factory=list)

    @property
    def exchanges(self) -> list[Exchange]:
        """All exchanges, in the order of their schedule."""
        return [e for outcome in self.phases for e in outcome.exchanges]


def main() -> None:
    report = arguments("adapt", __doc__, ["aiohttp", "flask", "highspy", "onnxruntime", "waitress"])
    link = Conditions(PHASES[0].uplink_bps, PHASES[0].uplink_bps, PHASES[0].rtt_s)
    reference = planned([link], report)[link]
    seconds, turns = (8.0, 1) if report.quick else (11.0, TURNS)
    runs: dict[str, list[Run]] = {}
    with Traffic() as traffic:
        for turn in range(turns):
            with site(reference, PHASES[0].shape) as running:
                split = _quickest_split(running, traffic, reference)
                # A router that has seen nothing of the link but its start.
                for route in (ADAPTIVE, *FIXED, split):
                    report.say(f"turn {turn + 1} of {turns}: {route}")
                    runs.setdefault(route, []).append(_steps(running, traffic, route, seconds))
        report.say("a noisy link")
        with site(reference, NOISY) as running:
            noisy = _noisy(running, traffic, 4 * seconds)
    fixed = {route: each for route, each in runs.items() if route != ADAPTIVE}
    _add_latencies(report, runs, [_replanned(turn, seconds) for turn in _by_turn(fixed)])
    _add_steps(report, runs[ADAPTIVE], list(_by_turn(fixed)))
    _add_noise(report, noisy)
    _add_choice(report, 500 if report.quick else 5000)
    report.emit()


def _by_turn(runs: Mapping[str, Sequence[Run]]) -> Iterator[dict[str, Run]]:
    for turn in range(min(len(each) for each in runs.values())):
        yield {route: each[turn] for route, each in runs.items()}


def _quickest_split(running: Site, traffic: Traffic, reference: str) -> str:
    """Of the splits that the router offers, the quickest over the first link."""
    seconds = {}
    for name in (c.name for c in plan_of(reference).candidates if c.kind == "split" and not c.refused):
        query = running.query(photo(), Isthmus_Route=name)
        if len(traffic.run(ClosedLoop(1, 0.1), [query]).answered):
            seconds[name] = traffic.run(ClosedLoop(1, 0.5), [query]).answered.quantile(0.5)
    return min(seconds, key=seconds.__getitem__)


def _steps(running: Site, traffic: Traffic, route: str, phase_s: float) -> Run:
    """A run through all phases."""
    query = running.query(photo(), **({} if route == ADAPTIVE else {"Isthmus-Route": route}))
    running.link.set(PHASES[0].shape)
    traffic.run(OpenLoop(RATE, 4.0, poisson=False), [query])  # connections, sessions, and estimates of this link
    run, counts = Run(), [_switches(running)]
    begun = time.monotonic() + 0.5
    load = traffic.start(OpenLoop(RATE, 0.5 + phase_s * len(PHASES), poisson=False), [query])
    for i, phase in enumerate(PHASES):
        time.sleep(max(0.0, begun + i * phase_s - time.monotonic()))
        running.link.set(phase.shape)
        if i:
            counts.append(_switches(running))
    outcome = load.result()
    counts.append(_switches(running))
    run.phases = [outcome.between(begun + i * phase_s, begun + (i + 1) * phase_s) for i in range(len(PHASES))]
    run.switches = [after - before for before, after in itertools.pairwise(counts)]
    return run


def _noisy(running: Site, traffic: Traffic, seconds: float) -> Run:
    traffic.run(OpenLoop(RATE, 6.0, poisson=False), [running.query(photo())])
    before = _switches(running)
    outcome = traffic.run(OpenLoop(RATE, seconds, poisson=False), [running.query(photo())])
    return Run([outcome], [_switches(running) - before])


def _switches(running: Site) -> int:
    text = urllib3.request("GET", f"{running.router.url}/metrics").data.decode()
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return round(sum(s.value for s in samples if s.name == "isthmus_route_switches_total"))


def _replanned(fixed: Mapping[str, Run], phase_s: float) -> Outcome:
    """The requests of a router that takes, for a period, the route that was the quickest in the period before."""
    exchanges = {route: run.exchanges for route, run in fixed.items()}
    starts = {route: each[0].scheduled for route, each in exchanges.items()}
    route, picked = FIXED[0], []
    for period in range(round(phase_s * len(PHASES) / PERIOD_S + 0.5)):
        inside = {
            name: [e for e in each if period * PERIOD_S <= e.scheduled - starts[name] < (period + 1) * PERIOD_S]
            for name, each in exchanges.items()
        }
        picked += inside[route] if period else inside[_quickest(inside)]
        route = _quickest(inside)
    return Outcome(picked, phase_s * len(PHASES))


def _quickest(exchanges: Mapping[str, Sequence[Exchange]]) -> str:
    medians = {name: statistics.median(e.latency_s for e in each) for name, each in exchanges.items() if each}
    return min(medians, key=medians.__getitem__)


def _mean_ms(exchanges: Sequence[Exchange]) -> float:
    return statistics.fmean(e.latency_s for e in exchanges) * 1e3


def _add_latencies(report: Report, runs: Mapping[str, Sequence[Run]], replanned: Sequence[Outcome]) -> None:
    rows: list[Row] = []
    for route, each in runs.items():
        medians = {
            phase.name + " p50 ms": statistics.median(run.phases[i].quantile(0.5) * 1e3 for run in each)
            for i, phase in enumerate(PHASES)
        }
        mean = statistics.median(_mean_ms(run.exchanges) for run in each)
        rows.append({"route": route, **medians, "mean ms": mean, "lost": sum(_lost(run.exchanges) for run in each)})
    again = statistics.median(_mean_ms(outcome.exchanges) for outcome in replanned)
    name = REPLANNED.format(PERIOD_S)
    rows.append({"route": name, **dict.fromkeys([p.name + " p50 ms" for p in PHASES]), "mean ms": again, "lost": 0})
    report.add(f"{RATE:g} requests a second while the link takes three steps", rows)
    means = {str(row["route"]): float(str(row["mean ms"])) for row in rows}
    fixed = min(ms for route, ms in means.items() if route not in (ADAPTIVE, name))
    report.goals.append(at_most("mean of adaptive, over the best fixed route", means[ADAPTIVE] / fixed, 1.0))
    report.goals.append(at_most(f"mean of adaptive, over {name}", means[ADAPTIVE] / again, 1.0))
    report.goals.append(at_most("adaptive: requests lost", float(str(rows[0]["lost"])), 0))


def _lost(exchanges: Sequence[Exchange]) -> int:
    return sum(e.status != 200 for e in exchanges)


def _add_steps(report: Report, adaptive: Sequence[Run], fixed: Sequence[Mapping[str, Run]]) -> None:
    """Latency after each step, beside the best route for the new link, and the requests until it was taken."""
    rows: list[Row] = []
    skipped = max(SETTLED_REQUESTS, round(SETTLED_S * RATE))
    for i, phase in enumerate(PHASES):
        ratios, settled = [], []
        for run, others in zip(adaptive, fixed, strict=True):
            best = _quickest({name: other.phases[i].exchanges for name, other in others.items()})
            best_s = others[best].phases[i].quantile(0.5)
            exchanges = run.phases[i].exchanges
            ratios.append(statistics.median(e.latency_s for e in exchanges[skipped:]) / best_s)
            settled.append(_settled(exchanges, MAX_OVER_BEST * best_s))
        switches = [run.switches[i] for run in adaptive]
        row: Row = {
            "link": phase.name,
            "best": best,
            "over best": statistics.median(ratios),
            "requests until within 10%": statistics.median(settled),
            "switches": max(switches),
            "routes": ", ".join(f"{r} {s:.0%}" for r, s in adaptive[-1].phases[i].routes.items()),
        }
        rows.append(row)
        if i:
            report.goals.append(
                at_most(f"{phase.name}: over the best route, after {skipped} requests", statistics.median(ratios), 1.1)
            )
            report.goals.append(at_most(f"{phase.name}: switches", max(switches), MAX_SWITCHES))
    report.add("after each step", rows)


def _settled(exchanges: Sequence[Exchange], bound_s: float) -> int:
    """The number of requests before the first five of which the median is within the bound."""
    for i in range(len(exchanges) - 4):
        if statistics.median(e.latency_s for e in exchanges[i : i + 5]) <= bound_s:
            return i
    return len(exchanges)


def _add_noise(report: Report, noisy: Run) -> None:
    outcome = noisy.phases[0]
    routes = ", ".join(f"{route} {share:.0%}" for route, share in outcome.routes.items())
    row: Row = {**outcome.row(0.25), "switches": noisy.switches[0], "routes": routes}
    report.add(f"{NOISY.uplink_bps / 1e6:g} Mbit/s, {NOISY.rtt_s * 1e3:g} ± {NOISY.jitter_s * 1e3:g} ms", [row])
    report.goals.append(at_most("noisy but steady link: switches", noisy.switches[0], 0))


def _add_choice(report: Report, count: int) -> None:
    """Seconds of a choice with its accounting, among as many candidates as a router has at most."""
    world = World(5e5, 5e5, 0.02)
    demands = [Demand(0.01 + 0.003 * i, 2000 * (20 - i), 600, 0.02 - 0.001 * i, 1) for i in range(16)]
    candidates = [fake_candidate(f"c{i}", demand=demand) for i, demand in enumerate(demands)]
    rows: list[Row] = []
    for load, requests in (("one route", 0), ("spread", 300)):
        chooser = RouteChooser(candidates, Outstanding())
        for _ in range(requests):
            chooser.usage.took(0)
        chooser.refresh([world.expect(demand) for demand in demands])
        times = []
        for _ in range(count):
            began = time.perf_counter()
            with chooser.running(chooser.choose(candidates, 10.0)):
                pass
            times.append(time.perf_counter() - began)
        rows.append({"load": load, "median us": statistics.median(times) * 1e6})
    report.add("a choice among 16 candidates", rows)
    report.goals.append(at_most("a choice, median", max(float(str(r["median us"])) for r in rows), MAX_CHOICE_US, "us"))


if __name__ == "__main__":
    main()
