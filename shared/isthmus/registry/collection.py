"""Garbage collection: removal of content that no version reaches, once the content is old enough.

A version reaches every digest in its manifest and in its plan, and every digest in a manifest that the plan names: a
plan's int8 variant. Digests are matched in the text of the documents, so documents of later formats keep their content.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from isthmus.artifacts.bundle import MAX_MANIFEST_BYTES, digest_of
from isthmus.artifacts.grant import Grant
from isthmus.artifacts.plan import MAX_PLAN_BYTES
from isthmus.registry.blobs import PROBES, StoredKey
from isthmus.registry.content import blob_key, corrupt
from isthmus.registry.leases import COLLECT_S, collect_lease
from isthmus.registry.registry import Registry
from isthmus.registry.retry_policy import in_parallel
from isthmus.registry.sealed_content import GRANTS, SEALED, all_grants, grant_key, read_grant, sealed_key
from isthmus.registry.signatures import SIGNATURES

DAY_S = 86_400.0
"""Least age of removed content: longer than a publish takes and than a plan needs its staged candidates."""

_BLOBS = ("blobs/sha256/", SEALED, GRANTS, SIGNATURES)
_DIGEST = re.compile(rb"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Garbage:
    """Content that no version reaches.

    `removable` is old enough to be removed, `younger` is not; `removed` counts the keys that were removed. Of a dry
    run, and where time ran out, it is less than the length of `removable`.
    """

    removable: tuple[StoredKey, ...]
    younger: tuple[StoredKey, ...]
    removed: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of what is removable."""
        return sum(entry.size for entry in self.removable)


def find_garbage(registry: Registry, older_than_s: float = DAY_S) -> Garbage:
    """The content that `collect` would remove; nothing is changed.

    Raises:
        Missing, Corrupt: a version's manifest or plan cannot be read, so the version's content is unknown.
    """
    return _garbage(registry, datetime.now(UTC), older_than_s)


def collect(registry: Registry, older_than_s: float = DAY_S) -> Garbage:
    """Remove content that no version reaches and that was written more than `older_than_s` ago.

    Publishers wait meanwhile. `older_than_s` is also the age at which publishers' leases expire: the longest that a
    publish may take. Removal stops after COLLECT_S / 2, long before the collection's own lease expires; the result
    counts the rest.

    Raises:
        RegistryUnavailable: a publish is under way; nothing was removed.
        Missing, Corrupt: as `find_garbage`; nothing was removed.
        Denied: the right to delete is missing.
    """
    store, retry_policy = registry.store, registry.retry_policy
    deadline = time.monotonic() + COLLECT_S / 2
    with collect_lease(store, retry_policy, older_than_s) as lease:
        garbage = _garbage(registry, lease.written, older_than_s)

        def remove(entry: StoredKey) -> bool:
            if time.monotonic() > deadline:
                return False
            retry_policy(lambda: store.delete(entry.key))
            return True

        # Of writers that were killed, or may not delete; a younger one may be in use, for moves take no lease.
        abandoned = [
            each for each in store.entries(PROBES) if (lease.written - each.written).total_seconds() > COLLECT_S
        ]
        for probe in abandoned:
            retry_policy(lambda probe=probe: store.delete(probe.key))  # type: ignore[misc]
        removed = sum(in_parallel(remove, garbage.removable))
        _log(registry, garbage, removed)
    return Garbage(garbage.removable, garbage.younger, removed)


def _log(registry: Registry, garbage: Garbage, removed: int) -> None:
    """Append the collection, and what killed writers left out, to the audit log."""
    registry.changes.recover(
        ((version.name, version.version, version.digest) for version in registry.all_versions()),
        (document for name in registry.models() for document in registry.alias_documents(name)),
    )
    if removed:
        size = sum(entry.size for entry in garbage.removable[:removed])
        registry.changes.collected("", removed, size)


def _garbage(registry: Registry, now: datetime, older_than_s: float) -> Garbage:
    # The listing precedes the reading of versions: content published in between is reached, or is not in the list.
    entries = [entry for prefix in _BLOBS for entry in registry.store.entries(prefix)]
    reached = reachable(registry)
    unreached = [entry for entry in entries if _lasting_key(entry.key) not in reached]
    old = [entry for entry in unreached if (now - entry.written).total_seconds() > older_than_s]
    return Garbage(tuple(old), tuple(entry for entry in unreached if entry not in set(old)))


def _lasting_key(key: str) -> str:
    """The key of the content that a key lasts as long as: of a signature, that of the signed manifest."""
    parts = key.split("/")
    return f"blobs/sha256/{parts[1]}" if key.startswith(SIGNATURES) else key


def reachable(registry: Registry) -> set[str]:
    """The keys of all content that any version or alias reaches: plain blobs, or of an encrypted version sealed ones
    and grants.

    A version is encrypted if one recipient can read all of it.

    Raises:
        Missing, Corrupt: a version's manifest, plan or grant is not there, or not what was published.
    """
    manifests = [version.digest for version in registry.all_versions()]
    manifests += [digest for name in registry.models() for digest in registry.alias_digests(name)]
    reached = set[str]()
    for each in _walk(registry, manifests, all_grants(registry.store)):
        reached.add(blob_key(each.digest))
        for grant in each.grants:
            reached.add(grant_key(each.digest, grant.recipient))
            reached |= {sealed_key(blob, identity) for blob, identity in grant.sealed.items()}
        # The plan may name plain content of another model.
        reached |= {blob_key(name) for name in (each.planned - each.named if each.whole else each.planned | each.named)}
    return reached


def reached_by(registry: Registry, digests: Iterable[str]) -> set[str]:
    """The digests of all content that these manifests reach, plain or sealed, their own included.

    Raises:
        Missing, Corrupt: as `reachable`.
    """
    reached = set[str]()
    for each in _walk(registry, digests, all_grants(registry.store)):
        reached |= {each.digest, *each.named, *each.planned}
    return reached


@dataclass(frozen=True)
class _Manifest:
    """A manifest's digest, the digests that it and its plan name, and its grants."""

    digest: str
    named: set[str]
    planned: set[str]
    grants: tuple[Grant, ...]

    @property
    def whole(self) -> bool:
        """Whether one recipient can read everything."""
        return any(grant.whole for grant in self.grants)


def _walk(registry: Registry, digests: Iterable[str], recipients: Mapping[str, Sequence[str]]) -> Iterator[_Manifest]:
    """These manifests, and those that plans name."""
    manifests, read = list(digests), set[str]()
    while manifests:
        digest = manifests.pop()
        if digest in read:
            continue
        read.add(digest)
        data = registry.manifest(digest)
        grants = tuple(_grant(registry, digest, recipient) for recipient in recipients.get(digest, ()))
        # A sealed plan cannot be read here: the grant says what it names.
        whole = next((grant for grant in grants if grant.whole), None)
        planned = {*whole.reaches} if whole else _named_by_plan(registry, data)
        yield _Manifest(digest, digests_in(data), planned, grants)
        manifests += _manifests(registry, planned - read)


def _named_by_plan(registry: Registry, manifest: bytes) -> set[str]:
    plan = _plan_of(manifest)
    return digests_in(_content(registry, plan, MAX_PLAN_BYTES)) if plan else set()


def _grant(registry: Registry, manifest: str, recipient: str) -> Grant:
    return registry.retry_policy(lambda: read_grant(registry.store, manifest, recipient))


def _manifests(registry: Registry, digests: Iterable[str]) -> Iterable[str]:
    """Those of the digests that are manifests in the registry: a plan's subject is a digest without content."""
    for digest in digests:
        size = registry.retry_policy(lambda digest=digest: registry.store.size(blob_key(digest)))  # type: ignore[misc]
        if size is not None and size <= MAX_MANIFEST_BYTES:
            yield digest


def _plan_of(manifest: bytes) -> str:
    """The digest of a manifest's plan; empty for none, and for content that is no manifest."""
    try:
        document = msgspec.json.decode(manifest)
        digest = document["plan"]["digest"]
    except (msgspec.DecodeError, RecursionError, KeyError, TypeError):
        return ""
    return digest if isinstance(digest, str) else ""


def _content(registry: Registry, digest: str, max_bytes: int) -> bytes:
    def one_try() -> bytes:
        data = registry.store.get(blob_key(digest), max_bytes=max_bytes)
        if digest_of(data) != digest:
            raise corrupt(registry.url, digest)
        return data

    return registry.retry_policy(one_try)


def digests_in(document: bytes) -> set[str]:
    """The digests that the text of a document holds."""
    return {match.decode() for match in _DIGEST.findall(document)}
