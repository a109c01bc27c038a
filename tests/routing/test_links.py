"""The model of a link follows what its transfers show, and no more: transfers of a simulated link."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.http.pool import ExchangeTimes
from isthmus.routing.links import (
    MAX_PROBED_S,
    MIN_PROBE_PAUSE_S,
    PROBE_AFTER_S,
    Link,
    LinkEstimate,
    PaceFilter,
)
from support.link_records import MBIT, Router, Wire

MIXED = [3_000, 20_000, 60_000]


def rate_mbit(estimate: LinkEstimate) -> float:
    assert estimate.up_bytes_s is not None
    return estimate.up_bytes_s * 8 / MBIT


def rtt_ms(estimate: LinkEstimate) -> float:
    assert estimate.rtt_s is not None
    return estimate.rtt_s * 1000


def up_seconds(estimate: LinkEstimate, size: float, planned_s: float) -> float:
    """What a forecast makes of the estimate: a plan stands where it is within the bound."""
    assert estimate.up_bytes_s is not None
    seconds = size / estimate.up_bytes_s
    return min(seconds, planned_s) if estimate.is_bound else seconds


def settle(router: Router, sizes: list[int], count: int = 30) -> LinkEstimate:
    for _ in router.steps(sizes, count):
        pass
    return router.link.estimate(router.now)


@settings(max_examples=50, deadline=None)
@given(
    up=st.floats(0.5, 200),
    rtt_ms_=st.floats(1, 150),
    sizes=st.lists(st.integers(1_000, 300_000), min_size=2, max_size=6, unique=True),
    seed=st.integers(0, 1000),
)
def test_transfers_of_several_sizes_give_round_trip_and_rate(
    up: float, rtt_ms_: float, sizes: list[int], seed: int
) -> None:
    router = Router(Wire(rtt_ms_ / 1000, up * MBIT), seed)
    estimate = settle(router, [*sizes, 2_000, 150_000], 40)
    # What a transfer of any of these sizes takes is the thing to know, however the two share the error.
    for size in sizes:
        expected = estimate.rtt_s + size / estimate.up_bytes_s  # type: ignore[operator]
        assert expected == pytest.approx(rtt_ms_ / 1000 + size * 8 / up / MBIT, rel=0.1)


@pytest.mark.parametrize("sizes", [MIXED, [20_000], [2_000, 200_000]], ids=["mixed", "one size", "far apart"])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_a_step_of_the_rate_or_the_round_trip_is_followed_within_ten_transfers(
    sizes: list[int], noise: float, seed: int
) -> None:
    router = Router(Wire(0.005, 50 * MBIT, noise=noise), seed)
    settle(router, sizes, 40)
    for rtt_s, up_bps in ((0.005, 2 * MBIT), (0.005, 20 * MBIT), (0.08, 20 * MBIT), (0.005, 20 * MBIT)):
        router.wire.rtt_s, router.wire.up_bps = rtt_s, up_bps
        estimate = settle(router, sizes, 10)
        for size in sizes:
            up_s = size * 8 / up_bps
            expected = (estimate.rtt_s or 0.0) + up_seconds(estimate, size, planned_s=up_s)
            assert expected == pytest.approx(rtt_s + up_s, rel=0.15 + noise)
        assert rtt_ms(estimate) == pytest.approx(rtt_s * 1000, rel=0.25 + 2 * noise, abs=2)


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_steady_link_keeps_its_estimate(seed: int) -> None:
    router = Router(Wire(0.02, 8 * MBIT, noise=0.3), seed)
    settle(router, MIXED, 40)
    seen = []
    for i in router.steps(MIXED, 1000):
        if i % 40 == 0:  # a pause of the machine, or a lost packet
            router.call(router.rng.choice(MIXED), delay_s=router.rng.uniform(0.05, 1.0))
        estimate = router.link.estimate(router.now)
        seen.append((rtt_ms(estimate), rate_mbit(estimate)))
    assert 13 < min(r for r, _ in seen) <= max(r for r, _ in seen) < 27
    assert 5.5 < min(b for _, b in seen) <= max(b for _, b in seen) < 10.5


@pytest.mark.parametrize("gap_s", [0.001, 0.01, 0.03])
@pytest.mark.parametrize("sizes", [[20_000] * 40, MIXED * 14], ids=["one size", "mixed"])
def test_transfers_that_share_the_link_show_its_whole_rate(gap_s: float, sizes: list[int]) -> None:
    router = Router(Wire(0.01, 8 * MBIT))
    settle(router, MIXED, 20)
    for _ in range(3):
        router.calls(random.Random(1).sample(sizes, len(sizes)), gap_s)
    assert rate_mbit(router.link.estimate(router.now)) == pytest.approx(8, rel=0.3)


def test_a_small_upload_gives_a_bound_that_the_link_exceeds() -> None:
    router = Router(Wire(0.02, 100 * MBIT, noise=0.05))
    estimate = settle(router, [400, 500, 600], 30)
    assert estimate.is_bound
    assert 0 < rate_mbit(estimate) < 100
    assert rtt_ms(estimate) == pytest.approx(20, rel=0.1)
    measured = settle(router, [400, 200_000], 20)
    assert not measured.is_bound
    assert rate_mbit(measured) == pytest.approx(100, rel=0.2)


def test_an_unknown_link_has_no_estimate() -> None:
    assert Link().estimate(5.0) == LinkEstimate()


def test_a_new_connection_costs_a_round_trip_that_is_not_the_links() -> None:
    router = Router(Wire(0.04, 20 * MBIT))
    for i, _ in enumerate(router.steps(MIXED, 40)):
        if i % 2:
            router.call(20_000, connect_s=0.04)
    estimate = router.link.estimate(router.now)
    assert rtt_ms(estimate) == pytest.approx(40, rel=0.1)
    assert estimate.connect_s == pytest.approx(0.04)


@pytest.mark.parametrize("served_s", [0.0101, 5.0, 1e6])
def test_a_function_that_claims_all_the_time_teaches_nothing(served_s: float) -> None:
    router = Router(Wire(0.02, 8 * MBIT))
    before = settle(router, MIXED)
    for _ in range(20):
        transfer = router.link.begin(1000, router.now)
        router.link.end(transfer, ExchangeTimes(0.0, 0.01, 0.01), served_s, 1000, router.now)
    after = router.link.estimate(router.now)
    assert after == before


def test_a_large_response_shows_the_downlink() -> None:
    link, now = Link(), 0.0
    for size in (40_000, 200_000, 90_000) * 5:
        now += 1.0
        first, rest_s = 0.03, size * 8 / (4 * MBIT)
        link.end(link.begin(500, now), ExchangeTimes(0.0, first, first + rest_s, size), 0.01, 500, now + first + rest_s)
    estimate = link.estimate(now)
    assert estimate.down_bytes_s == pytest.approx(4 * MBIT / 8, rel=0.05)


def test_an_upload_without_a_response_shares_the_link_no_more() -> None:
    router = Router(Wire(0.01, 8 * MBIT))
    before = settle(router, [20_000, 40_000], 20)
    lost = [router.link.begin(10**9, router.now) for _ in range(100)]
    for transfer in lost:
        router.link.fail(transfer)
    after = settle(router, [20_000, 40_000], 20)
    assert rate_mbit(after) == pytest.approx(rate_mbit(before), rel=0.05)


def test_odd_times_leave_a_finite_estimate() -> None:
    model, rng = PaceFilter(), random.Random(3)
    for now in range(3000):
        seconds = rng.choice([0.0, 1e-9, 0.02, 5.0, 3600.0])
        model.observe(rng.choice([0, 1, 10**4, 10**9]), seconds, float(rng.choice([now, 0, 10**9])))
        assert math.isfinite(model.rtt + model.pace + model.pace_deviation + model.noise)
        assert model.rtt >= 0
        assert model.pace >= 0


# Probes


def test_an_idle_link_is_probed_after_some_seconds_and_an_unused_one_never() -> None:
    router = Router(Wire(0.02, 8 * MBIT))
    assert router.link.probe_due(router.now) == math.inf
    settle(router, [60_000, 400], 10)
    router.call(400)
    due = router.link.probe_due(router.now)
    assert PROBE_AFTER_S - 1 < due - router.now <= PROBE_AFTER_S + 1
    router.link.probing(due)
    assert router.link.probe_due(due) == due + PROBE_AFTER_S
    assert router.link.probe_due(router.now + MAX_PROBED_S + 1) == math.inf


def test_a_link_without_calls_is_probed_from_its_beginning_for_some_minutes() -> None:
    link = Link(100.0)
    assert link.probe_due(100.0) <= 100.0
    link.probing(100.0)
    assert link.probe_due(101.0) == 100.0 + PROBE_AFTER_S
    link.probed(ExchangeTimes(0.0, 0.02, 0.02), 300, 105.0)
    assert rtt_ms(link.estimate(105.0)) == pytest.approx(20, rel=0.1)
    assert link.estimate(105.0).is_bound
    assert link.probe_due(100.0 + MAX_PROBED_S + 1) == math.inf


def test_a_call_unlike_the_estimate_asks_for_a_probe() -> None:
    router = Router(Wire(0.02, 8 * MBIT))
    settle(router, [20_000], 20)
    router.wire.up_bps = MBIT
    router.call(20_000)
    router.now += 0.5
    assert router.link.is_ambiguous
    assert router.link.probe_due(router.now) <= router.now
    router.link.probing(router.now)
    assert router.link.probe_due(router.now) == router.now + MIN_PROBE_PAUSE_S
