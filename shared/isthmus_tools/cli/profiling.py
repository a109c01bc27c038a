"""What `isthmus profile` does: cuts published, each tier measured, profiles kept."""

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
from isthmus.context import Deadline
from isthmus.registry import Registry, Resolved, open_cache, open_registry
from isthmus.runtime.store import SegmentStore
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.cli.console import segment_settings
from isthmus_tools.cli.tensors import read_inputs
from isthmus_tools.graph import CutInfo, Model, add_cuts, cut_after, cut_at, open_model, resolve_partition
from isthmus_tools.profiling import profiles
from isthmus_tools.profiling.measure import Subject, measure, merged
from isthmus_tools.profiling.remote import ProfiledFunction
from isthmus_tools.profiling.spread import spread_cuts
from isthmus_tools.progress import Progress

_MAX_S = 600.0
_MAX_KEPT_BYTES = 2**28


@dataclass(frozen=True)
class Outcome:
    """The profile of each tier; those in `kept` were up to date. `cuts`: what was to be measured, and what crosses."""

    model: str
    cuts: Mapping[str, int]
    profiles: Mapping[str, Profile]
    kept: frozenset[str] = field(default_factory=frozenset)

    def document(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {
            "model": self.model,
            "cuts": list(self.cuts),
            "up_to_date": sorted(self.kept),
            "profiles": {tier: json.loads(to_json(found)) for tier, found in self.profiles.items()},
        }


def check_request(registry: str, reference: str, photo: Path | None, tensors: Sequence[str]) -> None:
    """Read what `profile_tiers` is to be told, before functions are started for it.

    Raises:
        RegistryError, RequestError: as `profile_tiers`.
    """
    read_inputs(open_registry(segment_settings(registry)).resolve(reference).bundle, photo, tensors)


def profile_tiers(
    registry: str,
    cache_dir: str,
    reference: str,
    urls: Mapping[str, str],
    token: str,
    *,
    runs: int,
    at: Sequence[str],
    photo: Path | None,
    tensors: Sequence[str],
    again: bool,
    step: Progress,
    version: bool = True,
    budget: Budget = UNLIMITED,
) -> Outcome:
    """Measure the model on the functions at `urls`, by tier, and keep what they said in the registry.

    The bundle with the cuts that were lacking becomes the model's next version if `version`; no alias moves to it.

    Raises:
        RegistryError, CutError, RequestError: no such model, cut, or input.
        HopError, ProfileMalformed: a function that cannot be reached, or is none.
    """
    settings = segment_settings(registry, cache_dir)
    store = open_registry(settings)
    found = store.resolve(reference)
    kind, inputs = read_inputs(found.bundle, photo, tensors)
    functions = {tier: ProfiledFunction(url, token) for tier, url in urls.items()}
    step("asking the functions what they run on")
    devices = {tier: function.device() for tier, function in functions.items()}
    step(f"fetching {found.name}:{found.version}")
    cache = open_cache(settings, store)
    with cache.locate(found.digest, WHOLE) as whole:
        model = open_model(whole.path, examples=inputs, normalise=False)
        chosen = _chosen(model, found.bundle, at)
        current = {tier: profiles.find(store, found.bundle, tier, device.id) for tier, device in devices.items()}
        shapes = {name: tuple(a.shape) for name, a in inputs.items()}
        kept = {
            tier: p
            for tier, p in current.items()
            if p is not None and not again and _is_of(p, kind, shapes) and _holds(p, tier, chosen)
        }
        if kept.keys() < functions.keys():
            wanted = {**_measured_before(store, model, current.values()), **chosen}
            found = _with_cuts(store, found, whole.path, wanted, step, version)
    subject = Subject(found.bundle, found.digest, model, _Values(found, SegmentStore(cache, settings), inputs), kind)
    measured = {}
    due = [tier for tier in functions if tier not in kept]
    for tier, function in functions.items():
        if tier in kept:
            measured[tier] = kept[tier]
            continue
        share = budget.share((due.index(tier) + 1) / len(due))
        segments = [found.bundle.segment(_end(tier, name)) for name in chosen]
        profile = measure(function, subject, tier, segments, runs=runs, progress=step, budget=share)
        old = current[tier]
        measured[tier] = merged(old, profile) if old is not None and old.shapes == shapes else profile
        profiles.put(store, measured[tier])
    weights = {name: (found.bundle.cuts[cut] if isinstance(cut, str) else cut).bytes for name, cut in chosen.items()}
    return Outcome(f"{found.name}:{found.version}", weights, measured, frozenset(kept))


class _Values:
    """The input tensors of any head, tail or whole model of a bundle, computed here where a tail needs them."""

    def __init__(self, model: Resolved, store: SegmentStore, inputs: Mapping[str, Array]) -> None:
        self._model, self._store, self._inputs = model, store, inputs
        self._kept: dict[str, Mapping[str, Array]] = {}

    def __call__(self, segment: Segment) -> Mapping[str, Array]:
        values = dict(self._inputs)
        if segment.id.start:
            values |= self._crossing(segment.id.start)
        return {spec.name: values[spec.name] for spec in segment.inputs}

    def _crossing(self, cut: str) -> Mapping[str, Array]:
        if (kept := self._kept.get(cut)) is not None:
            return kept
        head = self._model.bundle.segment(SegmentId(stop=cut))
        taken = {spec.name: self._inputs[spec.name] for spec in head.inputs}
        ran = self._store.run(self._model.digest, head.id, taken, Deadline.after(_MAX_S)).outputs
        if _bytes(*self._kept.values(), ran) <= _MAX_KEPT_BYTES:
            self._kept[cut] = ran
        return ran


def _bytes(*tensors: Mapping[str, Array]) -> int:
    return sum(array.nbytes for arrays in tensors for array in arrays.values())


def _chosen(model: Model, bundle: Bundle, at: Sequence[str]) -> dict[str, CutInfo | str]:
    """Each cut that is to be measured, by its name: those asked for, or the bundle's own and some of every part."""
    if at:
        asked = [cut for text in at for cut in resolve_partition(model, text, bundle.cuts)]
        cuts: list[CutInfo | str] = [cut if isinstance(cut, CutInfo) else cut.name for cut in asked]
    else:
        cuts = [*bundle.cuts, *(c for c in spread_cuts(model) if c.name not in bundle.cuts)]
    found = {c if isinstance(c, str) else c.name: c for c in cuts}
    places = {name: _position(c, bundle) for name, c in found.items()}
    return dict(sorted(found.items(), key=lambda item: places[item[0]]))


def _measured_before(registry: Registry, model: Model, known: Iterable[Profile | None]) -> dict[str, CutInfo]:
    """The cuts of profiles that will be added to: one version is to hold all of their segments."""
    found: dict[str, CutInfo] = {}
    for profile in known:
        if profile is None:
            continue
        ids = map(SegmentId.parse, profile.segments)
        names = {cut for segment in ids for cut in (segment.start, segment.stop)}
        for cut in registry.bundle(profile.bundle).cuts.values():
            if cut.name in names:
                at = cut.position
                found[cut.name] = (
                    cut_at(model, [s.name for s in cut.tensors], cut.name) if at is None else cut_after(model, at)
                )
    return found


def _position(cut: CutInfo | str, bundle: Bundle) -> float:
    known = bundle.cuts[cut] if isinstance(cut, str) else cut
    return float("inf") if known.position is None else known.position


def _with_cuts(
    registry: Registry, found: Resolved, whole: Path, chosen: Mapping[str, CutInfo | str], step: Progress, version: bool
) -> Resolved:
    """The bundle that has a head and a tail at each cut: this one, or one that functions find by its digest."""
    lacking = [[cut] for name, cut in chosen.items() if not found.bundle.has_segments([name])]
    if not lacking:
        return found
    step(f"{'publishing' if version else 'uploading'} {len(lacking)} more cuts, without weights")
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        bundle, files = add_cuts(found.bundle, whole, lacking, folder)
        if not version:
            return Resolved(found.name, found.version, registry.stage(bundle, files), bundle)
        made = registry.publish(bundle, files)
    return Resolved(made.name, made.version, made.digest, bundle)


def _is_of(profile: Profile, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a profile is of such inputs; random ones ask for nothing in particular."""
    return profile.shapes == shapes and kind in ("random", profile.inputs)


def _holds(profile: Profile, tier: str, chosen: Mapping[str, object]) -> bool:
    return all(_end(tier, name) in profile.segments for name in chosen)


def _end(tier: str, cut: str) -> SegmentId:
    """The segment that a tier runs at a cut: the edge the head, any other the tail."""
    return SegmentId(stop=cut) if tier == "edge" else SegmentId(cut)
