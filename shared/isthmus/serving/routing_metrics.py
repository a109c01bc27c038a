"""Prometheus metrics of routing: read from the router's state at every scrape, and seconds by route as requests end.

Labels are names of published models and of their plans' routes, and places of hops; never texts of callers.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from isthmus.context import Context
from isthmus.pipeline import Result
from isthmus.routing import Attempt, Dispatcher, ServedModel
from isthmus.routing.state import CandidateState, HopState, ModelState, RouterState
from isthmus.serving.metrics import SECONDS, hop_label
from isthmus.settings import RouterSettings

if TYPE_CHECKING:
    from isthmus.serving.tracing import Tracing

# A route has some ten series, and twenty more of the histogram: a scrape of all takes 40 ms, of four times as many 150.
# A router keeps more versions in memory than that, and whoever can call it chooses among all published ones.
MAX_VERSIONS, MAX_ROUTES = 16, 16
OTHER = "other"
BREAKER_STATES = ("closed", "half-open", "open")
_ROUTE = ("model", "version", "route")


class RouteLabels(NamedTuple):
    """Labels of a route's series."""

    model: str
    version: str
    route: str

    @property
    def is_shared(self) -> bool:
        """Whether several routes share the series."""
        return self.route == OTHER


class LabelPlaces:
    """Places for the labels of versions and routes: first come, first served; further ones share `other`."""

    def __init__(self, max_versions: int = MAX_VERSIONS, max_routes: int = MAX_ROUTES) -> None:
        self._max_versions, self._max_routes = max_versions, max_routes
        self._lock = threading.Lock()
        self._routes: dict[tuple[str, str], set[str]] = {}

    def of(self, model: str, version: str, route: str) -> RouteLabels:
        """The labels of a route."""
        key = (model, version)
        with self._lock:
            if key not in self._routes and len(self._routes) >= self._max_versions:
                return RouteLabels(OTHER, OTHER, OTHER)
            routes = self._routes.setdefault(key, set())
            if route not in routes and len(routes) >= self._max_routes:
                return RouteLabels(model, version, OTHER)
            routes.add(route)
            return RouteLabels(model, version, route)

    def retain(self, served: Collection[tuple[str, str]]) -> list[RouteLabels]:
        """Free the places of versions that are no longer served; the labels that they had."""
        with self._lock:
            gone = {key: self._routes.pop(key) for key in [key for key in self._routes if key not in served]}
        return [RouteLabels(*key, route) for key, routes in gone.items() for route in (*routes, OTHER)]


class RoutingMetrics(Collector):
    """Metrics of a router's hops, links, routes and choices; hops are named as the settings allow."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._places = LabelPlaces()
        self._state: Callable[[], RouterState] | None = None
        self._seconds = Histogram(
            "isthmus_route_seconds", "Time to run a request along its route.", _ROUTE, buckets=SECONDS, registry=None
        )

    def measure(self, dispatcher: MeasuredDispatcher) -> None:
        """Read the state of `dispatcher` at every scrape, and count the requests that it runs."""
        self._state, dispatcher.metrics = dispatcher.state, self

    def answered(self, model: str, version: str, route: str, seconds: float) -> None:
        """Count a request that a route answered."""
        self._seconds.labels(*self._labels(model, version, route)).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        if self._state is None:
            return
        state = self._state()
        yield from self._of_hops(state.hops)
        for labels in self._places.retain({(m.name, m.version) for m in state.models}):
            self._seconds.remove(*labels)
        yield from self._of_models(state.models)
        yield from self._seconds.collect()

    def _labels(self, model: str, version: str, route: str) -> RouteLabels:
        # Anybody may read metrics.
        if not self._settings.tells_of(model):
            return RouteLabels(OTHER, OTHER, OTHER)
        return self._places.of(model, version, route)

    def _of_hops(self, hops: Iterable[HopState]) -> Iterator[Metric]:
        named = [((hop_label(self._settings, hop.name),), hop) for hop in hops]
        breakers = GaugeMetricFamily(
            "isthmus_breaker_state", "1 for the state of a hop's circuit breaker.", labels=["hop", "state"]
        )
        for labels, hop in named:
            for state in BREAKER_STATES:
                breakers.add_metric([*labels, state], float(hop.breaker == state))
        yield breakers
        for name, (help, count) in _HOP_COUNTERS.items():
            yield _counter(f"isthmus_{name}", help, ("hop",), ((labels, count(hop)) for labels, hop in named))
        for name, (help, read) in _HOP_GAUGES.items():
            yield _gauge(f"isthmus_{name}", help, ("hop",), ((labels, read(hop)) for labels, hop in named))

    def _of_models(self, models: Iterable[ModelState]) -> Iterator[Metric]:
        named = [(self._labels(m.name, m.version, c.name), c) for m in models for c in m.candidates]
        for name, (help, count) in _ROUTE_COUNTERS.items():
            yield _counter(f"isthmus_route_{name}", help, _ROUTE, ((labels, count(c)) for labels, c in named))
        fallbacks = (((*labels, error), n) for labels, c in named for error, n in c.fallbacks.items())
        yield _counter(
            "isthmus_route_fallbacks", "Requests that left a route, by class of error.", (*_ROUTE, "error"), fallbacks
        )
        own = [(labels, c) for labels, c in named if not labels.is_shared]
        for name, (help, read) in _ROUTE_GAUGES.items():
            yield _gauge(f"isthmus_route_{name}", help, _ROUTE, ((labels, read(c)) for labels, c in own))
        switches = ((self._labels(m.name, m.version, m.preferred)[:2], m.switches) for m in models)
        yield _counter("isthmus_route_switches", "Changes of the preferred route.", _ROUTE[:2], switches)


class MeasuredDispatcher(Dispatcher):
    """A dispatcher whose requests are counted with their seconds and route, and traced where the function is."""

    metrics: RoutingMetrics | None = None
    tracing: Tracing | None = None

    def run(
        self,
        model: ServedModel,
        context: Context,
        pin: str,
        attempt: Attempt,
        *,
        exact_only: bool = False,
        may_exit: bool = True,
    ) -> Result:
        """See `Dispatcher.run`."""
        if self.tracing is not None:
            attempt = self.tracing.attempt(model, context, attempt)
        began = time.perf_counter()
        result = super().run(model, context, pin, attempt, exact_only=exact_only, may_exit=may_exit)
        if self.metrics is not None and result.route:  # the page's comparisons have none
            self.metrics.answered(model.name, model.version, result.route, time.perf_counter() - began)
        return result


_HOP_COUNTERS: Mapping[str, tuple[str, Callable[[HopState], float]]] = {
    "breaker_openings": ("How often a hop's circuit breaker opened.", lambda hop: hop.opened),
    "hop_calls": ("Calls of a hop, those of closer looks and checks included.", lambda hop: hop.calls),
    "hop_failures": ("Calls in which a hop gave no response, or none that makes sense.", lambda hop: hop.failures),
    "hop_hedged": ("Slow calls that were made a second time elsewhere.", lambda hop: hop.hedged),
    "hop_hedges_won": ("Of these, the ones whose second call was answered first.", lambda hop: hop.hedges_won),
}
_HOP_GAUGES: Mapping[str, tuple[str, Callable[[HopState], float | None]]] = {
    "hop_in_flight": ("Calls of a hop under way.", lambda hop: hop.in_flight),
    "link_rtt_seconds": ("Estimated round trip to a hop.", lambda hop: hop.rtt_s),
    "link_up_bytes_per_second": ("Estimated bandwidth to a hop.", lambda hop: hop.up_bytes_s),
    "link_down_bytes_per_second": ("Estimated bandwidth from a hop.", lambda hop: hop.down_bytes_s),
    "link_age_seconds": ("Age of the estimate of a hop's link.", lambda hop: hop.age_s),
}
_ROUTE_COUNTERS: Mapping[str, tuple[str, Callable[[CandidateState], float]]] = {
    "requests": ("Requests that a route was chosen for.", lambda c: c.requests),
    "failures": ("Requests that failed along a route.", lambda c: c.failures),
}
_ROUTE_GAUGES: Mapping[str, tuple[str, Callable[[CandidateState], float | None]]] = {
    "share": ("Share of a version's requests that take a route.", lambda c: c.share),
    "expected_seconds": ("Seconds of a request along a route, as expected now.", lambda c: c.expected_s),
    "planned_seconds": ("Seconds of a request along a route, as planned.", lambda c: c.planned_s),
    "drift": ("Live over planned seconds of a route's segments, wherever they run.", lambda c: c.drift),
    "loaded": ("Whether every hop has a route's segments in memory.", lambda c: c.loaded),
    "exit_share": (
        "Share of a route's latest requests that ended at its exit.",
        lambda c: None if c.exit is None else c.exit.share,
    ),
    "degraded": ("Whether a route is further from the model than the plan's choice.", lambda c: bool(c.degraded)),
}


def _counter(
    name: str, help: str, labels: Collection[str], values: Iterable[tuple[tuple[str, ...], float]]
) -> CounterMetricFamily:
    """A counter; those that share labels are added up."""
    sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for key, value in values:
        sums[key] += value
    family = CounterMetricFamily(name, help, labels=list(labels))
    for key, value in sums.items():
        family.add_metric(list(key), value)
    return family


def _gauge(
    name: str, help: str, labels: Collection[str], values: Iterable[tuple[Collection[str], float | None]]
) -> GaugeMetricFamily:
    """A gauge, absent where nothing was seen yet."""
    family = GaugeMetricFamily(name, help, labels=list(labels))
    for key, value in values:
        if value is not None:
            family.add_metric(list(key), float(value))
    return family
