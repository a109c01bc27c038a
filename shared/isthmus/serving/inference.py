"""An inference request of any kind: photos, raw, in a form or as base64 in JSON, or Open Inference Protocol tensors.

The body's first bytes decide the kind, not Content-Type. Source: docs/reference/api.md.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from isthmus.admission import Turns
from isthmus.errors import (
    EventMalformed,
    IsthmusError,
    MediaUnsupported,
    Missing,
    RegistryMissing,
    RequestMalformed,
    RequestTooLarge,
)
from isthmus.events.claims import ClaimStore, looks_like_claim, parse_claim
from isthmus.events.cloudevent import ReceivedEvent, check_no_batch, read_binary, read_structured
from isthmus.events.s3_notification import Notification, WrittenObject, read_notification
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
from isthmus.registry import open_blob_store
from isthmus.registry.event_objects import EventObjects
from isthmus.registry.lookups import Lookups
from isthmus.routing.candidates import ServedModel
from isthmus.serving.redaction import refuse_tensors
from isthmus.serving.request import FunctionRequest
from isthmus.settings import RouterSettings


@dataclass(frozen=True)
class InferenceRequest:
    """A request for predictions of `model`: a photo, a batch of photos, or else tensors.

    A photo of a batch that cannot be read is its error. `top_k` bounds the classes of a photo's prediction; None leaves
    that to the bundle. `event` is the CloudEvent around the request; `objects` are the objects of a notification, in
    the order of the batch, and `ignored` the names of its other events.
    """

    model: ServedModel
    photo: bytes = b""
    batch: tuple[bytes | IsthmusError, ...] = ()
    top_k: int | None = None
    tensors: oip.InferRequest | None = None
    event: ReceivedEvent | None = None
    objects: tuple[WrittenObject, ...] = ()
    ignored: tuple[str, ...] = ()


class InferenceReader:
    """Reads inference requests, JSON of a single request at a time."""

    def __init__(self, settings: RouterSettings) -> None:
        self._turns = Turns(1)  # parsing JSON holds Python's lock all the while
        self._max_bytes = settings.max_request_bytes
        self._lookups = Lookups(remember_s=0)
        self._claims = (
            ClaimStore(open_blob_store(settings.claims, settings), max_bytes=self._max_bytes, keep_s=0)
            if settings.claims
            else None
        )
        self._objects = EventObjects(
            settings.event_buckets, lambda bucket: open_blob_store(f"s3://{bucket}", settings, any_key=True)
        )

    def close(self) -> None:
        """End the threads that read claims and objects."""
        self._lookups.close()

    def read(self, request: FunctionRequest, model: ServedModel) -> InferenceRequest:
        """Read a request of any kind, and of the kind within a CloudEvent.

        Raises:
            MediaUnsupported, ImageMalformed: the body is of no known kind.
            EventMalformed, BucketRefused: as the envelope's reader.
            RequestMalformed, RequestTooLarge, ShapeMismatch: as its kind's reader; Overloaded: as `Reservation.hold`.
        """
        check_no_batch(request.headers.get("Content-Type", ""))
        if (event := read_binary(request.headers)) is None:
            return self._read_body(request, model, True)
        return replace(self._read_body(request, model, False), event=event)

    def _read_body(self, request: FunctionRequest, model: ServedModel, may_be_event: bool) -> InferenceRequest:
        if oip.HEADER_LENGTH in request.headers:
            return self.read_tensors(request, model)
        body = _contiguous(request)
        if looks_like_claim(body):
            return self._read_body(request._replace(body=self._redeem(request, body)), model, may_be_event)
        if looks_like_image(body):
            return InferenceRequest(model, body, top_k=parse_top_k(request.query.get("top_k")))
        if looks_like_form(body):
            return _read_form(request, model, body)
        if body[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":
            raise not_an_image(body)
        return self._read_json(request, model, body, may_be_event)

    def read_tensors(self, request: FunctionRequest, model: ServedModel) -> InferenceRequest:
        """Read an Open Inference Protocol request, JSON with or without binary tensors.

        Raises:
            MediaUnsupported: the body is a photo or a form, or the bundle redacts inputs.
            RequestMalformed, RequestTooLarge, ShapeMismatch: as `oip.parse_request`; Overloaded: as `Reservation.hold`.
        """
        refuse_tensors(model.bundle)
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

    def _read_json(
        self, request: FunctionRequest, model: ServedModel, body: bytes, may_be_event: bool
    ) -> InferenceRequest:
        start = time.perf_counter()
        # Parsing takes many times the text's size, for its duration; only the result's size stays until the response.
        with self._turns.one(request.context.deadline), request.memory.scope():
            doc = oip.read_document(body, reserve=request.memory.hold)
            read: InferenceRequest | Notification | ReceivedEvent
            read = (
                (read_structured(doc) if may_be_event else None) or read_notification(doc) or _from_document(doc, model)
            )
            del doc
        request.timings.add("decode", time.perf_counter() - start)
        if isinstance(read, ReceivedEvent):
            data = read.body or b""
            request.memory.hold(len(data))
            return replace(self._read_body(request._replace(body=data), model, False), event=read)
        if isinstance(read, Notification):
            return self._read_objects(request, model, read)
        request.memory.hold(_own_bytes(read))
        return read

    def _redeem(self, request: FunctionRequest, body: bytes) -> bytes:
        """The body that a claim check refers to."""
        if self._claims is None:
            raise EventMalformed(
                "the body is a claim check, and this function redeems none",
                attribute="format",
                hint="name the store of large bodies in the setting claims",
            )
        claim = parse_claim(body)
        request.memory.hold(claim.size)
        redeemed = self._lookups.find(claim, partial(self._claims.redeem, claim), request.context.deadline)
        if looks_like_claim(redeemed):  # a claim of a claim could go on without end
            raise EventMalformed("the claim check refers to another claim check", attribute="claim")
        return redeemed

    def _read_objects(
        self, request: FunctionRequest, model: ServedModel, notification: Notification
    ) -> InferenceRequest:
        """The objects of a notification as a batch of photos; an absent or too large object is its error."""
        check_count(len(notification.objects))
        batch: list[bytes | IsthmusError] = []
        left = self._max_bytes
        for item in notification.objects:
            request.context.deadline.check(f"{item.url} was read")
            bound = left if item.size is None else min(left, item.size)
            try:
                # An object without a stated size may have all that is left; most are small.
                with request.memory.scope():
                    request.memory.hold(bound)
                    get = partial(self._objects.get, item.bucket, item.key, max_bytes=bound)
                    photo = self._lookups.find((item, bound), get, request.context.deadline)
            except RegistryMissing:  # of the bucket, and so of every object
                raise
            except (Missing, RequestTooLarge) as e:
                batch.append(e)
                continue
            request.memory.hold(len(photo))
            left -= len(photo)
            batch.append(photo if looks_like_image(photo) else not_an_image(photo))
        return InferenceRequest(
            model,
            batch=tuple(batch),
            top_k=parse_top_k(request.query.get("top_k")),
            objects=notification.objects,
            ignored=notification.ignored,
        )


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
        refuse_tensors(model.bundle)
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
