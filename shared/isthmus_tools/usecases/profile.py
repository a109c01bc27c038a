"""Profiles: a model's cuts published, each tier measured on its function, the profiles stored in the registry."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import WHOLE
from isthmus.registry import open_cache, open_registry
from isthmus.settings import SegmentSettings
from isthmus_tools.budget import Budget
from isthmus_tools.graph import open_model
from isthmus_tools.profiling import profiles
from isthmus_tools.profiling.cuts import cuts_to_profile, profiled_cuts, with_cuts
from isthmus_tools.profiling.measure import measure, whole_cpu_seconds
from isthmus_tools.profiling.subject import SegmentInputs, Subject
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.profile_language import profile_language_model
from isthmus_tools.usecases.profile_request import ProfileRequest, ProfileResult
from isthmus_tools.usecases.profiled_tiers import CLOUD, EDGE, ProfiledTiers, tier_segment
from isthmus_tools.usecases.sources import example_requests

__all__ = ["ProfileRequest", "ProfileResult", "check_inputs", "profile", "tier_profiles"]


def profile(request: ProfileRequest, progress: Progress = silent) -> ProfileResult:
    """Measure a model, its segments and its nodes on deployed functions, and store the profiles in the registry.

    Raises:
        RegistryError, CutError: unknown model or cut.
        RequestError: the inputs do not fit the model.
        HopError, ProfileMalformed: a function cannot be reached, or is none.
    """
    settings = SegmentSettings(**vars(request.registry))
    store = open_registry(settings)
    version = store.resolve(request.model)
    if version.bundle.text is not None:
        return profile_language_model(request, progress)
    # One request, run again and again: the spread is then the machine's, not the inputs'.
    kind, requests = example_requests(version.bundle, request.photos, request.tensors, random=1)
    inputs = dict(requests[0].arrays)
    tiers = ProfiledTiers(request, store, progress)
    progress(f"fetching {version.name}:{version.version}")
    cache = open_cache(settings, store)
    with cache.locate(version.digest, WHOLE) as whole:
        # As published: normalised again, positions of cuts could move.
        model = open_model(whole.path, examples=inputs, normalise=False)
        cuts = cuts_to_profile(model, version.bundle, request.cuts)
        current = tiers.stored(version.bundle)
        shapes = {name: tuple(a.shape) for name, a in inputs.items()}
        fresh = {
            tier: p
            for tier, p in current.items()
            # A stored profile holds for the same inputs, shapes and cuts alone.
            if p is not None and not request.again and _is_of(p, kind, shapes) and _holds(p, tier, cuts)
        }
        if fresh.keys() < tiers.functions.keys():
            # Measurements are merged into earlier profiles, so one version must hold the segments of both.
            needed = {**profiled_cuts(store, model, current.values()), **cuts}
            version = with_cuts(store, version, whole.path, needed, request.new_version, progress)
    arrays = SegmentInputs(version, cache, settings, inputs)
    subject = Subject(version.bundle, version.digest, model, arrays, kind)

    def measure_tier(tier: str, budget: Budget) -> Profile:
        segments = [version.bundle.segment(tier_segment(tier, name)) for name in cuts]
        function = tiers.functions[tier]
        return measure(function, subject, tier, segments, runs=request.runs, progress=progress, budget=budget)

    measured = tiers.measured(fresh, current, measure_tier, lambda old: old.shapes == shapes)
    measured = tiers.slowed(measured, lambda: whole_cpu_seconds(tiers.functions[EDGE], subject, request.functions.edge))
    weights = {name: (version.bundle.cuts[cut] if isinstance(cut, str) else cut).bytes for name, cut in cuts.items()}
    return ProfileResult(f"{version.name}:{version.version}", weights, measured, frozenset(fresh))


def tier_profiles(request: ProfileRequest, progress: Progress = silent) -> Mapping[str, Profile]:
    """Both tiers' profiles: measured where the request has a token for its functions, else the newest stored ones.

    Raises:
        Missing: a tier has no stored profile.
        As `profile`.
    """
    if request.functions.token:
        return profile(request, progress).profiles
    store = open_registry(request.registry)
    bundle = store.resolve(request.model).bundle
    return profiles.newest(store, bundle, (EDGE, CLOUD))


def check_inputs(request: ProfileRequest) -> None:
    """Read the model and the inputs of a request, before functions start.

    Raises:
        Missing, RequestError: as `profile`.
    """
    bundle = open_registry(request.registry).resolve(request.model).bundle
    if bundle.text is None:
        example_requests(bundle, request.photos, request.tensors, random=1)


def _is_of(profile: Profile, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a profile was measured on inputs of this kind; random inputs match any kind."""
    return profile.shapes == shapes and kind in ("random", profile.inputs)


def _holds(profile: Profile, tier: str, cuts: Mapping[str, object]) -> bool:
    return all(tier_segment(tier, name) in profile.segments for name in cuts)
