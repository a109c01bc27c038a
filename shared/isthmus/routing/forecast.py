"""Forecast of each candidate's seconds: the plan's terms, each replaced by a live estimate where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.demand import Demand
from isthmus.routing.estimates import Estimates
from isthmus.routing.outstanding import Busy

_NEAR, _FAR = 0, 1
# Beyond these a ratio says that plan and hop have nothing to do with each other.
_MIN_DRIFT, _MAX_DRIFT = 1 / 8, 8.0


class Expectation(NamedTuple):
    """A candidate as expected now: seconds of a request alone, its demand, and its seconds on each resource.

    Of a candidate with an exit these are means: `further_s` is how much longer a request takes that passes the exit,
    and `behind` the share of such requests, relative to the planned share.
    """

    seconds: float
    demand: Demand
    busy: Busy
    further_s: float = 0.0
    behind: float = 1.0


def forecast(candidates: Sequence[RouteCandidate], estimates: Estimates) -> tuple[Expectation, ...]:
    """The expectation of each candidate.

    A segment that did not run yet takes its planned seconds times the drift of its hop: the ratio of live to planned
    seconds, summed over the candidates whose segments did run there.
    """
    sides = [(_side(c, estimates, _NEAR), _side(c, estimates, _FAR)) for c in candidates]
    pairs = list(zip(candidates, sides, strict=True))
    drift = (
        _drift((near.run_s, c.terms.edge_run) for c, (near, _) in pairs),
        _drift((_weighted(far.run_s, c.planned_behind), c.terms.cloud_run) for c, (_, far) in pairs),
    )
    return tuple(_expect(c, estimates, near, far, drift) for c, (near, far) in pairs)


def plan_drift(candidate: RouteCandidate, estimates: Estimates) -> float | None:
    """Live over planned seconds of a candidate's segments; None without a plan, or where one of them did not run yet.

    Links and queues are left out: a drift means that the plan was made on other machines, or for another load.
    """
    near, far = _side(candidate, estimates, _NEAR), _side(candidate, estimates, _FAR)
    # Planned seconds behind an exit are those of a request weighted by its chance to get there.
    runs = (near, near.run_s), (far, _weighted(far.run_s, candidate.planned_behind))
    live = _sum([run_s for side, run_s in runs if side.hop])
    planned = candidate.terms.edge_run + candidate.terms.cloud_run
    return live / planned if live and planned else None


class _Side(NamedTuple):
    """A candidate's segments before or behind the link: their hop, and live seconds where all of them ran."""

    hop: str = ""
    run_s: float | None = None
    busy_s: float | None = None


def _side(candidate: RouteCandidate, estimates: Estimates, side: int) -> _Side:
    route = candidate.route
    calls = [
        (hop.name, route.digest, str(segment.id))
        for segment, hop in zip(route.segments, route.hops, strict=True)
        if (hop.name != route.near) == bool(side)
    ]
    if not calls:
        return _Side()
    runs, busy = [estimates.run_s(*call) for call in calls], [estimates.busy_s(*call) for call in calls]
    return _Side(calls[0][0], _sum(runs), _sum(busy))


def _sum(seconds: Sequence[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return sum(known) if len(known) == len(seconds) else None


def _weighted(seconds: float | None, share: float) -> float | None:
    return None if seconds is None else share * seconds


def _drift(pairs: Iterable[tuple[float | None, float]]) -> float:
    # A ratio of sums, since the shortest segments, whose overhead counts most, would decide a mean of ratios.
    known = [(live, planned) for live, planned in pairs if live and planned]
    ratio = sum(live for live, _ in known) / sum(planned for _, planned in known) if known else 1.0
    return min(max(ratio, _MIN_DRIFT), _MAX_DRIFT)


def _expect(
    candidate: RouteCandidate, estimates: Estimates, near: _Side, far: _Side, drift: tuple[float, float]
) -> Expectation:
    if candidate.route.exit is None:
        return _at(candidate, estimates, near, far, drift, 1.0)
    share = estimates.exit_share(candidate.route.digest, candidate.name, candidate.exit_share)
    mean = _at(candidate, estimates, near, far, drift, 1 - share)
    return mean._replace(further_s=_at(candidate, estimates, near, far, drift, 1.0).seconds - mean.seconds)


def _at(
    candidate: RouteCandidate,
    estimates: Estimates,
    near: _Side,
    far: _Side,
    drift: tuple[float, float],
    behind: float,
) -> Expectation:
    """The expectation where the share `behind` of the requests pass the exit.

    Live estimates are of requests that do; planned terms are means, by the planned share.
    """
    terms, key, scale = candidate.terms, (candidate.route.digest, candidate.name), behind / candidate.planned_behind
    demand = candidate.demand.scaled(scale)
    edge_s = (
        _known(estimates.preprocess_s(*key), terms.preprocess)
        + _known(_weighted(estimates.encode_s(*key), behind), scale * terms.pack)
        + _known(near.busy_s, terms.edge_run * drift[_NEAR])
        + _near_hop_s(candidate, estimates, near.hop)
        + estimates.own_work.seconds
    )
    cloud_s = _known(_weighted(far.busy_s, behind), scale * (terms.unpack + terms.cloud_run * drift[_FAR]))
    up_s = down_s = rtt_s = 0.0
    if far.hop:
        link = estimates.link(far.hop)
        up_s = _transfer_s(demand.up_bytes, link.up_bytes_s, scale * terms.up, is_bound=link.is_bound)
        down_s = _transfer_s(demand.down_bytes, link.down_bytes_s, scale * terms.down)
        # The live round trip of a call is all but its transfers and the function's own time.
        calls = max(behind, demand.calls)
        rtt_s = scale * (terms.rtt + terms.cloud_hop) if link.rtt_s is None else calls * link.rtt_s
    seconds = edge_s + up_s + rtt_s + cloud_s + down_s
    edge_s *= estimates.stall(candidate.route.near or near.hop)
    cloud_s *= estimates.stall(far.hop)
    busy = Busy(edge_s, up_s, down_s, cloud_s)
    return Expectation(seconds, demand._replace(edge_s=edge_s, cloud_s=cloud_s), busy, behind=scale)


def _near_hop_s(candidate: RouteCandidate, estimates: Estimates, hop: str) -> float:
    """Seconds of HTTP to a function beside the router, which take the edge's CPU; nothing for the router's process."""
    planned_s = candidate.terms.edge_hop
    if hop and not candidate.route.hops[0].encodes:
        return 0.0
    if not hop or (link := estimates.link(hop)).rtt_s is None:
        return planned_s
    return link.rtt_s + _transfer_s(candidate.input_bytes, link.up_bytes_s, planned_s, is_bound=link.is_bound)


def _known(live: float | None, planned: float) -> float:
    return planned if live is None else live


def _transfer_s(size: float, bytes_s: float | None, planned_s: float, *, is_bound: bool = False) -> float:
    """Seconds of a transfer; a lower bound of the rate says only that it takes no longer."""
    if not bytes_s:
        return planned_s
    seconds = size / bytes_s
    return min(seconds, planned_s) if is_bound and planned_s else seconds
