"""The signed statement of a version: its model, number and manifest's digest. Format: docs/reference/signatures.md."""

from __future__ import annotations

from msgspec import Struct

from isthmus.artifacts.bundle import ModelName
from isthmus.artifacts.constraints import Count, Digest, Moment
from isthmus.artifacts.json_documents import DocumentKind, builtins, canonical
from isthmus.errors import Untrusted

VERSION_TYPE = "application/vnd.isthmus.version+json"
"""The payload type of a statement's envelope: an alias document's envelope never passes for one."""
MAX_STATEMENT_BYTES = 4096


class VersionStatement(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.version-statement/1"
):
    """The signer's word that the manifest of `digest` is version `version` of the model `name`.

    `version` is None for a manifest without a number: a variant that a plan names, or a staged bundle.
    """

    name: ModelName
    version: Count | None
    digest: Digest
    signed_at: Moment


VERSION_STATEMENT = DocumentKind(VersionStatement, "statement", MAX_STATEMENT_BYTES, Untrusted)


def to_json(statement: VersionStatement) -> bytes:
    """Canonical JSON of a statement: the payload of its envelope."""
    return canonical(builtins(statement))
