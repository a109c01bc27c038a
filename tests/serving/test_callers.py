"""Who gets in: keys, roles for models, rates, and what a function without callers makes of where requests come from."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient

from isthmus import Client
from isthmus.errors import CallerUnauthenticated
from isthmus.security.caller_keys import CallerEntry, key_digest, new_key
from isthmus.security.callers import Role
from isthmus.serving import create_router_app, create_segment_app, create_trigger_app
from isthmus.serving.route_roles import ROUTER, SEGMENT, TRAINING, TRIGGER
from isthmus.serving.training import create_training_app
from support.bundles import Published, framed, metrics, photo, ready, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.cli import document, isthmus, refusal
from support.paths import ROOT
from support.trigger_apps import trigger_settings

KEYS = {name: new_key() for name in ("ann", "bob", "other", "prom", "admin", "slow", "heavy")}


def entry(name: str, roles: Mapping[str, list[str]], **rates: Any) -> str:
    document = CallerEntry(
        name=name, key=key_digest(KEYS[name]), roles={Role(role): models for role, models in roles.items()}, **rates
    )
    return msgspec.json.encode(document).decode()


LINES = [
    entry("ann", {"infer": ["photos"]}),
    entry("bob", {"infer": ["*"], "pin": ["photos"]}),
    entry("other", {"infer": ["tabular"]}),
    entry("prom", {"metrics": ["*"]}),
    entry("admin", {"administer": ["*"]}),
    entry("slow", {"infer": ["*"]}, requests_per_s=0.5, burst_s=4.0),
    entry("heavy", {"infer": ["*"]}, bytes_per_s=100, burst_s=1.0),
]


def secrets_in(folder: Path, lines: list[str] = LINES) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "callers").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def router(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    """A router with callers, a page, and details shown."""
    folder = tmp_path_factory.mktemp("router")
    settings = router_settings(photos, folder, ["local"], page=True, secrets_dir=secrets_in(folder / "secrets"))
    return ready(create_router_app(settings).test_client())


@pytest.fixture(scope="module")
def without(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    """A router without callers."""
    return ready(create_router_app(router_settings(photos, tmp_path_factory.mktemp("w"), ["local"])).test_client())


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def test_every_route_of_every_function_has_a_row_and_every_row_a_route(
    photos: Published, tmp_path: Path, router: FlaskClient
) -> None:
    segment = create_segment_app(segment_settings(photos, tmp_path / "s"))
    trigger = create_trigger_app(trigger_settings("trigger.toml"), tmp_path)
    training = create_training_app(segment_settings(photos, tmp_path / "t"), lambda frame, context: frame)
    for app, table in (
        (router.application, ROUTER),
        (segment, SEGMENT),
        (trigger, TRIGGER),
        (training, TRAINING),
    ):
        endpoints = {rule.endpoint for rule in app.url_map.iter_rules()}
        assert endpoints == set(table), app.name
    assert {name for name, need in ROUTER.items() if need.is_open} == {"ready", "live", "server_ready", "page_asset"}


def test_every_route_but_the_open_ones_refuses_a_stranger(router: FlaskClient) -> None:
    tried = 0
    for rule in router.application.url_map.iter_rules():
        method = "POST" if "POST" in (rule.methods or ()) else "GET"
        path = rule.rule.replace("<name>", "photos").replace("<version>", "1").replace("<asset>", "page.css")
        response = router.open(path, method=method)
        if ROUTER[rule.endpoint].is_open:
            assert response.status_code == 200, path
            continue
        tried += 1
        assert response.status_code == 401, path
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="isthmus"'
        assert "reason" in response.get_data(as_text=True)
    assert tried > 20
    assert router.get("/nowhere").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEYS['ann']}"},
        {"Authorization": f"bearer  {KEYS['ann']} "},
        {"X-API-Key": KEYS["ann"]},
        {"X-API-Key": KEYS["ann"], "Authorization": "Bearer of-another-proxy"},
        {"Authorization": "Basic " + base64.b64encode(f"anybody:{KEYS['ann']}".encode()).decode()},
    ],
)
def test_a_key_gets_in_by_each_header(router: FlaskClient, headers: dict[str, str]) -> None:
    assert router.post("/", data=photo(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "missing"),
        ({"Authorization": "Bearer "}, "missing"),
        ({"Authorization": "Digest x"}, "missing"),
        ({"Authorization": "Basic %%%"}, "missing"),
        ({"Authorization": "Bearer isthmus_" + "A" * 43}, "unknown"),
        ({"Authorization": f"Bearer {KEYS['ann'][:-1]}"}, "unknown"),
        ({"Authorization": f"Bearer {KEYS['ann']}x"}, "unknown"),
        ({"Authorization": f"Bearer {KEYS['ann'].upper()}"}, "unknown"),
        ({"Authorization": f"Bearer {key_digest(KEYS['ann'])}"}, "unknown"),
        ({"Authorization": f"Bearer {KEYS['ann']} {KEYS['ann']}"}, "malformed"),
        ({"Authorization": "Bearer \xff\xfe"}, "malformed"),
        ({"Authorization": "Bearer " + "x" * 20_000}, "malformed"),
        ({"X-API-Key": "wrong", "Authorization": f"Bearer {KEYS['ann']}"}, "unknown"),
        ({"Authorization": "Bearer eyJhbGciOiJub25lIn0.e30."}, "unknown"),
    ],
)
def test_other_credentials_are_refused_with_the_reason(
    router: FlaskClient, headers: dict[str, str], reason: str
) -> None:
    response = router.post("/", data=photo(), headers=headers)
    assert response.status_code == 401
    assert response.json is not None
    assert (response.json["type"], response.json["facts"]["reason"]) == ("CallerUnauthenticated", reason)
    assert KEYS["ann"][:12] not in response.get_data(as_text=True)


def test_a_browser_is_asked_for_the_key_and_a_foreign_page_does_not_get_it_sent(router: FlaskClient) -> None:
    asked = router.get("/", headers={"Accept": "text/html,*/*"})
    assert asked.status_code == 401
    assert any(value.startswith("Basic ") for value in asked.headers.getlist("WWW-Authenticate"))
    basic = {"Authorization": "Basic " + base64.b64encode(f"x:{KEYS['ann']}".encode()).decode()}
    assert router.get("/", headers={"Accept": "text/html", **basic}).status_code == 200
    foreign = {"Sec-Fetch-Site": "cross-site", **basic}
    assert router.post("/page/prediction", data=photo(), headers=foreign).status_code == 401


@pytest.mark.parametrize(
    ("name", "method", "path", "status"),
    [
        ("ann", "POST", "/", 200),
        ("ann", "POST", "/?model=photos:1", 200),
        ("ann", "GET", "/v2/models/photos", 200),
        ("ann", "GET", "/v2/models/tabular", 403),
        ("ann", "POST", "/?model=tabular", 403),
        ("ann", "GET", "/metrics", 403),
        ("ann", "GET", "/routes", 403),
        ("other", "POST", "/", 403),
        ("other", "GET", "/v2/models/photos/ready", 403),
        ("prom", "GET", "/metrics", 200),
        ("prom", "GET", "/routes", 200),
        ("prom", "POST", "/", 403),
        ("admin", "POST", "/", 200),
        ("admin", "GET", "/metrics", 200),
        ("admin", "GET", "/nowhere", 404),
    ],
)
def test_roles_are_for_routes_and_models(router: FlaskClient, name: str, method: str, path: str, status: int) -> None:
    response = router.open(path, method=method, data=photo() if method == "POST" else None, headers=bearer(name))
    assert response.status_code == status, response.get_data(as_text=True)


def test_a_model_in_the_body_is_held_against_the_role_too(router: FlaskClient) -> None:
    body = {"model": "tabular", "messages": [{"role": "user", "content": "x"}]}
    response = router.post("/v1/chat/completions", json=body, headers=bearer("ann"))
    assert response.status_code == 403
    assert response.json is not None
    assert response.json["error"]["code"] == "caller_forbidden"
    missing = router.post("/v1/chat/completions", json=body)
    assert missing.json is not None
    assert (missing.status_code, missing.json["error"]["code"]) == (401, "invalid_api_key")


def test_lists_show_the_models_that_a_caller_may_use(router: FlaskClient) -> None:
    def names(name: str) -> list[str]:
        response = router.get("/v2/models", headers=bearer(name))
        assert response.json is not None
        return [model["name"] for model in response.json["models"]]

    assert (names("ann"), names("other")) == (["photos"], [])
    assert router.post("/v2/repository/index", headers=bearer("other")).json == []


def test_a_pinned_route_takes_the_role_for_it(router: FlaskClient) -> None:
    # No such route: whoever may pin is told so.
    for name, status in (("ann", 403), ("bob", 400), ("admin", 400)):
        response = router.post("/", data=photo(), headers={"Isthmus-Route": "nowhere", **bearer(name)})
        assert response.status_code == status, name
    page = router.post("/page/prediction?beside=raw", data=photo(), headers=bearer("ann"))
    assert page.status_code == 403


def test_a_caller_beyond_its_rate_waits_alone(router: FlaskClient) -> None:
    first, second, third = (router.get("/v2", headers=bearer("slow")) for _ in range(3))
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    assert first.headers["RateLimit-Policy"] == '"requests";q=2;w=4'
    assert first.headers["RateLimit"] == '"requests";r=1;t=2'
    assert third.json is not None
    assert third.json["type"] == "CallerLimited"
    assert int(third.headers["Retry-After"]) == third.json["facts"]["retry_after_s"] == 2
    assert router.get("/v2", headers=bearer("ann")).status_code == 200
    # A body beyond a whole burst is taken once, and waited for afterwards.
    big = photo((64, 64))
    assert router.post("/", data=big, headers=bearer("heavy")).status_code == 200
    limited = router.post("/", data=big, headers=bearer("heavy"))
    assert limited.status_code == 429
    assert int(limited.headers["Retry-After"]) > 10


def test_the_caller_is_in_the_log_the_metrics_and_nowhere_its_key(
    photos: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = router_settings(
        photos, tmp_path, ["local"], secrets_dir=secrets_in(tmp_path / "secrets"), log_level="debug"
    )
    client = ready(create_router_app(settings).test_client())
    with caplog.at_level(logging.DEBUG, "isthmus"):
        client.post("/", data=photo(), headers=bearer("ann"))
        client.post("/", data=photo(), headers={"X-API-Key": "isthmus_unknown"})
    lines = [record.__dict__["facts"] for record in caplog.records if record.getMessage() == "request"]
    assert [line.get("caller") for line in lines if line.get("endpoint") == "answer"] == ["ann"]
    everything = "".join(f"{record.getMessage()} {record.__dict__.get('facts')}" for record in caplog.records)
    assert KEYS["ann"] not in everything
    assert "isthmus_unknown" not in everything
    text = client.get("/metrics", headers=bearer("prom")).get_data(as_text=True)
    assert 'isthmus_caller_requests_total{caller="ann",outcome="served"} 1.0' in text
    assert 'isthmus_caller_requests_total{caller="none",outcome="refused"} 1.0' in text


def test_a_key_that_is_taken_from_the_secret_is_refused_without_a_restart(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.security.caller_keys._LOOK_S", 0.0)
    folder = tmp_path / "secrets"
    settings = router_settings(photos, tmp_path, ["local"], secrets_dir=secrets_in(folder))
    client = create_router_app(settings).test_client()
    assert client.get("/v2", headers=bearer("ann")).status_code == 200
    secrets_in(folder, LINES[1:])
    assert client.get("/v2", headers=bearer("ann")).status_code == 401
    assert client.get("/v2", headers=bearer("bob")).status_code == 200
    (folder / "callers").write_text("{ a line that is no entry\n")
    assert client.get("/v2", headers=bearer("bob")).status_code == 200
    (folder / "callers").unlink()
    assert client.get("/v2", headers=bearer("bob")).status_code == 401


@pytest.mark.parametrize(
    "strange",
    [
        {"Host": "models.example.com"},
        {"Host": "192.168.1.7:8080"},
        {"Host": "localhost.example.com"},
        {"Host": "127.0.0.1@example.com"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"X-Forwarded-For": "10.42.0.9:4711"},
        {"X-Forwarded-For": "127.0.0.1, 203.0.113.9"},
        {"X-Forwarded-Host": "gateway.example.com"},
        {"X-Real-IP": "203.0.113.9"},
        {"Forwarded": "for=203.0.113.9"},
        {"Via": "1.1 proxy"},
    ],
)
def test_without_callers_a_request_over_another_host_is_refused(without: FlaskClient, strange: dict[str, str]) -> None:
    response = without.post("/", data=photo(), headers=strange)
    assert response.status_code == 401
    assert response.json is not None
    assert response.json["facts"]["reason"] == "not_configured"
    assert "isthmus caller new" in response.json["hint"]
    assert without.get("/ready", headers=strange).status_code == 200


@pytest.mark.parametrize(
    "near",
    [
        {},
        {"Host": "127.0.0.1:8080"},
        {"Host": "[::1]:8080"},
        {"Origin": "http://localhost:8080"},
        {"X-Forwarded-For": "127.0.0.1:4711", "X-Forwarded-Host": "127.0.0.1:8080"},
        {"X-Forwarded-For": "::1"},
        # OpenAI's clients send some key in any case.
        {"Authorization": "Bearer unused"},
    ],
)
def test_without_callers_this_machine_gets_in(without: FlaskClient, near: dict[str, str]) -> None:
    assert without.post("/", data=photo(), headers=near).status_code == 200


def test_another_machine_is_refused_by_its_address(without: FlaskClient) -> None:
    assert without.post("/", data=photo(), environ_base={"REMOTE_ADDR": "10.0.0.9"}).status_code == 401
    assert without.post("/", data=photo(), environ_base={"REMOTE_ADDR": "::ffff:127.0.0.1"}).status_code == 200


def test_behind_a_watchdog_nobody_gets_in_without_callers_whatever_a_request_says(
    photos: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = router_settings(photos, tmp_path, ["local"], fprocess="python index.py", log_level="warning")
    client = ready(create_router_app(settings).test_client())
    assert client.post("/", data=photo(), headers={"X-Forwarded-For": "127.0.0.1"}).status_code == 401
    assert any("no callers are configured" in record.getMessage() for record in caplog.records)


def test_access_anyone_opens_a_function_with_a_warning(
    photos: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = router_settings(photos, tmp_path, ["local"], fprocess="x", access="anyone", log_level="warning")
    client = ready(create_router_app(settings).test_client())
    assert client.post("/", data=photo(), headers={"Host": "models.example.com"}).status_code == 200
    assert any("whoever reaches this function" in record.getMessage() for record in caplog.records)


def test_with_callers_access_anyone_takes_requests_without_a_key_and_none_with_a_wrong_one(
    photos: Published, tmp_path: Path
) -> None:
    settings = router_settings(
        photos, tmp_path, ["local"], access="anyone", secrets_dir=secrets_in(tmp_path / "secrets")
    )
    client = create_router_app(settings).test_client()
    assert client.get("/v2").status_code == 200
    assert client.get("/v2", headers={"X-API-Key": "wrong"}).status_code == 401


@pytest.fixture
def tail(photos: Published, tmp_path: Path) -> FlaskClient:
    """A segment function with keys of hops and with callers."""
    folder = tmp_path / "secrets"
    secrets_in(
        folder,
        [
            *LINES,
            entry("admin", {"profile": ["*"]})
            .replace('"admin"', '"profiler"')
            .replace(key_digest(KEYS["admin"]), key_digest("isthmus_profiler")),
        ],
    )
    (folder / "hop-keys").write_text("k1:" + base64.b64encode(bytes(32)).decode())
    settings = segment_settings(photos, tmp_path, secrets_dir=str(folder))
    return ready(create_segment_app(settings).test_client())


def test_a_segment_function_takes_calls_by_hop_keys_and_the_rest_by_roles(tail: FlaskClient, photos: Published) -> None:
    refused = tail.post("/", data=framed(photos), headers=bearer("admin"))
    assert refused.json is not None
    assert (refused.status_code, refused.json["type"]) == (401, "CallerUnknown")
    assert tail.get("/metrics").status_code == 401
    assert tail.get("/metrics", headers=bearer("prom")).status_code == 200
    assert tail.post("/profile").status_code == 403
    assert tail.post("/profile", headers=bearer("prom")).status_code == 403
    assert tail.post("/profile", headers={"X-API-Key": "isthmus_profiler"}).status_code == 200


def test_a_segment_function_without_keys_takes_calls_of_its_own_machine_alone(
    photos: Published, tmp_path: Path
) -> None:
    client = ready(create_segment_app(segment_settings(photos, tmp_path)).test_client())
    assert client.post("/", data=framed(photos)).status_code == 200
    refused = client.post("/", data=framed(photos), headers={"X-Forwarded-For": "10.1.1.1"})
    assert refused.status_code == 401


def test_a_route_that_nobody_gave_a_row_lets_nobody_in(without: FlaskClient) -> None:
    app = without.application
    app._got_first_request = False
    app.add_url_rule("/forgotten", "forgotten", lambda: "open", methods=["GET"])
    assert without.get("/forgotten").status_code == 403


def test_over_real_http_a_stranger_gets_401_and_nothing_runs(photos: Published, tmp_path: Path) -> None:
    settings = router_settings(photos, tmp_path, ["local"], secrets_dir=secrets_in(tmp_path / "secrets"))
    app = create_router_app(settings)
    ready(app.test_client())
    with served(app) as url:
        with pytest.raises(CallerUnauthenticated) as caught:
            Client(url).photo(photo())
        assert caught.value.facts["reason"] == "missing"
    counted = {
        name: value for (name, labels), value in metrics_of(app.test_client()).items() if name.startswith("isthmus_run")
    }
    assert sum(counted.values()) == 0


def metrics_of(client: FlaskClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    client.environ_base["HTTP_X_API_KEY"] = KEYS["prom"]
    return metrics(client)


def test_clients_and_commands_send_a_key_from_the_environment_or_a_file_and_never_quote_it(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = router_settings(photos, tmp_path, ["local"], secrets_dir=secrets_in(tmp_path / "secrets"))
    app = create_router_app(settings)
    ready(app.test_client())
    (tmp_path / "cat.png").write_bytes(photo())
    (tmp_path / "key").write_text(KEYS["ann"] + "\n")
    (tmp_path / "prom").write_text(KEYS["prom"])
    (tmp_path / "broken").write_text(KEYS["ann"][:20] + "\n" + KEYS["ann"][20:])
    with served(app) as url:
        assert Client(url, api_key=KEYS["ann"]).photo(photo())["model_name"] == "photos"
        command = ("infer", tmp_path / "cat.png", "--url", url, "--registry", photos.folder, "--json")
        assert document(isthmus(*command, "--api-key", tmp_path / "key"))[0]["model_name"] == "photos"
        assert refusal(isthmus(*command))["type"] == "CallerUnauthenticated"
        broken = refusal(isthmus(*command, "--api-key", tmp_path / "broken"))
        assert broken["type"] == "SettingsError"
        assert KEYS["ann"][:20] not in str(broken)
        look = ("canary", "photos", "--url", url, "--registry", photos.folder, "--json")
        assert document(isthmus(*look, "--api-key", tmp_path / "prom")) == {"aliases": [], "trials": []}
        assert refusal(isthmus(*look))["type"] == "CallerUnauthenticated"
        monkeypatch.setenv("ISTHMUS_API_KEY", KEYS["prom"])
        assert document(isthmus("top", "--url", url, "--json"))["working"] == 0
        assert refusal(isthmus(*command))["type"] == "CallerForbidden"


def test_doctor_names_a_function_that_is_open_to_anyone(tmp_path: Path) -> None:
    text = (ROOT / "stack.yml").read_text().replace("    environment:\n", "    environment:\n      access: anyone\n", 1)
    (tmp_path / "stack.yml").write_text(text)
    result = isthmus("doctor", "--stack", tmp_path / "stack.yml", "--registry", tmp_path, "--json")
    findings = json.loads(result.stdout)["findings"]
    assert any("access=anyone opens router" in finding["found"] for finding in findings)
