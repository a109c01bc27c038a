"""Profiles: a model's cuts published, each tier measured on its function, the profiles stored in the registry."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.profile import Profile, to_json
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.context import Context
from isthmus.pipeline import Hop, LocalHop, execute, local_route
from isthmus.registry import Registry, Resolved, open_cache, open_registry
from isthmus.runtime.store import SegmentStore
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.graph import CutInfo, Model, add_cuts, cut_after, cut_at, open_model, resolve_partition
from isthmus_tools.profiling import profiles
from isthmus_tools.profiling.measure import Subject, measure, merged
from isthmus_tools.profiling.remote import ProfiledFunction
from isthmus_tools.profiling.spread import spread_cuts
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.functions import FunctionUrls
from isthmus_tools.usecases.sources import example_requests

EDGE, CLOUD = "edge", "cloud"
_MAX_RUN_S = 600.0
_MAX_CACHED_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """A model to measure on its future functions.

    `model` is NAME or NAME:VERSION. `cuts` are partitions as texts; without any, the bundle's own and some of every
    part of the graph are measured, each segment `runs` times. The model runs on `photos` or `tensors`, else on random
    numbers. A stored profile that is up to date is kept, unless `again`. Cuts that the bundle lacks become its next
    version if `new_version`, without moving an alias; else functions load them by digest.
    """

    model: str
    registry: RegistrySettings
    functions: FunctionUrls
    cuts: Sequence[str] = ()
    runs: int = 15
    photos: Sequence[Path] = ()
    tensors: Mapping[str, Array] = field(default_factory=dict)
    again: bool = False
    new_version: bool = True
    budget: Budget = UNLIMITED


@dataclass(frozen=True)
class ProfileResult:
    """The profile of each tier and the bytes that cross at each measured cut; tiers in `kept` were up to date."""

    model: str
    cuts: Mapping[str, int]
    profiles: Mapping[str, Profile]
    kept: frozenset[str] = field(default_factory=frozenset)

    def document(self) -> dict[str, Any]:
        """The result, JSON-ready."""
        return {
            "model": self.model,
            "cuts": list(self.cuts),
            "up_to_date": sorted(self.kept),
            "profiles": {tier: json.loads(to_json(profile)) for tier, profile in self.profiles.items()},
        }


def profile(request: ProfileRequest, progress: Progress = silent) -> ProfileResult:
    """Measure a model, its segments and its nodes on deployed functions, and store the profiles in the registry.

    Raises:
        RegistryError, CutError: no such model or cut.
        RequestError: the inputs do not fit the model.
        HopError, ProfileMalformed: a function cannot be reached, or is none.
    """
    settings = SegmentSettings(**vars(request.registry))
    store = open_registry(settings)
    found = store.resolve(request.model)
    kind, requests = example_requests(found.bundle, request.photos, request.tensors, random=1)
    inputs = dict(requests[0].arrays)
    urls = {tier: url for tier, url in ((EDGE, request.functions.head), (CLOUD, request.functions.tail)) if url}
    functions = {tier: ProfiledFunction(url, request.functions.token) for tier, url in urls.items()}
    progress("asking the functions what they run on")
    devices = {tier: function.device() for tier, function in functions.items()}
    progress(f"fetching {found.name}:{found.version}")
    cache = open_cache(settings, store)
    with cache.locate(found.digest, WHOLE) as whole:
        model = open_model(whole.path, examples=inputs, normalise=False)
        cuts = _cuts_to_measure(model, found.bundle, request.cuts)
        current = {tier: profiles.find(store, found.bundle, tier, device.id) for tier, device in devices.items()}
        shapes = {name: tuple(a.shape) for name, a in inputs.items()}
        kept = {
            tier: p
            for tier, p in current.items()
            if p is not None and not request.again and _is_of(p, kind, shapes) and _holds(p, tier, cuts)
        }
        if kept.keys() < functions.keys():
            # Measurements are merged into earlier profiles, so one version must hold the segments of both.
            needed = {**_profiled_cuts(store, model, current.values()), **cuts}
            found = _with_cuts(store, found, whole.path, needed, request.new_version, progress)
    subject = Subject(
        found.bundle, found.digest, model, _Values(found, LocalHop(SegmentStore(cache, settings)), inputs), kind
    )
    measured = dict(kept)
    due = [tier for tier in functions if tier not in kept]
    for i, tier in enumerate(due):
        fresh = measure(
            functions[tier],
            subject,
            tier,
            [found.bundle.segment(_end(tier, name)) for name in cuts],
            runs=request.runs,
            progress=progress,
            budget=request.budget.share((i + 1) / len(due)),
        )
        old = current[tier]
        measured[tier] = merged(old, fresh) if old is not None and old.shapes == shapes else fresh
        profiles.put(store, measured[tier])
    weights = {name: (found.bundle.cuts[cut] if isinstance(cut, str) else cut).bytes for name, cut in cuts.items()}
    in_order = {tier: measured[tier] for tier in functions}
    return ProfileResult(f"{found.name}:{found.version}", weights, in_order, frozenset(kept))


def check_inputs(request: ProfileRequest) -> None:
    """Read the model and the inputs of a request, before functions are started for it.

    Raises:
        Missing, RequestError: as `profile`.
    """
    bundle = open_registry(request.registry).resolve(request.model).bundle
    example_requests(bundle, request.photos, request.tensors, random=1)


class _Values:
    """The input tensors of any head, tail or whole model of a bundle; a tail's are computed in this process."""

    def __init__(self, model: Resolved, hop: Hop, inputs: Mapping[str, Array]) -> None:
        self._model, self._hop, self._inputs = model, hop, inputs
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
        if _bytes(*self._cache.values(), tensors) <= _MAX_CACHED_BYTES:
            self._cache[cut] = tensors
        return tensors


def _bytes(*tensors: Mapping[str, Array]) -> int:
    return sum(array.nbytes for arrays in tensors for array in arrays.values())


def _cuts_to_measure(model: Model, bundle: Bundle, partitions: Sequence[str]) -> dict[str, CutInfo | str]:
    """The cuts of the partitions, or the bundle's own and some of every part of the graph, by name and in order."""
    if partitions:
        resolved = [cut for text in partitions for cut in resolve_partition(model, text, bundle.cuts)]
        cuts: list[CutInfo | str] = [cut if isinstance(cut, CutInfo) else cut.name for cut in resolved]
    else:
        cuts = [*bundle.cuts, *(c for c in spread_cuts(model) if c.name not in bundle.cuts)]
    return {c if isinstance(c, str) else c.name: c for c in sorted(cuts, key=lambda c: _position(c, bundle))}


def _profiled_cuts(registry: Registry, model: Model, stored: Iterable[Profile | None]) -> dict[str, CutInfo]:
    """The cuts of stored profiles, by name."""
    cuts: dict[str, CutInfo] = {}
    for profile in stored:
        if profile is None:
            continue
        ids = map(SegmentId.parse, profile.segments)
        names = {cut for segment in ids for cut in (segment.start, segment.stop)}
        for cut in registry.bundle(profile.bundle).cuts.values():
            if cut.name in names and cut.position is None:
                cuts[cut.name] = cut_at(model, [spec.name for spec in cut.tensors], cut.name)
            elif cut.name in names and cut.position is not None:
                cuts[cut.name] = cut_after(model, cut.position)
    return cuts


def _position(cut: CutInfo | str, bundle: Bundle) -> float:
    position = (bundle.cuts[cut] if isinstance(cut, str) else cut).position
    return float("inf") if position is None else position


def _with_cuts(
    registry: Registry,
    model: Resolved,
    whole: Path,
    cuts: Mapping[str, CutInfo | str],
    new_version: bool,
    progress: Progress,
) -> Resolved:
    """A bundle with a head and a tail at each cut: this bundle, a new version, or a staged bundle without a version."""
    lacking = [[cut] for name, cut in cuts.items() if not model.bundle.has_segments([name])]
    if not lacking:
        return model
    progress(f"{'publishing' if new_version else 'uploading'} {len(lacking)} more cuts, without weights")
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        bundle, files = add_cuts(model.bundle, whole, lacking, folder)
        if not new_version:
            return Resolved(model.name, model.version, registry.stage(bundle, files), bundle)
        version = registry.publish(bundle, files)
    return Resolved(version.name, version.version, version.digest, bundle)


def _is_of(profile: Profile, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a profile was measured on such inputs; random inputs match any kind."""
    return profile.shapes == shapes and kind in ("random", profile.inputs)


def _holds(profile: Profile, tier: str, cuts: Mapping[str, object]) -> bool:
    return all(_end(tier, name) in profile.segments for name in cuts)


def _end(tier: str, cut: str) -> SegmentId:
    """The segment that a tier runs at a cut: the head at the edge, else the tail."""
    return SegmentId(stop=cut) if tier == EDGE else SegmentId(cut)
