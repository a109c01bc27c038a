"""The subject of a profile: a bundle, its uncut graph, and the input tensors of each of its segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.segment_id import SegmentId
from isthmus.context import Context
from isthmus.pipeline import LocalHop, execute, local_route
from isthmus.registry import Resolved, SegmentCache
from isthmus.runtime.store import SegmentStore
from isthmus.settings import SegmentSettings
from isthmus_tools.graph.model import Model

# For a head on this machine, which may be slower than the measured device.
_MAX_RUN_S = 600.0
# Boundary tensors of all cuts of a large model would fill the memory; beyond this bound they are computed again.
_MAX_CACHED_BYTES = 2**28

Arrays: TypeAlias = Callable[[Segment], Mapping[str, Array]]


@dataclass(frozen=True)
class Subject:
    """The measured model: a bundle's version, its uncut graph, and a function from segment to input tensors.

    `inputs` is the kind of the model's inputs: random, photo or tensors.
    """

    bundle: Bundle
    digest: str
    model: Model
    arrays: Arrays
    inputs: str


class SegmentInputs:
    """The input tensors of any segment of a bundle; boundary tensors are computed in this process."""

    def __init__(
        self, model: Resolved, cache: SegmentCache, settings: SegmentSettings, inputs: Mapping[str, Array]
    ) -> None:
        self._model, self._hop, self._inputs = model, LocalHop(SegmentStore(cache, settings)), inputs
        self._cache: dict[str, Mapping[str, Array]] = {}

    def __call__(self, segment: Segment) -> Mapping[str, Array]:
        values = dict(self._inputs)
        if segment.id.start:
            values |= self._boundary(segment.id.start)
        return {spec.name: values[spec.name] for spec in segment.inputs}

    def _boundary(self, cut: str) -> Mapping[str, Array]:
        if (cached := self._cache.get(cut)) is not None:
            return cached
        head = self._model.bundle.segment(SegmentId(stop=cut))
        route = local_route(self._model.digest, self._model.bundle, [head], self._hop)
        tensors = execute(route, self._inputs, Context.from_headers({}, longest_s=_MAX_RUN_S)).tensors
        # Profiling visits all cuts in each round, so evicting entries would evict each before its use.
        if _bytes(*self._cache.values(), tensors) <= _MAX_CACHED_BYTES:
            self._cache[cut] = tensors
        return tensors


def _bytes(*tensors: Mapping[str, Array]) -> int:
    return sum(array.nbytes for arrays in tensors for array in arrays.values())
