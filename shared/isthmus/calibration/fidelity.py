"""What was measured of each codec at each cut: how often the answer stays the same, and what it costs.

The document lies in the bundle. What a plan may use, and what a target such as "at least 99%, at most 4 kB" means, is
read from it. Format: docs/calibration.md, "The fidelity document".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from isthmus.bundle import WHOLE, Blob, Bundle, digest_of
from isthmus.calibration.agreement import CLOSE, TOP1, Measure
from isthmus.calibration.bounds import CONFIDENCE
from isthmus.calibration.choice import Again, Choice
from isthmus.codecs import KNOWN
from isthmus.errors import CalibrationError

FORMAT = "isthmus.fidelity/1"
LIMIT = 0.99
MAX_BYTES = 4 * 2**20
MAX_ENTRIES = 20_000


@dataclass(frozen=True)
class Inputs:
    """What it was measured with: the files of `source`, and how many inputs made of them calibrated and were scored."""

    source: str
    files: int
    calibrated: int
    held_out: int
    made: str = "one of each file"


@dataclass(frozen=True)
class Entry:
    """One codec at one quality at one cut, over the held-out inputs.

    `measured` is the share of inputs whose answer stays the same, `low` and `high` its interval (Wilson, 95%).
    `agreement` is that share made to rise with a codec's quality (`bounds.rising`): what targets and limits go by.
    `error` is the mean of the output's error where it is finite. `bytes` (median) and `p95` are the payloads of all
    tensors that cross, `bits` what a value costs on average. Units: milliseconds of one thread's CPU time, medians.
    `fell_back` is the share of inputs where a tensor went raw. `offered` says whether a plan may use it.

    With a second look, at `again_quality` where the answer's margin is below `again_margin`, `asked_again` is the share
    of inputs that took it; sizes and times are of both sends together, and means, since their medians know of one only.
    """

    cut: str
    codec: str
    quality: float
    agreement: float
    low: float
    high: float
    error: float
    bytes: int
    p95: int
    bits: float
    pack_ms: float
    unpack_ms: float
    fell_back: float
    offered: bool
    measured: float
    again_quality: float = 0.0
    again_margin: float = 0.0
    asked_again: float = 0.0

    @property
    def choice(self) -> Choice:
        """What was measured, as settings write it."""
        again = Again(self.again_quality, self.again_margin) if self.again_margin else None
        return Choice(self.codec, self.quality, again)


@dataclass(frozen=True)
class Reference:
    """The input itself as JPEG or WebP of one quality, decoded again before the model; same inputs, same measure."""

    codec: str
    quality: int
    agreement: float
    low: float
    high: float
    error: float
    bytes: int
    p95: int


@dataclass(frozen=True)
class Fidelity:
    """All that was measured of one model; `subject` is its `model_digest`."""

    subject: str
    limit: float
    measure: Measure
    inputs: Inputs
    entries: tuple[Entry, ...]
    references: tuple[Reference, ...] = ()
    confidence: float = field(default=CONFIDENCE)

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
    known = [e for e in fidelity.entries if e.cut == cut]
    if not known:
        raise CalibrationError(f"no codec was measured at cut {cut!r}", cut=cut, exists=fidelity.cuts())
    fits = [
        e
        for e in known
        if (bytes is None or e.bytes <= bytes) and (pack_ms is None or e.pack_ms + e.unpack_ms <= pack_ms)
    ]
    if met := [e for e in fits if agreement is None or e.agreement >= agreement]:
        if agreement is not None:
            return min(met, key=lambda e: (e.bytes, -e.agreement))
        return max(met, key=lambda e: (e.agreement, -e.bytes))
    closest = max(fits, key=lambda e: e.agreement, default=None) or min(known, key=lambda e: e.bytes)
    raise CalibrationError(
        f"nothing measured at cut {cut} meets the targets; closest is {closest.choice}: "
        f"{closest.agreement:.1%} the same, {closest.bytes} bytes, {closest.pack_ms + closest.unpack_ms:.2f} ms",
        cut=cut,
        agreement=agreement,
        bytes=bytes,
        pack_ms=pack_ms,
        closest=asdict(closest),
    )


def model_digest(bundle: Bundle) -> str:
    """What a fidelity is of: the weights, the uncut graph and the processing; other cuts are still the same model."""
    whole = bundle.segment(WHOLE).graph.digest
    doc = [bundle.weights.blob.digest, whole, bundle.preprocess, bundle.postprocess]
    return digest_of(json.dumps(doc, sort_keys=True, separators=(",", ":")).encode())


def read(bundle: Bundle, blob: Callable[[Blob], bytes]) -> Fidelity | None:
    """The fidelity of a bundle; None where it was not calibrated.

    Raises:
        CalibrationError: the document cannot be read, or was measured of another model.
    """
    if bundle.fidelity is None:
        return None
    if bundle.fidelity.size > MAX_BYTES:
        raise CalibrationError(f"a fidelity of {bundle.fidelity.size} bytes; at most {MAX_BYTES}", limit=MAX_BYTES)
    found = from_json(blob(bundle.fidelity))
    if found.subject != (subject := model_digest(bundle)):
        raise CalibrationError(
            f"the fidelity in {bundle.name} was measured of another model",
            subject=found.subject,
            expected=subject,
            hint=f"measure it: isthmus calibrate {bundle.name} --data FOLDER",
        )
    return found


def to_json(fidelity: Fidelity) -> bytes:
    """Canonical JSON: sorted keys, no spaces."""
    doc = {"format": FORMAT, **asdict(fidelity)}
    return json.dumps(doc, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def from_json(data: bytes | memoryview) -> Fidelity:
    """Read a document.

    Raises:
        CalibrationError: not one of this format; the sentence says where it departs.
    """
    if len(data) > MAX_BYTES:
        raise CalibrationError(f"a fidelity of {len(data)} bytes; at most {MAX_BYTES}", limit=MAX_BYTES)
    try:
        doc = json.loads(bytes(data))
        if doc.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if len(doc["entries"]) > MAX_ENTRIES or len(doc["references"]) > MAX_ENTRIES:
            raise ValueError(f"more than {MAX_ENTRIES} entries")
        found = Fidelity(
            subject=str(doc["subject"]),
            limit=_share(doc["limit"]),
            measure=_measure(doc["measure"]),
            inputs=Inputs(**_typed(Inputs, doc["inputs"])),
            entries=tuple(_entry(e) for e in doc["entries"]),
            references=tuple(Reference(**_typed(Reference, r)) for r in doc["references"]),
            confidence=_share(doc["confidence"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise CalibrationError(f"not a fidelity document: {type(e).__name__}: {e}") from e
    return found


def _measure(doc: dict[str, Any]) -> Measure:
    if doc["kind"] not in (TOP1, CLOSE):
        raise ValueError(f"measure {doc['kind']!r} is neither {TOP1} nor {CLOSE}")
    scales = {str(name): _number(scale) for name, scale in doc["scales"].items()}
    return Measure(str(doc["kind"]), str(doc["output"]), _number(doc["tolerance"]), scales)


def _entry(doc: dict[str, Any]) -> Entry:
    made = Entry(**_typed(Entry, doc))
    # Without its margin a second look would be read as none.
    is_one = made.again_quality or made.again_margin or made.asked_again
    if is_one and not Again(made.again_quality, made.again_margin).can_follow(made.codec, made.quality):
        raise ValueError(f"{made.choice} at cut {made.cut} is no second look")
    return made


_SHARES = frozenset({"agreement", "measured", "low", "high", "fell_back", "again_quality", "asked_again"})


def _typed(kind: type[Any], doc: dict[str, Any]) -> dict[str, Any]:
    """The fields of a flat dataclass, each checked for its type and range; only those with a default may be missing."""
    expected = {f.name: f.type for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    if not needed <= doc.keys() <= expected.keys():
        raise ValueError(f"{kind.__name__} has the keys {', '.join(expected)}")
    return {name: _value(name, annotation, doc[name]) for name, annotation in expected.items() if name in doc}


def _value(name: str, annotation: Any, value: Any) -> Any:
    if (name == "quality" and annotation == "float") or name in _SHARES:
        return _share(value)
    if annotation == "float":
        return _number(value)
    wanted: type = {"int": int, "str": str, "bool": bool}[annotation]
    if type(value) is not wanted or (isinstance(value, int) and value < 0):
        raise ValueError(f"{name} is {value!r}")
    if name == "codec" and value not in (*KNOWN, "jpeg", "webp"):
        raise ValueError(f"{value!r} is no codec")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no finite number from 0")
    return float(value)


def _share(value: Any) -> float:
    number = _number(value)
    if number > 1:
        raise ValueError(f"{value!r} is no share")
    return number
