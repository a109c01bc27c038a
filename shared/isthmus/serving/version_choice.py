"""The version that serves a request: chosen once, and once more where the functions hold another bundle."""

from __future__ import annotations

from collections.abc import Callable

from flask import Response

from isthmus.errors import HopMismatch
from isthmus.routing import ModelCatalog, ServedModel
from isthmus.serving.request import FunctionRequest

VERSION_HEADER = "Isthmus-Version"


class VersionChoice:
    """Runs the handlers of requests with the version that each request gets."""

    def __init__(self, catalog: ModelCatalog) -> None:
        self.catalog = catalog

    def respond(self, request: FunctionRequest, reference: str, respond: Callable[[ServedModel], Response]) -> Response:
        """The response of `respond` with the version that `NAME` or `NAME:VERSION` means for this request.

        Where a function holds another bundle than that version's, the request runs once more, whole, with the version
        that all its functions hold: no response mixes two bundles.

        Raises:
            HopMismatch: the functions hold no common bundle in time, or refused the second run too.
            As `ModelCatalog.get` and `respond`.
        """
        deadline = request.context.deadline
        model = self.catalog.get(reference, deadline)
        try:
            return self._with(request, model, respond)
        except HopMismatch as e:
            # Of the first run: a batch may have noted a route.
            request.reply_headers.clear()
            return self._with(request, self.catalog.renew(reference, e, deadline), respond)

    def _with(
        self, request: FunctionRequest, model: ServedModel, respond: Callable[[ServedModel], Response]
    ) -> Response:
        request.facts.update(model=model.name, version=model.version)
        request.reply_headers[VERSION_HEADER] = f"{model.name}:{model.version}"
        return respond(model)
