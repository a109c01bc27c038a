"""The queue of runs: order, deadlines, batches of those that wait, and that no request sees another of its batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from isthmus.admission import MemoryBudget
from isthmus.artifacts.bundle import Blob, Segment
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, RunFailed, ShapeMismatch, ValueRefused
from isthmus.runtime.batching import BatchTrials
from isthmus.runtime.run_queue import QueuedOutputs, RunQueue
from isthmus.runtime.store import SegmentStore
from support.bundles import cache_of, publish, save, segment_settings, value, weight
from support.patience import LONG_S, eventually

WIDTH = 4
SPEC = TensorSpec("x", "float32", ("n", "width"))
SEGMENT = Segment(WHOLE, Blob("sha256:" + "0" * 64, 1), (SPEC,), (TensorSpec("y", "float32", ("n", "width")),), ())


class GatedRunner:
    """Doubles its input; runs wait at the gate. `refuse` names an error for the values of a run."""

    def __init__(self, refuse: Callable[[Any], Exception | None] = lambda x: None) -> None:
        self.segment = SEGMENT
        self.gate, self.started = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self._refuse = refuse

    def run(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        x = arrays["x"]
        self.batches.append(len(x))
        self.started.set()
        assert self.gate.wait(LONG_S)
        if (error := self._refuse(x)) is not None:
            raise error
        return {"y": x * 2}


class Callers:
    """A queue of one slot, occupied by a first run; `wait` adds callers that wait behind it."""

    def __init__(self, runner: GatedRunner, *, sizes: Mapping[int, float], budget: int = 2**30) -> None:
        self.runner = runner
        self.trials = BatchTrials(enabled=True)
        self.queue = RunQueue(1, self.trials, MemoryBudget(budget))
        self.pool = ThreadPoolExecutor(32)
        trial = self.trials.find(runner, row(0))
        assert trial is not None
        trial.sizes = sizes
        self.first = self.submit(row(-1))
        assert runner.started.wait(LONG_S)

    def submit(self, arrays: dict[str, Any], seconds: float = LONG_S, runner: Any = None) -> Future[QueuedOutputs]:
        return self.pool.submit(self.queue.run, runner or self.runner, arrays, Deadline.after(seconds))

    def wait(self, arrays: dict[str, Any], seconds: float = LONG_S, runner: Any = None) -> Future[QueuedOutputs]:
        waiting = len(self.queue.waiting())
        future = self.submit(arrays, seconds, runner)
        eventually(lambda: len(self.queue.waiting()) > waiting)
        return future

    def finish(self) -> None:
        self.runner.gate.set()
        self.first.result(LONG_S)
        self.pool.shutdown()


def row(number: float, width: int = WIDTH) -> dict[str, Any]:
    return {"x": np.full((1, width), number, np.float32)}


def test_requests_that_wait_run_together_and_each_gets_its_own_row() -> None:
    callers = Callers(GatedRunner(), sizes={2: 0.0, 4: 0.0})
    waiting = [callers.wait(row(i)) for i in range(7)]
    callers.finish()
    assert callers.runner.batches == [1, 4, 2, 1]
    assert [f.result().outputs["y"].tolist() for f in waiting] == [[[2.0 * i] * WIDTH] for i in range(7)]
    assert [f.result().batch for f in waiting] == [4, 4, 4, 4, 2, 2, 1]
    assert callers.trials.counts().batches == {4: 1, 2: 1}
    assert callers.queue.room_for_batches() == 8


def test_a_result_keeps_no_memory_of_the_rest_of_its_batch() -> None:
    callers = Callers(GatedRunner(), sizes={2: 0.0})
    waiting = [callers.wait(row(i)) for i in range(2)]
    callers.finish()
    assert all(f.result().outputs["y"].base is None for f in waiting)


def test_a_request_whose_company_has_another_shape_or_segment_or_several_rows_runs_alone() -> None:
    callers = Callers(GatedRunner(), sizes={2: 0.0, 4: 0.0})
    other = GatedRunner()
    other.gate.set()
    waiting = [
        callers.wait(row(1)),
        callers.wait(row(2, width=3)),
        callers.wait({"x": np.ones((2, WIDTH), np.float32)}),
        callers.wait({"x": np.ones((1, WIDTH), np.float64)}),
        callers.wait(row(3), runner=other),
        callers.wait(row(4)),
    ]
    callers.finish()
    assert [f.result().batch for f in waiting] == [2, 1, 1, 1, 1, 2]
    assert [f.result().outputs["y"].shape for f in waiting] == [(1, 4), (1, 3), (2, 4), (1, 4), (1, 4), (1, 4)]
    assert other.batches == [1]


def test_without_a_trial_that_paid_requests_run_one_by_one_in_their_order() -> None:
    callers = Callers(GatedRunner(), sizes={})
    order: list[int] = []
    waiting = [callers.wait(row(i)) for i in range(4)]
    for i, future in enumerate(waiting):
        future.add_done_callback(lambda _, i=i: order.append(i))  # type: ignore[misc]
    callers.finish()
    assert callers.runner.batches == [1] * 5
    assert order == [0, 1, 2, 3]
    assert callers.queue.room_for_batches() == 0


def test_a_batch_that_ends_after_a_deadline_is_not_formed() -> None:
    callers = Callers(GatedRunner(), sizes={2: 1.0, 4: 2 * LONG_S})
    waiting = [callers.wait(row(i)) for i in range(4)]
    callers.finish()
    assert [f.result().batch for f in waiting] == [2] * 4


def test_a_request_whose_deadline_passes_in_the_queue_is_not_run() -> None:
    callers = Callers(GatedRunner(), sizes={2: 0.0})
    late = callers.wait(row(1), seconds=0.05)
    in_time = callers.wait(row(2))
    with pytest.raises(DeadlineExceeded, match="before a CPU was free"):
        late.result(LONG_S)
    callers.finish()
    assert callers.runner.batches == [1, 1]
    assert in_time.result().outputs["y"][0, 0] == 4


def refuses(number: float) -> Callable[[Any], Exception | None]:
    return lambda x: ValueRefused("an index is out of range", value=number) if (x == number).any() else None


def test_a_request_that_the_graph_refuses_fails_alone() -> None:
    callers = Callers(GatedRunner(refuses(666)), sizes={4: 0.0})
    waiting = [callers.wait(row(i)) for i in (1, 666, 2, 3)]
    callers.finish()
    with pytest.raises(ValueRefused):
        waiting[1].result()
    assert [waiting[i].result().outputs["y"][0, 0] for i in (0, 2, 3)] == [2, 4, 6]
    assert callers.runner.batches == [1, 4, 1, 1, 1, 1]
    assert callers.trials.counts().fallbacks == 1
    # The fault was a request's, so batches go on.
    assert callers.trials.find(callers.runner, row(0)).sizes == {4: 0.0}  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_a_hostile_row_changes_no_other(value: float) -> None:
    callers = Callers(GatedRunner(), sizes={4: 0.0})
    waiting = [callers.wait(row(number)) for number in (1, value, 2, 3)]
    callers.finish()
    assert [waiting[i].result().outputs["y"][0, 0] for i in (0, 2, 3)] == [2, 4, 6]


def test_a_batch_that_fails_where_single_runs_succeed_is_not_formed_again() -> None:
    callers = Callers(
        GatedRunner(lambda x: RunFailed("no memory for so many") if len(x) > 2 else None), sizes={2: 0.0, 4: 0.0}
    )
    waiting = [callers.wait(row(i)) for i in range(6)]
    callers.finish()
    assert callers.runner.batches == [1, 4, 1, 1, 1, 1, 2]
    assert [f.result().outputs["y"][0, 0] for f in waiting] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("broken", [lambda x: x[:1] * 2, lambda x: np.float32(1)])
def test_a_batch_with_missing_rows_is_run_again_one_by_one(broken: Callable[[Any], Any]) -> None:
    class Broken(GatedRunner):
        def run(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
            outputs = super().run(arrays)
            return outputs if len(arrays["x"]) == 1 else {"y": broken(arrays["x"])}

    callers = Callers(Broken(), sizes={2: 0.0})
    waiting = [callers.wait(row(i)) for i in (1, 2)]
    callers.finish()
    assert [f.result().outputs["y"][0, 0] for f in waiting] == [2, 4]


def test_a_defect_in_a_batch_leaves_nobody_waiting() -> None:
    callers = Callers(GatedRunner(lambda x: LookupError("a defect") if (x > 0).any() else None), sizes={2: 0.0})
    waiting = [callers.wait(row(i)) for i in (1, 2)]
    callers.finish()
    for future in waiting:
        with pytest.raises(LookupError):
            future.result(LONG_S)
    callers.queue.run(callers.runner, row(0), Deadline.after(LONG_S))


def test_copies_of_a_batch_count_in_the_memory_of_all_requests() -> None:
    callers = Callers(GatedRunner(), sizes={2: 0.0, 4: 0.0}, budget=3 * 4 * WIDTH)
    waiting = [callers.wait(row(i)) for i in range(4)]
    callers.finish()
    assert callers.runner.batches == [1] * 5
    assert [f.result().outputs["y"][0, 0] for f in waiting] == [0, 2, 4, 6]
    assert callers.queue.memory.used == 0


def queue_with_window(runner: GatedRunner, window_s: float) -> RunQueue:
    trials = BatchTrials(enabled=True)
    trials.find(runner, row(0)).sizes = {2: 0.0}  # type: ignore[union-attr]
    return RunQueue(2, trials, MemoryBudget(2**30), window_s=window_s)


def test_a_run_with_a_free_cpu_waits_for_company_within_the_window_alone() -> None:
    runner = GatedRunner()
    runner.gate.set()
    # The window outlasts every test: only a full batch ends it.
    queue = queue_with_window(runner, LONG_S)
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(queue.run, runner, row(i), Deadline.after(3 * LONG_S)) for i in (1, 2)]
        assert [f.result(LONG_S).outputs["y"][0, 0] for f in done] == [2, 4]
    assert runner.batches == [2]


def test_a_window_that_ends_after_the_deadline_is_not_waited_for() -> None:
    runner = GatedRunner()
    runner.gate.set()
    queue = queue_with_window(runner, 2 * LONG_S)
    assert queue.run(runner, row(1), Deadline.after(LONG_S)).batch == 1


def test_a_window_without_company_ends() -> None:
    runner = GatedRunner()
    runner.gate.set()
    queue = queue_with_window(runner, 0.01)
    assert [queue.run(runner, row(1), Deadline.after(LONG_S)).batch for _ in range(3)] == [1] * 3


def test_batching_that_is_off_never_finds_a_batch() -> None:
    assert BatchTrials(enabled=False).find(GatedRunner(), row(1)) is None


def test_ever_new_shapes_take_bounded_memory_and_end_no_batches() -> None:
    trials, runner = BatchTrials(enabled=True), GatedRunner()
    paying = trials.find(runner, row(0))
    assert paying is not None
    paying.sizes = {2: 0.0}
    seen = [trials.find(runner, row(0, width)) for width in range(5, 200)]
    assert trials.find(runner, row(0)) is paying
    assert trials.find(runner, row(0, 5)) is not seen[0]


def test_callers_at_once_each_get_what_they_get_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the store, on a real graph: the trial begins by itself, and batches follow."""
    monkeypatch.setattr("isthmus.runtime.store.cpu_limit", lambda: 1)
    # On a machine shared with others a gain cannot be counted on.
    monkeypatch.setattr("isthmus.runtime.batching.MAX_SHARE", 1000.0)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Softmax", ["m"], ["y"], axis=-1)]
    path = save(tmp_path / "m.onnx", nodes, [value("x", "n", 256)], [value("y", "n", 64)], [weight("w", 256, 64)])
    published = publish(tmp_path, path, {}, partitions=[["0"]])
    settings = segment_settings(published, tmp_path / "cache")
    store = SegmentStore(cache_of(published, tmp_path / "cache"), settings)
    rng = np.random.default_rng(5)
    inputs = [{"x": rng.standard_normal((1, 256)).astype(np.float32)} for _ in range(32)]

    def run(arrays: dict[str, Any]) -> Any:
        return store.run(published.digest, WHOLE, arrays, Deadline.after(LONG_S))

    alone = [run(arrays).outputs["y"] for arrays in inputs]
    with ThreadPoolExecutor(16) as pool:

        def round_of_calls() -> bool:
            for ran, expected in zip(pool.map(run, inputs), alone, strict=True):
                assert ran.outputs["y"].shape == expected.shape
                np.testing.assert_allclose(ran.outputs["y"], expected, rtol=0, atol=1e-4 * expected.max())
            return sum(store.batch_counts().batches.values()) > 20

        eventually(round_of_calls)
        with pytest.raises(ShapeMismatch):
            run({"x": np.zeros((1, 3), np.float32)})
    assert store.batch_counts().trials == {"pays": 1}
    assert store.batch_counts().fallbacks == 0
    store.close()
