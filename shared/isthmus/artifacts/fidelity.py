"""The fidelity document: for each codec at each cut, the share of unchanged predictions, and its bytes and times.

Plans, targets such as "at least 99%, at most 4 kB", and the router's guard read it. Format:
docs/reference/calibration.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import force_setattr

from isthmus.artifacts.bounds import CONFIDENCE
from isthmus.artifacts.bundle import Blob, Bundle, digest_of
from isthmus.artifacts.choice import MAX_LOOKS, BoundaryCodecId, Choice, Look, successor
from isthmus.artifacts.constraints import Amount, Count, Share, Text, one_of
from isthmus.artifacts.json_documents import DocumentKind, builtins, canonical
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CalibrationError

LIMIT = 0.99
MAX_BYTES = 4 * 2**20
MAX_ENTRIES = 20_000
TOLERANCE = 0.05
TOP1, CLOSE = "top1", "close"


class Measure(Struct, frozen=True, forbid_unknown_fields=True):
    """The rule by which two predictions agree; pipeline.agreement applies it.

    `top1`: the likeliest class of `output` is the same, in every row. `close`: the error of every output is at most
    `tolerance`. An output's error is the root mean square of the differences over that of the output, or over its
    scale in `scales` where that is larger: the root mean square over the inputs that codecs were calibrated with.
    """

    kind: Annotated[str, one_of(TOP1, CLOSE)]
    output: Text = ""
    tolerance: Amount = TOLERANCE
    scales: Mapping[Text, Amount] = {}


def measure_for(bundle: Bundle, output: str = "", tolerance: float = TOLERANCE) -> Measure:
    """The measure of a model: its classes where it has some (or in `output`), else how close its outputs are."""
    after: Mapping[str, Any] = bundle.postprocess or {}
    named = output or (after.get("output", "") if after.get("kind") == "classify" else "")
    return Measure(TOP1, str(named)) if named else Measure(CLOSE, tolerance=tolerance)


class Inputs(Struct, frozen=True, forbid_unknown_fields=True):
    """The inputs of a calibration: the files of `source`, and the numbers of inputs for calibrating and for scoring."""

    source: Text
    files: Count
    calibrated: Count
    held_out: Count
    made: Text = "one of each file"


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """One codec at one quality at one cut, over the held-out inputs.

    `measured` is the share of inputs whose answer stays the same, `low` and `high` its interval (Wilson, 95%).
    `agreement` is that share made to rise with a codec's quality (`bounds.rising`): what targets and limits go by.
    `error` is the mean of the output's error where it is finite. `bytes` (median) and `p95` are the payloads of all
    tensors that cross, `bits` what a value costs on average. Units: milliseconds of one thread's CPU time, medians.
    `fell_back` is the share of inputs where a tensor went raw. `offered` says whether a plan may use it.

    With closer looks, sizes and times are of all sends together, and means, since medians know of the first one only;
    `shares` has for each look the share of inputs that took it.
    """

    cut: Text
    codec: BoundaryCodecId
    quality: Share
    agreement: Share
    low: Share
    high: Share
    error: Amount
    bytes: Count
    p95: Count
    bits: Amount
    pack_ms: Amount
    unpack_ms: Amount
    fell_back: Share
    offered: bool
    measured: Share
    looks: Annotated[tuple[Look, ...], Meta(max_length=MAX_LOOKS)] = ()
    shares: Annotated[tuple[Share, ...], Meta(max_length=MAX_LOOKS)] = ()

    def __post_init__(self) -> None:
        force_setattr(self, "codec", successor(self.codec))

    @property
    def choice(self) -> Choice:
        """What was measured, as settings write it."""
        return Choice(self.codec, self.quality, self.looks)


class Reference(Struct, frozen=True, forbid_unknown_fields=True):
    """The input itself as JPEG or WebP of one quality, decoded again before the model; same inputs, same measure."""

    codec: Annotated[str, one_of("jpeg", "webp")]
    quality: Count
    agreement: Share
    low: Share
    high: Share
    error: Amount
    bytes: Count
    p95: Count


class Fidelity(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.fidelity/2"):
    """The measurements of one model; `subject` is its `model_digest`."""

    subject: Text
    limit: Share
    measure: Measure
    inputs: Inputs
    entries: Annotated[tuple[Entry, ...], Meta(max_length=MAX_ENTRIES)]
    references: Annotated[tuple[Reference, ...], Meta(max_length=MAX_ENTRIES)] = ()
    confidence: Share = CONFIDENCE

    def cuts(self) -> list[str]:
        """The cuts that were measured, in the document's order."""
        return list(dict.fromkeys(entry.cut for entry in self.entries))


def offered(fidelity: Fidelity, cut: str) -> list[Entry]:
    """What a plan may use at `cut`, fewest bytes first: its agreement, not the bound of that, meets the limit.

    The lower bound cannot: a hundred inputs without one different answer leave it at 96.3%. What the estimate lets pass
    by luck, the router's guard finds.
    """
    return sorted((e for e in fidelity.entries if e.cut == cut and e.offered), key=lambda e: (e.bytes, -e.agreement))


def choose(
    fidelity: Fidelity,
    cut: str,
    *,
    agreement: float | None = None,
    bytes: int | None = None,
    pack_ms: float | None = None,
) -> Entry:
    """The codec and quality that meets every target: with one for agreement the smallest, else the most faithful.

    Units: `bytes` bounds the median payload, `pack_ms` packing and unpacking together.

    Raises:
        CalibrationError: nothing was measured at `cut`, or nothing meets the targets; names what comes closest.
    """
    entries = [e for e in fidelity.entries if e.cut == cut]
    if not entries:
        raise CalibrationError(f"no codec was measured at cut {cut!r}", cut=cut, exists=fidelity.cuts())
    candidates = [
        e
        for e in entries
        if (bytes is None or e.bytes <= bytes) and (pack_ms is None or e.pack_ms + e.unpack_ms <= pack_ms)
    ]
    if met := [e for e in candidates if agreement is None or e.agreement >= agreement]:
        if agreement is not None:
            return min(met, key=lambda e: (e.bytes, -e.agreement))
        return max(met, key=lambda e: (e.agreement, -e.bytes))
    closest = max(candidates, key=lambda e: e.agreement, default=None) or min(entries, key=lambda e: e.bytes)
    raise CalibrationError(
        f"nothing measured at cut {cut} meets the targets; closest is {closest.choice}: "
        f"{closest.agreement:.1%} the same, {closest.bytes} bytes, {closest.pack_ms + closest.unpack_ms:.2f} ms",
        cut=cut,
        agreement=agreement,
        bytes=bytes,
        pack_ms=pack_ms,
        closest=builtins(closest),
    )


def model_digest(bundle: Bundle) -> str:
    """What a fidelity is of: the weights, the uncut graph and the processing; other cuts are still the same model."""
    whole = bundle.segment(WHOLE).graph.digest
    doc = [bundle.weights.blob.digest, whole, bundle.preprocess, bundle.postprocess]
    return digest_of(json.dumps(doc, sort_keys=True, separators=(",", ":")).encode())


def read_fidelity(bundle: Bundle, blob: Callable[[Blob], bytes]) -> Fidelity | None:
    """The fidelity of a bundle; None where it was not calibrated.

    Raises:
        CalibrationError: the document cannot be read, was measured of another model, or written by another version.
    """
    if bundle.fidelity is None:
        return None
    FIDELITY.check_size(bundle.fidelity.size)
    try:
        fidelity = from_json(blob(bundle.fidelity))
    except CalibrationError as e:
        again = f"calibrate again: isthmus calibrate {bundle.name} --data FOLDER"
        raise CalibrationError(f"in {bundle.name}: {e.message}", **{**e.facts, "hint": again}) from e
    if fidelity.subject != (subject := model_digest(bundle)):
        raise CalibrationError(
            f"the fidelity in {bundle.name} was measured of another model",
            subject=fidelity.subject,
            expected=subject,
            hint=f"measure it: isthmus calibrate {bundle.name} --data FOLDER",
        )
    return fidelity


def to_json(fidelity: Fidelity) -> bytes:
    """A fidelity's document, as canonical JSON."""
    return canonical(builtins(fidelity))


def from_json(data: bytes | memoryview) -> Fidelity:
    """Read a document.

    Raises:
        CalibrationError: not one of this format, or of another version's; the sentence names the field and the rule.
    """
    return FIDELITY.decode(data)


def _check(fidelity: Fidelity) -> None:
    for i, entry in enumerate(fidelity.entries):
        if not entry.choice.is_valid() or len(entry.shares) != len(entry.looks):
            raise ValueError(
                f"has entries[{i}], {entry.choice}, with {len(entry.shares)} shares or looks that cannot follow another"
            )


FIDELITY = DocumentKind(
    Fidelity,
    "fidelity",
    MAX_BYTES,
    CalibrationError,
    _check,
    hint="calibrate again: isthmus calibrate NAME --data FOLDER",
)
FORMAT = FIDELITY.format
