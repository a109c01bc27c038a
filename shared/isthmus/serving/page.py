"""The page of a router for browsers: photos and JSON along one route or two, models, live rates, the API.

htmx swaps fragments that templates render with every value escaped; uPlot draws the rates. A strict
Content-Security-Policy forbids inline scripts and styles, so that no caller's text can become code.
Source: docs/how-to/local.md, "The page".
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from flask import Response, render_template, request
from jinja2 import FileSystemLoader
from werkzeug.exceptions import MethodNotAllowed, NotFound

import isthmus
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import Missing, RequestMalformed
from isthmus.routing.candidates import ServedModel
from isthmus.routing.catalog import ModelCatalog
from isthmus.serving.app import FunctionApp
from isthmus.serving.explaining import Explainer
from isthmus.serving.inference import InferenceReader, InferenceRequest
from isthmus.serving.model_list import ModelList
from isthmus.serving.openapi import openapi_document
from isthmus.serving.prediction import Predictor
from isthmus.serving.request import FunctionRequest, Timings
from isthmus.settings import RouterSettings

ROOT = Path(__file__).parent
ASSETS: Mapping[str, str] = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "htmx.min.js": "text/javascript",
    "uPlot.iife.min.js": "text/javascript",
    "uPlot.min.css": "text/css",
}
# How long browsers use an asset unasked: short, since an update of the function keeps the names.
_ASSET_SECONDS = 300
# The field of a pasted JSON document, as browsers encode a form.
_DOCUMENT = b"document="
# Of the response's JSON; a tensor's numbers are of no use beyond.
_MAX_SHOWN = 4000
_ROUTE_NAMES = {
    "raw": "the same cut, raw tensors",
    "edge": "whole model at the edge",
    "cloud": "whole model in the cloud",
    "photo": "photo unchanged, to the cloud",
}


@dataclass(frozen=True)
class StageBar:
    """A stage of a request as a bar; `run_ms` and `pack_ms` are parts of `ms`, or before it. Units: milliseconds."""

    label: str
    ms: float
    run_ms: float = 0.0
    pack_ms: float = 0.0


@dataclass(frozen=True)
class PageResult:
    """A prediction as the page shows it; `document` is the API's response."""

    title: str
    document: Mapping[str, Any]
    facts: Mapping[str, Any]
    stages: tuple[StageBar, ...]
    total_ms: float
    form: str
    """The form of the page that holds the request: `photo` or `json`."""
    query: str
    """Model and route, as the query of a request for an explanation."""

    @property
    def shown(self) -> str:
        """The response's JSON, cut off where it is long."""
        text = json.dumps(self.document, ensure_ascii=False, indent=1)
        return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}\n…"


class Page:
    """The handlers of the page and its fragments."""

    def __init__(
        self,
        settings: RouterSettings,
        catalog: ModelCatalog,
        models: ModelList,
        reader: InferenceReader,
        predictor: Predictor,
        explainer: Explainer,
    ) -> None:
        self._settings, self._catalog, self._models = settings, catalog, models
        self._reader, self._predictor, self._explainer = reader, predictor, explainer

    def serve_on(self, app: FunctionApp) -> None:
        """Add the routes."""
        self._app = app
        # The app's own loader looks beside the handler, in the function's folder.
        app.flask.jinja_loader = FileSystemLoader(ROOT / "templates")
        app.flask.jinja_env.filters["segment_name"] = segment_name
        for rule, endpoint, view in (
            ("/", "page", self.page),
            ("/docs", "page_docs", self.docs),
            ("/page/<asset>", "page_asset", self.asset),
            ("/page/choices", "page_choices", self.choices),
            ("/page/models", "page_models", self.models),
        ):
            app.flask.add_url_rule(rule, endpoint, view, methods=["GET"])
        app.post("/page/prediction", self.prediction, "page_prediction")
        app.post("/page/why", self.why, "page_why")

    def page(self) -> Response:
        """The page, for browsers alone: other clients get the 405 of a router without a page."""
        # Probes and curl accept anything; only browsers name HTML.
        if "text/html" not in request.headers.get("Accept", ""):
            raise MethodNotAllowed(valid_methods=["OPTIONS", "POST"])
        return _html("page.html", version=isthmus.__version__, model=self._settings.model)

    def docs(self) -> Response:
        """The OpenAPI description as a page."""
        return _html("docs.html", version=isthmus.__version__, api=openapi_document(self._app.flask.url_map))

    def asset(self, asset: str) -> Response:
        """A file of `ASSETS`."""
        if asset not in ASSETS:
            raise NotFound
        response = Response((ROOT / "static" / asset).read_bytes(), content_type=f"{ASSETS[asset]}; charset=utf-8")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.cache_control.max_age = _ASSET_SECONDS
        return response

    def choices(self) -> Response:
        """The models to choose from, and the routes of the chosen model."""
        with self._app.unadmitted() as deadline:
            model = self._catalog.get(request.args.get("model") or self._settings.model, deadline)
            listed = self._models.models(deadline).models
        versions = [f"{each.name}:{version}" for each in listed for version in each.versions]
        chosen = f"{model.name}:{model.version}"
        routes = {name: route_title(name) for name in self._catalog.alternatives(model)}
        generates = model.bundle.text is not None
        return _html("choices.html", versions=versions, chosen=chosen, routes=routes, generates=generates)

    def models(self) -> Response:
        """The models with their versions, aliases, routes and plans."""
        with self._app.unadmitted() as deadline:
            return _html("models.html", models=self._models.models(deadline).models)

    def prediction(self, request: FunctionRequest) -> Response:
        """The prediction by the model's route, and beside it by another route where the query asks for one."""
        model = self._catalog.get(request.query.get("model") or self._settings.model, request.context.deadline)
        inference = self._reader.read(_document_request(request), model)
        results = [self._result("", request, inference)]
        if beside := request.query.get("beside", ""):
            other = self._beside(beside, model, request)
            results.append(self._result(beside, request, replace(inference, model=other)))
        # One scale for both columns, so that their bars compare.
        scale_ms = max((bar.ms + bar.pack_ms for result in results for bar in result.stages), default=0.0)
        return _html("prediction.html", results=results, scale_ms=scale_ms or 1.0)

    def why(self, request: FunctionRequest) -> Response:
        """The explanation of a class by the model's route, or by the other route that the query names."""
        model = self._catalog.get(request.query.get("model") or self._settings.model, request.context.deadline)
        if route := request.query.get("route", ""):
            model = self._beside(route, model, request)
        form = _form_of(request)
        inference = self._reader.read(_document_request(request), model)
        document = self._explainer.explain(request, inference)
        cells = list(heat_cells(document["explanation"]))
        return _html("why.html", form=form, cells=cells, explained=document["class"], **document)

    def _beside(self, name: str, model: ServedModel, request: FunctionRequest) -> ServedModel:
        """The model with another of its routes, or another version of the same model.

        Raises:
            RequestMalformed: a version of another model, which may take other inputs.
            Missing: there is no such route or version.
        """
        routes = self._catalog.alternatives(model)
        if name in routes:
            return replace(model, candidates=(routes[name],))
        # A tensor's name, and so a cut's, may hold a colon.
        if ":" not in name or name.startswith("cut:"):
            raise Missing(f"there is no route {name[:80]!r}", kind="route", name=name[:80], exists=sorted(routes))
        other = self._catalog.get(name, request.context.deadline)
        if other.name != model.name:
            raise RequestMalformed("two versions of one model are compared, not two models", parameter="beside")
        return other

    def _result(self, route: str, request: FunctionRequest, inference: InferenceRequest) -> PageResult:
        """The prediction by the route of `inference`, named `route`; empty for the served route."""
        timings = Timings()
        # Timings of its own: both results name their stages alike.
        response = self._predictor.respond(request._replace(timings=timings), inference)
        total_ms = timings.elapsed() * 1000
        request.timings.stages.extend(timings.stages)
        if response.mimetype != "application/json":
            raise RequestMalformed("the page shows JSON; ask for outputs without binary_data", parameter="binary_data")
        document = json.loads(response.get_data())
        facts = document.get("route") or document.get("parameters") or {}
        title = route_title(route) if route else "the served route"
        # The version in force now, so that an explanation is of this prediction.
        query = urlencode({"model": request.query.get("model") or document["model_name"], "route": route})
        stages = tuple(stage_bars(timings))
        return PageResult(title, document, facts, stages, total_ms, _form_of(request), query)


def route_title(name: str) -> str:
    """What the page calls a route or version."""
    if name in _ROUTE_NAMES:
        return _ROUTE_NAMES[name]
    return f"cut {name[4:]}, raw tensors" if name.startswith("cut:") else name


@dataclass(frozen=True)
class HeatCell:
    """A cell of a heat map; `left` to `height` are shares of the photo's sides, `opacity` is 0 to 1.

    Of a sequence the cells are in a row.
    """

    left: float
    top: float
    width: float
    height: float
    drop: float
    opacity: float


def heat_cells(explanation: Mapping[str, Any]) -> Iterator[HeatCell]:
    """The cells of an explanation's document, row by row; the largest change is the most opaque."""
    rows = explanation["drops"]
    left, top, width, height = explanation.get("part") or (0.0, 0.0, 1.0, 1.0)
    width, height = width / len(rows[0]), height / len(rows)
    most = max(abs(drop) for row in rows for drop in row) or 1.0
    for i, row in enumerate(rows):
        for j, drop in enumerate(row):
            yield HeatCell(left + j * width, top + i * height, width, height, drop, abs(drop) / most)


def segment_name(segment: str) -> str:
    """A segment's id as the page shows it."""
    return "the whole model" if segment == WHOLE else segment


def stage_bars(timings: Timings) -> Iterator[StageBar]:
    """A bar for each stage, hops with their parts: `hop0-run` and `hop0-pack` belong to `hop0`."""
    # A name is unique in a request: closer looks are again0, again1, ….
    stages = {name: (seconds * 1000, segment) for name, seconds, segment in timings.stages}
    for name, (ms, segment) in stages.items():
        if name.endswith(("-run", "-pack")):
            continue
        run_ms, pack_ms = (stages.get(f"{name}-{part}", (0.0, ""))[0] for part in ("run", "pack"))
        yield StageBar(f"{name} {segment_name(segment)}".strip(), ms, min(run_ms, ms), pack_ms)


def _form_of(request: FunctionRequest) -> str:
    """The form of the page that sent this request."""
    return "json" if bytes(request.body[: len(_DOCUMENT)]) == _DOCUMENT else "photo"


def _document_request(request: FunctionRequest) -> FunctionRequest:
    """The request with the JSON of the field `document` as its body, where the page's form sent one.

    Raises:
        RequestMalformed: the field cannot be decoded. Overloaded, RequestTooLarge: as `Reservation.hold`.
    """
    if _form_of(request) == "photo":
        return request
    request.memory.hold(3 * len(request.body))  # as text, split, and decoded
    try:
        text = parse_qs(bytes(request.body).decode("ascii"), max_num_fields=4)["document"][0]
    except (ValueError, KeyError) as e:
        raise RequestMalformed("the form's field document cannot be decoded", parameter="document") from e
    return request._replace(body=text.encode("utf-8", "replace"))


def _html(template: str, **values: Any) -> Response:
    # 16 bytes: as many as CSP asks for at least (W3C CSP 3, 2.3.1).
    nonce = secrets.token_urlsafe(16)
    response = Response(render_template(template, nonce=nonce, **values), mimetype="text/html")
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self'; connect-src 'self';"
        " img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    # A nonce is for one response, and models change.
    response.cache_control.no_store = True
    return response
