"""Token buckets: rates, bursts, bodies larger than a burst, and a bound on the callers that are remembered."""

from __future__ import annotations

import pytest

from isthmus.errors import CallerLimited
from isthmus.security import rate_limits
from isthmus.security.callers import CallerLimits
from isthmus.security.rate_limits import RateLimiter, rate_headers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_the_rate() -> None:
    clock, limits = Clock(), CallerLimits(requests_per_s=2.0, burst_s=3.0)
    limiter = RateLimiter(clock)
    assert [limiter.take("ann", limits, 0)[0].left for _ in range(6)] == [5, 4, 3, 2, 1, 0]
    with pytest.raises(CallerLimited) as caught:
        limiter.take("ann", limits, 0)
    assert caught.value.facts == {"limit": "requests", "per_second": 2.0, "retry_after_s": 1}
    limiter.take("bob", limits, 0)
    clock.now = 0.5
    limiter.take("ann", limits, 0)
    with pytest.raises(CallerLimited):
        limiter.take("ann", limits, 0)
    clock.now = 100.0
    assert limiter.take("ann", limits, 0)[0].left == 5


def test_bytes_and_requests_are_held_together_and_a_refusal_costs_nothing() -> None:
    clock, limits = Clock(), CallerLimits(requests_per_s=10.0, bytes_per_s=100, burst_s=1.0)
    limiter = RateLimiter(clock)
    states = limiter.take("ann", limits, 250)
    assert [(state.name, state.left) for state in states] == [("requests", 9), ("bytes", 0)]
    for _ in range(20):
        with pytest.raises(CallerLimited) as caught:
            limiter.take("ann", limits, 1)
        assert caught.value.facts["limit"] == "bytes"
    clock.now = 1.6
    assert [state.left for state in limiter.take("ann", limits, 0)] == [9, 10]


def test_a_slow_rate_allows_one_request() -> None:
    limiter = RateLimiter(Clock())
    limits = CallerLimits(requests_per_s=0.01, burst_s=1.0)
    limiter.take("ann", limits, 0)
    with pytest.raises(CallerLimited) as caught:
        limiter.take("ann", limits, 0)
    assert caught.value.facts["retry_after_s"] == 100


def test_headers_tell_size_and_rest() -> None:
    limits = CallerLimits(requests_per_s=2.0, bytes_per_s=1000, burst_s=2.0)
    assert rate_headers(RateLimiter(Clock()).take("ann", limits, 500)) == {
        "RateLimit-Policy": '"requests";q=4;w=2, "bytes";q=2000;w=2;qu="bytes"',
        "RateLimit": '"requests";r=3;t=1, "bytes";r=1500;t=1',
    }
    assert rate_headers([]) == {}


def test_the_callers_that_are_remembered_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "MAX_BUCKETS", 10)
    limiter, limits = RateLimiter(Clock()), CallerLimits(requests_per_s=1.0, burst_s=1.0)
    for number in range(100):
        limiter.take(f"jwt:{number}", limits, 0)
    limiter.take("jwt:0", limits, 0)
    with pytest.raises(CallerLimited):
        limiter.take("jwt:0", limits, 0)
