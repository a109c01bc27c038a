"""Successive elimination: interleaved timing of candidates; dominated candidates stop early.

Source: Even-Dar, Mannor, Mansour 2006 (action elimination), with fixed margins in place of confidence intervals.
"""

from __future__ import annotations

import math
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
"""A request by its number, returning the seconds of its parts by name, `total` among these."""

ROUNDS = 15
MIN_LEADER_ROUNDS = 5
# Below 3 requests a median says no more than the fastest request.
_MIN_MEDIAN_RUNS = 3
# On a busy machine a single request may take twice its time, so candidates predicted this near the best stay at first.
_NEAR = 1.3
# After so many rounds, candidates slower than the best by the factor stop: few requests need wide margins.
_MARGINS = ((1, 2.0), (2, 1.5), (3, 1.25), (5, 1.1), (8, 1.05))


@dataclass
class _Arm:
    """A candidate of the elimination (an arm, in the terms of bandits), with the parts of each request."""

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


def successive_elimination(
    runs: Mapping[str, Run],
    *,
    expected: Mapping[str, float] | None = None,
    excluded: Collection[str] = (),
    rounds: int = ROUNDS,
    eliminate: bool = True,
    seed: int = 0,
    failed: dict[str, IsthmusError] | None = None,
    progress: Progress = silent,
    budget: Budget = UNLIMITED,
) -> dict[str, Measured]:
    """Medians with quartiles: each round runs one request of every candidate, in random order.

    With `eliminate`, candidates too far behind the best stop, at ever smaller margins. After one or two requests the
    fastest request counts, and candidates whose `expected` seconds are near the best stay; later the lower quartile
    counts. A single remaining candidate ends the rounds. Candidates in `excluded` cannot be chosen: these eliminate no
    other candidate and take at most three requests. A candidate that fails stops, with the error in `failed`. After the
    budget no further request begins, except a first one in all; candidates without a request have no result.

    Raises:
        IsthmusError: a candidate failed, and there is no `failed`.
    """
    rng = random.Random(seed)  # noqa: S311 - an order of requests, no secret
    arms = [_Arm(name, run) for name, run in runs.items()]
    active = list(arms)
    near = _near(expected or {}, runs.keys() - set(excluded))
    pace = Pace(rounds)
    for n in range(rounds):
        if n and budget.spent:
            break
        progress(f"measuring, round {n + 1} of at most {rounds}: {len(active)} of {len(arms)} candidates{pace.left(n)}")
        # Slow drifts of the machine or the link then hit all candidates alike.
        rng.shuffle(active)
        if n == 0 and expected and budget is not UNLIMITED:
            # If time runs out in the first round, the most promising candidates have a measurement.
            active.sort(key=lambda arm: expected.get(arm.name, 0.0))
        for arm in list(active):
            if budget.spent and any(a.parts for a in arms):
                break
            try:
                arm.parts.append(arm.run(n))
            except IsthmusError as e:
                if failed is None:
                    raise
                failed[arm.name] = e
                active.remove(arm)
                arms.remove(arm)
        if eliminate and not budget.spent:
            spectators = [arm for arm in active if arm.name in excluded] if n + 1 < _MIN_MEDIAN_RUNS else []
            active = [*_survivors([arm for arm in active if arm.name not in excluded], n + 1, near), *spectators]
            if not active or (len(active) == 1 and n + 1 >= MIN_LEADER_ROUNDS):
                break
    return {arm.name: arm.measured() for arm in arms if arm.parts}


def _near(expected: Mapping[str, float], names: Collection[str]) -> set[str]:
    seconds = {name: s for name, s in expected.items() if name in names}
    return {name for name, s in seconds.items() if s <= _NEAR * min(seconds.values())}


def _survivors(active: Sequence[_Arm], rounds: int, near: Collection[str]) -> list[_Arm]:
    if not active:
        return []
    factor = next((factor for after, factor in reversed(_MARGINS) if rounds >= after), math.inf)
    if rounds < _MIN_MEDIAN_RUNS:
        bar = min(arm.least for arm in active) * factor
        return [arm for arm in active if arm.least <= bar or arm.name in near]
    best = min(active, key=lambda arm: arm.median)
    leader = best.measured()
    # Once quartiles are stable, a lower quartile above the leader's upper quartile is reason enough.
    bar = leader.median * factor if rounds < MIN_LEADER_ROUNDS else min(leader.median * factor, leader.high)
    return [arm for arm in active if arm is best or arm.measured().low <= bar]


def quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    """The lower and upper quartile of sorted values; a single value stands for both."""
    if len(ordered) < 2:
        return ordered[0], ordered[0]
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return low, high
