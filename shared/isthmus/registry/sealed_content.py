"""Content of a registry, plain or sealed: the one place where sealed blobs are opened.

A blob is read plain where it is there, and otherwise by a grant for this process's recipient key. Grants belong to
bundles; the bundle of a blob is among those that were read last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

from cachetools import LRUCache

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.grant import GRANT, MAX_GRANT_BYTES, Grant, to_json
from isthmus.errors import Missing, NotGranted, RegistryMissing
from isthmus.registry.blobs import BlobStore, ended_early, missing_blob, too_long
from isthmus.registry.content import Bundles, blob_key
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.security.grants import SealedKeys, open_grant
from isthmus.security.recipients import Unwrapper
from isthmus.security.sealed_blob import open_range

SEALED, GRANTS = "sealed/", "grants/"
DOCUMENTS = "documents"
"""Stands for content of no segment: labels, tables, fidelity, plan, tokenizer."""
# Blobs whose keys are in memory; the bundles of the cache of parsed bundles have some dozens each.
_MAX_OPENED = 4096


def sealed_key(digest: str, identity: str) -> str:
    """The key of a sealing of the blob with the digest `digest`."""
    return f"{SEALED}{_hex(digest)}/{identity}"


def grant_key(manifest: str, recipient: str) -> str:
    """The key of the grant of a bundle for a recipient."""
    return f"{GRANTS}{_hex(manifest)}/{recipient}"


def grants_of(store: BlobStore, manifest: str) -> list[str]:
    """The recipients that have a grant of a bundle."""
    prefix = f"{GRANTS}{_hex(manifest)}/"
    return [key.removeprefix(prefix) for key in store.list(prefix)]


def read_grant(store: BlobStore, manifest: str, recipient: str) -> Grant:
    """One grant.

    Raises:
        Missing: no such grant.
        RegistryError: it follows no grant's format, or is of another bundle or recipient.
    """
    grant = GRANT.decode(store.get(grant_key(manifest, recipient), max_bytes=MAX_GRANT_BYTES))
    if (grant.manifest, grant.recipient) != (manifest, recipient):
        raise GRANT.error(f"the grant at {grant_key(manifest, recipient)} is of another bundle or recipient")
    return grant


def grants_in(store: BlobStore, retry_policy: RetryPolicy, manifest: str) -> list[Grant]:
    """All grants of a bundle; none of one that is not encrypted.

    Raises:
        RegistryError: a grant cannot be read.
    """
    recipients = grants_of(store, manifest)
    return [retry_policy(partial(read_grant, store, manifest, recipient)) for recipient in recipients]


def put_grant(store: BlobStore, grant: Grant) -> None:
    """Store a grant; it replaces an earlier one of that recipient."""
    store.put(grant_key(grant.manifest, grant.recipient), to_json(grant))


def all_grants(store: BlobStore) -> dict[str, list[str]]:
    """The recipients of every bundle that has grants, by the bundle's digest."""
    found = dict[str, list[str]]()
    for key in store.list(GRANTS):
        name, _, recipient = key.removeprefix(GRANTS).partition("/")
        found.setdefault(f"sha256:{name}", []).append(recipient)
    return found


def is_sealed(store: BlobStore, digest: str) -> bool:
    """Whether the store has a sealing of the blob."""
    return bool(store.list(f"{SEALED}{_hex(digest)}/"))


def is_encrypted(store: BlobStore, retry_policy: RetryPolicy, manifest: str, bundle: Bundle) -> bool:
    """Whether all content of a bundle is in the store sealed, and one recipient can read it."""
    whole = next((grant for grant in grants_in(store, retry_policy, manifest) if grant.whole), None)
    return whole is not None and all(
        digest in whole.sealed and retry_policy(partial(store.exists, sealed_key(digest, whole.sealed[digest])))
        for digest in bundle.content
    )


def refuse_sealed(store: BlobStore, bundle: Bundle) -> None:
    """Refuse to publish in plain what is encrypted in the store.

    Raises:
        RegistryError: the bundle holds a blob of an encrypted version.
    """
    sealed = {f"sha256:{key.removeprefix(SEALED).partition('/')[0]}" for key in store.list(SEALED)}
    if shared := sorted(sealed & bundle.content.keys()):
        raise GRANT.error(
            f"{len(shared)} of {len(bundle.content)} blobs of {bundle.name} are encrypted in {store.url}; a version in"
            " plain would disclose them",
            registry=store.url,
            blob=shared[0],
            hint="publish it where the plain model is, and from there with --encrypt-for; content of removed versions"
            " goes with isthmus gc",
        )


class Content:
    """Reads of blobs by digest, one attempt each; thread-safe. `key` is this process's recipient key."""

    def __init__(self, store: BlobStore, bundles: Bundles, key: Unwrapper | None = None) -> None:
        self._store, self._bundles, self._key = store, bundles, key
        # By digest, then by sealing: versions that share a blob may have been sealed at different times.
        self._opened: LRUCache[str, dict[str, SealedKeys]] = LRUCache(_MAX_OPENED)
        self._lock = threading.Lock()

    @property
    def recipient(self) -> str:
        """The id of the recipient key; empty without one."""
        return self._key.id if self._key is not None else ""

    def get(self, digest: str, max_bytes: int) -> bytes | bytearray:
        """A whole blob; the caller checks the digest.

        Raises:
            Missing: no such blob.
            NotGranted: sealed, and this process has no grant for it.
            RegistryError: longer than `max_bytes`.
        """
        return self._read(digest, 0, None, lambda key: self._store.get(key, max_bytes=max_bytes), max_bytes)

    def read(self, digest: str, start: int, stop: int) -> bytes | bytearray:
        """The bytes `start` to `stop` of a blob.

        Raises:
            Missing, NotGranted: as `get`.
            Corrupt: the blob ends before `stop`, or its sealed bytes were altered.
        """
        return self._read(digest, start, stop, lambda key: self._store.read(key, start, stop), stop - start)

    def keys(self, digest: str) -> SealedKeys | None:
        """The keys of a whole sealed blob; None where this process has not all of them.

        Raises:
            RegistryError: a grant cannot be read.
        """
        self._fetch_grants(digest)
        return self._known(digest, 0, None)

    def _read(
        self, digest: str, start: int, stop: int | None, plain: Callable[[str], bytes], max_bytes: int
    ) -> bytes | bytearray:
        with self._lock:
            is_known = digest in self._opened
        try:
            if (sealed := self._known(digest, start, stop)) is not None:
                return self._open(sealed, start, stop, max_bytes)
            if not is_known:
                return plain(blob_key(digest))
        except RegistryMissing:
            raise
        except Missing as e:
            # Not plain; or a sealing of earlier, in the place of which there is another by now.
            absent = e
        else:
            absent = missing_blob(self._store.url, blob_key(digest))
        self._fetch_grants(digest)
        if (sealed := self._known(digest, start, stop)) is not None:
            return self._open(sealed, start, stop, max_bytes)
        # Manifests are never sealed, and are in no bundle: one that is missing costs no second request.
        if is_known or (self._bundles.with_blob(digest) and is_sealed(self._store, digest)):
            raise self._refusal(digest, start, stop) from absent
        raise absent

    def _known(self, digest: str, start: int, stop: int | None) -> SealedKeys | None:
        """A sealing of which every region of the range can be opened."""
        with self._lock:
            sealings = list(self._opened.get(digest, {}).values())
        for sealed in sealings:
            size = sealed.header.size
            # Beyond its end there is no region: the read says so.
            regions = sealed.header.regions(start, size if stop is None else min(stop, size))
            if all(region in sealed.keys for region in regions):
                return sealed
        return None

    def _fetch_grants(self, digest: str) -> None:
        """Read again what this process may open of the bundles that hold the blob."""
        if self._key is None:
            return
        found = dict[str, dict[str, SealedKeys]]()
        for manifest, _ in self._bundles.with_blob(digest):
            try:
                grant = read_grant(self._store, manifest, self._key.id)
            except Missing:
                continue
            for name, keys in open_grant(grant, self._key).items():
                sealings = found.setdefault(name, {})
                earlier = sealings.get(keys.header.identity)
                sealings[keys.header.identity] = keys.also(earlier) if earlier is not None else keys
        with self._lock:
            self._opened.pop(digest, None)
            for name, sealings in found.items():
                self._opened[name] = self._opened.get(name, {}) | sealings

    def _open(self, sealed: SealedKeys, start: int, stop: int | None, max_bytes: int) -> bytes | bytearray:
        stop = sealed.header.size if stop is None else stop
        if stop - start > max_bytes:
            raise too_long(self._store.url, sealed.digest, max_bytes)
        if stop > sealed.header.size:
            raise ended_early(self._store.url, sealed.digest, sealed.header.size - start, stop - start)
        key = sealed_key(sealed.digest, sealed.header.identity)
        return open_range(sealed.header, sealed.keys, start, stop, lambda a, b: self._store.read(key, a, b))

    def _refusal(self, digest: str, start: int, stop: int | None) -> NotGranted:
        segment = next(self._segments(digest, start, stop), DOCUMENTS)
        content = f"segment {segment}" if segment != DOCUMENTS else "content of no segment"
        names = sorted({bundle.name for _, bundle in self._bundles.with_blob(digest)})
        who = f"recipient {self.recipient} has no grant for it" if self._key else "this process has no recipient-key"
        return NotGranted(
            f"{content} of {' and '.join(names) or digest} is encrypted, and {who}",
            segment=segment,
            recipient=self.recipient,
            blob=digest,
            hint="whoever may read it gives one: isthmus grant NAME:VERSION --for FILE.pub.pem@SEGMENT; the private key"
            " is the secret recipient-key",
        )

    def _segments(self, digest: str, start: int, stop: int | None) -> Iterator[str]:
        """Segments that read these bytes of a blob, the smallest first."""
        found = list[tuple[int, str]]()
        for _, bundle in self._bundles.with_blob(digest):
            for segment in bundle.runnable.values():
                ranges = bundle.weight_ranges(segment)
                weights = digest == bundle.weights.blob.digest
                if segment.graph.digest == digest or (
                    weights and any((stop is None or t.offset < stop) and start < t.offset + t.length for t in ranges)
                ):
                    found.append((sum(t.length for t in ranges), str(segment.id)))
        return (segment for _, segment in sorted(found))


def _hex(digest: str) -> str:
    return blob_key(digest).rpartition("/")[2]
