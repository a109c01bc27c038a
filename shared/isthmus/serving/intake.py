"""What a frame declares, held against the segment that it names before any of its payloads is decoded."""

from __future__ import annotations

from isthmus.bundle import is_digest
from isthmus.errors import RequestMalformed
from isthmus.frame import Outline
from isthmus.runners import check_types
from isthmus.runners.store import SegmentStore
from isthmus.serving.work import Work


def accept(store: SegmentStore, work: Work, outline: Outline) -> None:
    """Refuse a frame whose tensors its segment does not take, before anything is allocated for them.

    Raises:
        RequestMalformed: it names no bundle's digest.
        Missing, RegistryError, NotReady: as `SegmentStore.segment`.
        ShapeMismatch: a tensor is missing, unknown, or of another dtype or shape.
        Overloaded: with what other requests take, there is no memory to decode it now.
    """
    if not is_digest(outline.bundle):
        raise RequestMalformed(f"the frame names bundle {outline.bundle!r}; a bundle is a manifest's sha256 digest")
    check_types(store.segment(outline.bundle, outline.segment, work.context.deadline).inputs, outline.tensors)
    work.memory.hold(outline.decoding_bytes)
