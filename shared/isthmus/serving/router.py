"""The router app: photos, JSON and Open Inference Protocol requests in; the route through the segments; answers out."""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from flask import Flask, Response, jsonify

import isthmus
from isthmus import pipeline
from isthmus.errors import HopError, MediaUnsupported, RequestMalformed, SettingsError
from isthmus.hop import hops_to
from isthmus.pipeline import Result, Route
from isthmus.processing.classify import classify
from isthmus.processing.image import looks_like_image, not_an_image, preprocess
from isthmus.registry import open_cache, open_registry
from isthmus.serving import oip
from isthmus.serving.app import FunctionApp, Reply, Work
from isthmus.serving.models import Model, Models
from isthmus.serving.preload import parse, preload
from isthmus.settings import RouterSettings


def create_router_app(settings: RouterSettings) -> Flask:
    """The app that answers the world. It is ready once `settings.model` is known and preloads are in memory.

    Raises:
        SettingsError: a setting that only building can judge.
    """
    app = _RouterApp(settings)
    app.readiness.start()
    return app.flask


class _RouterApp(FunctionApp):
    def __init__(self, settings: RouterSettings) -> None:
        if not settings.registry:
            raise SettingsError(
                "the setting registry is missing: the router reads its model's manifest there", variable="registry"
            )
        _check_hops(settings)
        for entry in settings.preload:
            parse(entry)
        self._router_settings = settings
        self._registry = open_registry(settings)
        self._store = None
        if "local" in settings.hops:
            from isthmus.runners.store import SegmentStore  # a router with remote hops never loads onnxruntime

            self._store = SegmentStore(open_cache(settings, self._registry), settings)
        self._hops = hops_to(
            settings.hops,
            self._store,
            attempts=settings.hop_attempts,
            connect_timeout_s=settings.hop_connect_timeout_s,
            max_reply_bytes=settings.max_request_bytes,
        )
        super().__init__("router", settings, self._prepare)
        self._models = Models(self._registry, settings.refresh_s, self.log)
        if self._store is not None:
            self.metrics.gauge_store(self._store)
        self.work("/", self.any_kind, "answer")
        for of, prefix in (("", "/v2/models/<name>"), ("_version", "/v2/models/<name>/versions/<version>")):
            self.work(f"{prefix}/infer", self.infer, f"infer{of}")
            self.flask.add_url_rule(prefix, f"model{of}", self.metadata, methods=["GET"])
            self.flask.add_url_rule(f"{prefix}/ready", f"model_ready{of}", self.model_ready, methods=["GET"])
        self.flask.add_url_rule("/v2", "server", self.server, methods=["GET"])
        self.flask.add_url_rule("/v2/health/live", "live", lambda: jsonify(live=True), methods=["GET"])
        self.flask.add_url_rule("/v2/health/ready", "server_ready", self.ready, methods=["GET"])

    def any_kind(self, work: Work) -> Reply:
        """A photo, a JSON photo or an Open Inference Protocol request, told apart by content, for `?model=`."""
        model = self._models.get(work.query.get("model", self._router_settings.model))
        if oip.HEADER_LENGTH in work.headers:
            return self._infer(work, model)
        if looks_like_image(work.body):
            return self._photo(work, model, work.body, _top_k(work.query.get("top_k")))
        if work.body[:64].lstrip()[:1] != b"{":
            raise not_an_image(work.body)
        start = time.perf_counter()
        doc = oip.read_document(work.body)
        if "inputs" in doc:
            wanted = oip.parse_document(doc, inputs=model.bundle.inputs, outputs=model.bundle.outputs)
            work.timings.add("decode", time.perf_counter() - start)
            return self._tensors(work, model, wanted)
        if "image" in doc:
            return self._photo(work, model, _base64(doc["image"]), _top_k(doc.get("top_k")))
        raise RequestMalformed(
            "the JSON object has neither inputs (Open Inference Protocol) nor image (base64)", got=sorted(doc)[:20]
        )

    def infer(self, work: Work, name: str, version: str = "") -> Reply:
        """Open Inference Protocol: tensors in, tensors out."""
        return self._infer(work, self._models.get(_reference(name, version)))

    def metadata(self, name: str, version: str = "") -> Response:
        """Open Inference Protocol: what the model takes and gives."""
        model = self._models.get(_reference(name, version))
        versions = [model.version] if version else self._models.versions(model)
        return jsonify(oip.model_metadata(model.name, versions, model.bundle.inputs, model.bundle.outputs))

    def model_ready(self, name: str, version: str = "") -> Response:
        """Open Inference Protocol: 200 once the model's route is known."""
        self.readiness.check()
        model = self._models.get(_reference(name, version))
        self._route(model)
        return jsonify(name=model.name, version=model.version, ready=True)

    def server(self) -> Response:
        """Open Inference Protocol: who answers here."""
        return jsonify(oip.server_metadata("isthmus", isthmus.__version__))

    def _infer(self, work: Work, model: Model) -> Reply:
        start = time.perf_counter()
        wanted = oip.parse_request(
            work.body,
            work.headers.get(oip.HEADER_LENGTH),
            inputs=model.bundle.inputs,
            outputs=model.bundle.outputs,
        )
        work.timings.add("decode", time.perf_counter() - start)
        return self._tensors(work, model, wanted)

    def _tensors(self, work: Work, model: Model, wanted: oip.InferRequest) -> Reply:
        route = self._route(model)
        result = self._run(work, route, wanted.inputs)
        start = time.perf_counter()
        answer = oip.build_response(
            result.outputs,
            wanted,
            model_name=model.name,
            model_version=model.version,
            parameters=result.facts(),
        )
        work.timings.add("encode", time.perf_counter() - start)
        return Reply(answer.body, answer.headers)

    def _photo(self, work: Work, model: Model, photo: bytes, top_k: int | None) -> Reply:
        spec, after = model.bundle.preprocess, model.bundle.postprocess
        if spec is None or after is None:
            raise MediaUnsupported(
                f"{model.name} declares no pre- and post-processing for photos; send tensors to "
                f"/v2/models/{model.name}/infer",
                accepted=["Open Inference Protocol"],
            )
        start = time.perf_counter()
        taken = next(s for s in model.bundle.inputs if s.name == spec["input"])
        array = preprocess(photo, spec, input=taken, max_pixels=self._router_settings.max_image_pixels)
        work.timings.add("preprocess", time.perf_counter() - start)
        route = self._route(model)
        result = self._run(work, route, {taken.name: array})
        start = time.perf_counter()
        classes = classify(result.outputs[after["output"]], after, model.labels, top_k)[0]
        work.timings.add("postprocess", time.perf_counter() - start)
        document = {
            "id": work.context.call_id,
            "model_name": model.name,
            "model_version": model.version,
            "classes": classes,
            "route": {
                "crossed_bytes": result.crossed_bytes,
                "photo_bytes": len(photo),
                "input_bytes": array.nbytes,
                "segments": [stage.document() for stage in result.stages],
            },
            "timings_ms": {name: round(seconds * 1000, 3) for name, seconds, _ in work.timings.stages},
        }
        return Reply(json.dumps(document, ensure_ascii=False).encode(), {"Content-Type": "application/json"})

    def _route(self, model: Model) -> Route:
        # The setting speaks of the default model; another has cuts of its own.
        own = self._router_settings.model.partition(":")[0] == model.name
        cuts = self._router_settings.cuts if own and self._router_settings.cuts else None
        return pipeline.plan_route(model.digest, model.bundle, self._hops, cuts)

    def _run(self, work: Work, route: Route, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Result:
        try:
            result = pipeline.run(route, inputs, work.context)
        except HopError as e:
            self.metrics.hop_errors.labels(e.facts.get("hop", ""), type(e).__name__).inc()
            raise
        for i, stage in enumerate(result.stages):
            work.timings.add(f"hop{i}", stage.total_s, stage.segment)
            work.timings.add(f"hop{i}-run", stage.run_s, stage.segment)
            self.metrics.hop_sent.labels(stage.hop).inc(stage.sent)
            self.metrics.hop_received.labels(stage.hop).inc(stage.received)
        return result

    def _prepare(self) -> None:
        model = self._models.get(self._router_settings.model)
        self._route(model)
        if self._store is not None:
            preload(self._router_settings.preload, self._registry, self._store)


def _check_hops(settings: RouterSettings) -> None:
    for hop in settings.hops:
        if hop != "local" and not _is_url(hop):
            raise SettingsError(
                f"the setting hops holds {hop!r}; a hop is `local` or a URL such as http://HOST:PORT/function/NAME,"
                " without a user or password",
                variable="hops",
                value=hop,
            )
    if not settings.hops:
        raise SettingsError("the setting hops is empty; name at least one hop", variable="hops", value="")


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        # A password would be in every error and metric that names the hop.
        return url.scheme in ("http", "https") and bool(url.hostname) and "@" not in url.netloc and url.port != 0
    except ValueError:
        return False


def _reference(name: str, version: str) -> str:
    return f"{name}:{version}" if version else name


def _top_k(given: Any) -> int | None:
    if given is None:
        return None
    text = str(given)
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) >= 1):
        raise RequestMalformed(f"top_k is {text[:20]!r}; it is a whole number from 1", parameter="top_k")
    return int(text)


def _base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as e:
        raise RequestMalformed("image is not base64 text", parameter="image") from e
