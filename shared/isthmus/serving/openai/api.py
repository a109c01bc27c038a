"""The paths of the OpenAI API; the tokenizer and the templates are loaded with the first request."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from flask import Response

from isthmus.registry import Registry
from isthmus.routing import Dispatcher
from isthmus.serving.app import FunctionApp
from isthmus.serving.generation_metrics import GenerationMetrics
from isthmus.serving.model_list import ModelList
from isthmus.serving.openai.models import OpenAIModels
from isthmus.serving.openai.requests import user_of
from isthmus.serving.prediction import Predictor
from isthmus.serving.request import FunctionRequest
from isthmus.serving.version_choice import VersionChoice
from isthmus.settings import RouterSettings

if TYPE_CHECKING:
    from isthmus.serving.drafts import Drafts
    from isthmus.serving.openai.embeddings import EmbeddingRoutes
    from isthmus.serving.openai.routes import CompletionRoutes


class OpenAIApi:
    """The API, added to `app`."""

    def __init__(
        self,
        app: FunctionApp,
        settings: RouterSettings,
        versions: VersionChoice,
        registry: Registry,
        listing: ModelList,
        dispatcher: Dispatcher,
        predictor: Predictor,
        drafts: Drafts | None,
    ) -> None:
        self._drafts = drafts
        self._settings, self._versions, self._registry = settings, versions, registry
        self._app, self._dispatcher, self._predictor = app, dispatcher, predictor
        # Before the first request too, so that the metrics are there from the start.
        self._metrics = GenerationMetrics(app.metrics, settings.total_replay_bytes)
        self._routes: CompletionRoutes | None = None
        self._embeddings: EmbeddingRoutes | None = None
        self._lock = threading.Lock()
        app.post("/v1/chat/completions", self.chat, "chat_completions", user_of)
        app.post("/v1/completions", self.complete, "completions", user_of)
        app.post("/v1/embeddings", self.embed, "embeddings", user_of)
        OpenAIModels(app, versions.catalog, listing)

    def chat(self, request: FunctionRequest) -> Response:
        """The completion of a conversation, whole or as a stream."""
        return self._loaded().chat(request)

    def complete(self, request: FunctionRequest) -> Response:
        """The completion of a text, whole or as a stream."""
        return self._loaded().complete(request)

    def embed(self, request: FunctionRequest) -> Response:
        """A vector for each text."""
        with self._lock:
            if self._embeddings is None:
                from isthmus.serving.openai.embeddings import EmbeddingRoutes

                self._embeddings = EmbeddingRoutes(self._settings, self._versions, self._registry, self._predictor)
        return self._embeddings.embed(request)

    def _loaded(self) -> CompletionRoutes:
        with self._lock:
            if self._routes is None:
                # 30 ms and 4 MB, which routers of other models never need.
                from isthmus.serving.generations import Generations
                from isthmus.serving.openai.routes import CompletionRoutes

                generations = Generations(self._app, self._settings, self._dispatcher, self._metrics, self._drafts)
                self._routes = CompletionRoutes(self._settings, self._versions, self._registry, generations)
            return self._routes
