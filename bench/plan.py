"""Whether the planner chooses right: its choice over a grid of networks, beside every cut and beside not splitting."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import real
import search_times
from plan_codec import Change, add_changes, changes
from plan_grid import BASELINES, EDGE_RAW, SLOWER, Cell, one_cell, prepared, text
from quota import share_of_a_cpu
from report import Report, Row, arguments, at_most


def main() -> None:
    report = arguments("plan", __doc__, ["numpy", "onnxruntime", "scipy"], list(real.EVERY))
    names = report.models or (["efficientnet-lite0"] if report.quick else list(real.EVERY))
    cells: list[Cell] = []
    made: list[Change] = []
    how = ""
    for name in names:
        with prepared(real.EVERY[name], report) as bench:
            with share_of_a_cpu(1 / SLOWER, []) as how:
                pass
            for cell in bench.functions:
                report.say(f"{name} at {text(cell)}")
                cells.append(one_cell(bench, cell))
                made += changes(bench, cell)
    report.say("searching graphs of growing size")
    rows, held = search_times.figures(3 if report.quick else 9)
    add_cells(report, cells, how)
    add_changes(report, made)
    report.add("the search alone, two tiers; a sweep is every division that is the fastest at some bandwidth", rows)
    add_goals(report, cells)
    report.goals += held
    report.emit()


def add_cells(report: Report, cells: Sequence[Cell], how: str) -> None:
    """A table a model, a row a network."""
    for name in dict.fromkeys(c.model for c in cells):
        rows: list[Row] = []
        for c in (c for c in cells if c.model == name):
            row: dict[str, str | float | int | bool | None] = {"network": text(c.conditions), "choice": c.chosen}
            row["choice ms"] = c.seconds[c.chosen] * 1000
            for label, candidate in BASELINES.items():
                row[f"{label} ms"] = c.seconds[candidate] * 1000 if candidate in c.seconds else None
            row |= {"best": c.best, "best ms": c.seconds[c.best] * 1000, "over best %": c.regret * 100}
            row["cuts tried"] = c.tried
            rows.append(row)
        report.add(f"{name}: medians; the edge has 1/{SLOWER} of a CPU by {how}", rows)
    ways = (*BASELINES, EDGE_RAW)
    each: list[Row] = [
        {"model": c.model, "network": text(c.conditions), **{f"over {way}": c.speedup(way) for way in ways}}
        for c in cells
    ]
    report.add(
        "how many times faster the choice is",
        [*each, {"model": "all", "network": "geometric mean", **means(cells, ways)}],
    )


def means(cells: Sequence[Cell], ways: Sequence[str]) -> Row:
    """How many times faster the choice is than each baseline, on geometric average."""
    row: dict[str, str | float | int | bool | None] = {}
    for way in ways:
        found = [s for c in cells if (s := c.speedup(way)) is not None]
        row[f"over {way}"] = statistics.geometric_mean(found) if found else None
    return row


def add_goals(report: Report, cells: Sequence[Cell]) -> None:
    """What the planner is held to."""
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


if __name__ == "__main__":
    main()
