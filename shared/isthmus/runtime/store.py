"""The segments that this process has loaded: each built once, kept warm, within a bound on memory."""

from __future__ import annotations

import contextlib
import queue
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

from isthmus.admission import aside
from isthmus.arrays import Array
from isthmus.artifacts.bundle import Segment
from isthmus.artifacts.device import Device, this_device
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, NotReady, Overloaded, RunFailed, SegmentTooLarge
from isthmus.registry import Located, SegmentSource
from isthmus.registry.lookups import Lookups
from isthmus.runtime.kernels import Observed
from isthmus.runtime.ort_runner import OrtObserver, OrtRunner, Runner, check_providers, cpu_limit, version
from isthmus.settings import SegmentSettings

Key = tuple[str, str]
"""A bundle's digest and a segment's id."""
MAX_LOADING = 64
"""Segments that wait to be loaded at a time; callers name them, so there must be an end."""
_FORGET_S = 5.0
"""How long a bundle that the registry lacks is not asked for again; a digest that is about to be published is rare."""
FETCHES = 4
"""Segments that are fetched at a time, so that an unknown one is refused while a large one is still on its way."""


@dataclass(frozen=True)
class Loaded:
    """A segment in memory and what its weights weigh, in bytes."""

    bundle: str
    segment: str
    bytes: int


class Ran(NamedTuple):
    """A run's outputs, and the seconds spent loading the segment, waiting for a CPU, and running."""

    outputs: dict[str, Array]
    load_s: float
    wait_s: float
    run_s: float


@dataclass(frozen=True)
class _Entry:
    runner: Runner
    bytes: int


class SegmentStore:
    """Loads a segment on first use and keeps it; drops the least recently used when the bound asks for room.

    A load goes on in the background when the request that asked for it runs out of time, so the next one finds it.
    As many runs go on at a time as the CPU limit holds of `threads` each; the others wait, up to their deadline.
    """

    def __init__(self, source: SegmentSource, settings: SegmentSettings) -> None:
        check_providers(settings.providers)
        cpus = cpu_limit()
        self._source = source
        self._settings = settings
        self._threads = settings.threads or cpus
        # One entry for each run that may go on now; it takes a tenth of what a semaphore does.
        self._slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(max(1, cpus // self._threads)):
            self._slots.put(None)
        self._lock = threading.Lock()
        self._loaded: OrderedDict[Key, _Entry] = OrderedDict()
        self._loading: dict[Key, Future[Runner]] = {}
        self._lookups = Lookups(_FORGET_S)
        self._loader = ThreadPoolExecutor(max_workers=FETCHES, thread_name_prefix="load")
        # Into memory one at a time, so that two never make the same room.
        self._entering = threading.Lock()
        self._observing = threading.Lock()
        self.device: Device = this_device(
            cpus=cpus, threads=self._threads, providers=settings.providers, runtime=version()
        )

    def runner(self, bundle: str, segment: str, deadline: Deadline) -> Runner:
        """The loaded segment; loads it if need be, waiting no longer than the deadline.

        Raises:
            NotReady: still loading when the deadline passed.
            Overloaded: MAX_LOADING others are being loaded.
            SegmentTooLarge: its weights alone exceed `max_loaded_bytes`.
            RegistryError, RunFailed: it could not be fetched, or not be loaded.
        """
        key = (bundle, segment)
        with self._lock:
            if (found := self._loaded.get(key)) is not None:
                self._loaded.move_to_end(key)
                return found.runner
            if (loading := self._loading.get(key)) is None:
                if len(self._loading) >= MAX_LOADING:
                    raise Overloaded(f"{MAX_LOADING} segments are being loaded; that is the limit", retry_after_s=1)
                loading = self._loading[key] = self._loader.submit(self._load, key)
        try:
            with aside(refuse=False):
                return loading.result(timeout=deadline.remaining())
        except FutureTimeout as e:
            if loading.done():
                return loading.result()
            raise NotReady(f"segment {segment} is still loading", segment=segment, retry_after_s=1) from e

    def segment(self, bundle: str, segment: str, deadline: Deadline) -> Segment:
        """What a segment takes and gives; where it is not loaded, its manifest is read, within the deadline.

        Raises:
            NotReady: the manifest was still being read when the deadline passed.
            Missing, RegistryError: there is no such bundle or segment, or its manifest cannot be had.
        """
        with self._lock:
            if (found := self._loaded.get((bundle, segment))) is not None:
                return found.runner.segment
        try:
            return self._lookups.find(bundle, partial(self._source.bundle, bundle), deadline).segment(segment)
        except DeadlineExceeded as e:
            raise NotReady(
                f"the manifest of bundle {bundle} is still being read", segment=segment, retry_after_s=1
            ) from e

    def run(self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline) -> Ran:
        """Run a segment, loading it first if need be.

        Raises:
            DeadlineExceeded: no CPU was free in time.
            And what `runner` and `Runner.run` raise.
        """
        began = time.perf_counter()
        runner = self.runner(bundle, segment, deadline)
        loaded = time.perf_counter()
        self._take_slot(deadline)
        try:
            started = time.perf_counter()
            outputs = runner.run(arrays)
            ran = time.perf_counter()
        finally:
            self._slots.put(None)
        return Ran(outputs, loaded - began, started - loaded, ran - started)

    def observe(
        self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline, *, most_runs: int
    ) -> Observed:
        """Run a segment in a session of its own that notes what each kernel takes: twice at least, up to `most_runs`
        times while the deadline lets it. The session is among `loaded` meanwhile, and counts in its bound.

        Raises:
            DeadlineExceeded: not even two runs were possible; or another observation is under way.
            RunFailed: `cache_dir` cannot be written to, or what the runtime noted cannot be read.
            And what `runner` and `Runner.run` raise.
        """
        key = (bundle, f"{segment} observed")
        if not self._observing.acquire(timeout=deadline.remaining()):
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
                        self._loaded[key] = _Entry(observer, needed)
                runs, longest = 0, 0.0
                while runs < 2 or (runs < min(most_runs, observer.most_runs()) and deadline.remaining() > 3 * longest):
                    deadline.check(f"segment {segment} was observed")
                    self._take_slot(deadline)
                    try:
                        started = time.perf_counter()
                        observer.run(arrays)
                    finally:
                        self._slots.put(None)
                    runs, longest = runs + 1, max(longest, time.perf_counter() - started)
                return observer.finish(runs, needed)
        finally:
            with self._lock:
                self._loaded.pop(key, None)
            self._observing.release()

    def close(self) -> None:
        """Load nothing more; a load under way goes on to its end."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._lookups.close()

    def loaded(self) -> list[Loaded]:
        """What is in memory, least recently used first."""
        with self._lock:
            return [Loaded(b, s, entry.bytes) for (b, s), entry in self._loaded.items()]

    def _take_slot(self, deadline: Deadline) -> None:
        """Wait until one run fewer than may go on is going on; whoever takes a slot puts it back."""
        try:
            self._slots.get(timeout=deadline.remaining())
        except queue.Empty:
            raise DeadlineExceeded("the deadline passed before a CPU was free to run the segment") from None

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        # One level down, where the cache counts what it finds and bears that it vanishes.
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
        # The cache may evict the files only once no session maps them.
        weakref.finalize(runner, located.release)
        with self._lock:
            self._loaded[key] = _Entry(runner, needed)
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
