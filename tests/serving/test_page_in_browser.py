"""The page in Chromium: photos, JSON, a second route, errors and rates; light and dark, on a phone; behind a prefix."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.wrappers import Response

from isthmus.serving import create_router_app
from support.browser import api
from support.browser import browser as browser
from support.bundles import (
    POSTPROCESS,
    PREPROCESS,
    Published,
    photo,
    photos_model,
    publish,
    ready,
    router_settings,
    served,
)
from support.bundles import photos as photos
from support.patience import LONG_S
from support.routers import Chain, oip_json
from support.routers import chain as chain

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
# A label that would run where a template or script forgot to escape.
EVIL = "<img src=x onerror=\"document.title='run'\">"


def behind_a_prefix(app: Any) -> Any:
    """The app as a gateway serves it, at /function/router with or without a slash."""

    def function(environ: dict[str, Any], start_response: Any) -> Any:
        return app({**environ, "PATH_INFO": environ["PATH_INFO"] or "/"}, start_response)

    return DispatcherMiddleware(Response("nothing here", 404), {"/function/router": function})


@pytest.fixture(scope="module")
def url(chain: Chain, photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = router_settings(photos, tmp_path_factory.mktemp("page"), chain.hops, page=True)
    app = create_router_app(settings)
    ready(app.test_client())
    with served(behind_a_prefix(app)) as root:
        yield f"{root}/function/router"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    path.write_bytes(photo((64, 48)))
    return path


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    yield from opened(browser, url)


def opened(browser: Any, url: str, **context: Any) -> Iterator[Any]:
    """The page, ready to send; afterwards nothing may have failed in its console."""
    session = browser.new_context(**{"viewport": DESK} | context)
    page = session.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.wait_for_selector("select[name=beside]")
    yield page
    session.close()
    # The browser and htmx report a refused request.
    reports = ("Failed to load resource", "Response Status Error")
    assert [text for text in complaints if not text.startswith(reports)] == []


def send(page: Any, picture: Path) -> None:
    page.set_input_files("#file", str(picture))
    page.click("#photo button")
    page.wait_for_selector("#result article")


def test_a_path_without_a_slash_leads_to_the_page(page: Any) -> None:
    assert page.url.endswith("/function/router/")


def test_a_photo_shows_classes_bytes_and_stages(page: Any, picture: Path) -> None:
    send(page, picture)
    assert page.locator(".classes li").count() == 3
    assert page.locator("[data-fact=link_bytes]").inner_text().replace(",", "").isdigit()
    bars = page.locator(".stages svg").all()
    assert len(bars) >= 3
    assert all(bar.bounding_box()["width"] > 20 for bar in bars)
    assert page.locator("#preview").evaluate("image => image.naturalWidth") == 64


def test_a_dropped_photo_is_sent_at_once(page: Any, picture: Path) -> None:
    data = page.evaluate_handle(
        """bytes => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "noise.png", { type: "image/png" })); return data; }""",
        list(picture.read_bytes()),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    page.wait_for_selector("#result article")
    assert page.locator("#drop span").inner_text() == "noise.png"


def test_another_route_stands_beside_the_first(page: Any, picture: Path) -> None:
    page.select_option("select[name=beside]", "cloud")
    send(page, picture)
    titles = page.locator("#result h3").all_inner_texts()
    assert titles == ["the served route", "whole model in the cloud"]
    left, right = (article.bounding_box() for article in page.locator("#result article").all())
    assert right["x"] > left["x"] + left["width"] - 1


def test_why_lays_a_heat_map_over_the_photo(page: Any, picture: Path, tmp_path: Path) -> None:
    send(page, picture)
    page.locator("button.why").nth(1).click()
    page.wait_for_selector(".heat rect")
    image, cells = (page.locator(f".overlay {tag}").bounding_box() for tag in ("img", "svg"))
    assert image == cells
    assert page.locator(".overlay img").evaluate("image => image.naturalWidth") == 64
    name = page.locator(".classes li span").nth(1).inner_text()
    assert page.locator(".heat figcaption").inner_text().startswith(f"{name}, ")
    # Another photo is another request.
    (tmp_path / "other.png").write_bytes(photo((8, 8)))
    page.set_input_files("#file", str(tmp_path / "other.png"))
    api.expect(page.locator("button.why").first).to_be_disabled()


def test_why_of_another_route_and_of_pasted_json(page: Any, picture: Path, photos: Published) -> None:
    page.select_option("select[name=beside]", "cloud")
    send(page, picture)
    page.locator("article").nth(1).locator("button.why").first.click()
    page.wait_for_selector("article:nth-child(2) .heat")
    assert "hidden at the input" in page.locator("article").nth(1).inner_text()
    page.click("summary:has-text('JSON')")
    page.fill("#document", json.dumps(oip_json(photos)))
    page.click("#json button")
    page.wait_for_selector("#result .outputs")
    page.click("button.why")
    page.wait_for_selector(".heat .bare rect")
    assert page.locator(".overlay svg").bounding_box()["height"] > 100


def test_pasted_json_is_answered(page: Any, photos: Published) -> None:
    page.click("summary:has-text('JSON')")
    page.fill("#document", json.dumps(oip_json(photos)))
    page.click("#json button")
    page.wait_for_selector("#result .outputs")
    assert "logits FP32" in page.locator(".outputs").inner_text()


def test_an_error_is_shown_as_text(page: Any) -> None:
    page.click("summary:has-text('JSON')")
    # The router repeats the first 20 characters.
    page.fill("#document", json.dumps({"image": base64.b64encode(photo()).decode(), "top_k": "<img src=x>"}))
    page.click("#json button")
    page.wait_for_selector("#message:not([hidden])")
    assert page.locator("#message").inner_text().startswith("400: top_k is '<img src=x>'")
    assert page.locator("#message *").count() == 0
    assert page.title() == "Isthmus"


def test_models_and_rates_are_live(page: Any, picture: Path) -> None:
    page.wait_for_selector("text=prod = 1")
    send(page, picture)
    api.expect(page.locator("[data-rate=requests]")).not_to_have_text("–", timeout=LONG_S * 1000)
    assert page.locator("#chart canvas").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_fits_and_follows_the_scheme(
    browser: Any, url: str, picture: Path, tmp_path: Path, scheme: str, size: dict[str, int]
) -> None:
    for page in opened(browser, url, viewport=size, color_scheme=scheme):
        page.select_option("select[name=beside]", "photo")
        send(page, picture)
        page.locator("button.why").first.click()
        page.wait_for_selector(".heat rect")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) / 3
        assert brightness > 200 if scheme == "light" else brightness < 60
        # Pictures to look at, where a folder is given for them.
        folder = Path(os.environ.get("ISTHMUS_PICTURES") or tmp_path)
        picture_file = folder / f"page-{scheme}-{size['width']}.png"
        page.screenshot(path=str(picture_file), full_page=True)
        assert picture_file.stat().st_size > 10_000


def test_the_rates_stand_below_the_request_however_long_the_result_is(page: Any, picture: Path) -> None:
    send(page, picture)
    page.click("#result details summary")
    names = ("#request", "#result", "section:has(#rates)", "#models")
    request, result, rates, models = (page.locator(name).bounding_box() for name in names)
    assert rates["x"] == request["x"]
    assert rates["y"] - (request["y"] + request["height"]) < 40
    assert models["y"] >= max(result["y"] + result["height"], rates["y"] + rates["height"])


def test_the_docs_open_in_the_browser(browser: Any, url: str) -> None:
    page = browser.new_page()
    page.goto(f"{url}/docs")
    page.click("#answer summary")
    assert page.locator("#answer").get_by_text("application/json").first.is_visible()
    page.click("#answer >> text=PredictionBody")
    assert page.url.endswith("#schema-PredictionBody")
    page.close()


def test_markup_in_labels_does_not_run(browser: Any, picture: Path, tmp_path: Path) -> None:
    labels = [EVIL, "<script>document.title='run'</script>", "a", "b", "c"]
    published = publish(
        tmp_path,
        photos_model(tmp_path / "photos.onnx"),
        {},
        partitions=[["6"]],
        preprocess=PREPROCESS,
        postprocess={**POSTPROCESS, "top_k": 5},
        labels=labels,
    )
    app = create_router_app(router_settings(published, tmp_path / "cache", ("local",), page=True))
    ready(app.test_client())
    with served(behind_a_prefix(app)) as root:
        for page in opened(browser, f"{root}/function/router/"):
            send(page, picture)
            assert EVIL in page.locator(".classes").inner_text()
            assert page.locator("#result img, #result script").count() == 0
            assert page.title() == "Isthmus"
