"""Other routes of a model: only those that differ from the route in force."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import pytest

from isthmus.artifacts.segment_id import WHOLE
from isthmus.codecs import Encoding
from isthmus.pipeline import Hop, PhotoInput, Route, plan_route
from isthmus.routing.alternatives import alternative_routes
from isthmus.routing.selection import RouteCandidate
from support.bundles import PREPROCESS, Published
from support.bundles import photos as photos


@dataclass(frozen=True)
class NamedHop:
    """A hop that is never called."""

    name: str
    encodes: bool = True


EDGE, CLOUD, LOCAL = (cast(Hop, hop) for hop in (NamedHop("edge"), NamedHop("cloud"), NamedHop("local", False)))
HOPS = (EDGE, CLOUD)
SPLITS = {"cut:1", "cut:3", "cut:6"}


def names(photos: Published, hops: tuple[Hop, ...], selected: RouteCandidate) -> set[str]:
    return set(alternative_routes(photos.digest, photos.bundle, hops, selected))


def whole(photos: Published, hop: Hop) -> Route:
    return Route(photos.digest, photos.bundle, (photos.bundle.segment(WHOLE),), (hop,))


def test_a_raw_split_stands_beside_every_other_route(photos: Published) -> None:
    served = RouteCandidate(plan_route(photos.digest, photos.bundle, HOPS))
    assert names(photos, HOPS, served) == {"edge", "cloud", "photo"} | (SPLITS - {"cut:6"})


def test_an_encoded_split_stands_beside_the_same_split_raw(photos: Published) -> None:
    route = plan_route(photos.digest, photos.bundle, HOPS)
    served = RouteCandidate(replace(route, encodings=({}, {"p6": Encoding("half/1")})))
    found = alternative_routes(photos.digest, photos.bundle, HOPS, served)
    assert found.keys() == {"raw", "edge", "cloud", "photo"} | (SPLITS - {"cut:6"})
    assert found["raw"].route == route


@pytest.mark.parametrize(("hop", "name"), [(EDGE, "edge"), (CLOUD, "cloud")])
def test_the_whole_model_on_a_hop_is_not_its_own_alternative(photos: Published, hop: Hop, name: str) -> None:
    served = RouteCandidate(whole(photos, hop))
    assert names(photos, HOPS, served) == {"edge", "cloud", "photo"} - {name} | SPLITS


@pytest.mark.parametrize(("quality", "others"), [(0, {"edge", "cloud"}), (80, {"edge", "cloud", "photo"})])
def test_a_photo_to_the_cloud_stands_beside_the_cloud_with_tensors(
    photos: Published, quality: int, others: set[str]
) -> None:
    photo = PhotoInput("x", "float32", (1, 3, 8, 8), quality, PREPROCESS)
    served = RouteCandidate(whole(photos, CLOUD), photo)
    assert names(photos, HOPS, served) == others | SPLITS


def test_one_hop_has_no_splits(photos: Published) -> None:
    assert names(photos, (LOCAL,), RouteCandidate(whole(photos, LOCAL))) == set()
    assert names(photos, (CLOUD,), RouteCandidate(whole(photos, CLOUD))) == {"photo"}
