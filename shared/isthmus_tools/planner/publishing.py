"""Plans in the registry: each in the bundle that it was made for, carried over to later bundles where still valid."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from isthmus.artifacts.bundle import Blob, Bundle, Segment, digest_of, subject_digest
from isthmus.artifacts.choice import PHOTO_ID, Choice
from isthmus.artifacts.fidelity import Fidelity
from isthmus.artifacts.plan import Candidate, Plan, to_json
from isthmus.artifacts.segment_id import WHOLE
from isthmus.codecs import find_codec
from isthmus.errors import Missing, PlanMismatch
from isthmus.registry import Registry, Version
from isthmus_tools.planner.offered import offered_codecs


def publish_plan(
    registry: Registry, bundle: Bundle, files: Mapping[str, Path], plan: Plan, *, alias: str | None = None
) -> Version:
    """Publish `bundle` with `plan` as the model's next version; the same content keeps its version.

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
        return registry.publish(structs.replace(bundle, plan=blob), {**files, blob.digest: path}, alias=alias)


def carry_over(plan: Plan, before: Bundle, after: Bundle, fidelity: Fidelity | None) -> Plan | None:
    """`plan` for `before` as a plan for `after`; None where the chosen candidate would run differently there.

    Further cuts, and tables of other tensors, leave the candidate unchanged. `fidelity` is that of `after`: at a cut
    with fidelity entries, the candidate's codec must be on offer.
    """
    # Other pre-processing makes other inputs, and with these other sizes and errors.
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
            continue  # photos are decoded by the pre-processing, compared above
        if find_codec(coding.codec).calibrated and before.tables.get(tensor) != after.tables.get(tensor):
            return None
        if fidelity is not None and not _offers(fidelity, plan.choice, Choice(coding.codec, coding.quality)):
            return None
    return structs.replace(plan, subject=subject_digest(after))


def _segments(candidate: Candidate, bundle: Bundle) -> tuple[Segment, ...]:
    """The candidate's segments of its bundle; a variant's segments are in a bundle of its own."""
    return bundle.partition(candidate.cuts) if candidate.kind == "split" else (bundle.segment(WHOLE),)


def _offers(fidelity: Fidelity, candidate: Candidate, choice: Choice) -> bool:
    looks = candidate.looks.looks if candidate.looks is not None else ()
    cut = candidate.cuts[0] if candidate.cuts else ""
    if cut in fidelity.cuts():
        return any(e.offered and e.choice == replace(choice, looks=looks) for e in fidelity.entries if e.cut == cut)
    return choice in offered_codecs(fidelity, cut)
