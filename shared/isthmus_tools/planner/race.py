"""Timing several ways to do one thing against each other: in turns, and the hopeless ones not for long."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from isthmus.artifacts.plan import Measured
from isthmus.errors import IsthmusError
from isthmus_tools.budget import UNLIMITED, Budget, Pace
from isthmus_tools.progress import Progress, silent

Run: TypeAlias = Callable[[int], Mapping[str, float]]
"""One request, the n-th of all: the seconds of its parts by name, `total` among them."""

ROUNDS = 15
_LEAST_OF_LEADERS = 5
_FEW = 3
"""Requests below which the quickest stands for all."""
_NEAR = 1.3
_MARGINS = ((1, 2.0), (2, 1.5), (3, 1.25), (5, 1.1), (8, 1.05))
"""After so many rounds, whoever is slower than the best by this factor runs no more."""


@dataclass
class _Runner:
    name: str
    run: Run
    parts: list[Mapping[str, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(p["total"] for p in self.parts)

    @property
    def least(self) -> float:
        return min(p["total"] for p in self.parts)

    def measured(self) -> Measured:
        totals = sorted(p["total"] for p in self.parts)
        low, high = quartiles(totals)
        names = [n for n in self.parts[0] if n != "total"]
        return Measured(
            median=statistics.median(totals),
            low=low,
            high=high,
            runs=len(totals),
            parts={n: statistics.median(p[n] for p in self.parts) for n in names},
        )


def race(
    runs: Mapping[str, Run],
    *,
    expected: Mapping[str, float] | None = None,
    beside: Collection[str] = (),
    rounds: int = ROUNDS,
    eliminate: bool = True,
    seed: int = 0,
    failed: dict[str, IsthmusError] | None = None,
    progress: Progress = silent,
    budget: Budget = UNLIMITED,
) -> dict[str, Measured]:
    """What each of `runs` takes: one request of each a round, in an order drawn anew, and medians with quartiles.

    With `eliminate` those that lag behind the best drop out, the sooner the further. After one or two requests the
    quickest of them counts, and nobody drops out whom `expected`, in seconds, has near the best: on a busy machine a
    single request may take twice its time. Later lower quartiles count. Where one is left, it stops. Those in `beside`
    are not in the running: they set no bar, and have at most three requests. Who fails is out and in `failed`, with the
    error. When the budget is spent no further request begins, but for one of all: what had none by then is not
    among the results.

    Raises:
        IsthmusError: one failed, and there is no `failed`.
    """
    rng = random.Random(seed)  # noqa: S311
    everyone = [_Runner(name, run) for name, run in runs.items()]
    left = list(everyone)
    near = _near(expected or {}, runs.keys() - set(beside))
    pace = Pace(rounds)
    for n in range(rounds):
        if n and budget.spent:
            break
        progress(
            f"measuring, round {n + 1} of at most {rounds}: {len(left)} of {len(everyone)} candidates{pace.left(n)}"
        )
        rng.shuffle(left)
        if n == 0 and expected and budget is not UNLIMITED:
            # Where there is no time for all, those that were measured are the most promising.
            left.sort(key=lambda r: expected.get(r.name, 0.0))
        for runner in list(left):
            if budget.spent and any(r.parts for r in everyone):
                break
            try:
                runner.parts.append(runner.run(n))
            except IsthmusError as e:
                if failed is None:
                    raise
                failed[runner.name] = e
                left.remove(runner)
                everyone.remove(runner)
        if eliminate and not budget.spent:
            aside = [r for r in left if r.name in beside] if n + 1 < _FEW else []
            left = [*_still_in([r for r in left if r.name not in beside], n + 1, near), *aside]
            if not left or (len(left) == 1 and n + 1 >= _LEAST_OF_LEADERS):
                break
    return {runner.name: runner.measured() for runner in everyone if runner.parts}


def _near(expected: Mapping[str, float], names: Collection[str]) -> set[str]:
    known = {name: s for name, s in expected.items() if name in names}
    return {name for name, s in known.items() if s <= _NEAR * min(known.values())}


def _still_in(left: Sequence[_Runner], done: int, near: Collection[str]) -> list[_Runner]:
    if not left:
        return []
    factor = next((factor for rounds, factor in reversed(_MARGINS) if done >= rounds), float("inf"))
    if done < _FEW:
        bar = min(r.least for r in left) * factor
        return [r for r in left if r.least <= bar or r.name in near]
    best = min(left, key=lambda r: r.median)
    seen = best.measured()
    bar = min(seen.median * factor, seen.high) if done >= _LEAST_OF_LEADERS else seen.median * factor
    return [r for r in left if r is best or r.measured().low <= bar]


def quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    """The lower and upper quartile of sorted values; the value itself where there is one."""
    if len(ordered) < 2:
        return ordered[0], ordered[0]
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return low, high
