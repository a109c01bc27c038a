"""Routes: the segments of one request, the hop of each, and the encoding of the tensors in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.choice import PHOTO_ID
from isthmus.artifacts.fidelity import TOP1, Measure
from isthmus.artifacts.plan import Candidate
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import Encoding, Tables, find_codec
from isthmus.errors import PlanMalformed
from isthmus.pipeline.agreement import margin
from isthmus.pipeline.closer_looks import LookPolicy
from isthmus.pipeline.exits import ExitBranch, exit_branch
from isthmus.pipeline.hop import Hop


@dataclass(frozen=True)
class Route:
    """Segments of a bundle in order, each with its hop; most routes lead from the model's inputs to its outputs."""

    digest: str
    bundle: Bundle
    segments: tuple[Segment, ...]
    hops: tuple[Hop, ...]
    encodings: tuple[Mapping[str, Encoding], ...] = ()
    """For each segment, the encoding of its inputs by name; a tensor without an encoding is sent raw."""
    looks: LookPolicy | None = None
    near: str = ""
    """Name of the hop beside the router; frames to other hops go over the link."""
    exit: ExitBranch | None = None
    """The exit behind the first segment, where requests end whose early prediction is sure."""

    @cached_property
    def starts_at_cut(self) -> bool:
        """Whether the route starts with boundary tensors instead of the model's inputs."""
        return bool(self.segments[0].id.start)

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the caller has to provide."""
        if not self.starts_at_cut:
            return self.bundle.carried(self.bundle.inputs)
        needed: dict[str, TensorSpec] = {}
        computed: set[str] = set()
        for segment in self.segments:
            needed |= {
                s.name: s
                for s in self.bundle.carried(segment.inputs)
                if s.name not in computed and s.name not in needed
            }
            computed |= {s.name for s in segment.outputs}
        return tuple(needed.values())

    def encodings_of(self, index: int) -> Mapping[str, Encoding]:
        """The encodings of that segment's inputs; none where its hop passes arrays unchanged."""
        return self.encodings[index] if self.encodings and self.hops[index].encodes else {}

    def after(self, count: int) -> Route:
        """The rest of the route behind its first `count` segments."""
        return self.between(count, len(self.segments))

    def between(self, start: int, stop: int) -> Route:
        """The part of the route from its segment `start` to before its segment `stop`."""
        part = slice(start, stop)
        left = None if start else self.exit
        return replace(
            self, segments=self.segments[part], hops=self.hops[part], encodings=self.encodings[part], exit=left
        )

    def raw(self) -> Route:
        """The same route without codecs, and so without closer looks."""
        return replace(self, encodings=(), looks=None)

    def full(self) -> Route:
        """The same route without its exit: every request runs the whole model."""
        return self if self.exit is None else replace(self, exit=None)

    def with_exit(self) -> Route:
        """The same route with the exit of its first cut, where the bundle has one there."""
        return replace(self, exit=exit_branch(self.bundle, self.segments[0].id.stop))

    def finer(self, quality: float) -> Route:
        """The same route with at least that quality."""
        encodings = tuple(
            {name: replace(e, quality=quality) if e.quality < quality else e for name, e in each.items()}
            for each in self.encodings
        )
        return replace(self, encodings=encodings)


def plan_route(digest: str, bundle: Bundle, hops: tuple[Hop, ...], cuts: Iterable[str] | None = None) -> Route:
    """The route along `cuts`, names or the text of a partition (default: the bundle's own), without encodings.

    Segments beyond the last hop run on the last hop.

    Raises:
        Missing: the bundle has no such cut, or no segment between two of them.
    """
    segments = bundle.partition(cuts)
    used = tuple(hops[min(i, len(hops) - 1)] for i in range(len(segments)))
    return Route(digest, bundle, segments, used, near=near_hop(hops))


def local_route(
    digest: str,
    bundle: Bundle,
    segments: Sequence[Segment],
    hop: Hop,
    encodings: Mapping[str, Encoding] | None = None,
) -> Route:
    """Any consecutive segments, all on one hop; `encodings` are for the inputs of the first segment.

    For trials: a head or a tail alone, or the uncut model.
    """
    encoded: tuple[Mapping[str, Encoding], ...] = (encodings, *({} for _ in segments[1:])) if encodings else ()
    return Route(digest, bundle, tuple(segments), (hop,) * len(segments), encoded)


def planned_route(
    candidate: Candidate,
    digest: str,
    bundle: Bundle,
    hops: Sequence[Hop],
    tables: Tables,
    variant: Callable[[str], Bundle],
) -> Route:
    """The route of a plan's candidate: the edge is the first hop, the cloud the last.

    `digest` is the digest of `bundle` for the functions; `variant` gives the bundle of a digest.

    Raises:
        Missing: a cut, a segment or a variant does not exist.
        PlanMalformed: closer looks at a tensor that is no output, or an exit that the bundle does not have.
        FrameMalformed, RegistryError: a codec's table cannot be had.
    """
    near = near_hop(hops)
    if candidate.variant is not None:
        other = variant(candidate.variant)
        return Route(candidate.variant, other, (other.segment(WHOLE),), (hops[0],), near=near)
    if candidate.kind == "edge":
        return Route(digest, bundle, (bundle.segment(SegmentId(variant=candidate.head)),), (hops[0],), near=near)
    encodings = {
        name: Encoding(c.codec, c.quality, tables(digest, name, c.codec) if find_codec(c.codec).calibrated else None)
        for name, c in candidate.codecs.items()
        if c.codec != PHOTO_ID
    }
    if candidate.kind == "cloud":
        return Route(digest, bundle, (bundle.segment(WHOLE),), (hops[-1],), (encodings,), near=near)
    segments = bundle.partition(candidate.cuts)
    if candidate.head:
        segments = (bundle.segment(SegmentId("", candidate.cuts[0], candidate.head)), *segments[1:])
    used = (hops[0], *(hops[-1] for _ in segments[1:]))
    each = ({}, *(encodings for _ in segments[1:]))
    return Route(
        digest, bundle, segments, used, each, _look_policy(candidate, bundle), near, _planned_exit(candidate, bundle)
    )


def near_hop(hops: Sequence[Hop]) -> str:
    """The name of the hop before the link: the first of several. A single hop is behind the link, or local."""
    return hops[0].name if len(hops) > 1 else ""


def _planned_exit(candidate: Candidate, bundle: Bundle) -> ExitBranch | None:
    if candidate.exit is None:
        return None
    if (branch := exit_branch(bundle, candidate.cuts[0])) is None:
        raise PlanMalformed(
            f"{candidate.name} has an exit at {candidate.cuts[0]}, where {bundle.name} has none", where="exit"
        )
    return branch


def _look_policy(candidate: Candidate, bundle: Bundle) -> LookPolicy | None:
    looks = candidate.looks
    if looks is None:
        return None
    if looks.output not in {s.name for s in bundle.outputs}:
        raise PlanMalformed(
            f"{candidate.name} looks at {looks.output!r}, no output of {bundle.name}", where="closer_looks"
        )
    return LookPolicy(looks.looks, partial(margin, Measure(TOP1, looks.output)))
