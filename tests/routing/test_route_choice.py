"""The choice of a route: hysteresis, outstanding work, exploration; with a clock that the tests set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from isthmus.artifacts.plan import Terms
from isthmus.pipeline import Route
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.choice import EXPLORED_OF, HOLD_S, KNOWN_S, RouteChooser
from isthmus.routing.demand import Demand
from isthmus.routing.forecast import Expectation
from isthmus.routing.outstanding import Busy, Outstanding, note_call

LEFT_S = 10.0


class FakeRoute:
    """Hops by name; the router's own is near."""

    segments: tuple[Any, ...] = ()

    def __init__(self, *hops: str) -> None:
        self.hops = tuple(type("Hop", (), {"name": name})() for name in hops)


def candidate(name: str, *hops: str, degradation: str = "") -> RouteCandidate:
    route = cast(Route, FakeRoute(*(hops or ("edge", "cloud"))))
    return RouteCandidate(route, name=name, planned_s=0.1, degradation=degradation)


EDGE, CLOUD, SPLIT = candidate("edge", "edge"), candidate("cloud", "cloud"), candidate("split")
INT8 = candidate("int8", "edge", degradation="96% agree")
ALL = (SPLIT, EDGE, CLOUD, INT8)
# Busy seconds of edge, uplink, downlink, cloud; the rest of the seconds is the round trip.
BUSY = {"split": Busy(0.03, 0.02, 0, 0.01), "edge": Busy(0.1), "cloud": Busy(0, 0.09, 0, 0.02), "int8": Busy(0.04)}


def expected(**seconds: float) -> list[Expectation]:
    known = {"split": 0.08, "edge": 0.1, "cloud": 0.12, "int8": 0.04} | seconds
    return [Expectation(known[c.name], Demand(), BUSY[c.name]) for c in ALL]


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Trial:
    """A chooser with its clock and its account of outstanding work."""

    def __init__(self, candidates: Sequence[RouteCandidate] = ALL) -> None:
        self.clock, self.outstanding = Clock(), Outstanding()
        self.chooser = RouteChooser(candidates, self.outstanding, self.clock)

    def refresh(self, after_s: float = 0.1, **seconds: float) -> str:
        """Forecasts after so many seconds; the name of the preferred route then."""
        self.clock.now += after_s
        self.chooser.refresh(expected(**seconds))
        return self.chooser.preferred.name

    def choose(self, candidates: Sequence[RouteCandidate] = ALL, left_s: float = LEFT_S) -> str:
        return self.chooser.choose(candidates, left_s).name


@pytest.fixture
def trial() -> Trial:
    made = Trial()
    made.refresh()
    return made


def test_before_any_forecast_the_plans_choice_is_taken() -> None:
    assert Trial().choose() == "split"


def test_a_large_gain_switches_at_once(trial: Trial) -> None:
    assert trial.refresh(split=0.5) == "edge"
    assert trial.chooser.switches == 1


def test_a_small_gain_switches_once_it_has_held(trial: Trial) -> None:
    assert trial.refresh(split=0.125) == "split"
    assert trial.refresh(HOLD_S / 2, split=0.125) == "split"
    assert trial.refresh(HOLD_S, split=0.125) == "edge"


def test_a_gain_that_comes_and_goes_switches_nothing(trial: Trial) -> None:
    rng = np.random.default_rng(3)
    for _ in range(500):
        trial.refresh(split=0.08 * rng.uniform(0.8, 1.2), edge=0.085 * rng.uniform(0.8, 1.2))
    assert trial.chooser.switches == 0


def test_a_gain_below_a_tenth_switches_nothing(trial: Trial) -> None:
    for _ in range(100):
        trial.refresh(split=0.105)
    assert trial.chooser.switches == 0


def test_a_step_of_the_link_takes_at_most_two_switches(trial: Trial) -> None:
    # The estimate of the rate falls in steps, as transfers pass.
    for up_s in (0.02, 0.05, 0.1, 0.2, 0.3, *[0.4] * 50):
        trial.refresh(split=0.06 + up_s, cloud=0.03 + 3 * up_s)
    assert trial.chooser.preferred.name == "edge"
    assert trial.chooser.switches <= 2


def test_a_degraded_route_is_neither_preferred_nor_chosen(trial: Trial) -> None:
    for _ in range(50):
        assert trial.refresh(int8=0.001) == "split"
        assert trial.choose() != "int8"


def test_a_degraded_route_is_taken_where_no_exact_one_answers(trial: Trial) -> None:
    assert trial.choose((INT8,)) == "int8"
    assert trial.choose((EDGE, INT8)) == "edge"


def test_outstanding_work_sends_requests_along_other_routes(trial: Trial) -> None:
    taken = []
    for _ in range(12):
        chosen = trial.chooser.choose(ALL, LEFT_S)
        trial.chooser.begin(chosen).__enter__()
        taken.append(chosen.name)
    assert taken[0] == "split"
    assert {"split", "edge", "cloud"} == set(taken)


def test_the_preferred_route_is_taken_again_once_the_work_is_done(trial: Trial) -> None:
    tickets = [trial.chooser.begin(SPLIT) for _ in range(5)]
    for ticket in tickets:
        ticket.__enter__()
    assert trial.choose() != "split"
    for ticket in reversed(tickets):
        ticket.__exit__()
    assert trial.outstanding.seconds() == Busy()
    assert trial.choose() == "split"


def test_the_edge_is_free_once_the_far_hop_is_called(trial: Trial) -> None:
    with trial.chooser.begin(SPLIT):
        note_call("edge")
        assert trial.outstanding.seconds().edge == pytest.approx(0.03)
        note_call("cloud")
        assert trial.outstanding.seconds().edge == pytest.approx(0)
        assert trial.outstanding.seconds().cloud == pytest.approx(0.01)
    with trial.chooser.begin(EDGE):
        note_call("edge")  # whose work begins with the call
        assert trial.outstanding.seconds().edge == pytest.approx(0.1)


def explored(trial: Trial, requests: int, left_s: float = LEFT_S) -> Counter[str]:
    taken: Counter[str] = Counter()
    for _ in range(requests):
        trial.clock.now += 0.1
        chosen = trial.chooser.choose(ALL, left_s)
        with trial.chooser.begin(chosen):
            taken[chosen.name] += 1
    return taken


def test_other_routes_are_explored_in_idle_time(trial: Trial) -> None:
    requests = 20 * EXPLORED_OF
    taken = explored(trial, requests)
    assert min(taken["edge"], taken["cloud"]) >= 5
    assert taken["int8"] == 0
    assert taken["split"] >= requests * (1 - 1.1 / EXPLORED_OF)


def test_a_route_that_would_leave_no_time_is_not_explored(trial: Trial) -> None:
    trial.refresh(cloud=0.3)
    assert explored(trial, 10 * EXPLORED_OF, left_s=0.4)["cloud"] == 0


def test_nothing_is_explored_while_work_is_outstanding(trial: Trial) -> None:
    trial.refresh(edge=0.2)
    with trial.chooser.begin(SPLIT):
        note_call("cloud")
        assert set(explored(trial, 3 * EXPLORED_OF)) == {"split"}


def test_a_route_that_was_just_taken_is_not_explored(trial: Trial) -> None:
    trial.chooser.usage.took(1)
    trial.chooser.usage.took(2)
    for _ in range(2 * EXPLORED_OF):
        trial.clock.now += KNOWN_S / (3 * EXPLORED_OF)
        assert trial.choose() == "split"


def test_a_state_has_shares_rates_and_switches(trial: Trial) -> None:
    for _ in range(300):
        trial.clock.now += 0.1
        with trial.chooser.begin(EDGE):
            pass
    trial.chooser.failed(EDGE)
    state = trial.chooser.state("photos", "3")
    by_name = {c.name: c for c in state.candidates}
    assert (state.preferred, state.switches) == ("split", 0)
    assert state.rate == pytest.approx(10, rel=0.1)
    assert (by_name["edge"].share, by_name["edge"].requests, by_name["edge"].failures) == (1.0, 300, 1)
    assert by_name["split"].expected_s == pytest.approx(0.08)


def test_a_clock_that_stands_still_or_jumps_back_breaks_nothing(trial: Trial) -> None:
    for by in (0.0, -50.0, 0.0, 1e6):
        trial.clock.now += by
        trial.refresh(0.0, split=0.2)
        with trial.chooser.begin(trial.chooser.choose(ALL, LEFT_S)):
            pass
        assert trial.chooser.state("photos", "1").rate >= 0


def test_a_choice_leaves_candidates_without_plan_alone() -> None:
    only = RouteCandidate(cast(Route, FakeRoute("edge")), name="default", terms=Terms())
    chooser = RouteChooser((only,), Outstanding())
    assert chooser.choose((only,), LEFT_S) is only
    assert chooser.expected_s(only) is None
