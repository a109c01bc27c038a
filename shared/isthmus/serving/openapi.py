"""The OpenAPI 3.1 description of a function: routes from the app, bodies from api_bodies, statuses from errors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import msgspec
from werkzeug.routing import Map, Rule

import isthmus
from isthmus import errors
from isthmus.context import EXIT_HEADER
from isthmus.errors import HTTP_STATUS, IsthmusError
from isthmus.oip import messages as oip
from isthmus.pipeline.continuation import CONTENT_TYPE as CONTINUATION
from isthmus.processing.media import MAX_PHOTOS
from isthmus.routing.state import RouterState
from isthmus.serving import api_bodies as bodies
from isthmus.serving.openai import documents as openai
from isthmus.serving.openai.embeddings import EmbeddingListBody, EmbeddingRequestBody
from isthmus.serving.openai.errors import OpenAIErrorBody
from isthmus.serving.openai.models import OpenAIModelBody, OpenAIModelListBody
from isthmus.serving.openai.requests import ChatRequestBody, CompletionRequestBody
from isthmus.serving.route_roles import TABLES

Errors = tuple[type[IsthmusError], ...]

# What the registry, its look-ups and the choice of a route fail with.
LOOKUP: Errors = (
    *(errors.Missing, errors.RegistryError, errors.Denied, errors.NotGranted, errors.Corrupt, errors.Untrusted),
    errors.RegistryUnavailable,
    *(errors.RegistryMissing, errors.PlanMalformed, errors.PlanMismatch, errors.Overloaded, errors.DeadlineExceeded),
)
# What every route but those for probes fails with where the caller may not use it.
_ACCESS: Errors = (
    *(errors.CallerUnauthenticated, errors.CallerForbidden, errors.CallerLimited, errors.IssuerUnavailable),
)
# What every POST fails with before its handler runs.
ADMISSION: Errors = (
    *(errors.RequestMalformed, errors.RequestTooLarge, errors.EncodingUnsupported),
    *(errors.Overloaded, errors.NotReady, errors.DeadlineExceeded),
)
EXECUTION: Errors = (
    *(errors.MediaUnsupported, errors.ShapeMismatch, errors.ValueRefused, errors.EventMalformed, errors.BucketRefused),
    *(errors.ClaimExpired, errors.MessageTooLarge, errors.ResultStoreUnavailable),
    *(errors.SegmentTooLarge, errors.RunFailed, errors.CacheFull),
    *(errors.HopTimeout, errors.HopUnavailable, errors.HopUntrusted, errors.HopBusy),
    *(errors.HopRejected, errors.HopMismatch),
)

_QUERY: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "model": ("the model and its version: NAME, NAME:NUMBER or NAME:ALIAS", {"type": "string"}),
    "beside": ("another route of the model, or NAME:VERSION, for the same request", {"type": "string"}),
    "class": ("the class to explain, its label or index; the likeliest without it", {"type": "string"}),
    "grid": (
        "rows and columns of an explanation's cells, or a sequence's cells",
        {"type": "integer", "minimum": 1, "maximum": 99_999},
    ),
    "output": ("the output with the classes, of a model without post-processing", {"type": "string"}),
    "hidden_id": ("the id that hides a token, where no attention mask can", {"type": "integer", "minimum": 0}),
    "route": ("another route of the model, or NAME:VERSION, to explain", {"type": "string"}),
    "top_k": ("how many classes of a photo's prediction", {"type": "integer", "minimum": 1, "maximum": 99_999}),
    "wait": ("a duration such as 20s: respond once the call is over, or after this time", {"type": "string"}),
}
_EXPLAINED = ("class", "grid", "output", "hidden_id")
_HEADERS = {
    "X-Timeout": "a duration such as 1500ms; shortens the deadline",
    EXIT_HEADER: "off for the full model: the request ends at no exit; on is the default",
    oip.HEADER_LENGTH: "length of the JSON before binary tensors",
    "Idempotency-Key": "the id of the call: a request that is repeated with it is the same call",
    "Last-Event-ID": "the last event that the reader of a stream has",
}
_PATH = {
    "name": "the model",
    "version": "its number or an alias",
    "asset": "the file's name",
    "call_id": "the call's id",
}
_BINARY = {"type": "string", "format": "binary"}
_BATCH = {"type": "array", "items": _BINARY, "minItems": 1, "maxItems": MAX_PHOTOS}


@dataclass(frozen=True)
class Operation:
    """What a route takes and gives, beside its path: bodies by media type, each a type, several types or a schema."""

    summary: str
    response: Mapping[str, Any]
    errors: Errors = ()
    request: Mapping[str, Any] | None = None
    query: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    body_required: bool = True
    status: int = 200
    error: Any = bodies.ErrorBody


@dataclass(frozen=True)
class ApiDescription:
    """A function's title, what it does, and its operations by the route's endpoint in the app."""

    title: str
    description: str
    operations: Mapping[str, Operation]


def _as_json(body: Any) -> dict[str, Any]:
    return {"application/json": body}


# Fragments and pages are for the page's own script, whose schema would say nothing.
_HTML = {"text/html": {"type": "string"}}
_TENSORS = {**_as_json(bodies.InferRequestBody), "application/octet-stream": _BINARY}
_TENSOR_RESPONSE = {**_as_json(bodies.InferResponseBody), "application/octet-stream": _BINARY}
_INFER = Operation(
    "Open Inference Protocol: tensors in, tensors out",
    _TENSOR_RESPONSE,
    ADMISSION + LOOKUP + EXECUTION,
    _TENSORS,
    headers=("X-Timeout", EXIT_HEADER, oip.HEADER_LENGTH),
)
_EXPLAIN = Operation(
    "Which parts of a photo or of tokens decided, by occlusion behind the cut",
    _as_json(bodies.ExplanationBody),
    ADMISSION + LOOKUP + EXECUTION + (errors.ImageMalformed,),
    {"image/*": _BINARY, **_as_json((bodies.PhotoBody, bodies.InferRequestBody)), "application/octet-stream": _BINARY},
    query=_EXPLAINED,
    headers=("X-Timeout", oip.HEADER_LENGTH),
)
# A chunk is a line `data: ` with the JSON of the same name; the last line is `data: [DONE]`.
_EVENTS = {"text/event-stream": {"type": "string"}}
_GENERATION: Errors = (*ADMISSION, *LOOKUP, *EXECUTION, errors.ContextTooLong)
_MODEL = Operation("A model's versions, inputs and outputs", _as_json(bodies.ModelBody), LOOKUP)
_MODEL_READY = Operation(
    "200 once the model's route is known", _as_json(bodies.ModelReadyBody), (*LOOKUP, errors.NotReady)
)
OPERATIONS: Mapping[str, Operation] = {
    # Content-Type is not read, so that the media types are for clients that generate requests.
    "answer": Operation(
        "Predictions for a photo, a batch of photos or tensors; the body's first bytes say which it is",
        {
            **_as_json((bodies.PredictionBody, bodies.BatchPredictionBody, bodies.InferResponseBody)),
            "application/octet-stream": _BINARY,
        },
        ADMISSION + LOOKUP + EXECUTION + (errors.ImageMalformed,),
        {
            "image/*": _BINARY,
            "multipart/form-data": {
                "type": "object",
                "properties": {"image": _BINARY, "images": _BATCH, "top_k": {"type": "integer", "minimum": 1}},
            },
            **_as_json((bodies.PhotoBody, bodies.PhotoBatchBody, bodies.InferRequestBody)),
            "application/octet-stream": _BINARY,
        },
        query=("model", "top_k"),
        headers=("X-Timeout", EXIT_HEADER, oip.HEADER_LENGTH),
    ),
    "continue": Operation(
        "The rest of a request whose tail could not be reached: the body of an earlier 503, and the whole's response",
        {
            **_as_json((bodies.PredictionBody, bodies.InferResponseBody)),
            "application/octet-stream": _BINARY,
        },
        ADMISSION + LOOKUP + EXECUTION + (errors.FrameMalformed, errors.FrameTooLarge),
        {CONTINUATION: _BINARY},
        headers=("X-Timeout",),
    ),
    "explain": replace(_EXPLAIN, query=("model", *_EXPLAINED)),
    "explain_version": _EXPLAIN,
    "explain_model": _EXPLAIN,
    "infer": _INFER,
    "infer_version": _INFER,
    "model": _MODEL,
    "model_version": _MODEL,
    "model_ready": _MODEL_READY,
    "model_ready_version": _MODEL_READY,
    "models": Operation("The models, their versions, aliases and known routes", _as_json(bodies.ModelListBody), LOOKUP),
    "routes": Operation("Routes, links, circuit breakers and queue as they are now", _as_json(RouterState)),
    "repository_index": Operation(
        "The repository index of Triton's clients",
        _as_json(list[bodies.IndexEntryBody]),
        ADMISSION + LOOKUP,
        _as_json(bodies.IndexRequestBody),
        body_required=False,
    ),
    "chat_completions": Operation(
        "OpenAI: the completion of a conversation, whole or as server-sent events",
        {**_as_json(openai.ChatCompletionBody), **_EVENTS},
        _GENERATION,
        _as_json(ChatRequestBody),
        headers=("X-Timeout",),
        error=OpenAIErrorBody,
    ),
    "completions": Operation(
        "OpenAI: the completion of a text, whole or as server-sent events",
        {**_as_json(openai.TextCompletionBody), **_EVENTS},
        _GENERATION,
        _as_json(CompletionRequestBody),
        headers=("X-Timeout",),
        error=OpenAIErrorBody,
    ),
    "embeddings": Operation(
        "OpenAI: a vector for each text, or for each list of token ids",
        _as_json(EmbeddingListBody),
        _GENERATION,
        _as_json(EmbeddingRequestBody),
        headers=("X-Timeout",),
        error=OpenAIErrorBody,
    ),
    "openai_models": Operation(
        "OpenAI: the models that generate text or embed it",
        _as_json(OpenAIModelListBody),
        LOOKUP,
        error=OpenAIErrorBody,
    ),
    "openai_model": Operation(
        "OpenAI: a model that generates text or embeds it",
        _as_json(OpenAIModelBody),
        (*LOOKUP, errors.RequestMalformed),
        error=OpenAIErrorBody,
    ),
    "openapi": Operation("This description", _as_json({"type": "object"})),
    "server": Operation("Name, version and extensions", _as_json(bodies.ServerBody)),
    "live": Operation("200 while the process answers", _as_json(bodies.LiveBody)),
    "server_ready": Operation("200 once preloads are loaded", _as_json(bodies.ReadyBody), (errors.NotReady,)),
    "ready": Operation("200 once preloads are loaded", _as_json(bodies.ReadyBody), (errors.NotReady,)),
    "page": Operation("The page for browsers, where the setting `page` is on", _HTML),
    "page_docs": Operation("This description as a page", _HTML),
    "page_asset": Operation("A script or stylesheet of the pages", {"text/*": {"type": "string"}}),
    "page_choices": Operation("Models and routes that the page offers", _HTML, LOOKUP, query=("model",)),
    "page_models": Operation("Models, versions and plans as a table", _HTML, LOOKUP),
    "page_prediction": Operation(
        "A prediction as the page shows it, by one route or by two",
        _HTML,
        ADMISSION + LOOKUP + EXECUTION + (errors.ImageMalformed,),
        {
            "multipart/form-data": {"type": "object", "properties": {"image": _BINARY}},
            "application/x-www-form-urlencoded": {"type": "object", "properties": {"document": {"type": "string"}}},
        },
        query=("model", "top_k", "beside"),
    ),
    "page_why": Operation(
        "An explanation as the page shows it",
        _HTML,
        ADMISSION + LOOKUP + EXECUTION + (errors.ImageMalformed,),
        {
            "multipart/form-data": {"type": "object", "properties": {"image": _BINARY}},
            "application/x-www-form-urlencoded": {"type": "object", "properties": {"document": {"type": "string"}}},
        },
        query=("model", "route", *_EXPLAINED),
    ),
    "metrics": Operation("Metrics in Prometheus's text format, or in OpenMetrics", {"text/plain": {"type": "string"}}),
}
ROUTER = ApiDescription(
    "Isthmus router",
    "Split inference: photos, JSON and Open Inference Protocol requests in, predictions out.",
    OPERATIONS,
)


def openapi_document(routes: Map, api: ApiDescription = ROUTER) -> dict[str, Any]:
    """The description of these routes; its server is the folder of the document's URL.

    Raises:
        KeyError: a route without an operation.
    """
    schemas = _Schemas()
    # Sorted by path: the app's order is that of its code.
    paths: dict[str, Any] = defaultdict(dict)
    for rule in sorted(routes.iter_rules(), key=lambda rule: rule.rule):
        # Flask adds HEAD and OPTIONS by itself.
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            paths[re.sub("<(?:[a-z]+:)?([a-z_]+)>", r"{\1}", rule.rule)][method.lower()] = _operation(
                rule, api.operations[rule.endpoint], schemas
            )
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "an API key or a token"},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": api.title,
            "version": isthmus.__version__,
            "description": api.description,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        # Behind a gateway the path is /function/NAME, which only the caller knows.
        "servers": [{"url": "."}],
        "paths": dict(paths),
        # The empty one: a function without callers takes requests of its own machine.
        "security": [{"bearer": []}, {"key": []}, {}],
        "components": {"schemas": schemas.components, "securitySchemes": schemes},
    }


class _Schemas:
    """JSON Schemas of body types, collected as components."""

    def __init__(self) -> None:
        self.components: dict[str, Any] = {}

    def schema(self, body: Any) -> dict[str, Any]:
        """The schema of a type, of any of several types, or the schema itself."""
        if isinstance(body, dict):
            return body
        if isinstance(body, tuple):
            return {"anyOf": [self.schema(each) for each in body]}
        (schema,), components = msgspec.json.schema_components([body], ref_template="#/components/schemas/{name}")
        self.components |= components
        return schema

    def content(self, types: Mapping[str, Any]) -> dict[str, Any]:
        return {media: {"schema": self.schema(body)} for media, body in types.items()}


def _operation(rule: Rule, operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    is_open = any(rule.endpoint in table and table[rule.endpoint].is_open for table in TABLES.values())
    parameters = [_parameter("path", name, _PATH[name], {"type": "string"}) for name in sorted(rule.arguments)]
    parameters += [_parameter("query", name, *_QUERY[name]) for name in operation.query]
    parameters += [_parameter("header", name, _HEADERS[name], {"type": "string"}) for name in operation.headers]
    document: dict[str, Any] = {
        "operationId": rule.endpoint,
        "summary": operation.summary,
        "responses": {
            str(operation.status): {
                "description": HTTPStatus(operation.status).phrase,
                "content": schemas.content(operation.response),
            },
            **_error_responses(operation, schemas, () if is_open else _ACCESS),
        },
    }
    if is_open:
        document["security"] = []
    if parameters:
        document["parameters"] = parameters
    if operation.request is not None:
        content = schemas.content(operation.request)
        document["requestBody"] = {"required": operation.body_required, "content": content}
    return document


def _parameter(where: str, name: str, description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"in": where, "name": name, "description": description, "schema": schema, "required": where == "path"}


def _error_responses(operation: Operation, schemas: _Schemas, further: Errors) -> dict[str, Any]:
    types = defaultdict(set)
    for cls in (*operation.errors, *further):
        types[HTTP_STATUS[cls]].add(cls.__name__)
    types[500].add("InternalError")  # an unexpected error, of any route
    content = schemas.content({"application/json": operation.error})
    retry = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return {
        str(status): {
            "description": ", ".join(sorted(names)),
            "content": content,
            **({"headers": retry} if status in (429, 503) else {}),
        }
        for status, names in sorted(types.items())
    }
