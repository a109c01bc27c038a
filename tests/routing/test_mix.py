"""The division of requests over candidates, beside another solver and by hand; where none exists, a typed error."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import linprog

from isthmus.errors import Infeasible, ProblemMalformed
from isthmus.routing.demand import RESOURCES, Demand
from isthmus.routing.mix import HEADROOM, NONE, Mix, Resources, joint_capacity, least_cost

EDGE, UP, BOTH = Demand(edge_s=0.1), Demand(up_bytes=100_000, cloud_s=0.01), Demand(edge_s=0.04, up_bytes=20_000)
CAPACITIES = Resources(edge=1.0, uplink=1e6, downlink=1e6, cloud=math.inf)
SEEDS = range(25)


def instance(seed: int) -> tuple[list[Demand], list[float], Resources]:
    """Candidates between the edge alone and the cloud alone, and capacities of a small device and a slow link."""
    rng = random.Random(seed)
    demands = [
        Demand(rng.random() * 0.05, rng.random() * 5e4 * (n > 0), rng.random() * 4e3, rng.random() * 0.02, 1)
        for n in range(rng.randint(1, 16))
    ]
    seconds = [0.01 + rng.random() * 0.2 for _ in demands]
    return demands, seconds, Resources(rng.uniform(0.2, 2), rng.uniform(1e5, 2e6), rng.uniform(1e5, 2e6), 2.0)


def loads(demands: list[Demand], capacities: Resources) -> np.ndarray:
    return np.array([[d[r] / capacities[r] for r in range(4)] for d in demands])


def check_resources(mix: Mix, demands: list[Demand], capacities: Resources, headroom: float) -> None:
    used = mix.rate * np.array(mix.shares) @ loads(demands, capacities)
    assert mix.used == pytest.approx(used, abs=1e-9)
    assert max(mix.used) <= headroom + 1e-9
    assert sum(mix.shares) == pytest.approx(1)
    assert min(mix.shares) >= 0


def test_resources_are_named_as_demands_are() -> None:
    assert Resources._fields == RESOURCES


@pytest.mark.parametrize("seed", SEEDS)
def test_the_joint_capacity_is_another_solvers(seed: int) -> None:
    demands, _, capacities = instance(seed)
    mix = joint_capacity(demands, capacities, headroom=0.8)
    other = linprog(-np.ones(len(demands)), A_ub=loads(demands, capacities).T, b_ub=np.full(4, 0.8))
    assert mix.rate == pytest.approx(-other.fun)
    assert mix.prices == pytest.approx(-other.ineqlin.marginals / np.array(capacities), abs=1e-9)
    check_resources(mix, demands, capacities, 0.8)
    assert mix.used[RESOURCES.index(mix.bottleneck)] == pytest.approx(0.8)
    # Strong duality: what the resources are worth is what they serve.
    assert mix.rate == pytest.approx(0.8 * sum(p * c for p, c in zip(mix.prices, capacities, strict=True)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("of_capacity", [0.05, 0.5, 0.85])
def test_the_least_cost_is_another_solvers_and_used_candidates_cost_the_same(seed: int, of_capacity: float) -> None:
    demands, seconds, capacities = instance(seed)
    rate = of_capacity * joint_capacity(demands, capacities).rate
    mix = least_cost(demands, seconds, capacities, rate)
    assert mix.served
    check_resources(mix, demands, capacities, HEADROOM)
    assert mix.seconds == pytest.approx(by_scipy(demands, seconds, capacities, rate))
    costs = [mix.cost(d, s) for d, s in zip(demands, seconds, strict=True)]
    for share, cost in zip(mix.shares, costs, strict=True):
        assert cost == pytest.approx(min(costs), rel=1e-6) if share > 1e-9 else cost >= min(costs) * (1 - 1e-6)


def by_scipy(demands: list[Demand], seconds: list[float], capacities: Resources, rate: float) -> float:
    """The least mean seconds, with the waiting requests of each resource as the greatest of the same tangents."""
    count, per_share = len(demands), loads(demands, capacities) * rate
    rows, bounds = [[*column, 0, 0, 0, 0] for column in per_share.T], [HEADROOM] * 4
    for r, servers in enumerate([max(1, capacities.edge), 1, 1, max(1, capacities.cloud)]):
        power = math.sqrt(2 * (servers + 1))
        for u in (0.0, 0.2, 0.35, 0.5, 0.62, 0.72, 0.8, 0.86, 0.9):
            slope = (power * u ** (power - 1) * (1 - u) + u**power) / (1 - u) ** 2
            rows.append([*(slope * per_share[:, r]), *(-rate * (np.arange(4) == r))])
            bounds.append(slope * u - u**power / (1 - u))
    found = linprog(
        [*seconds, 1, 1, 1, 1], A_ub=rows, b_ub=bounds, A_eq=[[*np.ones(count), 0, 0, 0, 0]], b_eq=[1], bounds=(0, None)
    )
    return float(found.fun)


def test_two_candidates_of_different_resources_add_their_rates() -> None:
    mix = joint_capacity([EDGE, UP], CAPACITIES)
    assert mix.rate == pytest.approx(20)
    assert mix.shares == pytest.approx((0.5, 0.5))
    assert mix.used == pytest.approx((1, 1, 0, 0))
    assert mix.prices == pytest.approx((10, 1e-5, 0, 0))


def test_a_split_of_little_of_each_takes_all_from_both_ends() -> None:
    # Alone 10, 10 and 25 a second; the 25 of the split leave half the uplink, which serves 5 more.
    mix = joint_capacity([EDGE, UP, BOTH], CAPACITIES)
    assert mix.rate == pytest.approx(30)
    assert [s * mix.rate for s in mix.shares] == pytest.approx([0, 5, 25])


def test_idle_resources_leave_the_quickest_candidate_alone_and_load_moves_requests_off_it() -> None:
    demands, seconds = [EDGE, UP], [0.1, 0.15]
    assert least_cost(demands, seconds, CAPACITIES, 0.0).shares == (1, 0)
    assert least_cost(demands, seconds, CAPACITIES, 0.5).shares == pytest.approx((1, 0))
    shares = [least_cost(demands, seconds, CAPACITIES, rate).shares[0] for rate in (4, 8, 12, 16)]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < shares[-1] < shares[0] < 1


def test_waiting_is_priced_within_a_few_percent_of_the_queue() -> None:
    for utilisation in (0.3, 0.55, 0.7, 0.83, 0.89):
        mix = least_cost([EDGE], [0.1], CAPACITIES, utilisation * 10)
        waiting = utilisation**2 / (1 - utilisation) / (utilisation * 10)
        assert mix.seconds == pytest.approx(0.1 + waiting, rel=0.06)


def test_a_rate_beyond_the_capacity_divides_as_the_capacity_does() -> None:
    mix = least_cost([EDGE, UP], [0.1, 0.15], CAPACITIES, 30)
    assert not mix.served
    assert (mix.rate, mix.shares) == (pytest.approx(20 * HEADROOM), pytest.approx((0.5, 0.5)))
    assert mix.prices == joint_capacity([EDGE, UP], CAPACITIES, headroom=HEADROOM).prices


def test_a_resource_without_capacity_serves_the_others_alone() -> None:
    offline = CAPACITIES._replace(uplink=0.0)
    for mix in (joint_capacity([EDGE, UP, BOTH], offline), least_cost([EDGE, UP, BOTH], [1, 1, 1], offline, 5)):
        assert mix.shares == pytest.approx((1, 0, 0))
        assert mix.used.uplink == 0
    with pytest.raises(Infeasible, match="none has its resources"):
        joint_capacity([UP], offline)
    with pytest.raises(Infeasible, match="none has its resources"):
        least_cost([UP, EDGE], [0.1, math.inf], offline, 1)


def test_demands_without_a_limit_serve_any_rate() -> None:
    assert joint_capacity([EDGE, Demand()], CAPACITIES) == Mix(math.inf, (0, 1), NONE, NONE)
    assert joint_capacity([UP], Resources()).rate == math.inf
    mix = least_cost([EDGE, Demand()], [0.01, 0.5], CAPACITIES, 1e6)
    assert mix.served
    assert mix.shares[1] == pytest.approx(1, abs=1e-4)
    assert least_cost([Demand()], [0.5], CAPACITIES, 1e6).seconds == pytest.approx(0.5)
    assert joint_capacity([EDGE], CAPACITIES).bottleneck == "edge"
    assert joint_capacity([Demand()], CAPACITIES).bottleneck == ""


def test_an_infinite_demand_is_a_candidate_that_takes_nothing() -> None:
    assert joint_capacity([EDGE, Demand(cloud_s=math.inf)], CAPACITIES).shares == (1, 0)


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(ProblemMalformed):
        joint_capacity([Demand(edge_s=bad)], CAPACITIES)
    with pytest.raises(ProblemMalformed):
        joint_capacity([EDGE], CAPACITIES._replace(cloud=bad))
    with pytest.raises(ProblemMalformed):
        least_cost([EDGE], [bad], CAPACITIES, 1)
    with pytest.raises(ProblemMalformed):
        least_cost([EDGE], [0.1], CAPACITIES, bad)
    with pytest.raises(ProblemMalformed):
        joint_capacity([EDGE], CAPACITIES, headroom=bad)


def test_a_division_needs_candidates_with_seconds() -> None:
    with pytest.raises(Infeasible, match="there is none"):
        joint_capacity([], CAPACITIES)
    with pytest.raises(Infeasible, match="there is none"):
        least_cost([], [], CAPACITIES, 1)
    with pytest.raises(ProblemMalformed):
        least_cost([EDGE, UP], [0.1], CAPACITIES, 1)


def test_the_solver_prints_nothing() -> None:
    code = """if True:
        from isthmus.routing.demand import Demand
        from isthmus.routing.mix import Resources, joint_capacity, least_cost
        joint_capacity([Demand(0.1)], Resources(1.0))
        least_cost([Demand(0.1)], [0.1], Resources(1.0), 50)
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout + ran.stderr == ""
