"""The cuts of a model to profile, and a bundle with a head and a tail at each of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import SegmentId
from isthmus.registry import Registry, Resolved
from isthmus_tools.graph import CutInfo, Model, add_cuts, cut_after, cut_at, cuts, resolve_partition
from isthmus_tools.progress import Progress

# Each cut adds a segment on each tier, measured in several rounds: minutes on a small device.
MAX_CUTS = 16


def cuts_to_profile(model: Model, bundle: Bundle, partitions: Sequence[str]) -> dict[str, CutInfo | str]:
    """The cuts of the partitions, or the bundle's own and some of every part of the graph, by name and in order."""
    if partitions:
        resolved = [cut for text in partitions for cut in resolve_partition(model, text, bundle.cuts)]
        selected: list[CutInfo | str] = [cut if isinstance(cut, CutInfo) else cut.name for cut in resolved]
    else:
        selected = [*bundle.cuts, *(c for c in spread_cuts(model) if c.name not in bundle.cuts)]
    return {c if isinstance(c, str) else c.name: c for c in sorted(selected, key=lambda c: _position(c, bundle))}


def profiled_cuts(registry: Registry, model: Model, stored: Iterable[Profile | None]) -> dict[str, CutInfo]:
    """The cuts of stored profiles, by name."""
    profiled: dict[str, CutInfo] = {}
    for profile in stored:
        if profile is None:
            continue
        ids = map(SegmentId.parse, profile.segments)
        names = {cut for segment in ids for cut in (segment.start, segment.stop)}
        for cut in registry.bundle(profile.bundle).cuts.values():
            if cut.name in names and cut.position is None:
                profiled[cut.name] = cut_at(model, [spec.name for spec in cut.tensors], cut.name)
            elif cut.name in names and cut.position is not None:
                profiled[cut.name] = cut_after(model, cut.position)
    return profiled


def _position(cut: CutInfo | str, bundle: Bundle) -> float:
    position = (bundle.cuts[cut] if isinstance(cut, str) else cut).position
    return float("inf") if position is None else position


def with_cuts(
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
        return with_bundle(registry, model, bundle, files, new_version)


def with_bundle(
    registry: Registry, model: Resolved, bundle: Bundle, files: Mapping[str, Path], new_version: bool
) -> Resolved:
    """`bundle`, of more cuts than the model's, as its next version or staged without a version."""
    if not new_version:
        return Resolved(model.name, model.version, registry.stage(bundle, files), bundle)
    version = registry.publish(bundle, files)
    return Resolved(version.name, version.version, version.digest, bundle)


def spread_cuts(model: Model, max_cuts: int = MAX_CUTS) -> list[CutInfo]:
    """At most `max_cuts` prefix cuts, in order: candidates of a plan before anything is measured.

    The narrowest of each of `max_cuts` / 2 parts of the work, then the Pareto front of bytes over position, the
    narrowest first.
    """
    ordered = cuts(model)
    selected = {c.name: c for c in _narrowest_of_parts(ordered, len(model.nodes), max(1, max_cuts // 2))}
    front: list[CutInfo] = []
    for cut in ordered:
        if not front or cut.bytes < front[-1].bytes:
            front.append(cut)
    for cut in reversed(front):
        if len(selected) >= max_cuts:
            break
        selected.setdefault(cut.name, cut)
    return sorted(selected.values(), key=lambda c: c.position or 0)


def _narrowest_of_parts(ordered: Sequence[CutInfo], nodes: int, parts: int) -> list[CutInfo]:
    narrowest: dict[int, CutInfo] = {}
    for cut in ordered:
        # Half by multiply-accumulates, half by nodes: neither alone is time.
        share = (cut.macs_before + ((cut.position or 0) + 1) / nodes) / 2
        part = min(parts - 1, int(share * parts))
        if part not in narrowest or cut.bytes < narrowest[part].bytes:
            narrowest[part] = cut
    return list(narrowest.values())
