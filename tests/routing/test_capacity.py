"""Learned capacities of tiers: more without a queue, less behind one; from made-up waits."""

from __future__ import annotations

import pytest

from isthmus.routing.capacity import Capacities, TierCapacity


def learned(tier: TierCapacity, seconds: float, used: float, wait_s: float, began: float = 0.0) -> float:
    """The capacity after so many seconds of ten requests a second that use `used` seconds a second."""
    for n in range(round(seconds * 10)):
        tier.update(began + n / 10, used, 10.0, wait_s)
    return tier.value


def test_a_tier_that_carries_more_than_one_cpu_without_a_queue_has_more() -> None:
    tier = TierCapacity()
    assert learned(tier, 10, used=0.5, wait_s=0.0) == 1
    assert learned(tier, 10, used=1.5, wait_s=0.0, began=10) == pytest.approx(1.5 / 0.7, rel=0.11)


def test_behind_a_long_queue_it_has_less_and_never_less_than_a_cpu() -> None:
    tier = TierCapacity()
    most = learned(tier, 10, used=1.5, wait_s=0.0)
    assert 1 < learned(tier, 1, used=1.5, wait_s=0.5, began=10) < most
    assert learned(tier, 60, used=1.5, wait_s=0.5, began=20) == 1


def test_a_queue_of_some_calls_changes_nothing() -> None:
    assert learned(TierCapacity(), 60, used=0.8, wait_s=0.1) == 1


def test_waits_of_calls_are_compared_with_calls_and_not_with_requests_that_end_at_the_edge() -> None:
    """One request in ten reaches the cloud, for 100 ms of it, and waits 50 ms: no queue, and no reason for less."""
    capacities = Capacities()
    for n in range(100):
        capacities.update(n / 10, (0.0, 0.0, 0.0, 1.5), 150.0, 15.0, 0.0, 0.0)
    most = capacities.left((0.0, 0.0, 0.0, 0.0)).cloud
    assert most > 1.5
    for n in range(100, 200):
        capacities.update(n / 10, (0.0, 0.0, 0.0, 1.5), 150.0, 15.0, 0.0, 0.05)
    assert capacities.left((0.0, 0.0, 0.0, 0.0)).cloud == most


def test_other_models_leave_the_rest() -> None:
    assert Capacities().left((0.25, 0.0, 2.0, 0.0)) == (0.75, 1.0, 0.05, 1.0)
