"""The store of loaded segments: each is loaded once, on first use, within a bound on memory."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from cachetools import TTLCache

from isthmus.admission import MemoryBudget, slot_released
from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment, digest_of
from isthmus.artifacts.device import Device, this_device
from isthmus.context import Deadline
from isthmus.errors import (
    DeadlineExceeded,
    IsthmusError,
    MemoryInUse,
    NotReady,
    Overloaded,
    RunFailed,
)
from isthmus.registry import Located, Lookups, SegmentSource
from isthmus.runtime.batching import BatchCounts, BatchTrials
from isthmus.runtime.early_exit import branch_id, checked_branch, run_exit
from isthmus.runtime.kernel_profile import KernelProfile, OrtObserver
from isthmus.runtime.ort import check_providers, cpu_limit, version
from isthmus.runtime.ort_runner import OrtRunner, Runner
from isthmus.runtime.run_queue import QueuedOutputs, QueuedWork, RunQueue
from isthmus.runtime.segment_memory import Key, LoadedSegment, SegmentMemory
from isthmus.settings import SegmentSettings

# Callers choose the segments, so the number of pending loads needs a bound.
MAX_LOADING = 64
# Of these, loads ahead of requests: a plan has 16 candidates, which share most of their segments.
MAX_AHEAD = 32
# A missing bundle is not looked up again for so long: digests are seldom used before publication.
_MISSING_S = 5.0
# A load ahead that failed is told to whoever asks again, for so long.
_FAILED_S = 5.0
# Segments fetched in parallel, so that unknown segments are refused during the fetch of a large one.
_FETCHES = 4


class TimedOutputs(NamedTuple):
    """A run's outputs, and the seconds of loading the segment, of waiting for a CPU, and of running.

    `run_s` is the whole run; `batch` requests shared it.
    """

    outputs: dict[str, Array]
    load_s: float
    wait_s: float
    run_s: float
    batch: int = 1


@dataclass
class _Load:
    """A load under way, and whether a request waits for it."""

    is_awaited: bool
    future: Future[Runner] = field(default_factory=Future)


class SegmentStore:
    """Loads segments on first use or ahead of it; evicts segments to stay within the bound, as `SegmentMemory` has it.

    A load continues in the background after its request's deadline, so the next request finds the segment. A request
    waits for the load of its own segment alone. The number of parallel runs is the CPU limit over `threads`; further
    runs wait, up to their deadline.
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
        self._memory = SegmentMemory(settings.max_loaded_bytes)
        self._loading: dict[Key, _Load] = {}
        self._failures: TTLCache[Key, IsthmusError] = TTLCache(MAX_LOADING, _FAILED_S)
        self._lookups = Lookups(_MISSING_S)
        self._loader = ThreadPoolExecutor(max_workers=_FETCHES, thread_name_prefix="load")
        # A thread of its own: loads ahead take a CPU at most, and never a turn of a request's load.
        self._ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load-ahead")
        self._profiling = threading.Lock()
        self.closing = contextlib.ExitStack()
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
        # Segments in memory outlive the trust in their signer.
        if not self._source.trusts(bundle):
            self.bundle(bundle, segment, deadline)
        while True:
            if (runner := self._memory.get(key)) is not None:
                return runner
            loading = self._join_load(key)
            try:
                with slot_released(refuse=False):
                    return loading.result(timeout=deadline.remaining())
            except MemoryInUse:
                continue  # of a load ahead, which gave up just before this request joined it
            except FutureTimeout as e:
                if loading.done():
                    return loading.result()
                raise NotReady(f"segment {segment} is still loading", segment=segment, retry_after_s=1) from e

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        """Load a segment ahead of requests, in the background; whether it is in memory already.

        A segment in memory stays there for IN_USE_S seconds, unless a request needs the room. A load evicts only
        segments that were not in use for as long.

        Raises:
            MemoryInUse: no room without evicting segments in use.
            SegmentTooLarge: its weights alone exceed `max_loaded_bytes`.
            Overloaded: too many segments are being loaded.
            NotReady: the manifest was still being read when the deadline passed.
            RegistryError, RunFailed: no such segment, or its load failed a moment ago.
        """
        key = (bundle, segment)
        if self._memory.touch(key):
            return True
        with self._lock:
            if key in self._loading:
                return False
            if (failure := self._failures.get(key)) is not None:
                raise type(failure)(failure.message, hint=failure.hint, **failure.facts)
        declared = self.bundle(bundle, segment, deadline)
        if self._memory.share(key, _content(declared, declared.segment(segment))) is not None:
            return True
        self._memory.check(key, _weight_bytes(declared, declared.segment(segment)))
        with self._lock:
            if key in self._loading or self._memory.touch(key):
                return key not in self._loading
            if sum(not load.is_awaited for load in self._loading.values()) >= MAX_AHEAD:
                raise Overloaded(f"{MAX_AHEAD} segments wait to be loaded; that is the limit", retry_after_s=1)
            self._start_load(key, _Load(is_awaited=False), self._ahead)
        return False

    def segment(self, bundle: str, segment: str, deadline: Deadline) -> Segment:
        """The declaration of a segment; reads its manifest within the deadline for a segment that is not loaded.

        Raises:
            NotReady: the manifest was still being read when the deadline passed.
            Missing, RegistryError: no such bundle or segment, or the manifest cannot be read.
        """
        runner = self._memory.peek((bundle, segment))
        if runner is not None and self._source.trusts(bundle):
            return runner.segment
        return self.bundle(bundle, segment, deadline).segment(segment)

    def run(self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline) -> TimedOutputs:
        """Run a segment; loaded first if necessary; together with other requests for it where that pays.

        Raises:
            DeadlineExceeded: no CPU was free in time.
            NotReady, Overloaded, RegistryError, SegmentError: as `runner` and `Runner.run`.
        """
        runner, load_s = self.timed_runner(bundle, segment, deadline)
        ran = self._queue.run(runner, arrays, deadline)
        return TimedOutputs(ran.outputs, load_s, ran.wait_s, ran.run_s, ran.batch)

    def run_to_exit(
        self, bundle: str, segment: str, arrays: Mapping[str, Array], threshold: float, deadline: Deadline
    ) -> TimedOutputs:
        """Run a segment and the branch of the exit behind it; see `run_exit` for the outputs.

        Raises:
            RequestMalformed: no exit can be behind the segment, or its branch is no classifier's.
            As `run`, for either of the two.
        """
        declared = self.exit_branch(bundle, segment, deadline)
        branch, branch_load_s = self.timed_runner(bundle, declared.id, deadline)
        ran = self.run(bundle, segment, arrays, deadline)
        # At once, in the request's own thread: a branch takes a hundredth of its head, and a second turn in the queue
        # would double the wait under load. Heads share runs as they do without an exit.
        outputs, branch_s = run_exit(branch, arrays, ran.outputs, threshold)
        return ran._replace(outputs=outputs, load_s=ran.load_s + branch_load_s, run_s=ran.run_s + branch_s)

    def exit_branch(self, bundle: str, segment: str, deadline: Deadline) -> Segment:
        """The declaration of the branch behind a segment.

        Raises:
            RequestMalformed: no exit can be behind the segment, or its branch is no classifier's.
            As `segment`.
        """
        return checked_branch(self.segment(bundle, branch_id(segment), deadline))

    def perform(self, work: QueuedWork) -> QueuedOutputs:
        """Run work of a segment in its turn. Raises: as `RunQueue.perform`."""
        return self._queue.perform(work)

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
                needed = _weight_bytes(located.bundle, located.segment)
                self._memory.reserve(key, needed)
                deadline.check(f"segment {segment} was loaded to be observed")
                observer = OrtObserver(
                    located.path,
                    located.segment,
                    providers=self._settings.providers,
                    threads=self._threads,
                    folder=folder,
                )
                self._memory.add(key, observer, "/".join(key))
                runs, longest = 0, 0.0
                while runs < 2 or (runs < min(max_runs, observer.max_runs()) and deadline.remaining() > 3 * longest):
                    deadline.check(f"segment {segment} was observed")
                    with self._queue.slot(deadline):
                        started = time.perf_counter()
                        observer.run(arrays)
                    runs, longest = runs + 1, max(longest, time.perf_counter() - started)
                return observer.finish(runs, needed)
        finally:
            self._memory.discard(key)
            self._profiling.release()

    def close(self) -> None:
        """Stop loading; loads in progress complete in the background."""
        self.closing.close()
        self._trials.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._lookups.close()

    def loaded(self) -> list[LoadedSegment]:
        """The segments in memory, least recently used first."""
        return self._memory.loaded()

    def bundle(self, digest: str, segment: str, deadline: Deadline) -> Bundle:
        """The manifest of a bundle; read within the deadline, for the sake of `segment`.

        Raises:
            NotReady, Missing, RegistryError: as `segment`.
        """
        try:
            return self._lookups.find(digest, partial(self._source.bundle, digest), deadline)
        except DeadlineExceeded as e:
            raise NotReady(
                f"the manifest of bundle {digest} is still being read", segment=segment, retry_after_s=1
            ) from e

    def share_memory(self, memory: MemoryBudget) -> None:
        """Count the copies that batches make in the budget of all requests."""
        self._queue.memory = memory

    def room_for_batches(self, size: int = 1) -> int:
        """See `RunQueue.room_for_batches`."""
        return self._queue.room_for_batches(size)

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

    def timed_runner(self, bundle: str, segment: str, deadline: Deadline) -> tuple[Runner, float]:
        """See `runner`; and the seconds of loading.

        Exactly 0 for a segment in memory: callers see by it that a function lost what it had loaded.
        """
        if (bundle, segment) in self._memory:
            return self.runner(bundle, segment, deadline), 0.0
        began = time.perf_counter()
        return self.runner(bundle, segment, deadline), time.perf_counter() - began

    def _join_load(self, key: Key) -> Future[Runner]:
        """The load of a segment that a request waits for, under way or begun here."""
        with self._lock:
            if (runner := self._memory.get(key)) is not None:
                ready: Future[Runner] = Future()
                ready.set_result(runner)
                return ready
            load = self._loading.get(key)
            # A load ahead that has not begun would wait for the loads before it.
            if load is not None and (load.is_awaited or not load.future.cancel()):
                load.is_awaited = True
                return load.future
            if load is None and len(self._loading) >= MAX_LOADING:
                raise Overloaded(f"{MAX_LOADING} segments are being loaded; that is the limit", retry_after_s=1)
            return self._start_load(key, _Load(is_awaited=True), self._loader)

    def _start_load(self, key: Key, load: _Load, loader: ThreadPoolExecutor) -> Future[Runner]:
        self._loading[key] = load
        load.future = loader.submit(self._load, key, load)
        return load.future

    def _load(self, key: Key, load: _Load) -> Runner:
        try:
            located = self._source.locate(*key)
            try:
                return self._enter(key, located, load)
            except BaseException:
                self._memory.discard(key)
                located.release()
                raise
        except IsthmusError as e:
            if not load.is_awaited:
                with self._lock:
                    # The traceback would keep the frames of the load, and their data, alive.
                    self._failures[key] = type(e)(e.message, hint=e.hint, **e.facts)
            raise
        finally:
            with self._lock:
                del self._loading[key]

    def _enter(self, key: Key, located: Located, load: _Load) -> Runner:
        content = _content(located.bundle, located.segment)
        if (shared := self._memory.share(key, content)) is not None:
            located.release()
            return shared
        needed = _weight_bytes(located.bundle, located.segment)
        self._memory.reserve(key, needed, lambda: not load.is_awaited)
        runner = OrtRunner(
            located.path,
            located.segment,
            providers=self._settings.providers,
            threads=self._threads,
            state=located.bundle.state,
        )
        # The registry's cache may evict the files as soon as no session maps these.
        weakref.finalize(runner, located.release)
        self._memory.add(key, runner, content, is_ahead=not load.is_awaited)
        return runner


def _weight_bytes(bundle: Bundle, segment: Segment) -> int:
    # The weights of a variant, and of a classifier's exit, lie in its graph.
    own = 0 if segment.weights else segment.graph.size
    return own + sum(t.length for t in bundle.weight_ranges(segment))


def _content(bundle: Bundle, segment: Segment) -> str:
    """Equal for segments whose files, weights, declarations and state are the same, in whatever bundles."""
    return digest_of(msgspec.json.encode((segment, bundle.weights, bundle.state), enc_hook=str))
