"""Explanations: which parts of a photo, or of a sequence of tokens, decided for a class.

Source: docs/how-to/why.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from flask import Response

from isthmus.arrays import Array
from isthmus.errors import RequestMalformed
from isthmus.pipeline import Result, Route
from isthmus.pipeline.hidden_copies import MAX_BATCH_BYTES
from isthmus.pipeline.occlusion import PADDING_ID, OcclusionRequest, class_scores, occlude
from isthmus.processing.classify import class_index
from isthmus.processing.image import model_input, seen_part
from isthmus.processing.image_budget import ImageMemory
from isthmus.serving.inference import InferenceRequest
from isthmus.serving.prediction import Predictor
from isthmus.serving.redaction import state_redaction
from isthmus.serving.request import FunctionRequest, Timings
from isthmus.settings import RouterSettings


class Explainer:
    """Explains predictions by occlusion along the model's route, without guard, exit and closer looks."""

    def __init__(self, settings: RouterSettings, predictor: Predictor, images: ImageMemory) -> None:
        self._settings, self._predictor, self._images = settings, predictor, images

    def respond(self, request: FunctionRequest, inference: InferenceRequest) -> Response:
        """The response to a request for an explanation; errors as `explain`."""
        document = self.explain(request, inference)
        return Response(json.dumps(document, ensure_ascii=False), mimetype="application/json")

    def explain(self, request: FunctionRequest, inference: InferenceRequest) -> dict[str, Any]:
        """The explanation as a document.

        Raises:
            RequestMalformed: a batch of photos, or a parameter that is none.
            MediaUnsupported: a photo for a model that declares no processing of photos.
            Further errors as `class_scores` and `occlude`.
        """
        if inference.batch:
            raise RequestMalformed("an explanation is of one photo, and the request has several", parameter="images")
        model = inference.model
        inputs, part = self._inputs(request, inference)
        wanted = OcclusionRequest(
            class_scores(model.bundle, request.query.get("output", "")),
            None if (name := request.query.get("class")) is None else class_index(name, model.labels),
            _whole_number(request.query, "grid", 0),
            max_runs=self._settings.explain_runs,
            hidden_id=_whole_number(request.query, "hidden_id", PADDING_ID),
        )
        request.memory.hold(MAX_BATCH_BYTES)
        calls: list[float] = []

        def run(route: Route, arrays: Mapping[str, Array]) -> Result:
            # The stages of the first run are the request's own; dozens of others would fill the headers.
            timings = Timings() if calls else request.timings
            began = time.perf_counter()
            result = self._predictor.run(request._replace(timings=timings), route, arrays)
            calls.append(time.perf_counter() - began)
            return result

        occlusion = occlude(model.route.route.full(), inputs, wanted, run, request.context.deadline)
        request.timings.add("hidden", sum(calls[1:]))
        document = occlusion.document(model.labels)
        document["explanation"] |= {"part": part} if part else {}
        return {
            "id": request.context.call_id,
            "model_name": model.name,
            "model_version": model.version,
            **document,
            "route": {
                "link_bytes": occlusion.link_bytes,
                "segments": self._predictor.segment_documents(occlusion.base),
            },
            "timings_ms": {name: round(seconds * 1000, 3) for name, seconds, _ in request.timings.stages},
        }

    def _inputs(
        self, request: FunctionRequest, inference: InferenceRequest
    ) -> tuple[Mapping[str, Array], tuple[float, ...]]:
        """The model's inputs, and the part of the photo that they are made of; empty for tensors."""
        if inference.tensors is not None:
            return inference.tensors.inputs, ()
        bundle, limits = inference.model.bundle, (self._settings.max_image_pixels, self._images)
        start = time.perf_counter()
        counts: dict[str, int] = {}
        redactor = None if inference.model.redactor is None else inference.model.redactor.counting(counts)
        inputs = model_input(bundle, inference.photo, max_pixels=limits[0], memory=limits[1], redactor=redactor)
        state_redaction(request, counts)
        part = seen_part(inference.photo, bundle.preprocess or {}, max_pixels=limits[0], memory=limits[1])
        request.timings.add("preprocess", time.perf_counter() - start)
        return inputs, part


def _whole_number(query: Mapping[str, str], name: str, default: int) -> int:
    """A parameter's whole number; the default without the parameter.

    Raises:
        RequestMalformed: anything else, zero for a grid included.
    """
    if (text := query.get(name)) is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= (name == "grid")):
        raise RequestMalformed(f"{name} is {text[:20]!r}; it is a whole number", parameter=name)
    return int(text)
