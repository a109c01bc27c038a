"""The router app: photos, JSON and Open Inference Protocol requests in, predictions out."""

from __future__ import annotations

import msgspec
from flask import Flask, Response, jsonify

import isthmus
from isthmus.artifacts.fidelity import read_fidelity
from isthmus.errors import SettingsError
from isthmus.oip import messages as oip
from isthmus.pipeline.hop import check_hops, hops_to
from isthmus.processing.image_budget import ImageMemory
from isthmus.registry import open_cache, open_registry
from isthmus.routing import Guard, ModelCatalog, RouteSelector, parse_override
from isthmus.runtime.tables import Tables
from isthmus.serving.app import FunctionApp
from isthmus.serving.inference import InferenceReader
from isthmus.serving.model_list import ModelList
from isthmus.serving.prediction import Predictor
from isthmus.serving.preload import load_deadline, parse_entry, preload
from isthmus.serving.request import FunctionRequest
from isthmus.settings import RouterSettings


def create_router_app(settings: RouterSettings) -> Flask:
    """The app that serves models. Ready once `settings.model` is known and preloads are in memory.

    Raises:
        SettingsError: a setting that only building can judge.
    """
    app = _RouterApp(settings)
    app.readiness.start()
    return app.flask


class _RouterApp(FunctionApp):
    def __init__(self, settings: RouterSettings) -> None:
        if not settings.registry:
            raise SettingsError(
                "the setting registry is missing: the router reads its model's manifest there", variable="registry"
            )
        check_hops(settings.hops)
        codec = parse_override(settings)
        for entry in settings.preload:
            parse_entry(entry)
        self._router_settings = settings
        self._registry = open_registry(settings)
        self._store = None
        if "local" in settings.hops:
            from isthmus.runtime.store import SegmentStore  # a router with remote hops never loads onnxruntime

            self._store = SegmentStore(open_cache(settings, self._registry), settings)
        hops = hops_to(
            settings.hops,
            self._store,
            attempts=settings.hop_attempts,
            connect_timeout_s=settings.hop_connect_timeout_s,
            max_reply_bytes=settings.max_request_bytes,
        )
        super().__init__("router", settings, self._prepare)
        images = ImageMemory(settings.image_memory_bytes)
        tables = Tables(self._registry.bundle, self._registry.blob, settings.max_image_pixels, memory=images)
        self._reader = InferenceReader()
        guard = Guard(
            settings.guard_share,
            lambda bundle: read_fidelity(bundle, self._registry.blob),
            self.metrics,
            self.log,
            deadline_s=settings.deadline_s,
        )
        routes = RouteSelector(settings, self._registry, hops, tables, codec)
        self._catalog = ModelCatalog(self._registry, settings.refresh_s, self.log, routes)
        self._listing = ModelList(self._catalog, settings)
        self._predictor = Predictor(settings, guard, images, self.metrics, self.log)
        if self._store is not None:
            self.closing.callback(self._store.close)
            self.metrics.gauge_store(self._store)
        for close in (*(hop.close for hop in hops), tables.close, self._catalog.close, guard.close):
            self.closing.callback(close)
        self.post("/", self.answer, "answer")
        for suffix, prefix in (("", "/v2/models/<name>"), ("_version", "/v2/models/<name>/versions/<version>")):
            self.post(f"{prefix}/infer", self.infer, f"infer{suffix}")
            self.flask.add_url_rule(prefix, f"model{suffix}", self.metadata, methods=["GET"])
            self.flask.add_url_rule(f"{prefix}/ready", f"model_ready{suffix}", self.model_ready, methods=["GET"])
        self.post("/v2/repository/index", self.repository_index, "repository_index")
        self.flask.add_url_rule("/v2/models", "models", self.models, methods=["GET"])
        self.flask.add_url_rule("/openapi.json", "openapi", self.openapi, methods=["GET"])
        if settings.page:
            from isthmus.serving.page import Page  # templates are for routers with a page alone

            Page(settings, self._catalog, self._listing, self._reader, self._predictor).serve_on(self)
        self.flask.add_url_rule("/v2", "server", self.server, methods=["GET"])
        self.flask.add_url_rule("/v2/health/live", "live", lambda: jsonify(live=True), methods=["GET"])
        self.flask.add_url_rule("/v2/health/ready", "server_ready", self.ready, methods=["GET"])

    def answer(self, request: FunctionRequest) -> Response:
        """A prediction of the model `?model=` for a request of any kind."""
        reference = request.query.get("model", self._router_settings.model)
        model = self._catalog.get(reference, request.context.deadline)
        return self._predictor.respond(request, self._reader.read(request, model))

    def infer(self, request: FunctionRequest, name: str, version: str = "") -> Response:
        """Open Inference Protocol: tensors in, tensors out."""
        model = self._catalog.get(_reference(name, version), request.context.deadline)
        return self._predictor.respond(request, self._reader.read_tensors(request, model))

    def metadata(self, name: str, version: str = "") -> Response:
        """Open Inference Protocol: the model's inputs and outputs."""
        with self.unadmitted() as deadline:
            model = self._catalog.get(_reference(name, version), deadline)
            versions = [model.version] if version else self._catalog.versions(model, deadline)
        return jsonify(oip.model_metadata(model.name, versions, model.bundle.inputs, model.bundle.outputs))

    def model_ready(self, name: str, version: str = "") -> Response:
        """Open Inference Protocol: 200 once the model's route is known."""
        self.readiness.check()
        with self.unadmitted() as deadline:
            model = self._catalog.get(_reference(name, version), deadline)
        return jsonify(name=model.name, version=model.version, ready=True)

    def models(self) -> Response:
        """The published models with their versions and aliases, and the routes that are known."""
        with self.unadmitted() as deadline:
            return _json(self._listing.models(deadline))

    def repository_index(self, request: FunctionRequest) -> Response:
        """Triton's repository index: a list of versions with their state."""
        return _json(self._listing.index(request.body, request.context.deadline))

    def openapi(self) -> Response:
        """The OpenAPI description of every route of this app."""
        from isthmus.serving.openapi import openapi_document  # schemas are seldom asked for

        return _json(openapi_document(self.flask.url_map))

    def server(self) -> Response:
        """Open Inference Protocol: name, version and extensions of this server."""
        return jsonify(oip.server_metadata("isthmus", isthmus.__version__))

    def _prepare(self) -> None:
        self._catalog.forget(self._router_settings.model)
        self._catalog.get(self._router_settings.model, load_deadline())
        if self._store is not None:
            preload(self._router_settings.preload, self._registry, self._store)


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), mimetype="application/json")


def _reference(name: str, version: str) -> str:
    return f"{name}:{version}" if version else name
