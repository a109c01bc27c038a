"""What a frame declares, held against the segment that it names before any of its payloads is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.artifacts.bundle import is_digest
from isthmus.artifacts.tensors import check_types
from isthmus.errors import RequestMalformed
from isthmus.runtime.store import SegmentStore
from isthmus.serving.memory import Turns
from isthmus.serving.work import Work
from isthmus.wire.frame import Outline


def accept(store: SegmentStore, work: Work, outline: Outline) -> None:
    """Refuse a frame whose tensors its segment does not take, before anything is allocated for them.

    Raises:
        RequestMalformed: it names no bundle's digest.
        Missing, RegistryError, NotReady: as `SegmentStore.segment`.
        ShapeMismatch: a tensor is missing, unknown, or of another dtype or shape.
    """
    if not is_digest(outline.bundle):
        raise RequestMalformed(f"the frame names bundle {outline.bundle!r}; a bundle is a manifest's sha256 digest")
    check_types(store.segment(outline.bundle, outline.segment, work.context.deadline).inputs, outline.tensors)


@contextmanager
def decoding(turns: Turns, work: Work, outline: Outline) -> Iterator[None]:
    """Hold what decoding a frame takes, for that time; what its tensors weigh, until the response.

    Raises:
        DeadlineExceeded: other frames were decoded until the deadline.
        Overloaded, RequestTooLarge: there is no memory to decode it, now or ever.
    """
    work.memory.hold(outline.decoded_bytes)
    if not outline.working_bytes:  # pictures have a bound of their own, and wait for it
        yield
        return
    with turns.one(work.context.deadline), work.memory.scope():
        work.memory.hold(outline.working_bytes)
        yield
