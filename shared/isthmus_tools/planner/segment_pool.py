"""Segments of one bundle in this process, for evaluations: a pool of sessions, and the replay of equal runs."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.choice import MAX_LOOKS
from isthmus.artifacts.segment_id import WHOLE
from isthmus.codecs import Tables as CodecTables
from isthmus.context import Deadline
from isthmus.pipeline.hop import SegmentRunner
from isthmus.processing.image_decoding import MAX_PIXELS
from isthmus.registry import Registry, SegmentCache
from isthmus.runtime.ort_runner import OrtRunner, Runner
from isthmus.runtime.store import TimedOutputs
from isthmus.runtime.tables import Tables

# The name of the weights file in every graph's references.
_WEIGHTS = "weights.bin"


class SegmentPool:
    """Sessions of one bundle's segments, opened at first use; a `SegmentRunner` for local hops.

    Graphs by digest are in `files`, all others in the cache under `digest`. Sessions stay open until `clear`: the two
    of a cut are needed together, and those of all cuts would fill the memory.
    """

    def __init__(
        self, bundle: Bundle, digest: str, files: Mapping[str, Path], cache: SegmentCache, *, threads: int = 1
    ) -> None:
        self._bundle, self._digest, self._files = bundle, digest, files
        self._cache, self._threads = cache, threads
        self._sessions: dict[str, Runner] = {}
        self._leases = contextlib.ExitStack()

    def run(self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline) -> TimedOutputs:
        """Run a segment of the pool's bundle; see `SegmentStore.run`. The deadline is not enforced.

        Raises:
            RunFailed, ShapeMismatch: as `Runner.run`.
        """
        if (session := self._sessions.get(segment)) is None:
            spec = self._bundle.segment(segment)
            # Errors are compared on the provider that every machine has.
            session = self._sessions[segment] = OrtRunner(
                self._path(spec), spec, providers=("CPUExecutionProvider",), threads=self._threads
            )
        start = time.perf_counter()
        outputs = session.run(arrays)
        return TimedOutputs(outputs, load_s=0.0, wait_s=0.0, run_s=time.perf_counter() - start)

    def clear(self) -> None:
        """Close all sessions but the whole model's."""
        self._sessions = {name: session for name, session in self._sessions.items() if name == WHOLE}
        self._leases.close()

    def close(self) -> None:
        """Close all sessions."""
        self._sessions = {}
        self._leases.close()

    def _path(self, segment: Segment) -> Path:
        if (path := self._files.get(segment.graph.digest)) is not None:
            return path
        located = self._cache.locate(self._digest, segment.id)
        self._leases.callback(located.release)
        return located.path


class Replay:
    """A runner that runs a segment once for equal inputs, so that repeated transmissions time codecs alone.

    The first `inputs` entries of a segment come from the raw transmission: exact codecs decode to the same arrays. Of
    later entries the most recent stay, enough for all transmissions of one request.
    """

    def __init__(self, runner: SegmentRunner, inputs: int) -> None:
        self._runner, self._inputs = runner, inputs
        self._entries: dict[str, list[tuple[Mapping[str, Array], TimedOutputs]]] = {}

    def run(self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline) -> TimedOutputs:
        """As `SegmentPool.run`."""
        entries = self._entries.setdefault(segment, [])
        for inputs, ran in entries:
            # Bytes, since NaN is unequal to itself.
            if all(inputs[name].tobytes() == array.tobytes() for name, array in arrays.items()):
                return ran
        ran = self._runner.run(bundle, segment, arrays, deadline)
        if len(entries) > self._inputs + MAX_LOOKS:
            del entries[self._inputs]
        entries.append((arrays, ran))
        return ran

    def clear(self) -> None:
        """Drop all runs but the whole model's."""
        self._entries = {name: entries for name, entries in self._entries.items() if name == WHOLE}


def codec_tables(registry: Registry) -> CodecTables:
    """The codecs' tables of published bundles, each looked up once.

    Functions hold tables in memory, so a lookup is no part of a decoder's time.
    """
    return functools.cache(Tables(registry.bundle, registry.blob, MAX_PIXELS))


@contextlib.contextmanager
def weights_beside_graphs(folder: Path, whole: Path) -> Iterator[Path]:
    """`folder`, with the weights of the uncut model at `whole` beside the graphs, as long as the block lasts.

    A hard link: onnxruntime refuses symbolic links out of a model's folder.
    """
    weights, target = whole.parent / _WEIGHTS, folder / _WEIGHTS
    if weights.exists():
        try:
            os.link(weights, target)
        except OSError:  # another file system
            shutil.copyfile(weights, target)
    try:
        yield folder
    finally:
        target.unlink(missing_ok=True)
