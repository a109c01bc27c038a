"""A request after its head and before its tail, as bytes: the entry of a spool while the link is down.

A continuation holds the boundary tensors encoded as for the link, and so is as small as the frame. The caller posts it
to the router later, for the response of the whole request. Source: docs/reference/continuation.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from isthmus.arrays import Array
from isthmus.codecs import EncodedTensor
from isthmus.errors import PlanMismatch, RequestMalformed
from isthmus.pipeline.execution import Interruption, encode_tensors
from isthmus.pipeline.route import Route
from isthmus.wire import frame as frames
from isthmus.wire.frame import MAX_RANK, MAX_TENSORS, Frame

CONTENT_TYPE = "application/vnd.isthmus.continuation"
FORMAT = "isthmus.continuation/1"
MAGIC = b"ISTHMUSC"
# What a caller notes is an id, sizes and the names of outputs; without bounds, a list of empty lists takes 80 times its
# bytes in memory.
_MAX_NOTES = 64
ShortText = Annotated[str, Meta(max_length=512)]
_Flags = Annotated[list[Annotated[list[ShortText | bool], Meta(max_length=2)]], Meta(max_length=MAX_TENSORS)]


class _Encoded(Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor under a codec."""

    name: ShortText
    codec: ShortText
    dtype: ShortText
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=MAX_RANK)]
    payload: bytes


class _Document(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag=FORMAT):
    """The wire form: raw tensors in a frame, encoded tensors, and notes for the response."""

    model: ShortText
    version: ShortText
    digest: ShortText
    segments: Annotated[list[ShortText], Meta(min_length=1, max_length=MAX_TENSORS)]
    frame: bytes
    encoded: Annotated[list[_Encoded], Meta(max_length=MAX_TENSORS)]
    notes: Annotated[dict[ShortText, int | ShortText | _Flags], Meta(max_length=_MAX_NOTES)]


@dataclass(frozen=True)
class Continuation:
    """The rest of a request: the segments to run, their tensors, and `notes` of the caller for the response."""

    model: str
    version: str
    digest: str
    segments: tuple[str, ...]
    tensors: Mapping[str, Array]
    encoded: Mapping[str, EncodedTensor]
    notes: Mapping[str, Any]

    def route(self, whole: Route) -> Route:
        """The rest of `whole` if that route has these segments; else a route of these segments on its last hop.

        Raises:
            PlanMismatch: the route is another bundle's.
            Missing: a segment is not in the bundle.
            RequestMalformed: the segments do not follow each other to the model's end.
        """
        if whole.digest != self.digest:
            raise PlanMismatch(
                f"the continuation is of bundle {self.digest[:20]}, and {self.model} {self.version} is another now",
                subject="continuation",
                expected=whole.digest,
                hint="send the whole request again",
            )
        ids = tuple(str(segment.id) for segment in whole.segments)
        if ids[-len(self.segments) :] == self.segments:
            return whole.after(len(ids) - len(self.segments))
        segments = tuple(whole.bundle.segment(segment) for segment in self.segments)
        ends = [(segment.id.start, segment.id.stop) for segment in segments]
        if ends[-1][1] or any(stop != start or not stop for (_, stop), (start, _) in itertools.pairwise(ends)):
            raise RequestMalformed("the continuation's segments do not follow each other to the model's end")
        # A plan has changed the partition meanwhile.
        return Route(whole.digest, whole.bundle, segments, (whole.hops[-1],) * len(segments), near=whole.near)


def encode_continuation(
    interruption: Interruption, model: str, version: str, request: str, notes: Mapping[str, Any]
) -> bytes:
    """The continuation of a request as bytes; a tensor that a later segment takes as well stays raw."""
    rest = interruption.rest
    later = {spec.name for segment in rest.segments[1:] for spec in segment.inputs}
    arrays = {name: array for name, array in interruption.tensors.items() if name not in later}
    encoded = encode_tensors(arrays, rest.encodings_of(0))
    raw = {name: array for name, array in interruption.tensors.items() if name not in encoded}
    segments = [str(segment.id) for segment in rest.segments]
    document = _Document(
        model,
        version,
        rest.digest,
        segments,
        frames.encode(Frame(raw, rest.digest, segments[0], request)),
        [_Encoded(name, t.codec, t.dtype, list(t.shape), bytes(t.payload)) for name, t in encoded.items()],
        dict(notes),
    )
    return MAGIC + msgspec.msgpack.encode(document)


def decode_continuation(data: bytes | memoryview, *, max_bytes: int) -> Continuation:
    """Read a continuation. Payloads of encoded tensors are the next function's to decode.

    Units: max_bytes bounds the decoded arrays of its frame.

    Raises:
        RequestMalformed: no continuation, another version, or a field that breaks its rule.
        FrameMalformed, FrameTooLarge: as `frames.decode`.
    """
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise RequestMalformed("the body is no continuation", hint="send what a 503 of this router had as its body")
    try:
        document = msgspec.msgpack.decode(memoryview(data)[len(MAGIC) :], type=_Document)
    except msgspec.DecodeError as e:
        raise RequestMalformed(f"the continuation is malformed: {e}") from e
    frame = frames.decode(document.frame, max_bytes=max_bytes)
    if frame.codecs:
        raise RequestMalformed("the continuation's frame holds encoded tensors")
    return Continuation(
        document.model,
        document.version,
        document.digest,
        tuple(document.segments),
        frame.tensors,
        dict(_encoded(document.encoded)),
        document.notes,
    )


def _encoded(entries: Iterable[_Encoded]) -> Iterable[tuple[str, EncodedTensor]]:
    for entry in entries:
        if reason := frames.why_not_carried(entry.name, entry.dtype, len(entry.shape)):
            raise RequestMalformed(f"a tensor of the continuation is in no frame: {reason}")
        yield entry.name, EncodedTensor(entry.codec, entry.dtype, tuple(entry.shape), entry.payload)
