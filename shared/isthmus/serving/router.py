"""The router app: photos, JSON and Open Inference Protocol requests in; the route through the segments; answers out."""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from flask import Flask, Response, jsonify

import isthmus
from isthmus.artifacts import fidelity_document
from isthmus.codecs import EncodedTensor
from isthmus.context import Deadline
from isthmus.errors import HopError, HopRejected, IsthmusError, MediaUnsupported, RequestMalformed, SettingsError
from isthmus.http.pool import is_url
from isthmus.oip import messages as oip
from isthmus.pipeline import LocalHop, Result, execute
from isthmus.pipeline.hop import hops_to
from isthmus.processing.classify import classify
from isthmus.processing.image import looks_like_image, not_an_image
from isthmus.processing.image_budget import ImageMemory
from isthmus.processing.photo import model_input
from isthmus.processing.wrapped import from_base64, looks_like_form, read_form
from isthmus.registry import open_cache, open_registry
from isthmus.routing.guard import Guard
from isthmus.runtime.tables import Tables
from isthmus.serving import by_hand
from isthmus.serving.app import FunctionApp
from isthmus.serving.memory import Turns
from isthmus.serving.models import Model, Models
from isthmus.serving.preload import MAX_LOAD_S, parse, preload
from isthmus.serving.routes import Routes, Way, of_the_photo
from isthmus.serving.work import Reply, Work
from isthmus.settings import RouterSettings


def create_router_app(settings: RouterSettings) -> Flask:
    """The app that answers the world. It is ready once `settings.model` is known and preloads are in memory.

    Raises:
        SettingsError: a setting that only building can judge.
    """
    app = _RouterApp(settings)
    app.readiness.start()
    return app.flask


class _JsonPhoto(NamedTuple):
    """A photo that came as JSON."""

    data: bytes
    top_k: int | None


class _RouterApp(FunctionApp):
    def __init__(self, settings: RouterSettings) -> None:
        if not settings.registry:
            raise SettingsError(
                "the setting registry is missing: the router reads its model's manifest there", variable="registry"
            )
        _check_hops(settings)
        codec = by_hand.chosen(settings)
        for entry in settings.preload:
            parse(entry)
        self._router_settings = settings
        self._registry = open_registry(settings)
        self._store = None
        if "local" in settings.hops:
            from isthmus.runtime.store import SegmentStore  # a router with remote hops never loads onnxruntime

            self._store = SegmentStore(open_cache(settings, self._registry), settings)
        self._hops = hops_to(
            settings.hops,
            self._store,
            attempts=settings.hop_attempts,
            connect_timeout_s=settings.hop_connect_timeout_s,
            max_reply_bytes=settings.max_request_bytes,
        )
        super().__init__("router", settings, self._prepare)
        self._images = ImageMemory(settings.image_memory_bytes)
        self._tables = Tables(
            self._registry.bundle, self._registry.blob, settings.max_image_pixels, memory=self._images
        )
        self._turns = Turns(1)  # parsing JSON holds Python's lock all the while
        self._guard = Guard(
            settings.guard_share,
            lambda bundle: fidelity_document.read(bundle, self._registry.blob),
            self.metrics,
            self.log,
            deadline_s=settings.deadline_s,
        )
        self._routes = Routes(settings, self._registry, self._hops, self._tables, codec)
        self._models = Models(self._registry, settings.refresh_s, self.log, self._routes.of)
        if self._store is not None:
            self.closing.callback(self._store.close)
            self.metrics.gauge_store(self._store)
        for hop in self._hops:
            self.closing.callback(hop.close)
        for part in (self._tables, self._models, self._guard):
            self.closing.callback(part.close)
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
        model = self._models.get(work.query.get("model", self._router_settings.model), work.context.deadline)
        if oip.HEADER_LENGTH in work.headers:
            return self._infer(work, model)
        body = self._bytes(work)
        if looks_like_image(body):
            return self._photo(work, model, body, _top_k(work.query.get("top_k")))
        if looks_like_form(body):
            return self._form(work, model, body)
        if body[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":
            raise not_an_image(body)
        asked = self._read_json(work, model, body)
        if isinstance(asked, oip.InferRequest):
            return self._tensors(work, model, asked)
        return self._photo(work, model, asked.data, asked.top_k)

    def _form(self, work: Work, model: Model, body: bytes) -> Reply:
        """A photo in a form, with top_k as a field of it or in the query."""
        work.memory.hold(len(body))  # the photo is a copy
        form = read_form(body)
        if unknown := sorted(form.fields.keys() - {"top_k"}):
            raise RequestMalformed(
                f"the form has the fields {', '.join(unknown)[:200]}; beside the photo it may have top_k",
                parameter=unknown[0][:80],
                hint="name another model in the URL: ?model=NAME",
            )
        if not looks_like_image(form.photo):
            raise not_an_image(form.photo)
        return self._photo(work, model, form.photo, _top_k(form.fields.get("top_k", work.query.get("top_k"))))

    def infer(self, work: Work, name: str, version: str = "") -> Reply:
        """Open Inference Protocol: tensors in, tensors out."""
        return self._infer(work, self._models.get(_reference(name, version), work.context.deadline))

    def metadata(self, name: str, version: str = "") -> Response:
        """Open Inference Protocol: what the model takes and gives."""
        with self.asking() as deadline:
            model = self._models.get(_reference(name, version), deadline)
            versions = [model.version] if version else self._models.versions(model, deadline)
        return jsonify(oip.model_metadata(model.name, versions, model.bundle.inputs, model.bundle.outputs))

    def model_ready(self, name: str, version: str = "") -> Response:
        """Open Inference Protocol: 200 once the model's route is known."""
        self.readiness.check()
        with self.asking() as deadline:
            model = self._models.get(_reference(name, version), deadline)
        self._routes.of(model)
        return jsonify(name=model.name, version=model.version, ready=True)

    def server(self) -> Response:
        """Open Inference Protocol: who answers here."""
        return jsonify(oip.server_metadata("isthmus", isthmus.__version__))

    @staticmethod
    def _bytes(work: Work) -> bytes:
        """The body in one piece of its own, which pictures are decoded from."""
        if isinstance(work.body, bytes):
            return work.body
        work.memory.hold(len(work.body))
        return bytes(work.body)

    def _read_json(self, work: Work, model: Model, body: bytes) -> oip.InferRequest | _JsonPhoto:
        """What a JSON body asks for. What parsing takes is held until that is done, what came of it until the response.

        Raises:
            RequestMalformed: it is neither a photo nor a request of the Open Inference Protocol.
        """
        start = time.perf_counter()
        with self._turns.one(work.context.deadline), work.memory.scope():
            doc = oip.read_document(body, reserve=work.memory.hold)
            asked = _asked(doc, model)
            del doc
        work.memory.hold(len(asked.data) if isinstance(asked, _JsonPhoto) else asked.own_bytes)
        work.timings.add("decode", time.perf_counter() - start)
        return asked

    def _infer(self, work: Work, model: Model) -> Reply:
        first = bytes(work.body[:256])
        if looks_like_image(first) or looks_like_form(first):
            raise MediaUnsupported(
                "the body is a photo or a form, and here tensors are taken",
                accepted=["Open Inference Protocol"],
                hint=f"POST a photo to /?model={model.name}",
            )
        start = time.perf_counter()
        with self._turns.one(work.context.deadline), work.memory.scope():
            wanted = oip.parse_request(
                work.body,
                work.headers.get(oip.HEADER_LENGTH),
                inputs=model.bundle.inputs,
                outputs=model.bundle.outputs,
                reserve=work.memory.hold,
            )
        work.memory.hold(wanted.own_bytes)
        work.timings.add("decode", time.perf_counter() - start)
        return self._tensors(work, model, wanted)

    def _tensors(self, work: Work, model: Model, wanted: oip.InferRequest) -> Reply:
        result = self._run(work, self._routes.of(model), wanted.inputs)
        start = time.perf_counter()
        work.memory.hold(oip.response_bytes(result.outputs, wanted))
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
        way = self._routes.of(model)
        if way.photo is not None:
            encoded = way.photo.encode(photo)
            input_bytes = way.photo.nbytes
            result = self._run(work, way, {}, encoded)
        else:
            start = time.perf_counter()
            inputs = model_input(model.bundle, photo, max_pixels=self._settings.max_image_pixels, memory=self._images)
            input_bytes = sum(array.nbytes for array in inputs.values())
            work.timings.add("preprocess", time.perf_counter() - start)
            result = self._run(work, way, inputs)
        start = time.perf_counter()
        classes = classify(result.outputs[after["output"]], after, model.labels, top_k)[0]
        work.timings.add("postprocess", time.perf_counter() - start)
        document = {
            "id": work.context.call_id,
            "model_name": model.name,
            "model_version": model.version,
            "classes": classes,
            "route": {
                **result.sizes(),
                "photo_bytes": len(photo),
                "input_bytes": input_bytes,
                "segments": self._stages(result, way),
                **result.looks(),
                **result.notes,
            },
            "timings_ms": {name: round(seconds * 1000, 3) for name, seconds, _ in work.timings.stages},
        }
        return Reply(json.dumps(document, ensure_ascii=False).encode(), {"Content-Type": "application/json"})

    def _run(
        self,
        work: Work,
        way: Way,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        encoded: Mapping[str, EncodedTensor] | None = None,
    ) -> Result:
        taken, standing = self._guard.safer(way.route)
        try:
            result = execute(taken, inputs, work.context, encoded)
        except HopError as e:
            if encoded and isinstance(e, HopRejected) and (said := of_the_photo(e)) is not None:
                raise said from e
            self._count(e)
            raise
        once = len(taken.segments)
        for i, stage in enumerate(result.runs):
            name = stage_name(i, once)
            work.timings.add(name, stage.total_s, stage.segment)
            work.timings.add(f"{name}-run", stage.run_s, stage.segment)
            if stage.codecs:
                work.timings.add(f"{name}-pack", stage.encode_s, stage.segment)
            # A closer look sends more of the same tensors.
            tensors = stage.raw_bytes if i < once else 0
            hop = self._hop_label(stage.hop)
            work.later.append(partial(self.metrics.crossed, hop, tensors, stage.sent_bytes, stage.received_bytes))
        if result.closer_looks is not None:
            self.metrics.looked(result.closer_looks)
            if (error := result.closer_looks.error) is not None:
                self._failed(error)
        self._guard.watch(way.route, standing, inputs, encoded or {}, result)
        notes = {**way.notes, **standing.notes}
        return replace(result, notes=notes) if notes else result

    def _stages(self, result: Result, way: Way) -> list[dict[str, Any]]:
        """The stages as responses show them; a hop's URL is a detail."""
        once = len(way.route.segments)
        if self._settings.expose_details:
            return [stage.document() for stage in result.runs]
        return [
            stage.document() | ({} if stage.hop == LocalHop.name else {"hop": stage_name(i, once)})
            for i, stage in enumerate(result.runs)
        ]

    def _failed(self, error: IsthmusError) -> None:
        """Tell of a closer look that an answer had to do without."""
        if isinstance(error, HopError):
            self._count(error)
        facts = {"hop": error.facts.get("hop", ""), "type": type(error).__name__, "error": error.message}
        self.log.warning("a closer look failed; the answer before it stands", extra={"facts": facts})

    def _count(self, error: HopError) -> None:
        self.metrics.hop_errors.labels(self._hop_label(error.facts.get("hop", "")), type(error).__name__).inc()

    def _hop_label(self, hop: str) -> str:
        """What metrics, which anybody may read, call a hop: its place in the setting; its URL is a detail."""
        if self._settings.expose_details or hop == LocalHop.name or hop not in self._router_settings.hops:
            return hop
        return stage_name(self._router_settings.hops.index(hop), len(self._router_settings.hops))

    def _prepare(self) -> None:
        self._models.forget(self._router_settings.model)
        model = self._models.get(self._router_settings.model, Deadline.after(MAX_LOAD_S))
        self._routes.of(model)
        if self._store is not None:
            preload(self._router_settings.preload, self._registry, self._store)


def stage_name(index: int, once: int) -> str:
    """What timings call a stage; those after the first `once` are of closer looks."""
    return f"hop{index}" if index < once else f"again{index - once}"


def _asked(doc: Mapping[str, Any], model: Model) -> oip.InferRequest | _JsonPhoto:
    """What a JSON object asks for.

    Raises:
        RequestMalformed: it is neither a photo nor a request of the Open Inference Protocol.
    """
    if doc.get("inputs") is not None:
        return oip.parse_document(doc, inputs=model.bundle.inputs, outputs=model.bundle.outputs)
    if "image" in doc:
        return _JsonPhoto(from_base64(doc["image"]), _top_k(doc.get("top_k")))
    raise RequestMalformed(
        "the JSON object has neither inputs (Open Inference Protocol) nor image (base64)", got=sorted(doc)[:20]
    )


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
    # A password would be in every error and metric that names the hop.
    return is_url(text) and "@" not in urlsplit(text).netloc


def _reference(name: str, version: str) -> str:
    return f"{name}:{version}" if version else name


def _top_k(given: Any) -> int | None:
    if given is None:
        return None
    text = str(given)
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) >= 1):
        raise RequestMalformed(f"top_k is {text[:20]!r}; it is a whole number from 1", parameter="top_k")
    return int(text)
