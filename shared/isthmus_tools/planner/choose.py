"""Which candidate serves: those that break a constraint are refused by name, and the best of the others is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from isthmus.artifacts.conditions import MAX_ERROR, Constraints, Objective
from isthmus.artifacts.plan import Candidate
from isthmus.errors import ConstraintMalformed, Infeasible
from isthmus.units import format_duration, format_size
from isthmus_tools.planner.prices import Prices

_NEARLY = 0.02
"""Candidates this close to the best are told as equal in the reasons."""


@dataclass(frozen=True)
class Broken:
    """A constraint that a candidate breaks: its name, what it allows, what the candidate has, and both as text."""

    constraint: str
    limit: float
    value: float
    says: str

    @property
    def excess(self) -> float:
        """By how much, as a share of the limit."""
        return (self.value - self.limit) / self.limit if self.limit else float("inf")


def check_prices(objective: Objective, constraints: Constraints, prices: Prices | None) -> None:
    """See that the objective has its prices.

    Raises:
        ConstraintMalformed: names the prices that are missing.
    """
    given = prices or Prices()
    missing = {"cost": given.missing_for_cost, "energy": given.missing_for_energy}.get(objective, ())
    if missing:
        hint = "give them in a TOML file with --prices; docs/plan.md has one"
        if objective == "cost" and constraints.latency_s is not None:
            hint += ". Without prices, ask for another --objective beside --latency"
        raise ConstraintMalformed(
            f"the objective {objective} needs prices: {', '.join(missing)}", what="prices", missing=missing, hint=hint
        )


def broken(candidate: Candidate, constraints: Constraints) -> list[Broken]:
    """The constraints that `candidate` breaks. The private depth is no matter of numbers: see `candidates`."""
    found = []
    error = candidate.error
    if (most := constraints.edge_memory_bytes) is not None and candidate.edge_memory_bytes > most:
        have = candidate.edge_memory_bytes
        found.append(
            Broken("edge-memory", most, have, f"it needs {format_size(have)} at the edge, of {format_size(most)}")
        )
    if (longest := constraints.latency_s) is not None and candidate.seconds > longest:
        took = format_duration(candidate.seconds)
        found.append(Broken("latency", longest, candidate.seconds, f"it takes {took}, of {format_duration(longest)}"))
    bound = constraints.max_error if constraints.max_error is not None else math.inf if error.calibrated else MAX_ERROR
    if error.relative > bound:
        found.append(Broken("max-error", bound, error.relative, f"its error is {error.relative:.2g}, of {bound:g}"))
    if (share := constraints.max_disagreement) is not None and (differ := error.disagreement) > share:
        found.append(Broken("max-disagreement", share, differ, f"{differ:.1%} of its answers differ, of {share:.1%}"))
    return found


def judged(candidates: Sequence[Candidate], constraints: Constraints) -> tuple[Candidate, ...]:
    """The candidates, with the constraints that each breaks as its refusal."""
    return tuple(
        c if c.refused else replace(c, refused="; ".join(b.says for b in broken(c, constraints))) for c in candidates
    )


def choose(
    candidates: Sequence[Candidate], objective: Objective, constraints: Constraints
) -> tuple[tuple[Candidate, ...], Candidate, tuple[str, ...]]:
    """The candidates as judged, the best of those that may serve, and why it is.

    Where any candidate that may serve was measured, only such ones are chosen from: a prediction never beats them.

    Raises:
        Infeasible: every candidate breaks a constraint; names the one that fails, and by how much the nearest does.
    """
    every = judged(candidates, constraints)
    able = [c for c in every if not c.refused]
    if not able:
        raise _infeasible(candidates, constraints)
    seen = [c for c in able if c.measured is not None] or able
    value = VALUES[objective]
    best = min(seen, key=lambda c: (value(c), c.seconds, c.up_bytes))
    return every, best, tuple(_reasons(best, seen, objective, value))


VALUES: Mapping[Objective, Callable[[Candidate], float]] = {
    "latency": lambda c: c.seconds,
    "throughput": lambda c: _slowest_stage(c),
    "cost": lambda c: float("inf") if c.price is None else c.price,
    "energy": lambda c: float("inf") if c.energy_j is None else c.energy_j,
}
"""What each objective makes least."""


def _slowest_stage(candidate: Candidate) -> float:
    """Seconds of the slowest stage; a measured candidate's computing as it was seen, one request at a time."""
    t, seen = candidate.predicted, candidate.measured
    if seen is None:
        return t.slowest_stage
    wire = t.up + t.down + t.rtt
    part = seen.parts.get
    edge = part("preprocess", 0.0) + part("pack", 0.0) + part("edge", 0.0)
    return max(edge, t.up, t.down, max(part("cloud", 0.0) - wire, part("cloud_run", 0.0)))


def _reasons(
    best: Candidate, able: Sequence[Candidate], objective: Objective, value: Callable[[Candidate], float]
) -> list[str]:
    how = "measured" if best.measured is not None else "predicted only"
    said = [f"{best.name} is the best of {len(able)} for {objective}, {how}: {format_duration(best.seconds)} a request"]
    others = sorted((c for c in able if c is not best), key=value)
    if others and value(best) > 0:
        said.append(f"the next is {others[0].name}, {value(others[0]) / value(best) - 1:.1%} worse")
        if near := [c.name for c in others if value(c) <= value(best) * (1 + _NEARLY)]:
            said.append(f"within {_NEARLY:.0%} of it: {', '.join(near)}")
    return said


def _infeasible(candidates: Sequence[Candidate], constraints: Constraints) -> Infeasible:
    """The error for the constraint that no candidate keeps, else for the nearest candidate's worst."""
    left = [(c, found) for c in candidates if not c.refused and (found := broken(c, constraints))]
    if not left:
        reasons = "; ".join(sorted({c.refused for c in candidates}))
        return Infeasible(f"no candidate is left: {reasons}", constraint="private-depth", nearest=None)
    names = {b.constraint for _, found in left for b in found}
    alone = [n for n in sorted(names) if all(any(b.constraint == n for b in found) for _, found in left)]
    if alone:
        of = [(c, next(b for b in found if b.constraint == alone[0])) for c, found in left]
        nearest, worst = min(of, key=lambda pair: pair[1].value)
        sentence = f"no candidate meets {worst.constraint}"
    else:
        nearest, found = min(left, key=lambda pair: max(b.excess for b in pair[1]))
        worst = max(found, key=lambda b: b.excess)
        sentence = f"no candidate meets {' and '.join(sorted(names))} at once"
    return Infeasible(
        f"{sentence}; the nearest is {nearest.name}: {worst.says}",
        constraint=worst.constraint,
        limit=worst.limit,
        nearest=nearest.name,
        value=worst.value,
        by=worst.value - worst.limit,
        hint=f"ask for less of {worst.constraint}, or change the link",
    )
