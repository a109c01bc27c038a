"""The choice of a route: hysteresis, outstanding work, exploration; with a clock that the tests set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from isthmus.errors import Overloaded
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.choice import HOLD_S, ONE_EACH, RouteChooser
from isthmus.routing.demand import Demand
from isthmus.routing.exploration import EXPLORED_OF, KNOWN_REQUESTS, KNOWN_S, MAX_REPEATED, OFTEN_EXPLORED_OF
from isthmus.routing.forecast import Expectation
from isthmus.routing.outstanding import Busy, Outstanding, note_call
from isthmus.routing.spreading import Spreading
from support.route_simulation import Simulation, World, fake_candidate

LEFT_S = 10.0


EDGE, CLOUD, SPLIT = fake_candidate("edge", "edge"), fake_candidate("cloud", "cloud"), fake_candidate("split")
INT8 = fake_candidate("int8", "edge", degradation="96% agree")
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
        for i in range(len(candidates) * KNOWN_REQUESTS):
            self.chooser.usage.took(i % len(candidates))
        self.clock.now += 1000.0

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


def loaded(trial: Trial, requests: int, every_s: float, **seconds: float) -> Counter[str]:
    """The routes of so many requests, `every_s` apart, with new forecasts ten times a second."""
    taken: Counter[str] = Counter()
    refreshed_at = trial.clock.now
    for _ in range(requests):
        if trial.clock.now - refreshed_at >= 0.1:
            refreshed_at = trial.clock.now
            trial.refresh(0.0, **seconds)
        chosen = trial.chooser.choose(ALL, LEFT_S)
        with trial.chooser.running(chosen):
            trial.clock.now += every_s
            taken[chosen.name] += 1
    return taken


def test_a_light_load_takes_the_preferred_route_alone(trial: Trial) -> None:
    assert loaded(trial, 60, every_s=0.2)["split"] >= 58  # the others explore


def test_a_load_beyond_the_preferred_route_is_spread_over_others(trial: Trial) -> None:
    loaded(trial, 800, every_s=0.02)  # 50 a second, of which `split` alone would take 33
    taken = loaded(trial, 400, every_s=0.02)
    assert taken["int8"] == 0
    assert taken["split"] > 200
    assert taken["cloud"] > 30


def test_a_load_that_begins_is_spread_within_a_second(trial: Trial) -> None:
    assert loaded(trial, 50, every_s=0.02)["cloud"] > 0


def test_requests_evade_a_queue_that_the_forecasts_do_not_know_yet(trial: Trial) -> None:
    assert trial.choose() == "split"
    for _ in range(6):
        trial.outstanding.begin(BUSY["edge"], "cloud")
    assert trial.choose() == "cloud"  # 0.12 s, and `split` 0.08 s behind six runs at the edge


def test_requests_are_no_longer_spread_once_the_load_is_gone(trial: Trial) -> None:
    loaded(trial, 400, every_s=0.02)
    loaded(trial, 100, every_s=0.3)
    assert loaded(trial, 60, every_s=0.3)["split"] >= 57  # the others explore
    assert trial.chooser.switches == 0


def test_of_spread_routes_those_that_answer_take_all_turns(trial: Trial) -> None:
    loaded(trial, 400, every_s=0.02)
    taken = Counter(trial.choose((SPLIT, EDGE)) for _ in range(20))
    assert set(taken) <= {"split", "edge"}
    assert trial.choose((EDGE, INT8)) == "edge"


def test_the_edge_is_free_once_the_far_hop_is_called(trial: Trial) -> None:
    with trial.chooser.running(SPLIT):
        note_call("edge")
        assert trial.outstanding.seconds().edge == pytest.approx(0.03)
        note_call("cloud")
        assert trial.outstanding.seconds().edge == pytest.approx(0)
        assert trial.outstanding.seconds().cloud == pytest.approx(0.01)
    with trial.chooser.running(EDGE):
        note_call("edge")  # whose work begins with the call
        assert trial.outstanding.seconds().edge == pytest.approx(0.1)


def explored(trial: Trial, requests: int, left_s: float = LEFT_S) -> Counter[str]:
    taken: Counter[str] = Counter()
    for _ in range(requests):
        trial.clock.now += 0.1
        chosen = trial.chooser.choose(ALL, left_s)
        with trial.chooser.running(chosen):
            trial.clock.now += trial.chooser.expected_s(chosen) or 0.0
            taken[chosen.name] += 1
    return taken


def test_other_routes_are_explored_in_idle_time(trial: Trial) -> None:
    requests = 20 * EXPLORED_OF
    taken = explored(trial, requests)
    assert min(taken["edge"], taken["cloud"]) >= 5
    assert taken["int8"] == 0
    assert taken["split"] >= requests * (1 - 2 / EXPLORED_OF)


def test_a_route_that_was_left_for_a_slow_function_is_retried_soon_and_then_ever_less() -> None:
    planned = (fake_candidate("split", demand=Demand(cloud_s=0.01)), EDGE, CLOUD, INT8)
    trial, left_for_its_link = Trial(planned), Trial(planned)
    for made, cloud_s in ((trial, 0.2), (left_for_its_link, 0.01)):
        made.refresh()
        made.clock.now += 0.1
        made.chooser.refresh([e._replace(busy=e.busy._replace(cloud=cloud_s)) for e in expected(split=0.3)])
        assert made.chooser.preferred.name == "edge"
    first, later = explored(trial, 40)["split"], explored(trial, 200)["split"]  # of 0.2 s each
    assert 3 <= first <= 12
    assert later <= 2 * first
    assert explored(left_for_its_link, 40)["split"] <= 1


def test_a_route_that_would_leave_no_time_is_not_explored(trial: Trial) -> None:
    trial.refresh(cloud=0.3)
    assert explored(trial, 10 * EXPLORED_OF, left_s=0.4)["cloud"] == 0


def test_nothing_is_explored_while_work_is_outstanding(trial: Trial) -> None:
    trial.refresh(edge=0.2)
    with trial.chooser.running(SPLIT):
        note_call("cloud")
        assert set(explored(trial, 3 * EXPLORED_OF)) == {"split"}


def test_a_route_that_was_just_taken_is_not_explored(trial: Trial) -> None:
    trial.chooser.usage.took(1)
    trial.chooser.usage.took(2)
    for _ in range(2 * EXPLORED_OF):
        trial.clock.now += KNOWN_S / (3 * EXPLORED_OF)
        assert trial.choose() == "split"


def test_a_route_of_which_little_is_known_is_explored_more_often(trial: Trial) -> None:
    new = RouteChooser(ALL, trial.outstanding, trial.clock)
    new.refresh(expected())
    for _ in range(KNOWN_REQUESTS * 3 * OFTEN_EXPLORED_OF):
        trial.clock.now += 0.1
        with new.running(new.choose(ALL, LEFT_S)):
            trial.clock.now += 0.2
    state = {c.name: c.requests for c in new.state("photos", "1").candidates}
    assert min(state["edge"], state["cloud"]) >= KNOWN_REQUESTS


def test_the_route_without_the_link_stays_known_however_slow_it_was(trial: Trial) -> None:
    trial.refresh(edge=2.0)
    assert explored(trial, 6 * OFTEN_EXPLORED_OF)["edge"] >= 1


def test_a_link_out_of_use_is_tried_every_few_requests(trial: Trial) -> None:
    trial.refresh(split=0.5, cloud=0.14)
    assert trial.chooser.preferred.name == "edge"
    taken = explored(trial, 10 * OFTEN_EXPLORED_OF)
    assert 8 <= taken["cloud"] <= 10


def test_a_link_that_could_gain_nothing_is_not_tried_so_often(trial: Trial) -> None:
    trial.refresh(split=0.5, edge=0.03)
    assert explored(trial, 10 * OFTEN_EXPLORED_OF)["cloud"] <= 2


def test_an_exploration_that_is_quicker_than_expected_is_repeated_at_once(trial: Trial) -> None:
    trial.refresh(split=0.5, cloud=0.14)
    taken = []
    for _ in range(4 * OFTEN_EXPLORED_OF):
        trial.clock.now += 0.1
        chosen = trial.chooser.choose(ALL, LEFT_S)
        with trial.chooser.running(chosen):
            trial.clock.now += 0.05
        taken.append(chosen.name)
    first = taken.index("cloud")
    assert taken[first : first + MAX_REPEATED + 2] == [*["cloud"] * (1 + MAX_REPEATED), "edge"]


def test_a_state_has_shares_rates_and_switches(trial: Trial) -> None:
    for _ in range(300):
        trial.clock.now += 0.1
        with trial.chooser.running(EDGE):
            pass
    trial.chooser.failed(EDGE)
    state = trial.chooser.state("photos", "3")
    by_name = {c.name: c for c in state.candidates}
    assert (state.preferred, state.switches) == ("split", 0)
    assert state.rate == pytest.approx(10, rel=0.1)
    assert (by_name["edge"].requests, by_name["edge"].failures) == (300 + KNOWN_REQUESTS, 1)
    assert by_name["edge"].share == pytest.approx(1)
    assert by_name["split"].expected_s == pytest.approx(0.08)


def test_a_clock_that_stands_still_or_jumps_back_breaks_nothing(trial: Trial) -> None:
    for by in (0.0, -50.0, 0.0, 1e6):
        trial.clock.now += by
        trial.refresh(0.0, split=0.2)
        with trial.chooser.running(trial.chooser.choose(ALL, LEFT_S)):
            pass
        assert trial.chooser.state("photos", "1").rate >= 0


def test_a_choice_leaves_candidates_without_plan_alone() -> None:
    only = RouteCandidate(EDGE.route, name="default")
    chooser = RouteChooser((only,), Outstanding())
    assert chooser.choose((only,), LEFT_S) is only
    assert chooser.expected_s(only) is None


WORLD = World(up_bytes_s=5e5, down_bytes_s=5e5, rtt_s=0.02)  # 4 Mbit/s
PHOTO = fake_candidate("photo", "cloud", demand=Demand(0.004, 24_400, 600, 0.022, 1))
HEAD = fake_candidate("head", demand=Demand(0.04, 16_000, 600, 0.014, 1))
WHOLE = fake_candidate("whole", "edge", demand=Demand(0.081))


def test_under_load_the_mixed_routes_answer_more_in_time_than_any_fixed_one() -> None:
    def in_time(pick: RouteCandidate | None) -> float:
        return Simulation(WORLD, (WHOLE, HEAD, PHOTO)).run(18.5, 1500, pick).within(0.25)

    mixed = in_time(None)
    assert mixed >= 0.95
    assert mixed > max(in_time(fixed) for fixed in (WHOLE, HEAD, PHOTO))


def test_a_burst_after_quiet_is_spread_before_a_queue_of_its_own_makes_it_late() -> None:
    quick_but_small = fake_candidate("whole", "edge", demand=Demand(0.031))
    far = fake_candidate("photo", "cloud", demand=Demand(0.0108, 21_100, 300, 0.0083, 1))
    simulation = Simulation(World(up_bytes_s=2e6, down_bytes_s=2e6, rtt_s=0.02), (quick_but_small, far))
    assert simulation.run(3, 30).routes.most_common(1)[0][0] == "whole"
    assert simulation.run(60, 240).within(0.25) >= 0.95  # alone, the whole model at the edge serves 32 a second


def test_a_step_of_the_link_moves_all_requests_with_few_switches() -> None:
    simulation = Simulation(WORLD, (WHOLE, HEAD, PHOTO))
    simulation.set_world(World(up_bytes_s=6e6, down_bytes_s=6e6, rtt_s=0.005))
    assert simulation.run(2, 40).routes.most_common(1)[0][0] == "photo"
    simulation.set_world(World(up_bytes_s=2.5e4, down_bytes_s=6e6, rtt_s=0.08))
    assert simulation.run(2, 40).routes["whole"] >= 38
    assert simulation.chooser.switches == 2


def test_requests_before_delay_another_by_no_more_than_its_own_seconds_each() -> None:
    outstanding = Outstanding()
    assert outstanding.wait_s(Busy(1, 1, 1, 1)) == 0
    tickets = [outstanding.begin(Busy(edge=0.1), "cloud") for _ in range(3)]
    tickets.append(outstanding.begin(Busy(uplink=0.05), "cloud"))
    assert outstanding.wait_s(Busy(edge=0.5)) == pytest.approx(0.3)
    assert outstanding.wait_s(Busy(edge=0.002, uplink=0.05)) == pytest.approx(0.05)  # the edge ends before
    assert outstanding.wait_s(Busy(cloud=1)) == 0
    for ticket in tickets[1:]:
        ticket.close()
    assert outstanding.wait_s(Busy(edge=0.5, uplink=1)) == pytest.approx(0.1)


def test_where_its_turn_would_be_late_a_request_takes_the_quickest_route(trial: Trial) -> None:
    with trial.chooser.running(EDGE), trial.chooser.running(EDGE):
        # Behind 0.2 s at the edge, of which 0.06 s count: the split ends after 0.14 s, the cloud after 0.12 s.
        assert trial.choose(left_s=0.2) == "split"
        assert trial.choose(left_s=0.13) == "cloud"


def test_a_request_that_outstanding_work_makes_late_on_every_route_is_refused(trial: Trial) -> None:
    with trial.chooser.running(EDGE), trial.chooser.running(CLOUD):
        with pytest.raises(Overloaded, match="more than its deadline allows") as caught:
            trial.choose(left_s=0.09)
        assert caught.value.facts["retry_after_s"] == 1
        # Routes are divided for the rate that callers ask for.
        rate = trial.chooser.usage.rate()
        for _ in range(50):
            with pytest.raises(Overloaded):
                trial.choose(left_s=0.09)
        assert trial.chooser.usage.rate() > rate + 10
    assert trial.choose(left_s=0.09) == "split"


def test_a_request_that_would_be_late_in_any_case_runs(trial: Trial) -> None:
    # Only a request can tell that forecasts are wrong.
    with trial.chooser.running(EDGE), trial.chooser.running(CLOUD):
        assert trial.choose(left_s=0.07) == "split"


def test_shares_stay_for_half_a_second() -> None:
    spreading = Spreading(len(ALL))
    spreading.update(expected(), 0, (0, 1, 2), 30.0, ONE_EACH)
    before = spreading.shares
    assert before
    for _ in range(4):
        spreading.update(expected(), 0, (0, 1, 2), 35.0, ONE_EACH)
        assert spreading.shares == before
    spreading.update(expected(), 0, (0, 1, 2), 35.0, ONE_EACH)
    assert spreading.shares != before
