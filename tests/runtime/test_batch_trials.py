"""Trials of batches: which graphs may batch, and that only what pays on this machine does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from isthmus.artifacts.bundle import Blob, Segment
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import IsthmusError, RunFailed
from isthmus.runtime.batching import CONTENDED, BatchMeasurement, BatchTrials, has_free_rows, tolerance
from isthmus_tools.graph import build
from support.bundles import save, value, weight
from support.patience import LONG_S, eventually
from support.segments import runner as runner_of

Arrays = dict[str, Any]
ROW = {"x": np.random.default_rng(3).standard_normal((1, 6)).astype(np.float32)}


class TimedRunner:
    """A segment computed by a function; a run of n rows takes `cost(n)` seconds of the trial's clock."""

    def __init__(self, compute: Callable[[Any], Any], cost: Callable[[int], float] = lambda n: 0.001) -> None:
        self.segment = segment("n")
        self.compute, self.cost = compute, cost
        self.now, self.largest = 0.0, 0

    def run(self, arrays: Mapping[str, Any]) -> Arrays:
        rows = arrays["x"].shape[0]
        self.largest = max(self.largest, rows)
        self.now += self.cost(rows)
        with np.errstate(all="ignore"):
            return {"y": self.compute(arrays["x"])}


def segment(*rows: int | str) -> Segment:
    specs = tuple(TensorSpec(f"x{i}" if i else "x", "float32", (n, 6)) for i, n in enumerate(rows))
    return Segment(WHOLE, Blob("sha256:" + "0" * 64, 1), specs, (TensorSpec("y", "float32", ("n", 6)),), ())


def measurement(runner: Any, pause: Callable[[float], bool] = lambda _: False) -> BatchMeasurement:
    return BatchMeasurement(runner, lambda _: contextlib.nullcontext(), pause, lambda: getattr(runner, "now", 0.0))


def trial(runner: Any, sample: Arrays = ROW) -> tuple[list[int], str]:
    measured = measurement(runner)
    return sorted(measured.sizes(sample)), measured.outcome


@pytest.mark.parametrize(
    ("cost", "sizes"),
    [
        (lambda n: 0.001 + 0.0001 * n, [2, 4, 8]),
        # Nothing gained: as on a CPU whose threads one row keeps busy.
        (lambda n: 0.001 * n, []),
        # A tenth is the least gain.
        (lambda n: 0.001 * n * (1 if n == 1 else 0.95), []),
        (lambda n: 0.001 * n * {1: 1, 2: 0.85, 4: 0.8, 8: 1.2}[n], [2, 4]),
    ],
)
def test_the_sizes_that_gain_a_tenth_are_used(cost: Callable[[int], float], sizes: list[int]) -> None:
    assert trial(TimedRunner(lambda x: x * 2, cost)) == (sizes, "pays" if sizes else "no_gain")


def test_a_step_that_would_hold_a_cpu_for_long_is_not_tried() -> None:
    slow = TimedRunner(lambda x: x * 2, lambda n: 0.04)
    assert trial(slow) == ([2], "pays")
    assert slow.largest == 2


MIXING: Mapping[str, Callable[[Any], Any]] = {
    "a mean over the rows": lambda x: x - x.mean(axis=0),
    "rows in another order": lambda x: x[::-1],
    "a running sum over the rows": lambda x: x.cumsum(axis=0),
    "one scale for all rows, as of a dynamic quantiser": lambda x: np.round(x / np.abs(x).max() * 127) * 2,
    "a bound by the largest row": lambda x: np.minimum(x, np.abs(x).max() / 50 + 10),
    "zero times the other rows": lambda x: x + 0 * x.sum(axis=0),
    "the first row alone": lambda x: x[:1],
    "no rows": lambda x: x.sum(),
    "the same for every input": lambda x: np.zeros_like(x),
    "a few ten-thousandths of the others": lambda x: x + 5e-4 * (x.sum(axis=0) - x),
}


@pytest.mark.parametrize("graph", MIXING)
def test_a_graph_that_mixes_rows_never_batches(graph: str) -> None:
    compute = MIXING[graph]
    assert trial(TimedRunner(lambda x: np.asarray(compute(x), np.float32))) == ([], "differs")


def test_rows_that_differ_by_rounding_batch() -> None:
    def rounded(x: Any) -> Any:
        return x * 2 * (1 + 1e-6 * (len(x) > 1))

    assert trial(TimedRunner(lambda x: rounded(x).astype(np.float32))) == ([2, 4, 8], "pays")


def test_whole_numbers_must_be_equal() -> None:
    assert tolerance(np.dtype(np.int64)) == 0
    assert tolerance(np.dtype(np.float32)) == 1e-4
    assert tolerance(np.dtype(np.float16)) < tolerance(np.dtype(ml_dtypes.bfloat16)) < 0.1
    off_by_one = TimedRunner(lambda x: np.rint(x * 10).astype(np.int64) + (len(x) > 2))
    assert trial(off_by_one) == ([2], "differs")


def test_a_batch_that_the_graph_refuses_fails_the_trial() -> None:
    def compute(x: Any) -> Any:
        if len(x) > 1:
            raise RunFailed("a dimension is fixed")
        return x

    with pytest.raises(RunFailed):
        trial(TimedRunner(compute))


def test_a_trial_leaves_most_of_the_time_to_requests_and_ends_with_its_store() -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        return len(pauses) == 3

    with pytest.raises(IsthmusError, match="closed"):
        measurement(TimedRunner(lambda x: x * 2), pause).sizes(ROW)
    assert pauses == pytest.approx([0.019] * 3)


def test_only_free_first_dimensions_can_batch() -> None:
    assert has_free_rows(segment("n"))
    assert has_free_rows(segment("n", "m"))
    assert not has_free_rows(segment(1))
    assert not has_free_rows(segment("n", 1))


@pytest.mark.parametrize(
    ("nodes", "outcome"),
    [
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], "pays"),
        (
            [
                helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
                helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
                helper.make_node("MatMul", ["d", "w"], ["y"]),
            ],
            "differs",
        ),
    ],
)
def test_a_real_graph_batches_and_its_dynamically_quantised_form_does_not(
    nodes: list[Any], outcome: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "m.onnx", nodes, [value("x", "n", 6)], [value("y", "n", 4)], [weight("w", 6, 4)])
    bundle, files = build(path, "m", tmp_path / "built", partitions=[])
    # The clock stands still, so whatever agrees pays.
    assert trial(runner_of(bundle.segment(WHOLE), files))[1] == outcome


def test_a_trial_without_gain_is_repeated_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.runtime.batching.MAX_SHARE", 0.0)
    monkeypatch.setattr("isthmus.runtime.batching.AGAIN_S", 0.0)
    trials, runner = BatchTrials(enabled=True), TimedRunner(lambda x: x * 2)
    shape = trials.find(runner, ROW)
    assert shape is not None
    for done in (1, 2):
        for _ in range(CONTENDED):
            assert trials.counts().trials.get("no_gain", 0) == done - 1
            trials.contended(shape, runner, ROW, lambda _: contextlib.nullcontext())
        eventually(lambda done=done: trials.counts().trials == {"no_gain": done})  # type: ignore[misc]
        monkeypatch.setattr("isthmus.runtime.batching.AGAIN_S", LONG_S)
    for _ in range(CONTENDED):
        trials.contended(shape, runner, ROW, lambda _: contextlib.nullcontext())
    assert shape.contended == 0
    trials.close()
