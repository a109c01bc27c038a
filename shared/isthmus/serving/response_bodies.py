"""The bodies of predictions: classes of a photo, tensors by the Open Inference Protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from flask import Response

from isthmus.oip import messages as oip
from isthmus.pipeline import Result
from isthmus.processing.classify import classify
from isthmus.routing.candidates import ServedModel
from isthmus.serving.redaction import state_redaction
from isthmus.serving.request import FunctionRequest


def tensor_response(
    request: FunctionRequest, model: ServedModel, tensors: oip.InferRequest, result: Result
) -> Response:
    """The response that an Open Inference Protocol request asked for."""
    start = time.perf_counter()
    # Before the response exists: numbers as JSON take many times their bytes.
    request.memory.hold(oip.response_bytes(result.outputs, tensors))
    response = oip.build_response(
        result.outputs, tensors, model_name=model.name, model_version=model.version, parameters=result.facts()
    )
    request.timings.add("encode", time.perf_counter() - start)
    return Response(response.body, headers=response.headers)


def photo_document(
    request: FunctionRequest,
    model: ServedModel,
    result: Result,
    top_k: int | None,
    sizes: Mapping[str, int],
    segments: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Classes and route of one photo; `sizes` are the bytes of the photo and of the model's input."""
    start = time.perf_counter()
    postprocess = model.bundle.postprocess or {}
    classes = classify(result.outputs[postprocess["output"]], postprocess, model.labels, top_k)[0]
    request.timings.add("postprocess", time.perf_counter() - start)
    state_redaction(request, sizes)
    return {
        "classes": classes,
        "route": {
            **({"name": result.route} if result.route else {}),
            **({"degraded": result.degraded} if result.degraded else {}),
            **result.sizes(),
            **sizes,
            "segments": list(segments),
            **result.gates(),
            **result.notes,
        },
        "timings_ms": {name: round(seconds * 1000, 3) for name, seconds, _ in request.timings.stages},
    }
