"""The fidelity document: JSON that lies in the bundle, every field checked. Format: docs/calibration.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, replace
from typing import Any

from isthmus.artifacts.agreement import CLOSE, TOP1, Measure
from isthmus.artifacts.bundle import Blob, Bundle, digest_of
from isthmus.artifacts.choice import KNOWN, MAX_LOOKS, NEVER_CHOSEN, Look, successor
from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs, Reference
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CalibrationError

FORMAT = "isthmus.fidelity/2"
MAX_BYTES = 4 * 2**20
MAX_ENTRIES = 20_000


def model_digest(bundle: Bundle) -> str:
    """What a fidelity is of: the weights, the uncut graph and the processing; other cuts are still the same model."""
    whole = bundle.segment(WHOLE).graph.digest
    doc = [bundle.weights.blob.digest, whole, bundle.preprocess, bundle.postprocess]
    return digest_of(json.dumps(doc, sort_keys=True, separators=(",", ":")).encode())


def read(bundle: Bundle, blob: Callable[[Blob], bytes]) -> Fidelity | None:
    """The fidelity of a bundle; None where it was not calibrated.

    Raises:
        CalibrationError: the document cannot be read, was measured of another model, or written by another version.
    """
    if bundle.fidelity is None:
        return None
    if bundle.fidelity.size > MAX_BYTES:
        raise CalibrationError(f"a fidelity of {bundle.fidelity.size} bytes; at most {MAX_BYTES}", limit=MAX_BYTES)
    try:
        found = from_json(blob(bundle.fidelity))
    except CalibrationError as e:
        again = f"calibrate again: isthmus calibrate {bundle.name} --data FOLDER"
        raise CalibrationError(f"in {bundle.name}: {e.message}", **{**e.facts, "hint": again}) from e
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
        CalibrationError: not one of this format, or of another version's; the sentence says where it departs.
    """
    if len(data) > MAX_BYTES:
        raise CalibrationError(f"a fidelity of {len(data)} bytes; at most {MAX_BYTES}", limit=MAX_BYTES)
    try:
        doc = json.loads(bytes(data))
        if (written := doc.pop("format")) != FORMAT:
            if str(written).startswith(FORMAT.partition("/")[0] + "/"):
                raise CalibrationError(
                    f"the fidelity was written by another version of Isthmus: it is {str(written)[:80]!r}, and this one"
                    f" reads {FORMAT!r}",
                    hint="calibrate again: isthmus calibrate NAME --data FOLDER",
                )
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
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise CalibrationError(
            f"not a fidelity document: {type(e).__name__}: {str(e)[:200]}",
            hint="another version may have written it: isthmus calibrate NAME --data FOLDER",
        ) from e
    return found


def _measure(doc: dict[str, Any]) -> Measure:
    if doc["kind"] not in (TOP1, CLOSE):
        raise ValueError(f"measure {doc['kind']!r} is neither {TOP1} nor {CLOSE}")
    scales = {str(name): _number(scale) for name, scale in doc["scales"].items()}
    return Measure(str(doc["kind"]), str(doc["output"]), _number(doc["tolerance"]), scales)


def _entry(doc: dict[str, Any]) -> Entry:
    looks = tuple(Look(**_typed(Look, look)) for look in _few(doc.pop("looks", [])))
    shares = tuple(_share(share) for share in _few(doc.pop("shares", [])))
    made = replace(Entry(**_typed(Entry, doc)), looks=looks, shares=shares)
    if made.codec not in KNOWN or made.codec in NEVER_CHOSEN:
        raise ValueError(f"{made.codec} at cut {made.cut} is no codec of what crosses")
    if not made.choice.is_valid() or len(shares) != len(looks):
        raise ValueError(f"{made.choice} at cut {made.cut} has {len(shares)} shares, or looks that cannot follow")
    return made


def _few(value: Any) -> list[Any]:
    """A list of as many things as there may be looks."""
    if type(value) is not list or len(value) > MAX_LOOKS:
        raise ValueError(f"an entry has lists of at most {MAX_LOOKS} looks and of their shares")
    return value


_SHARES = frozenset({"agreement", "measured", "low", "high", "fell_back"})


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
    if type(value) is not wanted or (isinstance(value, int) and not 0 <= value < 2**63):
        raise ValueError(f"{name} is {str(value)[:80]}, no {annotation} of a fidelity")
    if name == "codec":
        value = successor(str(value))
        if value not in (*KNOWN, "jpeg", "webp"):
            raise ValueError(f"{value!r} is no codec of this version: calibrate the model again")
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
