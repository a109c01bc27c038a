"""An inference request of any kind: photos, raw, in a form or as base64 in JSON, or Open Inference Protocol tensors.

The body's first bytes decide the kind, not Content-Type. Source: docs/reference/api.md.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.admission import Turns
from isthmus.errors import IsthmusError, MediaUnsupported, RequestMalformed
from isthmus.oip import messages as oip
from isthmus.processing.media import (
    BATCH_FIELD,
    check_count,
    from_base64,
    looks_like_form,
    looks_like_image,
    not_an_image,
    read_form,
)
from isthmus.routing.catalog import ServedModel
from isthmus.serving.request import FunctionRequest


@dataclass(frozen=True)
class InferenceRequest:
    """A request for predictions of `model`: a photo, a batch of photos, or else tensors.

    A photo of a batch that cannot be read is its error. `top_k` bounds the classes of a photo's prediction; None leaves
    that to the bundle.
    """

    model: ServedModel
    photo: bytes = b""
    batch: tuple[bytes | IsthmusError, ...] = ()
    top_k: int | None = None
    tensors: oip.InferRequest | None = None


class InferenceReader:
    """Reads inference requests, JSON of a single request at a time."""

    def __init__(self) -> None:
        self._turns = Turns(1)  # parsing JSON holds Python's lock all the while

    def read(self, request: FunctionRequest, model: ServedModel) -> InferenceRequest:
        """Read a request of any kind.

        Raises:
            MediaUnsupported, ImageMalformed: the body is of no known kind.
            RequestMalformed, RequestTooLarge, ShapeMismatch: as its kind's reader; Overloaded: as `Reservation.hold`.
        """
        if oip.HEADER_LENGTH in request.headers:
            return self.read_tensors(request, model)
        body = _contiguous(request)
        if looks_like_image(body):
            return InferenceRequest(model, body, top_k=parse_top_k(request.query.get("top_k")))
        if looks_like_form(body):
            return _read_form(request, model, body)
        if body[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":
            raise not_an_image(body)
        return self._read_json(request, model, body)

    def read_tensors(self, request: FunctionRequest, model: ServedModel) -> InferenceRequest:
        """Read an Open Inference Protocol request, JSON with or without binary tensors.

        Raises:
            MediaUnsupported: the body is a photo or a form.
            RequestMalformed, RequestTooLarge, ShapeMismatch: as `oip.parse_request`; Overloaded: as `Reservation.hold`.
        """
        # Enough for the magic of any picture and the first lines of a form.
        first = bytes(request.body[:256])
        if looks_like_image(first) or looks_like_form(first):
            raise MediaUnsupported(
                "the body is a photo or a form, and here tensors are taken",
                accepted=["Open Inference Protocol"],
                hint=f"POST a photo to /?model={model.name}",
            )
        start = time.perf_counter()
        with self._turns.one(request.context.deadline), request.memory.scope():
            tensors = oip.parse_request(
                request.body,
                request.headers.get(oip.HEADER_LENGTH),
                inputs=model.bundle.inputs,
                outputs=model.bundle.outputs,
                reserve=request.memory.hold,
            )
        request.memory.hold(tensors.own_bytes)
        request.timings.add("decode", time.perf_counter() - start)
        return InferenceRequest(model, tensors=tensors)

    def _read_json(self, request: FunctionRequest, model: ServedModel, body: bytes) -> InferenceRequest:
        start = time.perf_counter()
        # Parsing takes many times the text's size, for its duration; only the result's size stays until the response.
        with self._turns.one(request.context.deadline), request.memory.scope():
            doc = oip.read_document(body, reserve=request.memory.hold)
            inference = _from_document(doc, model)
            del doc
        request.memory.hold(_own_bytes(inference))
        request.timings.add("decode", time.perf_counter() - start)
        return inference


def parse_top_k(value: Any) -> int | None:
    """The parameter `top_k`, a whole number from 1; None without the parameter.

    Raises:
        RequestMalformed: anything else.
    """
    if value is None:
        return None
    text = str(value)
    # Five digits hold any number of classes; int() of a long text takes quadratic time.
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) >= 1):
        raise RequestMalformed(f"top_k is {text[:20]!r}; it is a whole number from 1", parameter="top_k")
    return int(text)


def _own_bytes(inference: InferenceRequest) -> int:
    """Bytes of an inference request beside its body."""
    if inference.tensors is not None:
        return inference.tensors.own_bytes
    return len(inference.photo) + sum(len(photo) for photo in inference.batch if isinstance(photo, bytes))


def _contiguous(request: FunctionRequest) -> bytes:
    """The body as bytes, for picture decoders."""
    if isinstance(request.body, bytes):
        return request.body
    request.memory.hold(len(request.body))
    return bytes(request.body)


def _read_form(request: FunctionRequest, model: ServedModel, body: bytes) -> InferenceRequest:
    """Photos in a form, with top_k as another field or in the query."""
    request.memory.hold(len(body))  # the photos are copies
    form = read_form(body)
    if unknown := sorted(form.fields.keys() - {"top_k"}):
        raise RequestMalformed(
            f"the form has the fields {', '.join(unknown)[:200]}; beside the photo it may have top_k",
            parameter=unknown[0][:80],
            hint="name another model in the URL: ?model=NAME",
        )
    top_k = parse_top_k(form.fields.get("top_k", request.query.get("top_k")))
    if form.is_batch:
        # A file that is no image fails alone; the others of the batch are classified.
        batch = tuple(photo if looks_like_image(photo) else not_an_image(photo) for photo in form.photos)
        return InferenceRequest(model, batch=batch, top_k=top_k)
    if not looks_like_image(form.photos[0]):
        raise not_an_image(form.photos[0])
    return InferenceRequest(model, form.photos[0], top_k=top_k)


def _from_document(doc: Mapping[str, Any], model: ServedModel) -> InferenceRequest:
    if doc.get("inputs") is not None:
        tensors = oip.parse_document(doc, inputs=model.bundle.inputs, outputs=model.bundle.outputs)
        return InferenceRequest(model, tensors=tensors)
    top_k = parse_top_k(doc.get("top_k"))
    if "image" in doc and BATCH_FIELD in doc:
        raise RequestMalformed(f"the JSON object has image and {BATCH_FIELD}; it has one of them", parameter="image")
    if "image" in doc:
        return InferenceRequest(model, from_base64(doc["image"]), top_k=top_k)
    if BATCH_FIELD in doc:
        return InferenceRequest(model, batch=_batch(doc[BATCH_FIELD]), top_k=top_k)
    raise RequestMalformed(
        f"the JSON object has neither inputs (Open Inference Protocol) nor image or {BATCH_FIELD} (base64)",
        got=sorted(doc)[:20],
    )


def _batch(texts: Any) -> tuple[bytes | IsthmusError, ...]:
    """The photos of a list of base64 texts; in place of a text that is none, its error."""
    if not isinstance(texts, list) or not texts:
        raise RequestMalformed(f"{BATCH_FIELD} is no list of photos in base64, one or more", parameter=BATCH_FIELD)
    check_count(len(texts))
    return tuple(map(_photo_or_error, texts))


def _photo_or_error(text: Any) -> bytes | IsthmusError:
    try:
        photo = from_base64(text)
    except RequestMalformed as e:
        return e
    return photo if looks_like_image(photo) else not_an_image(photo)
