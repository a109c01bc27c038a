"""Plans where they are kept: in the bundle that they are for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from isthmus.bundle import Blob, Bundle, digest_of, subject_digest
from isthmus.errors import PlanMalformed, PlanMismatch
from isthmus.planner.planning.document import from_json, to_json
from isthmus.planner.planning.plan import MAX_PLAN_BYTES, Plan
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
