"""Profiles: what one device measured of one model, as frozen dataclasses and as JSON. Format: docs/profile.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

from isthmus.artifacts.bundle import Bundle, digest_of, is_digest
from isthmus.artifacts.device import Device, from_document
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.errors import ProfileMalformed

FORMAT = "isthmus.profile/1"
MAX_PROFILE_BYTES = 4 * 2**20
MAX_SEGMENTS = 1024
_MAX_TEXT = 500
_MAX_WARNINGS = 50


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds that a codec takes for one value of a tensor."""

    pack_s: float
    unpack_s: float


@dataclass(frozen=True)
class Timing:
    """The median of `runs` runs in seconds, their quartiles, and whether they kept one speed."""

    median: float
    low: float
    high: float
    runs: int
    steady: bool = True

    @property
    def spread(self) -> float:
        """What lies between the quartiles, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class SegmentCost:
    """What one segment takes on the device.

    Units: seconds and bytes. `run` is its computing; `decode_s` and `encode_s` are those of a raw frame of its inputs
    and outputs, whose tensors have `input_bytes` and `output_bytes`. `activation_bytes` is the most that a run has in
    use beyond the weights; `memory_bytes` holds these, what the runtime lays out anew, and all that it keeps.
    """

    run: Timing
    decode_s: float
    encode_s: float
    input_bytes: int
    output_bytes: int
    weights_bytes: int
    activation_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class HopCost:
    """What a call costs beside the run: `fixed_s`, and seconds for each byte sent and received.

    The first three are as the one who measured saw them, the network between included. `served_fixed_s` and
    `served_byte_s` (for each byte in or out) are what of it passed inside the function.
    """

    fixed_s: float
    up_byte_s: float
    down_byte_s: float
    served_fixed_s: float
    served_byte_s: float


@dataclass(frozen=True)
class Profile:
    """What `device`, at `tier`, measured of the model whose content is `content` (see `content_of`).

    `nodes` are the seconds of each node of the uncut graph, in order, static ones 0; their sum is the median of the
    whole model. `bundle` is the version that holds all of `segments`. `inputs` says what was run: random, photo or
    tensors, of `shapes`. `steady` is false where the device did not keep its speed; `warnings` say so in words.
    """

    model: str
    content: str
    bundle: str
    tier: str
    device: Device
    nodes: tuple[float, ...]
    segments: Mapping[SegmentId, SegmentCost]
    measured_at: str
    inputs: str = "random"
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    hop: HopCost | None = None
    codecs: Mapping[str, CodecSpeed] = field(default_factory=dict)
    steady: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def whole(self) -> SegmentCost:
        """The uncut model's."""
        return self.segments[WHOLE]


def content_of(bundle: Bundle) -> str:
    """A digest of what decides a model's speed: its uncut graph and its weights. New cuts leave it, a new model not."""
    parts = (bundle.segment(WHOLE).graph.digest, bundle.weights.blob.digest)
    return digest_of("\n".join(parts).encode())


def to_json(profile: Profile) -> bytes:
    """A profile's document."""
    doc = asdict(replace(profile, device=None))  # type: ignore[arg-type]
    doc |= {"format": FORMAT, "device": profile.device.document()}
    return json.dumps(doc, indent=1, sort_keys=True).encode()


def from_json(data: bytes) -> Profile:
    """Read a profile.

    Raises:
        ProfileMalformed: not a document of this format; the sentence says where it departs.
    """
    if len(data) > MAX_PROFILE_BYTES:
        raise ProfileMalformed(f"a profile of {len(data)} bytes exceeds {MAX_PROFILE_BYTES}", limit=MAX_PROFILE_BYTES)
    try:
        doc = json.loads(data, parse_constant=_refuse)
        if doc["format"] != FORMAT:
            raise ProfileMalformed(
                f"the profile's format is {str(doc['format'])[:80]!r}; this version reads {FORMAT!r}"
            )
        return _checked(
            Profile(
                model=_text(doc["model"]),
                content=_text(doc["content"]),
                bundle=_text(doc["bundle"]),
                tier=_text(doc["tier"]),
                device=from_document(doc["device"]),
                nodes=tuple(_seconds(s) for s in doc["nodes"]),
                segments={SegmentId.parse(_text(name)): _segment(s) for name, s in doc["segments"].items()},
                measured_at=_text(doc["measured_at"]),
                inputs=_text(doc["inputs"]),
                shapes={_text(name): tuple(_count(n) for n in shape) for name, shape in doc["shapes"].items()},
                hop=None if doc["hop"] is None else HopCost(**_all(_seconds, doc["hop"])),
                codecs={_text(name): CodecSpeed(**_all(_seconds, speed)) for name, speed in doc["codecs"].items()},
                steady=_flag(doc["steady"]),
                warnings=tuple(_text(w) for w in doc["warnings"][:_MAX_WARNINGS]),
            )
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise ProfileMalformed(f"not a profile: {type(e).__name__}: {str(e)[:_MAX_TEXT]}") from e


def _checked(profile: Profile) -> Profile:
    for digest in (profile.content, profile.bundle):
        if not is_digest(digest):
            raise ValueError(f"{digest!r} is not a sha256 digest")
    if WHOLE not in profile.segments:
        raise ValueError(f"the whole model, segment {WHOLE!r}, was not measured")
    if len(profile.segments) > MAX_SEGMENTS:
        raise ValueError(f"{len(profile.segments)} segments; at most {MAX_SEGMENTS} are read")
    return profile


def _segment(doc: Mapping[str, Any]) -> SegmentCost:
    run = doc["run"]
    median, low, high = (_seconds(run[name]) for name in ("median", "low", "high"))
    return SegmentCost(
        run=Timing(median, low, high, _count(run["runs"]), _flag(run["steady"])),
        decode_s=_seconds(doc["decode_s"]),
        encode_s=_seconds(doc["encode_s"]),
        input_bytes=_count(doc["input_bytes"]),
        output_bytes=_count(doc["output_bytes"]),
        weights_bytes=_count(doc["weights_bytes"]),
        activation_bytes=_count(doc["activation_bytes"]),
        memory_bytes=_count(doc["memory_bytes"]),
    )


def _all(read: Callable[[Any], Any], doc: Mapping[str, Any]) -> dict[str, Any]:
    return {name: read(value) for name, value in doc.items()}


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < math.inf):
        raise ValueError(f"{str(value)[:40]!r} is no number of seconds")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]!r} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(f"{str(value)[:40]!r} is no text of at most {_MAX_TEXT} characters")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
