"""/openapi.json: valid OpenAPI 3.1, complete in routes and statuses, and true of what the router answers."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from werkzeug.routing import Map, Rule

from isthmus.errors import HTTP_STATUS
from isthmus.pipeline.continuation import CONTENT_TYPE as CONTINUATION
from isthmus.serving.openapi import OPERATIONS, openapi_document
from support.bundles import Published, photo
from support.bundles import photos as photos
from support.paths import ROOT
from support.routers import INFER, local_router, oip_json
from support.routers import cut_off as cut_off


@pytest.fixture(scope="module")
def router(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    return local_router(photos, tmp_path_factory.mktemp("router"), page=True)


@pytest.fixture(scope="module")
def document(router: FlaskClient) -> Any:
    return router.get("/openapi.json").json


def test_the_document_is_valid_openapi(document: Any) -> None:
    assert document["openapi"] == "3.1.0"
    validate(document)


def test_every_route_of_the_app_is_described(router: FlaskClient, document: Any) -> None:
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    served = {
        (re.sub("<(?:[a-z]+:)?([a-z]+)>", r"{\1}", rule.rule), method.lower())
        for rule in router.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert described == served
    assert {operation["operationId"] for item in document["paths"].values() for operation in item.values()} == set(
        OPERATIONS
    )


def test_a_route_without_a_description_is_refused() -> None:
    with pytest.raises(KeyError, match="undescribed"):
        openapi_document(Map([Rule("/new", endpoint="undescribed", methods=["GET"])]))


def test_every_error_that_a_router_answers_with_is_described_with_its_status(document: Any) -> None:
    table = (ROOT / "docs" / "reference" / "api.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) == len(HTTP_STATUS)
    expected = {(status, name) for status, name, meaning in rows if not re.search("only(:|$)", meaning)}
    described = {
        (status, name)
        for item in document["paths"].values()
        for operation in item.values()
        for status, response in operation["responses"].items()
        if status != "200"
        for name in response["description"].split(", ")
    }
    assert described == expected | {("500", "InternalError")}


def call(client: FlaskClient, cut_off: FlaskClient, endpoint: str, photos: Published) -> Any:
    rest = cut_off.post("/", data=photo(), headers={"Accept": CONTINUATION}).data
    tensors = {"json": oip_json(photos)}
    calls: dict[str, tuple[str, str, dict[str, Any]]] = {
        "answer": ("POST", "/?top_k=2", {"data": photo()}),
        "continue": ("POST", "/continue", {"data": rest}),
        "explain": ("POST", "/explain?grid=2", {"data": photo()}),
        "explain_model": ("POST", "/v2/models/photos/explain?class=dog", tensors),
        "explain_version": ("POST", "/v2/models/photos/versions/1/explain", {"data": photo()}),
        "infer": ("POST", INFER, tensors),
        "infer_version": ("POST", "/v2/models/photos/versions/1/infer", tensors),
        "model": ("GET", "/v2/models/photos", {}),
        "model_version": ("GET", "/v2/models/photos/versions/1", {}),
        "model_ready": ("GET", "/v2/models/photos/ready", {}),
        "model_ready_version": ("GET", "/v2/models/photos/versions/1/ready", {}),
        "models": ("GET", "/v2/models", {}),
        "routes": ("GET", "/routes", {}),
        "repository_index": ("POST", "/v2/repository/index", {}),
        "openai_models": ("GET", "/v1/models", {}),
        "openapi": ("GET", "/openapi.json", {}),
        "server": ("GET", "/v2", {}),
        "live": ("GET", "/v2/health/live", {}),
        "server_ready": ("GET", "/v2/health/ready", {}),
        "ready": ("GET", "/ready", {}),
    }
    method, path, arguments = calls[endpoint]
    return client.open(path, method=method, **arguments)


def strict(schema: Any) -> Any:
    """The schema without room for keys that it does not name."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**{key: strict(value) for key, value in schema.items()}, **closed}


def check_body(document: Any, operation: Any, status: str, body: Any) -> None:
    schema = operation["responses"][status]["content"]["application/json"]["schema"]
    Draft202012Validator(strict({**schema, "components": document["components"]})).validate(body)


def described_operation(document: Any, endpoint: str) -> Any:
    return next(o for item in document["paths"].values() for o in item.values() if o["operationId"] == endpoint)


# Those of language models: tests/serving/test_openai_bodies.py.
GENERATION = ("chat_completions", "completions", "embeddings", "openai_model")


@pytest.mark.parametrize(
    "endpoint",
    sorted(name for name in OPERATIONS if name not in ("metrics", *GENERATION) and not name.startswith("page")),
)
def test_responses_are_as_described(
    router: FlaskClient, cut_off: FlaskClient, photos: Published, document: Any, endpoint: str
) -> None:
    answer = call(router, cut_off, endpoint, photos)
    assert answer.status_code == 200
    check_body(document, described_operation(document, endpoint), "200", answer.json)


def test_the_response_to_a_batch_is_as_described(router: FlaskClient, document: Any) -> None:
    answer = router.post("/", json={"images": [base64.b64encode(photo()).decode(), "*"]})
    assert "error" in answer.json["predictions"][1]
    check_body(document, described_operation(document, "answer"), "200", answer.json)


@pytest.mark.parametrize(
    ("endpoint", "method", "path", "body"),
    [
        ("answer", "POST", "/", b""),
        ("answer", "POST", "/?model=nobody", b"{}"),
        ("answer", "POST", "/", b"%PDF"),
        ("infer", "POST", "/v2/models/photos/infer", b'{"inputs": []}'),
        ("explain", "POST", "/explain?grid=0", photo()),
        ("explain", "POST", "/explain?grid=32", photo()),
        ("model", "GET", "/v2/models/nobody", b""),
        ("repository_index", "POST", "/v2/repository/index", b"[]"),
    ],
)
def test_errors_are_as_described(
    router: FlaskClient, document: Any, endpoint: str, method: str, path: str, body: bytes
) -> None:
    answer = router.open(path, method=method, data=body)
    operation = described_operation(document, endpoint)
    assert answer.json["type"] in operation["responses"][str(answer.status_code)]["description"].split(", ")
    check_body(document, operation, str(answer.status_code), answer.json)
