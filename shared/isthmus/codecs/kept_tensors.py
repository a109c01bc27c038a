"""What `layers/2` says on the wire, and what a reader holds of tensors that may be refined."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # frames are read by functions that are sent no such tensors
    from isthmus.codecs.refining import Known

KEY_BYTES = 16
REFINEMENT = b"\x80"
"""First byte of a refinement's payload, which is no step of any table."""


class Of(NamedTuple):
    """Which tensor it is."""

    bundle: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]


class Held(NamedTuple):
    """What a reader has of one tensor by now, and the key that stands for it."""

    key: bytes
    of: Of
    known: Known

    @property
    def nbytes(self) -> int:
        return int(self.known.numbers.nbytes)


class Keeper(Protocol):
    """Where a reader keeps what may be refined."""

    def keep(self, held: Held) -> None:
        """Keep it for a while, if there is room."""
        ...

    def find(self, key: bytes) -> Held | None:
        """What that key stands for; None where it is not kept, or no longer."""
        ...
