"""A call's record: its state, its lease, its result, the places that have the result."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

State: TypeAlias = Literal["queued", "running", "done", "failed"]
# Twice the places of a configuration: a call may outlive its configuration.
MAX_PLACES = 32
# Kind, URL and subject of a place, each within its own bound.
MAX_PLACE = 2100
MAX_REASON = 1000
ShortText = Annotated[str, Meta(max_length=1024)]
Moment = Annotated[float, Meta(ge=0)]


class CallResult(Struct, frozen=True, forbid_unknown_fields=True):
    """A response of the router: inline, or a `reference` to an object where too large for a record.

    Units: `size` is the bytes of the body, inline or not.
    """

    status: Annotated[int, Meta(ge=100, le=599)]
    content_type: ShortText = ""
    size: Annotated[int, Meta(ge=0)] = 0
    body: bytes = b""
    reference: ShortText = ""


class Call(Struct, frozen=True, forbid_unknown_fields=True):
    """A call's record. Units: moments are seconds since the epoch.

    `attempts` counts begun attempts less attempts released without blame. `published` has the places that have
    the result, `refused` the places that refused for good, `deaths` is the message's.
    """

    id: ShortText
    state: State
    created: Moment
    updated: Moment
    expires: Moment
    source: Annotated[str, Meta(max_length=MAX_PLACE)] = ""
    owner: ShortText = ""
    lease_until: Moment = 0.0
    attempts: Annotated[int, Meta(ge=0)] = 0
    reason: ShortText = ""
    """Why the latest attempt failed, or why the call did."""
    result: CallResult | None = None
    published: Annotated[tuple[Annotated[str, Meta(max_length=MAX_PLACE)], ...], Meta(max_length=MAX_PLACES)] = ()
    refused: Annotated[tuple[Annotated[str, Meta(max_length=MAX_PLACE)], ...], Meta(max_length=MAX_PLACES)] = ()
    deaths: Annotated[int, Meta(ge=0)] = 0

    @property
    def is_over(self) -> bool:
        """Whether there is a result or a final error."""
        return self.state in ("done", "failed")

    @property
    def progress(self) -> tuple[str, int, str]:
        """What waiting callers are told of; a renewed lease is no progress."""
        return self.state, self.attempts, self.reason

    def document(self) -> dict[str, Any]:
        """The call as JSON for its callers, without the body of its result."""
        result = None if self.result is None else msgspec.to_builtins(replace(self.result, body=b""))
        if result is not None:
            del result["body"]
        times = {"created": self.created, "updated": self.updated, "expires": self.expires}
        facts = {"id": self.id, "state": self.state, "source": self.source, "attempts": self.attempts, **times}
        places = {"published": list(self.published), "refused": list(self.refused)}
        return {**facts, "reason": self.reason, "result": result, **places}


class CallLease(NamedTuple):
    """The right to work on a call until `call.lease_until`, and the version of its record."""

    call: Call
    version: str


# MessagePack rather than JSON: bodies are bytes, and base64 would take a third more of a record.
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Call)


def encode_call(call: Call) -> bytes:
    """The record's bytes."""
    return _ENCODER.encode(call)


def decode_call(data: bytes) -> Call:
    """A call of its record's bytes.

    Raises:
        msgspec.DecodeError: the bytes are no call's.
    """
    return _DECODER.decode(data)
