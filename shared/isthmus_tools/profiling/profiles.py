"""Profiles where they are kept: beside their model in the registry."""

from __future__ import annotations

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.profile import MAX_PROFILE_BYTES, Profile, content_of, from_json, to_json
from isthmus.errors import Missing, ProfileMalformed
from isthmus.registry import Registry


def put(registry: Registry, profile: Profile) -> None:
    """Store a profile beside its model; an older one of the same content, tier and device is replaced."""
    registry.documents.put_profile(profile.model, profile.content, profile.tier, profile.device.id, to_json(profile))


def find(registry: Registry, bundle: Bundle, tier: str, device_id: str) -> Profile | None:
    """The profile of this bundle's content that this device measured at this tier; None if there is none.

    Raises:
        ProfileMalformed: what is stored is no profile, or one of something else.
    """
    content = content_of(bundle)
    try:
        data = registry.documents.profile(bundle.name, content, tier, device_id, max_bytes=MAX_PROFILE_BYTES)
    except Missing:
        return None
    profile = from_json(data)
    if (profile.content, profile.tier, profile.device.id) != (content, tier, device_id):
        raise ProfileMalformed(
            f"the profile stored for {bundle.name} at {tier} is of something else",
            model=bundle.name,
            expected={"content": content, "tier": tier, "device": device_id},
            got={"content": profile.content, "tier": profile.tier, "device": profile.device.id},
            hint=f"measure again: isthmus profile {bundle.name} --again",
        )
    return profile


def every(registry: Registry, bundle: Bundle) -> list[Profile]:
    """All profiles of this bundle's content, the newest first; those of another content are never among them."""
    stored = registry.documents.profiles(bundle.name, content_of(bundle))
    found = (find(registry, bundle, tier, device_id) for tier, device_id in stored)
    return sorted((p for p in found if p is not None), key=lambda p: p.measured_at, reverse=True)


def newest(registry: Registry, bundle: Bundle) -> dict[str, Profile]:
    """The newest profile of each tier."""
    found: dict[str, Profile] = {}
    for profile in every(registry, bundle):
        found.setdefault(profile.tier, profile)
    return found
