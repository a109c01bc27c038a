"""A plan as JSON, and back: every field checked and bounded. Schema: docs/plan.schema.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from isthmus.bundle import is_cut_name, is_digest, is_model_name
from isthmus.codecs import KNOWN
from isthmus.errors import ConstraintMalformed, PlanMalformed
from isthmus.planner.planning.conditions import OBJECTIVES, Conditions, Constraints
from isthmus.planner.planning.plan import (
    FORMAT,
    INPUTS,
    KINDS,
    MAX_CANDIDATES,
    MAX_PLAN_BYTES,
    SOURCES,
    TERMS,
    TRIED_WITH,
    Candidate,
    Coding,
    Error,
    Measured,
    Plan,
    ProfileUsed,
    SecondLook,
    Terms,
)

_MOST_TEXT = 4096
_MOST_ITEMS = 1024


def to_json(plan: Plan) -> bytes:
    """The document of `plan`; an unlimited rate is null."""
    doc = asdict(plan)
    for rate in ("uplink_bps", "downlink_bps"):
        if math.isinf(doc["conditions"][rate]):
            doc["conditions"][rate] = None
    for candidate in doc["candidates"]:
        predicted = candidate["predicted"]
        sources = {tier: predicted.pop(f"{tier}_source") for tier in ("edge", "cloud")}
        candidate["predicted"] = {"total": sum(predicted.values()), **predicted, "sources": sources}
        if candidate["second_look"] is None:
            del candidate["second_look"]
    data = json.dumps({"format": FORMAT, **doc}, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(data) > MAX_PLAN_BYTES:
        raise PlanMalformed(f"a plan of {len(data)} bytes; at most {MAX_PLAN_BYTES}", limit=MAX_PLAN_BYTES)
    return data


def from_json(data: bytes | memoryview) -> Plan:
    """Read a plan.

    Raises:
        PlanMalformed: not a plan of this format; `where` in its facts says where it departs.
    """
    if len(data) > MAX_PLAN_BYTES:
        raise PlanMalformed(f"a plan of {len(data)} bytes; at most {MAX_PLAN_BYTES}", limit=MAX_PLAN_BYTES)
    try:
        doc = json.loads(bytes(data), parse_constant=lambda text: _refuse("a number", f"{text} is not JSON"))
    except (ValueError, RecursionError) as e:
        raise PlanMalformed(f"the plan is not JSON: {e}") from e
    top = _Doc(doc, "plan")
    if top.text("format") != FORMAT:
        _refuse("plan.format", f"is {top.text('format')!r}; this version reads {FORMAT!r}")
    candidates = top.many("candidates", _candidate, most=MAX_CANDIDATES)
    plan = Plan(
        model=top.text("model", is_model_name),
        subject=top.text("subject", is_digest),
        objective=top.text("objective", OBJECTIVES.__contains__),
        conditions=_conditions(top.sub("conditions")),
        constraints=_constraints(top.sub("constraints")),
        profiles=top.many("profiles", _profile),
        candidates=candidates,
        chosen=top.text("chosen"),
        why=top.texts("why"),
        made_at=top.text("made_at"),
        isthmus=top.text("isthmus"),
        currency=top.text("currency"),
        inputs=top.text("inputs", TRIED_WITH.__contains__),
    )
    top.end("format")
    names = [c.name for c in candidates]
    if len(set(names)) != len(names):
        _refuse("plan.candidates", "two have one name")
    if plan.chosen not in names:
        _refuse("plan.chosen", f"is {plan.chosen!r}, which is no candidate")
    if plan.choice.refused:
        _refuse("plan.chosen", f"was refused: {plan.choice.refused}")
    return plan


class _Doc:
    """An object whose keys are taken one by one, each as what it must be."""

    def __init__(self, doc: Any, where: str) -> None:
        if not isinstance(doc, dict):
            _refuse(where, "is not an object")
        self._doc, self._where, self._taken = doc, where, set[str]()

    def has(self, key: str) -> bool:
        return key in self._doc

    def take(self, key: str) -> Any:
        self._taken.add(key)
        if key not in self._doc:
            _refuse(f"{self._where}.{key}", "is missing")
        return self._doc[key]

    def text(self, key: str, good: Any = None) -> str:
        value = self.take(key)
        if not isinstance(value, str) or len(value) > _MOST_TEXT or (good is not None and not good(value)):
            self._no(key, value)
        return str(value)

    def number(self, key: str, low: float = 0.0) -> float:
        value = self.take(key)
        if type(value) not in (int, float) or not low <= value < math.inf:
            self._no(key, value)
        return float(value)

    def whole(self, key: str) -> int:
        value = self.take(key)
        if type(value) is not int or not 0 <= value < 2**63:
            self._no(key, value)
        return int(value)

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if type(value) is not bool:
            self._no(key, value)
        return bool(value)

    def absent(self, key: str) -> bool:
        return self.take(key) is None

    def number_or_none(self, key: str) -> float | None:
        return None if self.absent(key) else self.number(key)

    def whole_or_none(self, key: str) -> int | None:
        return None if self.absent(key) else self.whole(key)

    def sub(self, key: str) -> _Doc:
        return _Doc(self.take(key), f"{self._where}.{key}")

    def texts(self, key: str, good: Any = None) -> tuple[str, ...]:
        value = self._list(key, _MOST_ITEMS)
        if not all(isinstance(v, str) and len(v) <= _MOST_TEXT and (good is None or good(v)) for v in value):
            self._no(key, value)
        return tuple(value)

    def many(self, key: str, read: Any, most: int = _MOST_ITEMS) -> tuple[Any, ...]:
        found = self._list(key, most)
        return tuple(read(_Doc(item, f"{self._where}.{key}[{i}]")) for i, item in enumerate(found))

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.take(key)
        if not isinstance(value, dict) or len(value) > _MOST_ITEMS or any(len(k) > _MOST_TEXT for k in value):
            self._no(key, value)
        return dict(value)

    def end(self, *known: str) -> None:
        """Refuse what nobody took: a plan of another version is not half understood."""
        if more := sorted(self._doc.keys() - self._taken - set(known)):
            _refuse(self._where, f"has unknown keys: {', '.join(more)[:200]}")

    def _list(self, key: str, most: int) -> Sequence[Any]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > most:
            self._no(key, value)
        return list(value)

    def _no(self, key: str, value: Any) -> NoReturn:
        _refuse(f"{self._where}.{key}", f"cannot be {str(value)[:80]!r}")


def _candidate(doc: _Doc) -> Candidate:
    measured, error, predicted = doc.take("measured"), doc.sub("error"), doc.sub("predicted")
    made = Candidate(
        name=doc.text("name"),
        kind=doc.text("kind", KINDS.__contains__),
        predicted=_terms(predicted),
        cuts=doc.texts("cuts", is_cut_name),
        codecs={n: _coding(_Doc(c, f"codecs[{n[:80]}]")) for n, c in doc.mapping("codecs").items()},
        input=doc.text("input", INPUTS.__contains__),
        variant=None if doc.absent("variant") else doc.text("variant", is_digest),
        up_bytes=doc.whole("up_bytes"),
        down_bytes=doc.whole("down_bytes"),
        measured=None if measured is None else _measured(doc.sub("measured")),
        error=Error(
            error.number("relative"), error.whole("inputs"), error.number("disagreement"), error.flag("calibrated")
        ),
        edge_memory_bytes=doc.whole("edge_memory_bytes"),
        cloud_memory_bytes=doc.whole("cloud_memory_bytes"),
        price=doc.number_or_none("price"),
        energy_j=doc.number_or_none("energy_j"),
        refused=doc.text("refused"),
        second_look=_second_look(doc.sub("second_look")) if doc.has("second_look") else None,
    )
    error.end()
    doc.end()
    if (made.kind == "split") != bool(made.cuts):
        _refuse(made.name[:80], f"is of kind {made.kind} with cuts {list(made.cuts)}")
    if made.second_look is not None and not made.cuts:
        _refuse(made.name[:80], "has a second_look, and no cut that anything crosses")
    return made


def _terms(doc: _Doc) -> Terms:
    seconds = {name: doc.number(name) for name in TERMS}
    sources = doc.sub("sources")
    edge, cloud = (sources.text(tier, SOURCES.__contains__) for tier in ("edge", "cloud"))
    sources.end()
    doc.end("total")
    return Terms(**seconds, edge_source=edge, cloud_source=cloud)


def _measured(doc: _Doc) -> Measured:
    parts = _Doc(doc.take("parts"), "parts")
    found = {name: parts.number(name) for name in doc.mapping("parts")}
    made = Measured(doc.number("median"), doc.number("low"), doc.number("high"), doc.whole("runs"), found)
    doc.end()
    return made


def _coding(doc: _Doc) -> Coding:
    made = Coding(doc.text("codec", KNOWN.__contains__), doc.number("quality"))
    doc.end()
    return made


def _second_look(doc: _Doc) -> SecondLook:
    made = SecondLook(doc.number("quality"), doc.number("margin"), doc.text("output"), doc.number("share"))
    doc.end()
    if made.quality > 1 or made.share > 1:
        _refuse("second_look", f"has a quality of {made.quality:g} and a share of {made.share:g}; both end at 1")
    return made


def _profile(doc: _Doc) -> ProfileUsed:
    tier, device, cpu, at = (doc.text(key) for key in ("tier", "device", "cpu", "measured_at"))
    made = ProfileUsed(tier, device, cpu, at, doc.flag("steady"))
    doc.end()
    return made


def _conditions(doc: _Doc) -> Conditions:
    up, down = (doc.number_or_none(key) for key in ("uplink_bps", "downlink_bps"))
    rtt_s = doc.number("rtt_s")
    doc.end()
    try:
        return Conditions(math.inf if up is None else up, math.inf if down is None else down, rtt_s)
    except ConstraintMalformed as e:
        raise PlanMalformed(f"plan.conditions: {e.message}", where="plan.conditions") from e


def _constraints(doc: _Doc) -> Constraints:
    found = (
        doc.whole_or_none("edge_memory_bytes"),
        doc.whole("private_depth"),
        doc.number_or_none("latency_s"),
        doc.number_or_none("max_error"),
        doc.number_or_none("max_disagreement"),
    )
    doc.end()
    try:
        return Constraints(*found)
    except ConstraintMalformed as e:
        raise PlanMalformed(f"plan.constraints: {e.message}", where="plan.constraints") from e


def _refuse(where: str, what: str) -> NoReturn:
    raise PlanMalformed(f"{where} {what}", where=where)
