"""Runs of a published bundle's segments, once each through frames.

An alias moves by commands only to a version each of whose segments was loaded and run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.context import Context
from isthmus.errors import FrameError, ModelError, SegmentError
from isthmus.pipeline import LocalHop, LoopbackHop
from isthmus.registry import Registry, open_cache
from isthmus.registry.run_records import never_run, record_runs
from isthmus.runtime.session_store import open_store
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus.wire.frame import Frame, Step
from isthmus_tools.planner.inputs import random_inputs
from isthmus_tools.progress import Progress, silent

# One segment's load and run on a slow machine; the whole of a large model takes minutes.
_MAX_RUN_S = 600.0


@dataclass(frozen=True)
class TrialRun:
    """A segment that ran, and the seconds of its load and run."""

    segment: str
    seconds: float


@dataclass(frozen=True)
class TrialRequest:
    """A bundle of `registry` to run.

    `arrays` are inputs by name; without, noise in the shapes of the bundle's example. `segments` are to run, all where
    None; others run where these need their outputs.
    """

    registry: RegistrySettings
    digest: str
    arrays: Mapping[str, Array] = field(default_factory=dict)
    segments: Sequence[Segment] | None = None


def run_segments(store: Registry, request: TrialRequest, progress: Progress = silent) -> list[TrialRun]:
    """Load and run each segment once through frames, from the bytes of the registry, and record the runs.

    Raises:
        ModelError: a segment cannot be loaded, does not run on the inputs, or no frame carries its tensors.
        RegistryError: content is missing or corrupt.
    """
    bundle = store.bundle(request.digest)
    wanted = list(bundle.runnable.values()) if request.segments is None else list(request.segments)
    settings = SegmentSettings(**vars(request.registry))
    runs = []
    # The functions' own store, with their bounds on memory and their checks.
    sessions = open_store(open_cache(settings, store), settings)
    with closing(sessions.store):
        trial = _Trial(bundle, request.digest, LoopbackHop(LocalHop(sessions)), request.arrays)
        for segment in _in_order(bundle, wanted):
            progress(f"running segment {segment.id} of {bundle.name}")
            runs.append(trial.run(segment))
    record_runs(store, bundle, wanted)
    return runs


def run_new_segments(
    store: Registry, settings: RegistrySettings, bundle: Bundle, files: Mapping[str, Path], *, dry_run: bool = False
) -> None:
    """Upload a bundle and run those of its segments that have never run, before it gets a number.

    With `dry_run` the segments whose graphs are in `files` ran when the bundle was built.

    Raises:
        ModelError: a segment does not run.
        RegistryError: as `Registry.stage`.
    """
    if dry_run:
        record_runs(store, bundle, [each for each in bundle.segment_list if each.graph.digest in files])
    if missing := never_run(store, bundle):
        run_segments(store, TrialRequest(settings, store.stage(bundle, files), segments=missing))


class _Trial:
    """Tensors by name, which grow with each run: names are unique in a model's graph."""

    def __init__(self, bundle: Bundle, digest: str, hop: LoopbackHop, arrays: Mapping[str, Array]) -> None:
        self._bundle, self._digest, self._hop = bundle, digest, hop
        self._values = dict(arrays or random_inputs(bundle, 1)[0].arrays)

    def run(self, segment: Segment) -> TrialRun:
        bundle, start = self._bundle, time.monotonic()
        try:
            specs = bundle.carried(segment.inputs)
            arrays = {spec.name: self._values[spec.name] for spec in specs}
            frame = Frame(arrays, self._digest, str(segment.id), step=self._step(segment, arrays))
            outputs = self._hop.call(frame, Context.from_headers({}, longest_s=_MAX_RUN_S)).frame.tensors
            check_tensors(bundle.carried(segment.outputs), outputs)
        except (SegmentError, FrameError) as e:
            raise ModelError(
                f"segment {segment.id} of {bundle.name} does not run: {e.message}",
                hint="where the model refuses noise, give inputs: --tensor NAME=FILE.npy",
                segment=str(segment.id),
            ) from e
        # Boundary tensors of the segments that follow.
        self._values |= outputs
        return TrialRun(str(segment.id), time.monotonic() - start)

    def _step(self, segment: Segment, arrays: Mapping[str, Array]) -> Step | None:
        """The first step of a session, for a segment with state."""
        if not any(spec.name in self._bundle.kept for spec in segment.inputs):
            return None
        tokens = max((array.shape[1] for array in arrays.values() if array.ndim > 1), default=1)
        return Step(uuid4().hex, 0, reserve=tokens)


def _in_order(bundle: Bundle, wanted: Sequence[Segment]) -> list[Segment]:
    """The segments to run, each after those that compute its inputs.

    Raises:
        ModelError: no segments of the bundle compute a segment's inputs.
    """
    known = {spec.name for spec in bundle.inputs}
    # Names are unique in a graph, so that a tensor of one cut stands for the same tensor of every other cut.
    order, left = list[Segment](), list(bundle.runnable.values())
    while missing := [segment for segment in wanted if segment not in order]:
        ready = [s for s in left if {spec.name for spec in bundle.carried(s.inputs)} <= known]
        # The wanted ones first: others only where these wait for their outputs.
        step = next((s for s in ready if s in missing), None) or next(iter(ready), None)
        if step is None:
            raise ModelError(
                f"no segments of {bundle.name} compute the inputs of {missing[0].id}", segment=str(missing[0].id)
            )
        order.append(step)
        left.remove(step)
        known |= {spec.name for spec in step.outputs}
    return order
