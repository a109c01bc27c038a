"""From an inference request to its response: inputs, execution on the model's route, prediction."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from flask import Response

from isthmus.arrays import Array
from isthmus.codecs import EncodedTensor
from isthmus.errors import (
    HopError,
    HopRejected,
    ImageMalformed,
    IsthmusError,
    MediaUnsupported,
    RequestMalformed,
    RequestTooLarge,
)
from isthmus.oip.request import InferRequest
from isthmus.pipeline import Interruption, LocalHop, Result, Route, execute, execute_resumably
from isthmus.processing.image import check_classifies, model_input
from isthmus.processing.image_budget import ImageMemory
from isthmus.routing import (
    DEGRADED_HEADER,
    EXIT_HEADER,
    ROUTE_HEADER,
    Attempt,
    Comparison,
    Dispatcher,
    Guard,
    RouteCandidate,
    ServedModel,
)
from isthmus.serving.deferral import CutOff, Deferred, Resumable, tail_wait, takes_continuation
from isthmus.serving.error_responses import error_document
from isthmus.serving.inference import InferenceRequest
from isthmus.serving.metrics import FunctionMetrics, hop_label
from isthmus.serving.request import FunctionRequest, Timings
from isthmus.serving.response_bodies import photo_document, tensor_response
from isthmus.settings import RouterSettings

# Errors that a photo causes in a hop that decodes photos.
_PHOTO_ERRORS = {c.__name__: c for c in (ImageMalformed, MediaUnsupported, RequestTooLarge)}


class Predictor:
    """Executes inference requests and builds their responses."""

    def __init__(
        self,
        settings: RouterSettings,
        dispatcher: Dispatcher,
        guard: Guard,
        comparison: Comparison,
        images: ImageMemory,
        metrics: FunctionMetrics,
        log: logging.Logger,
    ) -> None:
        self._settings, self._guard, self._images = settings, guard, images
        self._comparison = comparison
        self._dispatcher = dispatcher
        self._metrics, self._log = metrics, log
        self._hop_label = partial(hop_label, settings)

    def respond(self, request: FunctionRequest, inference: InferenceRequest) -> Response:
        """The response to an inference request.

        Raises:
            MediaUnsupported: a photo for a model that declares no processing of photos.
            Further errors as decoding a photo and executing the route.
        """
        self._dispatcher.own_work.begin()
        try:
            response = self._response(request, inference)
        except Deferred as e:
            response = e.response(request, inference)
        self._dispatcher.own_work.end(request.timings.cpu_began, len(inference.batch))
        if inference.event is not None:
            source = f"/models/{inference.model.name}/versions/{inference.model.version}"
            response.headers.extend(inference.event.response_headers(request.context.call_id, source))
        return response

    def _response(self, request: FunctionRequest, inference: InferenceRequest) -> Response:
        if inference.tensors is not None:
            return self._tensors(request, inference, inference.tensors)
        bundle = inference.model.bundle
        check_classifies(bundle, f"send tensors to /v2/models/{bundle.name}/infer")
        model = {"model_name": inference.model.name, "model_version": inference.model.version}
        document: dict[str, Any] = {"id": request.context.call_id, **model}
        if inference.objects or inference.ignored:
            document["predictions"] = self._objects(request, inference)
            document["ignored"] = list(inference.ignored)
        elif inference.batch:
            document["predictions"] = self._batch(request, inference)
        else:
            document |= self._photo(request, inference, inference.photo)
        # UTF-8 as it is: labels may be in any script, and escapes would double them.
        return Response(json.dumps(document, ensure_ascii=False), mimetype="application/json")

    def run(
        self,
        request: FunctionRequest,
        route: Route,
        inputs: Mapping[str, Array],
        encoded: Mapping[str, EncodedTensor] | None = None,
    ) -> Result:
        """Execute a route as it is, without guard, and count its calls and stages.

        Raises:
            As `execute`.
        """
        try:
            result = execute(route, inputs, request.context, encoded)
        except HopError as e:
            self._count_error(e)
            raise
        self._record(request, result)
        return result

    def predict(self, request: FunctionRequest, model: ServedModel, inputs: Mapping[str, Array]) -> Result:
        """The model's outputs along the route that the dispatcher chooses; a request may take several.

        Raises:
            As `execute`.
        """
        work, began = self._dispatcher.own_work, time.thread_time()
        work.begin()

        result = self._dispatch(
            request,
            InferenceRequest(model),
            # Without sizes: a later hop that is away gives an error and no continuation.
            lambda candidate, context: self._execute(request._replace(context=context), candidate, inputs, {}, None),
        )
        self._comparison.watch(model, result.comparable, inputs)
        work.end(began, 1)
        return result

    def _objects(self, request: FunctionRequest, inference: InferenceRequest) -> list[dict[str, Any]]:
        """A prediction for each object of a notification, with its URL.

        Raises:
            IsthmusError: of the only object.
        """
        if len(inference.batch) == 1 and isinstance(error := inference.batch[0], IsthmusError):
            raise error
        predictions = self._batch(request, inference)
        return [{"object": item.url, **each} for item, each in zip(inference.objects, predictions, strict=True)]

    def _tensors(self, request: FunctionRequest, inference: InferenceRequest, tensors: InferRequest) -> Response:
        model = inference.model
        result = self._dispatch(
            request,
            inference,
            lambda candidate, context: self._execute(
                request._replace(context=context), candidate, tensors.inputs, {}, {}
            ),
        )
        self._comparison.watch(model, result.comparable, tensors.inputs)
        return tensor_response(request, model, tensors, result)

    def _batch(self, request: FunctionRequest, inference: InferenceRequest) -> list[dict[str, Any]]:
        """A prediction for each photo, one after the other: a batch takes one slot, and the memory of one photo.

        An error that a photo causes stands in place of its prediction; any other error is the whole request's.
        """
        predictions = []
        stages: list[Timings] = []
        for photo in inference.batch:
            # Each prediction reports its own stages, the response their sums.
            stages.append(Timings())
            try:
                if isinstance(photo, IsthmusError):
                    document = error_document(photo, expose_details=self._settings.expose_details)
                else:
                    document = self._photo(request._replace(timings=stages[-1]), inference, photo)
            except (*_PHOTO_ERRORS.values(), RequestMalformed) as e:
                document = error_document(e, expose_details=self._settings.expose_details)
            predictions.append(document)
        request.timings.merge(stages)
        return predictions

    def _photo(self, request: FunctionRequest, inference: InferenceRequest, photo: bytes) -> dict[str, Any]:
        """The prediction for one photo, as a document."""
        model, sizes = inference.model, {"photo_bytes": len(photo)}
        result = self._dispatch(
            request,
            inference,
            lambda candidate, context: self._photo_along(
                request._replace(context=context), inference, photo, candidate, sizes
            ),
        )
        self._comparison.watch(model, result.comparable, photo)
        segments = self.segment_documents(result)
        return photo_document(request, model, result, inference.top_k, sizes, segments)

    def _photo_along(
        self,
        request: FunctionRequest,
        inference: InferenceRequest,
        photo: bytes,
        selected: RouteCandidate,
        sizes: dict[str, int],
    ) -> Result:
        """The photo's result along a candidate, which decides who decodes the photo."""
        model = inference.model
        encoded: Mapping[str, EncodedTensor] = {}
        inputs: Mapping[str, Array] = {}
        redactor = None if model.redactor is None else model.redactor.counting(sizes)
        start = time.perf_counter()
        if selected.photo is not None:
            encoded = selected.photo.encode(
                photo, max_pixels=self._settings.max_image_pixels, memory=self._images, redactor=redactor
            )
            sizes["input_bytes"] = selected.photo.nbytes
        else:
            inputs = model_input(
                model.bundle,
                photo,
                max_pixels=self._settings.max_image_pixels,
                memory=self._images,
                redactor=redactor,
            )
            sizes["input_bytes"] = sum(array.nbytes for array in inputs.values())
        preprocess_s = time.perf_counter() - start
        if selected.photo is None or selected.photo.compresses:
            request.timings.add("preprocess", preprocess_s)
        # The rest of a batch has no place in a continuation of one photo.
        result = self._execute(request, selected, inputs, encoded, None if inference.batch else sizes)
        return replace(result, preprocess_s=preprocess_s)

    def _dispatch(self, request: FunctionRequest, inference: InferenceRequest, attempt: Attempt) -> Result:
        """The result along the route that the dispatcher chooses, or that the caller pinned.

        Raises:
            Deferred: no exact route gave a result. A caller that takes a continuation gets no degraded answer, for it
                can have the model's own later.
        """
        pin, resumable = request.headers.get(ROUTE_HEADER, ""), Resumable(attempt)
        exact_only = takes_continuation(request) and not inference.batch
        try:
            result = self._dispatcher.run(
                inference.model,
                request.context,
                pin,
                resumable,
                exact_only=exact_only,
                may_exit=may_exit(request, inference.tensors),
            )
        except HopError as e:
            result = resumable.instead(e)
            self._record(request, result)
        model = inference.model
        request.facts.update(model=model.name, version=model.version, route=result.route, degraded=result.degraded)
        if result.exit is not None:
            request.facts.update({name: str(fact) for name, fact in result.exit.facts().items()})
        # The photos of a batch may take several routes.
        for header, text in ((ROUTE_HEADER, result.route), (DEGRADED_HEADER, result.degraded)):
            earlier = request.reply_headers.get(header, "").split("; ")
            if text and text not in earlier:
                request.reply_headers[header] = "; ".join(filter(None, (*earlier, text)))
        return result

    def _execute(
        self,
        request: FunctionRequest,
        selected: RouteCandidate,
        inputs: Mapping[str, Array],
        encoded: Mapping[str, EncodedTensor],
        sizes: dict[str, int] | None,
    ) -> Result:
        """The result; `sizes` are those of a request that may be finished later, None where it may not.

        Raises:
            Deferred: a later hop gave no response, and the caller takes a continuation.
            CutOff: a later hop gave no response, and the exit's unsure prediction may be the result.
            As `execute` otherwise.
        """
        route, fallback = self._guard.apply_fallback(selected.route)
        try:
            result = execute_resumably(route, inputs, request.context, encoded, tail_wait(request))
            if isinstance(result, Interruption):
                raise self._interrupted(request, selected, result, sizes)
        except HopError as e:
            # The hop decoded the photo: its fault is the caller's, not the hop's.
            if encoded and isinstance(e, HopRejected) and (photo_error := _photo_error(e)) is not None:
                raise photo_error from e
            self._count_error(e)
            raise
        self._record(request, result)
        self._dispatcher.met_exit(selected, is_early=result.is_early)
        self._guard.watch(selected.route, fallback, inputs, encoded, result)
        return replace(result, notes=fallback.notes)

    def _interrupted(
        self, request: FunctionRequest, selected: RouteCandidate, met: Interruption, sizes: dict[str, int] | None
    ) -> Exception:
        """What to raise where a hop behind the first gave no response; errors that are no hop's are counted here."""
        self._dispatcher.met_exit(selected, is_early=False)
        if takes_continuation(request) and sizes is not None:
            self._count_error(met.error)
            return Deferred(met, sizes)
        if selected.answers_unsure and (unsure := met.unsure()) is not None:
            self._count_error(met.error)
            return CutOff(met, unsure, selected.name)
        return met.error

    def _record(self, request: FunctionRequest, result: Result) -> None:
        """Timings and metrics of a result."""
        segments = result.segments
        for i, run in enumerate(result.runs):
            name = stage_name(i, segments)
            request.timings.add(name, run.total_s, run.segment)
            request.timings.add(f"{name}-run", run.run_s, run.segment)
            if run.codecs:
                request.timings.add(f"{name}-pack", run.encode_s, run.segment)
            # A closer look sends more of the same tensors.
            tensor_bytes = run.raw_bytes if i < segments else 0
            self._metrics.count_call(self._hop_label(run.hop), tensor_bytes, run.sent_bytes, run.received_bytes)
        if result.exit is not None:
            self._metrics.count_exit("taken" if result.is_early else "cut_off" if result.degraded else "unsure")
        if (looks := result.closer_looks) is None:
            return
        self._metrics.count_looks(looks)
        if (error := looks.error) is not None:
            if isinstance(error, HopError):
                self._count_error(error)
            facts = {"hop": error.facts.get("hop", ""), "type": type(error).__name__, "error": error.message}
            self._log.warning("a closer look failed; the answer before it stands", extra={"facts": facts})

    def segment_documents(self, result: Result) -> list[dict[str, Any]]:
        """The runs of a result, for a response; the URL of a hop is a detail."""
        segments = result.segments
        if self._settings.expose_details:
            return [run.document() for run in result.runs]
        return [
            run.document() | ({} if run.hop == LocalHop.name else {"hop": stage_name(i, segments)})
            for i, run in enumerate(result.runs)
        ]

    def _count_error(self, error: HopError) -> None:
        self._metrics.hop_errors.labels(self._hop_label(error.facts.get("hop", "")), type(error).__name__).inc()


def may_exit(request: FunctionRequest, tensors: InferRequest | None) -> bool:
    """Whether an exit's prediction will do, by the header Isthmus-Exit and the parameter isthmus.exit.

    Raises:
        RequestMalformed: the header is neither `on` nor `off`.
    """
    text = request.headers.get(EXIT_HEADER, "").strip().lower()
    if text not in ("", "on", "off"):
        raise RequestMalformed(f"{EXIT_HEADER} is {text[:40]!r}; it is on or off", header=EXIT_HEADER)
    return text != "off" and (tensors is None or tensors.may_exit)


def stage_name(index: int, segments: int) -> str:
    """The name of a segment run in timings; runs after the first `segments` are of closer looks."""
    return f"hop{index}" if index < segments else f"again{index - segments}"


def _photo_error(error: HopRejected) -> IsthmusError | None:
    """A hop's rejection of an encoded photo as the router's own error; None for any other rejection."""
    document = error.facts.get("error")
    if not isinstance(document, Mapping) or (cls := _PHOTO_ERRORS.get(str(document.get("type")))) is None:
        return None
    facts = document.get("facts")
    return cls(str(document.get("error", "")), **(dict(facts) if isinstance(facts, Mapping) else {}))
