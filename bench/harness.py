"""The harness of all benchmarks: arguments, interleaved timing, the report with its goals, environments of peers."""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Models and problems of the tests: `support`.
sys.path.insert(0, str(ROOT / "tests"))
# Kept between runs: environments of peers, models, caches, logs.
STATE = ROOT / ".isthmus" / "bench"

Row = Mapping[str, str | float | int | bool | None]


@dataclass(frozen=True)
class Goal:
    """A bound set before the measurement, and the measured value."""

    name: str
    goal: str
    value: float
    met: bool


def at_most(name: str, value: float, limit: float, unit: str = "") -> Goal:
    """A goal met by a value up to `limit`."""
    return Goal(name, f"at most {limit:.3g} {unit}".rstrip(), round(value, 4), value <= limit)


def at_least(name: str, value: float, limit: float, unit: str = "") -> Goal:
    """A goal met by a value from `limit` on."""
    return Goal(name, f"at least {limit:.3g} {unit}".rstrip(), round(value, 4), value >= limit)


@dataclass
class Report:
    """A benchmark's tables and goals. Units stand in the columns' names."""

    benchmark: str
    packages: Sequence[str]
    quick: bool
    as_json: bool
    models: Sequence[str] = ()
    figures: dict[str, list[Row]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    chosen: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Choices of the command line by option; empty where an option was not given."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the peers in environments of their own."""

    def say(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Report the current stage on stderr; a `Progress` callback."""
        print(stage, file=sys.stderr)

    def add(self, title: str, rows: Sequence[Row]) -> None:
        """Add a table."""
        self.figures[title] = list(rows)

    def emit(self) -> None:
        """Print everything, as tables or as one JSON document."""
        machine = environment(self.packages, self.versions)
        if self.as_json:
            doc = {
                "benchmark": self.benchmark,
                "quick": self.quick,
                "environment": machine,
                "figures": self.figures,
                "goals": [asdict(goal) for goal in self.goals],
            }
            json.dump(doc, sys.stdout, indent=1)
            print()
            return
        # Peers import this module in environments without rich.
        from rich.console import Console

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        for title, rows in self.figures.items():
            console.print(_table(title, rows))
        goals: list[Row] = [{"goal": g.name, "bound": g.goal, "measured": g.value, "": _met(g)} for g in self.goals]
        if goals:
            console.print(_table("Goals", goals))
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        console.print(f"{machine['cpus']} CPUs, {machine['model']}; Python {machine['python']}; {versions}")


def arguments(
    benchmark: str, about: str, packages: Sequence[str], models: Sequence[str] = (), **choices: Sequence[str]
) -> Report:
    """An empty report with the options of the command line; --models where a benchmark has several, as `choices`."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a minute or so: fewer repetitions, the same figures")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    if models:
        parser.add_argument("--models", nargs="+", choices=models, help="only these")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values, help="only these")
    options = parser.parse_args()
    return Report(
        benchmark,
        packages,
        options.quick,
        options.json,
        (options.models or ()) if models else (),
        chosen={name: getattr(options, name) or () for name in choices},
    )


def environment(packages: Sequence[str], more: Mapping[str, str]) -> dict[str, Any]:
    """The machine and the versions, for comparison of figures."""
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


def _table(title: str, rows: Sequence[Row]) -> Any:
    from rich.table import Table

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


Call = Callable[[], object]
Clock = Callable[[], float]
# A sample of a shorter call is the mean of several calls in a row.
MIN_S = 0.0005


class Samples:
    """Times of a call, in the order of measurement. Units: seconds."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    @property
    def p50(self) -> float:
        """Median."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """95th percentile."""
        return statistics.quantiles(self.seconds, n=20, method="inclusive")[-1] if len(self.seconds) > 1 else self.p50

    def over(self, other: Samples) -> float:
        """Median ratio to `other`, turn by turn: noise longer than a turn cancels out."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(
    calls: Mapping[str, Call],
    *,
    turns: int,
    block: int = 1,
    warm: int = 1,
    batch: bool = False,
    clock: Clock = time.perf_counter,
) -> dict[str, Samples]:
    """Time the calls interleaved: `turns` turns of `block` calls of each, starting with another call each turn.

    Before each block, `warm` calls are not timed. With `batch`, short calls are timed several at once. time.thread_time
    as `clock` suits calls that work in this thread alone: other load then counts for less.
    """
    names = list(calls)
    numbers = {name: _number(call, clock) if batch else 1 for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with _no_collector():
        for turn in range(turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                call, number = calls[name], numbers[name]
                for _ in range(warm):
                    call()
                for _ in range(block):
                    seconds[name].append(_timed(call, number, clock))
            gc.collect()
    return {name: Samples(times) for name, times in seconds.items()}


def _timed(call: Call, number: int, clock: Clock) -> float:
    start = clock()
    for _ in range(number):
        call()
    return (clock() - start) / number


def _number(call: Call, clock: Clock) -> int:
    call()
    return max(1, int(MIN_S / max(1e-9, min(_timed(call, 1, clock) for _ in range(5)))))


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Milliseconds of each stage of a Server-Timing header.
Stages = dict[str, list[float]]

# Source: docs/reference/api.md, "Server-Timing".
_STAGE = re.compile(r'([a-z0-9-]+)(?:;desc="[^"]*")?;dur=([0-9.]+)')


def add_stages(stages: Stages, header: str) -> None:
    """Add the stages of a response's Server-Timing header."""
    for stage, ms in _STAGE.findall(header):
        stages.setdefault(stage, []).append(float(ms))


def stage_medians(stages: Stages) -> dict[str, float]:
    """Median milliseconds of each stage."""
    return {stage: statistics.median(ms) for stage, ms in stages.items()}


BENCH = Path(__file__).resolve().parent


def python_with(name: str) -> Path:
    """The Python of an environment with requirements-NAME.txt, installed on first use or when the file changes."""
    requirements = BENCH / f"requirements-{name}.txt"
    folder = STATE / name
    python, stamp = folder / "bin" / "python", folder / "made-from"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == digest):
        print(f"installing {requirements.name} into {folder.relative_to(ROOT)}; once", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", requirements],
            check=True,
            stdout=sys.stderr,
        )
        stamp.write_text(digest)
    return python


def version_in(name: str, package: str) -> str:
    """The version of a package in requirements-NAME.txt."""
    for line in (BENCH / f"requirements-{name}.txt").read_text().splitlines():
        if line.startswith((f"{package}==", f"{package}[")):
            return line.partition("==")[2]
    raise LookupError(f"requirements-{name}.txt does not pin {package}")


def peer_environment() -> Mapping[str, str]:
    """This process's environment with Isthmus on Python's path."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "shared")}
