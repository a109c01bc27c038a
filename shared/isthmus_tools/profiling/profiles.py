"""Profiles in the registry, beside their model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec.structs import replace

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.device import MAX_TEXT, Device
from isthmus.artifacts.profile import (
    MAX_PROFILE_BYTES,
    CodecSpeed,
    HopCost,
    Profile,
    SegmentCost,
    Timing,
    content_of,
    from_json,
    to_json,
)
from isthmus.errors import Missing, ProfileMalformed
from isthmus.registry import Registry


def put(registry: Registry, profile: Profile) -> None:
    """Store a profile; an older profile of the same content, tier and device is replaced."""
    registry.documents.put_profile(profile.model, profile.content, profile.tier, profile.device.id, to_json(profile))


def find(registry: Registry, bundle: Bundle, tier: str, device_id: str) -> Profile | None:
    """The stored profile of the bundle's content, a tier and a device; None without one.

    Raises:
        ProfileMalformed: the stored document is no profile, or is another content's.
    """
    content = content_of(bundle)
    try:
        data = registry.documents.profile(bundle.name, content, tier, device_id, max_bytes=MAX_PROFILE_BYTES)
    except Missing:
        return None
    profile = from_json(data)
    # A copy of another profile's document under this key would misplan without a trace.
    if (profile.content, profile.tier, profile.device.id) != (content, tier, device_id):
        raise ProfileMalformed(
            f"the profile stored for {bundle.name} at {tier} is of something else",
            model=bundle.name,
            expected={"content": content, "tier": tier, "device": device_id},
            got={"content": profile.content, "tier": profile.tier, "device": profile.device.id},
            hint=f"measure again: isthmus profile {bundle.name} --again",
        )
    return profile


# The start of a slower device's `cpu`. The id is of all facts, so its profile is one of its own.
_SLOWED = re.compile(r"1/[0-9.]+ of a CPU: ")


def slowed(profile: Profile, slowdown: float, hop: HopCost, whole_cpu_s: float) -> Profile:
    """The profile of a device `slowdown` times slower, whose `cpu` says so; `hop` is the cost of a call there.

    Runs are scaled so that the whole model takes `whole_cpu_s`, its CPU seconds at full speed, times the slowdown:
    other work on the machine lengthens the measured runs and not their CPU time.
    """
    times = slowdown * whole_cpu_s / profile.whole.run.median if profile.whole.run.median else slowdown

    def cost(c: SegmentCost) -> SegmentCost:
        return replace(c, run=_times(c.run, times), decode_s=c.decode_s * slowdown, encode_s=c.encode_s * slowdown)

    return replace(
        profile,
        device=replace(profile.device, cpu=f"1/{slowdown:g} of a CPU: {profile.device.cpu}"[:MAX_TEXT], id=""),
        nodes=tuple(seconds * times for seconds in profile.nodes),
        steps=tuple(replace(step, run=_times(step.run, times)) for step in profile.steps),
        segments={segment: cost(c) for segment, c in profile.segments.items()},
        hop=hop,
        codecs={name: CodecSpeed(c.pack_s * slowdown, c.unpack_s * slowdown) for name, c in profile.codecs.items()},
    )


def _times(run: Timing, factor: float) -> Timing:
    return replace(run, median=run.median * factor, low=run.low * factor, high=run.high * factor)


def is_slowed(device: Device) -> bool:
    """Whether a profile's device was slowed."""
    return _SLOWED.match(device.cpu) is not None


def every(registry: Registry, bundle: Bundle) -> list[Profile]:
    """All profiles of the bundle's content, the newest first."""
    stored = registry.documents.profiles(bundle.name, content_of(bundle))
    loaded = (find(registry, bundle, tier, device_id) for tier, device_id in stored)
    return sorted((p for p in loaded if p is not None), key=lambda p: p.measured_at, reverse=True)


def newest(registry: Registry, bundle: Bundle, tiers: Sequence[str]) -> dict[str, Profile]:
    """The newest stored profile of each tier, but for those of slowed devices, which stand for no real one.

    Raises:
        Missing: a tier has no profile.
    """
    # `every` yields the newest first, so the first profile of a tier stays.
    by_tier: dict[str, Profile] = {}
    for profile in every(registry, bundle):
        if not is_slowed(profile.device):
            by_tier.setdefault(profile.tier, profile)
    if lacking := [tier for tier in tiers if tier not in by_tier]:
        raise Missing(
            f"there is no profile of {bundle.name} for the tier {' or '.join(lacking)}",
            kind="profile",
            name=bundle.name,
            exists=sorted(by_tier),
            hint=f"measure it: isthmus profile {bundle.name} --head URL --tail URL; or plan with --local",
        )
    return {tier: by_tier[tier] for tier in tiers}


def merge(older: Profile, newer: Profile) -> Profile:
    """`newer`, completed by the segments and codecs of `older`, a profile of the same content and device."""
    segments, codecs = {**older.segments, **newer.segments}, {**older.codecs, **newer.codecs}
    steps = tuple(step for step in older.steps if step.segment not in newer.segments)
    return replace(newer, segments=segments, codecs=codecs, steps=(*steps, *newer.steps))
