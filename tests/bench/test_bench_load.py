"""The load benchmark: its cells, its goals, and a peer that does not start."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from support.paths import ROOT

BENCH = ROOT / "bench"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("load")


def cells(load: Any, rates: dict[str, float], cpu_s: float = 0.01) -> dict[tuple[str, int], Any]:
    """Cells of systems that answer so many requests a second, each after a second over the rate."""
    made = {}
    for name, rate in rates.items():
        for callers in load.CALLERS:
            cell = made[name, callers] = load.SystemTurns()
            for turn in (0.9, 1.0, 5.0):
                count = int(rate * turn)
                cell.add(load.TurnResult([1 / rate] * count, 1.0, cpu_s * count, failed=1))
    return made


def report(load: Any) -> Any:
    harness = importlib.import_module("harness")
    return harness.Report("load", [], quick=True, as_json=True)


def test_a_cell_holds_the_median_of_its_turns(load: Any) -> None:
    cell = cells(load, {load.FUNCTIONS: 100.0})[load.FUNCTIONS, 16]
    assert (cell.rate, cell.p99_s, cell.failed) == (100.0, 0.01, 3)
    assert cell.cpu_s == pytest.approx(0.01)


def test_a_turn_without_answers_is_a_rate_of_zero(load: Any) -> None:
    cell = load.SystemTurns()
    cell.add(load.TurnResult([], 2.0, 0.1, failed=4))
    assert (cell.rate, cell.failed) == (0.0, 4)


def goals(load: Any, rates: dict[str, float]) -> dict[str, bool]:
    result = report(load)
    load.add_goals(result, "m", cells(load, rates), [load.Overload(100.0, OutcomeOfNone(), 1.0)])
    return {goal.name: goal.met for goal in result.goals}


class OutcomeOfNone:
    """A load without exchanges."""

    exchanges: tuple[Any, ...] = ()

    def goodput(self, bound_s: float) -> float:
        return 95.0


def test_goals_compare_with_each_peer_in_its_topology(load: Any) -> None:
    servers = importlib.import_module("load_servers")
    rates = {
        load.ALONE: 110.0,
        load.FUNCTIONS: 90.0,
        load.HEAD_IN_ROUTER: 100.0,
        servers.RAY: 95.0,
        servers.MLSERVER: 95.0,
    }
    met = goals(load, rates)
    assert met["m: best throughput over onnxruntime alone's"]
    # Ray Serve runs the same three parts, MLServer the uncut model.
    assert not met["m: best throughput of isthmus over Ray Serve's"]
    assert met["m: best throughput of isthmus, head in the router over MLServer, uncut's"]
    assert met["m: p99 of isthmus, head in the router over MLServer, uncut's, 64 callers"]
    assert met["m: goodput at twice the peak, of the peak"]


def test_a_peer_that_does_not_start_stands_in_the_table_with_its_reason(load: Any) -> None:
    servers = importlib.import_module("load_servers")
    rates = {load.ALONE: 110.0, load.FUNCTIONS: 90.0, load.HEAD_IN_ROUTER: 100.0}
    table = load.rows(cells(load, rates), {servers.LITSERVE: "did not start: no wheel"})
    assert table[-1]["note"] == "did not start: no wheel"
    assert {tuple(row) for row in table} == {tuple(table[0])}
    assert not any(servers.LITSERVE in name for name in goals(load, rates))


def test_every_peer_is_pinned(load: Any) -> None:
    harness = importlib.import_module("harness")
    assert [harness.version_in(name, name) for name in ("ray", "litserve", "mlserver")] == ["2.60.0", "0.2.19", "1.7.1"]
