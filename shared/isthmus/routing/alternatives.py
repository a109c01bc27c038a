"""Other routes of a model than the route in force, to compare one request side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import Missing
from isthmus.pipeline import Hop, Route, plan_route
from isthmus.pipeline.photos import photo_of, sends_photos
from isthmus.pipeline.route import near_hop
from isthmus.processing.image_spec import made_shape
from isthmus.routing.candidates import RouteCandidate

# Cuts in the list; a bundle may have hundreds, and a person compares a few.
MAX_CUTS = 12


def alternative_routes(
    digest: str, bundle: Bundle, hops: tuple[Hop, ...], selected: RouteCandidate
) -> dict[str, RouteCandidate]:
    """Routes other than `selected`, by name: `raw`, `edge`, `cloud`, `photo` and `cut:NAME`.

    `raw` is the selected route without codecs and exit, `edge` and `cloud` run the whole model on the first and the
    last hop, `photo` sends the photo unchanged, or redacted, to the last hop, `cut:NAME` divides the model there and
    sends raw tensors.
    """
    raw = selected.route.raw().full()
    others = (*_whole_routes(digest, bundle, hops), *_split_routes(digest, bundle, hops))
    different = {
        name: other
        for name, other in others
        if other.photo != selected.photo or (other.photo is None and _identity(other.route) != _identity(raw))
    }
    return ({"raw": RouteCandidate(raw)} if any(selected.route.encodings) or selected.route.exit else {}) | different


def _whole_routes(digest: str, bundle: Bundle, hops: tuple[Hop, ...]) -> Iterator[tuple[str, RouteCandidate]]:
    with suppress(Missing):  # a bundle need not have the whole model as a segment
        edge = Route(digest, bundle, (bundle.segment(WHOLE),), hops[:1], near=near_hop(hops))
        cloud = replace(edge, hops=hops[-1:])
        if len(hops) > 1:
            yield "edge", RouteCandidate(edge)
        yield "cloud", RouteCandidate(cloud)
        spec = bundle.preprocess
        shape = None if spec is None else made_shape(spec)
        if shape is not None and hops[-1].encodes and sends_photos(bundle):
            yield "photo", RouteCandidate(cloud, photo_of(bundle, shape))


def _split_routes(digest: str, bundle: Bundle, hops: tuple[Hop, ...]) -> Iterator[tuple[str, RouteCandidate]]:
    for cut in bundle.cut_list[:MAX_CUTS] if len(hops) > 1 else ():
        if bundle.has_segments((cut.name,)):
            yield f"cut:{cut.name}", RouteCandidate(plan_route(digest, bundle, hops, (cut.name,)))


def _identity(route: Route) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Equal for raw routes that are the same: bundle, segments and hops."""
    return route.digest, tuple(str(s.id) for s in route.segments), tuple(hop.name for hop in route.hops)
