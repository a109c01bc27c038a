"""What one request will do: which segments, on which hops, and how what they take is packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.codecs import Encoding
from isthmus.pipeline.hop import Hop

if TYPE_CHECKING:
    from isthmus.artifacts.choice import Look


@dataclass(frozen=True)
class Looks:
    """Closer looks, one after the other: below a look's margin the boundary tensors are sent again, finer.

    `margin_of` reads the margin off the outputs, in nats (`calibration.agreement.margin_of`).
    """

    looks: tuple[Look, ...]
    margin_of: Callable[[Mapping[str, Array]], float]


@dataclass(frozen=True)
class Route:
    """What one request will do: these segments of this bundle, in order, each on its hop."""

    digest: str
    bundle: Bundle
    segments: tuple[Segment, ...]
    hops: tuple[Hop, ...]
    encodings: tuple[Mapping[str, Encoding], ...] = ()
    """For each segment, how its inputs are packed on their way over HTTP; raw where nothing is said."""
    looks: Looks | None = None
    near: str = ""
    """The name of the hop that stands beside the router: what goes to the others goes over the link."""

    def encoding(self, segment: int) -> Mapping[str, Encoding]:
        """How the inputs of that segment travel; a hop in this process takes them as they are."""
        return self.encodings[segment] if self.encodings and self.hops[segment].packs else {}

    def finer(self, quality: float) -> Route:
        """The same route with at least that quality."""
        made = tuple(
            {name: replace(p, quality=quality) if p.quality < quality else p for name, p in each.items()}
            for each in self.encodings
        )
        return replace(self, encodings=made)


def plan_route(digest: str, bundle: Bundle, hops: tuple[Hop, ...], cuts: Iterable[str] | None = None) -> Route:
    """The route along `cuts`, names or a text that says them (default: the bundle's own).

    Segments beyond the last hop run on the last hop.

    Raises:
        Missing: the bundle has no such cut, or not the segment between two.
    """
    segments = bundle.partition(cuts)
    on = tuple(hops[min(i, len(hops) - 1)] for i in range(len(segments)))
    return Route(digest, bundle, segments, on, near=near_of(hops))


def near_of(hops: Sequence[Hop]) -> str:
    """The name of the hop before the link: the first of several. A single hop is behind it, or in this process."""
    return hops[0].name if len(hops) > 1 else ""
