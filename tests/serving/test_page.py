"""The page of a router: off by default, for browsers alone, nothing of callers unescaped, one route beside another."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from isthmus.serving import create_router_app
from isthmus.serving.page import ASSETS
from support.bundles import (
    POSTPROCESS,
    PREPROCESS,
    Published,
    photo,
    photos_model,
    publish,
    publish_photos,
    ready,
    router_settings,
    served,
)
from support.bundles import photos as photos
from support.paths import ROOT
from support.routers import Chain, local_router, oip_json, photo_form
from support.routers import chain as chain

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(chain: Chain, photos: Published, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    settings = router_settings(photos, tmp_path_factory.mktemp("page"), chain.hops, page=True)
    return ready(create_router_app(settings).test_client())


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str, tag: str = "") -> list[str]:
        return [v for t, a in self.tags if (v := a.get(attribute)) is not None and tag in ("", t)]


def tags(answer: Any) -> Tags:
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert answer.mimetype == "text/html"
    return Tags(answer.get_data(as_text=True))


def test_a_router_has_no_page_unless_the_setting_allows_it(photos: Published, tmp_path: Path) -> None:
    client = local_router(photos, tmp_path)
    assert client.get("/", headers=BROWSER).status_code == 405
    for path in ("/docs", "/page/page.js", "/page/models", "/page/choices"):
        assert client.get(path, headers=BROWSER).status_code == 404
    assert client.post("/page/prediction", **photo_form(photo())).status_code == 404


@pytest.mark.parametrize("headers", [{}, {"Accept": "*/*"}, {"Accept": "application/json"}])
def test_other_clients_than_browsers_are_answered_as_without_a_page(
    photos: Published, tmp_path: Path, page: FlaskClient, headers: dict[str, str]
) -> None:
    without = local_router(photos, tmp_path).get("/", headers=headers)
    answer = page.get("/", headers=headers)
    assert (answer.status_code, answer.json) == (without.status_code, without.json) == (405, without.json)
    assert set(answer.headers["Allow"].split(", ")) == set(without.headers["Allow"].split(", "))


def test_a_router_without_a_page_loads_no_template_code(photos: Published, tmp_path: Path) -> None:
    script = f"""if True:
        import sys
        from isthmus.serving import create_router_app
        from isthmus.settings import RouterSettings
        create_router_app(RouterSettings(registry={str(photos.folder)!r}, cache_dir={str(tmp_path)!r}, model="photos",
                                         hops=("http://tail/",), log_level="error", page=PAGE))
        print([name for name in ("isthmus.serving.page", "isthmus.serving.openapi") if name in sys.modules])"""
    found = [
        subprocess.run(
            [sys.executable, "-c", script.replace("PAGE", str(on))], capture_output=True, text=True, check=True
        ).stdout.strip()
        for on in (False, True)
    ]
    assert found == ["[]", "['isthmus.serving.page', 'isthmus.serving.openapi']"]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_takes_nothing_from_elsewhere_and_has_no_inline_code(page: FlaskClient, path: str) -> None:
    answer = page.get(path, headers=BROWSER)
    found = tags(answer)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self' 'nonce-")
    assert "unsafe" not in policy
    nonce = re.search("'nonce-([^']+)'", policy)
    assert nonce
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert tag != "style"
        if tag == "script" and "src" not in attributes:
            assert attributes["nonce"] == nonce.group(1)
    linked = [*found.values("src"), *found.values("href"), *found.values("hx-get"), *found.values("hx-post")]
    relative = [link for link in linked if not link.startswith(("#", "data:"))]
    # Behind a gateway the page lies at /function/NAME/, so that a path from the root would miss the function.
    assert not [link for link in relative if link.startswith("/") or ":" in link]
    for link in relative:
        if link not in ("page/prediction",):
            assert page.get(f"/{link}".replace("/./", "/"), headers=BROWSER).status_code == 200, link


def test_the_nonce_differs_from_page_to_page(page: FlaskClient) -> None:
    first, second = (page.get("/", headers=BROWSER).headers["Content-Security-Policy"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("asset", ASSETS)
def test_assets_are_package_data_with_their_type(page: FlaskClient, asset: str) -> None:
    answer = page.get(f"/page/{asset}")
    assert (answer.status_code, answer.mimetype) == (200, ASSETS[asset])
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_vendored_files_are_those_that_are_listed_with_their_licences() -> None:
    folder = ROOT / "shared" / "isthmus" / "serving" / "static"
    rows = re.findall(
        r"^\| (\S+) \| .* ([\w.]+LICENSE) \| (\w{64}) \|$", (folder / "VENDORED.md").read_text(), re.MULTILINE
    )
    assert {name for name, _, _ in rows} == ASSETS.keys() - {"page.js", "page.css"}
    for name, licence, digest in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        assert (folder / licence).stat().st_size > 0


def test_no_template_switches_escaping_off() -> None:
    templates = sorted((ROOT / "shared" / "isthmus" / "serving" / "templates").iterdir())
    assert {path.suffix for path in templates} == {".html"}  # Flask escapes in these
    for path in templates:
        assert not re.search(r"\|\s*safe|autoescape|Markup", path.read_text()), path


@pytest.mark.parametrize("asset", ["page.py", "..%2fpage.py", "htmx.LICENSE", ""])
def test_no_other_file_is_an_asset(page: FlaskClient, asset: str) -> None:
    assert page.get(f"/page/{asset}").status_code == 404


def test_a_photo_gives_classes_bytes_and_a_bar_for_each_stage(page: FlaskClient) -> None:
    data = photo()
    expected = page.post("/", data=data).json
    found = tags(page.post("/page/prediction?model=photos", **photo_form(data)))
    for each in expected["classes"]:
        assert each["label"] in found.text
    assert f"{expected['route']['link_bytes']:,}" in found.text
    # The wait for a slot is the whole page's, and not of one of its results.
    bars = [s for s in expected["timings_ms"] if not s.endswith(("-run", "-pack")) and s != "queue"]
    assert len(found.values("aria-label", "svg")) == len(bars)
    assert all(0 <= float(width) <= 100 for width in found.values("width", "rect"))


def test_routes_to_compare_are_those_that_the_model_has(page: FlaskClient) -> None:
    found = tags(page.get("/page/choices"))
    options = found.values("value", "option")
    assert options[0] == "photos:1"
    assert {"edge", "cloud", "photo", "cut:1", "cut:3"} <= set(options)
    assert not {"raw", "cut:6"} & set(options)  # the served route is cut 6, raw


@pytest.mark.parametrize(
    ("route", "segments"),
    [
        ("edge", ["the whole model"]),
        ("cloud", ["the whole model"]),
        ("photo", ["the whole model"]),
        ("cut:1", ["..1", "1.."]),
    ],
)
def test_the_same_photo_goes_along_another_route_beside_it(page: FlaskClient, route: str, segments: list[str]) -> None:
    found = tags(page.post(f"/page/prediction?beside={route}", **photo_form(photo())))
    assert [tag for tag, _ in found.tags].count("article") == 2
    lines = re.findall(r"^(.*) on http", found.text, re.MULTILINE)
    assert lines == ["..6", "6..", *segments]


def test_without_its_codecs_the_same_cut_sends_more(chain: Chain, photos: Published, tmp_path: Path) -> None:
    settings = router_settings(photos, tmp_path, chain.hops, page=True, codec="half/1")
    client = ready(create_router_app(settings).test_client())
    options = tags(client.get("/page/choices")).values("value", "option")
    assert "raw" in options
    assert "cut:6" not in options  # the same as raw
    text = client.post("/page/prediction?beside=raw", **photo_form(photo())).get_data(as_text=True)
    coded, raw = (int(n.replace(",", "")) for n in re.findall(r'data-fact="link_bytes">([\d,]+)<', text))
    assert coded < raw


def test_a_batch_in_json_is_shown_with_the_errors_of_its_photos(page: FlaskClient) -> None:
    images = [base64.b64encode(data).decode() for data in (photo(), b"no photo")]
    found = tags(page.post("/page/prediction", data={"document": json.dumps({"images": images})}))
    assert "bytes over the link" in found.text
    assert "looks like text" in found.text


def test_another_version_of_the_model_stands_beside_it(tmp_path: Path) -> None:
    publish_photos(tmp_path / "first")
    newer = publish_photos(tmp_path / "second", seed=1, registry=tmp_path / "first" / "registry")
    client = local_router(newer, tmp_path, page=True)
    assert "photos:2" in tags(client.get("/page/choices")).values("value", "option")
    found = tags(client.post("/page/prediction?beside=photos:2", **photo_form(photo())))
    assert "photos:1" in found.text
    assert "photos:2" in found.text


def test_each_class_has_a_button_that_asks_why(page: FlaskClient) -> None:
    found = tags(page.post("/page/prediction?beside=cloud", **photo_form(photo())))
    posts = found.values("hx-post", "button")
    assert len(posts) == 6
    assert all(post.startswith("page/why?model=photos&route=") and "&class=" in post for post in posts)
    targets = found.values("hx-target", "button")
    assert {target.removeprefix("#") for target in targets} <= set(found.values("id", "div"))
    for post in (posts[0], posts[-1]):
        assert len(tags(page.post(f"/{post}", **photo_form(photo()))).values("x", "rect")) >= 16


def test_an_explanation_shows_the_cells_over_the_photo(page: FlaskClient) -> None:
    found = tags(page.post("/page/why?class=dog&grid=2", **photo_form(photo())))
    assert "dog" in found.text
    assert "9 parts hidden at the cut 6" in found.text
    assert [found.values(side, "rect") for side in ("x", "width")] == [["0.0000", "0.5000"] * 2, ["0.5000"] * 4]
    assert [name for name, _ in found.tags].count("img") == 1


def test_an_explanation_of_pasted_json_has_no_photo_beneath(page: FlaskClient, photos: Published) -> None:
    found = tags(page.post("/page/why", data={"document": json.dumps(oip_json(photos))}))
    assert "img" not in [name for name, _ in found.tags]
    answer = page.post("/page/prediction", data={"document": json.dumps(oip_json(photos))})
    assert tags(answer).values("hx-include", "button") == ["#json"]


def test_pasted_json_is_answered(page: FlaskClient, photos: Published) -> None:
    document = json.dumps(oip_json(photos))
    found = tags(page.post("/page/prediction", data={"document": document}))
    assert "logits FP32 [1, 5]" in found.text


@pytest.mark.parametrize(
    ("path", "arguments", "status"),
    [
        ("/page/prediction?beside=nowhere", photo_form(photo()), 404),
        ("/page/prediction?beside=other:1", photo_form(photo()), 404),
        ("/page/prediction?model=nobody", photo_form(photo()), 404),
        ("/page/prediction", {"data": b"document=%7B%7D"}, 400),
        ("/page/prediction", {"data": b"document="}, 400),
        ("/page/prediction", {"data": b"document=\xff"}, 400),
        ("/page/prediction", {"data": b"%PDF"}, 415),
        ("/page/why", {"data": b"%PDF"}, 415),
        ("/page/why?class=fox", photo_form(photo()), 400),
        ("/page/why?route=nowhere", photo_form(photo()), 404),
    ],
)
def test_a_request_that_cannot_be_served_is_an_error_as_json(
    page: FlaskClient, path: str, arguments: dict[str, Any], status: int
) -> None:
    answer = page.post(path, **arguments)
    assert (answer.status_code, answer.mimetype) == (status, "application/json")


def test_a_prediction_that_is_not_json_cannot_be_shown(page: FlaskClient, photos: Published) -> None:
    document = json.dumps({**oip_json(photos), "parameters": {"binary_data_output": True}})
    answer = page.post("/page/prediction", data={"document": document})
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed")


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    """A router of a model whose labels, alias and cuts hold markup as far as the registry lets them."""
    folder = tmp_path_factory.mktemp("evil")
    published = publish(
        folder,
        photos_model(folder / "photos.onnx"),
        {},
        partitions=[["6"]],
        preprocess=PREPROCESS,
        postprocess=POSTPROCESS,
        labels=[EVIL, "</li><script>alert(2)</script>", '" onmouseover="alert(3)', "{{ 7*7 }}", "'"],
    )
    return local_router(published, folder / "cache", page=True)


@pytest.mark.parametrize("path", ["/page/prediction", "/page/why?class=0&grid=2"])
def test_labels_are_text_and_never_markup(evil: FlaskClient, path: str) -> None:
    found = tags(evil.post(path, **photo_form(photo())))
    assert EVIL in found.text or "</li><script>alert(2)</script>" in found.text or "{{ 7*7 }}" in found.text
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert images == ([{"data-photo": None, "alt": ""}] if "why" in path else [])
    assert "script" not in {tag for tag, _ in found.tags}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]


def test_what_a_caller_names_is_never_markup(evil: FlaskClient) -> None:
    for path in (f"/page/choices?model={EVIL}", f"/page/models?x={EVIL}", f"/docs?{EVIL}", f"/?{EVIL}"):
        answer = evil.get(path, headers=BROWSER)
        assert answer.mimetype == "application/json" or EVIL not in answer.get_data(as_text=True)
    answer = evil.post(f"/page/prediction?beside={EVIL}", **photo_form(photo()))
    assert answer.mimetype == "application/json"  # the script shows it as text


def test_the_models_are_a_table_with_versions_aliases_and_segments(page: FlaskClient) -> None:
    found = tags(page.get("/page/models"))
    for text in ("photos", "prod = 1", "..6 then 6.."):
        assert text in found.text


def test_the_docs_show_every_call_and_every_body(page: FlaskClient) -> None:
    document = page.get("/openapi.json").json
    found = tags(page.get("/docs", headers=BROWSER))
    ids = found.values("id")
    assert {o["operationId"] for item in document["paths"].values() for o in item.values()} <= set(ids)
    assert {f"schema-{name}" for name in document["components"]["schemas"]} <= set(ids)
    assert {link[1:] for link in found.values("href") if link.startswith("#")} <= set(ids)


def test_the_script_reads_the_metrics_that_the_router_has(page: FlaskClient) -> None:
    script = page.get("/page/page.js").get_data(as_text=True)
    page.post("/", data=photo())
    text = page.get("/metrics").get_data(as_text=True)
    names = re.findall(r'name === "(\w+)"', script)
    assert len(names) == 5
    assert all(re.search(rf"^{name}[ {{]", text, re.MULTILINE) for name in names)
    endpoints = {rule.endpoint for rule in page.application.url_map.iter_rules()}
    pattern = re.search(r"const WORK = /\^\((.*)\)\$/", script)
    assert pattern
    assert set(pattern.group(1).split("|")) <= endpoints


def test_a_served_page_is_compressed_for_who_takes_it(page: FlaskClient) -> None:
    with served(page.application):
        answer = page.get("/page/htmx.min.js", headers={"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Encoding"] == "gzip"
