"""Leases of publishers and collectors: no content is removed that a publish under way relies on.

A publish skips content that the registry has; a collection removes content that no version reaches. Each writes a lease
before it reads the leases of the other kind, so of a publish and a collection at the same time at least one sees the
other's lease (Dekker's mutual exclusion). A killed process leaves its lease behind, so a lease expires at an age.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from isthmus.errors import RegistryError, RegistryUnavailable
from isthmus.registry.blobs import BlobStore, StoredKey
from isthmus.registry.retry_policy import RetryPolicy

_PUBLISH, _COLLECT = "leases/publish/", "leases/collect/"
COLLECT_S = 600.0
"""Age at which a collection's lease expires."""
# Longest wait of a publish for a collection; most collections take seconds.
_WAIT_S = 60.0
_PAUSE_S = 0.5


@contextmanager
def publish_lease(store: BlobStore, retry_policy: RetryPolicy, wait_s: float = _WAIT_S) -> Iterator[None]:
    """A publisher's lease for the block, begun once no collection is under way.

    Raises:
        RegistryUnavailable: a collection goes on for longer than `wait_s`.
    """
    with _lease(store, retry_policy, _PUBLISH) as key:
        deadline = time.monotonic() + wait_s
        # A listing of keys alone where no collection is under way, as nearly always.
        while store.list(_COLLECT) and _younger(store, _COLLECT, key, COLLECT_S):
            if time.monotonic() > deadline:
                raise RegistryUnavailable(
                    f"content of {store.url} is being removed by isthmus gc",
                    registry=store.url,
                    hint=f"publish again later; a killed collection is waited for at most {COLLECT_S / 60:g} minutes",
                )
            time.sleep(_PAUSE_S)
        yield


@contextmanager
def collect_lease(store: BlobStore, retry_policy: RetryPolicy, publish_s: float) -> Iterator[StoredKey]:
    """A collector's lease for the block; its entry has the time of the store's clock.

    Publishers' leases expire at an age of `publish_s`.

    Raises:
        RegistryUnavailable: a publish is under way.
    """
    with _lease(store, retry_policy, _COLLECT) as key:
        publishers = _younger(store, _PUBLISH, key, publish_s)
        if publishers:
            since = min(entry.written for entry in publishers)
            raise RegistryUnavailable(
                f"a publish to {store.url} is under way since {since:%Y-%m-%d %H:%M} UTC",
                registry=store.url,
                hint="collect again later; the lease of a killed publish expires at the age of --older-than",
            )
        # The remaining leases expired: their publishers were killed.
        for entry in store.entries(_PUBLISH):
            retry_policy(lambda key=entry.key: store.delete(key))  # type: ignore[misc]
        yield next(entry for entry in store.entries(_COLLECT) if entry.key == key)


def _younger(store: BlobStore, prefix: str, own: str, age_s: float) -> list[StoredKey]:
    """The leases under `prefix` that are at most `age_s` older than the lease `own`."""
    # Ages are differences of the store's own times: clocks of clients may disagree.
    entries = [*store.entries(_PUBLISH), *store.entries(_COLLECT)]
    now = next((entry.written for entry in entries if entry.key == own), None)
    if now is None:
        raise RegistryUnavailable(f"{store.url} lost the lease {own}", registry=store.url, blob=own)
    others = [entry for entry in entries if entry.key.startswith(prefix) and entry.key != own]
    return [entry for entry in others if (now - entry.written).total_seconds() <= age_s]


@contextmanager
def _lease(store: BlobStore, retry_policy: RetryPolicy, prefix: str) -> Iterator[str]:
    key = prefix + secrets.token_hex(8)
    retry_policy(lambda: store.put(key, b"1"))
    try:
        yield key
    finally:
        # Publishers may lack the right to delete; an old lease does not count.
        with suppress(RegistryError):
            store.delete(key)
