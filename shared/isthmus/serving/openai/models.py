"""The models of the OpenAI API: those that generate text."""

from __future__ import annotations

import contextlib

import msgspec
from flask import Response
from msgspec import Struct

from isthmus.context import Deadline
from isthmus.errors import IsthmusError, RequestMalformed
from isthmus.routing import ModelCatalog, ServedModel
from isthmus.serving.app import FunctionApp
from isthmus.serving.model_list import ModelList

OWNER = "isthmus"


class OpenAIModelBody(Struct):
    """A model that generates text; the registry keeps no time of its creation for callers, so that `created` is 0."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = OWNER


class OpenAIModelListBody(Struct):
    """The models that generate text, by name."""

    data: list[OpenAIModelBody]
    object: str = "list"


class OpenAIModels:
    """The routes, added to `app`; `listing` has the models that callers may be told of."""

    def __init__(self, app: FunctionApp, catalog: ModelCatalog, listing: ModelList) -> None:
        self._app, self._catalog, self._listing = app, catalog, listing
        app.flask.add_url_rule("/v1/models", "openai_models", self.models, methods=["GET"])
        app.flask.add_url_rule("/v1/models/<name>", "openai_model", self.model, methods=["GET"])

    def models(self) -> Response:
        """The models that generate text."""
        with self._app.unadmitted() as deadline:
            names = [model.name for model in self._listing.models(deadline).models]
            return _json(OpenAIModelListBody([OpenAIModelBody(n) for n in names if self._generates(n, deadline)]))

    def model(self, name: str) -> Response:
        """A model by its name, or NAME:VERSION."""
        with self._app.unadmitted() as deadline:
            generating(self._catalog.get(name, deadline))
        return _json(OpenAIModelBody(name))

    def _generates(self, name: str, deadline: Deadline) -> bool:
        # A version that cannot be read is no reason to hide the other models.
        with contextlib.suppress(IsthmusError):
            return self._catalog.get(name, deadline).bundle.text is not None
        deadline.check("all models were read")
        return False


def generating(model: ServedModel) -> ServedModel:
    """The model, if it generates text.

    Raises:
        RequestMalformed: it does not.
    """
    if model.bundle.text is None or model.bundle.state is None:
        raise RequestMalformed(
            f"{model.name} generates no text", parameter="model", hint=f"send tensors to /v2/models/{model.name}/infer"
        )
    return model


def _json(body: Struct) -> Response:
    return Response(msgspec.json.encode(body), mimetype="application/json")
