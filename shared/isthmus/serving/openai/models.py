"""The models of the OpenAI API: models that generate text, and sentence encoders."""

from __future__ import annotations

import contextlib

import msgspec
from flask import Response
from msgspec import Struct

from isthmus.artifacts.layers import layers_of
from isthmus.context import Deadline
from isthmus.errors import IsthmusError, RequestMalformed
from isthmus.pipeline import LocalHop, Route
from isthmus.routing import ModelCatalog, ServedModel
from isthmus.serving.app import FunctionApp
from isthmus.serving.model_list import ModelList
from isthmus.serving.openai.documents import SegmentPlaceBody
from isthmus.serving.prediction import stage_name
from isthmus.settings import RouterSettings

OWNER = "isthmus"


class OpenAIModelBody(Struct):
    """A model of texts; the registry keeps no time of its creation for callers, so that `created` is 0."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = OWNER


class OpenAIModelListBody(Struct):
    """The models of texts, by name."""

    data: list[OpenAIModelBody]
    object: str = "list"


class OpenAIModels:
    """The routes, added to `app`; `listing` has the models that callers may be told of."""

    def __init__(self, app: FunctionApp, catalog: ModelCatalog, listing: ModelList) -> None:
        self._app, self._catalog, self._listing = app, catalog, listing
        app.flask.add_url_rule("/v1/models", "openai_models", self.models, methods=["GET"])
        app.flask.add_url_rule("/v1/models/<name>", "openai_model", self.model, methods=["GET"])

    def models(self) -> Response:
        """The models that generate text or embed it."""
        with self._app.unadmitted() as deadline:
            names = [model.name for model in self._listing.models(deadline).models]
            return _json(OpenAIModelListBody([OpenAIModelBody(n) for n in names if self._takes_texts(n, deadline)]))

    def model(self, name: str) -> Response:
        """A model by its name, or NAME:VERSION."""
        with self._app.unadmitted() as deadline:
            model = self._catalog.get(name, deadline)
        if model.bundle.embedding is None:
            generating(model)
        return _json(OpenAIModelBody(name))

    def _takes_texts(self, name: str, deadline: Deadline) -> bool:
        # A version that cannot be read is no reason to hide the other models.
        with contextlib.suppress(IsthmusError):
            bundle = self._catalog.get(name, deadline).bundle
            return bundle.text is not None or bundle.embedding is not None
        deadline.check("all models were read")
        return False


def generating(model: ServedModel) -> ServedModel:
    """The model, if it generates text.

    Raises:
        RequestMalformed: it does not.
    """
    if model.bundle.text is None or model.bundle.state is None:
        infer = f"send tensors to /v2/models/{model.name}/infer"
        hint = infer if model.bundle.embedding is None else "it encodes texts: send them to /v1/embeddings"
        raise RequestMalformed(f"{model.name} generates no text", parameter="model", hint=hint)
    return model


def context_of(model: ServedModel, settings: RouterSettings) -> int:
    """Tokens that prompt and completion have room for."""
    state = model.bundle.state
    # The bound of a session in this process; other functions have the same default.
    return min(state.context if state is not None else 0, settings.max_session_tokens)


def places_of(route: Route, settings: RouterSettings) -> list[SegmentPlaceBody]:
    """Where the layers of a route run; the URL of a hop is a detail."""
    ranges, places = layers_of(route.bundle, route.segments), []
    for i, (segment, hop, layers) in enumerate(zip(route.segments, route.hops, ranges, strict=True)):
        is_open = settings.expose_details or hop.name == LocalHop.name
        name = hop.name if is_open else stage_name(i, len(route.segments))
        places.append(SegmentPlaceBody(str(segment.id), name, (layers[0], layers[-1]) if layers else None))
    return places


def _json(body: Struct) -> Response:
    return Response(msgspec.json.encode(body), mimetype="application/json")
