"""Discrete-event simulation of requests over edge, link and cloud, routed by a real `RouteChooser` on its clock.

Each resource works first come, first served; bytes and seconds of a stage vary by a lognormal factor. A request along a
candidate uses the edge, then the uplink, the cloud and the downlink; propagation lies between and occupies nothing.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np

from isthmus.pipeline import Route
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.choice import RouteChooser
from isthmus.routing.demand import Demand
from isthmus.routing.forecast import Expectation
from isthmus.routing.mix import Resources
from isthmus.routing.outstanding import IDLE, Busy, Outstanding, Ticket

STAGES = ("edge", "uplink", "cloud", "downlink")


class FakeRoute:
    """The hops of a route by name."""

    segments: tuple[Any, ...] = ()

    def __init__(self, *hops: str) -> None:
        self.hops = tuple(type("FakeHop", (), {"name": name})() for name in hops)


def fake_candidate(name: str, *hops: str, demand: Demand | None = None, degradation: str = "") -> RouteCandidate:
    """A candidate that no request runs along; its hops are `edge` and `cloud` unless given."""
    route = cast(Route, FakeRoute(*(hops or ("edge", "cloud"))))
    return RouteCandidate(route, name=name, demand=demand or Demand(), planned_s=0.1, degradation=degradation)


@dataclass(frozen=True)
class World:
    """Capacities, and the round trip. Units: bytes a second, seconds."""

    up_bytes_s: float
    down_bytes_s: float
    rtt_s: float
    edge_servers: int = 1
    cloud_servers: int = 2
    noise: float = 0.1

    @property
    def capacities(self) -> Resources:
        """The same for the linear programme."""
        return Resources(float(self.edge_servers), self.up_bytes_s, self.down_bytes_s, float(self.cloud_servers))

    def expect(self, demand: Demand) -> Expectation:
        """What a perfect forecast says of a candidate."""
        busy = Busy(demand.edge_s, demand.up_bytes / self.up_bytes_s, demand.down_bytes / self.down_bytes_s)
        busy = busy._replace(cloud=demand.cloud_s)
        return Expectation(sum(busy) + demand.calls * self.rtt_s, demand, busy)


@dataclass
class Outcome:
    """Seconds of each request, and the routes taken."""

    seconds: list[float] = field(default_factory=list)
    routes: Counter[str] = field(default_factory=Counter)

    def within(self, bound_s: float) -> float:
        """Share of the requests that took at most `bound_s`."""
        return float(np.mean(np.array(self.seconds) <= bound_s))


class _Event(NamedTuple):
    at: float
    order: int
    act: Callable[[], None]


class Simulation:
    """A world under Poisson arrivals. `pick` chooses each request's candidate; None asks the chooser."""

    def __init__(self, world: World, candidates: Sequence[RouteCandidate], *, seed: int = 0) -> None:
        self.now = 1000.0
        self.world, self.candidates = world, tuple(candidates)
        self.outstanding = Outstanding()
        self.chooser = RouteChooser(self.candidates, self.outstanding, lambda: self.now)
        self._random = random.Random(seed)
        self._events: list[_Event] = []
        self._order = itertools.count()
        self._servers: dict[str, list[float]] = defaultdict(lambda: [0.0])
        self.set_world(world)

    def set_world(self, world: World) -> None:
        """The world as it is from now on; the forecasts know it at their next refresh."""
        self.world = world
        for stage, count in (("edge", world.edge_servers), ("cloud", world.cloud_servers)):
            known = self._servers[stage]
            self._servers[stage] = sorted([*known, *[self.now] * count])[-count:]

    def run(self, rate: float, requests: int, pick: RouteCandidate | None = None, refresh_s: float = 0.1) -> Outcome:
        """So many requests at `rate` a second, all of them carried to their end."""
        outcome = Outcome()
        arrivals = list(itertools.islice(self._arrivals(rate), requests))
        end = arrivals[-1]
        for at in arrivals:
            self._at(at, lambda at=at: self._arrive(at, outcome, pick))  # type: ignore[misc]
        for at in np.arange(self.now, end, refresh_s):
            self._at(float(at), self.refresh)
        while self._events:
            event = heapq.heappop(self._events)
            self.now = event.at
            event.act()
        return outcome

    def refresh(self) -> None:
        """New forecasts, and what follows from them in the background."""
        capacities = Resources(float(self.world.edge_servers), 1.0, 1.0, float(self.world.cloud_servers))
        self.chooser.refresh([self.world.expect(c.demand) for c in self.candidates], capacities)

    def _arrivals(self, rate: float) -> Iterator[float]:
        at = self.now
        while True:
            yield (at := at + self._random.expovariate(rate))

    def _at(self, at: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, _Event(at, next(self._order), act))

    def _arrive(self, at: float, outcome: Outcome, pick: RouteCandidate | None) -> None:
        chosen = pick or self.chooser.choose(self.candidates, 20.0)
        outcome.routes[chosen.name] += 1
        self.chooser.usage.took(self.candidates.index(chosen))
        expectation = self.chooser.expectation(chosen)
        ticket = self.outstanding.begin(IDLE if expectation is None else expectation.busy, "cloud")
        self._stage(0, at, chosen, ticket, outcome)

    def _stage(self, index: int, began: float, chosen: RouteCandidate, ticket: Ticket, outcome: Outcome) -> None:
        if index == len(STAGES):
            outcome.seconds.append(self.now - began)
            ticket.close()
            return
        demand, world = chosen.demand, self.world
        stage = STAGES[index]
        work = (
            demand.edge_s,
            demand.up_bytes / world.up_bytes_s,
            demand.cloud_s,
            demand.down_bytes / world.down_bytes_s,
        )[index] * float(np.exp(self._random.gauss(0.0, world.noise)))
        if index == 1:
            ticket.calls("cloud")
        propagation = demand.calls * world.rtt_s / 2 if stage in ("uplink", "downlink") else 0.0
        end = self._serve(stage, work) + propagation
        self._at(end, lambda: self._stage(index + 1, began, chosen, ticket, outcome))

    def _serve(self, stage: str, seconds: float) -> float:
        if not seconds:
            return self.now
        servers = self._servers[stage]
        free = min(range(len(servers)), key=servers.__getitem__)
        servers[free] = max(self.now, servers[free]) + seconds
        return servers[free]


def capacity(build: Callable[[], Simulation], pick: RouteCandidate | None, bound_s: float, requests: int) -> float:
    """The highest rate at which 95% of the requests end within `bound_s`, by bisection."""
    low, high = 0.1, 200.0
    while high / low > 1.02:
        rate = (low * high) ** 0.5
        if build().run(rate, requests, pick).within(bound_s) >= 0.95:
            low = rate
        else:
            high = rate
    return low
