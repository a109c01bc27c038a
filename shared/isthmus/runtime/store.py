"""The store of loaded segments: each is loaded once, on first use, within a bound on memory."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from isthmus.admission import MemoryBudget, slot_released
from isthmus.arrays import Array
from isthmus.artifacts.bundle import Segment
from isthmus.artifacts.device import Device, this_device
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, NotReady, Overloaded, RunFailed, SegmentTooLarge
from isthmus.registry import Located, SegmentSource
from isthmus.registry.lookups import Lookups
from isthmus.runtime.batching import BatchCounts, BatchTrials
from isthmus.runtime.kernel_profile import KernelProfile, OrtObserver
from isthmus.runtime.ort import check_providers, cpu_limit, version
from isthmus.runtime.ort_runner import OrtRunner, Runner
from isthmus.runtime.run_queue import RunQueue
from isthmus.settings import SegmentSettings

Key = tuple[str, str]
"""A bundle's digest and a segment's id."""
# Callers choose the segments, so the number of pending loads needs a bound.
MAX_LOADING = 64
# A missing bundle is not looked up again for so long: digests are seldom used before publication.
_MISSING_S = 5.0
# Segments fetched in parallel, so that unknown segments are refused during the fetch of a large one.
_FETCHES = 4


@dataclass(frozen=True)
class LoadedSegment:
    """A segment in memory, and the size of its weights in bytes."""

    bundle: str
    segment: str
    bytes: int


class TimedOutputs(NamedTuple):
    """A run's outputs, and the seconds of loading the segment, of waiting for a CPU, and of running.

    `run_s` is the whole run; `batch` requests shared it.
    """

    outputs: dict[str, Array]
    load_s: float
    wait_s: float
    run_s: float
    batch: int = 1


@dataclass(frozen=True)
class _CacheEntry:
    runner: Runner
    bytes: int


class SegmentStore:
    """Loads segments on first use; evicts the least recently used ones to stay within the bound.

    A load continues in the background after its request's deadline, so the next request finds the segment. The number
    of parallel runs is the CPU limit over `threads`; further runs wait, up to their deadline.
    """

    def __init__(self, source: SegmentSource, settings: SegmentSettings) -> None:
        check_providers(settings.providers)
        cpus = cpu_limit()
        self._source = source
        self._settings = settings
        self._threads = settings.threads or cpus
        self._trials = BatchTrials(enabled=settings.batching == "auto")
        self._queue = RunQueue(
            max(1, cpus // self._threads),
            self._trials,
            MemoryBudget(settings.max_request_bytes),
            window_s=settings.batch_window_ms / 1000,
        )
        self._lock = threading.Lock()
        # No LRUCache: listing its items, as metrics do, would count as a use of each.
        self._loaded: OrderedDict[Key, _CacheEntry] = OrderedDict()
        self._loading: dict[Key, Future[Runner]] = {}
        self._lookups = Lookups(_MISSING_S)
        self._loader = ThreadPoolExecutor(max_workers=_FETCHES, thread_name_prefix="load")
        # One load into memory at a time, so that two never evict for the same bytes.
        self._entering = threading.Lock()
        self._profiling = threading.Lock()
        self.device: Device = this_device(
            cpus=cpus, threads=self._threads, providers=settings.providers, runtime=version()
        )

    def runner(self, bundle: str, segment: str, deadline: Deadline) -> Runner:
        """The loaded segment; loaded if necessary; waits up to the deadline.

        Raises:
            NotReady: still loading when the deadline passed.
            Overloaded: MAX_LOADING segments are being loaded.
            SegmentTooLarge: its weights alone exceed `max_loaded_bytes`.
            RegistryError, RunFailed: the segment could not be fetched, or not be loaded.
        """
        key = (bundle, segment)
        with self._lock:
            if (entry := self._loaded.get(key)) is not None:
                self._loaded.move_to_end(key)
                return entry.runner
            if (loading := self._loading.get(key)) is None:
                if len(self._loading) >= MAX_LOADING:
                    raise Overloaded(f"{MAX_LOADING} segments are being loaded; that is the limit", retry_after_s=1)
                loading = self._loading[key] = self._loader.submit(self._load, key)
        try:
            with slot_released(refuse=False):
                return loading.result(timeout=deadline.remaining())
        except FutureTimeout as e:
            if loading.done():
                return loading.result()
            raise NotReady(f"segment {segment} is still loading", segment=segment, retry_after_s=1) from e

    def segment(self, bundle: str, segment: str, deadline: Deadline) -> Segment:
        """The declaration of a segment; reads its manifest within the deadline for a segment that is not loaded.

        Raises:
            NotReady: the manifest was still being read when the deadline passed.
            Missing, RegistryError: no such bundle or segment, or the manifest cannot be read.
        """
        with self._lock:
            if (entry := self._loaded.get((bundle, segment))) is not None:
                return entry.runner.segment
        try:
            return self._lookups.find(bundle, partial(self._source.bundle, bundle), deadline).segment(segment)
        except DeadlineExceeded as e:
            raise NotReady(
                f"the manifest of bundle {bundle} is still being read", segment=segment, retry_after_s=1
            ) from e

    def run(self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline) -> TimedOutputs:
        """Run a segment; loaded first if necessary; together with other requests for it where that pays.

        Raises:
            DeadlineExceeded: no CPU was free in time.
            NotReady, Overloaded, RegistryError, SegmentError: as `runner` and `Runner.run`.
        """
        began = time.perf_counter()
        runner = self.runner(bundle, segment, deadline)
        loaded = time.perf_counter()
        ran = self._queue.run(runner, arrays, deadline)
        return TimedOutputs(ran.outputs, loaded - began, ran.wait_s, ran.run_s, ran.batch)

    def profile(
        self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline, *, max_runs: int
    ) -> KernelProfile:
        """Run a segment in a profiling session: at least twice, at most `max_runs` times, until the deadline is near.

        The session is among `loaded` meanwhile, and counts in the memory bound.

        Raises:
            DeadlineExceeded: no time for two runs, or another segment is being profiled.
            RunFailed: `cache_dir` is not writable, or the trace is not readable.
            NotReady, Overloaded, RegistryError, SegmentError: as `runner` and `Runner.run`.
        """
        key = (bundle, f"{segment} observed")
        if not self._profiling.acquire(timeout=deadline.remaining()):
            raise DeadlineExceeded("the deadline passed while another segment was observed")
        try:
            with self._source.locate(bundle, segment) as located, self._scratch() as folder:
                needed = self._bytes(located)
                with self._entering:
                    self._make_room(needed, located.segment)
                    deadline.check(f"segment {segment} was loaded to be observed")
                    observer = OrtObserver(
                        located.path,
                        located.segment,
                        providers=self._settings.providers,
                        threads=self._threads,
                        folder=folder,
                    )
                    with self._lock:
                        self._loaded[key] = _CacheEntry(observer, needed)
                runs, longest = 0, 0.0
                while runs < 2 or (runs < min(max_runs, observer.max_runs()) and deadline.remaining() > 3 * longest):
                    deadline.check(f"segment {segment} was observed")
                    with self._queue.slot(deadline):
                        started = time.perf_counter()
                        observer.run(arrays)
                    runs, longest = runs + 1, max(longest, time.perf_counter() - started)
                return observer.finish(runs, needed)
        finally:
            with self._lock:
                self._loaded.pop(key, None)
            self._profiling.release()

    def close(self) -> None:
        """Stop loading; loads in progress complete in the background."""
        self._trials.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._lookups.close()

    def loaded(self) -> list[LoadedSegment]:
        """The segments in memory, least recently used first."""
        with self._lock:
            return [LoadedSegment(b, s, entry.bytes) for (b, s), entry in self._loaded.items()]

    def share_memory(self, memory: MemoryBudget) -> None:
        """Count the copies that batches make in the budget of all requests."""
        self._queue.memory = memory

    def batch_counts(self) -> BatchCounts:
        """Batches and trials of batches since the start."""
        return self._trials.counts()

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        # Within the registry's cache: it counts unknown files and tolerates their disappearance.
        parent = Path(self._settings.cache_dir, "observed")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True)
        except OSError as e:
            raise RunFailed(f"a segment is observed in the setting cache_dir, where nothing can be written: {e}") from e
        with folder:
            yield Path(folder.name)

    def _load(self, key: Key) -> Runner:
        try:
            located = self._source.locate(*key)
            try:
                with self._entering:
                    return self._enter(key, located)
            except BaseException:
                located.release()
                raise
        finally:
            with self._lock:
                del self._loading[key]

    def _enter(self, key: Key, located: Located) -> Runner:
        needed = self._bytes(located)
        self._make_room(needed, located.segment)
        runner = OrtRunner(located.path, located.segment, providers=self._settings.providers, threads=self._threads)
        # The registry's cache may evict the files as soon as no session maps these.
        weakref.finalize(runner, located.release)
        with self._lock:
            self._loaded[key] = _CacheEntry(runner, needed)
        return runner

    @staticmethod
    def _bytes(located: Located) -> int:
        return sum(t.length for t in located.bundle.weight_ranges(located.segment))

    def _make_room(self, needed: int, segment: Segment) -> None:
        limit = self._settings.max_loaded_bytes
        if needed > limit:
            raise SegmentTooLarge(
                f"segment {segment.id} weighs {needed} bytes; max_loaded_bytes is {limit}",
                segment=segment.id,
                bytes=needed,
                limit=limit,
                hint="raise max_loaded_bytes and the function's memory limit, or cut the model elsewhere",
            )
        with self._lock:
            while self._loaded and needed + sum(entry.bytes for entry in self._loaded.values()) > limit:
                self._loaded.popitem(last=False)
