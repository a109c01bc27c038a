"""Forecasts: the plan's terms, corrected by live estimates."""

from __future__ import annotations

import pytest

from isthmus.artifacts.plan import Terms
from isthmus.pipeline import LocalHop, Route, plan_route
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.demand import Demand
from isthmus.routing.estimates import Estimates
from isthmus.routing.forecast import forecast
from isthmus.routing.links import LinkEstimate
from support.bundles import Published, photos  # noqa: F401 - a fixture
from support.hops import Echo

TERMS = Terms(0.001, 0.02, 0.002, 0.0005, 0.04, 0.03, 0.001, 0.0002, 0.01, 0.003)
DEMAND = Demand(TERMS.edge_busy, 40_000, 1000, TERMS.cloud_busy, 1)


class Known(Estimates):
    """Estimates that a test sets."""

    def __init__(self, link: LinkEstimate | None = None, **seconds: float) -> None:
        super().__init__()
        self.known, self.seconds = link or LinkEstimate(), seconds

    def link(self, hop: str) -> LinkEstimate:
        return self.known if hop == "echo" else LinkEstimate()

    def run_s(self, hop: str, bundle: str, segment: str) -> float | None:
        return self.seconds.get(segment)

    def busy_s(self, hop: str, bundle: str, segment: str) -> float | None:
        return self.seconds.get(segment)


class Beside(Echo):
    """A function beside the router."""

    name = "beside"


@pytest.fixture
def route(photos: Published) -> Route:  # noqa: F811
    return plan_route(photos.digest, photos.bundle, (Beside({}), Echo({})), ("3",))


def split(route: Route, name: str = "split-3") -> RouteCandidate:
    return RouteCandidate(route, name=name, demand=DEMAND, planned_s=TERMS.total, terms=TERMS)


def test_without_live_estimates_a_forecast_is_the_plans(route: Route) -> None:
    (one,) = forecast([split(route)], Estimates())
    assert one.seconds == pytest.approx(TERMS.total)
    assert one.busy == pytest.approx((TERMS.edge_busy + TERMS.edge_hop, 0.04, 0.001, TERMS.cloud_busy))


def test_bytes_take_their_time_on_the_link_as_it_is(route: Route) -> None:
    link = LinkEstimate(rtt_s=0.08, up_bytes_s=100_000, down_bytes_s=200_000)
    (one,) = forecast([split(route)], Known(link))
    assert (one.busy.uplink, one.busy.downlink) == pytest.approx((0.4, 0.005))
    edge, cloud = TERMS.edge_busy + TERMS.edge_hop, TERMS.cloud_busy
    assert one.seconds == pytest.approx(edge + 0.4 + 0.08 + cloud + 0.005)


def test_a_lower_bound_of_the_rate_makes_no_transfer_slower(route: Route) -> None:
    (slow,) = forecast([split(route)], Known(LinkEstimate(0.03, 1000, is_bound=True)))
    assert slow.busy.uplink == pytest.approx(TERMS.up)
    (fast,) = forecast([split(route)], Known(LinkEstimate(0.03, 1e7, is_bound=True)))
    assert fast.busy.uplink == pytest.approx(0.004)


def test_segments_that_never_ran_drift_as_the_others_of_their_hop_do(photos: Published, route: Route) -> None:  # noqa: F811
    head, tail = (str(s.id) for s in route.segments)
    ran = Known(**{head: 2 * TERMS.edge_run, tail: 3 * TERMS.cloud_run})
    other = plan_route(photos.digest, photos.bundle, route.hops, ("1",))
    one, drifted = forecast([split(route), split(other, "split-1")], ran)
    assert one.busy.cloud == pytest.approx(3 * TERMS.cloud_run)
    assert drifted.busy.cloud == pytest.approx(TERMS.unpack + 3 * TERMS.cloud_run)
    rest = TERMS.preprocess + TERMS.pack + TERMS.edge_hop
    assert drifted.busy.edge == pytest.approx(rest + 2 * TERMS.edge_run)


def test_segments_in_the_routers_own_process_are_called_without_http(photos: Published) -> None:  # noqa: F811
    local = plan_route(photos.digest, photos.bundle, (LocalHop(None), Echo({})), ("3",))  # type: ignore[arg-type]
    (one,) = forecast([split(local)], Estimates())
    assert one.busy.edge == pytest.approx(TERMS.edge_busy)


def test_frames_to_a_function_beside_the_router_take_its_rate(photos: Published, route: Route) -> None:  # noqa: F811
    near = Known()
    near.link = lambda hop: LinkEstimate(0.001, 1e5) if hop == "beside" else LinkEstimate()  # type: ignore[method-assign]
    (one,) = forecast([split(route)], near)
    assert one.busy.edge == pytest.approx(TERMS.edge_busy + 0.001 + 3 * 8 * 8 * 4 / 1e5)
