"""The document of an alias: the version that a name such as prod means, and the count of its moves.

The document names its model and alias, so that the document of one alias never passes for another's. Source:
docs/reference/registry.md, "The alias document".
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from isthmus.artifacts.bundle import ModelName
from isthmus.artifacts.canary import Canary
from isthmus.artifacts.constraints import Count, Digest, Moment
from isthmus.artifacts.json_documents import DocumentKind, builtins, canonical
from isthmus.errors import RegistryError

# A rule of a canary is a few numbers; a document of this length is damaged or hostile.
MAX_ALIAS_BYTES = 16 * 2**10
ALIAS_TYPE = "application/vnd.isthmus.alias+json"
"""The payload type of a signed alias document: docs/reference/signatures.md."""
# Numbers stay within 63 bits.
VersionNumber = Annotated[int, Meta(ge=1, le=10**18 - 1)]


class Alias(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.alias/1"):
    """What `alias` means for the model `name` since the move number `counter`.

    `digest` is of the version's manifest. Each move adds one to `counter`, the removal of an alias too, which leaves a
    void document without a version. `restores` is the counter of the move that a rollback went back to; None for other
    moves. `expires` ends the validity of a signed document. A bare number, the alias of older registries, reads as
    counter 0 without digest and time.
    """

    name: ModelName
    alias: ModelName
    version: VersionNumber | None
    digest: Digest | None
    counter: Count
    moved_at: Moment | None
    moved_by: Annotated[str, Meta(max_length=200)]
    canary: Canary | None = None
    restores: Count | None = None
    expires: Moment | None = None

    @property
    def origin(self) -> int:
        """The counter of the move that chose this version: that which a rollback went back to, else the own."""
        return self.counter if self.restores is None else self.restores

    @property
    def number(self) -> str:
        """The version as in references; empty for none."""
        return "" if self.version is None else str(self.version)

    @property
    def versions(self) -> frozenset[str]:
        """The numbers that the alias means: its version's and its canary's."""
        return frozenset(str(each) for each in (self.version, self.canary and self.canary.version) if each)


def to_json(alias: Alias) -> bytes:
    """Canonical JSON of an alias document."""
    return canonical(builtins(alias))


def from_json(data: bytes, name: str, alias: str) -> Alias:
    """Parse the document of the alias `alias` of the model `name`, or an older registry's bare number.

    Raises:
        RegistryError: not such a document, or the document of another alias.
    """
    number = data.strip()
    if number.isdigit():
        # Leading zeros and 0 are no numbers of versions, and JSON refuses the former.
        return _BARE.decode(
            b'{"format":"isthmus.alias/1","name":"%b","alias":"%b","version":%b,"digest":null,'
            b'"counter":0,"moved_at":null,"moved_by":""}' % (name.encode(), alias.encode(), number)
        )
    document = ALIAS.decode(data)
    if (document.name, document.alias) != (name, alias):
        raise RegistryError(
            f"the document of {name}:{alias} is that of {document.name}:{document.alias}", where="alias.name"
        )
    return document


def _check(alias: Alias) -> None:
    if alias.counter < 1 or alias.moved_at is None:
        raise ValueError("has no counter from 1, or no time of its move")
    if (alias.version is None) != (alias.digest is None):
        raise ValueError("has a version without a digest, or a digest without a version")
    if alias.restores is not None and alias.restores >= alias.counter:
        raise ValueError("restores a move that came later")


ALIAS = DocumentKind(Alias, "alias", MAX_ALIAS_BYTES, RegistryError, _check)
_BARE = DocumentKind(Alias, "alias", MAX_ALIAS_BYTES, RegistryError)
