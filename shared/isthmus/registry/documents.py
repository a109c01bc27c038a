"""Documents beside a model's versions: profiles, by what was measured and by the device that measured it.

They are no content: a later one takes an earlier one's place, and nothing that a request needs refers to them.
"""

from __future__ import annotations

import re

from isthmus.artifacts.bundle import is_digest, is_model_name
from isthmus.errors import Missing, RegistryError
from isthmus.registry.blobs import BlobStore
from isthmus.registry.retry_policy import RetryPolicy

_TIER = re.compile(r"[a-z0-9]([a-z0-9_]{0,31})")
_DEVICE = re.compile(r"[0-9a-f]{12}")


class Documents:
    """The documents in a registry's store."""

    def __init__(self, store: BlobStore, patience: RetryPolicy) -> None:
        self._store, self._retry = store, patience

    def put_profile(self, model: str, content: str, tier: str, device: str, data: bytes) -> None:
        """Store what `device` measured of the content with the digest `content`, as `tier`.

        Raises:
            RegistryError: a name, digest, tier or device's id that cannot be part of a key.
        """
        key = _profile_key(model, content, tier, device)
        self._retry(lambda: self._store.put(key, data))

    def profile(self, model: str, content: str, tier: str, device: str, *, max_bytes: int) -> bytes:
        """What `put_profile` stored.

        Raises:
            Missing: nothing; RegistryError: longer than `max_bytes`.
        """
        key = _profile_key(model, content, tier, device)
        return self._retry(lambda: self._store.get(key, max_bytes=max_bytes))

    def profiles(self, model: str, content: str) -> list[tuple[str, str]]:
        """Tier and device of each profile of this content."""
        folder = _folder(model, content)
        try:
            keys = self._store.list(folder)
        except Missing:
            return []
        names = (key.removeprefix(folder).removesuffix(".json").rpartition("-") for key in keys)
        return [(tier, device) for tier, _, device in names if _TIER.fullmatch(tier) and _DEVICE.fullmatch(device)]


def is_tier(text: str) -> bool:
    """Whether `text` can name a tier: 1 to 32 of a-z, 0-9 and '_', not starting with the last."""
    return _TIER.fullmatch(text) is not None


def _profile_key(model: str, content: str, tier: str, device: str) -> str:
    if not is_tier(tier) or not _DEVICE.fullmatch(device):
        raise RegistryError(f"a profile of tier {tier!r} and device {device!r} cannot be stored")
    return f"{_folder(model, content)}{tier}-{device}.json"


def _folder(model: str, content: str) -> str:
    if not is_model_name(model) or not is_digest(content):
        raise RegistryError(f"a profile of model {model!r} with content {content!r} cannot be stored")
    return f"models/{model}/profiles/{content.removeprefix('sha256:')}/"
