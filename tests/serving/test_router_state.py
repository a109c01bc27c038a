"""GET /routes: what callers may see of a router's routes, hops and queue."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from isthmus.routing.state import RouterState
from isthmus.serving import create_router_app
from support.bundles import Published, photo, ready, router_settings
from support.bundles import photos as photos
from support.routers import Chain, local_router
from support.routers import chain as chain


def read(data: bytes) -> RouterState:
    return msgspec.json.decode(data, type=RouterState, strict=True)


def test_the_state_has_the_hops_and_routes_of_the_latest_requests(chain: Chain) -> None:
    for _ in range(3):
        assert chain.client.post("/", data=photo()).status_code == 200
    response = chain.client.get("/routes")
    assert response.status_code == 200
    state = read(response.data)
    assert [hop.calls >= 3 for hop in state.hops] == [True, True]
    assert all(hop.rtt_s is not None and hop.breaker == "closed" for hop in state.hops)
    (model,) = state.models
    assert model.name == "photos"
    assert model.candidates[0].measured_s is not None
    assert state.limit >= 1


def test_urls_of_hops_and_other_models_are_details(photos: Published, tmp_path: Path, chain: Chain) -> None:
    for details in (False, True):
        settings = router_settings(photos, tmp_path, chain.hops, expose_details=details, model="photos")
        client = ready(create_router_app(settings).test_client())
        assert client.post("/", data=photo()).status_code == 200
        state = read(client.get("/routes").data)
        assert [hop.name for hop in state.hops] == (list(chain.hops) if details else ["hop0", "hop1"])


def test_a_router_without_requests_has_no_models(photos: Published, tmp_path: Path) -> None:
    state = read(local_router(photos, tmp_path).get("/routes").data)
    assert state.models == ()
    assert [hop.name for hop in state.hops] == ["local"]


@pytest.mark.parametrize("method", ["post", "put", "delete"])
def test_the_state_is_read_only(photos: Published, tmp_path: Path, method: str) -> None:
    assert getattr(local_router(photos, tmp_path), method)("/routes").status_code == 405
