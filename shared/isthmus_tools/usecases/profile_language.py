"""Profiles of language models: layers' cuts published, the steps of sessions measured on each tier's function."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.cuts import layer_cut, layer_numbers
from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.generation.session import CHUNK
from isthmus.registry import Registry, Resolved, SegmentCache, open_cache, open_registry
from isthmus_tools.budget import Budget
from isthmus_tools.graph.decoder.bundler import add_layer_cuts
from isthmus_tools.planner.decoder_layers import DecoderLayers, layer_cuts, layers_before
from isthmus_tools.profiling.cuts import with_bundle
from isthmus_tools.profiling.slow_edge import AT_FULL_SPEED
from isthmus_tools.profiling.steps import StepSizes, StepSubject, measure_steps
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.profile_request import ProfileRequest, ProfileResult
from isthmus_tools.usecases.profiled_tiers import EDGE, ProfiledTiers, tier_segment

# Two cuts so far apart tell the time of a layer from the rest; nearer ones divide more noise by fewer layers.
_APART = 1 / 3


def profile_language_model(request: ProfileRequest, progress: Progress = silent) -> ProfileResult:
    """Measure prefill and decoding steps of a language model on deployed functions, and store the profiles.

    The whole model and two heads or tails are measured: layers are alike, so that these tell the time of all others.

    Raises:
        RegistryError, CutError: unknown model or cut.
        HopError, ProfileMalformed: a function cannot be reached, or is none.
    """
    store = open_registry(request.registry)
    version = store.resolve(request.model)
    layers = DecoderLayers.of(version.bundle)
    tiers = ProfiledTiers(request, store, progress)
    asked = [layer_cut(n) for text in request.cuts for n in layer_numbers(text, layers.count)]
    cuts = asked or profiled_layers(version.bundle, layers)
    sizes = StepSizes.of(layers.context, CHUNK)
    current = tiers.stored(version.bundle)
    fresh = {
        tier: p
        for tier, p in current.items()
        if p is not None and not request.again and _holds(p, [tier_segment(tier, c) for c in cuts], sizes)
    }
    if fresh.keys() < tiers.functions.keys():
        earlier = layer_cuts(c for p in current.values() if p is not None for c in store.bundle(p.bundle).cuts)
        # Measurements are merged into earlier profiles, so one version must hold the segments of both.
        version = with_layer_cuts(
            store, open_cache(request.registry, store), version, [*earlier, *cuts], request.new_version, progress
        )
    assert version.bundle.state is not None  # noqa: S101 - as DecoderLayers has checked
    subject = StepSubject(version.bundle, version.digest, version.bundle.state, sizes)

    def measure_tier(tier: str, budget: Budget) -> Profile:
        return measure_steps(
            tiers.functions[tier],
            subject,
            tier,
            [version.bundle.segment(tier_segment(tier, cut)) for cut in cuts],
            runs=request.runs,
            progress=progress,
            edge=request.functions.edge if tier == EDGE else AT_FULL_SPEED,
            budget=budget,
        )

    measured = tiers.measured(fresh, current, measure_tier, lambda old: bool(old.steps))
    # Steps of one thread count by their CPU time already.
    measured = tiers.slowed(measured, lambda: measured[EDGE].whole.run.median)
    weights = {cut: version.bundle.cuts[cut].bytes for cut in cuts if cut in version.bundle.cuts}
    return ProfileResult(f"{version.name}:{version.version}", weights, measured, frozenset(fresh))


def profiled_layers(bundle: Bundle, layers: DecoderLayers) -> list[str]:
    """The cuts whose segments tell the times of all layers: the bundle's own, where two are far enough apart."""
    own = [cut for cut in layer_cuts(bundle.cuts) if bundle.has_segments([cut])]
    apart = layers_before(own[-1]) - layers_before(own[0]) if own else 0
    if not layers.changes and apart >= max(1, _APART * layers.count):
        return [own[0], own[-1]]
    return list(layers.telling_cuts)


def with_layer_cuts(
    registry: Registry,
    cache: SegmentCache,
    model: Resolved,
    cuts: Sequence[str],
    new_version: bool,
    progress: Progress,
) -> Resolved:
    """A bundle with a head and a tail at each cut: this bundle, a new version, or a staged bundle without a version.

    Raises:
        CutError: the segments at a cut do not compute the model's scores.
    """
    lacking = [cut for cut in dict.fromkeys(cuts) if not model.bundle.has_segments([cut])]
    if not lacking:
        return model
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        progress(f"fetching {model.name}:{model.version}")
        with cache.locate(model.digest, WHOLE) as whole:
            bundle, files = add_layer_cuts(model.bundle, whole.path, lacking, Path(folder), progress=progress)
        progress(f"{'publishing' if new_version else 'uploading'} {len(lacking)} more cuts, without weights")
        return with_bundle(registry, model, bundle, files, new_version)


def _holds(profile: Profile, segments: Sequence[SegmentId], sizes: StepSizes) -> bool:
    """Whether a profile has the steps of these sizes for the whole model and each segment."""
    timed = {(step.segment, step.tokens, step.past) for step in profile.steps}
    return timed >= {(segment, *point) for segment in (WHOLE, *segments) for point in sizes.points}
