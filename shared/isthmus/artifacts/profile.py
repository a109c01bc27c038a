"""The profile document: what one device measured of one model. Format: docs/reference/profile.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, Struct

from isthmus.artifacts.bundle import Bundle, digest_of
from isthmus.artifacts.constraints import Amount, Count, Digest
from isthmus.artifacts.device import Device
from isthmus.artifacts.json_documents import DocumentKind, builtins
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.errors import ProfileMalformed

MAX_PROFILE_BYTES = 4 * 2**20
MAX_SEGMENTS = 1024
_Text = Annotated[str, Meta(max_length=500)]


class CodecSpeed(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds that a codec takes for one value of a tensor."""

    pack_s: Amount
    unpack_s: Amount


class Timing(Struct, frozen=True, forbid_unknown_fields=True):
    """The median of `runs` runs in seconds, their quartiles, and whether they kept one speed."""

    median: Amount
    low: Amount
    high: Amount
    runs: Count
    steady: bool = True

    @property
    def spread(self) -> float:
        """What lies between the quartiles, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


class SegmentCost(Struct, frozen=True, forbid_unknown_fields=True):
    """What one segment takes on the device.

    Units: seconds and bytes. `run` is its computing; `decode_s` and `encode_s` are those of a raw frame of its inputs
    and outputs, whose tensors have `input_bytes` and `output_bytes`. `activation_bytes` is the most that a run has in
    use beyond the weights; `memory_bytes` holds these, what the runtime lays out anew, and all that it keeps.
    """

    run: Timing
    decode_s: Amount
    encode_s: Amount
    input_bytes: Count
    output_bytes: Count
    weights_bytes: Count
    activation_bytes: Count
    memory_bytes: Count


class HopCost(Struct, frozen=True, forbid_unknown_fields=True):
    """What a call costs beside the run: `fixed_s`, and seconds for each byte sent and received.

    The first three are as the one who measured saw them, the network between included. `served_fixed_s` and
    `served_byte_s` (for each byte in or out) are what of it passed inside the function.
    """

    fixed_s: Amount
    up_byte_s: Amount
    down_byte_s: Amount
    served_fixed_s: Amount
    served_byte_s: Amount


class Profile(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.profile/1"):
    """What `device`, at `tier`, measured of the model whose content is `content` (see `content_of`).

    `nodes` are the seconds of each node of the uncut graph, in order, static ones 0; their sum is the median of the
    whole model. `bundle` is the version that holds all of `segments`. `inputs` says what was run: random, photo or
    tensors, of `shapes`. `steady` is false where the device did not keep its speed; `warnings` say so in words.
    """

    model: _Text
    content: Digest
    bundle: Digest
    tier: _Text
    device: Device
    nodes: tuple[Amount, ...]
    segments: Annotated[Mapping[SegmentId, SegmentCost], Meta(max_length=MAX_SEGMENTS)]
    measured_at: _Text
    inputs: _Text = "random"
    shapes: Mapping[_Text, tuple[Count, ...]] = {}
    hop: HopCost | None = None
    codecs: Mapping[_Text, CodecSpeed] = {}
    steady: bool = True
    warnings: tuple[_Text, ...] = ()

    @property
    def whole(self) -> SegmentCost:
        """The uncut model's."""
        return self.segments[WHOLE]


def content_of(bundle: Bundle) -> str:
    """A digest of what decides a model's speed: its uncut graph and its weights. New cuts leave it, a new model not."""
    parts = (bundle.segment(WHOLE).graph.digest, bundle.weights.blob.digest)
    return digest_of("\n".join(parts).encode())


def to_json(profile: Profile) -> bytes:
    """A profile's document, indented for readers."""
    return json.dumps(builtins(profile), indent=1, sort_keys=True).encode()


def from_json(data: bytes | memoryview) -> Profile:
    """Read a profile.

    Raises:
        ProfileMalformed: not a document of this format; the sentence names the field and the rule.
    """
    return PROFILE.decode(data)


def _check(profile: Profile) -> None:
    if WHOLE not in profile.segments:
        raise ValueError(f"has no measurement of the whole model, segment {WHOLE!r}")


PROFILE = DocumentKind(Profile, "profile", MAX_PROFILE_BYTES, ProfileMalformed, _check)
FORMAT = PROFILE.format
