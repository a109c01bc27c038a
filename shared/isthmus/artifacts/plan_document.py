"""A plan as JSON, and back: every field checked and bounded. Schema: docs/plan.schema.json."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict

from isthmus.artifacts.bundle import Blob, Bundle, is_digest, is_model_name, subject_digest
from isthmus.artifacts.choice import GRADED, KNOWN, MAX_LOOKS, MAX_MARGIN, NEVER_CHOSEN, Choice, Look, successor
from isthmus.artifacts.conditions import OBJECTIVES, Conditions, Constraints
from isthmus.artifacts.cuts import is_cut_name
from isthmus.artifacts.fields import Fields, refuse
from isthmus.artifacts.plan import (
    FORMAT,
    INPUTS,
    KINDS,
    MAX_CANDIDATES,
    MAX_PLAN_BYTES,
    SOURCES,
    TERMS,
    TRIED_WITH,
    Candidate,
    CloserLooks,
    Coding,
    Error,
    Measured,
    Plan,
    ProfileUsed,
    Terms,
)
from isthmus.errors import ConstraintMalformed, PlanMalformed, PlanMismatch

_CODECS = frozenset(KNOWN) - NEVER_CHOSEN | {"photo/1"}
"""What a plan may say of a tensor. How a photo travels, it says; what closer looks make of a codec, the route does."""


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
        if (looks := candidate.pop("looks")) is not None:
            each = zip(looks["looks"], looks["shares"], strict=True)
            said = [{**look, "share": share} for look, share in each]
            candidate["closer_looks"] = {"output": looks["output"], "looks": said}
    data = json.dumps({"format": FORMAT, **doc}, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(data) > MAX_PLAN_BYTES:
        raise PlanMalformed(f"a plan of {len(data)} bytes; at most {MAX_PLAN_BYTES}", limit=MAX_PLAN_BYTES)
    return data


def from_json(data: bytes | memoryview) -> Plan:
    """Read a plan.

    Raises:
        PlanMalformed: not a plan of this format, or of another version's; `where` in its facts says where it departs.
    """
    if len(data) > MAX_PLAN_BYTES:
        raise PlanMalformed(f"a plan of {len(data)} bytes; at most {MAX_PLAN_BYTES}", limit=MAX_PLAN_BYTES)
    try:
        doc = json.loads(bytes(data), parse_constant=lambda text: refuse("a number", f"{text} is not JSON"))
    except (ValueError, RecursionError) as e:
        raise PlanMalformed(f"the plan is not JSON: {e}") from e
    top = Fields(doc, "plan")
    if (found := top.text("format")) != FORMAT:
        if found.startswith(FORMAT.partition("/")[0] + "/"):
            raise PlanMalformed(
                f"the plan was written by another version of Isthmus: it is {found[:80]!r}, and this one reads"
                f" {FORMAT!r}",
                where="plan.format",
                hint="plan again: isthmus plan NAME …",
            )
        refuse("plan.format", f"is {found[:80]!r}; this version reads {FORMAT!r}")
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
        refuse("plan.candidates", "two have one name")
    if plan.chosen not in names:
        refuse("plan.chosen", f"is {plan.chosen!r}, which is no candidate")
    if plan.choice.refused:
        refuse("plan.chosen", f"was refused: {plan.choice.refused}")
    return plan


def _candidate(doc: Fields) -> Candidate:
    measured, error, predicted = doc.take("measured"), doc.sub("error"), doc.sub("predicted")
    made = Candidate(
        name=doc.text("name"),
        kind=doc.text("kind", KINDS.__contains__),
        predicted=_terms(predicted),
        cuts=doc.texts("cuts", is_cut_name),
        codecs={n: _coding(Fields(c, f"codecs[{n[:80]}]")) for n, c in doc.mapping("codecs").items()},
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
        looks=_closer_looks(doc.sub("closer_looks")) if doc.has("closer_looks") else None,
    )
    error.end()
    doc.end()
    if (made.kind == "split") != bool(made.cuts):
        refuse(made.name[:80], f"is of kind {made.kind} with cuts {list(made.cuts)}")
    if made.looks is not None:
        _check_looks(made, made.looks)
    return made


def _check_looks(candidate: Candidate, looks: CloserLooks) -> None:
    """See that they send finer what crosses."""
    where, coarse = candidate.name[:80], [c for c in candidate.codecs.values() if c.codec in GRADED]
    if not candidate.cuts:
        refuse(where, "has closer_looks, and no cut that anything crosses")
    if not coarse:
        refuse(where, "has closer_looks, and nothing that they could send finer")
    for coding in coarse:
        if not (choice := Choice(coding.codec, coding.quality, looks.looks)).is_valid():
            refuse(
                where,
                f"has closer_looks that are none, {choice}: qualities rise to 1 at most, and margins are above 0 and"
                f" at most {MAX_MARGIN:g}",
            )


def _terms(doc: Fields) -> Terms:
    seconds = {name: doc.number(name) for name in TERMS}
    sources = doc.sub("sources")
    edge, cloud = (sources.text(tier, SOURCES.__contains__) for tier in ("edge", "cloud"))
    sources.end()
    doc.end("total")
    return Terms(**seconds, edge_source=edge, cloud_source=cloud)


def _measured(doc: Fields) -> Measured:
    parts = Fields(doc.take("parts"), "parts")
    found = {name: parts.number(name) for name in doc.mapping("parts")}
    made = Measured(doc.number("median"), doc.number("low"), doc.number("high"), doc.whole("runs"), found)
    doc.end()
    return made


def _coding(doc: Fields) -> Coding:
    made = Coding(successor(doc.text("codec", lambda codec: successor(codec) in _CODECS)), doc.number("quality"))
    doc.end()
    return made


def _closer_looks(doc: Fields) -> CloserLooks:
    output, found = doc.text("output"), doc.many("looks", _look, most=MAX_LOOKS)
    doc.end()
    if not found:
        refuse("closer_looks.looks", "is empty")
    looks, shares = zip(*found, strict=True)
    if any(before < after for before, after in itertools.pairwise((1.0, *shares))):
        refuse("closer_looks.looks", f"has shares of {', '.join(map(str, shares))}: from 1 on, none exceeds another")
    return CloserLooks(output, looks, shares)


def _look(doc: Fields) -> tuple[Look, float]:
    made, share = Look(doc.number("quality"), doc.number("margin")), doc.number("share")
    doc.end()
    return made, share


def _profile(doc: Fields) -> ProfileUsed:
    tier, device, cpu, at = (doc.text(key) for key in ("tier", "device", "cpu", "measured_at"))
    made = ProfileUsed(tier, device, cpu, at, doc.flag("steady"))
    doc.end()
    return made


def _conditions(doc: Fields) -> Conditions:
    up, down = (doc.number_or_none(key) for key in ("uplink_bps", "downlink_bps"))
    rtt_s = doc.number("rtt_s")
    doc.end()
    try:
        return Conditions(math.inf if up is None else up, math.inf if down is None else down, rtt_s)
    except ConstraintMalformed as e:
        raise PlanMalformed(f"plan.conditions: {e.message}", where="plan.conditions") from e


def _constraints(doc: Fields) -> Constraints:
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


def read_plan(bundle: Bundle, blob: Callable[[Blob], bytes]) -> Plan | None:
    """The plan in a bundle; None where there is none.

    Raises:
        PlanMismatch: it was made for another bundle, so it says nothing of this one.
        PlanMalformed: it is no plan, or another version of Isthmus wrote it.
        RegistryError: the blob cannot be had.
    """
    if bundle.plan is None:
        return None
    again = f"plan again: isthmus plan {bundle.name} …; or serve without it: the setting plan=false"
    if bundle.plan.size > MAX_PLAN_BYTES:
        raise PlanMalformed(
            f"the plan in {bundle.name} has {bundle.plan.size} bytes; at most {MAX_PLAN_BYTES}",
            where="plan",
            hint=again,
        )
    try:
        plan = from_json(blob(bundle.plan))
    except PlanMalformed as e:
        raise PlanMalformed(f"in {bundle.name}: {e.message}", **{**e.facts, "hint": again}) from e
    if plan.subject != (subject := subject_digest(bundle)):
        raise PlanMismatch(
            f"the plan in {bundle.name} was made for {plan.model} {plan.subject[:19]}…, and this is {subject[:19]}…",
            subject=plan.subject,
            expected=subject,
            hint=again,
        )
    return plan
