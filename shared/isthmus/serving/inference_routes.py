"""Routes that run models: predictions, explanations, and the rest of interrupted requests."""

from __future__ import annotations

from flask import Response

from isthmus.codecs import Tables
from isthmus.processing.image_budget import ImageMemory
from isthmus.routing import CanaryTrials, ModelCatalog
from isthmus.serving.app import FunctionApp
from isthmus.serving.continuing import Continuer
from isthmus.serving.explaining import Explainer
from isthmus.serving.inference import InferenceReader
from isthmus.serving.model_routes import model_reference
from isthmus.serving.prediction import Predictor
from isthmus.serving.request import FunctionRequest
from isthmus.serving.version_choice import VersionChoice
from isthmus.settings import RouterSettings


class InferenceRoutes:
    """The routes, added to `app`.

    `versions` serves all inference; reader, predictor and explainer are the page's as well.
    """

    def __init__(
        self,
        app: FunctionApp,
        settings: RouterSettings,
        catalog: ModelCatalog,
        trials: CanaryTrials,
        predictor: Predictor,
        images: ImageMemory,
        tables: Tables,
    ) -> None:
        self.versions, self._default = VersionChoice(app, settings, catalog, trials), settings.model
        self.predictor = predictor
        self.reader = InferenceReader(settings)
        app.closing.callback(self.reader.close)
        self.explainer = Explainer(settings, predictor, images)
        continuer = Continuer(catalog, predictor, tables, settings.max_request_bytes)
        app.post("/", self.answer, "answer")
        app.post("/explain", self.explain, "explain")
        app.post("/continue", continuer.respond, "continue")
        for suffix, prefix in (("", "/v2/models/<name>"), ("_version", "/v2/models/<name>/versions/<version>")):
            app.post(f"{prefix}/infer", self.infer, f"infer{suffix}")
            app.post(f"{prefix}/explain", self.explain, f"explain{suffix or '_model'}")

    def answer(self, request: FunctionRequest) -> Response:
        """A prediction of the model `?model=` for a request of any kind."""
        return self.versions.respond(
            request,
            self._reference(request),
            lambda model: self.predictor.respond(request, self.reader.read(request, model)),
        )

    def infer(self, request: FunctionRequest, name: str, version: str = "") -> Response:
        """Open Inference Protocol: tensors in, tensors out."""
        return self.versions.respond(
            request,
            self._reference(request, name, version),
            lambda model: self.predictor.respond(request, self.reader.read_tensors(request, model)),
        )

    def explain(self, request: FunctionRequest, name: str = "", version: str = "") -> Response:
        """Which parts of a photo or of tokens decided; `?model=` as `answer`, where the path names none."""
        return self.versions.respond(
            request,
            self._reference(request, name, version),
            lambda model: self.explainer.respond(request, self.reader.read(request, model)),
        )

    def _reference(self, request: FunctionRequest, name: str = "", version: str = "") -> str:
        return model_reference(name, version) if name else request.query.get("model", self._default)
