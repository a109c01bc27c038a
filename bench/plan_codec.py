"""What the codec is worth to the planner: its choice in each network before calibration and after, by turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plan_grid import LIMITS, Bench, text
from real import INPUTS, LIMIT
from report import Report, Row, at_least

from isthmus.planner.planning.choose import VALUES, choose
from isthmus.planner.planning.conditions import Conditions, Objective
from isthmus.planner.planning.draft import Draft
from isthmus.planner.planning.make import merged
from isthmus.planner.planning.measuring import contenders
from isthmus.planner.planning.plan import Candidate

OBJECTIVES: Mapping[Objective, str] = {"latency": "ms a request", "throughput": "ms of the slowest stage"}


@dataclass(frozen=True)
class Change:
    """The choice in one network for one objective before calibration and after, and what it counts of both."""

    model: str
    conditions: Conditions
    objective: Objective
    names: tuple[str, str]
    seconds: tuple[float, float]

    @property
    def faster(self) -> float:
        """How many times less the second takes."""
        return self.seconds[0] / self.seconds[1]


def changes(bench: Bench, cell: Conditions) -> list[Change]:
    """The planner's choices before and after, each pair in a duel, for every objective."""
    if bench.calibrated is None:
        return []
    before, after = (_choices(bench, draft, cell) for draft in (bench.draft, bench.calibrated))
    made = []
    for objective in OBJECTIVES:
        one, other = before[objective], after[objective]
        same = one.name == other.name
        seconds = (VALUES[objective](one),) * 2 if same else _duel(bench, cell, objective, one, other)
        made.append(Change(bench.real.name, cell, objective, (one.name, other.name), seconds))
    return made


def _choices(bench: Bench, draft: Draft, cell: Conditions) -> dict[Objective, Candidate]:
    """What the planner takes for each objective, of what it measured for any of them."""
    predicted = draft.predict(cell)
    wanted = {c.name for objective in OBJECTIVES for c in contenders(predicted, objective, LIMITS)}
    some = [c for c in predicted if c.name in wanted]
    seen = bench.measure(draft, some, cell, eliminate=True, rounds=bench.rounds)
    return {objective: choose(merged(predicted, seen), objective, LIMITS)[1] for objective in OBJECTIVES}


def _duel(bench: Bench, cell: Conditions, objective: Objective, one: Candidate, other: Candidate) -> tuple[float, ...]:
    """What both take, measured by turns: they belong to two versions of the bundle."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for draft, candidate, into in ((bench.draft, one, found[0]), (bench.calibrated, other, found[1])):
            assert draft is not None
            (seen,) = bench.measure(draft, [candidate], cell, eliminate=False, rounds=bench.rounds)
            into.append(VALUES[objective](seen))
    return tuple(statistics.median(seconds) for seconds in found)


def add_changes(report: Report, made: Sequence[Change]) -> None:
    """A table and the goals: better on average, never worse by more than the noise."""
    for objective, unit in OBJECTIVES.items():
        some = [c for c in made if c.objective == objective]
        if not some:
            continue
        rows: list[Row] = [
            {
                "model": c.model,
                "network": text(c.conditions),
                "before": c.names[0],
                f"before, {unit}": c.seconds[0] * 1000,
                "after": c.names[1],
                f"after, {unit}": c.seconds[1] * 1000,
                "times better": c.faster,
            }
            for c in some
        ]
        mean = statistics.geometric_mean([c.faster for c in some])
        how = f"the planner's choice for {objective} before and after the codec (at least {LIMIT:.0%} of {INPUTS // 2}"
        report.add(f"{how} parts of unseen photos keep their class)", rows)
        report.goals += [
            at_least(f"before over after the codec, {objective}, geometric mean", mean, 1.0),
            at_least(f"before over after the codec, {objective}, worst cell", min(c.faster for c in some), 0.97),
        ]
