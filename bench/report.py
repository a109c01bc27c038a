"""What every benchmark prints: tables, goals with what was measured against them, and the machine; or all as JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".isthmus" / "bench"
"""What benchmarks keep between runs: environments of peers, models, caches, logs."""

Row = Mapping[str, str | float | int | bool | None]


@dataclass(frozen=True)
class Goal:
    """A bound that was set beforehand, and the measured value."""

    name: str
    goal: str
    value: float
    met: bool


def at_most(name: str, value: float, limit: float, unit: str = "") -> Goal:
    """A goal that `value` meets if it does not exceed `limit`."""
    return Goal(name, f"at most {limit:.3g} {unit}".rstrip(), round(value, 4), value <= limit)


def at_least(name: str, value: float, limit: float, unit: str = "") -> Goal:
    """A goal that `value` meets if it reaches `limit`."""
    return Goal(name, f"at least {limit:.3g} {unit}".rstrip(), round(value, 4), value >= limit)


@dataclass
class Report:
    """One benchmark's result, filled as it goes. Units stand in the columns' names."""

    benchmark: str
    packages: Sequence[str]
    quick: bool
    as_json: bool
    models: Sequence[str] = ()
    figures: dict[str, list[Row]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of what runs in environments of its own."""

    def say(self, doing: str) -> None:
        """Tell whoever waits what goes on; never on stdout."""
        Console(stderr=True, highlight=False).print(f"[dim]{doing}[/]", soft_wrap=True)

    def add(self, title: str, rows: Sequence[Row]) -> None:
        """Add a table."""
        self.figures[title] = list(rows)

    def emit(self) -> None:
        """Print everything, as tables or as one JSON document."""
        found = environment(self.packages, self.versions)
        if self.as_json:
            doc = {
                "benchmark": self.benchmark,
                "quick": self.quick,
                "environment": found,
                "figures": self.figures,
                "goals": [asdict(goal) for goal in self.goals],
            }
            json.dump(doc, sys.stdout, indent=1)
            print()
            return
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        for title, rows in self.figures.items():
            console.print(_table(title, rows))
        goals: list[Row] = [{"goal": g.name, "wanted": g.goal, "measured": g.value, "": _met(g)} for g in self.goals]
        if goals:
            console.print(_table("Goals", goals))
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        console.print(f"{found['cpus']} CPUs, {found['model']}; Python {found['python']}; {versions}", style="dim")


def arguments(benchmark: str, about: str, packages: Sequence[str], models: Sequence[str] = ()) -> Report:
    """Read the command line that every benchmark has, into an empty report; one of several models lets choose."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a minute or so: fewer repetitions, the same figures")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    if models:
        parser.add_argument("--models", nargs="+", choices=models, help="only these")
    given = parser.parse_args()
    return Report(benchmark, packages, given.quick, given.json, (given.models or ()) if models else ())


def environment(packages: Sequence[str], more: Mapping[str, str]) -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "model": _cpu_model(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages} | dict(more),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _met(goal: Goal) -> str:
    return "[green]met[/]" if goal.met else "[red]missed[/]"


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in rows[0]:
        numbers = all(isinstance(row[column], int | float | None) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: str | float | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
