"""Routes about the models of a router and about the router itself: lists, metadata, readiness, state, OpenAPI."""

from __future__ import annotations

import msgspec
from flask import Response, jsonify
from msgspec import structs

import isthmus
from isthmus.context import Deadline
from isthmus.oip import messages as oip
from isthmus.routing import CanaryTrials, Dispatcher, ModelCatalog, ServedModel
from isthmus.routing.state import RouterState
from isthmus.serving.access import may_see, permit_model
from isthmus.serving.app import FunctionApp
from isthmus.serving.metrics import hop_label
from isthmus.serving.model_list import ModelList
from isthmus.serving.request import FunctionRequest
from isthmus.settings import RouterSettings


class PermittedCatalog(ModelCatalog):
    """The catalog of a router's routes: each request gets the models that its caller may use, however it names them."""

    def get(self, reference: str, deadline: Deadline) -> ServedModel:
        """As `ModelCatalog.get`.

        Raises:
            CallerForbidden: as `permit_model`, before the model is looked up.
        """
        permit_model(reference)
        return super().get(reference, deadline)


class ModelRoutes:
    """The routes, added to `app`; `listing` is the list of models that callers may be told of."""

    def __init__(self, app: FunctionApp, catalog: ModelCatalog, settings: RouterSettings) -> None:
        self._app, self._catalog = app, catalog
        self.listing = ModelList(catalog, settings)
        for suffix, prefix in (("", "/v2/models/<name>"), ("_version", "/v2/models/<name>/versions/<version>")):
            app.flask.add_url_rule(prefix, f"model{suffix}", self.metadata, methods=["GET"])
            app.flask.add_url_rule(f"{prefix}/ready", f"model_ready{suffix}", self.model_ready, methods=["GET"])
        app.post("/v2/repository/index", self.repository_index, "repository_index")
        app.flask.add_url_rule("/v2/models", "models", self.models, methods=["GET"])
        app.flask.add_url_rule("/openapi.json", "openapi", self.openapi, methods=["GET"])
        app.flask.add_url_rule("/v2", "server", self.server, methods=["GET"])
        # A probe of liveness must answer while models load and requests wait: it takes no slot.
        app.flask.add_url_rule("/v2/health/live", "live", lambda: jsonify(live=True), methods=["GET"])
        app.flask.add_url_rule("/v2/health/ready", "server_ready", app.ready, methods=["GET"])

    def metadata(self, name: str, version: str = "") -> Response:
        """Open Inference Protocol: the model's inputs and outputs."""
        with self._app.unadmitted() as deadline:
            model = self._catalog.get(model_reference(name, version), deadline)
            versions = [model.version] if version else self._catalog.versions(model, deadline)
        return jsonify(oip.model_metadata(model.name, versions, model.bundle.inputs, model.bundle.outputs))

    def model_ready(self, name: str, version: str = "") -> Response:
        """Open Inference Protocol: 200 once the model's route is known."""
        self._app.readiness.check()
        with self._app.unadmitted() as deadline:
            model = self._catalog.get(model_reference(name, version), deadline)
        return jsonify(name=model.name, version=model.version, ready=True)

    def models(self) -> Response:
        """The published models with their versions and aliases, and the routes that are known."""
        with self._app.unadmitted() as deadline:
            return _json(self.listing.models(deadline))

    def repository_index(self, request: FunctionRequest) -> Response:
        """Triton's repository index: a list of versions with their state."""
        return _json(self.listing.index(request.body, request.context.deadline))

    def openapi(self) -> Response:
        """The OpenAPI description of every route of the app."""
        from isthmus.serving.openapi import openapi_document  # schemas are seldom asked for

        return _json(openapi_document(self._app.flask.url_map))

    def server(self) -> Response:
        """Open Inference Protocol: name, version and extensions of this server."""
        return jsonify(oip.server_metadata("isthmus", isthmus.__version__))


class StateRoute:
    """`GET /routes`, added to `app`. Takes no slot, so that an overloaded router shows that it is."""

    def __init__(
        self, app: FunctionApp, dispatcher: Dispatcher, trials: CanaryTrials, settings: RouterSettings
    ) -> None:
        self._slots, self._dispatcher, self._settings = app.slots, dispatcher, settings
        self._trials = trials
        app.flask.add_url_rule("/routes", "routes", self.routes, methods=["GET"])

    def routes(self) -> Response:
        """The state as JSON."""
        return Response(msgspec.json.encode(self.state()), mimetype="application/json")

    def state(self) -> RouterState:
        """The state; URLs of hops, and models beside the default, are details, as in metrics and lists."""
        state, refusals = self._dispatcher.state(), self._slots.refused()
        return structs.replace(
            state,
            hops=tuple(structs.replace(hop, name=hop_label(self._settings, hop.name)) for hop in state.hops),
            models=tuple(m for m in state.models if self._settings.tells_of(m.name) and may_see(m.name)),
            canaries=tuple(t for t in self._trials.states() if self._settings.tells_of(t.model) and may_see(t.model)),
            limit=self._slots.limit,
            working=self._slots.working,
            queued=self._slots.queued,
            refused=sum(refusals.values()),
            refusals=refusals,
        )


def model_reference(name: str, version: str = "") -> str:
    """The reference of a path's model and version: NAME, or NAME:VERSION."""
    return f"{name}:{version}" if version else name


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), mimetype="application/json")
