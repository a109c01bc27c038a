"""What the transform codec is worth to the planner: its choice in each network without it and with it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plan_grid import LIMITS, Bench, text
from real import INPUTS, LIMIT
from report import Report, Row, at_least

from isthmus.planner.planning.choose import VALUES, choose
from isthmus.planner.planning.conditions import Conditions, Objective
from isthmus.planner.planning.make import merged
from isthmus.planner.planning.measuring import contenders

CODEC = "transform/3"
OBJECTIVES: Mapping[Objective, str] = {"latency": "ms a request", "throughput": "ms of the slowest stage"}


@dataclass(frozen=True)
class Change:
    """The choice in one network for one objective without the codec and with it, and what it counts of both."""

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
    """The planner's choices without the codec and with it, held to the same fidelity; for every objective."""
    draft = bench.calibrated
    if draft is None:
        return []
    with_it = draft.predict(cell)
    without = [c for c in with_it if all(coding.codec != CODEC for coding in c.codecs.values())]
    wanted = {c.name for some in (without, with_it) for o in OBJECTIVES for c in contenders(some, o, LIMITS)}
    some = [c for c in with_it if c.name in wanted]
    seen = bench.measure(draft, some, cell, eliminate=True, rounds=bench.rounds)
    chosen = {
        objective: [choose(merged(of, seen), objective, LIMITS)[1] for of in (without, with_it)]
        for objective in OBJECTIVES
    }
    duellists = list({c.name: c for pair in chosen.values() for c in pair}.values())
    duel = bench.measure(draft, duellists, cell, eliminate=False, rounds=2 * bench.rounds)
    figures = {c.name: c for c in duel}
    return [
        Change(
            bench.real.name,
            cell,
            objective,
            (before.name, after.name),
            (VALUES[objective](figures[before.name]), VALUES[objective](figures[after.name])),
        )
        for objective, (before, after) in chosen.items()
    ]


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
        held_to = f"at least {LIMIT:.0%} of {INPUTS // 2} parts of unseen photos keep their class"
        report.add(f"the planner's choice for {objective} before and after {CODEC}; {held_to}", rows)
        report.goals += [
            at_least(f"before over after the codec, {objective}, geometric mean", mean, 1.0),
            at_least(f"before over after the codec, {objective}, worst cell", min(c.faster for c in some), 0.97),
        ]
