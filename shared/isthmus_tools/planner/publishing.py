"""Plans in the registry: each in the bundle that it was made for, carried over to later bundles where still valid."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from isthmus.artifacts.bundle import Blob, Bundle, Exit, Segment, digest_of, subject_digest
from isthmus.artifacts.choice import PHOTO_ID, Choice
from isthmus.artifacts.fidelity import Entry, Fidelity
from isthmus.artifacts.plan import Candidate, Error, Plan, to_json
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.codecs import find_codec
from isthmus.errors import Missing, PlanMismatch
from isthmus.pipeline.photos import sends_photos
from isthmus.registry import Registry, Version
from isthmus_tools.planner.offered import offered_codecs, split_name

# Reasons of a plan that is renewed again and again; the document's own bound is far above.
MAX_REASONS = 100
# Terms of a request that does not exit.
BEHIND_EXIT = ("pack", "up", "rtt", "down", "unpack", "cloud_run", "cloud_hop")
# Objectives by prices; a plan holds no prices.
PRICED = ("cost", "energy")


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
    if not _runs_alike(plan.choice, before, after) or _reveals_otherwise(plan, before, after):
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
    if not _runs_alike(choice, before, after) or plan.constraints.private_ssim is not None:
        return None
    coding, looks = next(iter(graded)), choice.looks.looks if choice.looks is not None else ()
    entry = _successor(fidelity, choice.cuts[0], Choice(coding.codec, coding.quality, looks))
    if entry is None:
        return None
    limits, lost = plan.constraints, min(1.0, 1 - entry.agreement + _lost_at_edge(choice, after))
    if lost > (1.0 if limits.max_disagreement is None else limits.max_disagreement):
        return None
    if limits.max_error is not None and entry.error > limits.max_error:
        return None
    earlier = [e for e in (previous.entries if previous is not None else ()) if e.cut == entry.cut]
    grown = next((entry.bytes - e.bytes for e in earlier if e.choice == Choice(coding.codec, coding.quality, looks)), 0)
    same = entry.quality == coding.quality
    name = split_name(entry.cut, entry.choice, head=choice.head, has_exit=choice.exit is not None)
    travels = 1 - choice.exit.share if choice.exit is not None else 1.0
    renewed = structs.replace(
        choice,
        name=choice.name if same else name,
        codecs={t: structs.replace(c, quality=entry.quality) if c == coding else c for t, c in choice.codecs.items()},
        up_bytes=max(0, choice.up_bytes + round(travels * grown)),
        error=Error(entry.error, fidelity.inputs.held_out, lost, calibrated=True),
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


def renew_exit(plan: Plan, before: Bundle, after: Bundle) -> Plan | None:
    """`plan` for `before` as a plan for `after`, where the chosen candidate's exit was fitted anew.

    Terms behind the exit count by the share of the new gate's held-out inputs that goes on. None where the candidate
    has no exit, `after` none at that cut, or sums of prices and of closer looks would have to be made again.
    """
    choice = plan.choice
    if choice.exit is None or choice.exit.share >= 1 or choice.looks is not None or plan.objective in PRICED:
        return None
    found = _exit_of(choice, after)
    if (
        found is None
        or (gate := found.gate) is None
        or _reveals_otherwise(plan, before, after)
        or not _runs_alike(structs.replace(choice, exit=None), before, after)
    ):
        return None
    # All terms behind the exit are proportional to the share that goes on.
    factor = (1 - gate.share) / (1 - choice.exit.share)
    behind = {name: factor * getattr(choice.predicted, name) for name in BEHIND_EXIT}
    lost = min(1.0, max(0.0, choice.error.disagreement - _lost_at_edge(choice, before)) + gate.bound)
    limit = plan.constraints.max_disagreement
    if limit is not None and lost > limit:
        return None
    renewed = structs.replace(
        choice,
        exit=structs.replace(choice.exit, share=gate.share, inputs=gate.inputs, examples=False),
        predicted=structs.replace(choice.predicted, **behind),
        up_bytes=round(factor * choice.up_bytes),
        down_bytes=round(factor * choice.down_bytes),
        error=Error(choice.error.relative, gate.inputs, lost, calibrated=choice.error.calibrated),
        # A measurement has both ways in it, by the former share.
        measured=None,
    )
    reason = f"renewed after a new exit at {choice.cuts[0]}: {gate.share:.1%} of {gate.inputs} held-out inputs exit"
    return structs.replace(
        plan,
        subject=subject_digest(after),
        candidates=(renewed, *(c for c in plan.candidates if c.name != choice.name)),
        why=(*plan.why, f"{reason}; unmeasured")[-MAX_REASONS:],
    )


def _lost_at_edge(candidate: Candidate, bundle: Bundle) -> float:
    """The share of predictions that the candidate's exit, or its variant of the head, may change."""
    found = _exit_of(candidate, bundle)
    bound = found.gate.bound if found is not None and found.gate is not None else 0.0
    heads = bundle.variants_of(SegmentId(stop="".join(candidate.cuts[:1])))
    lost = [1 - each.agreement for each in heads if each.name == candidate.head]
    return bound + sum(lost)


def _exit_of(candidate: Candidate, bundle: Bundle) -> Exit | None:
    """The exit of a bundle that the candidate has; None for a candidate without one."""
    return None if candidate.exit is None else bundle.exit_at(candidate.cuts[0])


def _successor(fidelity: Fidelity, cut: str, choice: Choice) -> Entry | None:
    """The entry on offer for `choice`, else for the next finer quality of its codec without closer looks."""
    entries = [e for e in fidelity.entries if e.cut == cut and e.offered and e.codec == choice.codec]
    if (same := next((e for e in entries if e.choice == choice), None)) is not None:
        return same
    finer = [e for e in entries if not choice.looks and not e.looks and e.quality > choice.quality]
    return min(finer, key=lambda e: e.quality, default=None)


def _reveals_otherwise(plan: Plan, before: Bundle, after: Bundle) -> bool:
    """Whether the plan bounds reconstructions, and these were measured anew."""
    # The new document may allow less; only a plan compares.
    return plan.constraints.private_ssim is not None and before.leak != after.leak


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


def _segments(candidate: Candidate, bundle: Bundle) -> tuple[Segment | Exit, ...]:
    """The candidate's segments of its bundle and its exit; the segments of `variant` are in a bundle of its own."""
    segments = bundle.partition(candidate.cuts) if candidate.kind == "split" else (bundle.segment(WHOLE),)
    found = _exit_of(candidate, bundle)
    heads = [bundle.segment(SegmentId("", segments[0].id.stop, candidate.head))] if candidate.head else []
    return (*segments, *heads, *([found] if found is not None else []))


def _offers(fidelity: Fidelity, candidate: Candidate, choice: Choice) -> bool:
    looks = candidate.looks.looks if candidate.looks is not None else ()
    cut = candidate.cuts[0] if candidate.cuts else ""
    if cut in fidelity.cuts():
        return any(e.offered and e.choice == replace(choice, looks=looks) for e in fidelity.entries if e.cut == cut)
    return choice in offered_codecs(fidelity, cut)
