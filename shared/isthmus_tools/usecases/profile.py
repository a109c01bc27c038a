"""Profiles: a model's cuts published, each tier measured on its function, the profiles stored in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from msgspec import structs

from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.registry import open_cache, open_registry
from isthmus.settings import SegmentSettings
from isthmus_tools.graph import open_model
from isthmus_tools.profiling import profiles
from isthmus_tools.profiling.cuts import cuts_to_profile, profiled_cuts, with_cuts
from isthmus_tools.profiling.measure import hop_cost, measure, whole_cpu_seconds
from isthmus_tools.profiling.remote import ProfiledFunction
from isthmus_tools.profiling.subject import SegmentInputs, Subject
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.profile_language import profile_language_model
from isthmus_tools.usecases.profile_request import ProfileRequest, ProfileResult
from isthmus_tools.usecases.sources import example_requests

__all__ = ["ProfileRequest", "ProfileResult", "check_inputs", "profile", "tier_profiles"]

EDGE, CLOUD = "edge", "cloud"


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
    urls = {tier: url for tier, url in ((EDGE, request.functions.head), (CLOUD, request.functions.tail)) if url}
    token, protection = request.functions.token, request.functions.protection
    functions = {tier: ProfiledFunction(url, token, protection=protection) for tier, url in urls.items()}
    progress("asking the functions what they run on")
    devices = {tier: function.device() for tier, function in functions.items()}
    progress(f"fetching {version.name}:{version.version}")
    cache = open_cache(settings, store)
    with cache.locate(version.digest, WHOLE) as whole:
        # As published: normalised again, positions of cuts could move.
        model = open_model(whole.path, examples=inputs, normalise=False)
        cuts = cuts_to_profile(model, version.bundle, request.cuts)
        current = {tier: profiles.find(store, version.bundle, tier, device.id) for tier, device in devices.items()}
        shapes = {name: tuple(a.shape) for name, a in inputs.items()}
        fresh = {
            tier: p
            for tier, p in current.items()
            # A stored profile holds for the same inputs, shapes and cuts alone.
            if p is not None and not request.again and _is_of(p, kind, shapes) and _holds(p, tier, cuts)
        }
        if fresh.keys() < functions.keys():
            # Measurements are merged into earlier profiles, so one version must hold the segments of both.
            needed = {**profiled_cuts(store, model, current.values()), **cuts}
            version = with_cuts(store, version, whole.path, needed, request.new_version, progress)
    arrays = SegmentInputs(version, cache, settings, inputs)
    subject = Subject(version.bundle, version.digest, model, arrays, kind)
    measured = dict(fresh)
    due = [tier for tier in functions if tier not in fresh]
    for i, tier in enumerate(due):
        new = measure(
            functions[tier],
            subject,
            tier,
            [version.bundle.segment(_end(tier, name)) for name in cuts],
            runs=request.runs,
            progress=progress,
            # Equal shares, so that the first tier leaves time for the second.
            budget=request.budget.share((i + 1) / len(due)),
        )
        new = structs.replace(new, device=devices[tier])
        old = current[tier]
        measured[tier] = profiles.merge(old, new) if old is not None and old.shapes == shapes else new
        profiles.put(store, measured[tier])
    if (edge := request.functions.edge).slowdown != 1 and EDGE in functions:
        progress(f"the cost of a call at an edge {edge.slowdown:g} times slower")
        hop, whole_s = hop_cost(functions[EDGE], edge), whole_cpu_seconds(functions[EDGE], subject, edge)
        measured[EDGE] = profiles.slowed(measured[EDGE], edge.slowdown, hop, whole_s)
        profiles.put(store, measured[EDGE])
        if CLOUD in functions:
            # The caller of the cloud is at the edge as well. The stored profile stays that of a caller at full speed.
            hop = hop_cost(functions[CLOUD], replace(edge, pids=()))
            measured[CLOUD] = structs.replace(measured[CLOUD], hop=hop)
    weights = {name: (version.bundle.cuts[cut] if isinstance(cut, str) else cut).bytes for name, cut in cuts.items()}
    in_order = {tier: measured[tier] for tier in functions}
    return ProfileResult(f"{version.name}:{version.version}", weights, in_order, frozenset(fresh))


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
    return all(_end(tier, name) in profile.segments for name in cuts)


def _end(tier: str, cut: str) -> SegmentId:
    """The segment that a tier runs at a cut: the head at the edge, else the tail."""
    return SegmentId(stop=cut) if tier == EDGE else SegmentId(cut)
