"""What codecs are worth to the planner: its choice in each network without any, without the transform, and with all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from plan_grid import LIMITS, Bench, text
from real import INPUTS, LIMIT
from report import Report, Row, at_least

from isthmus.artifacts.choice import TRANSFORM_ID
from isthmus.artifacts.conditions import Conditions, Objective
from isthmus_tools.planner.choice import VALUES, choose, with_measurements
from isthmus_tools.planner.measurement import contenders

CODEC, PHOTO = TRANSFORM_ID, "photo/1"
ALL = "with all"
AMONG: Mapping[str, Callable[[str], bool]] = {
    "as it is": lambda codec: codec == PHOTO,
    f"without {CODEC}": lambda codec: codec != CODEC,
    ALL: lambda _: True,
}
"""Which codecs a choice may use: none, but that a photo may travel as it came; all but one; every one."""
OBJECTIVES: Mapping[Objective, str] = {"latency": "ms a request", "throughput": "ms of the slowest stage"}


@dataclass(frozen=True)
class Change:
    """The choices in one network for one objective, one for each of AMONG, and what each counts."""

    model: str
    conditions: Conditions
    objective: Objective
    names: Mapping[str, str]
    seconds: Mapping[str, float]

    def faster(self, before: str) -> float:
        """How many times less the choice among all takes than that one."""
        return self.seconds[before] / self.seconds[ALL]


def changes(bench: Bench, cell: Conditions) -> list[Change]:
    """The planner's choices among fewer codecs and among all, held to the same fidelity; for every objective."""
    candidate_set = bench.calibrated
    if candidate_set is None:
        return []
    every = candidate_set.predict(cell)
    among = {
        label: [c for c in every if all(may(coding.codec) for coding in c.codecs.values())]
        for label, may in AMONG.items()
    }
    wanted = {c.name for some in among.values() for o in OBJECTIVES for c in contenders(some, o, LIMITS)}
    some = [c for c in every if c.name in wanted]
    seen = bench.measure(candidate_set, some, cell, eliminate=True, rounds=bench.rounds)
    chosen = {
        objective: {label: choose(with_measurements(of, seen), objective, LIMITS)[1] for label, of in among.items()}
        for objective in OBJECTIVES
    }
    duellists = list({c.name: c for each in chosen.values() for c in each.values()}.values())
    duel = bench.measure(candidate_set, duellists, cell, eliminate=False, rounds=2 * bench.rounds)
    figures = {c.name: c for c in duel}
    return [
        Change(
            bench.real.name,
            cell,
            objective,
            {label: c.name for label, c in each.items()},
            {label: VALUES[objective](figures[c.name]) for label, c in each.items()},
        )
        for objective, each in chosen.items()
    ]


def add_changes(report: Report, made: Sequence[Change]) -> None:
    """A table and the goals: better on average, never worse by more than the noise."""
    before = [label for label in AMONG if label != ALL]
    for objective, unit in OBJECTIVES.items():
        some = [c for c in made if c.objective == objective]
        if not some:
            continue
        rows: list[Row] = []
        for c in some:
            row: dict[str, str | float | int | bool | None] = {"model": c.model, "network": text(c.conditions)}
            for label in AMONG:
                row |= {label: c.names[label], f"{label}, {unit}": c.seconds[label] * 1000}
            rows.append(row | {f"times better than {label}": c.faster(label) for label in before})
        held_to = f"at least {LIMIT:.0%} of {INPUTS // 2} parts of unseen photos keep their class"
        report.add(f"the planner's choice for {objective}, by the codecs that it may use; {held_to}", rows)
        for label in before:
            ratios = [c.faster(label) for c in some]
            name = f"choice {label} over the one among all codecs, {objective}"
            report.goals += [
                at_least(f"{name}, geometric mean", statistics.geometric_mean(ratios), 1.0),
                at_least(f"{name}, worst cell", min(ratios), 0.97),
            ]
