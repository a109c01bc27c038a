"""Metrics of routing: values of the router's state, labels that stay bounded, and seconds by route."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from isthmus.routing.state import CandidateState, HopState, ModelState, RouterState
from isthmus.serving import create_router_app
from isthmus.serving.routing_metrics import MAX_ROUTES, MAX_VERSIONS, MeasuredDispatcher, RoutingMetrics
from support.bundles import Published, metrics, photo, ready, router_settings
from support.bundles import photos as photos

Measured = Callable[..., tuple[Any, CollectorRegistry]]
EDGE, CLOUD = "local", "http://10.0.0.7:8080/function/cloud-tail"


class Dispatched(MeasuredDispatcher):
    """A dispatcher in a state that a test gives."""

    def __init__(self, given: RouterState) -> None:
        self.given = given

    def state(self) -> RouterState:
        return self.given


def model(name: str, routes: int = 1, **given: float) -> ModelState:
    candidates = tuple(CandidateState(f"r{i}", ("..",), requests=1) for i in range(routes))
    return ModelState(name, "1", "r0", 2, candidates, **given)


@pytest.fixture
def measured(photos: Published, tmp_path: Path) -> Measured:
    def measure(given: RouterState, *, exposed: bool = False) -> tuple[Dispatched, CollectorRegistry]:
        dispatcher = Dispatched(given)
        routing = RoutingMetrics(router_settings(photos, tmp_path, (EDGE, CLOUD), expose_details=exposed))
        routing.measure(dispatcher)
        registry = CollectorRegistry()
        registry.register(routing)
        return dispatcher, registry

    return measure


def test_each_fact_of_the_state_is_a_metric_and_hops_are_named_by_place(measured: Measured) -> None:
    hop = HopState(CLOUD, "open", 3, 20, 5, rtt_s=0.02, up_bytes_s=5e5, opened=2, hedged=4)
    seen = {"expected_s": 0.2, "planned_s": 0.1, "drift": 1.5, "fallbacks": {"HopTimeout": 6}}
    edge = CandidateState("edge-only", ("..",), 0.75, requests=30, failures=1, degraded="int8", loaded=False, **seen)
    state = RouterState((HopState(EDGE), hop), (ModelState("photos", "7", "edge-only", 9, (edge,)),))
    _, registry = measured(state)
    at = {"hop": "hop1"}
    route = {"model": "photos", "version": "7", "route": "edge-only"}

    def value(name: str, labels: Mapping[str, str]) -> float | None:
        return registry.get_sample_value(f"isthmus_{name}", dict(labels))

    assert [value("breaker_state", at | {"state": s}) for s in ("closed", "half-open", "open")] == [0, 0, 1]
    assert value("breaker_state", {"hop": "local", "state": "closed"}) == 1
    hop_values = [value(f"{n}_total", at) for n in ("breaker_openings", "hop_calls", "hop_failures", "hop_hedged")]
    assert hop_values == [2, 20, 5, 4]
    assert (value("link_rtt_seconds", at), value("link_up_bytes_per_second", at)) == (0.02, 5e5)
    # Nothing was received yet: no value is better than a wrong one.
    assert value("link_down_bytes_per_second", at) is None
    gauges = ("share", "expected_seconds", "planned_seconds", "drift", "loaded", "degraded")
    assert [value(f"route_{name}", route) for name in gauges] == [0.75, 0.2, 0.1, 1.5, 0, 1]
    assert [value(f"route_{name}_total", route) for name in ("requests", "failures")] == [30, 1]
    assert value("route_fallbacks_total", route | {"error": "HopTimeout"}) == 6
    assert value("route_switches_total", {"model": "photos", "version": "7"}) == 9
    assert "10.0.0.7" not in generate_latest(registry).decode()


def test_versions_and_routes_beyond_the_bound_share_series_and_a_place_is_freed(measured: Measured) -> None:
    models = tuple(model(f"m{i}", MAX_ROUTES + 3) for i in range(3 * MAX_VERSIONS))
    dispatcher, registry = measured(RouterState((), models), exposed=True)
    assert dispatcher.metrics is not None
    for each in models:
        dispatcher.metrics.answered(each.name, "1", "r0", 0.1)

    def counted(name: str) -> dict[tuple[str, ...], float]:
        samples = [s for family in registry.collect() for s in family.samples if s.name == f"isthmus_{name}"]
        return {tuple(s.labels.values()): s.value for s in samples}

    requests = counted("route_requests_total")
    assert len(requests) == MAX_VERSIONS * (MAX_ROUTES + 1) + 1
    # None is lost: they are counted together.
    assert sum(requests.values()) == 3 * MAX_VERSIONS * (MAX_ROUTES + 3)
    assert len(counted("route_share")) == MAX_VERSIONS * MAX_ROUTES
    assert sum(counted("route_seconds_count").values()) == 3 * MAX_VERSIONS
    assert len(counted("route_seconds_count")) == MAX_VERSIONS + 1
    late = models[-1]
    assert ("m0", "1", "r0") in requests
    assert (late.name, "1", "r0") not in requests
    dispatcher.given = RouterState((), (late,))
    assert list(counted("route_switches_total")) == [(late.name, "1")]
    assert set(counted("route_seconds_count")) == {("other", "other", "other")}


def test_models_beside_the_default_have_no_name_in_metrics_that_anybody_may_read(measured: Measured) -> None:
    state = RouterState((), (model("photos"), model("secret", 2)))
    dispatcher, registry = measured(state)
    assert dispatcher.metrics is not None
    dispatcher.metrics.answered("secret", "1", "r0", 0.1)
    text = generate_latest(registry).decode()
    assert "secret" not in text
    other = {"model": "other", "version": "other", "route": "other"}
    assert registry.get_sample_value("isthmus_route_requests_total", other) == 2
    assert "secret" in generate_latest(measured(state, exposed=True)[1]).decode()


def test_a_router_counts_the_seconds_of_its_requests_by_route(photos: Published, tmp_path: Path) -> None:
    client = ready(create_router_app(router_settings(photos, tmp_path, (EDGE,))).test_client())
    for _ in range(3):
        assert client.post("/", data=photo()).status_code == 200
    exposed = metrics(client)
    labels = (("model", photos.bundle.name), ("route", "default"), ("version", "1"))
    assert exposed["isthmus_route_seconds_count", labels] == 3
    assert exposed["isthmus_breaker_state", (("hop", "local"), ("state", "closed"))] == 1


def test_callers_cannot_add_series(photos: Published, tmp_path: Path) -> None:
    client = ready(create_router_app(router_settings(photos, tmp_path, (EDGE,))).test_client())

    def lie(i: int) -> None:
        odd = f"odd{i}" + "x" * (i % 50)
        client.post("/", data=photo(), headers={"Isthmus-Route": odd, "X-Call-Id": odd})
        client.post("/", data=photo(), headers={"traceparent": odd, "X-Timeout": odd})
        client.post(f"/?model={odd}", data=photo())
        client.post(f"/v2/models/{odd}/versions/{odd}/infer", json={"inputs": []})
        client.open(f"/{odd}", method=f"ODD{i}")
        client.get(f"/{odd}")

    lie(0)
    client.get("/metrics")  # whose own series a scrape before has not
    series = set(metrics(client))
    for i in range(1, 40):
        lie(i)
    assert set(metrics(client)) == series
    assert "odd" not in client.get("/metrics").get_data(as_text=True)
