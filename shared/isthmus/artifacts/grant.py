"""The grant: which segments of one sealed version one recipient may read, with the data keys of these.

Everything but `wrapped` and `keys` is readable by all: a collection keeps sealed blobs that a grant names, and people
see who may read what. Source: docs/reference/encryption.md, "Grants".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Digest, Text, matching, one_of
from isthmus.artifacts.json_documents import DocumentKind, builtins, canonical
from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import RegistryError

# 32 bytes of key and 8 of header for each region; some thousand regions are many.
MAX_GRANT_BYTES = 16 * 2**20

Identity = Annotated[str, matching("[0-9a-f]{32}")]
"""The id of a recipient, and of a sealing: 128 bits in hex."""


class Grant(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.grant/1"):
    """What one recipient may read of one bundle: these segments, and the documents beside them.

    `whole` says that nothing of the bundle is left out, so that its holder can give grants to others. `sealed` names
    the sealing of each blob that `keys` open; `reaches` are the digests that a sealed plan names, which a collection
    keeps. `wrapped` is a key of 32 bytes, wrapped for the recipient as `wrapping` says, and `keys` is the table of data
    keys, sealed with that key by AES-256-GCM; all other fields are authenticated with it.
    """

    manifest: Digest
    label: Annotated[str, matching(r"[A-Za-z0-9._-]{1,64}")]
    segments: tuple[SegmentId, ...]
    whole: bool
    reaches: tuple[Digest, ...]
    recipient: Identity = "0" * 32
    sealed: Mapping[Digest, Identity] = {}
    wrapping: Annotated[str, one_of("hpke-x25519", "rsa-oaep-sha256")] = "hpke-x25519"
    wrapped: Annotated[bytes, Meta(max_length=4096)] = b""
    keys: bytes = b""

    def readable(self) -> bytes:
        """What `keys` are authenticated with: canonical JSON of all other fields."""
        document = builtins(self)
        del document["keys"]
        return canonical(document)


class BlobKeys(Struct, frozen=True, forbid_unknown_fields=True):
    """The header of a sealed blob, and the data keys of some of its regions by number."""

    header: bytes
    keys: Mapping[int, bytes]


class KeyTable(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.keys/1"):
    """The data keys of a grant, by the plain blob's digest."""

    blobs: Mapping[Text, BlobKeys]


def to_json(document: Grant | KeyTable) -> bytes:
    """Canonical JSON of a grant or of its table; bytes are base64."""
    return canonical(builtins(document))


GRANT = DocumentKind(Grant, "grant", MAX_GRANT_BYTES, RegistryError)
KEYS = DocumentKind(KeyTable, "table of keys", MAX_GRANT_BYTES, RegistryError)
