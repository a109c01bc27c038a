"""The efficient candidates of a plan, and the degradation of each.

The plan's constraints hold: a candidate refused for its error, its memory or a private depth is never taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from isthmus.artifacts.plan import Candidate, Plan
from isthmus.routing.demand import Demand

# Candidates of a router; a plan may have a thousand, most of them dominated.
MAX_CANDIDATES = 16
# Rounding of float32 in another order of operations; half/1, the finest lossy codec, is beyond.
EXACT_ERROR = 1e-4
# Demands within this share of each other are equal: predictions are no better.
_TIE = 0.02
# Links, in bytes a second, for the order of candidates: 0.1 Mbit/s to 1 Gbit/s by halves of an order of magnitude.
_RATES = tuple(1.25e4 * 10 ** (i / 2) for i in range(9))
# The same for an edge under load: its seconds count so many times.
_EDGE_WEIGHTS = (1.0, 4.0)


def efficient_candidates(plan: Plan) -> tuple[Candidate, ...]:
    """At most MAX_CANDIDATES of the plan's candidates, its choice first.

    The whole model at the edge, the int8 variant at the edge and the photo to the cloud are always candidates, unless
    absent or refused. The rest is the Pareto front of edge seconds, bytes each way, cloud seconds and error: measured
    candidates before predicted ones, the fastest over some link before the rest.
    """
    admissible = [c for c in plan.candidates if not c.refused and not _leaks_input(c, plan)]
    always = [c for c in admissible if _is_always_kept(c)]
    efficient = _undominated(admissible)
    by_use = sorted((*_best_by_link(efficient), *efficient), key=lambda c: c.measured is None)
    by_name = {c.name: c for c in (plan.choice, *always, *by_use)}
    return tuple(by_name.values())[:MAX_CANDIDATES]


def degradation_of(candidate: Candidate, plan: Plan) -> str:
    """The fidelity of a candidate further from the model than the plan allows; empty within the plan's limits.

    The limits are the error of the plan's choice, calibration's limit of agreement, and the plan's constraints on
    errors. The int8 variant is degraded unless it is the choice.
    """
    error, choice = candidate.error, plan.choice.error
    if candidate.name == plan.chosen or (not error.disagreement and error.relative <= EXACT_ERROR):
        return ""
    has_limit = plan.constraints.max_error is not None or plan.constraints.max_disagreement is not None
    # A language model's plan has a limit of changed tokens by default.
    is_allowed = error.calibrated or has_limit or candidate.generation is not None
    is_closer = error.disagreement <= choice.disagreement and error.relative <= choice.relative
    if candidate.variant is None and (is_allowed or is_closer):
        return ""
    if error.inputs and (error.calibrated or candidate.variant is not None):
        return f"{1 - error.disagreement:.1%} of {error.inputs} inputs have the model's prediction"
    return f"outputs within {error.relative:.2%} of the model's"


def _leaks_input(candidate: Candidate, plan: Plan) -> bool:
    """Whether the candidate sends the input although the plan keeps inputs private; no planner makes such a plan."""
    bounds = plan.constraints
    return (bounds.private_depth > 0 or bounds.private_ssim is not None) and candidate.kind == "cloud"


def _is_always_kept(candidate: Candidate) -> bool:
    is_photo = candidate.kind == "cloud" and candidate.input == "photo"
    return candidate.kind == "edge" or (is_photo and all(c.quality == 1 for c in candidate.codecs.values()))


def _undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates without the dominated: no more of any resource or error, and less of one, dominates."""
    axes = np.array([_axes(c) for c in candidates]).reshape(len(candidates), -1)
    stays = np.ones(len(candidates), bool)
    for i, own in enumerate(axes):
        no_more, less = (axes <= own * (1 + _TIE)).all(1), (axes < own * (1 - _TIE)).any(1)
        # Dominated by a remaining candidate only: ties are no order, and three may dominate each other in turn.
        stays[i] = not (no_more & less & stays).any()
    return [c for c, is_efficient in zip(candidates, stays, strict=True) if is_efficient]


def _axes(candidate: Candidate) -> tuple[float, ...]:
    demand, error = Demand.planned(candidate), candidate.error
    relative = error.relative if error.relative > EXACT_ERROR else 0.0
    return (demand.edge_s, demand.up_bytes, demand.down_bytes, demand.cloud_s, error.disagreement, relative)


def _best_by_link(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """The fastest candidate over each of a range of links, beside a free edge and a loaded one."""
    for weight in _EDGE_WEIGHTS if candidates else ():
        for rate in _RATES:
            yield min(candidates, key=lambda c: _seconds(Demand.planned(c), rate, weight))


def _seconds(demand: Demand, bytes_s: float, edge_weight: float) -> float:
    return edge_weight * demand.edge_s + (demand.up_bytes + demand.down_bytes) / bytes_s + demand.cloud_s
