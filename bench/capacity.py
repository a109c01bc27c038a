"""The highest Poisson rate that a small edge, a link and a cloud serve: each fixed route, and the adaptive router.

The rate counts at which 95% of requests are answered within the bound, from their scheduled arrival. Beside each rate
stands the linear programme's: the joint capacity of the routes' measured demands, at full use of every resource.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from adaptive import EDGE_SHARE, Site, photo, plan_of, planned, site
from harness import Report, Row, arguments, at_least
from traffic import ClosedLoop, OpenLoop, Outcome, Query, Traffic

from isthmus.artifacts.conditions import Conditions
from isthmus.routing.demand import Demand
from isthmus.routing.mix import Mix, Resources, joint_capacity
from isthmus_tools.netem import LinkShape
from isthmus_tools.profiling.slow_edge import SlowEdge

UPLINKS, RTT_S = (1e6, 4e6, 16e6), 0.02
BOUND_S, TIGHT_S, SHARE = 0.25, 0.1, 0.95
# A function ends so long before the deadline that its caller states; docs/reference/api.md, "X-Timeout".
_MARGIN_S = 0.05
EDGE_ONLY, CLOUD_ONLY, ADAPTIVE = ("edge-float", "edge-int8"), "cloud-photo", "adaptive"
# Of a plan's splits: those of the highest capacity, by their demands.
SPLITS = 2
# Cloud CPUs for the programme; the function has a thread a request, and the CPUs of this machine that others leave.
CLOUD_CPUS = 1.0
MIN_OF_BOUND, MIN_GAIN, MIN_GAIN_EACH = 0.90, 1.12, 0.97
# The bracket of the first search as shares of the programme's rate, of later ones as shares of the rate before.
_BRACKET, _NARROW = (0.3, 1.05), (0.88, 1.12)


@dataclass(frozen=True)
class Effort:
    """Turns, probes of the first and of a later turn, and seconds of a probe."""

    turns: int
    probes: int
    later_probes: int
    seconds: float


# A probe of few seconds hides a queue that grows slowly, of all routes alike.
FULL, QUICK = Effort(3, 4, 2, 4.0), Effort(1, 3, 3, 2.5)


@dataclass
class RouteCapacity:
    """A route at a link, or several: the programme's division of its requests, and the highest rate of each turn."""

    name: str
    bound: Mix
    rates: dict[float, list[float]] = field(default_factory=dict)
    """By the bound of the answers, in seconds."""
    highest: dict[float, Outcome] = field(default_factory=dict)
    """The exchanges of the highest rate that passed."""

    def rate(self, bound_s: float = BOUND_S) -> float:
        """Requests a second, median of the turns."""
        return statistics.median(self.rates[bound_s]) if self.rates.get(bound_s) else 0.0


@dataclass
class Cell:
    """A link: the demands of its routes, the capacity of each fixed route, and that of the adaptive router.

    `divided` names the routes over which the programme divides requests.
    """

    link: Conditions
    demands: Mapping[str, Demand]
    divided: Sequence[str]
    fixed: Sequence[RouteCapacity]
    adaptive: RouteCapacity

    @property
    def name(self) -> str:
        """`4 Mbit/s`."""
        return f"{self.link.up_bps / 1e6:g} Mbit/s"

    def best(self, bound_s: float = BOUND_S) -> RouteCapacity:
        """The fixed route of the highest rate."""
        return max(self.fixed, key=lambda r: r.rate(bound_s))

    def gain(self, bound_s: float = BOUND_S) -> float:
        """The adaptive router's rate over the best fixed route's."""
        return self.adaptive.rate(bound_s) / max(1e-9, self.best(bound_s).rate(bound_s))


@dataclass(frozen=True)
class Probing:
    """What a probe of a rate needs."""

    running: Site
    traffic: Traffic
    body: bytes

    def query(self, route: str, bound_s: float) -> Query:
        """A photo with a deadline, and a pin unless the router is to choose."""
        headers = {"X-Timeout": f"{round((bound_s + _MARGIN_S) * 1e3)}ms"}
        return self.running.query(self.body, **headers | ({} if route == ADAPTIVE else {"Isthmus-Route": route}))

    def demand(self, route: str, seconds: float) -> tuple[Demand, bool] | None:
        """CPU seconds and bytes of a request, and whether it is degraded; None where the router has no such route."""
        query = self.running.query(self.body, Isthmus_Route=route)
        first = self.traffic.run(ClosedLoop(1, 0.1), [query]).answered  # which loads the segments as well
        if not len(first):
            return None
        before = self._used()
        count = len(self.traffic.run(ClosedLoop(2, seconds), [query]))
        demand = Demand(*((b - a) / count for a, b in zip(before, self._used(), strict=True)), calls=1.0)
        return demand, bool(first.exchanges[-1].degraded)

    def _used(self) -> tuple[float, float, float, float]:
        counters, processes = self.running.link.counters, (self.running.router, self.running.cloud)
        edge, cloud = (SlowEdge(1, [p.process.pid]).work().function_s for p in processes)
        return edge, counters.bytes_up, counters.bytes_down, cloud

    def search(self, route: RouteCapacity, bound_s: float, effort: Effort) -> None:
        """Bisect for the highest rate, between shares of the programme's, later between those of the turns before."""
        turns = route.rates.setdefault(bound_s, [])
        around = route.rate(bound_s)
        low, high = (share * (around or route.bound.rate) for share in (_NARROW if around else _BRACKET))
        passed = 0.0
        query = self.query(route.name, bound_s)
        for probe in range(effort.later_probes if around else effort.probes):
            rate = (low + high) / 2
            outcome = self.traffic.run(OpenLoop(rate, effort.seconds, seed=97 * len(turns) + probe), [query])
            if outcome.within(bound_s) < SHARE:
                high = rate
                continue
            low = passed = rate
            highest = route.highest.get(bound_s)
            if highest is None or len(outcome) / outcome.seconds > len(highest) / highest.seconds:
                route.highest[bound_s] = outcome
        # A later turn without a pass is below its bracket; a first one has no rate.
        turns.append(passed or (low if around else 0.0))


def main() -> None:
    uplinks = {f"{bps / 1e6:g}": bps for bps in UPLINKS}
    packages = ["aiohttp", "flask", "highspy", "onnxruntime", "waitress"]
    report = arguments("capacity", __doc__, packages, uplink=[*uplinks])
    chosen = report.chosen["uplink"] or (["4"] if report.quick else list(uplinks))
    links = [Conditions(bps, bps, RTT_S) for name, bps in uplinks.items() if name in chosen]
    references = planned(links, report)
    cells = []
    with Traffic() as traffic:
        for link in links:
            with site(references[link], LinkShape(link.up_bps, link.down_bps, link.rtt_s)) as running:
                probing = Probing(running, traffic, photo())
                cells.append(_cell(report, link, references[link], probing, cells[0] if cells else None))
    _add_capacities(report, cells)
    _add_mixes(report, cells)
    _add_goals(report, cells)
    report.emit()


def _cell(report: Report, link: Conditions, reference: str, probing: Probing, before: Cell | None) -> Cell:
    """Measure a link; the edge alone needs no link, so that the figures of the cell `before` serve."""
    resources = Resources(EDGE_SHARE, link.up_bps / 8, link.down_bps / 8, CLOUD_CPUS)
    candidates = [c.name for c in plan_of(reference).candidates if not c.refused]
    where = f"{link.up_bps / 1e6:g} Mbit/s up"
    report.say(f"{where}: demands of the routes")
    seconds = 0.5 if report.quick else 1.0
    known = {name: found for name in candidates if (found := probing.demand(name, seconds)) is not None}
    demands = {name: demand for name, (demand, _) in known.items()}
    fixed = [RouteCapacity(name, joint_capacity([demand], resources)) for name, demand in demands.items()]
    splits = sorted((r for r in fixed if r.name.startswith("split")), key=lambda r: -r.bound.rate)[:SPLITS]
    fixed = [r for r in fixed if r.name in (*EDGE_ONLY, CLOUD_ONLY)] + splits
    # Degraded routes are for outages: the router divides requests over the others alone.
    divided = {name: demand for name, (demand, is_degraded) in known.items() if not is_degraded}
    together = joint_capacity(list(divided.values()), resources)
    cell = Cell(link, demands, list(divided), fixed, RouteCapacity(ADAPTIVE, together))
    same = {r.name: r for r in before.fixed if r.name in EDGE_ONLY} if before is not None else {}
    cell.fixed = [same.get(r.name, r) for r in fixed]
    everyone = [r for r in (*cell.fixed, cell.adaptive) if r.name not in same]
    effort = QUICK if report.quick else FULL
    for turn in range(effort.turns):
        for route in everyone[turn:] + everyone[:turn]:
            report.say(f"{where}: {route.name}, turn {turn + 1}")
            probing.search(route, BOUND_S, effort)
    # The tight bound once, at the fastest link: elsewhere the link alone takes most of it.
    if link.up_bps == max(UPLINKS) and not report.quick:
        for route in (*cell.fixed, cell.adaptive):
            report.say(f"{where}: {route.name}, {TIGHT_S * 1e3:g} ms")
            probing.search(route, TIGHT_S, effort)
    return cell


def _add_capacities(report: Report, cells: Sequence[Cell]) -> None:
    rows: list[Row] = []
    for cell in cells:
        for route in (*cell.fixed, cell.adaptive):
            demand = cell.demands.get(route.name)
            top = route.highest.get(BOUND_S)
            rows.append(
                {
                    "uplink": cell.name,
                    "route": route.name,
                    "edge CPU ms": demand.edge_s * 1e3 if demand else None,
                    "kB up": demand.up_bytes / 1e3 if demand else None,
                    "cloud CPU ms": demand.cloud_s * 1e3 if demand else None,
                    "programme a second": route.bound.rate,
                    "measured a second": route.rate(),
                    "of programme": route.rate() / route.bound.rate,
                    "in 100 ms a second": route.rate(TIGHT_S) or None,
                    "p50 ms": top.answered.quantile(0.5) * 1e3 if top else None,
                    "p95 ms": top.answered.quantile(0.95) * 1e3 if top else None,
                }
            )
    report.add(f"highest Poisson rate with {SHARE:.0%} of requests answered within {BOUND_S * 1e3:g} ms", rows)


def _add_mixes(report: Report, cells: Sequence[Cell]) -> None:
    rows: list[Row] = []
    for cell in cells:
        bound, top = cell.adaptive.bound, cell.adaptive.highest.get(BOUND_S)
        shares = {name: share for name, share in zip(cell.divided, bound.shares, strict=True) if share > 0.005}
        rows.append(
            {
                "uplink": cell.name,
                "programme": _text(shares),
                "measured": _text(top.routes if top else {}),
                **{f"{name} %": round(used * 100) for name, used in bound.used._asdict().items()},
                "best fixed": cell.best().name,
                "programme over best": bound.rate / max(r.bound.rate for r in cell.fixed),
                "adaptive over best": cell.gain(),
            }
        )
    report.add("the division of requests, and what the programme uses of each resource", rows)


def _text(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda s: -s[1]))


def _add_goals(report: Report, cells: Sequence[Cell]) -> None:
    for cell in cells:
        of_bound = cell.adaptive.rate() / cell.adaptive.bound.rate
        report.goals.append(at_least(f"{cell.name}: adaptive, of the programme's rate", of_bound, MIN_OF_BOUND))
        report.goals.append(at_least(f"{cell.name}: adaptive, over the best fixed", cell.gain(), MIN_GAIN_EACH))
    mean = statistics.geometric_mean([max(1e-9, cell.gain()) for cell in cells])
    report.goals.append(at_least("geometric mean of adaptive over the best fixed", mean, MIN_GAIN))


if __name__ == "__main__":
    main()
