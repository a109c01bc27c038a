"""From a plan's candidate to the route that it stands for: what a router serves, and what measuring it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from isthmus.artifacts.agreement import TOP1, Measure
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import PHOTO_ID
from isthmus.artifacts.plan import Candidate
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import EncodedTensor, Encoding, Tables, find_codec
from isthmus.errors import PlanMalformed
from isthmus.pipeline.agreement import margin
from isthmus.pipeline.hop import Hop
from isthmus.pipeline.route import Looks, Route, near_of
from isthmus.processing.image_spec import made_shape
from isthmus.wire.frame import DTYPES


@dataclass(frozen=True)
class PhotoAsItCame:
    """The input that the last hop makes of a photo, so that nobody before it does."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What the input weighs once it is made."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def encode(self, photo: bytes) -> dict[str, EncodedTensor]:
        """The photo as the packed form of that input."""
        return {self.tensor: EncodedTensor(PHOTO_ID, self.dtype, self.shape, photo)}


def route_of(
    candidate: Candidate,
    digest: str,
    bundle: Bundle,
    hops: Sequence[Hop],
    tables: Tables,
    variant: Callable[[str], Bundle],
) -> Route:
    """The route of `candidate`: the edge is the first hop, the cloud the last.

    `digest` is that of `bundle`, as the functions know it; `variant` gives the bundle of a digest.

    Raises:
        Missing: a cut, a segment or the variant is not there.
        PlanMalformed: closer looks by what is no output.
        FrameMalformed, RegistryError: a codec's table cannot be had.
    """
    near = near_of(hops)
    if candidate.variant is not None:
        other = variant(candidate.variant)
        return Route(candidate.variant, other, (other.segment(WHOLE),), (hops[0],), near=near)
    if candidate.kind == "edge":
        return Route(digest, bundle, (bundle.segment(WHOLE),), (hops[0],), near=near)
    encodings = {
        name: Encoding(c.codec, c.quality, tables(digest, name, c.codec) if find_codec(c.codec).calibrated else None)
        for name, c in candidate.codecs.items()
        if c.codec != PHOTO_ID
    }
    if candidate.kind == "cloud":
        return Route(digest, bundle, (bundle.segment(WHOLE),), (hops[-1],), (encodings,), near=near)
    segments = bundle.partition(candidate.cuts)
    on = (hops[0], *(hops[-1] for _ in segments[1:]))
    packed = ({}, *(encodings for _ in segments[1:]))
    return Route(digest, bundle, segments, on, packed, _looks(candidate, bundle), near)


def _looks(candidate: Candidate, bundle: Bundle) -> Looks | None:
    found = candidate.looks
    if found is None:
        return None
    if found.output not in {s.name for s in bundle.outputs}:
        raise PlanMalformed(
            f"{candidate.name} looks at {found.output!r}, no output of {bundle.name}", where="closer_looks"
        )
    return Looks(found.looks, partial(margin, Measure(TOP1, found.output)))


def photo_of(candidate: Candidate, bundle: Bundle, hops: Sequence[Hop]) -> PhotoAsItCame | None:
    """How photos go to the last hop as they came; None where the plan says otherwise, or that hop is in this process.

    Raises:
        PlanMalformed: the bundle makes no input of one shape of photos.
    """
    if candidate.input != "photo" or not hops[-1].packs:
        return None
    spec = bundle.preprocess
    shape = None if spec is None else made_shape(spec)
    if spec is None or shape is None:
        raise PlanMalformed(f"{candidate.name} sends photos as they came, and {bundle.name} takes none", where="input")
    taken: TensorSpec = next(s for s in bundle.inputs if s.name == spec["input"])
    return PhotoAsItCame(taken.name, taken.dtype, shape)
