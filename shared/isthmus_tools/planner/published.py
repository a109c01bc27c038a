"""Plans where they are kept: in the bundle that they are for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from isthmus.artifacts.bundle import Blob, Bundle, Segment, digest_of, subject_digest
from isthmus.artifacts.choice import PHOTO_ID, Choice
from isthmus.artifacts.fidelity import Fidelity
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.artifacts.plan_document import to_json
from isthmus.artifacts.segment_id import WHOLE
from isthmus.codecs import find_codec
from isthmus.errors import Missing, PlanMismatch
from isthmus.registry import Registry, Version
from isthmus_tools.planner.usable import usable_codecs


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
        if coding.codec == PHOTO_ID:
            continue
        if find_codec(coding.codec).calibrated and before.tables.get(tensor) != after.tables.get(tensor):
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
