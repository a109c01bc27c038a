"""The guard of exits, where callers name more versions than it keeps samples of."""

from __future__ import annotations

import logging
from dataclasses import replace

from isthmus.pipeline import ExitBranch, Route, plan_route
from isthmus.routing.exit_guard import MAX_EXITS, ExitGuard
from isthmus.serving.metrics import FunctionMetrics
from support.bundles import Published, photos  # noqa: F401 - a fixture
from support.exits import gate_of
from support.hops import Echo


def test_a_closed_exit_stays_closed_while_many_others_are_checked(photos: Published) -> None:  # noqa: F811
    guard = ExitGuard(FunctionMetrics(), logging.getLogger("isthmus.exit-guard-test"), deadline_s=1.0)

    def gated(threshold: float) -> Route:
        plain = plan_route(photos.digest, photos.bundle, (Echo({}), Echo({})), ("3",))
        return replace(plain, exit=ExitBranch(photos.bundle.segment("..3"), gate_of(threshold)))

    wrong = gated(0.5)
    while (state := guard.state(wrong, 0.8)) is not None and not state.closed:
        guard.checked(wrong, False)
    for number in range(MAX_EXITS + 1):
        guard.checked(gated(0.6 + number * 1e-4), True)
    route, _ = guard.apply(wrong)
    assert route.exit is None
    closed = guard.state(wrong, 0.8)
    assert closed is not None
    assert (closed.closed, closed.share) == (True, 0.0)
