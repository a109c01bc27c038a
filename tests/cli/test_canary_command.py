"""A canary begun, grown, finished and aborted, and what `isthmus canary` shows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from isthmus.artifacts.canary import CanaryRule
from isthmus.errors import AliasMoved, RegistryError
from isthmus.registry.versions import roll_back
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases.canary import CanaryEnd, CanaryRequest, begin_canary, end_canary
from support.bundles import Published, publish_photos, router_settings
from support.cli import document, isthmus, refusal
from support.routers import served_router


@pytest.fixture
def photos(tmp_path: Path) -> Published:
    """Two versions, of which prod means the first."""
    published = publish_photos(tmp_path)
    published.registry.publish(replace(published.bundle, source={"note": "2"}), {})
    return published


def begin(photos: Published, share: float, model: str = "photos:2") -> None:
    settings = RegistrySettings(registry=str(photos.folder))
    begin_canary(CanaryRequest(model=model, registry=settings, share=share, rule=CanaryRule(30)))


def ending(photos: Published, *, is_finished: bool, model: str = "photos") -> CanaryEnd:
    settings = RegistrySettings(registry=str(photos.folder))
    return CanaryEnd(model=model, registry=settings, is_finished=is_finished)


def test_a_canary_that_grows_goes_on_and_a_finished_one_is_what_the_alias_means(photos: Published) -> None:
    begin(photos, 0.1)
    first = photos.registry.alias("photos", "prod")
    begin(photos, 0.5)
    second = photos.registry.alias("photos", "prod")
    assert first.canary is not None
    assert second.canary == replace(first.canary, share=0.5)
    assert (second.number, second.counter) == ("1", first.counter + 1)
    assert first.canary.began == first.counter
    end_canary(ending(photos, is_finished=True))
    finished = photos.registry.alias("photos", "prod")
    assert (finished.number, finished.canary) == ("2", None)
    roll_back(photos.registry, "photos")
    assert photos.registry.alias("photos", "prod").number == "1"


def test_an_aborted_canary_leaves_the_alias_where_it_is(photos: Published) -> None:
    begin(photos, 0.1)
    end_canary(ending(photos, is_finished=False, model="photos:2"))
    present = photos.registry.alias("photos", "prod")
    assert (present.number, present.canary) == ("1", None)
    with pytest.raises(RegistryError, match="no canary"):
        end_canary(ending(photos, is_finished=True))


def test_a_canary_of_what_the_alias_means_or_of_a_moved_alias_is_refused(photos: Published) -> None:
    with pytest.raises(RegistryError, match="means photos:1 already"):
        begin(photos, 0.1, "photos:1")
    settings = RegistrySettings(registry=str(photos.folder))
    with pytest.raises(AliasMoved):
        begin_canary(CanaryRequest(model="photos:2", registry=settings, share=0.1, expected=7))
    begin(photos, 0.1)
    with pytest.raises(RegistryError, match="photos:2"):
        end_canary(ending(photos, is_finished=True, model="photos:1"))


def test_canary_shows_share_rule_and_the_requests_of_a_router(photos: Published, tmp_path: Path) -> None:
    result = isthmus("canary", "photos", "--registry", photos.folder)
    assert "no alias of photos has a canary" in result.stdout
    begin(photos, 0.25)
    with served_router(router_settings(photos, tmp_path / "router", ("local",), page=False)) as url:
        shown = document(isthmus("canary", "photos", "--url", url, "--registry", photos.folder, "--json"))
        text = isthmus("canary", "photos", "--url", url, "--registry", photos.folder).stdout
    assert shown["aliases"][0]["canary"]["share"] == 0.25
    assert [(t["alias"], t["canary"]["version"]) for t in shown["trials"]] == [("prod", "2")]
    assert "25% of its callers get photos:2" in text
    assert "rolled back by the rule requests=30,errors=2%,disagreement=10%,latency=2,confidence=99.9%" in text
    assert refusal(isthmus("canary", "phots", "--registry", photos.folder, "--json"))["type"] == "Missing"
    assert "isthmus promote photos --as prod --finish" in text


def test_promote_begins_grows_finishes_and_aborts_a_canary(photos: Published) -> None:
    def promote(*arguments: str) -> Any:
        return document(isthmus("promote", *arguments, "--registry", photos.folder, "--json"))

    begun = promote("photos:2", "--canary", "10%", "--rule", "errors=5%,requests=200")
    assert (begun["version"], begun["canary"]["version"], begun["canary"]["share"]) == (1, 2, 0.1)
    assert (begun["canary"]["rule"]["max_errors"], begun["canary"]["rule"]["min_requests"]) == (0.05, 200)
    assert begun["next"] == f"isthmus promote photos --as prod --abort --registry {photos.folder}"
    place = ("--registry", photos.folder)
    listed = document(isthmus("versions", "photos", *place, "--json"))["aliases"]["prod"]
    assert [move["canary"] for move in listed[:2]] == [{"version": "2", "share": 0.1}, None]
    assert "prod (canary, 10%)" in isthmus("versions", "photos", *place).stdout
    grown = promote("photos", "2", "--canary", "0.5")
    assert (grown["canary"]["share"], grown["canary"]["began"]) == (0.5, begun["counter"])
    assert promote("photos", "--abort")["canary"] is None
    text = isthmus("promote", "photos:2", "--canary", "10%", "--registry", photos.folder).stdout
    assert "prod means photos:1 for 90% of its callers, and photos:2 for the others" in text
    assert "for 99.6% of its callers" in isthmus("promote", "photos:2", "--canary", "0.4%", *place).stdout
    finished = promote("photos", "--as", "prod", "--finish")
    assert (finished["version"], finished["alias_was"], finished["canary"]) == (2, "1", None)


@pytest.mark.parametrize(
    "arguments",
    [["--finish", "--abort"], ["--canary", "10%", "--finish"], ["--rule", "errors=5%"], ["--canary", "all"]],
)
def test_promote_refuses_options_of_a_canary_that_contradict_each_other(
    photos: Published, arguments: list[str]
) -> None:
    result = isthmus("promote", "photos:2", *arguments, "--registry", photos.folder)
    assert result.exit_code == 1, result.output
    assert photos.registry.alias("photos", "prod").canary is None
