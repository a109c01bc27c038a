"""The fidelity document: the share of unchanged predictions, bytes and times of each codec at each cut.

Read by plans, by targets ("at least 99%, at most 4 kB") and by the router's guard. Format:
docs/explanation/calibration.md.
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

# The default target of `isthmus calibrate`: at least 99% unchanged predictions.
LIMIT = 0.99
MAX_BYTES = 4 * 2**20
# Cuts times codecs times qualities: hundreds in practice.
MAX_ENTRIES = 20_000
# Relative error below which regression outputs count as unchanged, by default.
TOLERANCE = 0.05
TOP1, CLOSE = "top1", "close"


class Measure(Struct, frozen=True, forbid_unknown_fields=True):
    """The criterion of agreement between two predictions; applied by pipeline.agreement.

    `top1`: the likeliest class of `output` is the same, in every row. `close`: the error of every output is at most
    `tolerance`. The error of an output is the RMS difference over the RMS of the output, or over the output's scale in
    `scales` if larger: the RMS over the calibration inputs.
    """

    kind: Annotated[str, one_of(TOP1, CLOSE)]
    output: Text = ""
    tolerance: Amount = TOLERANCE
    scales: Mapping[Text, Amount] = {}


def measure_for(bundle: Bundle, output: str = "", tolerance: float = TOLERANCE) -> Measure:
    """The criterion of a model: top-1 agreement for classifiers (or for `output`), else closeness of all outputs.

    Of a language model the classes are the next tokens.
    """
    after: Mapping[str, Any] = bundle.postprocess or {}
    class_output = output or (after.get("output", "") if after.get("kind") == "classify" else "")
    if not class_output and bundle.text is not None:
        class_output = bundle.text.logits
    return Measure(TOP1, str(class_output)) if class_output else Measure(CLOSE, tolerance=tolerance)


class Inputs(Struct, frozen=True, forbid_unknown_fields=True):
    """The inputs of a calibration: the files of `source`, and the numbers of inputs for calibration and for scoring."""

    source: Text
    files: Count
    calibrated: Count
    held_out: Count
    made: Text = "one of each file"


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """The result of a codec at one quality and cut, over the held-out inputs.

    `measured` is the share of inputs with an unchanged prediction; `low` and `high` are the Wilson interval at 95%.
    `agreement` is that share after isotonic regression over qualities (`bounds.isotonic`), used for targets and limits.
    `error` is the mean of the finite output errors. `bytes` (median) and `p95` are the payloads of all boundary
    tensors, `bits` the mean per value. Times are medians in milliseconds of CPU time on one thread. `fell_back` is the
    share of inputs with a tensor sent raw. `offered` permits use by plans.

    With closer looks, sizes and times are means over all transmissions together, since medians ignore rare second
    transmissions; `shares` has the share of inputs of each look.

    Of a language model an input is a token of a text: `perplexity` is that of the text, and sizes and times are of
    steps of one token. 0 of other models.
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
    perplexity: Amount = 0.0

    def __post_init__(self) -> None:
        # Documents of earlier versions stay usable: their measurements hold for the successor.
        force_setattr(self, "codec", successor(self.codec))

    @property
    def choice(self) -> Choice:
        """The measured choice, in the form of settings."""
        return Choice(self.codec, self.quality, self.looks)


class Reference(Struct, frozen=True, forbid_unknown_fields=True):
    """A baseline: the input as JPEG or WebP at one quality, decoded before the model, with the same inputs and
    criterion.
    """

    codec: Annotated[str, one_of("jpeg", "webp")]
    quality: Count
    agreement: Share
    low: Share
    high: Share
    error: Amount
    bytes: Count
    p95: Count


class Fidelity(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.fidelity/2"):
    """The measurements of a model; `subject` is its `model_digest`."""

    subject: Text
    limit: Share
    measure: Measure
    inputs: Inputs
    entries: Annotated[tuple[Entry, ...], Meta(max_length=MAX_ENTRIES)]
    references: Annotated[tuple[Reference, ...], Meta(max_length=MAX_ENTRIES)] = ()
    confidence: Share = CONFIDENCE

    def cuts(self) -> list[str]:
        """The measured cuts, in document order."""
        return list(dict.fromkeys(entry.cut for entry in self.entries))


def offered(fidelity: Fidelity, cut: str) -> list[Entry]:
    """The entries at `cut` permitted for plans, fewest bytes first: the estimated agreement meets the limit.

    The lower confidence bound would be too strict: a hundred inputs without a changed prediction give a bound of 96.3%.
    The router's guard detects an estimate that was too high.
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
    """The entry that meets all targets: the smallest with a target for agreement, else the most faithful.

    Units: `bytes` bounds the median payload, `pack_ms` the sum of encoding and decoding.

    Raises:
        CalibrationError: no measurement at `cut`, or none meets the targets; the message names the closest entry.
    """
    entries = [e for e in fidelity.entries if e.cut == cut]
    if not entries:
        raise CalibrationError(f"no codec was measured at cut {cut!r}", cut=cut, exists=fidelity.cuts())
    candidates = [
        e
        for e in entries
        if (bytes is None or e.bytes <= bytes) and (pack_ms is None or e.pack_ms + e.unpack_ms <= pack_ms)
    ]
    if suitable := [e for e in candidates if agreement is None or e.agreement >= agreement]:
        if agreement is not None:
            return min(suitable, key=lambda e: (e.bytes, -e.agreement))
        return max(suitable, key=lambda e: (e.agreement, -e.bytes))
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
    """The digest of weights, uncut graph and processing: the subject of a fidelity, independent of the cuts."""
    whole = bundle.segment(WHOLE).graph.digest
    doc = [bundle.weights.blob.digest, whole, bundle.preprocess, bundle.postprocess]
    return digest_of(json.dumps(doc, sort_keys=True, separators=(",", ":")).encode())


def read_fidelity(bundle: Bundle, blob: Callable[[Blob], bytes]) -> Fidelity | None:
    """The fidelity document of a bundle; None without calibration.

    Raises:
        CalibrationError: unreadable, measured on another model, or written by another version.
    """
    if bundle.fidelity is None:
        return None
    # The manifest states the size: refuse before the download.
    FIDELITY.check_size(bundle.fidelity.size)
    try:
        fidelity = from_json(blob(bundle.fidelity))
    except CalibrationError as e:
        hint = f"calibrate again: isthmus calibrate {bundle.name} --data FOLDER"
        raise CalibrationError(f"in {bundle.name}: {e.message}", **{**e.facts, "hint": hint}) from e
    if fidelity.subject != (subject := model_digest(bundle)):
        raise CalibrationError(
            f"the fidelity in {bundle.name} was measured of another model",
            subject=fidelity.subject,
            expected=subject,
            hint=f"measure it: isthmus calibrate {bundle.name} --data FOLDER",
        )
    return fidelity


def to_json(fidelity: Fidelity) -> bytes:
    """Canonical JSON of a fidelity document."""
    doc = builtins(fidelity)
    for entry in doc["entries"]:
        # Absent where there is none, so that documents of other models stay as earlier releases wrote them.
        if not entry["perplexity"]:
            del entry["perplexity"]
    return canonical(doc)


def from_json(data: bytes | memoryview) -> Fidelity:
    """Parse a fidelity document.

    Raises:
        CalibrationError: not of this format or version; the message names the field and the rule.
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
