"""The planner's choice over slower edges and networks, beside every cut, no split, and fewer codecs; search time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from harness import Goal, Report, Row, arguments, at_least, at_most
from models import INPUTS, LIMIT, PLANNED
from plan_grid import (
    BASELINES,
    EDGE_RAW,
    LIMITS,
    QUICK_SLOWDOWNS,
    SLOWDOWNS,
    Bench,
    Cell,
    Rivals,
    one_cell,
    prepared,
    rivals,
    text,
)

from isthmus.artifacts.choice import TRANSFORM_ID
from isthmus.artifacts.conditions import Conditions, Objective
from isthmus_tools.planner.choice import VALUES, choose, with_measurements
from isthmus_tools.planner.measurement import contenders
from isthmus_tools.planner.search import solve, sweep
from support import planner_problems


def main() -> None:
    report = arguments("plan", __doc__, ["numpy", "onnxruntime", "scipy"], list(PLANNED))
    names = report.models or (["efficientnet-lite0"] if report.quick else list(PLANNED))
    cells: list[Cell] = []
    comparisons: list[Change] = []
    duels: list[Rivals] = []
    slowdowns = QUICK_SLOWDOWNS if report.quick else SLOWDOWNS
    for name, slowdown in itertools.product(names, slowdowns):
        with prepared(PLANNED[name], slowdown, report) as bench:
            for cell in bench.functions:
                report.say(f"{name}, an edge {slowdown:g} times slower, at {text(cell)}")
                duels.append(rivals(bench, cell))
                if bench.every is not None:
                    cells.append(one_cell(bench, bench.every, cell))
                    comparisons += changes(bench, cell)
    report.say("searching graphs of growing size")
    rows, goals = search_times(3 if report.quick else 9)
    add_rivals(report, duels)
    if cells:
        add_cells(report, cells)
        add_changes(report, comparisons)
    report.add("the search alone, two tiers; a sweep finds every partition that is optimal at some bandwidth", rows)
    if cells:
        add_goals(report, cells)
    report.goals += goals
    report.emit()


def add_rivals(report: Report, duels: Sequence[Rivals]) -> None:
    """Where a split is measured best, for each model and edge: in how many cells, and by how much."""
    rows: list[Row] = []
    for d in duels:
        row: dict[str, str | float | int | bool | None] = {"model": d.model, "edge slower by": d.slowdown}
        row["network"] = text(d.conditions)
        for kind in ("split", "edge", "cloud"):
            c = d.best.get(kind)
            row |= {kind: c.name if c else None, f"{kind} ms": c.seconds * 1000 if c else None}
        row["split faster by %"] = None if d.gain is None else d.gain * 100
        row["than edge by %"] = None if d.private_gain is None else d.private_gain * 100
        row |= {"best": d.kind, "best as predicted": d.predicted}
        rows.append(row)
    report.add("the best of each kind, medians of a duel", rows)
    report.add("cells in which a split is measured best; private: inputs may not leave the edge", _counts(duels))
    report.add("what else differs, medians of the cells", _other_reasons(duels))


def _counts(duels: Sequence[Rivals]) -> list[Row]:
    rows: list[Row] = []
    for name, slowdown in dict.fromkeys((d.model, d.slowdown) for d in duels):
        some = [d for d in duels if (d.model, d.slowdown) == (name, slowdown)]
        row: dict[str, str | float | int | bool | None] = {"model": name, "edge": f"{slowdown:g}x slower"}
        row["cells"] = len(some)
        for label, gains in (("", [d.gain for d in some]), ("private ", [d.private_gain for d in some])):
            wins = [gain * 100 for gain in gains if gain is not None and gain > 0]
            row[f"{label}split best in"] = len(wins)
            row[f"{label}median gain %"] = statistics.median(wins) if wins else None
            row[f"{label}largest gain %"] = max(wins, default=None)
        row["best as predicted in"] = sum(d.kind == d.predicted for d in some)
        rows.append(row)
    return rows


def _other_reasons(duels: Sequence[Rivals]) -> list[Row]:
    """Memory at the edge, run time in the cloud and bytes over the link, of the best splits and of the whole model."""
    rows: list[Row] = []
    for name in dict.fromkeys(d.model for d in duels):
        for kind in ("split", "edge", "cloud"):
            some = [d.best[kind] for d in duels if d.model == name and kind in d.best]
            runs = [c.measured.parts.get("cloud_run", 0.0) for c in some if c.measured]
            if some and runs:
                row: dict[str, str | float | int | bool | None] = {"model": name, "kind": kind}
                row["edge memory MB"] = statistics.median(c.edge_memory_bytes for c in some) / 1e6
                row["cloud run ms"] = statistics.median(runs) * 1000
                row["kB over the link"] = statistics.median(c.up_bytes for c in some) / 1000
                rows.append(row)
    return rows


def add_cells(report: Report, cells: Sequence[Cell]) -> None:
    """A table for each model, with a row for each network."""
    for name in dict.fromkeys(c.model for c in cells):
        rows: list[Row] = []
        for c in (c for c in cells if c.model == name):
            row: dict[str, str | float | int | bool | None] = {"edge": f"{c.slowdown:g}x slower"}
            row |= {"network": text(c.conditions), "choice": c.chosen}
            row["choice ms"] = c.seconds[c.chosen] * 1000
            for label, candidate in BASELINES.items():
                row[f"{label} ms"] = c.seconds[candidate] * 1000 if candidate in c.seconds else None
            row |= {"best": c.best, "best ms": c.seconds[c.best] * 1000, "over best %": c.regret * 100}
            row["cuts tried"] = c.tried
            rows.append(row)
        report.add(f"{name}: medians; times at the edge are CPU time, multiplied", rows)
    ways = (*BASELINES, EDGE_RAW)
    each: list[Row] = []
    for c in cells:
        where: Row = {"model": c.model, "edge": f"{c.slowdown:g}x slower", "network": text(c.conditions)}
        each.append({**where, **{f"over {way}": c.speedup(way) for way in ways}})
    report.add(
        "how many times faster the choice is",
        [*each, {"model": "all", "edge": "", "network": "geometric mean", **means(cells, ways)}],
    )


def means(cells: Sequence[Cell], ways: Sequence[str]) -> Row:
    """Geometric mean of the choice's speedup over each baseline."""
    row: dict[str, str | float | int | bool | None] = {}
    for way in ways:
        speedups = [s for c in cells if (s := c.speedup(way)) is not None]
        row[f"over {way}"] = statistics.geometric_mean(speedups) if speedups else None
    return row


def add_goals(report: Report, cells: Sequence[Cell]) -> None:
    """Goals of the planner."""
    regrets = [c.regret * 100 for c in cells]
    worse = [
        c.seconds[c.chosen] / min(c.seconds[n] for n in BASELINES.values() if n in c.seconds) * 100 - 100 for c in cells
    ]
    report.goals += [
        at_most("choice over the best of all cuts, median cell", statistics.median(regrets), 1.0, "%"),
        at_most("choice over the best of all cuts, worst cell", max(regrets), 5.0, "%"),
        at_most("choice over the better of edge-only and cloud-only, worst cell", max(worse), 3.0, "%"),
    ]
    for name in dict.fromkeys(c.model for c in cells):
        apart = [a * 100 for c in cells if c.model == name for a in c.apart]
        report.goals.append(at_most(f"{name}: prediction's error, median", statistics.median(apart), 15.0, "%"))


CODEC, PHOTO = TRANSFORM_ID, "photo/1"
ALL = "with all"
# The allowed codecs of a choice: a photo as it came alone, all without the transform, all.
AMONG: Mapping[str, Callable[[str], bool]] = {
    "as it is": lambda codec: codec == PHOTO,
    f"without {CODEC}": lambda codec: codec != CODEC,
    ALL: lambda _: True,
}
OBJECTIVES: Mapping[Objective, str] = {"latency": "ms a request", "throughput": "ms of the slowest stage"}


@dataclass(frozen=True)
class Change:
    """The choices in a network for an objective, for each of AMONG, and their measured objective."""

    model: str
    slowdown: float
    conditions: Conditions
    objective: Objective
    names: Mapping[str, str]
    seconds: Mapping[str, float]

    def faster(self, before: str) -> float:
        """The speedup of the choice among all codecs."""
        return self.seconds[before] / self.seconds[ALL]


def changes(bench: Bench, cell: Conditions) -> list[Change]:
    """The planner's choices among fewer codecs and among all, at the same fidelity, for each objective."""
    candidate_set = bench.calibrated
    if candidate_set is None:
        return []
    every = candidate_set.predict(cell)
    among = {
        label: [c for c in every if all(may(coding.codec) for coding in c.codecs.values())]
        for label, may in AMONG.items()
    }
    names = {c.name for some in among.values() for o in OBJECTIVES for c in contenders(some, o, LIMITS)}
    some = [c for c in every if c.name in names]
    measured = bench.measure(candidate_set, some, cell, eliminate=True, rounds=bench.rounds)
    choices = {
        objective: {label: choose(with_measurements(of, measured), objective, LIMITS)[1] for label, of in among.items()}
        for objective in OBJECTIVES
    }
    duellists = list({c.name: c for each in choices.values() for c in each.values()}.values())
    duel = bench.measure(candidate_set, duellists, cell, eliminate=False, rounds=2 * bench.rounds)
    figures = {c.name: c for c in duel}
    return [
        Change(
            bench.model.name,
            bench.slowdown,
            cell,
            objective,
            {label: c.name for label, c in each.items()},
            {label: VALUES[objective](figures[c.name]) for label, c in each.items()},
        )
        for objective, each in choices.items()
    ]


def add_changes(report: Report, comparisons: Sequence[Change]) -> None:
    """A table and the goals: better on average, worse by no more than noise."""
    before = [label for label in AMONG if label != ALL]
    for objective, unit in OBJECTIVES.items():
        some = [c for c in comparisons if c.objective == objective]
        if not some:
            continue
        rows: list[Row] = []
        for c in some:
            row: dict[str, str | float | int | bool | None] = {"model": c.model, "edge": f"{c.slowdown:g}x slower"}
            row["network"] = text(c.conditions)
            for label in AMONG:
                row |= {label: c.names[label], f"{label}, {unit}": c.seconds[label] * 1000}
            rows.append(row | {f"times better than {label}": c.faster(label) for label in before})
        fidelity = f"at least {LIMIT:.0%} of {INPUTS // 2} parts of unseen photos keep their class"
        report.add(f"the planner's choice for {objective}, by the allowed codecs; {fidelity}", rows)
        for label in before:
            ratios = [c.faster(label) for c in some]
            name = f"choice {label} over the choice among all codecs, {objective}"
            report.goals += [
                at_least(f"{name}, geometric mean", statistics.geometric_mean(ratios), 1.0),
                at_least(f"{name}, worst cell", min(ratios), 0.97),
            ]


SIZES = (500, 1000, 2000, 4000, 10_000)
GOAL_NODES, MAX_S = 2000, 1.0


def search_times(turns: int) -> tuple[list[Row], list[Goal]]:
    """Seconds of a minimum cut and of a whole sweep over bandwidth, by nodes, and the goals."""
    language_model = planner_problems.language_model
    solve(language_model(SIZES[0], 2))  # imports the library
    rows: list[Row] = []
    for nodes in SIZES:
        problem = language_model(nodes, 2)
        cut = statistics.median(_seconds(partial(solve, problem)) for _ in range(turns))
        swept = _seconds(partial(sweep, problem))
        rows.append({"nodes": nodes, "min-cut s": cut, "us a node": cut / nodes * 1e6, "sweep s": swept})
    goal_row = next(row for row in rows if row["nodes"] == GOAL_NODES)
    first, last = float(rows[0]["us a node"] or 0), float(rows[-1]["us a node"] or 0)
    return rows, [
        at_most(f"planning time, {GOAL_NODES} nodes", float(goal_row["min-cut s"] or 0), MAX_S, "s"),
        at_most(f"time a node, {SIZES[-1]} nodes over {SIZES[0]}", last / first, 3.0),
    ]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
