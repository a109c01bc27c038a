"""Throughput: how many requests a second a candidate serves, and how many all candidates together.

A candidate occupies four stages, which work on different requests at once: the edge, the link in each direction, the
cloud. Alone it serves the inverse of its slowest stage. Several candidates divide the stages by the linear programme by
which the router divides requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.artifacts.plan import Candidate, Plan, PlannedMix
from isthmus.routing.demand import RESOURCES, Demand
from isthmus.routing.efficient import degradation_of, efficient_candidates
from isthmus.routing.mix import Mix, Resources, joint_capacity
from isthmus_tools.planner.search.throughput import ALL_SECONDS

# A smaller share is rounding.
_MIN_SHARE = 1e-6


def stage_seconds(candidate: Candidate) -> Resources:
    """Seconds for which a request occupies each stage; computing as measured where measured, hops included."""
    t, measured = candidate.predicted, candidate.measured
    if measured is None:
        return Resources(t.edge_busy + t.edge_hop, t.up, t.down, t.cloud_busy + t.cloud_hop)
    # A measured call to the cloud includes the link, whose directions are stages of their own.
    link = t.up + t.down + t.rtt
    part = measured.parts.get
    edge = part("preprocess", 0.0) + part("pack", 0.0) + part("edge", 0.0)
    return Resources(edge, t.up, t.down, max(part("cloud", 0.0) - link, part("cloud_run", 0.0)))


def slowest_stage(candidate: Candidate) -> float:
    """Seconds of the slowest stage: the inverse of the candidate's throughput."""
    return max(stage_seconds(candidate))


def best_division(candidates: Sequence[Candidate]) -> Mix:
    """The division of requests over the candidates with the highest rate.

    Raises:
        Infeasible: no candidates.
    """
    return joint_capacity([Demand(*stage_seconds(c)) for c in candidates], ALL_SECONDS)


def planned_mix(plan: Plan) -> PlannedMix | None:
    """The division over the candidates among which the router chooses, degraded ones apart; None without a limit.

    Where some of these were measured, the others have no share: their predictions would compete with measurements.
    """
    candidates = [c for c in efficient_candidates(plan) if not degradation_of(c, plan)]
    candidates = [c for c in candidates if c.measured is not None] or candidates
    mix = best_division(candidates)
    if not slowest_stage(plan.choice) or max(mix.used) == 0:
        return None
    shares = {c.name: s for c, s in zip(candidates, mix.shares, strict=True) if s > _MIN_SHARE}
    prices = {name: price / 100 for name, price in zip(RESOURCES, mix.prices, strict=True)}
    used = {name: min(1.0, used) for name, used in zip(RESOURCES, mix.used, strict=True)}
    return PlannedMix(mix.rate, 1 / slowest_stage(plan.choice), shares, used, prices)


def mix_reason(mix: PlannedMix) -> str:
    """The mix as a sentence of a plan's reasons."""
    divided = ", ".join(f"{share:.0%} {name}" for name, share in sorted(mix.shares.items(), key=lambda s: -s[1]))
    full = " and ".join(name for name, used in mix.used.items() if used > 0.995)
    alone = f"alone the choice serves {mix.alone:.1f} requests a second"
    if mix.rate <= mix.alone * 1.005:
        return f"{alone}, and no division over several routes more: the {full} is its limit"
    return f"{alone}, {divided} together {mix.rate:.1f}: full are {full}"
