"""What people see of closer looks: tables that fit a terminal, and what to do about those of another version."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.choice import Look
from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs, Measure
from isthmus.codecs.transform.table import PlaneTable
from isthmus.errors import RegistryError
from isthmus.runtime.tables import Tables
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from isthmus_tools.calibration.transforms import learn_planes
from isthmus_tools.cli import console
from isthmus_tools.cli.codec import show

LOOKS = (Look(0.4, 1.48823), Look(0.6, 0.712345), Look(0.8, 0.312345))
PLAIN = Entry("65", "transform/4", 0.2, 0.981, 0.95, 1, 0.1, 9470, 10_000, 1.23, 0.21, 0.19, 0.03, True, 0.98)
CHAINS = [replace(PLAIN, looks=LOOKS[:n], shares=(0.45, 0.12, 0.03)[:n]) for n in range(4)]


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    monkeypatch.setattr(console, "out", console.Console(width=width, force_terminal=True, color_system=None))
    fidelity = Fidelity("s", 0.99, Measure("top1", "logits"), Inputs("x", 1, 1, 200), tuple(CHAINS))
    show(fidelity, "65", every=True)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]


def test_the_names_of_chains_fold_at_80_columns_and_numbers_stay_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown(capsys, monkeypatch, 80)
    assert all(len(line) <= 80 for line in lines)
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    assert cells[0] == ["codec", "same, %", "bytes", "bits", "ms", "offered"]
    assert [row[1:5] for row in cells if row[1]][1:] == [["98.1 (95–100)", "9.5 kB", "1.23", "0.21+0.19"]] * 4
    assert "".join(row[0] for row in cells[1:]) == "".join(str(e.choice) for e in CHAINS)
    assert all(row[0].startswith(("transform/4@0.2", "+0.")) or not row[0] for row in cells[1:])
    assert " ".join(row[5] for row in cells[-4:]).split() == ["yes,", "3%", "raw,", "looks", "45%", "12%", "3%"]


def test_names_stay_in_one_line_where_there_is_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown(capsys, monkeypatch, 160)
    assert [line.split()[1] for line in lines[1:]] == [str(e.choice) for e in CHAINS]


def test_a_table_of_another_version_is_refused_with_what_to_do() -> None:
    rng = np.random.default_rng(0)
    made = learn_planes([rng.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(20)])
    assert isinstance(made, PlaneTable)
    arrays = {{"thirteenths": "steps"}.get(name, name): array for name, array in made.to_arrays().items()}
    data = frames.encode(Frame(arrays))
    blob = Blob(digest_of(data), len(data))
    bundle: Any = type("Calibrated", (), {"name": "small", "tables": {"p6": blob}})()
    tables = Tables(lambda digest: bundle, lambda blob: data, 0)
    with pytest.raises(RegistryError, match="of small, is no codec's table of this version") as e:
        tables("sha256:" + "0" * 64, "p6", "transform/4")
    assert "isthmus calibrate small" in e.value.hint
