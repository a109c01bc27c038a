"""Plans where they are kept: in the bundle that they are for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from isthmus.bundle import WHOLE, Blob, Bundle, Segment, digest_of, subject_digest
from isthmus.calibration.choice import Choice
from isthmus.calibration.fidelity import Fidelity
from isthmus.codecs import find
from isthmus.errors import Missing, PlanMalformed, PlanMismatch
from isthmus.planner.planning.document import from_json, to_json
from isthmus.planner.planning.plan import MAX_PLAN_BYTES, Candidate, Plan
from isthmus.planner.planning.route import PHOTO
from isthmus.planner.planning.usable import usable_codecs
from isthmus.registry import Registry, Version


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


def publish_plan(
    registry: Registry, bundle: Bundle, files: Mapping[str, Path], plan: Plan, *, alias: str | None = None
) -> Version:
    """Publish `bundle` with `plan` as its model's next version; published again, it stays the version that it is.

    Raises:
        PlanMismatch: the plan is for another bundle.
    """
    if plan.subject != (subject := subject_digest(bundle)):
        raise PlanMismatch(
            f"the plan is for {plan.subject[:19]}…, and this is {subject[:19]}…", subject=plan.subject, expected=subject
        )
    data = to_json(plan)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        path = Path(folder) / "plan.json"
        path.write_bytes(data)
        blob = Blob(digest_of(data), len(data))
        return registry.publish(replace(bundle, plan=blob), {**files, blob.digest: path}, alias=alias)


def carried(plan: Plan, before: Bundle, after: Bundle, fidelity: Fidelity | None) -> Plan | None:
    """`plan`, made for `before`, as a plan for `after`; None where its choice would not run there exactly as measured.

    More cuts and tables of other tensors change nothing of a choice. `fidelity` is that of `after`: a codec that it
    measured at the choice's cut must be one that it offers.
    """
    if (before.preprocess, before.postprocess) != (after.preprocess, after.postprocess):
        return None
    try:
        same = _segments(plan.choice, before) == _segments(plan.choice, after)
    except Missing:
        return None
    if not same or before.weights != after.weights:
        return None
    for tensor, coding in plan.choice.codecs.items():
        if coding.codec == PHOTO:
            continue
        if find(coding.codec).calibrated and before.tables.get(tensor) != after.tables.get(tensor):
            return None
        if fidelity is not None and not _offers(fidelity, plan.choice, Choice(coding.codec, coding.quality)):
            return None
    return replace(plan, subject=subject_digest(after))


def _segments(choice: Candidate, bundle: Bundle) -> tuple[Segment, ...]:
    """The segments that a candidate runs of its bundle; a variant's are in a bundle of its own."""
    return bundle.partition(choice.cuts) if choice.kind == "split" else (bundle.segment(WHOLE),)


def _offers(fidelity: Fidelity, choice: Candidate, coding: Choice) -> bool:
    looks = choice.looks.looks if choice.looks is not None else ()
    cut = choice.cuts[0] if choice.cuts else ""
    if cut in fidelity.cuts():
        return any(e.offered and e.choice == replace(coding, looks=looks) for e in fidelity.entries if e.cut == cut)
    return coding in usable_codecs(fidelity, cut)
