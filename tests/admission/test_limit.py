"""The adaptive limit on simulated servers: it settles where more requests would only slow each other down."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest

from isthmus.admission.limit import MIN_LIMIT, AdaptiveLimit


class Simulation:
    """A closed loop that uses the whole limit: a request's seconds depend on the number in work."""

    def __init__(self, max_limit: int = 64, seed: int = 1) -> None:
        self.now = 0.0
        self.limit = AdaptiveLimit(max_limit, lambda: self.now)
        self._ends: list[tuple[float, float, int]] = []
        self._rng = random.Random(seed)
        self.limits: list[int] = []

    def run(self, seconds: float, service: Callable[[int], float], kind: str = "a", offered: int = 1000) -> None:
        until = self.now + seconds
        while self.now < until:
            while len(self._ends) < min(offered, self.limit.value):
                in_work = len(self._ends) + 1
                end = self.now + service(in_work) * self._rng.uniform(0.95, 1.15)
                heapq.heappush(self._ends, (end, self.now, in_work))
            self.now, began, in_work = heapq.heappop(self._ends)
            self.limit.observe(kind, self.now - began, in_work)
            self.limits.append(self.limit.value)

    def settled(self) -> float:
        late = self.limits[len(self.limits) // 2 :]
        return sum(late) / len(late)


def cpu(in_work: int) -> float:
    return 0.01 * in_work


def link(in_work: int) -> float:
    """A round trip of 100 ms on which 20 requests fit."""
    return 0.1 * max(1.0, in_work / 20)


def test_on_one_cpu_few_requests_are_in_work() -> None:
    simulation = Simulation()
    simulation.run(20, cpu)
    assert MIN_LIMIT <= simulation.settled() <= 10


def test_on_a_long_link_the_requests_that_fit_are_in_work() -> None:
    simulation = Simulation()
    simulation.run(60, link)
    assert 20 <= simulation.settled() <= 50


def test_the_limit_never_leaves_its_bounds() -> None:
    simulation = Simulation(max_limit=8)
    simulation.run(10, link)
    simulation.run(10, lambda n: 3.0 * n)
    assert min(simulation.limits) == MIN_LIMIT
    assert max(simulation.limits) == 8
    assert AdaptiveLimit(1).value == 1


def test_the_baseline_does_not_rise_with_steady_load() -> None:
    """Hours of a full server: probes measure the baseline, and the limit stays."""
    simulation = Simulation()
    simulation.run(3600, cpu)
    assert simulation.settled() <= 10
    baseline = simulation.limit.baseline("a")
    assert baseline is not None
    assert baseline <= 0.01 * 1.15 * MIN_LIMIT


def test_a_link_that_became_slower_is_a_new_baseline_and_no_load() -> None:
    simulation = Simulation()
    simulation.run(60, link)
    simulation.run(60, lambda n: 8 * link(n))
    simulation.limits.clear()
    simulation.run(60, lambda n: 8 * link(n))
    assert simulation.settled() >= 15


def test_a_machine_that_is_fast_again_has_a_new_baseline_at_once() -> None:
    simulation = Simulation()
    simulation.run(60, lambda n: 8 * cpu(n))
    simulation.limits.clear()
    simulation.run(10, cpu)
    assert simulation.settled() <= 10


def test_times_that_vary_without_load_are_no_load() -> None:
    """As under a CPU quota: a run that fits into what is left of the period takes a sixth of one that does not."""
    simulation, rng = Simulation(), random.Random(2)
    simulation.run(120, lambda n: link(n) * rng.choice((0.2, 1.0, 1.2)))
    assert simulation.settled() >= 16


def test_kinds_of_work_are_compared_with_themselves_alone() -> None:
    simulation = Simulation()
    for _ in range(50):
        simulation.run(1, link, "quick")
        simulation.run(1, lambda n: 5 * link(n), "slow")
    assert simulation.settled() >= 15


def test_a_limit_that_is_not_reached_does_not_grow() -> None:
    simulation = Simulation()
    before = simulation.limit.value
    simulation.run(60, lambda n: 0.1, offered=4)
    assert simulation.limit.value == before


def test_a_limit_leaves_room_for_batches() -> None:
    """A batch of eight takes longer than one request, and is no sign of load."""
    simulation = Simulation()
    largest = 2
    simulation.limit.floor = lambda: 1 + 2 * largest
    simulation.run(20, cpu)
    assert simulation.settled() <= 10
    largest = 8
    simulation.limits.clear()
    simulation.run(20, cpu)
    assert simulation.settled() >= 16


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.1])
def test_callers_with_short_deadlines_do_not_lower_the_limit(seconds: float) -> None:
    simulation = Simulation()
    simulation.run(10, link)
    before = simulation.limit.value
    for _ in range(1000):
        simulation.now += 0.01
        simulation.limit.observe("a", min(seconds, 0.09), 10, succeeded=False)
        simulation.limit.observe("unknown kind", 100.0, 10, succeeded=False)
    assert simulation.limit.value >= before - 1


def test_requests_that_end_at_long_deadlines_lower_the_limit() -> None:
    """Where all requests miss their deadline there is no successful one to learn from."""
    simulation = Simulation()
    simulation.run(10, link)
    for _ in range(100):
        simulation.now += 0.05
        simulation.limit.observe("a", 0.5, 20, succeeded=False)
    assert simulation.limit.value <= 4


def test_the_limit_falls_until_deadlines_are_met() -> None:
    """With 20 ms on a CPU and 130 ms to the deadline, six requests in work are in time, and more are not."""
    simulation, limits = Simulation(), list[int]()
    simulation.run(10, lambda n: 0.02 * n)
    for _ in range(400):
        simulation.now += 0.02
        limits.append(in_work := simulation.limit.value)
        seconds = 0.02 * in_work
        simulation.limit.observe("a", min(seconds, 0.13), in_work, succeeded=seconds <= 0.13)
    assert sum(limits[200:]) / 200 <= 8


def test_one_outlier_of_a_window_changes_nothing() -> None:
    simulation = Simulation()
    simulation.run(20, lambda n: 0.1)
    before = simulation.limit.value
    simulation.limit.observe("a", 1000.0, 30)
    simulation.run(1, lambda n: 0.1)
    assert simulation.limit.value >= before - 1


def test_kinds_are_bounded() -> None:
    limit = AdaptiveLimit(8, lambda: 0.0)
    for i in range(10_000):
        limit.observe(str(i), 0.1, 1)
    assert sum(limit.baseline(str(i)) is not None for i in range(10_000)) == 256
