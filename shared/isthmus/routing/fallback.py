"""The fallback chain: which candidates take over where a hop fails, in which order, and how long each may try before.

Exact candidates come first, the quickest of them before the others, then degraded ones. A candidate of a plan that
breaks one of the plan's constraints is in no chain, for such candidates are not served at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from isthmus.context import Context, Deadline
from isthmus.errors import HopBusy, HopError, HopMismatch, HopRejected, HopTimeout, HopUnavailable
from isthmus.routing.candidates import RouteCandidate

# A fallback is left its expected seconds and half as many: it runs beside those that came before it.
RESERVED_SHARE = 1.5
# A hop is given up after a multiple of the route's expected seconds, so that a stopped function does not take all of a
# long deadline; the floor is for routes of milliseconds.
MAX_MULTIPLE, FLOOR_S = 4.0, 0.25
# Whatever the fallback needs, a route that works has the time to end.
MIN_MULTIPLE = 1.2

ExpectedSeconds = Callable[[RouteCandidate], float | None]
ChainWithout = Callable[[str], Sequence[RouteCandidate]]
"""The fallbacks that do without a hop, in order."""


def is_hops_fault(error: HopError) -> bool:
    """Whether another hop may do better: no response, a refusal for load, or a response that is no frame."""
    if isinstance(error, HopUnavailable | HopTimeout | HopBusy):
        return True
    return isinstance(error, HopRejected) and (error.facts.get("status") == 200 or error.facts.get("status", 0) >= 500)


def may_fall_back(error: HopError) -> bool:
    """Whether another route may serve the request: the hop is at fault, or holds another bundle.

    A hop with another bundle is in order, and its breaker stays closed: it serves that bundle's requests.
    """
    return isinstance(error, HopMismatch) or is_hops_fault(error)


class FallbackChain:
    """Fallbacks in order; `names` are those of the setting `fallback`, none means by the plan."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = tuple(names)

    def order(self, candidates: Iterable[RouteCandidate], expected_s: ExpectedSeconds) -> list[RouteCandidate]:
        """Those of the candidates that may take over, in order."""
        if self._names:
            by_name = {c.name: c for c in candidates}  # the setting's `none` is no candidate's name
            return [by_name[name] for name in self._names if name in by_name]
        return sorted(candidates, key=lambda c: (bool(c.degradation), _or_infinite(expected_s(c))))


def limited(context: Context, chosen: RouteCandidate, without: ChainWithout, expected_s: ExpectedSeconds) -> Context:
    """The context of an attempt along `chosen`: each hop that a fallback does without is given up in time for it.

    So is a hop behind an exit whose unsure prediction would be the response.
    """
    limits: dict[str, Deadline] = {}
    # A segment in this process is not given up: its errors are the request's own.
    for hop in {hop.name for hop in chosen.route.hops if hop.encodes}:
        left_s, own_s = context.deadline.remaining(), expected_s(chosen)
        if chain := without(hop):
            limits[hop] = Deadline.after(allowed_s(left_s, own_s, expected_s(chain[0])))
        elif chosen.answers_unsure and hop != chosen.hops[0]:
            # The exit's prediction is at hand, and takes no time.
            limits[hop] = Deadline.after(allowed_s(left_s, own_s, None if own_s is None else 0.0))
    return replace(context, limits=limits) if limits else context


def first_in_time(fallbacks: Sequence[RouteCandidate], left_s: float, expected_s: ExpectedSeconds) -> RouteCandidate:
    """The first fallback that is expected to end within `left_s` seconds, or else the quickest."""
    for candidate in fallbacks:
        if (expected_s(candidate) or 0.0) <= left_s:
            return candidate
    return min(fallbacks, key=lambda c: expected_s(c) or 0.0)


def allowed_s(left_s: float, own_s: float | None, fallback_s: float | None) -> float:
    """Seconds of `left_s` for an attempt of `own_s` seconds, before another of `fallback_s`; None is unknown."""
    spare_s = left_s - (left_s / 2 if fallback_s is None else RESERVED_SHARE * fallback_s)
    if own_s is None:
        return max(spare_s, left_s / 2)
    # Without the time for both the attempt is not ended early for a fallback that would be late.
    if fallback_s is not None and MIN_MULTIPLE * own_s + fallback_s > left_s:
        return left_s
    return min(left_s, max(min(spare_s, MAX_MULTIPLE * own_s + FLOOR_S), MIN_MULTIPLE * own_s))


def _or_infinite(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds
