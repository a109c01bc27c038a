"""Plans in the registry: each in the bundle that it was made for, carried over to later bundles where still valid."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from isthmus.artifacts.bundle import Blob, Bundle, Segment, digest_of, subject_digest
from isthmus.artifacts.choice import PHOTO_ID, Choice
from isthmus.artifacts.fidelity import Entry, Fidelity
from isthmus.artifacts.plan import Candidate, Error, Plan, to_json
from isthmus.artifacts.segment_id import WHOLE
from isthmus.codecs import find_codec
from isthmus.errors import Missing, PlanMismatch
from isthmus.pipeline.photos import sends_photos
from isthmus.registry import Registry, Version
from isthmus_tools.planner.offered import offered_codecs, short_name

# Reasons of a plan that is renewed again and again; the document's own bound is far above.
MAX_REASONS = 100


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
    if not _runs_alike(plan.choice, before, after):
        return None
    for tensor, coding in plan.choice.codecs.items():
        if coding.codec == PHOTO_ID:
            continue  # photos are decoded by the pre-processing, compared above
        if find_codec(coding.codec).calibrated and before.tables.get(tensor) != after.tables.get(tensor):
            return None
        if fidelity is not None and not _offers(fidelity, plan.choice, Choice(coding.codec, coding.quality)):
            return None
    return structs.replace(plan, subject=subject_digest(after))


def renew(plan: Plan, before: Bundle, after: Bundle, previous: Fidelity | None, fidelity: Fidelity) -> Plan | None:
    """`plan` for `before` as a plan for `after`, whose calibration learned new tables for the chosen candidate.

    The candidate keeps its cut and codec, and its quality where that is still on offer; else it takes the next finer
    quality on offer, unmeasured. `previous` and `fidelity` are the documents of the two bundles. None where the
    candidate has no such successor: other segments, several cuts or calibrated codecs, closer looks that are no longer
    on offer, or less agreement than the plan's constraints allow.
    """
    choice = plan.choice
    graded = {c for c in choice.codecs.values() if c.codec != PHOTO_ID and find_codec(c.codec).calibrated}
    if len(choice.cuts) != 1 or len(graded) != 1 or choice.variant is not None:
        return None
    if not _runs_alike(choice, before, after):
        return None
    coding, looks = next(iter(graded)), choice.looks.looks if choice.looks is not None else ()
    entry = _successor(fidelity, choice.cuts[0], Choice(coding.codec, coding.quality, looks))
    limits = plan.constraints
    if entry is None or 1 - entry.agreement > (1.0 if limits.max_disagreement is None else limits.max_disagreement):
        return None
    if limits.max_error is not None and entry.error > limits.max_error:
        return None
    earlier = [e for e in (previous.entries if previous is not None else ()) if e.cut == entry.cut]
    grown = next((entry.bytes - e.bytes for e in earlier if e.choice == Choice(coding.codec, coding.quality, looks)), 0)
    same = entry.quality == coding.quality
    renewed = structs.replace(
        choice,
        name=choice.name if same else f"split-{entry.cut}-{short_name(entry.choice)}",
        codecs={t: structs.replace(c, quality=entry.quality) if c == coding else c for t, c in choice.codecs.items()},
        up_bytes=max(0, choice.up_bytes + grown),
        error=Error(entry.error, fidelity.inputs.held_out, 1 - entry.agreement, calibrated=True),
        measured=choice.measured if same else None,
    )
    others = [c for c in plan.candidates if c.name not in (choice.name, renewed.name)]
    times = "times are those of the plan before" if same else f"{coding.quality:g} is no longer on offer, so unmeasured"
    reason = f"renewed after a calibration: {entry.choice} keeps {entry.agreement:.1%} at cut {entry.cut}; {times}"
    return structs.replace(
        plan,
        subject=subject_digest(after),
        candidates=(renewed, *others),
        chosen=renewed.name,
        why=(*plan.why, reason)[-MAX_REASONS:],
    )


def _successor(fidelity: Fidelity, cut: str, choice: Choice) -> Entry | None:
    """The entry on offer for `choice`, else for the next finer quality of its codec without closer looks."""
    entries = [e for e in fidelity.entries if e.cut == cut and e.offered and e.codec == choice.codec]
    if (same := next((e for e in entries if e.choice == choice), None)) is not None:
        return same
    finer = [e for e in entries if not choice.looks and not e.looks and e.quality > choice.quality]
    return min(finer, key=lambda e: e.quality, default=None)


def _runs_alike(candidate: Candidate, before: Bundle, after: Bundle) -> bool:
    """Whether the candidate has the same inputs, segments and weights in both bundles."""
    # Other pre-processing makes other inputs, with other sizes and errors.
    if (before.preprocess, before.postprocess, before.weights) != (after.preprocess, after.postprocess, after.weights):
        return False
    # Of a redacted photo a JPEG is sent, which not every pre-processing allows.
    if candidate.input == "photo" and not sends_photos(after):
        return False
    try:
        return _segments(candidate, before) == _segments(candidate, after)
    except Missing:
        return False


def _segments(candidate: Candidate, bundle: Bundle) -> tuple[Segment, ...]:
    """The candidate's segments of its bundle; a variant's segments are in a bundle of its own."""
    return bundle.partition(candidate.cuts) if candidate.kind == "split" else (bundle.segment(WHOLE),)


def _offers(fidelity: Fidelity, candidate: Candidate, choice: Choice) -> bool:
    looks = candidate.looks.looks if candidate.looks is not None else ()
    cut = candidate.cuts[0] if candidate.cuts else ""
    if cut in fidelity.cuts():
        return any(e.offered and e.choice == replace(choice, looks=looks) for e in fidelity.entries if e.cut == cut)
    return choice in offered_codecs(fidelity, cut)
