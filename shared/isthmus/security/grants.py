"""Grants made and opened: a table of data keys sealed under a key that is wrapped for one recipient."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec.structs import replace

from isthmus.artifacts.grant import KEYS, BlobKeys, Grant, KeyTable, to_json
from isthmus.errors import Corrupt, RegistryError
from isthmus.security.recipients import Recipient, Unwrapper
from isthmus.security.sealed_blob import KEY_BYTES, SealedHeader, new_header, new_keys, read_header

# The key of a table seals nothing else, so that one nonce serves all tables.
_NONCE = bytes(12)


@dataclass(frozen=True)
class SealedKeys:
    """A sealing of a blob, and the data keys of some or all of its regions."""

    header: SealedHeader
    keys: Mapping[int, bytes]

    @cached_property
    def digest(self) -> str:
        """The digest of the plain blob."""
        return f"sha256:{self.header.digest_hex}"

    @property
    def complete(self) -> bool:
        """Whether every region can be read."""
        return len(self.keys) == len(self.header.stops)

    def of(self, ranges: Iterable[tuple[int, int]]) -> SealedKeys:
        """The keys of these byte ranges alone."""
        regions = {region for start, stop in ranges for region in self.header.regions(start, stop)}
        return SealedKeys(self.header, {region: key for region, key in self.keys.items() if region in regions})

    def also(self, other: SealedKeys) -> SealedKeys:
        """The keys of two grants of one sealing."""
        return SealedKeys(self.header, {**other.keys, **self.keys})


def new_sealing(digest: str, size: int, boundaries: Iterable[int] = ()) -> SealedKeys:
    """A sealing of a blob under new data keys, one for each region between `boundaries`."""
    header = new_header(digest, size, boundaries)
    return SealedKeys(header, new_keys(header))


def make_grant(facts: Grant, recipient: Recipient, blobs: Iterable[SealedKeys]) -> Grant:
    """The grant of these keys for a recipient; `facts` hold the bundle, the label, the segments and what is reached."""
    blobs, key = list(blobs), os.urandom(KEY_BYTES)
    grant = replace(
        facts,
        recipient=recipient.id,
        sealed={each.digest: each.header.identity for each in blobs},
        wrapping=recipient.wrapping,
        wrapped=recipient.wrap(key, _context(facts.manifest, recipient.id)),
        keys=b"",
    )
    table = KeyTable({each.digest: BlobKeys(each.header.encoded, dict(each.keys)) for each in blobs})
    return replace(grant, keys=AESGCM(key).encrypt(_NONCE, to_json(table), grant.readable()))


def open_grant(grant: Grant, key: Unwrapper) -> dict[str, SealedKeys]:
    """The keys of a grant by the digest of the plain blob.

    Raises:
        Corrupt: altered, or of another recipient or bundle.
    """
    unwrapped = key.unwrap(grant.wrapped, _context(grant.manifest, grant.recipient))
    try:
        # OAEP would unwrap any length; AES takes three.
        if len(unwrapped) != KEY_BYTES:
            raise ValueError("the wrapped key has another length")
        table = KEYS.decode(AESGCM(unwrapped).decrypt(_NONCE, grant.keys, grant.readable()))
        opened = {digest: SealedKeys(read_header(each.header), each.keys) for digest, each in table.blobs.items()}
        for digest, sealed in opened.items():
            _check(digest, sealed, grant)
    except (InvalidTag, ValueError, RegistryError) as e:
        raise Corrupt(
            f"the grant of {grant.manifest} for recipient {grant.recipient} was altered", blob=grant.manifest
        ) from e
    return opened


def _check(digest: str, sealed: SealedKeys, grant: Grant) -> None:
    if digest != sealed.digest or grant.sealed.get(digest) != sealed.header.identity:
        raise ValueError("its table is of other blobs")
    if any(not 0 <= i < len(sealed.header.stops) or len(key) != KEY_BYTES for i, key in sealed.keys.items()):
        raise ValueError("its table holds keys of no region")


def _context(manifest: str, recipient: str) -> bytes:
    return f"isthmus grant 1 {manifest} {recipient}".encode()
