"""Lists of models: GET /v2/models, and the repository index of Triton's clients."""

from __future__ import annotations

import msgspec

from isthmus.context import Deadline
from isthmus.errors import RequestMalformed
from isthmus.routing.candidates import ServedModel
from isthmus.routing.catalog import ModelCatalog
from isthmus.serving.access import may_see
from isthmus.serving.api_bodies import (
    IndexEntryBody,
    IndexRequestBody,
    ListedModelBody,
    LoadedVersionBody,
    ModelListBody,
)
from isthmus.settings import RouterSettings


class ModelList:
    """The models that callers may be told of: all where details are exposed, else the setting `model` alone."""

    def __init__(self, catalog: ModelCatalog, settings: RouterSettings) -> None:
        self._catalog = catalog
        self._default = settings.model_name
        # Names of other models are a detail, as in errors.
        self._names = None if settings.expose_details else (self._default,)

    def models(self, deadline: Deadline) -> ModelListBody:
        """Every model with its versions, aliases and known routes.

        Raises:
            As `ModelCatalog.listing`.
        """
        loaded = self._catalog.loaded()
        return ModelListBody(
            [
                ListedModelBody(
                    model.name,
                    list(model.versions),
                    dict(model.aliases),
                    [_loaded_version(each) for each in loaded if each.name == model.name],
                    model.name == self._default,
                )
                for model in self._catalog.listing(self._names, deadline)
                if may_see(model.name)
            ]
        )

    def index(self, body: bytes | memoryview, deadline: Deadline) -> list[IndexEntryBody]:
        """One entry a version; READY are those whose routes are known, the others load with their first request.

        Raises:
            RequestMalformed: the body is neither empty nor a JSON object with a boolean `ready`.
            Further errors as `ModelCatalog.listing`.
        """
        try:
            request = msgspec.json.decode(body, type=IndexRequestBody) if body else IndexRequestBody()
        except (msgspec.DecodeError, RecursionError) as e:
            raise RequestMalformed(f"the body is no repository index request: {e}") from e
        loaded = {(model.name, model.version) for model in self._catalog.loaded()}
        entries = [
            IndexEntryBody(model.name, version, "READY")
            if (model.name, version) in loaded
            else IndexEntryBody(model.name, version, "UNAVAILABLE", "the first request loads it")
            for model in self._catalog.listing(self._names, deadline)
            if may_see(model.name)
            for version in model.versions
        ]
        return [entry for entry in entries if entry.state == "READY" or not request.ready]


def _loaded_version(model: ServedModel) -> LoadedVersionBody:
    selected = model.route
    segments = [str(segment.id) for segment in selected.route.segments]
    return LoadedVersionBody(model.version, segments, "" if selected.planned_s is None else selected.name)
