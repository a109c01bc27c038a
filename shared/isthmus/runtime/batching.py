"""Trials of batches: whether requests of a segment and shape may share a run, and whether sharing pays.

A batch must give each request the outputs of a run alone. No declaration of a graph guarantees that: a leading
dimension may be no batch, and a normalisation or a quantiser may mix the rows. So a trial compares each segment, shape
and batch size with runs of single rows, by different and by hostile rows, and times both, since on a CPU a batch often
gains nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Segment
from isthmus.context import Deadline
from isthmus.errors import IsthmusError
from isthmus.runtime.ort_runner import Runner

SIZES = (2, 4, 8)
# A batch of n takes at most this share of the seconds of n single runs.
MAX_SHARE = 0.9
# A trial under load takes at most a twentieth of the time, and no step holds a slot for longer.
_LOAD_SHARE, MAX_STEP_S = 0.05, 0.1
# Runs that ended with company waiting, before a trial is worth its time.
CONTENDED = 8
# Until another trial of a segment whose batches gained nothing.
AGAIN_S = 600.0
_REPEATS = 5
# Of a measured median: under load a run takes longer.
_MARGIN = 1.5
_SLOT_S = 30.0
# Callers choose the shapes of free dimensions.
MAX_SHAPES = 16
_LOUD = 100.0
_SHORT_PRECISIONS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}

Clock = Callable[[], float]
Slot = Callable[[Deadline], AbstractContextManager[None]]

_log = logging.getLogger("isthmus")


def tolerance(dtype: np.dtype[np.generic]) -> float:
    """The largest difference of a batch from single runs, relative to an output's largest magnitude; 0 for integers.

    1e-4 for float32: kernels sum in another order for another batch, which costs some 1e-6. For shorter floats eight
    units of their precision.
    """
    return max(1e-4, 8 * _SHORT_PRECISIONS.get(dtype.name, 0.0)) if _is_float(dtype) else 0.0


def leading_size(array: Array) -> int:
    """The size of an array's first dimension; 0 for a scalar."""
    return int(array.shape[0]) if array.ndim else 0


def has_free_rows(segment: Segment) -> bool:
    """Whether every input and output has a free first dimension, as a batch needs."""
    specs = (*segment.inputs, *segment.outputs)
    return bool(segment.inputs) and all(spec.shape and isinstance(spec.shape[0], str) for spec in specs)


@dataclass(eq=False)
class ShapeTrial:
    """The state of a segment and shape; `sizes` maps batch sizes that pay to the seconds of a run."""

    sizes: Mapping[int, float] = field(default_factory=dict)
    contended: int = 0
    # On the monotonic clock; other work on the machine may have spoilt a trial without gain.
    not_before: float = 0.0

    @property
    def max_size(self) -> int:
        """The largest batch; 1 where none pays."""
        return max(self.sizes, default=1)

    def fitting(self, count: int) -> int:
        """The largest batch of at most `count`."""
        return max((size for size in self.sizes if size <= count), default=1)

    def seconds(self, count: int) -> float:
        """Seconds that a batch for `count` requests is expected to take at most."""
        return _MARGIN * self.sizes.get(self.fitting(count), 0.0)

    def largest(self, remaining: Sequence[float]) -> int:
        """The largest batch of the first requests that ends before the deadline of each.

        Units: `remaining` are each request's remaining seconds, in the order of the queue.
        """
        for size in sorted(self.sizes, reverse=True):
            if size <= len(remaining) and min(remaining[:size]) > self.seconds(size):
                return size
        return 1


@dataclass(frozen=True)
class BatchCounts:
    """Since the start: batches by size, batches that failed and were run again alone, and trials by outcome."""

    batches: Mapping[int, int]
    fallbacks: int
    trials: Mapping[str, int]


class BatchTrials:
    """The trials of all segments in memory, in a thread of their own."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._lock = threading.Lock()
        # None for a segment that can never batch. Weak: an evicted segment has a new trial.
        self._segments: weakref.WeakKeyDictionary[Runner, dict[object, ShapeTrial] | None] = weakref.WeakKeyDictionary()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-trial")
        self._closed = threading.Event()
        self._batches: Counter[int] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._fallbacks = 0

    def close(self) -> None:
        """Stop trying; a run under way goes on to its end."""
        self._closed.set()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def find(self, runner: Runner, arrays: Mapping[str, Array]) -> ShapeTrial | None:
        """The trial for these shapes; None where requests never run together, as with several rows each."""
        if not self._enabled:
            return None
        try:
            shapes = self._segments[runner]
        except KeyError:
            shapes = self._segments[runner] = {} if has_free_rows(runner.segment) else None
        if shapes is None or any(leading_size(array) != 1 for array in arrays.values()):
            return None
        key = tuple((name, array.shape, array.dtype.char) for name, array in sorted(arrays.items()))
        if (trial := shapes.get(key)) is not None:
            return trial
        with self._lock:
            if len(shapes) >= MAX_SHAPES:
                # Shapes that pay stay: a caller with ever new shapes must not end other callers' batches.
                shapes.pop(next((other for other, each in shapes.items() if not each.sizes), key), None)
            return shapes.setdefault(key, ShapeTrial()) if len(shapes) < MAX_SHAPES else None

    def contended(self, trial: ShapeTrial, runner: Runner | None, arrays: Mapping[str, Array], slot: Slot) -> None:
        """Count a run that ended while requests for a batch waited; the CONTENDED-th begins the trial."""
        if time.monotonic() < trial.not_before:
            return
        trial.contended += 1
        if trial.contended == CONTENDED and runner is not None and not self._closed.is_set():
            # Closed since: no trial, and the queue of the caller goes on.
            with contextlib.suppress(RuntimeError):
                self._worker.submit(self._measure, trial, runner, arrays, slot)

    @property
    def max_size(self) -> int:
        """The largest batch that pays for any segment in memory; 1 where none does."""
        with self._lock:
            shapes = [each for each in self._segments.values() if each]
            return max((trial.max_size for each in shapes for trial in each.values()), default=1)

    def ran(self, size: int) -> None:
        """Count a batch."""
        with self._lock:
            self._batches[size] += 1

    def fell_back(self, trial: ShapeTrial, size: int, all_succeeded: bool) -> None:
        """Count a batch that failed; where all its requests succeed alone, the batch itself was at fault."""
        with self._lock:
            self._fallbacks += 1
        if all_succeeded:
            trial.sizes = {each: s for each, s in trial.sizes.items() if each < size}
            _log.warning("batches of %d are off: a batch failed where single runs succeed", size)

    def counts(self) -> BatchCounts:
        """The counts since the start."""
        with self._lock:
            return BatchCounts(dict(self._batches), self._fallbacks, dict(self._outcomes))

    def _measure(self, trial: ShapeTrial, runner: Runner, arrays: Mapping[str, Array], slot: Slot) -> None:
        measurement = BatchMeasurement(runner, slot, self._closed.wait, time.perf_counter)
        try:
            trial.sizes = measurement.sizes(arrays)
            outcome = measurement.outcome
        # A graph that cannot take a batch, or a queue without a slot in time.
        except (IsthmusError, MemoryError, ValueError) as e:
            outcome = f"failed: {type(e).__name__}"
        if outcome == "no_gain":
            trial.contended, trial.not_before = 0, time.monotonic() + AGAIN_S
        with self._lock:
            self._outcomes[outcome.partition(":")[0]] += 1
        facts = {"segment": runner.segment.id, "outcome": outcome, "sizes": sorted(trial.sizes)}
        _log.info("trial of batches", extra={"facts": facts})


class BatchMeasurement:
    """A trial. `pause` waits for some seconds between steps and returns whether the trial must stop."""

    def __init__(self, runner: Runner, slot: Slot, pause: Callable[[float], bool], clock: Clock) -> None:
        self._runner, self._slot, self._pause, self._clock = runner, slot, pause, clock
        self.outcome = "no_gain"

    def sizes(self, sample: Mapping[str, Array]) -> dict[int, float]:
        """The batch sizes that give each row its own result and pay, with the seconds of their run.

        Shapes: `sample` is a request's inputs, with a single row.

        Raises:
            SegmentError: as `Runner.run`.
            DeadlineExceeded: no slot was free in time.
        """
        rows = _different_rows(sample, max(SIZES))
        single_s, first = self._run(rows[0])
        sizes: dict[int, float] = {}
        singles = [first]
        for size in SIZES:
            # A large batch seldom pays where two smaller ones gain nothing, and takes half of a trial's time.
            if size * single_s > MAX_STEP_S or (size > SIZES[1] and not sizes):
                break
            singles += [self._run(row)[1] for row in rows[len(singles) : size]]
            if not self._agrees(rows[:size], singles):
                self.outcome = "differs"
                break
            batch_times, single_times = self._times(rows[:size])
            # The fastest of each: other work on the machine only adds to a time.
            if min(batch_times) <= MAX_SHARE * size * min(single_times):
                sizes[size] = median(batch_times)
                self.outcome = "pays"
        return sizes

    def _agrees(self, rows: Sequence[Mapping[str, Array]], singles: Sequence[Mapping[str, Array]]) -> bool:
        """Whether each row of a batch gets its own result, also beside a hostile row."""
        # Equal results of different rows would hide that rows were mixed up.
        if all(is_close(array, singles[1][name], tolerance(array.dtype)) for name, array in singles[0].items()):
            return False
        return all(
            _is_row(single, outputs, row, len(rows))
            for batch, hostile in _with_hostile(rows)
            for outputs in (self._run(stacked(batch))[1],)
            for row, single in enumerate(singles)
            if row != hostile
        )

    def _times(self, rows: Sequence[Mapping[str, Array]]) -> tuple[list[float], list[float]]:
        """Seconds of batches and of single runs, interleaved."""
        batch = stacked(rows)
        times = [(self._run(batch)[0], self._run(rows[0])[0]) for _ in range(_REPEATS)]
        return [b for b, _ in times], [s for _, s in times]

    def _run(self, arrays: Mapping[str, Array]) -> tuple[float, dict[str, Array]]:
        """Seconds and outputs of a run in a slot; then a pause, so that requests have most of the time."""
        with self._slot(Deadline.after(_SLOT_S)):
            started = self._clock()
            outputs = self._runner.run(arrays)
            seconds = self._clock() - started
        if self._pause(seconds * (1 / _LOAD_SHARE - 1)):
            raise IsthmusError("the store was closed")
        return seconds, outputs


def stacked(rows: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The rows' arrays as a batch."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _different_rows(sample: Mapping[str, Array], count: int) -> list[Mapping[str, Array]]:
    """`sample` and shuffles of it: values stay in their range, so indices stay within their tables."""
    rng = np.random.default_rng(0)
    return [sample, *({name: _shuffled(a, rng) for name, a in sample.items()} for _ in range(count - 1))]


def _shuffled(array: Array, rng: np.random.Generator) -> Array:
    flat = rng.permutation(array.ravel())
    if _is_float(array.dtype) and flat.size and (flat == flat[0]).all():
        flat = flat * rng.uniform(0.5, 1.5)  # a constant shuffled is the same
    return flat.astype(array.dtype).reshape(array.shape)


def _with_hostile(rows: Sequence[Mapping[str, Array]]) -> Iterator[tuple[list[Mapping[str, Array]], int]]:
    """Batches of `rows`, and the index of their hostile row: none, a hundred times too large, not a number."""
    yield list(rows), -1
    if not any(_is_float(array.dtype) for array in rows[0].values()):
        return
    last = len(rows) - 1
    for index, factor in ((last, _LOUD), (0, np.nan)):
        hostile = {n: (a * factor).astype(a.dtype) if _is_float(a.dtype) else a for n, a in rows[index].items()}
        yield [hostile if i == index else row for i, row in enumerate(rows)], index


def _is_row(single: Mapping[str, Array], outputs: Mapping[str, Array], row: int, size: int) -> bool:
    return all(
        leading_size(outputs[name]) == size and is_close(array, outputs[name][row : row + 1], tolerance(array.dtype))
        for name, array in single.items()
    )


def is_close(expected: Array, got: Array, limit: float) -> bool:
    """Whether floats differ by at most `limit` times the largest finite magnitude expected, and others not at all."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    if not _is_float(expected.dtype):
        return bool((expected == got).all())
    a, b = expected.astype(np.float64), got.astype(np.float64)
    scale = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
    return bool(np.allclose(b, a, rtol=0.0, atol=limit * scale, equal_nan=True))


def _is_float(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"
