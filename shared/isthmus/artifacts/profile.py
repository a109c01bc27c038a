"""The profile document: measurements of a model on a device. Format: docs/reference/profile.md."""

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

# Profiles arrive from other machines; the bounds keep a damaged profile from filling memory.
MAX_PROFILE_BYTES = 4 * 2**20
MAX_SEGMENTS = 1024
MAX_STEPS = 16 * MAX_SEGMENTS
_Text = Annotated[str, Meta(max_length=500)]


class CodecSpeed(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of a codec per value of a tensor."""

    pack_s: Amount
    unpack_s: Amount


class Timing(Struct, frozen=True, forbid_unknown_fields=True):
    """Median and quartiles of `runs` runs in seconds; `steady` is whether the speed stayed constant."""

    median: Amount
    low: Amount
    high: Amount
    runs: Count
    steady: bool = True

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


class SegmentCost(Struct, frozen=True, forbid_unknown_fields=True):
    """The cost of a segment on the device.

    Units: seconds and bytes. `run` is inference alone; `decode_s` and `encode_s` are for raw frames of the inputs and
    outputs, with tensors of `input_bytes` and `output_bytes`. `activation_bytes` is the peak of a run beyond the
    weights; `memory_bytes` adds the weights, the runtime's repacked copies and its arena.
    """

    run: Timing
    decode_s: Amount
    encode_s: Amount
    input_bytes: Count
    output_bytes: Count
    weights_bytes: Count
    activation_bytes: Count
    memory_bytes: Count


class StepCost(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of a session's step on a segment with state: `tokens` new tokens behind `past` others."""

    segment: SegmentId
    tokens: Annotated[int, Meta(ge=1)]
    past: Count
    run: Timing


class HopCost(Struct, frozen=True, forbid_unknown_fields=True):
    """The cost of a call apart from the run: `fixed_s`, and seconds per byte sent and received.

    The first three fields are measured by the caller and include the network; `served_fixed_s` and `served_byte_s` (per
    byte in or out) are the function's part.
    """

    fixed_s: Amount
    up_byte_s: Amount
    down_byte_s: Amount
    served_fixed_s: Amount
    served_byte_s: Amount


class Profile(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.profile/1"):
    """The measurements on `device`, as `tier`, of the model with the content digest `content` (see `content_of`).

    `nodes` are the seconds of each node of the uncut graph, in order, 0 for static nodes; the sum is the median of the
    whole model. A language model has `steps` in their place, and `run` of a segment is a step of one token. `bundle` is
    the version with all of `segments`. `inputs` is random, photo or tensors, of `shapes`.
    `steady` is false if the device changed speed; `warnings` give the reasons.
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
    steps: Annotated[tuple[StepCost, ...], Meta(max_length=MAX_STEPS)] = ()

    @property
    def whole(self) -> SegmentCost:
        """The cost of the uncut model."""
        return self.segments[WHOLE]


def content_of(bundle: Bundle) -> str:
    """The digest of a model's uncut graph and weights, on which speed depends; additional cuts do not change the
    digest.
    """
    parts = (bundle.segment(WHOLE).graph.digest, bundle.weights.blob.digest)
    return digest_of("\n".join(parts).encode())


def to_json(profile: Profile) -> bytes:
    """The profile as indented JSON."""
    document = builtins(profile)
    if not profile.steps:
        # Absent of other models, as in profiles of earlier versions.
        del document["steps"]
    return json.dumps(document, indent=1, sort_keys=True).encode()


def from_json(data: bytes | memoryview) -> Profile:
    """Parse a profile.

    Raises:
        ProfileMalformed: not a document of this format; the message names the field and the rule.
    """
    return PROFILE.decode(data)


def _check(profile: Profile) -> None:
    # The candidates `edge` and `cloud` run the whole model.
    if WHOLE not in profile.segments:
        raise ValueError(f"has no measurement of the whole model, segment {WHOLE!r}")


PROFILE = DocumentKind(Profile, "profile", MAX_PROFILE_BYTES, ProfileMalformed, _check)
FORMAT = PROFILE.format
