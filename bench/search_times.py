"""How long the search takes: divisions of a graph like SmolLM2's prefill (1,959 nodes), of growing size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

from report import Goal, Row, at_most
from tested import planner_problems

from isthmus_tools.planner.search import solve, sweep

SIZES = (500, 1000, 2000, 4000, 10_000)
HELD_TO, MAX_S = 2000, 1.0


def figures(turns: int) -> tuple[list[Row], list[Goal]]:
    """Seconds of one minimum cut and of a whole sweep over bandwidth, by nodes; and what the search is held to."""
    language_model = planner_problems.language_model
    solve(language_model(SIZES[0], 2))  # the library is imported at its first use
    rows: list[Row] = []
    for nodes in SIZES:
        problem = language_model(nodes, 2)
        cut = statistics.median(_seconds(partial(solve, problem)) for _ in range(turns))
        swept = _seconds(partial(sweep, problem))
        rows.append({"nodes": nodes, "min-cut s": cut, "us a node": cut / nodes * 1e6, "sweep s": swept})
    held = next(row for row in rows if row["nodes"] == HELD_TO)
    first, last = float(rows[0]["us a node"] or 0), float(rows[-1]["us a node"] or 0)
    return rows, [
        at_most(f"planning time, {HELD_TO} nodes", float(held["min-cut s"] or 0), MAX_S, "s"),
        at_most(f"time a node, {SIZES[-1]} nodes over {SIZES[0]}", last / first, 3.0),
    ]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
