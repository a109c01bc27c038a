"""POST /continue: the rest of a request whose tail could not be reached earlier, and the response of the whole."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from flask import Response

from isthmus.arrays import DTYPES
from isthmus.artifacts.tensors import TensorType, check_types
from isthmus.codecs import Tables
from isthmus.errors import RequestMalformed
from isthmus.oip.request import InferRequest, OutputRequest
from isthmus.pipeline import LoopbackHop
from isthmus.pipeline.continuation import Continuation, decode_continuation
from isthmus.routing.catalog import ModelCatalog
from isthmus.serving.prediction import Predictor
from isthmus.serving.redaction import PHOTO_COUNTS
from isthmus.serving.request import FunctionRequest
from isthmus.serving.response_bodies import photo_document, tensor_response


class Continuer:
    """Finishes continuations along the model's present route.

    Units: `max_bytes` bounds the decoded tensors of each. `tables` are those of calibrated codecs.
    """

    def __init__(self, catalog: ModelCatalog, predictor: Predictor, tables: Tables, max_bytes: int) -> None:
        self._catalog, self._predictor = catalog, predictor
        self._tables, self._max_bytes = tables, max_bytes

    def respond(self, request: FunctionRequest) -> Response:
        """The response that the whole request would have had, with the runs of its later segments.

        Raises:
            RequestMalformed, FrameMalformed, FrameTooLarge, ShapeMismatch: no continuation of this model.
            PlanMismatch, Missing: the version is gone, or another bundle now.
            Further errors as executing the route.
        """
        request.memory.hold(len(request.body))  # payloads are copies
        rest = decode_continuation(request.body, max_bytes=self._max_bytes)
        model = self._catalog.get(f"{rest.model}:{rest.version}", request.context.deadline)
        route = rest.route(model.route.route)
        types = {name: TensorType(array.dtype.name, array.shape) for name, array in rest.tensors.items()}
        check_types(route.inputs, types | {n: TensorType(t.dtype, t.shape) for n, t in rest.encoded.items()})
        if rest.encoded and not route.hops[0].encodes:  # a new plan may run the tail in the router's own process
            request.memory.hold(sum(math.prod(t.shape) * DTYPES[t.dtype].itemsize for t in rest.encoded.values()))
            near = LoopbackHop(route.hops[0], self._tables, max_bytes=self._max_bytes)
            route = replace(route, hops=(near, *route.hops[1:]))
        result = self._predictor.run(request, route, rest.tensors, rest.encoded)
        if "outputs" in rest.notes:
            return tensor_response(request, model, _tensor_request(rest), result)
        redacted = [name for name in PHOTO_COUNTS if name in rest.notes]
        sizes = {name: _number(rest, name) for name in ("photo_bytes", "input_bytes", *redacted)}
        segments = self._predictor.segment_documents(result)
        top_k = _number(rest, "top_k") or None
        document = photo_document(request, model, result, top_k, sizes, segments)
        head = {"id": request.context.call_id, "model_name": model.name, "model_version": model.version}
        return Response(json.dumps(head | document, ensure_ascii=False), mimetype="application/json")


def _number(rest: Continuation, name: str) -> int:
    value: Any = rest.notes.get(name, 0)
    if type(value) is not int or not 0 <= value < 2**62:
        raise RequestMalformed(f"the continuation's note {name} is no whole number")
    return value


def _tensor_request(rest: Continuation) -> InferRequest:
    outputs = rest.notes["outputs"]
    if not isinstance(outputs, list) or not all(
        len(each) == 2 and isinstance(each[0], str) and isinstance(each[1], bool) for each in outputs
    ):
        raise RequestMalformed("the continuation's note outputs is no list of names and flags")
    return InferRequest(
        {}, tuple(OutputRequest(name, binary) for name, binary in outputs), str(rest.notes.get("id", ""))
    )
