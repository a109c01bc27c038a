"""How long an attempt may take before a fallback takes over."""

from __future__ import annotations

import pytest

from isthmus.routing.fallback import FLOOR_S, MAX_MULTIPLE, RESERVED_SHARE, allowed_s


def test_a_fallback_keeps_its_time() -> None:
    assert allowed_s(1.0, 0.1, 0.4) == pytest.approx(1.0 - RESERVED_SHARE * 0.4)
    assert allowed_s(20.0, 0.1, 0.4) == pytest.approx(MAX_MULTIPLE * 0.1 + FLOOR_S)


def test_without_the_time_for_both_an_attempt_has_all_of_it() -> None:
    assert allowed_s(0.25, 0.12, 0.2) == 0.25
    assert allowed_s(0.25, 0.12, 0.1) < 0.25


def test_of_unknown_routes_each_has_half_of_the_time() -> None:
    assert allowed_s(1.0, None, None) == 0.5
