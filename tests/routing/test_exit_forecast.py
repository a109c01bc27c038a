"""Forecasts of routes with an exit: what lies behind it counts for requests that get there, and is learnt of these."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec import structs

from isthmus.artifacts.plan import Terms
from isthmus.context import Context
from isthmus.pipeline import ExitBranch, Route, plan_route
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.choice import RouteChooser
from isthmus.routing.demand import Demand
from isthmus.routing.estimates import Estimates
from isthmus.routing.exit_guard import limit_of
from isthmus.routing.fallback import FLOOR_S, MAX_MULTIPLE, limited
from isthmus.routing.forecast import Expectation, forecast, plan_drift
from isthmus.routing.links import LinkEstimate
from isthmus.routing.outstanding import Busy, Outstanding
from support.bundles import Published, photos  # noqa: F401 - a fixture
from support.exits import gate_of
from support.hops import Echo

WHOLE = Terms(0.001, 0.02, 0.002, 0.0005, 0.04, 0.03, 0.001, 0.0002, 0.01, 0.003)
"""Of a request that does not exit."""
SHARE = 0.8


def planned() -> Terms:
    """The terms as a plan has them: those behind the exit by the share that gets there."""
    behind = ("pack", "up", "rtt", "down", "unpack", "cloud_run", "cloud_hop")
    return structs.replace(WHOLE, **{name: (1 - SHARE) * getattr(WHOLE, name) for name in behind})


TERMS = planned()
DEMAND = Demand(TERMS.edge_busy, (1 - SHARE) * 40_000, (1 - SHARE) * 1000, TERMS.cloud_busy, 1 - SHARE)


class Beside(Echo):
    """A function beside the router."""

    name = "beside"


@pytest.fixture
def route(photos: Published) -> Route:  # noqa: F811
    plain = plan_route(photos.digest, photos.bundle, (Beside({}), Echo({})), ("3",))
    # The branch never runs here: any segment stands for it.
    return replace(plain, exit=ExitBranch(photos.bundle.segment("..3"), gate_of(0.5)))


def gated(route: Route, name: str = "split-3-exit") -> RouteCandidate:
    return RouteCandidate(route, name=name, demand=DEMAND, planned_s=TERMS.total, terms=TERMS, exit_share=SHARE)


def met(estimates: Estimates, candidate: RouteCandidate, count: int, *, is_early: bool) -> None:
    for _ in range(count):
        estimates.met_exit(candidate.route.digest, candidate.name, candidate.exit_share, is_early=is_early)


def test_without_live_estimates_a_forecast_is_the_plans_mean_and_a_late_request_takes_all_of_it(route: Route) -> None:
    (one,) = forecast([gated(route)], Estimates())
    assert one.seconds == pytest.approx(TERMS.total)
    assert one.seconds + one.further_s == pytest.approx(WHOLE.total)
    assert one.busy.uplink == pytest.approx(TERMS.up)
    assert one.demand.up_bytes == pytest.approx(DEMAND.up_bytes)


def test_a_candidate_whose_exit_is_off_is_forecast_as_the_whole(route: Route) -> None:
    (one,) = forecast([replace(gated(route), route=route.full())], Estimates())
    assert one.seconds == pytest.approx(WHOLE.total)
    assert one.further_s == 0.0
    assert one.demand.up_bytes == pytest.approx(40_000)


def test_the_live_share_weighs_what_lies_behind_the_exit(route: Route) -> None:
    candidate, estimates = gated(route), Estimates()
    met(estimates, candidate, 1000, is_early=False)
    (late,) = forecast([candidate], estimates)
    assert late.seconds == pytest.approx(WHOLE.total, rel=1e-3)
    assert late.demand.up_bytes == pytest.approx(40_000, rel=1e-3)
    met(estimates, candidate, 1000, is_early=True)
    (early,) = forecast([candidate], estimates)
    assert early.seconds == pytest.approx(WHOLE.preprocess + WHOLE.edge_run + WHOLE.edge_hop, rel=1e-3)
    assert early.busy.cloud == pytest.approx(0, abs=1e-4)
    assert early.seconds + early.further_s == pytest.approx(WHOLE.total)


def test_the_share_follows_a_change_and_begins_with_the_plans(route: Route) -> None:
    candidate, estimates = gated(route), Estimates()
    key = (route.digest, candidate.name, SHARE)
    assert estimates.exit_share(*key) == SHARE
    met(estimates, candidate, 8, is_early=False)
    assert estimates.exit_share(*key) == pytest.approx(SHARE / 2)
    met(estimates, candidate, 1000, is_early=False)
    met(estimates, candidate, 64, is_early=True)
    assert 0.6 < estimates.exit_share(*key) < 0.7


def test_answers_to_callers_who_asked_for_the_full_model_say_nothing_of_the_share(route: Route) -> None:
    candidate, estimates = gated(route), Estimates()
    key = (route.digest, candidate.name, SHARE)
    estimates.answered(*key[:2], 0.1, None, 0.001)
    assert estimates.exit_share(*key) == SHARE
    met(estimates, candidate, 8, is_early=False)
    assert estimates.exit_share(*key) == pytest.approx(SHARE / 2)


class Known(Estimates):
    """Estimates with a link and segments that a test sets."""

    def link(self, hop: str) -> LinkEstimate:
        return LinkEstimate(0.08, 100_000, 200_000) if hop == "echo" else LinkEstimate()

    def busy_s(self, hop: str, bundle: str, segment: str) -> float | None:
        return {"..3": 0.02, "3..": 0.05}[segment]

    def run_s(self, hop: str, bundle: str, segment: str) -> float | None:
        return self.busy_s(hop, bundle, segment)


def test_live_estimates_are_of_requests_that_got_there(route: Route) -> None:
    """A call that takes 80 ms of round trip, 400 ms of upload and 50 ms in the cloud, by a fifth of the requests."""
    candidate = gated(route)
    (one,) = forecast([candidate], Known())
    assert one.busy.cloud == pytest.approx(0.2 * 0.05)
    assert one.busy.uplink == pytest.approx(0.2 * 0.4)
    behind = 0.2 * (WHOLE.pack + 0.4 + 0.08 + 0.05 + 0.005)
    assert one.seconds == pytest.approx(WHOLE.preprocess + WHOLE.edge_hop + 0.02 + behind)
    # Live over planned: 20 + 50 ms, of which the plan counted a fifth of the second.
    assert plan_drift(candidate, Known()) == pytest.approx((0.02 + 0.2 * 0.05) / (TERMS.edge_run + TERMS.cloud_run))


def test_codecs_are_timed_by_requests_that_encode(route: Route) -> None:
    estimates = Estimates()
    for encode_s in (0.004, None, None, None):
        estimates.answered(route.digest, "split-3-exit", 0.05, 0.001, encode_s)
    assert estimates.encode_s(route.digest, "split-3-exit") == 0.004


def test_a_deadline_allows_for_a_request_that_passes_the_exit(route: Route) -> None:
    """A mean of 60 ms, of which one in ten takes 510: given up after four times the mean none of these would end."""
    split, edge = gated(route), RouteCandidate(replace(route.full(), hops=route.hops[:1] * 2), name="edge")
    chooser = RouteChooser((split, edge), Outstanding())
    chooser.refresh([Expectation(0.06, Demand(), Busy(0.01), 0.45), Expectation(0.2, Demand(), Busy(0.2))])
    assert chooser.longest_s(split) == pytest.approx(0.51)
    assert chooser.choose((split, edge), 1.0) is split
    assert chooser.choose((split, edge), 0.3) is edge
    context = Context.from_headers({}, longest_s=30.0)
    limits = limited(context, split, lambda hop: [edge] if hop == "echo" else [], chooser.longest_s).limits
    assert set(limits) == {"echo"}
    assert limits["echo"].remaining() == pytest.approx(MAX_MULTIPLE * 0.51 + FLOOR_S, abs=1)


def test_a_hop_behind_an_exit_that_answers_anyway_is_given_up_early_and_the_head_is_not(route: Route) -> None:
    split = replace(gated(route), answers_unsure=True)
    context = Context.from_headers({}, longest_s=30.0)
    limits = limited(context, split, lambda hop: [], lambda _: 0.5).limits
    assert set(limits) == {"echo"}
    assert limits["echo"].remaining() == pytest.approx(MAX_MULTIPLE * 0.5 + FLOOR_S, abs=1)
    assert limited(context, split, lambda hop: [], lambda _: None).limits["echo"].remaining() == pytest.approx(
        15, abs=0.1
    )
    # A caller who asks for the full model waits for it, as on a route without an exit.
    for other in (gated(route), split.full()):
        assert limited(context, other, lambda hop: [], lambda _: 0.5).limits == {}


def test_a_tail_behind_an_exit_is_not_slow_because_fewer_requests_exit(route: Route) -> None:
    """Twice the planned seconds a request are a slow function only where no more requests get there."""
    split, edge = gated(route), RouteCandidate(route.full(), name="edge")
    found = []
    for behind in (1.0, 5.0):
        chooser = RouteChooser((split, edge), Outstanding())
        slow = Expectation(1.0, DEMAND, Busy(0.01, 0, 0, 4 * DEMAND.cloud_s), behind=behind)
        chooser.refresh([slow, Expectation(0.1, Demand(), Busy(0.1))])
        found.append(chooser._exploration._left)
    assert found == [0, -1]


def test_a_gate_of_accuracy_allows_as_many_other_predictions_as_held_out_inputs_had() -> None:
    assert limit_of(gate_of(0.5, limit=0.01)) == 0.01
    accuracy = gate_of(0.5, risk="accuracy", limit=0.01, differing=30)
    assert 0.03 < limit_of(accuracy) < 0.05
    assert limit_of(gate_of(0.5, risk="accuracy", limit=0.1, differing=30)) == 0.1
    assert limit_of(gate_of(0.5, risk="accuracy", limit=0.01, inputs=0, exiting=0, failing=0)) == 1.0
